"""What may a sweep try? W&B's sweep schema as a unit cube, and the checks of a sweep file."""

import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from files import UsageError, nearest, shown

# ---------------------------------------------------------------- one parameter

# distribution: the keys it takes, as in the schema of W&B's sweeps 0.3.0
LAWS = {
    "normal": "mu sigma",
    "log_normal": "mu sigma",
    "uniform": "min max",
    "log_uniform": "min max",
    "log_uniform_values": "min max",
}
LISTS = {
    "constant": "value",
    "categorical": "values",
    "categorical_w_probabilities": "values probabilities",
}
DISTRIBUTIONS = LISTS | LAWS | {"int_uniform": "min max"}
DISTRIBUTIONS |= {f"q_{name}": f"{keys} q" for name, keys in LAWS.items()}
# distributions of W&B's that are not used here, and what to write instead
INSTEAD = {
    "beta": "use uniform or normal",
    "q_beta": "use q_uniform or q_normal",
    "inv_log_uniform": "use log_uniform with min -max and max -min",
    "inv_log_uniform_values": "use log_uniform_values with the same min and max",
}
MAX_LEVELS = 1000  # a parameter with more steps than this is treated as continuous


@dataclass(frozen=True)
class Dimension:
    """One parameter as the unit interval 0..1.

    A parameter with levels (listed values, or few steps): level j has the share edges[j] to
    edges[j + 1] of the interval, and the kernel sees it at coords[j]. Without levels, u stands for
    the law's quantile at u, rounded to a multiple of q."""

    name: str
    law: tuple = None  # (uniform | normal | log uniform | log normal, number, number)
    q: float = 0
    levels: tuple = ()
    edges: np.ndarray = None  # [levels + 1]
    coords: np.ndarray = None  # [levels]
    category: bool = False

    def index(self, u):
        u = np.clip(u, 0, 1 - 1e-12)  # 1 belongs to the last level that has a share
        return np.minimum(np.searchsorted(self.edges, u, "right"), len(self.levels)) - 1

    def value(self, u):
        """u in 0..1 -> the parameter's value."""
        if self.levels:
            return self.levels[self.index(u)]

        # 12 digits, so that the ends of a log range come back as they were written
        x = float(f"{quantile(self.law, u):.12g}")
        return rounded(x, self.q) if self.q else x

    def feature(self, u):
        """u [n] -> the coordinates that the kernel sees [n]. They are those of the rounded values,
        and 0 for `seed`: runs that differ by nothing else are replicas of one point."""
        if self.name == "seed":
            return u * 0
        if not self.levels:
            return u
        outside = (u < 0) | (u > 1)
        return np.where(outside, u, self.coords[self.index(u)])

    def encode(self, value):
        """A value -> u; outside 0..1 for a value outside the range, from -2 to -1 for an unknown
        one."""
        for j, level in enumerate(self.levels):
            if identity(level) == identity(value):
                return middles(self.edges)[j]
        if is_number(value) and not self.category:
            if self.law:
                return cumulative(self.law, value)
            # a number that a list of numbers lacks: beyond its ends below 0 or above 1
            u = (value - min(self.levels)) / np.ptp(self.levels)
            if not 0 <= u <= 1:
                return u

        # no two values alike: runs at one point would be replicas
        return -1 - random.Random(identity(value)).random()


def middles(edges):
    """Edges of levels' shares [levels + 1] -> the middles of the shares [levels]."""
    return (edges[1:] + edges[:-1]) / 2


def leaf(name):
    """The last part of a dotted name, or of a metric such as val/hmean: only this part counts. Its
    hyphens become underscores, so that weight-decay is weight_decay."""
    return re.split("[./]", name)[-1].replace("-", "_")


def plain(params):
    return {leaf(name): value for name, value in params.items()}


def is_number(x):
    """Whether x is a finite int or float. A bool is not, though Python takes it for an int."""
    return (isinstance(x, float) or type(x) is int) and abs(x) < 1e300


