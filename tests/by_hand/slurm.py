"""A sweep on a real Slurm of one node, jobs killed in the middle: python tests/by_hand/slurm.py

Starts munged, slurmctld and slurmd of its own (Debian: apt-get install slurm-wlm munge) with all
their files in a temporary folder and ports that are free; runs six trials of the real train.py
through `sweep.py --launcher "srun ..." --parallel 2`. Cancels the job of a trial in mid-run; later
lets the node die: slurmd, the slurmstepds and the trainers get SIGKILL, the node is down, then
comes back. Shows that the trials were retried from last.pt and all six finished. Without Slurm it
says so in one line and exits 0.
"""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import NETWORK, ROOT, draw_pages, events, processes, read_log, tiny_sweep, wait_for

TOOLS = ("munged", "slurmctld", "slurmd", "srun", "scancel", "sinfo")
EPOCHS, TRIALS = 3, 6
CONFIG = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
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


def main():
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        print(f"skipped: no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)")
        return 0
    daemons, sweep = {}, None
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        work = Path(folder)
        try:
            daemons = start_slurm(work)
            draw_pages(work / "pages", 24)
            (work / "s.json").write_text(json.dumps(tiny_sweep(run_cap=TRIALS)))
            launcher = "srun --quiet --cpus-per-task=1 --mem=900M"
            command = [sys.executable, ROOT / "sweep.py", "s.json", "--launcher", launcher]
            command += ["--parallel", "2", *TRAINER]
            sweep = subprocess.Popen(command, cwd=work, env={**os.environ, "OMP_NUM_THREADS": "1"})
            first, job = midway(work, sweep, [])
            cancel(job)
            second, _ = midway(work, sweep, [first])
            let_the_node_die(work, daemons)
            assert sweep.wait(900) == 0
            check(work, [first, second])
        finally:
            for process in [sweep] * bool(sweep) + [*daemons.values()][::-1]:
                process.terminate()
                process.wait(30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
