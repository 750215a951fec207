"""Train a DBNet text detector on receipts: from a folder of labelled pages to a checkpoint and its
H-mean.

python train.py --hparams hparams/quickstart.json        minutes on a CPU, on synthetic receipts
python train.py --hparams hparams/run8.json --data DATA  the published best run on your receipts
python train.py --hparams hparams/run8.json --data DATA,MORE  trains on MORE too; scored by set
python train.py --hparams hparams/run8.json --data DATA --folds 5 --fold all  cross-validation
python train.py --resume runs/run8                       go on after a stop; exact
python train.py --lr 5e-4 --print-hparams                print the resolved values, train nothing

Values: default < --hparams file.json < --flag. The run folder is runs/NAME/ with hparams.json,
log.csv (a row an epoch), last.pt (everything exact resume needs), prev.pt (the one before), best.pt
(small, to share) and pictures/."""

import argparse
import contextlib
import copy
import csv
import dataclasses
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist

import data
import evaluate
from cleval import mean_scores, page_row
from dbnet import DBNet, db_loss, load_checkpoint, load_network, save_checkpoint, teacher_loss
from files import DataError, UsageError, exit_code, lock, replace_file, write_json
from hparams import FIELDS, given_flags, read_hparams, resolve_hparams, trainer_parser
from interval import bootstrap_groups, make_score, paired_difference, read_score
from report import progress

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
EMA_DECAY = 0.999
MAY_CHANGE = ("stop_epoch", "workers", "cache", "name", "amp")  # when a run is resumed
CALM = "lower --lr or use --amp off; the run folder keeps the last whole epoch"
FETCH_EVERY = 10  # steps between looks at the losses; each look waits for the GPU
MAXIMUM = "the next line is the maximum over epochs on the pages that select it"
LOSSES = ("loss", "loss_shrink", "loss_thresh", "loss_binary")
SCORES = ("precision", "recall", "hmean", "hmean_lo", "hmean_hi")
COLUMNS = ("epoch", "lr", *LOSSES, *SCORES)
COLUMNS += ("seconds", "images_s", "wait", "peak_gib", "val_seconds")


# ---------------------------------------------------------------- configuration


def resolve(args):
    """Hparams of default < --hparams < flags, or on --resume those of the run folder < flags that
    may change. Raises DataError, UsageError."""
    if not args.resume:
        return resolve_hparams(args)
    given = {**(read_hparams(args.hparams) if args.hparams else {}), **given_flags(args)}
    if not given.get("name"):
        raise UsageError("--resume", "names no run", "add --name or the run's folder")
    path = Path("runs", given["name"], "hparams.json")
    if path.parent.is_dir() and not path.exists():  # killed before it was written
        return resolve_hparams(args)
    saved = read_hparams(path)
    for key, new in given.items():
        if key not in MAY_CHANGE and saved.get(key, FIELDS[key].default) != new:
            what = f"{key} is {saved.get(key)!r} in run {given['name']} and cannot become {new!r}"
            remedy = f"start a new run; --init {path.parent}/last.pt begins with its weights"
            raise UsageError("--resume", what, remedy)
    return resolve_hparams(args, {**saved, "stop_epoch": 0})


def choose_run_folder(hp, stem):
    """(hp with its name, folder) of a new run, not made yet. Raises UsageError where it exists."""
    name, number = hp.name or stem, 1
    while not hp.name and Path("runs", name).exists():
        number += 1
        name = f"{stem}-{number}"
    folder = Path("runs", name)
    if folder.exists():
        raise UsageError(folder, "exists", "choose another name, or --resume to go on with it")
    return dataclasses.replace(hp, name=name), folder


# ---------------------------------------------------------------- many processes


def join_group():
    """Join the processes that torchrun started; their store, or None where this one is alone."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return None
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}", store)  # torchrun's keeps what the last one said
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    threading.Thread(target=follow_agent, args=(os.getppid(),), daemon=True).start()
    return store


def follow_agent(agent):
    """Stops this process, as a SIGTERM does, when the torchrun that started it is gone."""
    while os.getppid() == agent:
        time.sleep(1)
    print("torchrun is gone: stopping", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)


def place():
    """(rank, number) of the processes of this run; rank 0 alone prints and writes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(make):
    """What make() gives in process 0, in every process."""
    box = [make() if place()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]