def identity(value):
    """A text that is equal for equal values: 1 and 1.0 are the same, True and 1 are not."""
    return json.dumps(float(value) if is_number(value) else value, sort_keys=True)


def rounded(x, q):
    """The multiple of q nearest to x, an integer if q is one."""
    multiple = round(x / q) * q
    return multiple if isinstance(q, int) else float(f"{multiple:.12g}")


def normal_cdf(z):
    return NormalDist().cdf(z)


def cumulative(law, x):
    """Value -> u under a law; a uniform law continues in a straight line beyond its range."""
    kind, a, b = law
    if kind.startswith("log"):
        if x <= 0:
            return -1.0
        x = math.log(x)
    if kind.endswith("normal"):
        return normal_cdf((x - a) / b)
    return (x - a) / (b - a)


def quantile(law, u):
    """u in 0..1 -> value under a law; normal tails are cut at a share of 1e-9."""
    kind, a, b = law
    if kind.endswith("normal"):
        x = NormalDist(a, b).inv_cdf(min(max(u, 1e-9), 1 - 1e-9))
    else:
        x = a + u * (b - a)
    return math.exp(x) if kind.startswith("log") else x


# ---------------------------------------------------------------- entries of `parameters`


def check_keys(where, given, known):
    """Raises UsageError for the first unknown key of a dict."""
    for key in sorted(given.keys() - known):
        what = f"unknown key {shown(key)!r}{nearest(key, known)}"
        raise UsageError(where, what, f"known: {', '.join(sorted(known))}")


def parse_dimension(name, spec):
    """One entry of `parameters` -> Dimension. Raises UsageError naming parameter and key."""
    where = f"parameters: {shown(name)}"
    name = leaf(name)
    if not isinstance(spec, dict):
        raise UsageError(where, f"is {spec!r:.80}", 'for a constant write {"value": ...}')

    kind = spec.get("distribution") or guess_distribution(where, spec)
    if str(kind) not in DISTRIBUTIONS:
        remedy = INSTEAD.get(str(kind), f"known: {', '.join(DISTRIBUTIONS)}")
        raise UsageError(where, f"unknown distribution {kind!r:.80}", remedy)
    keys = DISTRIBUTIONS[kind].split()
    check_keys(f"{where}: {kind}", spec, {*keys, "distribution"})

    if kind in LISTS:
        return parse_values(where, name, kind, spec)
    integer = kind == "int_uniform"
    q = int(integer)
    if "q" in keys:
        q = spec.get("q", 1)
        if not (is_number(q) and q > 0):
            raise UsageError(where, f"q is {q!r:.80}", "give a step above 0")
    return with_steps(where, name, parse_law(where, kind, spec), q, integer)


def guess_distribution(where, spec):
    """The distribution that W&B assumes where a parameter names none. Raises UsageError."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if not {"min", "max"} <= set(spec):
        raise UsageError(where, f"has {shown(', '.join(spec))}", "give value, values or min, max")
    return "int_uniform" if {type(spec["min"]), type(spec["max"])} == {int} else "uniform"


def parse_law(where, kind, spec):
    """A numeric parameter's (law, first number, second number). Raises UsageError."""
    integer = kind == "int_uniform"
    base = "uniform" if integer else kind.removeprefix("q_")
    first, second = LAWS[base].split()
    defaults = {"mu": 0, "sigma": 1}
    a, b = (spec.get(key, defaults.get(key)) for key in (first, second))
    given = f"{first} {a!r:.80}, {second} {b!r:.80}"

    if integer and {type(a), type(b)} != {int}:
        raise UsageError(where, given, "int_uniform needs two integers")
    if not (is_number(a) and is_number(b)):
        raise UsageError(where, given, f"{kind} needs two numbers")
    if b <= (a if first == "min" else 0):
        raise UsageError(where, given, "min must be less than max, sigma above 0")

    if base == "log_uniform_values":
        if a <= 0:
            raise UsageError(where, f"min {a} has no logarithm", "give a min above 0")
        a, b = math.log(a), math.log(b)
    if base.startswith("log") and max(abs(a), abs(b)) > 700:
        raise UsageError(where, f"{given} are exponents of e", "see log_uniform_values")
    return base.removesuffix("_values").replace("_", " "), float(a), float(b)


