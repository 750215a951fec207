"""What a whole sweep returns: suggest, pause and revive on an invented training, whose scores are
noisy and grow over 22 epochs, against W&B's sweep as it ran and against random search.

python tests/by_hand/whole_sweeps.py [--sweeps 60] [--runs 12 24] [--jobs 2]

Each sweep has a response of its own over log lr, log weight decay, log eta_min and T_max, with a
cliff towards large rates; a run is off by its seed, .1 to .3 points. Ours returns the best
posterior mean, also with `replicate`; W&B's (the package sweeps 0.3.0, which needs numpy < 2, so an
environment of its own; left out where it is absent) is bayes with hyperband, min_iter 10, eta 2,
and returns the best value, as random search does, with as many epochs as ours. Regret is in points
of the score.
"""

import contextlib
import importlib.util
import math
import sys
from multiprocessing import Pool
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bayes
import findings
import sweep
from command import Parser

EPOCHS = 22
COSINE = (1 + np.cos(math.pi * np.arange(1, EPOCHS + 1) / EPOCHS)) / 2


def log_range(low, high):
    return {"distribution": "log_uniform_values", "min": low, "max": high}


SPEC = {"method": "bayes", "metric": {"name": "hmean", "goal": "maximize"}}
SPEC["parameters"] = {"lr": log_range(1e-5, 1e-2), "weight_decay": log_range(1e-6, 1e-1)}
SPEC["parameters"] |= {"eta_min": log_range(1e-8, 1e-4), "T_max": {"values": [11, 22, 44]}}
CUBE = sweep.Cube(sweep.parse_space(SPEC))


class Training:
    """An invented response: worth(params), its maximum `best`, and the curve of a run."""

    def __init__(self, seed):
        self.rng = rng = np.random.default_rng((77, seed))
        self.centre, self.edge = rng.uniform(0.2, 0.8, 3), rng.uniform(0.7, 0.95)
        turn = np.eye(3) + 0.4 * rng.standard_normal((3, 3))
        self.turn = turn * [1.5, 0.8, 0.4] * rng.uniform(0.6, 1.5)
        self.offset = np.r_[0.0, -np.abs(rng.normal(0, 0.0015, 2))][rng.permutation(3)]
        self.waves, self.phase = 3 * rng.standard_normal((24, 3)), rng.uniform(0, 6.28, 24)
        self.heights = rng.standard_normal(24) * 0.0012 * math.sqrt(2 / 24)
        self.noise = rng.uniform(0.001, 0.003)
        u = rng.random((40000, 3))
        for radius in (0.05, 0.02, 0.005, 0.001):
            worth = self.at(u, self.offset.max())
            top = u[np.argsort(-worth)[:50]].repeat(40, 0)
            near = np.clip(top + radius * rng.standard_normal(top.shape), 0, 1)
            u = np.concatenate([top, near])
        self.best = self.at(u, self.offset.max()).max()

    def at(self, u, offset):
        far = (((u - self.centre) @ self.turn.T) ** 2).sum(1)
        cliff = 0.25 / (1 + np.exp(-(u[:, 0] - self.edge) / 0.015))
        ripples = np.cos(u @ self.waves.T + self.phase) @ self.heights
        return 0.97 - 0.03 * far / (1 + 0.3 * far) - cliff + ripples + offset

    def worth(self, params):
        u = np.array([[CUBE.free[i].encode(params[CUBE.free[i].name]) for i in (0, 1, 2)]])
        return float(self.at(u, self.offset[[11, 22, 44].index(params["T_max"])])[0])

    def curve(self, params, number):
        """A value an epoch: the lag falls with the learning rate, each run by a law of its own."""
        rng = np.random.default_rng((int(1e9 * self.best), number))
        final = self.worth(params) + self.noise * rng.standard_normal()
        gap = max(0.004 + 0.003 * rng.standard_normal(), -0.002)
        curve = final - gap * COSINE - 0.25 * np.exp(-np.arange(1, EPOCHS + 1) / 1.6)
        jitter = 0.001 * (0.3 + 0.7 * COSINE[:-1]) * rng.standard_normal(EPOCHS - 1)
        return [float(v) for v in curve + np.r_[jitter, 0]]