def total(values):
    """A tensor on the CPU summed over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def own_device(name):
    """torch.device of --device; under torchrun each process has its own GPU. Raises UsageError."""
    gpus = torch.cuda.device_count()
    if dist.is_initialized() and gpus and name.startswith(("auto", "cuda")):
        if (here := int(os.environ["LOCAL_WORLD_SIZE"])) > gpus:
            raise UsageError("torchrun", f"{here} processes, {gpus} GPUs", "lower --nproc-per-node")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return evaluate.choose_device(name)


def machine(device, dtype):
    """The device, the number type and the versions of a run, as one line."""
    name, cuda = f"{torch.get_num_threads()} threads", ""
    if device.type == "cuda":
        name, cuda = torch.cuda.get_device_name(device), f", CUDA {torch.version.cuda}"
    kind = str(dtype or torch.float32).removeprefix("torch.")
    if cuda and dtype is torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        kind += " (emulated here: --amp fp16 is faster)"
    return f"device {device} ({name}), {kind}, torch {torch.__version__}{cuda}"


class Stop:
    """CTRL-C and SIGTERM as a flag that the loop looks at between steps."""

    def __init__(self):
        self.signal = self.agreed = None
        for number in STOP_SIGNALS:
            signal.signal(number, self.request)

    def request(self, number, _):
        if self.signal == number == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.signal = number

    def agree(self):
        """A signal to one process is one to all; they call this at the same step."""
        told = total(torch.tensor([self.signal == n for n in STOP_SIGNALS], dtype=torch.float64))
        self.agreed = next((n for n, count in zip(STOP_SIGNALS, told) if count), None)
        return self.agreed


# ---------------------------------------------------------------- data


def read_pages(hp):
    """((train, val, {set: val pages} of later sets), digests of the first two, hp with the hash of
    its split); prints counts. Raises DataError where a page is at fault or no word is."""
    check_schedule(hp)
    train, val, others, split = data.run_pages(hp)
    scored = sum(others.values(), val)
    if hp.pseudo_labels:
        pseudo = data.pseudo_pages(hp, train + scored)
        print(f"pseudo {data.describe(pseudo)}")
        if (ignored := np.mean([skip for page in pseudo for skip in page.ignore] or [0])) > 0.5:
            what = f"{ignored:.0%} of its words are don't care; lower --min-confidence"
            print(f"warning: {hp.pseudo_labels}: {what} {hp.min_confidence}")  # votes have low ones
        train = train + pseudo
    if len(sets := data.set_names(hp.data)) > 1:
        print(f"sets {hp.data}: the run's value is that of {sets[0]}")
    counted = {"train": train, "val": val} | {f"val of {name}": others[name] for name in others}
    for name, pages in counted.items():
        print(f"{name:5s} {data.describe(pages)}; {data.describe_print(pages, hp)}")
    if not any(page.group for page in val):
        print(data.NO_GROUPS)
    for path in ancestors(hp):
        evaluate.warn_of_leaks(path, scored)
    if all(all(data.repair_words(page)[1]) for page in train):
        raise DataError(hp.data, f"no word in {len(train)} train pages", "are all ignored?")
    digests = data.map_threads(lambda p: data.picture_digest(p.path), train + val, "reading pages")
    parts = digests[: len(train)], digests[len(train) :]
    return (train, val, others), parts, keep_split(hp, split) if hp.folds else hp


def ancestors(hp):
    """Checkpoints that a run begins from or learns from; a resumed one can do without its init."""
    begun = [hp.init] if Path(hp.init).is_file() else []
    return [path for path in begun + hp.teacher.split(",") if path]


def trace_origin(hp, trained):
    """What a checkpoint says of the pages behind it, as lists of digests: trained on, also by its
    ancestors, and those that chose an ancestor's epoch; who does not tell is unknown."""
    origin = {"trained": {*trained}, "chosen": set(), "unknown": {hp.pseudo_labels} - {""}}
    for path in ancestors(hp):
        before = load_checkpoint(path).get("origin") or {"unknown": [path]}
        for key, values in before.items():
            origin[key].update(values)
    return {key: sorted(values) for key, values in origin.items()}


def check_schedule(hp):
    """Warn of a cosine that does not end with the run."""
    if not 0.8 * hp.epochs <= hp.T_max <= 1.5 * hp.epochs:  # it rises again, or is cut off
        end = learning_rate(hp, hp.epochs - 1, hp.epochs)
        print(f"warning: T_max = {hp.T_max}: epoch {hp.epochs}, the last, has lr {end:.1e}")


def keep_split(hp, split):
    """hp with the hash of its split, which is written to runs/. Raises DataError when a resumed
    run's pages would fall into other folds than before."""
    if hp.split not in ("", split["hash"]):
        what = f"its pages make split {split['hash']}, in run {hp.name} it was {hp.split}"
        raise DataError(hp.data, what, "put the data back or start a new run")
    write_json(Path("runs", f"split-{split['hash']}.json"), split, indent=1)
    print(f"fold {hp.fold} of {hp.folds}, split {split['hash']}")
    return dataclasses.replace(hp, split=split["hash"])


def start_worker(_):
    for number in STOP_SIGNALS:  # to the whole group; the trainer saves, and needs their batches
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=follow_trainer, daemon=True).start()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def follow_trainer():
    """Ends a loader process when its trainer is gone, which the fork server between them hides."""
    torch.multiprocessing.parent_process().join()
    os._exit(1)


def make_loader(train, hp, device, start_epoch, start_step, cache=None):
    """One stream of batches over all epochs that are left: no epoch begins with an empty queue.
    Each process loads its share of the pages of a batch, on the canvas of the whole batch."""
    rank, size = place()
    batches = [b for e in range(start_epoch, hp.epochs) for b in data.epoch_batches(train, hp, e)]
    batches = [batch[rank::size] for batch in batches[start_step:]]
    workers = hp.workers
    if workers < 0:
        cores = cv2.getNumberOfCPUs() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = max(1, min(16, cores)) if device.type == "cuda" else 0
    ahead = 2**31 // (max(workers, 1) * hp.batch * hp.size**2 * 7)  # in /dev/shm, at most 2 GiB
    # not fork: OpenCV's and OpenMP's threads do not survive it, and the workers would wait for them
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cv2", "shapely", "torch"])  # once, in memory that they share
    return torch.utils.data.DataLoader(
        data.Receipts(train, hp, cache),
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=device.type == "cuda",
        prefetch_factor=max(1, min(4, ahead)) if workers else None,
        multiprocessing_context=context if workers else None,
        generator=torch.Generator(),  # or it would draw from the global one, which resume puts back
    )


# ---------------------------------------------------------------- one step


