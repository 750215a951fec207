"""Who else shows a run's log? W&B and TensorBoard: the rows of log.csv, pictures and best.pt."""

import dataclasses
import os
import shutil
from pathlib import Path

import space
from files import UsageError
from pictures import read_image


def tagged(row):
    """A row's numbers by the names that W&B and TensorBoard show: val/hmean, train/loss."""
    return {space.LOGGED[key] + key: number for key, number in row.items() if key != "epoch"}


def to_tensorboard(hp, folder):
    """A function that writes to runs/NAME/tensorboard, which starts empty: after --resume no row is
    there twice."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    writer = SummaryWriter(folder / "tensorboard")

    def send(row, pictures=(), best=None):
        for tag, number in tagged(row).items():
            writer.add_scalar(tag, number, row["epoch"])
        for path in pictures:
            writer.add_image(path.stem, read_image(path), row["epoch"], dataformats="HWC")
        writer.flush()

    return send


def to_wandb(hp, folder):
    """A function that sends to W&B or, without an account, writes to runs/NAME/wandb for `wandb
    sync`. A resumed run keeps its id."""
    import wandb

    wandb.finish()  # the run before in this process

    # what was written offline is sent again, under the same id: folders are called run-DATE-ID or
    # offline-run-DATE-ID, and an ID may hold hyphens
    past = sorted(folder.glob("wandb/*run-*-*"))
    for path in folder.glob("wandb/offline-run-*"):
        shutil.rmtree(path)
    run_id = None
    if past:
        _, _, run_id = past[-1].name.removeprefix("offline-").split("-", 2)

    online = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "receipts"),
        name=hp.name,
        id=run_id,
        resume="allow",
        config=dataclasses.asdict(hp),
        dir=folder,
        mode=None if online else "offline",
        settings=wandb.Settings(silent=True),
    )
    tracked.define_metric("*", step_metric="epoch")
    sent = tracked.summary.get("epoch", 0)

    if tracked.settings.mode == "offline":
        kept = os.path.relpath(Path(tracked.dir).parent)
        print(f"wandb: {kept}; to send it: wandb sync {kept}")
    else:
        print(f"wandb: {tracked.url}")

    def send(row, pictures=(), best=None):
        step = row["epoch"]
        if step > sent:
            tracked.log({"epoch": step, **tagged(row)}, step=step)
        if pictures:
            images = {f"pages/{path.stem}": wandb.Image(str(path)) for path in pictures}
            tracked.log(images, step=step)
        if best:
            tracked.log_artifact(best, name=f"best-{tracked.id}", type="model")

    return send


MIRRORS = {"wandb": to_wandb, "tensorboard": to_tensorboard}


def start_mirrors(kinds, trainer):
    """A function(row, pictures, best.pt) for each mirror that --log names or the run has already;
    the rows so far are sent. Raises UsageError."""
    try:
        kinds = [kind for kind in MIRRORS if kind in kinds or (trainer.folder / kind).is_dir()]
        mirrors = [MIRRORS[kind](trainer.hp, trainer.folder) for kind in kinds]
    except Exception as error:  # noqa: BLE001 (W&B has many of its own)
        what = (str(error).splitlines() or [repr(error)])[0]
        remedy = "to go on without it, leave --log out and remove the mirror's folder there"
        raise UsageError(f"--log, {trainer.folder}", what, remedy) from None
    for row in trainer.rows:
        for send in mirrors:
            send(row)
    return mirrors