def ours(training, runs, replicate):
    """(params returned, epochs trained) of a sweep as sweep.py runs it."""
    spec = {**SPEC, "run_cap": runs, "early_terminate": {"type": "pause"}, "replicate": replicate}
    state, curves = sweep.Sweep(None, spec, EPOCHS, []), {}
    with contextlib.redirect_stdout(None):
        for trial, target in iter(lambda: sweep.next_job(state, ()), None):
            curve = curves.setdefault(trial, training.curve(trial.params, trial.number))
            state.write("epochs", trial, history=curve[:target], rows=[])
            sweep.settle(state, trial)
    state.folder = Path("sweep")
    first = findings.Findings(state, bayes.fit_gp, bayes.Posterior).first
    return first.params, sum(len(t.history) for t in state.trials)


def wandb(training, runs):
    from sweeps import RunState, SweepRun, next_run, stop_runs

    rule = {"type": "hyperband", "min_iter": 10, "eta": 2}
    spec, known, curves = {**SPEC, "early_terminate": rule}, [], []
    for number in range(runs):
        config = next_run(spec, known).config
        curves.append(training.curve({k: v["value"] for k, v in config.items()}, number + 1))
        run = SweepRun(name=str(number), state=RunState.running, config=config, history=[])
        known.append(run)
        for value in curves[-1]:
            run.history.append({"hmean": value})
            run.summary_metrics = {"hmean": value}
            if any(stopped.name == run.name for stopped in stop_runs(spec, known)):
                run.state = RunState.killed
                break
        run.state = RunState.finished if run.state == RunState.running else run.state
    best = max(known, key=lambda run: run.history[-1]["hmean"])
    return {k: v["value"] for k, v in best.config.items()}, sum(len(r.history) for r in known)


def at_random(training, epochs, seed):
    rng, found = np.random.default_rng((78, seed)), []
    for number in range(1, 1 + round(epochs / EPOCHS)):
        params = CUBE.decode(rng.random(4))
        found.append((training.curve(params, number)[-1], number, params))
    return max(found)[2], len(found) * EPOCHS


def one(job):
    """{policy: (regret in points, epochs)} of one sweep, every policy on the same training."""
    seed, runs = job
    training = Training(seed)
    found = {"ours": ours(training, runs, False), "ours, replicate": ours(training, runs, True)}
    found["random"] = at_random(training, found["ours"][1], seed)
    with contextlib.suppress(ImportError):
        np.random.seed(seed)
        found["W&B"] = wandb(training, runs)
    return {k: (100 * (training.best - training.worth(p)), e) for k, (p, e) in found.items()}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--sweeps", type=int, default=60)
    parser.add_argument("--runs", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if min(args.sweeps, args.jobs, *args.runs) < 1:
        parser.error("give numbers of 1 or more")
    if importlib.util.find_spec("sweeps") is None:
        print("no package sweeps, W&B's row is left out: pip install sweeps==0.3.0")
    print("runs  policy            regret: median   p90    mean   ours less it [95 %]      epochs")
    for runs in args.runs:
        with Pool(args.jobs) as pool:
            told = pool.map(one, [(seed, runs) for seed in range(args.sweeps)], chunksize=1)
        for policy in told[0]:
            regret, epochs = np.array([t[policy] for t in told]).T
            gap = np.array([t["ours"][0] for t in told]) - regret
            rng = np.random.default_rng(0)
            means = gap[rng.integers(0, len(gap), (4000, len(gap)))].mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
            line = (
                f"{runs:4d}  {policy:16s} {np.median(regret):15.3f} {np.quantile(regret, 0.9):6.3f}"
            )
            line += f" {regret.mean():7.3f}   {gap.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
            line += " (too few to trust)" * (len(gap) < 20)
            print(f"{line} {epochs.mean():7.0f}", flush=True)


if __name__ == "__main__":
    main()