def learning_rate(hp, epoch, progress):
    """CosineAnnealingLR by epoch (from 0), times the warm-up by progress in epochs."""
    cosine = hp.eta_min + (hp.lr - hp.eta_min) * (1 + math.cos(math.pi * epoch / hp.T_max)) / 2
    return cosine * min(1.0, progress / hp.warmup if hp.warmup else 1.0)


def float_tensors(model):
    """Weights and batch-norm statistics of a network, in a fixed order."""
    return [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]


@torch.no_grad()
def update_ema(ema, model, step):
    """Exponential moving average of lists of tensors, in place; short memory in the first steps."""
    torch._foreach_lerp_(ema, model, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))


def start_network(hp, device, fresh):
    """The network, with hp's weights if fresh: of process 0, for others later. Raises DataError."""
    torch.manual_seed(hp.seed)
    pretrained = hp.pretrained if fresh and place()[0] == 0 and not hp.init else "none"
    model = DBNet(hp.backbone, hp.neck, pretrained)
    if hp.init and fresh:
        state = load_checkpoint(hp.init)
        try:
            model.load_state_dict(state.get("ema") or state["model"])
        except RuntimeError:
            of = state["hparams"]
            remedy = f"use --backbone {of.backbone} --neck {of.neck}"
            raise UsageError(f"--init {hp.init}", "weights of another network", remedy) from None
    if hp.sync_bn and dist.is_initialized():
        if device.type != "cuda":
            raise UsageError("sync_bn = true", "needs GPUs", "on CPUs use freeze_bn")
        from timm.layers import convert_sync_batchnorm  # torch's own would lose timm's activations

        model = convert_sync_batchnorm(model)
    return model.to(device, memory_format=torch.channels_last)


POSITION = ("epoch", "step", "losses", "timing", "best", "rows", "scores")


class Trainer:
    """What changes while training, and nothing else: network, EMA, optimizer, scaler, position,
    best, log rows; and what the checkpoints say of the pages."""

    def __init__(self, hp, device, fresh=True, digests=((), ())):
        """fresh: no state will be loaded; digests: of the train and the val pages."""
        self.hp, self.device, self.processes = hp, device, place()[1]
        self.model = self.forward = start_network(hp, device, fresh)
        if hp.compile:  # once for all canvases: other layouts of memory pin their sides
            importlib.import_module("torch._inductor.config").force_layout_optimization = True
            self.forward = torch.compile(self.model, dynamic=True)
        if dist.is_initialized():
            wrap = torch.nn.parallel.DistributedDataParallel
            self.forward = wrap(self.forward, gradient_as_bucket_view=True)
            self.forward.broadcast_buffers = False  # see averaged_model; as an argument it warns
        self.teachers = [load_network(path, device)[0] for path in hp.teacher.split(",") if path]
        self.ema = copy.deepcopy(self.model).eval() if hp.ema else None
        self.averaged = [float_tensors(self.ema), float_tensors(self.model)] if hp.ema else None
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[hp.optimizer]
        parameters = self.model.parameters()
        self.optimizer = kind(parameters, hp.lr, weight_decay=hp.weight_decay, fused=True)
        self.dtype = evaluate.amp_dtype(hp.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.best, self.rows, self.scores = {"hmean": -1.0, "epoch": 0}, [], {}
        self.origin, self.val_digests = trace_origin(hp, digests[0]), digests[1]
        self.writer, self.failed = None, []
        self.begin_epoch(0)

    def begin_epoch(self, epoch):
        """Epochs finished; steps, losses and [seconds, of them waited] of the one in hand."""
        self.epoch, self.step, self.losses, self.timing = epoch, 0, [], [0.0, 0.0]

    def train_mode(self):
        self.model.train()
        for module in self.model.modules() if self.hp.freeze_bn else ():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()

    def train_step(self, pages, maps, lr, number):
        """pages uint8 [B, H, W, 3], maps uint8 [B, 4, H, W] -> losses [4] (sum, BCE, L1, Dice), to
        be added over the processes: each has its share of the batch's pages."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, parts = self.loss_of(pages, maps)
        share = len(pages) / self.hp.batch if self.processes > 1 else 1.0
        self.optimizer.zero_grad(set_to_none=True)
        # gradients become their mean over the processes
        self.scaler.scale(loss * (share * self.processes)).backward()
        if self.hp.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.hp.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            update_ema(*self.averaged, number)
        return torch.cat([loss.detach()[None], parts]) * share

    def loss_of(self, pages, maps):
        """pages, maps: see `train_step` -> the loss, a scalar, its parts [3] (BCE, L1, Dice)."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.forward(pages)  # [B, 2, H, W]
            with torch.no_grad():
                taught = [teacher(pages)[:, 0].float().sigmoid() for teacher in self.teachers]
        loss, parts = db_loss(logits, maps)
        if taught:
            loss = loss + self.hp.teacher_weight * teacher_loss(logits, sum(taught) / len(taught))
        return loss, parts

    def rehearse(self, pages, height, width):
        """Take the memory of a step on the largest canvas before the first one, not hours later;
        weights, statistics and random state stay. pages: how many. Raises what the step would."""
        kept = [buffer.clone() for buffer in self.model.buffers()]
        moments = [torch.empty_like(p) for p in self.model.parameters() for _ in "mv"]  # Adam's
        with torch.random.fork_rng([self.device] * (self.device.type == "cuda")):
            self.train_mode()
            pages = torch.zeros(pages, height, width, 3, dtype=torch.uint8, device=self.device)
            self.loss_of(pages, pages.new_zeros(len(pages), 4, height, width))[0].backward()
        del moments
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(self.model.buffers(), kept):
            buffer.copy_(value)

    def averaged_model(self):
        """The network to validate and to share, in eval mode; the same in every process, which
        without sync_bn have batch-norm statistics of their own."""
        model = (self.ema if self.ema is not None else self.model).eval()
        if dist.is_initialized():
            for tensor in float_tensors(model):
                dist.broadcast(tensor.data, 0)
        return model

    def state(self):
        """Everything exact resume needs, as plain dicts of tensors and JSON types."""
        state = {key: part.state_dict() if part else None for key, part in self.parts().items()}
        state |= {key: getattr(self, key) for key in POSITION}
        state["rng"] = torch.get_rng_state()
        state["cuda_rng"] = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        return state | {"hparams": dataclasses.asdict(self.hp), "origin": self.origin}

    def parts(self):
        return {key: getattr(self, key) for key in ("model", "ema", "optimizer", "scaler")}

    def load(self, state, folder):
        """Go on from a state. Raises DataError when it is of another network."""
        try:
            for key, part in self.parts().items():
                if part and state[key]:  # only fp16 has a scaler's state
                    part.load_state_dict(state[key])
            for key in POSITION:
                setattr(self, key, state[key])
            before = state.get("origin") or {"unknown": [self.hp.init] if self.hp.init else []}
            for key, values in before.items():
                self.origin[key] = sorted({*self.origin[key], *values})
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = f"does not fit its hparams.json ({str(error).splitlines()[0]})"
            raise DataError(f"{folder}/last.pt", what) from None

    def save(self, folder, is_best=False):
        """Write last.pt (and best.pt) behind the training's back; waits for the save before."""
        self.wait()
        if place()[0]:
            return
        last, best = to_cpu(self.state()), None
        if is_best:
            best = {k: last[k] for k in ("hparams", "epoch", "scores")}
            best["model"] = last["ema"] or last["model"]
            chosen = sorted({*self.origin["chosen"], *self.val_digests})
            best["origin"] = {**self.origin, "chosen": chosen}
        args = folder, last, best, self.failed
        self.writer = threading.Thread(target=write_checkpoints, args=args)
        self.writer.start()

    def wait(self):
        """Wait for the save in flight. Raises OSError when it failed."""
        if self.writer is not None:
            self.writer.join()
        if self.failed:
            raise self.failed[0]


def to_cpu(value):
    """A copy of nested dicts and lists with every tensor on the CPU."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items()}
    return [to_cpu(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_checkpoints(folder, last, best, failed):
    try:
        if best is not None:
            save_checkpoint(folder / "best.pt", best)
        if (folder / "last.pt").exists():
            keep_previous(folder)
        save_checkpoint(folder / "last.pt", last)
        write_log(folder / "log.csv", last["rows"])
    except Exception as error:  # noqa: BLE001 (the trainer raises it; a thread would only print it)
        failed.append(error)


def keep_previous(folder):
    """Make prev.pt a second name of last.pt, without a moment in which either is missing."""
    temporary = folder / f".prev.pt.{os.getpid()}.tmp"
    try:
        os.link(folder / "last.pt", temporary)
    except OSError:  # a file system without hard links
        shutil.copy2(folder / "last.pt", temporary)
    os.replace(temporary, folder / "prev.pt")
    temporary.unlink(missing_ok=True)  # rename does nothing between two names of one file


def load_last(folder):
    """The newest whole checkpoint of a run (says if not last.pt) or None. Raises DataError."""
    keys, damaged = ("model", "optimizer", "hparams", "epoch", "rows"), None
    for path in (folder / "last.pt", folder / "prev.pt"):
        if path.exists():
            try:
                state = load_checkpoint(path, keys)
            except DataError as error:
                damaged = damaged or error
                continue
            if damaged:
                print(f"warning: {damaged}; going on from {path}, epoch {state['epoch']}")
            return state
    if damaged:
        raise damaged


# ---------------------------------------------------------------- log.csv and its mirrors


def write_log(path, rows):
    """log.csv, whole or not at all: one row an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="nan", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue())


