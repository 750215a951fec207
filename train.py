"""Train a DBNet text detector on receipts: from a folder of labelled pages to a checkpoint and its
H-mean.

python train.py --hparams hparams/quickstart.json        minutes on a CPU, on synthetic receipts
python train.py --hparams hparams/run8.json --data DATA  the published best run on your receipts
python train.py --hparams hparams/run8.json --data DATA,MORE  trains on MORE too; scored by set
python train.py --hparams hparams/run8.json --data DATA --folds 5 --fold all  cross-validation
python train.py --resume runs/run8                       go on after a stop; on a CPU bit for bit
python train.py --lr 5e-4 --print-hparams                print the resolved values, train nothing

Values: default < --hparams file.json < --flag. The run folder is runs/NAME/ with hparams.json,
log.csv (a row an epoch), last.pt (everything that --resume needs), prev.pt (the one before),
best.pt (small, to share) and pictures/."""

import os
import signal
import sys


def end_import(*_):
    os.write(2, b"error: interrupted; nothing has begun\n")
    os._exit(130)


# the imports below take seconds, and most of them would answer CTRL-C with a traceback
if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_import)

import argparse
import contextlib
import copy
import csv
import dataclasses
import importlib.util
import io
import json
import math
import shlex
import shutil
import statistics
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist

import audit
import data
import evaluate
import predict
import sources
from cleval import mean_scores, page_row
from command import given_flags, resolve_hparams, trainer_parser
from dbnet import (
    DBNet,
    db_loss,
    float_tensors,
    is_begun,
    keep_previous,
    load_checkpoint,
    load_last,
    save_checkpoint,
    teacher_loss,
    to_cpu,
    update_ema,
)
from engine import amp_dtype, describe_machine
from files import (
    DataError,
    UsageError,
    exit_code,
    lock_folder,
    print_error,
    replace_file,
    write_json,
)
from folding import network_of
from hparams import FIELDS, changed, read_hparams
from interval import bootstrap_groups, make_score, paired_difference, read_score
from labels import read_competition
from mirrors import start_mirrors
from pictures import bytes_digest
from processes import (
    Stop,
    device_of_process,
    explain_errors,
    from_first,
    join_group,
    process_count,
    rank,
    start_worker,
    total,
)
from progress import progress

MAY_CHANGE = ("stop_epoch", "workers", "cache", "name", "amp", "compile")  # when a run is resumed
# values that a run finds out for itself: those in the file of --hparams may be another run's
FOUND = ("split", "text_height")
NO_BEST = {"hmean": -1.0, "epoch": 0}
NEW_NAME = "choose another name, or --resume to go on with it"
AGAIN = "the same command, with --resume if one of them has begun"
BUSY = "another process is training there"
CALM = "lower --lr or use --amp off; the run folder keeps the last whole epoch"
FETCH_EVERY = 10  # steps between looks at the losses; each look waits for the GPU

# columns of log.csv
LOSSES = ("loss", "loss_shrink", "loss_thresh", "loss_binary")
SCORES = ("precision", "recall", "hmean", "hmean_lo", "hmean_hi")
CLOCKS = ("seconds", "images_s", "wait", "peak_gib", "val_seconds")
COLUMNS = ("epoch", "lr", *LOSSES, *SCORES, *CLOCKS)


# ---------------------------------------------------------------- configuration


def resolve_run(args):
    """Hparams of one run: default < --hparams < flags or, on --resume, those of the run folder <
    flags that may change. Raises DataError, UsageError."""
    if not args.resume:
        return new_hparams(args)

    given = read_hparams(args.hparams) if args.hparams else {}
    given |= given_flags(args)
    name = given.get("name")
    if not name:
        raise UsageError("--resume", "names no run", "add --name or the run's folder")
    path = Path("runs", name, "hparams.json")
    written = path.exists() and path.stat().st_size
    # a run that was killed before it wrote its values starts again if values are given again:
    # without them it would take the defaults
    begins_again = path.parent.is_dir() and not written and given.keys() - MAY_CHANGE
    if begins_again and not any(path.parent.glob("*/")):  # else it is a folder of runs
        return new_hparams(args)

    saved = read_hparams(path)
    for key, new in given.items():
        old = saved.get(key, FIELDS[key].default)
        if key not in MAY_CHANGE + FOUND and old != new:
            what = f"{key} is {old!r} in run {name} and cannot become {new!r}"
            remedy = f"start a new run; --init {path.parent}/last.pt begins with its weights"
            raise UsageError("--resume", what, remedy)
    hp = resolve_hparams(args, {**saved, "stop_epoch": 0})
    return changed(hp, **{key: saved.get(key, FIELDS[key].default) for key in FOUND})


def new_hparams(args):
    """Hparams of a run that begins, without a split: that of --hparams may be another run's."""
    return changed(resolve_hparams(args), split="")


def name_run(hp, stem):
    """Hparams of a new run with its name: that of --name, or the stem, counted up. Raises
    UsageError where a run of the given name exists."""
    name = hp.name or stem
    number = 1
    while not hp.name and Path("runs", name).exists():
        number += 1
        name = f"{stem}-{number}"
    if Path("runs", name).exists():
        raise UsageError(f"runs/{name}", "exists", NEW_NAME)
    return changed(hp, name=name)


# ---------------------------------------------------------------- data


class RunPages(NamedTuple):
    """The inspected pages of a run."""

    train: list
    val: list  # of the first set of hp.data; they choose the best epoch
    others: dict  # {later set: its val pages}
    record: dict  # {"train": its pages, "val": those of all sets}, as `record_pages` has them