def parse_values(where, name, kind, spec):
    """Dimension of listed values. Three numbers or more are points on a scale: the kernel sees
    their ranks, so that neighbours are alike. Two numbers, or anything else, are names without an
    order. Raises UsageError."""
    values = [spec["value"]] if "value" in spec else spec.get("values")
    if not isinstance(values, list) or not values or {list, dict} & set(map(type, values)):
        raise UsageError(where, "values is not a list of numbers and words", "list what to try")
    if len({identity(v) for v in values}) < len(values):
        raise UsageError(where, "values has one value twice", "name each once")

    n = len(values)
    share = np.full(n, 1 / n)
    if kind == "categorical_w_probabilities":
        share = spec.get("probabilities")
        sound = isinstance(share, list) and all(is_number(p) and p >= 0 for p in share)
        if not sound or len(share) != n or abs(sum(share) - 1) > 1e-6:
            raise UsageError(where, f"probabilities are not {n} shares that add up to 1")
    edges = np.r_[0, np.cumsum(share)]

    category = n < 3 or not all(map(is_number, values))
    coords = np.arange(float(n))
    if not category:
        coords = (np.argsort(np.argsort(values)) + 0.5) / n  # of their ranks
    levels = tuple(values)
    return Dimension(name, levels=levels, edges=edges, coords=coords, category=category)


def with_steps(where, name, law, q, integer):
    """Dimension of a numeric parameter, with a level for each multiple of q where they are few.
    Raises UsageError."""
    if not q:
        return Dimension(name, law)

    # the first and the last multiple of q: inside a range; nearest to the ends of normal tails
    low, high = (quantile(law, u) / q for u in (0.0, 1.0))
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if "normal" in law[0]:
        first, last = round(low), round(high)
    if first > last:
        raise UsageError(where, f"no multiple of q = {q} in the range", "give a smaller q")
    if last - first >= MAX_LEVELS:
        return Dimension(name, law, q)

    # the outer halves of the end levels' shares go to these levels
    if integer:
        law = ("uniform", first - 0.5, last + 0.5)
    inner = [cumulative(law, (k + 0.5) * q) for k in range(first, last)]
    edges = np.array([0.0, *inner, 1.0])
    levels = tuple(rounded(k * q, q) for k in range(first, last + 1))
    return Dimension(name, law, q, levels, edges, middles(edges))


def entries(parameters, before=""):
    """Yields (dotted name, entry) of each of W&B's nested parameters. Raises UsageError."""
    if not isinstance(parameters, dict) or not parameters:
        raise UsageError("parameters", "is missing or empty", "name at least one hyperparameter")
    for name, spec in parameters.items():
        if isinstance(spec, dict) and set(spec) == {"parameters"}:
            yield from entries(spec["parameters"], f"{before}{name}.")
        else:
            yield before + name, spec


# ---------------------------------------------------------------- all parameters


def parse_space(spec):
    """W&B sweep dict -> list of Dimension. Raises UsageError."""
    dims = [parse_dimension(name, entry) for name, entry in entries(spec.get("parameters"))]
    for d in dims:
        if spec.get("method") == "grid" and not d.levels:
            raise UsageError(
                f"parameters: {shown(d.name)}",
                f"method grid needs steps, at most {MAX_LEVELS}",
                "give values or q_*",
            )
    return dims