def read_log(folder):
    """Rows of a run's log.csv as {epoch: {column: float}}. Raises UsageError if there is none."""
    path = Path(folder, "log.csv")
    if not path.is_file():
        raise UsageError(path, "no such file", f"is {folder} a run folder?")
    with open(path, newline="") as file:
        return {int(r["epoch"]): {k: float(v) for k, v in r.items()} for r in csv.DictReader(file)}


def shown(scores):
    """`hmean 0.97 [0.96, 0.98] over 20 pages; NAME hmean ...` of a checkpoint's scores: those of
    the run and of its later sets."""
    lines = [str(read_score(scores))]
    for name, other in scores.get("others", {}).items():
        if "hmean" in other:
            lines.append(f"{name} {read_score(other)}")
    return "; ".join(lines)


def print_row(trainer, baseline):
    """An epoch in one aligned line: log.csv's columns, later sets, the difference to a baseline."""
    row = trainer.rows[-1]
    line = (
        "epoch {epoch:3d}/{epochs}  lr {lr:.2e}  loss {loss:6.3f} ({loss_shrink:.3f} "
        "{loss_thresh:.3f} {loss_binary:.3f})  precision {precision:.4f}  recall {recall:.4f}  "
        "{shown}  {seconds:.0f} s (validation {val_seconds:.0f})  {images_s:.1f} images/s  "
        "wait {wait:.0%}  peak {peak_gib:.1f} GiB"
    ).format(epochs=trainer.hp.epochs, shown=shown(trainer.scores), **row)
    if row["epoch"] in baseline:
        line += f"  vs baseline {row['hmean'] - baseline[row['epoch']]['hmean']:+.4f}"
    print(line, flush=True)