def read_pages(hp, ancestors):
    """RunPages of a run, and hp with what follows from them: the hash of the split, and the height
    of text. Prints what they hold. ancestors: of `load_ancestors`. Raises DataError for a faulty
    page, or if the train pages, or the val pages of a set, have no usable word."""
    check_schedule(hp)

    # doubtful labels become don't care, and pages with pseudo labels are added
    train, val, others, split = data.run_pages(hp)
    scored = sum(others.values(), val)
    if hp.doubt:
        held = {page.name for page in scored} if hp.folds else ()  # the other folds' suspects
        count = audit.mask_doubt(train, hp.doubt, hp.doubt_above, held)
        print(f"doubt {count} suspects of {hp.doubt} are don't care in training")
    if hp.pseudo_labels:  # after that: other pages may have the names of those with suspects
        train = train + read_pseudo_pages(hp, train + scored)

    # say what they hold
    sets = data.set_names(hp.data)
    if len(sets) > 1:
        print(f"sets {hp.data}: the run's value is that of {sets[0]}")
    named = {"train": train, "val": val}
    named |= {f"val of {name}": theirs for name, theirs in others.items()}
    for name, part in named.items():
        print(f"{name:5s} {data.describe(part)}; {data.describe_heights(part, hp)}")
        if all(all(page.repaired.ignore) for page in part):  # of val pages all scores would be 0
            raise DataError(
                part[0].source,
                f"no word in {len(part)} {name} pages",
                "label them; or are all words ignored?",
            )
    if not any(page.group for page in val):
        print(data.NO_GROUPS)

    # warn of what makes the score optimistic, or the training worse
    for path, state in ancestors.items():
        source = sources.Source(path, state, state["hparams"], None)
        evaluate.warn_of_leaks(source, scored)
    warn_of_no_labels(train)

    if hp.folds:
        hp = keep_split(hp, split)
    hp = changed(hp, text_height=data.text_height(train, hp))  # for --size auto
    record = {"train": record_pages(train), "val": record_pages(scored)}
    return RunPages(train, val, others, record), hp


def warn_of_no_labels(train):
    """Warn of folders whose train pages all lack labels. A page may well be without text; a folder
    of such pages was probably never labelled."""
    folders = {Path(page.source).parent for page in train}
    labelled = {Path(page.source).parent for page in train if page.polygons}
    for folder in sorted(folders - labelled):
        what = "none of its train pages has a label: training takes all of it for ground"
        sources.warn(folder, f"{what}; leave it out, or label it")


def read_pseudo_pages(hp, labelled):
    """Pages of hp.pseudo_labels that are not among the labelled ones; prints what they hold. Raises
    DataError."""
    pages = pseudo_pages(hp, labelled)
    print(f"pseudo {data.describe(pages)}")
    if not any(page.polygons for page in pages):  # text without a label would be background
        what = f"no word in {len(pages)} new pages"
        raise DataError(hp.pseudo_labels, what, "name a predictions.json of evaluate.py --out")
    ignored = [skip for page in pages for skip in page.ignore]
    if np.mean(ignored) > 0.5:  # an ensemble's votes have low confidences
        what = f"{np.mean(ignored):.0%} of its words are don't care; lower --min-confidence"
        print(f"warning: {hp.pseudo_labels}: {what} {hp.min_confidence}")
    return pages


def pseudo_pages(hp, known):
    """Pages of hp.pseudo_labels, a predictions file: words under hp.min_confidence are don't care.
    Pictures lie beside the file or with the first set of hp.data. Pages whose picture is
    a near-duplicate of one of `known`, the run's own inspected train and val pages, are left out.
    Names do not matter here, since other pages may have the same. Raises DataError."""
    image_dir = None
    if not (Path(hp.pseudo_labels).parent / "images").is_dir():
        first = data.resolve_data(data.set_names(hp.data)[0])
        image_dir = hp.image_dir or (first.parent if first.is_file() else first)
    pages = read_competition(hp.pseudo_labels, image_dir)
    for page in pages:
        doubtful = [confidence < hp.min_confidence for confidence in page.confidences]
        page.ignore = [*map(max, page.ignore, doubtful)]
    data.inspect_pages(pages, "reading pseudo-labelled pages")
    thumbnails = data.stack_thumbnails(known)
    pages = [p for p in pages if (thumbnails @ p.thumbnail).max() <= data.NEAR_DUPLICATE]
    if not pages:
        raise DataError(hp.pseudo_labels, f"every page of it is labelled in {hp.data} already")
    return pages


def load_ancestors(hp):
    """{path: its dict} of the checkpoints that a run starts from or learns from. A resumed run no
    longer needs the one it started from. Raises DataError."""
    begun = is_begun(Path("runs", hp.name))
    paths = ["" if begun else hp.init, *hp.teacher.split(",")]
    return {path: load_checkpoint(path) for path in paths if path}


def trace_origin(hp, train, ancestors):
    """What a checkpoint records of the pages behind it: {"trained": digests of the pages that it or
    an ancestor was trained on, "chosen": of those that chose an ancestor's epoch, "unknown": files
    that record neither}, as sets."""
    origin = {
        "trained": {page.digest for page in train},
        "chosen": set(),
        "unknown": {hp.pseudo_labels} - {""},
    }
    for path, state in ancestors.items():
        recorded = state.get("origin") or {"unknown": [path]}
        for key, values in recorded.items():
            origin[key].update(values)
    return origin


def record_pages(pages):
    """{path: digests of a page's picture and of its labels}. last.pt keeps it, to be compared when
    the run is resumed."""
    record = {}
    for page in pages:
        words = [page.group, page.ignore, page.texts, [p.tolist() for p in page.polygons]]
        labels = bytes_digest(json.dumps(words).encode())
        record[str(page.path)] = f"{page.digest} {labels}"
    return record


def list_changes(before, now):
    """Two records of pages, {path: digests} -> what differs, as words; "" if nothing does."""
    changes = []
    for path in sorted(before.keys() | now.keys()):
        if path not in now:
            changes.append(f"{path} removed")
        elif path not in before:
            changes.append(f"{path} added")
        elif before[path].split()[0] != now[path].split()[0]:
            changes.append(f"{path} picture changed")
        elif before[path] != now[path]:
            changes.append(f"{path} labels changed")
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return ", ".join(changes[:3]) + more


def check_schedule(hp):
    """Warn of a cosine that rises again, or is cut off, before the run ends."""
    if not 0.8 * hp.epochs <= hp.T_max <= 1.5 * hp.epochs:
        end = learning_rate(hp, hp.epochs - 1, hp.epochs)
        print(f"warning: T_max = {hp.T_max}: lr ends at {end:.1e}, in epoch {hp.epochs}")


def keep_split(hp, split):
    """hp with the hash of its split, which is written to runs/. Raises DataError where the pages of
    a resumed run would fall into other folds than before."""
    if hp.split not in ("", split["hash"]):
        what = f"its pages make split {split['hash']}, in run {hp.name} it was {hp.split}"
        raise DataError(hp.data, what, "put the data back or start a new run")

    write_json(Path("runs", f"split-{split['hash']}.json"), split, indent=1)
    print(f"fold {hp.fold} of {hp.folds}, split {split['hash']}")
    return changed(hp, split=split["hash"])


def canvas_step(hp, device):
    """Sides of canvases are multiples of this many px. On a GPU each new canvas costs time once,
    for cuDNN to choose kernels; where pages differ in both sides, 64 saves more than its padding
    costs. A CPU keeps 32, and with it the numbers of earlier runs."""
    return 64 if device.type == "cuda" and hp.fit == "area" else 32