class Cube:
    """The parameters of a sweep that vary, as a unit cube of points u [n, d]."""

    def __init__(self, dims):
        self.dims = dims
        self.names = {d.name for d in dims}
        self.free = [d for d in dims if len(d.levels) != 1]
        self.constants = {d.name: d.levels[0] for d in dims if len(d.levels) == 1}
        self.category = np.array([d.category for d in self.free], bool)
        self.stepped = np.array([bool(d.levels) for d in self.free], bool)

    def features(self, u):
        return np.stack([d.feature(u[:, i]) for i, d in enumerate(self.free)], 1)

    def decode(self, u):
        """u [d] -> params, constants included."""
        varying = {d.name: d.value(float(x)) for d, x in zip(self.free, u)}
        params = self.constants | varying
        return {d.name: params[d.name] for d in self.dims}  # in the order of the sweep file

    def encode(self, params):
        return [d.encode(params[d.name]) for d in self.free]

    def key(self, params):
        return tuple(identity(params[d.name]) for d in self.free)

    def combinations(self):
        """Every point (of a probability above 0), if all parameters have levels."""
        return itertools.product(*[middles(d.edges)[np.diff(d.edges) > 0] for d in self.free])


def maximised(spec):
    return spec.get("metric", {}).get("goal") == "maximize"


# ---------------------------------------------------------------- sweep file

RULE_KEYS = {
    "brackets": {"eta"},
    "pause": {"bands", "eta"},
    "hyperband": {"min_iter", "max_iter", "eta", "s", "strict"},
}
GUARDS = {"type", "epochs", "preserve_threshold", "revive"}  # keys of every rule
BOUNDS = {"eta": (1.01, 1e6), "min_iter": (1, 1e6), "max_iter": (1, 1e6), "s": (0, 50)}

# columns of log.csv, and what stands before each in W&B and TensorBoard
SHARES = ("hmean", "precision", "recall")
LOGGED = dict.fromkeys((*SHARES, "hmean_lo", "hmean_hi"), "val/")
TRAINED = "lr loss loss_shrink loss_thresh loss_binary seconds images_s wait peak_gib val_seconds"
LOGGED |= dict.fromkeys(TRAINED.split(), "train/")


def check_share(where, metric, value):
    """Raises UsageError for a percentage where the metric is a share."""
    if leaf(metric) in SHARES and 1 < value <= 100:
        raise UsageError(where, f"{value} looks like a percentage", f"write {value / 100:g}")


def check_rule(rule, metric=""):
    """Raises UsageError for a wrong early_terminate, naming the key."""
    where = "early_terminate"
    kind = rule.get("type") if isinstance(rule, dict) else None
    if str(kind) not in RULE_KEYS:
        raise UsageError(where, f"unknown type {kind!r:.80}", f"known: {', '.join(RULE_KEYS)}")
    check_keys(f"{where}: {kind}", rule, RULE_KEYS[kind] | GUARDS)

    for key, x in rule.items():
        remedy = remedy_for(key, x)
        if remedy:
            raise UsageError(where, f"{key} is {x!r:.80}", remedy)
    check_share(f"{where}: preserve_threshold", metric, rule.get("preserve_threshold", 0))
    needed = "s" if "max_iter" in rule else "min_iter"
    if kind == "hyperband" and needed not in rule:
        raise UsageError(where, "hyperband has no bands", "give min_iter, or max_iter and s")


def remedy_for(key, x):
    """What to give instead of the value x of an early_terminate's key; None where x is right."""
    if key == "type":
        return None
    if key == "strict":
        return None if isinstance(x, bool) else "give true or false"
    if key == "bands":
        sound = isinstance(x, list) and x and all(type(b) is int and 1 <= b <= 1e6 for b in x)
        return None if sound else "give a list of epochs"
    low, high = BOUNDS.get(key, (-1e300, 1e300))
    return None if is_number(x) and low <= x <= high else f"give a number from {low} to {high}"