def tagged(row):
    """A row's numbers by the names that W&B and TensorBoard show: val/hmean, train/loss."""
    return {("val/" if k in SCORES else "train/") + k: v for k, v in row.items() if k != "epoch"}


def to_tensorboard(hp, folder):
    """Writes runs/NAME/tensorboard anew: after a resume nothing is there twice."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    writer = SummaryWriter(folder / "tensorboard")

    def send(row, pictures=(), best=None):
        for tag, number in tagged(row).items():
            writer.add_scalar(tag, number, row["epoch"])
        for path in pictures:
            writer.add_image(path.stem, data.read_image(path), row["epoch"], dataformats="HWC")
        writer.flush()

    return send


def to_wandb(hp, folder):
    """Sends to W&B, or without an account to runs/NAME/wandb for `wandb sync`, under one id."""
    import wandb

    wandb.finish()  # the run before in this process
    past = sorted(folder.glob("wandb/*run-*-*"))
    for path in folder.glob("wandb/offline-run-*"):
        shutil.rmtree(path)  # its rows are sent again
    online = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
    options = {"mode": None if online else "offline", "settings": wandb.Settings(silent=True)}
    options |= {"id": past[-1].name.rpartition("-")[2] if past else None, "resume": "allow"}
    options |= {"name": hp.name, "dir": folder, "config": dataclasses.asdict(hp)}
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", "receipts"), **options)
    run.define_metric("*", step_metric="epoch")
    known = run.summary.get("epoch", 0)
    kept = os.path.relpath(Path(run.dir).parent)
    offline = run.settings.mode == "offline"
    print(f"wandb: {kept}; to send it: wandb sync {kept}" if offline else f"wandb: {run.url}")

    def send(row, pictures=(), best=None):
        step = row["epoch"]
        if step > known:
            run.log({"epoch": step, **tagged(row)}, step=step)
        if pictures:
            run.log({f"pages/{p.stem}": wandb.Image(str(p)) for p in pictures}, step=step)
        if best:
            run.log_artifact(best, name=f"best-{run.id}", type="model")

    return send


MIRRORS = {"wandb": to_wandb, "tensorboard": to_tensorboard}


def start_mirrors(kinds, hp, folder, rows):
    """A function(row, pictures, best.pt) for each mirror, now or before. Raises UsageError."""
    if place()[0]:
        return []
    try:
        kinds = [k for k in MIRRORS if k in kinds or (folder / k).is_dir()]
        mirrors = [MIRRORS[kind](hp, folder) for kind in kinds]
    except Exception as error:  # noqa: BLE001 (W&B has many of its own)
        raise UsageError("--log", (str(error).splitlines() or [repr(error)])[0]) from None
    for row in rows:
        for send in mirrors:
            send(row)
    return mirrors


# ---------------------------------------------------------------- the loop


def fetch_losses(trainer, pending, steps):
    """Move the losses of the last steps [K][4] to the host and add them over the processes; raise
    DataError, flag outliers. Raises OSError as well when the last save failed."""
    for row in total(torch.stack(pending).double().cpu()).tolist():
        trainer.losses.append(row)
        number, epoch = len(trainer.losses), trainer.epoch + 1
        if not all(map(math.isfinite, row)):
            where = f"epoch {epoch}, step {number} of {steps}"
            raise DataError(where, f"loss is {row[0]}", CALM, 4)
        recent = [r[0] for r in trainer.losses[-50:-1]]
        if len(recent) >= 10 and row[0] > 3 * statistics.median(recent):
            where = f"in epoch {epoch}, step {number}"
            print(f"warning: loss {row[0]:.3f} {where} is above 3 times its running median")
    pending.clear()
    if trainer.failed:
        raise trainer.failed[0]


def train_epoch(trainer, batches, steps, stop, steps_left):
    """The rest of one epoch, up to a signal. Losses and times go to the trainer. steps_left: of the
    run, to say once how long it will take, or 0."""
    hp, device, pending = trainer.hp, trainer.device, []
    look_every = FETCH_EVERY if device.type == "cuda" else 1
    trainer.train_mode()
    begin, measured = time.perf_counter(), None
    for step in progress(range(trainer.step, steps), f"epoch {trainer.epoch + 1}, steps"):
        asked = time.perf_counter()
        batch = next(batches)
        trainer.timing[1] += time.perf_counter() - asked
        pages, maps = (part.to(device, non_blocking=True) for part in batch)
        number = trainer.epoch * steps + step
        lr = learning_rate(hp, trainer.epoch, (number + 1) / steps)
        pending.append(trainer.train_step(pages, maps, lr, number))
        trainer.step = step + 1
        if trainer.step % look_every == 0 or trainer.step == steps:
            fetch_losses(trainer, pending, steps)
            if stop.agree():
                break
            now = time.perf_counter(), trainer.step
            measured = measured or now  # not from the start, which loads, and may compile
            if steps_left and now[1] - measured[1] >= 5:
                seconds = (now[0] - measured[0]) / (now[1] - measured[1]) * steps_left
                print(f"about {duration(seconds)} for {steps_left} steps, validation not counted")
                if device.type == "cpu" and seconds > 3600:
                    print("this is a CPU; the quick start is --hparams hparams/quickstart.json")
                steps_left = 0
    trainer.timing[0] += time.perf_counter() - begin


def duration(seconds):
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{int(unit == 'h')}f} {unit}"
    return f"{seconds:.0f} s"


def score_pages(trainer, val, seen=None):
    """Rows of the page metric [N, 4] of val, and their Score; each process predicts its share."""
    rank, size = place()
    rows = torch.zeros(len(val), 4, dtype=torch.float64)
    network = evaluate.Network(trainer.averaged_model(), trainer.hp)
    pages, judge = val[rank::size], lambda page, found: page_row("page", page, found[0])
    judged = evaluate.predict(network, pages, trainer.device, judge)  # it judges beside the network
    rows[rank::size] = torch.tensor(np.array([row for _, row in judged])).reshape(-1, 4)
    rows = total(rows).numpy()
    return rows, make_score(rows, mean_scores, bootstrap_groups(val), seen)


def finish_epoch(trainer, val, others, steps):
    """Validate, append the epoch's row, advance. Returns (row, whether it is the best so far)."""
    hp, begin = trainer.hp, time.perf_counter()
    if not torch.stack([t.isfinite().all() for t in float_tensors(trainer.model)]).all():
        raise DataError(f"epoch {trainer.epoch + 1}", "weights are not finite", CALM, 4)
    known = evaluate.seen_digests(trainer.origin, hp).items()
    seen = {how: len(digests & {*trainer.val_digests}) for how, digests in known}
    rows, score = score_pages(trainer, val, seen)
    beside = {name: score_pages(trainer, pages)[1] for name, pages in others.items()}
    trainer.scores = {
        **dataclasses.asdict(score),
        "others": {name: dataclasses.asdict(other) for name, other in beside.items()},
        "groups": bootstrap_groups(val),
        "digests": trainer.val_digests,
        "pages": {page.name: float(hmean) for page, (_, _, hmean, _) in zip(val, rows)},
    }
    row = {"precision": score.precision, "recall": score.recall, "hmean": score.hmean}
    row["hmean_lo"], row["hmean_hi"] = score.interval
    row["epoch"], row["lr"] = trainer.epoch + 1, learning_rate(hp, trainer.epoch, trainer.epoch + 1)
    row |= zip(LOSSES, np.mean(trainer.losses, 0).tolist())
    row["val_seconds"] = time.perf_counter() - begin
    seconds, waited = trainer.timing
    row["seconds"], row["wait"] = seconds + row["val_seconds"], waited / seconds
    row["images_s"] = steps * hp.batch / seconds
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30  # of the run's GPU; 0 on a CPU
    trainer.rows.append({key: row[key] for key in COLUMNS})
    if is_best := row["hmean"] > trainer.best["hmean"]:
        trainer.best = {"hmean": row["hmean"], "epoch": row["epoch"]}
    trainer.begin_epoch(row["epoch"])
    return trainer.rows[-1], is_best


