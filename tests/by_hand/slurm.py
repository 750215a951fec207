"""A real Slurm of one node, jobs killed in the middle: python tests/by_hand/slurm.py

Starts munged, slurmctld and slurmd of its own (Debian: apt-get install slurm-wlm munge) with all
their files in a temporary folder and ports that are free. Without Slurm it says so in one line and
exits 0. `--part sweep` or `--part array` is one of the two:

sweep: six trials of the real train.py through `sweep.py --launcher "srun ..." --parallel 2`.
Cancels the job of a trial in mid-run; later lets the node die: slurmd, the slurmstepds and the
trainers get SIGKILL, the node is down, then comes back. Shows that the trials were retried from
last.pt and all six finished.

array: `sbatch --array=1-4`, each task a shard of a folder of pictures into its own .jsonl file. In
mid-run one task is cancelled, and submitted again, and another one requeued. Shows that the lines
of all four are those of one run that nothing disturbed, and that they are read as one file.
"""

import contextlib
import getpass
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import kill_stream

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import NETWORK, ROOT, draw_pages, events, processes, read_log, tiny_sweep, wait_for

from command import Parser

TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "sinfo")
EPOCHS, TRIALS = 3, 6
CONFIG = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES State=UP
"""
PAGES, SHARDS = 400, 4
WEIGHTS = ROOT / "weights/receipts-lite2.pt"
FLAGS = ["--size=192", "--device=cpu", "--images=pages/images"]
ARRAY = f"""#!/bin/bash
#SBATCH --array=1-{SHARDS}
#SBATCH --cpus-per-task=1 --mem=900M
#SBATCH --requeue --open-mode=append --output=job-%a.log
{{command}} --out found/$SLURM_ARRAY_TASK_ID.jsonl --shard $SLURM_ARRAY_TASK_ID/{SHARDS}
"""
TRAINER = [*NETWORK, "--data=pages", "--size=64", "--batch=2"]
TRAINER += [f"--epochs={EPOCHS}", f"--T_max={EPOCHS}"]


def free_ports(n):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def start_slurm(folder):
    """Processes of munged, slurmctld and slurmd by name; sets SLURM_CONF."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    config = {"host": host, "ports": free_ports(2), "user": getpass.getuser(), "folder": folder}
    (folder / "slurm.conf").write_text(CONFIG.format(**config))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    files = [f"--{n}-file={folder}/munge.{n}" for n in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
    daemons = {"munged": start_daemon(folder, munged)}
    wait_for("munged", (folder / "munge.socket").exists)
    for name in ("slurmctld", "slurmd"):
        daemons[name] = start_daemon(folder, [name, "-D"])
    wait_for("the node to be idle", lambda: node_state() == "idle")
    return daemons


def start_daemon(folder, command):
    with open(folder / f"{command[0]}.out", "a") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


def node_state():
    told = subprocess.run(["sinfo", "-h", "-o", "%T"], stdout=subprocess.PIPE, check=False)
    return told.stdout.decode().strip().rstrip("*")


def steps(name=""):
    """[(process id, parent's, Slurm's job id)] of what trains this trial, or any."""
    found = []
    for pid, words in processes(f"--name=s/{name}").items():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            jobs = [v.split("=")[1] for v in environment if v.startswith("SLURM_JOB_ID=")]
            if jobs and words[0] != "srun":
                found.append((pid, parent, jobs[0]))
    return found


def midway(work, sweep, killed):
    """Waits for a trial between its first and last epoch that was not killed yet: name, job."""

    def ready():
        assert sweep.poll() is None, "the sweep ended before a job could be killed"
        for folder in (work / "runs/s").glob("trial-*/"):
            name, epochs = folder.name, len(read_log(folder))
            if name not in killed and 0 < epochs < EPOCHS and (running := steps(name)):
                print(f"{name} has {epochs} of {EPOCHS} epochs: ", end="")
                return name, running[0][2]
        return None

    return wait_for("a trial to be in the middle", ready, 300)


def cancel(job):
    print(f"job {job} cancelled", flush=True)
    subprocess.run(["scancel", job], check=True)


def let_the_node_die(folder, daemons):
    """SIGKILL to all of the node's processes; then it is down, and then it comes back."""
    print("the node dies with all it runs", flush=True)
    daemons["slurmd"].kill()
    daemons["slurmd"].wait()
    for pid in {p for step in steps() for p in step[:2]}:
        os.kill(pid, signal.SIGKILL)
    host = socket.gethostname().split(".")[0]
    update = ["scontrol", "update", f"NodeName={host}"]
    subprocess.run([*update, "State=DOWN", "Reason=died"], check=True)
    wait_for("the node to be down", lambda: node_state() == "down")
    daemons["slurmd"] = start_daemon(folder, ["slurmd", "-D"])
    subprocess.run([*update, "State=RESUME"], check=True)
    wait_for("the node to be back", lambda: node_state() in ("idle", "mixed", "allocated"))


def check(work, killed):
    """Assert that the killed trials were retried and everything finished; print a table."""
    folder = work / "runs/s"
    crashed = {f"trial-{e['trial']:03d}" for e in events(folder, "crashed")}
    finished = {e["trial"] for e in events(folder, "finished")}
    curves = {e["trial"]: e["history"] for e in events(folder, "epochs")}
    assert set(killed) <= crashed, crashed
    assert finished == set(range(1, TRIALS + 1)), finished
    for number in sorted(finished):
        name, curve = f"trial-{number:03d}", curves[number]
        epochs = [int(row["epoch"]) for row in read_log(folder / name)]
        assert epochs == list(range(1, EPOCHS + 1))
        log = (folder / f"{name}.log").read_text().splitlines()
        resumed = [line for line in log if line.startswith("resuming")]
        print(f"{name}  {len(curve)} epochs  loss {curve[-1]:.4f}  {'; '.join(resumed)}")
        assert bool(resumed) or name not in killed
        assert name in crashed or not resumed
    print(f"ok: {', '.join(sorted(crashed))} crashed and were retried; six of six finished")


def run_sweep(work, daemons):
    draw_pages(work / "pages", 24)
    (work / "s.json").write_text(json.dumps(tiny_sweep(run_cap=TRIALS)))
    launcher = "srun --quiet --cpus-per-task=1 --mem=900M"
    command = [sys.executable, ROOT / "sweep.py", "s.json", "--launcher", launcher]
    sweep = subprocess.Popen([*command, "--parallel", "2", *TRAINER], cwd=work)
    try:
        first, job = midway(work, sweep, [])
        cancel(job)
        second, _ = midway(work, sweep, [first])
        let_the_node_die(work, daemons)
        assert sweep.wait(900) == 0
        check(work, [first, second])
    finally:
        stop(sweep)


def stop(process):
    process.terminate()
    process.wait(30)


# ---------------------------------------------------------------- array


def submit(*flags):
    """Submit the array, or some of its tasks; its number."""
    command = ["sbatch", "--parsable", *flags, "array.sh"]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def count_lines(task):
    """How many pages a task has predicted."""
    path = Path(f"found/{task}.jsonl")
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def wait_for_middle(task):
    wait_for(f"task {task} to have lines", lambda: count_lines(task) > 9)


def states(job=""):
    """Slurm's words for a task that waits, runs or ends, or for all of them."""
    queue = subprocess.run(["squeue", "-h", "-o", "%i %T"], stdout=subprocess.PIPE, check=True)
    lines = [line.split() for line in queue.stdout.decode().splitlines()]
    return [state for number, state in lines if number == job or not job]


def score(source):
    """What evaluate.py prints about predictions of the labelled pages."""
    command = [sys.executable, ROOT / "evaluate.py", source, "--data", "pages", "--json"]
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {key: value for key, value in result.items() if key != "source"}


def run_array(work):
    work.mkdir()
    os.chdir(work)
    draw_pages(work / "pages", PAGES)
    command = [sys.executable, str(ROOT / "evaluate.py"), str(WEIGHTS), *FLAGS]
    Path("array.sh").write_text(ARRAY.format(command=shlex.join(command)))

    # each disturbed task has predicted some of its pages, but not all
    array = submit()
    wait_for_middle(1)
    cancel(f"{array}_1")
    wait_for("the cancelled task to end", lambda: not states(f"{array}_1"))
    cancelled = count_lines(1)
    wait_for_middle(2)
    subprocess.run(["scontrol", "requeue", f"{array}_2"], check=True)
    wait_for("the requeued task to wait", lambda: states(f"{array}_2") == ["PENDING"])
    requeued = count_lines(2)
    assert max(cancelled, requeued) < PAGES // SHARDS
    print(f"lines of a task of {PAGES // SHARDS} pages: {cancelled} when cancelled, ", end="")
    print(f"{requeued} of another one when requeued", flush=True)

    submit("--array=1")
    wait_for("all tasks to end", lambda: not states())
    parts = [f"found/{task}.jsonl" for task in range(1, SHARDS + 1)]
    subprocess.run([*command, "--out=calm.jsonl"], stdout=subprocess.DEVNULL, check=True)
    assert len(kill_stream.lines("calm.jsonl")) == PAGES
    assert kill_stream.lines(*parts) == kill_stream.lines("calm.jsonl")
    assert score("found/*.jsonl") == score("calm.jsonl")
    print(f"ok: the {PAGES} lines of {SHARDS} tasks are those of an undisturbed run, none twice;")
    print(f"read as one file they score the same: {score('calm.jsonl')['hmean']:.4f}")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--part", choices=["sweep", "array"], help="only this one")
    part = parser.parse_args().part
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        print(f"skipped: no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)")
        return 0

    daemons = {}
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        try:
            daemons = start_slurm(Path(folder))
            if part != "array":
                run_sweep(Path(folder), daemons)
            if part != "sweep":
                run_array(Path(folder, "array"))
        finally:
            for process in [*daemons.values()][::-1]:
                stop(process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