METRIC = {"name": "hmean", "goal": "maximize"}
NOT_WANDBS = {"seed", "replicate"}
USED = {"method", "metric", "parameters", "early_terminate", "run_cap", *NOT_WANDBS}
NO_EFFECT = {"program", "project", "name", "description", "entity", "apiVersion", "kind"}
NO_EFFECT |= {"controller", "job", "image_uri", "metrics", "scheduler", "command"}


def check_spec(spec):
    """A sweep dict -> itself, with defaults. Raises UsageError naming the first wrong key."""
    if not isinstance(spec, dict):
        raise UsageError("sweep", "is not an object with a method", "see hparams/sweep_lr_wd.json")
    metric = spec.get("metric", METRIC)
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise UsageError("metric", f"is {metric!r:.80}", "give name and goal")
    check_keys("sweep", spec, USED | NO_EFFECT)
    check_keys("metric", metric, {"name", "goal", "target", "impute", "impute_while_running"})

    check_values(spec, metric)
    if spec.get("early_terminate") is not None:
        check_rule(spec["early_terminate"], metric["name"])
    check_parameters(Cube(parse_space(spec)), spec.get("replicate"))
    return spec | {"metric": metric}


def check_values(spec, metric):
    """Raises UsageError for the first wrong value that is not a parameter's or a rule's."""
    method = spec.get("method")
    cap = spec.get("run_cap", 1)
    seed = spec.get("seed", 0)
    replicate = spec.get("replicate", False)
    goal = metric.get("goal", "minimize")
    target = metric.get("target", 0)
    for where, value, sound, remedy in (
        ("method", method, method in ("bayes", "random", "grid"), "give bayes, random or grid"),
        ("metric: goal", goal, goal in ("maximize", "minimize"), "give maximize or minimize"),
        ("metric: target", target, is_number(target), "give a number"),
        ("run_cap", cap, type(cap) is int and cap >= 1, "give an integer of at least 1"),
        ("seed", seed, type(seed) is int and seed >= 0, "give an integer of at least 0"),
        (
            "replicate",
            replicate,
            replicate in (False, method == "bayes"),
            "give false, or true with bayes",
        ),
    ):
        if not sound:
            raise UsageError(where, f"is {value!r:.80}", remedy)
    check_share("metric: target", metric["name"], target)


def check_parameters(cube, replicate):
    """Raises UsageError for parameters that do not go together."""
    names = [d.name for d in cube.dims]
    varying = [d.name for d in cube.free]
    for name in names:
        if names.count(name) > 1:
            twice = f"{shown(name)} comes twice (by the last part of its name)"
            raise UsageError("parameters", twice, "remove one")
    if "epochs" in varying:
        raise UsageError("parameters: epochs", "varies", "trials need one length: give a value")
    if replicate and "seed" in varying:
        raise UsageError("parameters: seed", "varies, and replicate sets it", "drop one of them")


def flags(params):
    """Params -> train.py's flags."""
    return [f"--{k}={x if isinstance(x, str) else json.dumps(x)}" for k, x in params.items()]


def wandb_form(spec):
    """A checked sweep -> (the sweep in the form that W&B's schema, its agent and train.py take, the
    keys that were dropped because W&B does not have them)."""
    form = {k: v for k, v in spec.items() if k not in NOT_WANDBS and v is not None}
    dropped = sorted(NOT_WANDBS & spec.keys())
    metric = spec["metric"]
    name = leaf(metric["name"])
    form["metric"] = metric | {"name": LOGGED[name] + name}
    form["program"] = "train.py"
    form["parameters"] = dict(entries(spec["parameters"]))  # nested ones reach train.py as a dict

    rule = form.pop("early_terminate", {})
    kept = set()
    if rule.get("type") == "hyperband":
        kept = RULE_KEYS["hyperband"] | {"type"}
        form["early_terminate"] = {k: v for k, v in rule.items() if k in kept}
    dropped += [f"early_terminate.{k} = {v}" for k, v in rule.items() if k not in kept]
    return form, dropped