def open_folder(hp, folder, resume):
    """Make or find a run's folder; a lock on it. Raises UsageError if another trains there."""
    folder.mkdir(parents=True, exist_ok=resume)
    if not (folder / "hparams.json").exists():
        write_json(folder / "hparams.json", dataclasses.asdict(hp), indent=1)
    held = lock(folder / "hparams.json")
    if held is None:
        raise UsageError(folder, "another process is training there", "wait for it, or stop it")
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    print(f"run folder {folder}", flush=True)
    return held


def load_run(folder):
    """What a run goes on from, or None; log.csv is cut to it."""
    state = load_last(folder)
    try:
        if state and state["best"]["epoch"]:
            load_checkpoint(folder / "best.pt")
    except DataError as error:
        print(f"warning: {error}; the next epoch's becomes best.pt")
        state["best"] = {"hmean": -1.0, "epoch": 0}
    if state:
        write_log(folder / "log.csv", state["rows"])
        inside = f", step {state['step']}" if state["step"] else ""
        print(f"resuming {folder} after epoch {state['epoch']}{inside}")
    else:
        print(f"{folder} has no checkpoint yet: starting at epoch 1")
    return state


def run(hp, folder, resume, options, stop):
    """Train to hp.epochs (or hp.stop_epoch); options: the command line's. Returns the exit code."""
    print(machine(options.device, evaluate.amp_dtype(hp.amp, options.device)))
    pages, digests, hp = from_first(lambda: read_pages(hp))
    trainer = None if resume else Trainer(hp, options.device, True, digests)  # no folder yet
    with open_folder(hp, folder, resume) if place()[0] == 0 else contextlib.nullcontext():
        state = from_first(lambda: load_run(folder) if resume else None)
        trainer = trainer or Trainer(hp, options.device, state is None, digests)
        if state:
            trainer.load(state, folder)
        return train_run(trainer, pages, folder, options, stop)