def make_loader(trainer, device):
    """A DataLoader of all batches that are left, over the ends of epochs, so that no epoch begins
    with an empty queue. Each process loads its share of the pages of a batch, on the canvas of the
    whole batch."""
    hp = trainer.hp
    train = trainer.pages.train
    step = canvas_step(hp, device)
    epochs = range(trainer.epoch, hp.epochs)
    batches = [batch for epoch in epochs for batch in data.epoch_batches(train, hp, epoch, step)]
    batches = [batch[rank() :: process_count()] for batch in batches[trainer.step :]]

    workers = hp.workers
    if workers < 0:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        sharing *= int(os.environ.get("TRIALS_SIDE_BY_SIDE", "1"))  # of a sweep
        cores = cv2.getNumberOfCPUs() // sharing
        workers = max(1, min(16, cores - 1)) if device.type == "cuda" else 0  # one is the trainer's

    # batches that wait lie in /dev/shm: at most 2 GiB, 7 bytes a pixel of page and maps
    share = -(-hp.batch // process_count())
    prefetch = 2**31 // (max(workers, 1) * share * hp.size**2 * 7)

    # not fork: OpenCV's and OpenMP's threads do not survive it, and the workers would wait for them
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cv2", "shapely", "torch"])  # loaded once, shared by all

    return torch.utils.data.DataLoader(
        data.Receipts(train, hp, trainer.folder / "cache" if hp.cache else None),
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=device.type == "cuda",
        prefetch_factor=max(1, min(4, prefetch)) if workers else None,
        multiprocessing_context=context if workers else None,
        generator=torch.Generator(),  # the global one, which --resume puts back, stays untouched
    )


# ---------------------------------------------------------------- one step


def learning_rate(hp, epoch, epochs_done):
    """Cosine annealing by whole epochs, from 0 (Loshchilov and Hutter 2017), times a linear warm-up
    by epochs_done, which counts parts of epochs."""
    wave = (1 + math.cos(math.pi * epoch / hp.T_max)) / 2  # from 1 to 0
    cosine = hp.eta_min + (hp.lr - hp.eta_min) * wave
    if epochs_done < hp.warmup:
        return cosine * (epochs_done / hp.warmup)
    return cosine


def start_network(hp, device, fresh, ancestors):
    """The network of a run. fresh: with the weights that hp names; other processes get them from
    process 0 later. Raises DataError, UsageError."""
    torch.manual_seed(hp.seed)
    pretrained = "none"
    if fresh and rank() == 0 and not hp.init:
        pretrained = hp.pretrained
    model = DBNet(hp.backbone, hp.neck, pretrained)

    if hp.init and fresh:
        state = ancestors[hp.init]
        try:
            model.load_state_dict(state.get("ema") or state["model"])
        except RuntimeError:
            theirs = state["hparams"]
            remedy = f"use --backbone {theirs.backbone} --neck {theirs.neck}"
            raise UsageError(f"--init {hp.init}", "weights of another network", remedy) from None

    if hp.sync_bn and dist.is_initialized():
        if device.type != "cuda":
            raise UsageError("sync_bn = true", "needs GPUs", "on CPUs use freeze_bn")
        from timm.layers import convert_sync_batchnorm  # torch's own would lose timm's activations

        model = convert_sync_batchnorm(model)
    return model.to(device, memory_format=torch.channels_last)


POSITION = ("epoch", "step", "losses", "timing", "best", "rows", "scores")


class Trainer:
    """The state of a run: network, EMA, optimizer, scaler, position, best epoch and log rows; and
    its pages, with what the checkpoints record of them."""

    def __init__(self, hp, device, pages, ancestors, fresh=True):
        """fresh: no state will be loaded. ancestors: of `load_ancestors`."""
        self.hp = hp
        self.device = device
        self.folder = Path("runs", hp.name)
        self.pages = pages
        self.steps = -(-len(pages.train) // hp.batch)  # of an epoch

        # the network, and what is called instead of it in training
        self.model = start_network(hp, device, fresh, ancestors)
        self.forward = self.model
        if hp.compile:
            # once for all canvases: height and width are two sizes even if the first is a square,
            # and other layouts of memory would be compiled for their sides alone
            importlib.import_module("torch.fx.experimental._config").use_duck_shape = False
            importlib.import_module("torch._inductor.config").force_layout_optimization = True
            self.forward = torch.compile(self.model, dynamic=True)
        if dist.is_initialized():
            wrap = torch.nn.parallel.DistributedDataParallel
            self.forward = wrap(self.forward, gradient_as_bucket_view=True)
            self.forward.broadcast_buffers = False  # see averaged_model; as an argument it warns
        teachers = [path for path in hp.teacher.split(",") if path]
        self.teachers = [network_of(ancestors[path], path, device) for path in teachers]

        # moving average
        self.ema = None
        if hp.ema:
            self.ema = copy.deepcopy(self.model).eval()
            self.averaged = float_tensors(self.ema), float_tensors(self.model)

        # optimizer and number type
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[hp.optimizer]
        parameters = self.model.parameters()
        self.optimizer = kind(parameters, hp.lr, weight_decay=hp.weight_decay, fused=True)
        self.dtype = amp_dtype(hp.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

        # scores, and the pages behind them
        self.best = NO_BEST
        self.rows = []
        self.scores = {}
        self.origin = trace_origin(hp, pages.train, ancestors)
        self.val_digests = [page.digest for page in pages.val]

        # the save in flight
        self.writer = None
        self.failed = []

        self.begin_epoch(0)

    def begin_epoch(self, epoch):
        """Set the position to the start of an epoch, after `epoch` finished ones."""
        self.epoch = epoch
        self.step = 0
        self.losses = []  # of its steps [4]
        self.timing = [0.0, 0.0]  # seconds, and how many of them it waited for batches

    def train_mode(self):
        self.model.train()
        if self.hp.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def train_step(self, pages, maps, lr, number):
        """pages uint8 [B, H, W, 3] and maps uint8 [B, 4, H, W], this process's share of a batch ->
        losses [4] (sum, BCE, L1, Dice), to be added over the processes. number: of the step in the
        run, from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        # the gradients become their mean over the processes, whose shares may differ by a page
        loss, parts = self.loss_of(pages, maps)
        processes = process_count()
        share = len(pages) / self.hp.batch if processes > 1 else 1.0
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss * (share * processes)).backward()

        if self.hp.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.hp.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            update_ema(*self.averaged, number)
        return torch.cat([loss.detach()[None], parts]) * share

    def loss_of(self, pages, maps):
        """pages and maps as in `train_step` -> the loss, a scalar, and its parts [3] (BCE, L1,
        Dice)."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.forward(pages)  # [B, 2, H, W]
            with torch.no_grad():
                taught = [teacher(pages)[:, 0].float().sigmoid() for teacher in self.teachers]
        loss, parts = db_loss(logits, maps)
        if taught:
            target = sum(taught) / len(taught)  # [B, H, W]
            loss = loss + self.hp.teacher_weight * teacher_loss(logits, target)
        return loss, parts

    def rehearse(self, pages, height, width):
        """Take the memory of a step on the largest canvas before the first one, not hours later.
        Weights, statistics and random state stay as they are. pages: how many. Raises what the step
        would raise."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        moments = []  # Adam's m and v of each weight, which a resumed run has
        if not self.optimizer.state:
            moments = [torch.empty_like(p) for p in self.model.parameters() for _ in "mv"]

        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.train_mode()
            pages = torch.zeros(pages, height, width, 3, dtype=torch.uint8, device=self.device)
            maps = pages.new_zeros(len(pages), 4, height, width)
            self.loss_of(pages, maps)[0].backward()

        del moments
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(self.model.buffers(), buffers):
            buffer.copy_(value)

    def averaged_model(self):
        """The network to validate and to share, in eval mode. It is process 0's: without sync_bn
        the others have batch-norm statistics of their own."""
        model = (self.ema or self.model).eval()
        if dist.is_initialized():
            for tensor in float_tensors(model):
                dist.broadcast(tensor.data, 0)
        return model

    def state(self):
        """All that a resumed run needs, as plain dicts of tensors and JSON types."""
        state = {key: part.state_dict() if part else None for key, part in self.parts().items()}
        state |= {key: getattr(self, key) for key in POSITION}
        state["rng"] = torch.get_rng_state()
        on_gpu = self.device.type == "cuda"
        state["cuda_rng"] = torch.cuda.get_rng_state() if on_gpu else None
        state["hparams"] = dataclasses.asdict(self.hp)
        state["origin"] = {key: sorted(values) for key, values in self.origin.items()}
        state["pages"] = self.pages.record
        return state

    def parts(self):
        return {key: getattr(self, key) for key in ("model", "ema", "optimizer", "scaler")}

    def load(self, state):
        """Go on from a state. Raises DataError when it is of another network."""
        try:
            for key, part in self.parts().items():
                if part and state[key]:  # only fp16 has a scaler's state
                    part.load_state_dict(state[key])
            for key in POSITION:
                setattr(self, key, state[key])

            # the run's own record of its pages counts as well: its init may be gone
            recorded = state.get("origin") or {"unknown": [self.hp.init] if self.hp.init else []}
            for key, values in recorded.items():
                self.origin[key].update(values)

            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = f"does not fit its hparams.json ({str(error).splitlines()[0]})"
            raise DataError(self.folder / "last.pt", what) from None

    def save(self, is_best=False):
        """Write last.pt, and best.pt if is_best, in a thread, once the save before it has ended.
        Raises OSError when that one failed."""
        self.wait()
        if rank():
            return

        last = to_cpu(self.state())
        best = None
        if is_best:
            chosen = sorted(self.origin["chosen"].union(self.val_digests))
            best = {key: last[key] for key in ("hparams", "epoch", "scores")}
            best["model"] = last["ema"] or last["model"]
            best["origin"] = last["origin"] | {"chosen": chosen}

        args = self.folder, last, best, self.failed
        self.writer = threading.Thread(target=write_checkpoints, args=args, name="save")
        self.writer.start()

    def wait(self):
        """Wait for the save in flight. Raises OSError when it failed."""
        if self.writer:
            self.writer.join()
        if self.failed:
            raise self.failed[0]


def write_checkpoints(folder, last, best, failed):
    try:
        if best:
            save_checkpoint(folder / "best.pt", best)
        if (folder / "last.pt").exists():
            keep_previous(folder)
        save_checkpoint(folder / "last.pt", last)
        write_log(folder / "log.csv", last["rows"])
    except Exception as error:  # noqa: BLE001 (the trainer raises it; a thread would only print it)
        failed.append(error)


# ---------------------------------------------------------------- log.csv


def write_log(path, rows):
    """log.csv, whole or not at all: one row an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="nan", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue())


def read_log(folder):
    """{epoch: its H-mean} of a run's log.csv, without epochs that have none since --rescore. Raises
    UsageError if there is none, DataError where it is another file."""
    path = Path(folder, "log.csv")
    if not path.is_file():
        raise UsageError(path, "no such file", f"is {folder} a run folder?")
    try:
        with open(path, newline="") as file:
            hmeans = {int(row["epoch"]): float(row["hmean"]) for row in csv.DictReader(file)}
            return {epoch: hmean for epoch, hmean in hmeans.items() if hmean >= 0}
    except (csv.Error, KeyError, TypeError, ValueError):
        raise DataError(path, "not a log.csv of train.py", "name the folder of a run") from None


def scores_line(scores):
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
        "{scores}  {seconds:.0f} s (validation {val_seconds:.0f})  {images_s:.1f} images/s  "
        "wait {wait:.0%}  peak {peak_gib:.1f} GiB"
    ).format(epochs=trainer.hp.epochs, scores=scores_line(trainer.scores), **row)
    if row["epoch"] in baseline:
        line += f"  vs baseline {row['hmean'] - baseline[row['epoch']]:+.4f}"
    print(line, flush=True)


# ---------------------------------------------------------------- the loop


def fetch_losses(trainer, pending):
    """Move the losses of the last steps, a list of [4], to the host, add them over the processes
    and warn of outliers. Raises DataError where one is not finite, OSError when the last save
    failed."""
    for losses in total(torch.stack(pending).double().cpu()).tolist():
        trainer.losses.append(losses)
        place = f"epoch {trainer.epoch + 1}, step {len(trainer.losses)}"
        if not all(map(math.isfinite, losses)):
            where = f"{place} of {trainer.steps}"
            raise DataError(where, f"loss is {losses[0]}", CALM, 4)

        recent = [loss for loss, *_ in trainer.losses[-50:-1]]
        if len(recent) >= 10 and losses[0] > 3 * statistics.median(recent):
            print(f"warning: loss {losses[0]:.3f} in {place} is above 3 times its running median")
    pending.clear()
    if trainer.failed:
        raise trainer.failed[0]


def train_epoch(trainer, batches, stop, pace):
    """The rest of one epoch, up to a signal. Its losses and times go to the trainer."""
    device = trainer.device
    look_every = FETCH_EVERY if device.type == "cuda" else 1
    pending = []  # losses that are still on the device
    began = time.perf_counter()
    trainer.train_mode()

    for step in progress(range(trainer.step, trainer.steps), f"epoch {trainer.epoch + 1}, steps"):
        # the next batch, and how long the device had to wait for it
        asked = time.perf_counter()
        batch = next(batches)
        trainer.timing[1] += time.perf_counter() - asked
        pages, maps = (part.to(device, non_blocking=True) for part in batch)

        # forward, backward, update
        number = trainer.epoch * trainer.steps + step
        lr = learning_rate(trainer.hp, trainer.epoch, (number + 1) / trainer.steps)
        pending.append(trainer.train_step(pages, maps, lr, number))
        trainer.step = step + 1

        # now and then: losses, signals, pace
        if trainer.step % look_every == 0 or trainer.step == trainer.steps:
            fetch_losses(trainer, pending)
            if stop.agree():
                break
            pace.look(step)

    trainer.timing[0] += time.perf_counter() - began


class Pace:
    """Says once, after some steps, how long a run will take."""

    def __init__(self, steps_left, device):
        self.steps_left = steps_left
        self.device = device
        self.begun = None  # (time, step); not the start, which loads and may compile

    def look(self, step):
        now = time.perf_counter()
        if not self.begun:
            self.begun = now, step
        began, first = self.begun
        if not self.steps_left or step - first < 5:
            return

        seconds = (now - began) / (step - first) * self.steps_left
        print(f"about {duration(seconds)} for {self.steps_left} steps, validation not counted")
        if self.device.type == "cpu" and seconds > 3600:
            print("this is a CPU; the quick start is --hparams hparams/quickstart.json")
        self.steps_left = 0


def duration(seconds):
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s"


def score_pages(trainer, val):
    """Rows of the page metric [N, 4] of val pages, and their Score, which says if the network or an
    ancestor has seen them before. Each process predicts its share of the pages."""

    def judge(page, found):  # in threads beside the network
        return page_row("page", page, found[0])

    rows = np.zeros((len(val), 4))
    mine = range(rank(), len(val), process_count())
    network = predict.Network(trainer.averaged_model(), trainer.hp)
    for k, row in predict.predict(network, [val[i] for i in mine], trainer.device, judge):
        rows[mine[k]] = row
    total(torch.from_numpy(rows))
    seen = {
        how: sum(page.digest in theirs for page in val)  # two pages may be one picture
        for how, theirs in sources.seen_digests(trainer.origin, trainer.hp).items()
    }
    return rows, make_score(rows, mean_scores, bootstrap_groups(val), seen)


def val_labels(trainer):
    """The digests of each val page, of its picture and its labels, as `record_pages` has them. In
    the record those of later sets follow."""
    return [*trainer.pages.record["val"].values()][: len(trainer.val_digests)]


def score_run(trainer):
    """The Score of the network on the run's val pages. The trainer keeps it for the checkpoints,
    with those of the later sets and the H-mean of each page."""
    val = trainer.pages.val
    rows, score = score_pages(trainer, val)
    trainer.scores = {
        **dataclasses.asdict(score),
        "others": {
            name: dataclasses.asdict(score_pages(trainer, part)[1])
            for name, part in trainer.pages.others.items()
        },
        "groups": bootstrap_groups(val),
        "digests": trainer.val_digests,
        "labels": val_labels(trainer),
        "pages": {page.name: float(hmean) for page, (_, _, hmean, _) in zip(val, rows)},
    }
    return score


def score_columns(score):
    """A Score as columns of log.csv."""
    return dict(zip(SCORES, (score.precision, score.recall, score.hmean, *score.interval)))


def log_row(trainer, score, val_seconds):
    """The row of log.csv of the epoch in hand."""
    seconds, waited = trainer.timing
    return {
        "epoch": trainer.epoch + 1,
        "lr": learning_rate(trainer.hp, trainer.epoch, trainer.epoch + 1),
        **dict(zip(LOSSES, np.mean(trainer.losses, 0).tolist())),
        **score_columns(score),
        "seconds": seconds + val_seconds,
        "images_s": trainer.steps * trainer.hp.batch / seconds,
        "wait": waited / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,  # of the run's GPU; 0 on a CPU
        "val_seconds": val_seconds,
    }


def finish_epoch(trainer):
    """Validate, append the epoch's row, advance. Returns whether it is the best epoch so far.
    Raises DataError where weights are not finite."""
    if not all(tensor.isfinite().all() for tensor in float_tensors(trainer.model)):
        raise DataError(f"epoch {trainer.epoch + 1}", "weights are not finite", CALM, 4)

    began = time.perf_counter()
    score = score_run(trainer)
    row = log_row(trainer, score, time.perf_counter() - began)
    trainer.rows.append(row)

    is_best = row["hmean"] > trainer.best["hmean"]
    if is_best:
        trainer.best = {"hmean": row["hmean"], "epoch": row["epoch"]}
    trainer.begin_epoch(row["epoch"])
    return is_best


def rescore(trainer):
    """Score the last epoch of a run whose val pages have changed; it becomes the best one. The
    scores of earlier epochs, which are those of other pages, become nan in log.csv. A run stopped
    inside an epoch has its next score at the end of that."""
    for row in trainer.rows:
        row |= dict.fromkeys(SCORES, math.nan)
    trainer.best = NO_BEST
    whole = bool(trainer.rows) and trainer.step == 0
    if whole:
        score = score_run(trainer)
        trainer.rows[-1] |= score_columns(score)
        trainer.best = {"hmean": score.hmean, "epoch": trainer.epoch}
        print(f"epoch {trainer.epoch} scored anew: {scores_line(trainer.scores)}")
    trainer.save(is_best=whole)


# ---------------------------------------------------------------- one run


def open_folder(hp, folder, resume):
    """Make or find the folder of a run, and write hparams.json into a new one. Returns the locks on
    it, an ExitStack. Raises UsageError if another process trains there or has made it meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=resume)
    except FileExistsError:
        raise UsageError(folder, "exists", NEW_NAME) from None

    # to lock hparams.json makes an empty file, and to write it puts another in its place: both are
    # kept locked, since another process may have opened either
    with contextlib.ExitStack() as locks:
        path = folder / "hparams.json"
        locks.enter_context(lock_folder(folder, path.name, BUSY))
        if not path.stat().st_size:
            write_json(path, dataclasses.asdict(hp), indent=1)
            locks.enter_context(lock_folder(folder, path.name, BUSY))
        shutil.rmtree(folder / "cache", ignore_errors=True)
        print(f"run folder {folder}", flush=True)
        return locks.pop_all()


def load_run(folder, record, rescored):
    """The state that a run goes on from, or None; log.csv is cut to its rows. record: of its pages
    as they are now. rescored: the val pages may have changed. Raises DataError."""
    state = load_last(folder)
    if not state and (folder / "log.csv").exists():  # from epoch 1 best.pt would be lost, too
        remedy = f"put it back, or start a new run with --init {folder}/best.pt"
        raise DataError(folder, "has a log.csv, but no last.pt", remedy)
    if not state:
        print(f"{folder} has no checkpoint yet: starting at epoch 1")
        return None
    compare_pages(state, record, folder, rescored)
    # the next save keeps last.pt as prev.pt: a damaged one would replace the only whole one
    os.replace(state["path"], folder / "last.pt")

    try:
        if state["best"]["epoch"]:
            load_checkpoint(folder / "best.pt")
    except DataError as error:
        print(f"warning: {error}; the next epoch's becomes best.pt")
        state |= {"best": NO_BEST, "rescored": rescored}
    if rescored and not state["rescored"]:
        print(f"{folder}: its val pages have not changed, so it keeps its scores")
    write_log(folder / "log.csv", state["rows"])
    print(f"resuming {folder} {position(state['epoch'], state['step'])}")
    return state


def compare_pages(state, pages, folder, rescored):
    """Name the pages that have changed since a state was saved. An epoch that has begun with other
    train pages starts again. state["rescored"] says whether val pages are scored again: with
    --rescore, unless all are known to be as they were. Raises UsageError if val pages have changed
    and --rescore is missing."""
    recorded = state.get("pages") or pages  # older checkpoints have no record: nothing is compared

    # val pages; without a record nobody knows whether they have changed
    changes = list_changes(recorded["val"], pages["val"])
    if changes and not rescored:
        remedy = f"add --rescore, or start a new run with --init {folder}/last.pt"
        raise UsageError(folder, f"val pages have changed since: {changes}", remedy)
    state["rescored"] = rescored and (changes or recorded is pages)

    # train pages; an epoch that began with other ones, or has fewer steps now, starts again
    changes = list_changes(recorded["train"], pages["train"])
    if changes:
        print(f"warning: {folder}: train pages have changed since: {changes}")
    steps = -(-len(pages["train"]) // state["hparams"].batch)
    if (state["step"] and changes) or state["step"] >= steps:
        print(f"warning: epoch {state['epoch'] + 1} starts again with the pages there are now")
        state |= {"step": 0, "losses": [], "timing": [0.0, 0.0]}


def train_one(hp, resume, options, stop):
    """Train a run to hp.epochs or hp.stop_epoch. options: the command line's. Returns the exit
    code."""
    print(describe_machine(options.device, amp_dtype(hp.amp, options.device)))
    ancestors = load_ancestors(hp)
    pages, hp = from_first(lambda: read_pages(hp, ancestors))
    make_trainer = partial(Trainer, hp, options.device, pages, ancestors)

    # a new run has no folder before its network stands: what is wrong with it leaves nothing
    trainer = None if resume else make_trainer()
    folder = Path("runs", hp.name)
    with open_folder(hp, folder, resume) if rank() == 0 else contextlib.nullcontext():
        state = None
        if resume:
            state = from_first(lambda: load_run(folder, pages.record, options.rescore))
            trainer = make_trainer(fresh=state is None)
        ancestors.clear()  # they would fill memory while the run lasts
        if state:
            trainer.load(state)
            if state["rescored"]:
                rescore(trainer)
            elif options.rescore:
                trainer.save()  # with the record of its pages as they are now
        return train_run(trainer, options, stop)


def train_run(trainer, options, stop):
    """What is left of a run, from its first batch to its last line. Returns the exit code."""
    began = time.perf_counter()
    hp = trainer.hp
    last_epoch = min(hp.epochs, hp.stop_epoch or hp.epochs)
    mirrors = [] if rank() else start_mirrors(options.log, trainer)
    with stop:
        train_epochs(trainer, last_epoch, options, stop, mirrors)

    stopped = stop.agreed if trainer.epoch < last_epoch else None
    if trainer.epoch == hp.epochs:
        draw_last_pictures(trainer, mirrors, options.artifact)
        print(f"{trainer.folder}: {duration(time.perf_counter() - began)} in this process")
        if options.baseline:
            # a run that an older version has finished recorded no labels
            scores = {"labels": val_labels(trainer)} | trainer.scores
            print_gain(scores, Path(options.baseline))
    print_end(trainer, stopped)
    return 128 + stopped if stopped else 0


def train_epochs(trainer, last_epoch, options, stop, mirrors):
    """The loop: train up to last_epoch or a signal, validate and save after each epoch."""
    baseline = options.baseline_log
    if baseline:
        theirs = load_baseline(Path(options.baseline))["scores"]
        if theirs and not same_pages(theirs, trainer.val_digests, val_labels(trainer)):
            line = "scored on other pages or labels, so no difference by epoch"
            print(f"baseline {options.baseline}: {line}")
            baseline = {}

    loader = make_loader(trainer, options.device)
    left = loader.batch_sampler
    steps_left = (last_epoch - trainer.epoch) * trainer.steps - trainer.step
    pace = Pace(steps_left, options.device)
    batches = iter(loader)
    try:
        # the largest batch first, while the loader processes start: what does not fit is known now
        if options.device.type == "cuda" and left:
            largest = max(left, key=lambda keys: math.prod(keys[0][2:]))
            trainer.rehearse(len(largest), *largest[0][2:])

        while not stop.agree() and trainer.epoch < last_epoch:
            train_epoch(trainer, batches, stop, pace)
            pace.steps_left = 0  # the time of a validation would count

            # stopped inside the epoch: keep the place
            if trainer.step < trainer.steps:
                trainer.save()
                continue

            is_best = finish_epoch(trainer)
            print_row(trainer, baseline)
            trainer.save(is_best)
            for send in mirrors:
                send(trainer.rows[-1])
        from_first(trainer.wait)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold `batches`
        raise
    finally:
        # without `batches` its processes and threads end; then those that do not, deaf to SIGTERM
        del batches
        for process in torch.multiprocessing.active_children():
            process.kill()
        shutil.rmtree(trainer.folder / "cache", ignore_errors=True)


def load_baseline(folder):
    """The last checkpoint of a baseline, or one without scores."""
    state = None
    try:
        state = load_last(folder)
    except DataError as error:  # our own run is whole, and goes on
        print(f"warning: {error}")
    return state or {"scores": {}}


def same_pages(scores, digests, labels):
    """Whether a baseline was scored on these pages, by these labels, in whatever order. Names may
    be those of other pictures, and labels may have been corrected; older checkpoints do not
    record theirs."""
    same_labels = sorted(scores.get("labels", labels)) == sorted(labels)
    return same_labels and sorted(scores.get("digests", ())) == sorted(digests)


def print_gain(scores, folder):
    """The paired difference of a run's last epoch to that of a baseline, on the same pages."""
    state = load_baseline(folder)
    theirs = state["scores"]
    if not same_pages(theirs, scores["digests"], scores["labels"]):
        print(f"baseline {folder}: no last epoch on these pages and labels; no paired difference")
        return
    rows, groups = rows_by_digest(scores)
    their_rows, _ = rows_by_digest(theirs)
    seen = read_score(theirs).seen | read_score(scores).seen
    difference = paired_difference(rows, their_rows, mean_scores, groups, seen)
    print(f"{difference}, vs epoch {state['epoch']} of {folder}")


def rows_by_digest(scores):
    """Rows [N, 4] and groups [N] of the val pages in a checkpoint's scores, in the order of the
    pages' digests: two runs may have had the pages in different orders."""
    pages = sorted(zip(scores["digests"], scores["groups"], scores["pages"].values()))
    _, groups, hmeans = zip(*pages)
    return hmean_rows(hmeans), groups


def hmean_rows(hmeans):
    """H-means [N] of pages -> rows [N, 4] of the page metric. Precision and recall of single pages
    are not recorded: the H-mean stands in for them."""
    return np.array([[hmean, hmean, hmean, 1] for hmean in hmeans])


def draw_last_pictures(trainer, mirrors, artifact):
    """Draw the first eight val pages with what the last weights find; the mirrors get them, too."""
    network = predict.Network(trainer.averaged_model(), trainer.hp)
    if rank():
        return
    folder = trainer.folder / "pictures"
    pages = trainer.pages.val[:8]
    for _, (page, found) in predict.predict(network, pages, trainer.device, lambda *both: both):
        evaluate.draw_picture(page, *found, folder)
    pictures = sorted(folder.rglob("*.jpg"))
    best = trainer.folder / "best.pt" if artifact else None
    for send in mirrors:
        send({"epoch": trainer.epoch}, pictures, best)


def position(epoch, step):
    return f"in epoch {epoch + 1}, step {step}" if step else f"after epoch {epoch}"


def print_end(trainer, stopped):
    """How far a run has come, how to go on, and its scores."""
    hp = trainer.hp
    count = trainer.steps if trainer.step else hp.epochs
    where = f"{position(trainer.epoch, trainer.step)} of {count}"
    if trainer.epoch < hp.epochs:
        amp = "" if hp.amp == "auto" else f" --amp {hp.amp}"  # it may not be the one of the folder
        command = f"python train.py --name {shlex.quote(hp.name)} --resume{amp}"
        print(f"{'stopped' if stopped else 'paused'} {where}; go on: {command}")
    if trainer.rows and not stopped:
        print(f"last {scores_line(trainer.scores)}")
        if trainer.best["epoch"]:  # 0 where best.pt was lost
            print(
                f"best hmean {trainer.best['hmean']:.4f} epoch {trainer.best['epoch']} "
                "(chosen on these same pages, so optimistic)"
            )


# ---------------------------------------------------------------- folds and replicas


def member_hparams(args, stem):
    """Hparams of each run of --fold all and --seeds N, named STEM-fold2-seed1. Raises
    UsageError."""
    if process_count() > 1:
        raise UsageError("torchrun", "not with --fold all, --seeds", "train one --fold, one --seed")

    all_folds = args.fold == "all"
    shared = vars(args) | {"resume": False}
    if all_folds:
        shared["fold"] = None
    hp = resolve_run(argparse.Namespace(**shared))
    folds = range(1, hp.folds + 1) if all_folds and hp.folds else [hp.fold]
    seeds = range(hp.seed, hp.seed + (args.seeds or 1))

    result = []
    for fold in folds:
        for seed in seeds:
            name = hp.name or stem
            if all_folds:
                name += f"-fold{fold}"
            if args.seeds:
                name += f"-seed{seed}"
            result.append(changed(hp, name=name, fold=fold, seed=seed))
    return result or [hp]  # negative --seeds; `check_trainer_flags` refuses it


def resumed_members(runs, args):
    """Hparams of runs with --resume: those that have begun keep their own values, as a single run
    does, and the others take over those. Raises UsageError where one exists without --resume."""
    kept = {}
    for hp in runs:
        if Path("runs", hp.name, "hparams.json").exists():
            if not args.resume:
                raise UsageError(f"runs/{hp.name}", "exists", NEW_NAME)
            flags = {"name": hp.name, "fold": str(hp.fold), "seed": str(hp.seed)}
            kept[hp.name] = resolve_run(argparse.Namespace(**vars(args) | flags))
    if args.resume and not any(Path("runs", hp.name).exists() for hp in runs):
        raise UsageError("--resume", f"no run like {runs[0].name} has begun", "leave it out")
    if not kept:
        return runs

    *_, last = kept.values()
    alike = {hp.name: changed(last, name=hp.name, fold=hp.fold, seed=hp.seed) for hp in runs}
    return list((alike | kept).values())  # in the order of runs


def train_members(runs, args):
    """Train runs in turn; a failure is named and the others go on. Returns the exit code."""
    runs = resumed_members(runs, args)
    stop = Stop()
    failed = []
    for hp in runs:
        folder = Path("runs", hp.name)
        finished = False
        with contextlib.suppress(DataError):  # not there, or damaged: a resumed run writes it anew
            finished = hp.epochs in read_log(folder)
        if finished and not args.rescore:
            print(f"{folder} is finished")
            continue
        work = partial(train_one, hp, folder.exists(), args, stop)
        code = exit_code(partial(explain_errors, work))
        if code > 128 or stop.signal:
            print(f"for all of these runs: {AGAIN}")
            return code or 128 + stop.signal
        # the command is wrong, or the data: for all runs
        if not folder.exists() and (code == 2 or hp is runs[0]):
            return code
        if code:
            failed.append(hp.name)

    report_members([hp for hp in runs if hp.name not in failed])
    for name in failed:
        print(f"failed: {name}; go on by {AGAIN}")
    return 1 if failed else 0


def report_members(runs):
    """Print the last H-mean of each run, the mean of all runs, and the score of all pages, each by
    the runs that scored it. Raises DataError where a run has lost its checkpoint."""
    # each run, and a warning if it was scored on other pages than the first
    scores = []
    first = {}  # the pages of the first run: all folds together have the same ones
    for hp in runs:
        folder = Path("runs", hp.name)
        state = load_last(folder)
        if not state:
            raise DataError(folder, "no last.pt, so no score", "put it back, or train it anew")
        scores.append(state["scores"])
        record = state.get("pages") or {"train": {}, "val": {}}  # older checkpoints have none
        pages = record["train"] | record["val"]
        first = first or pages
        # --doubt changes the labels of train pages, which are others in each fold
        changes = "" if hp.doubt or not pages else list_changes(first, pages)
        if changes:
            what = f"not on the pages of {runs[0].name}: {changes}"
            print(f"warning: {folder}: {what}; --rescore scores on those of now")
        print(f"{hp.name}  last {scores_line(scores[-1])}")
    if len(scores) < 2:
        return

    # the mean of the runs
    values = [score["hmean"] for score in scores]
    mean = statistics.mean(values)
    sd = statistics.stdev(values)
    print(f"last hmean of {len(values)} runs: mean {mean:.4f}, standard deviation {sd:.4f}")

    # all pages: a page that several seeds have scored has the mean of its H-means
    folds = {hp.fold for hp in runs}
    if len(folds) not in (1, runs[0].folds):
        return  # without all folds not all pages are held out
    pages = {}  # {(page, group): its H-mean in each run}
    for score in scores:
        groups = score.get("groups", score["pages"])
        for (name, hmean), group in zip(score["pages"].items(), groups):
            pages.setdefault((name, group), []).append(hmean)
    rows = hmean_rows([statistics.mean(hmeans) for hmeans in pages.values()])
    score = make_score(rows, mean_scores, [group for _, group in pages])
    name = "out of fold" if len(folds) > 1 else "mean of replicas"
    remark = ", in sample" if any(read_score(one).seen for one in scores) else ""
    print(f"{name}: {score}{remark}")


# ---------------------------------------------------------------- command line


def choose_run(args, stem):
    """Hparams of a single run, and whether it exists already; nothing is made yet. A run that
    torchrun started again goes on by itself. Raises UsageError."""
    hp = resolve_run(args)
    if not hp.name and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UsageError("--max-restarts", "a restarted group has to find its run", "add --name")
    if hp.batch < process_count():
        raise UsageError(f"batch = {hp.batch}", f"{process_count()} processes need a page each")

    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again and not args.resume and Path("runs", hp.name).exists():
        args.resume = True
        hp = resolve_run(args)
    return hp if args.resume else name_run(hp, stem), args.resume


def run_name(folder):
    """The name of a run by its folder; runs/ may be a symbolic link, or reached by one."""
    if "/" not in folder:
        return folder
    name = os.path.relpath(folder, "runs")
    if name.startswith(".."):
        name = os.path.relpath(os.path.realpath(folder), os.path.realpath("runs"))
    return name


def parse_args(argv):
    """The command line. --resume may name the run's folder; --fold 2 names a run as --fold all
    does."""
    parser = trainer_parser(__doc__)
    args, rest = parser.parse_known_args(argv)
    if args.resume and not args.name and len(rest) == 1:
        args.name = run_name(rest.pop().removesuffix("last.pt"))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    one_fold = args.fold not in (None, "all")
    if one_fold and args.name and "/" not in args.name:  # a sweep names its trials itself
        args.name = args.name.removesuffix(f"-fold{args.fold}") + f"-fold{args.fold}"
    return args


def check_trainer_flags(args, hp):
    """Raises UsageError on flags that have no effect."""
    mirrored = "wandb" in args.log or (args.resume and Path("runs", hp.name, "wandb").is_dir())
    rules = [
        ("rescore", args.resume, "only with --resume"),
        ("fold", hp.folds, "only with --folds N, in the command or its file"),
        ("seeds", args.seeds is None or args.seeds > 0, "at least 1 is needed"),
        ("val_data", not hp.folds, "not with --folds, which hold pages out"),
        ("min_confidence", hp.pseudo_labels, "only with --pseudo-labels"),
        ("doubt_above", hp.doubt, "only with --doubt"),
        ("teacher_weight", hp.teacher, "only with --teacher"),
        ("pretrained", not hp.init or hp.pretrained == "none", "not with --init"),
        ("artifact", mirrored, "only with --log wandb"),
        ("sync_bn", dist.is_initialized() or not hp.sync_bn, "only under torchrun"),
    ]
    evaluate.refuse_idle(args, rules)
    if hp.sync_bn and hp.compile:
        raise UsageError("--sync-bn", "not with --compile", "leave one of them out")


def execute(args):
    """Do what the command line says. Returns the exit code."""
    # a run without --name is called after its file and fold
    stem = Path(args.hparams).stem if args.hparams else "run"
    if args.fold not in (None, "all"):
        stem += f"-fold{args.fold}"
    if "WANDB_SWEEP_ID" in os.environ:
        args.log.append("wandb")

    several = args.fold == "all" or args.seeds is not None
    runs = member_hparams(args, stem) if several else [resolve_run(args)]
    check_trainer_flags(args, runs[0])
    if args.print_hparams:
        print(json.dumps(dataclasses.asdict(runs[0]), indent=1))
        return 0

    args.device = device_of_process(args.device)
    args.baseline_log = read_log(args.baseline) if args.baseline else {}
    for kind in args.log:
        # a folder of logs with the name of the package is a module too, but one without a file
        if not getattr(importlib.util.find_spec(kind), "origin", None):
            raise UsageError(f"--log {kind}", "its package is missing", f"pip install {kind}")

    if several:
        return train_members(runs, args)
    stem = os.environ.get("WANDB_RUN_ID", stem)
    hp, resume = from_first(lambda: choose_run(args, stem))
    return train_one(hp, resume, args, Stop())


def main(argv=None):
    # before the loop there is nothing to save, so that a signal ends the process at once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # canvases vary
    store = join_group()

    def work():
        # process 0 alone prints, but for the first error
        with open(os.devnull, "w") as hidden:
            out, err = (hidden, hidden) if rank() else (sys.stdout, sys.stderr)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = explain_errors(lambda: execute(parse_args(argv)), store)
        if store:
            dist.destroy_process_group()
        return code

    def say(line):
        process = str(rank())
        with contextlib.suppress(dist.DistError):  # the store's host is gone, and has said why
            # the process that fails first says all, for its error may have several lines
            if store is None or store.compare_set("speaker", "", process).decode() == process:
                print_error(line)

    return exit_code(work, say)


if __name__ == "__main__":
    sys.exit(main())