def train_run(trainer, pages, folder, options, stop):
    """What is left of a run; pages: of `read_pages`. Returns the exit code."""
    (train, val, others), hp, begin = pages, trainer.hp, time.perf_counter()
    mirrors = start_mirrors(options.log, hp, folder, trainer.rows)
    steps = -(-len(train) // hp.batch)
    last = min(hp.epochs, hp.stop_epoch or hp.epochs)
    left = (hp.epochs - trainer.epoch) * steps - trainer.step
    cache = folder / "cache" if hp.cache else None
    loader = make_loader(train, hp, options.device, trainer.epoch, trainer.step, cache)
    if options.device.type == "cuda" and left:
        keys = max(loader.batch_sampler, key=lambda keys: math.prod(keys[0][2:]))
        trainer.rehearse(len(keys), *keys[0][2:])
    batches = iter(loader)
    try:
        while trainer.epoch < last and not stop.agreed:
            train_epoch(trainer, batches, steps, stop, left)
            left = is_best = 0
            if trainer.step == steps:
                row, is_best = finish_epoch(trainer, val, others, steps)
                print_row(trainer, options.baseline[1])
                stop.agree()
            trainer.save(folder, is_best)
            for send in mirrors if trainer.step == 0 else ():
                send(row)
        from_first(trainer.wait)
    finally:
        for loader in torch.multiprocessing.active_children():
            loader.kill()  # an error's traceback holds `batches`, and they ignore SIGTERM
        del batches
        shutil.rmtree(folder / "cache", ignore_errors=True)
    stopped = stop.agreed if trainer.epoch < last else 0
    if trainer.epoch == hp.epochs:
        finish_run(trainer, val, folder, mirrors, options.artifact)
        print(f"{folder}: {duration(time.perf_counter() - begin)} in this process")
        if options.baseline[0]:
            print_gain(trainer.scores, Path(options.baseline[0]))
    print_end(trainer, steps, stopped)
    return 128 + stopped if stopped else 0


def print_gain(scores, folder):
    """The paired difference of a run's last epoch to a baseline's, on the same pages."""
    pages, state = scores["pages"], load_last(folder)
    other = state["scores"].get("pages", {}) if state else {}
    if pages.keys() != other.keys():
        return print(f"baseline {folder}: no last epoch on these pages, so no paired difference")
    rows = [np.array([[one[name]] * 3 + [1] for name in pages]) for one in (pages, other)]
    difference = paired_difference(*rows, mean_scores, scores["groups"])
    print(f"{difference}, vs {folder}")


def finish_run(trainer, val, folder, mirrors, artifact):
    """Pictures of the first validation pages with the last weights, to the mirrors as well."""
    network = evaluate.Network(trainer.averaged_model(), trainer.hp)
    if place()[0]:
        return
    for _, (page, found) in evaluate.predict(network, val[:8], trainer.device, lambda *two: two):
        evaluate.draw_picture(page, *found, folder / "pictures")
    for send in mirrors:
        pictures = sorted((folder / "pictures").glob("*.jpg"))
        send({"epoch": trainer.epoch}, pictures, folder / "best.pt" if artifact else None)


def print_end(trainer, steps, stopped):
    """How far a run has come, how to go on and its scores."""
    hp, where = trainer.hp, f"after epoch {trainer.epoch} of {trainer.hp.epochs}"
    if stopped and trainer.step:
        where = f"in epoch {trainer.epoch + 1}, step {trainer.step} of {steps}"
    if stopped or trainer.epoch < hp.epochs:
        how = f"{'stopped' if stopped else 'paused'} {where}"
        amp = f" --amp {hp.amp}" * (hp.amp != "auto")  # another than the run began with, perhaps
        print(f"{how}; go on: python train.py --name {hp.name} --resume{amp}")
    if trainer.rows and not stopped:
        print(f"last {shown(trainer.scores)}; {MAXIMUM}")
        print(f"best hmean {trainer.best['hmean']:.4f} epoch {trainer.best['epoch']}")


# ---------------------------------------------------------------- folds and replicas


def members(args, stem):
    """Hparams of each run of --fold all, --seeds N, named STEM-fold2-seed1. Raises UsageError."""
    if place()[1] > 1:
        raise UsageError("torchrun", "not with --fold all, --seeds", "train one --fold, one --seed")
    all_folds, seeds = args.fold == "all", args.seeds
    shared = vars(args) | {"resume": False} | ({"fold": None} if all_folds else {})
    hp = resolve(argparse.Namespace(**shared))
    result = []
    for fold in range(1, hp.folds + 1) if all_folds and hp.folds else [hp.fold]:
        for seed in range(hp.seed, hp.seed + max(seeds or 1, 1)):
            name = (hp.name or stem) + f"-fold{fold}" * all_folds + f"-seed{seed}" * bool(seeds)
            result.append(dataclasses.replace(hp, name=name, fold=fold, seed=seed))
    return result


def run_members(runs, args):
    """Train runs in turn; a failure is named and the others go on. Returns the exit code."""
    made = [hp for hp in runs if Path("runs", hp.name, "hparams.json").exists()]
    if made and not args.resume:
        what = "exists", "choose another name, or --resume to go on"
        raise UsageError(f"runs/{made[0].name}", *what)
    for hp in made:  # each goes on with its own values, as a single run does
        own = {"name": hp.name, "fold": str(hp.fold), "seed": str(hp.seed)}
        runs[runs.index(hp)] = first = resolve(argparse.Namespace(**vars(args) | own))
    for k, hp in enumerate(runs if made else ()):  # those that never began: as the others
        if not Path("runs", hp.name, "hparams.json").exists():
            runs[k] = dataclasses.replace(first, name=hp.name, fold=hp.fold, seed=hp.seed)
    stop, failed = Stop(), []
    for hp in runs:
        folder = Path("runs", hp.name)
        if (folder / "log.csv").exists() and hp.epochs in read_log(folder):
            print(f"{folder} is finished")
            continue
        work = partial(run, hp, folder, folder.exists(), args, stop)
        code = exit_code(partial(explaining, work))
        if code > 128:
            return code
        if code:
            failed.append(hp.name)
    report_members([hp for hp in runs if hp.name not in failed])
    for name in failed:
        print(f"failed: {name}; go on by the same command and --resume")
    return 1 if failed else 0


def report_members(runs):
    """Print the last H-mean of each run, of all, and of all pages by who held them out."""
    scores = [load_last(Path("runs", hp.name))["scores"] for hp in runs]
    for hp, one in zip(runs, scores):
        print(f"{hp.name}  last {shown(one)}")
    if len(values := [one["hmean"] for one in scores]) > 1:
        mean, sd = statistics.mean(values), statistics.stdev(values)
        print(f"last hmean of {len(values)} runs: mean {mean:.4f}, standard deviation {sd:.4f}")
    folds, pages = {hp.fold for hp in runs}, {}  # {(page, group): its scores}
    for one in scores:
        for (name, hmean), group in zip(one["pages"].items(), one.get("groups", one["pages"])):
            pages.setdefault((name, group), []).append(hmean)
    if len(values) > 1 and len(folds) in (1, runs[0].folds):
        rows = np.array([[statistics.mean(values)] * 3 + [1] for values in pages.values()])
        score = make_score(rows, mean_scores, [group for _, group in pages])
        remark = ", in sample" if any(read_score(one).in_sample() for one in scores) else ""
        name = "out of fold" if len(folds) > 1 else "mean of replicas"
        print(f"{name}: {score}{remark}")


def begin(args, stem):
    """(hparams, folder, whether there is something to go on from) of one run; nothing is made yet.
    A process group that torchrun started again goes on by itself. Raises UsageError."""
    hp = resolve(args)
    if not hp.name and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise UsageError("--max-restarts", "a restarted group has to find its run", "add --name")
    if hp.batch < place()[1]:
        raise UsageError(f"batch = {hp.batch}", f"{place()[1]} processes need a page each")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if again and not args.resume and Path("runs", hp.name).exists():
        args.resume = True
        hp = resolve(args)
    if args.resume:
        return hp, Path("runs", hp.name), True
    return *choose_run_folder(hp, stem), False


def parse_args(argv):
    """The command line; --resume may have a run's folder, a fold is named as by --fold all."""
    parser = trainer_parser(__doc__)
    args, rest = parser.parse_known_args(argv)
    if args.resume and not args.name and len(rest) == 1:
        run = rest.pop().removesuffix("last.pt")
        args.name = os.path.relpath(run, "runs") if "/" in run else run
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.name and "/" not in args.name and args.fold not in (None, "all"):  # a sweep has trials
        args.name = args.name.removesuffix(f"-fold{args.fold}") + f"-fold{args.fold}"
    return args


def check_flags(args, hp):
    """Raises UsageError on flags that have no effect."""
    mirrored = "wandb" in args.log or args.resume and Path("runs", hp.name, "wandb").is_dir()
    rules = [
        ("fold", hp.folds, "only with --folds N, in the command or its file"),
        ("seeds", args.seeds is None or args.seeds > 0, "at least 1 is needed"),
        ("val_data", not hp.folds, "not with --folds, which hold pages out"),
        ("min_confidence", hp.pseudo_labels, "only with --pseudo-labels"),
        ("teacher_weight", hp.teacher, "only with --teacher"),
        ("pretrained", not hp.init or hp.pretrained == "none", "not with --init"),
        ("artifact", mirrored, "only with --log wandb"),
        ("sync_bn", dist.is_initialized() or not hp.sync_bn, "only under torchrun"),
    ]
    evaluate.refuse_idle(args, rules)


def start(args):
    """Do what the command line says; returns the exit code."""
    stem = Path(args.hparams).stem if args.hparams else "run"
    stem += f"-fold{args.fold}" * (args.fold not in (None, "all"))
    several = args.fold == "all" or args.seeds is not None
    args.log += ["wandb"] if "WANDB_SWEEP_ID" in os.environ else []
    runs = members(args, stem) if several else [resolve(args)]
    check_flags(args, runs[0])
    if args.print_hparams:
        print(json.dumps(dataclasses.asdict(runs[0]), indent=1))
        return 0
    args.device = own_device(args.device)
    args.baseline = (args.baseline, read_log(args.baseline)) if args.baseline else ("", {})
    for kind in args.log:  # a folder of logs, named as the package, is a module without a file
        if not getattr(importlib.util.find_spec(kind), "origin", None):
            raise UsageError(f"--log {kind}", "its package is missing", f"pip install {kind}")
    if several:
        return run_members(runs, args)
    hp, folder, resume = from_first(lambda: begin(args, os.environ.get("WANDB_RUN_ID", stem)))
    return run(hp, folder, resume, args, Stop())


def main(argv=None):
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # canvases vary
    store = join_group()

    def work():
        with open(os.devnull, "w") as hidden:  # rank 0 alone prints, but for the first error
            out, err = (hidden, hidden) if place()[0] else (sys.stdout, sys.stderr)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = explaining(lambda: start(parse_args(argv)), store)
            if store:
                dist.destroy_process_group()
            return code

    def say(line):
        with contextlib.suppress(dist.DistError):  # the store's host is gone, and has said why
            if store is None or store.add("failures", 1) == 1:
                print(f"error: {line}", file=sys.stderr)

    return exit_code(work, say)


def explaining(work, store=None):
    """work(). Raises DataError where an error of PyTorch has words for users, else that error."""
    try:
        return work()
    except (RuntimeError, ConnectionError, EOFError) as error:
        text, torn = str(error), not isinstance(error, RuntimeError | BrokenPipeError)
        if "shared memory" in text and "No space left" in text:
            remedy = "lower --workers, or raise its size (Docker: --shm-size=8g)"
            raise DataError("/dev/shm", "is full", remedy) from None
        if torn or "DataLoader worker" in text and not text.startswith("Caught"):
            remedy = "was memory or /dev/shm full? lower --workers"
            raise DataError("a loader process", "was killed", remedy, 137) from None
        if store and any(word in text for word in ("gloo", "NCCL", "peer", "onnection")):
            kept = "the run folder keeps the last whole epoch"
            raise DataError("a process of the group", "was lost", kept, 137) from None
        raise


if __name__ == "__main__":
    sys.exit(main())
