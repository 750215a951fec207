"""What may a sweep try? W&B's sweep schema as a unit cube, and the checks of a sweep file."""

import difflib
import itertools
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

# distribution -> the keys it takes, as in the schema of W&B's sweeps 0.3.0
LAWS = {"normal": "mu sigma", "log_normal": "mu sigma", "beta": "a b"}
LAWS |= dict.fromkeys(("uniform", "log_uniform", "log_uniform_values"), "min max")
LISTS = {"constant": "value", "categorical": "values"}
LISTS["categorical_w_probabilities"] = "values probabilities"
EXTRA = dict.fromkeys(("int_uniform", "inv_log_uniform", "inv_log_uniform_values"), "min max")
DISTRIBUTIONS = {**LISTS, **LAWS, **EXTRA, **{f"q_{name}": f"{LAWS[name]} q" for name in LAWS}}
DEFAULTS = {"mu": 0, "sigma": 1, "a": 1, "b": 1}
MAX_LEVELS = 1000


@dataclass(frozen=True)
class Dimension:
    """One parameter as the unit interval. Where it has levels, level j covers edges[j] to
    edges[j + 1], its share of the probability, and the kernel sees coords[j]; else law's
    quantile at u is the value, rounded to multiples of q."""

    name: str
    law: tuple = None  # (uniform | normal | log uniform | log normal | beta, number, number)
    q: float = 0
    levels: tuple = ()
    edges: np.ndarray = None  # [levels + 1]
    coords: np.ndarray = None  # [levels]
    category: bool = False

    @property
    def key(self):
        return leaf(self.name)

    def index(self, u):
        u = np.clip(u, 0, 1 - 1e-12)  # 1 belongs to the last level that has a share
        return np.minimum(np.searchsorted(self.edges, u, side="right"), len(self.levels)) - 1

    def value(self, u):
        """u in 0..1 -> the parameter's value."""
        if self.levels:
            return self.levels[int(self.index(u))]
        # 12 digits, so that the ends of a log range come back as they were written
        return rounded(float(f"{quantile(self.law, u):.12g}"), self.q)

    def feature(self, u):
        """u [n] -> coordinates the kernel sees [n]: values are rounded before it, not after."""
        if not self.levels:
            return u
        return np.where((u < 0) | (u > 1), u, self.coords[self.index(u)])

    def encode(self, value):
        """A value -> u; outside 0..1 for a value outside the range, -1 for an unknown one."""
        keys = [identity(v) for v in self.levels]
        if identity(value) in keys:
            j = keys.index(identity(value))
            return float(self.edges[j] + self.edges[j + 1]) / 2
        return cumulative(self.law, value) if self.law and is_number(value) else -1.0


def leaf(name):
    """The last part of a dotted name, which is the hyperparameter's."""
    return name.rsplit(".", 1)[-1]


def identity(value):
    """A key equal for equal values: 1 and 1.0 are one value, True and 1, 0 and None are two."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number", value
    return type(value).__name__, json.dumps(value, sort_keys=True)


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e300


def rounded(x, q):
    """The multiple of q nearest to x, an integer if q is one."""
    if not q:
        return x
    return round(x / q) * q if isinstance(q, int) else float(f"{round(x / q) * q:.12g}")


def normal_cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def beta_cdf(x, a, b):
    """Regularised incomplete beta function by its continued fraction (DLMF 8.17.22, Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a)
    front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    f = d
    for m in range(1, 1000):
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for t in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)), odd):
            d, c = 1 / (1 + t * d), 1 + t / c
            f *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(front) * f


def bisect(cdf, u, low, high):
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle) < u else (low, middle)
    return (low + high) / 2


def cumulative(law, x):
    """Value -> u under a law; a uniform law goes on straight beyond its range."""
    kind, a, b = law
    if kind == "beta":
        return beta_cdf(x, a, b)
    if kind.startswith("log"):
        if x <= 0:
            return -1.0
        x = math.log(x)
    return normal_cdf((x - a) / b) if kind.endswith("normal") else (x - a) / (b - a)


def quantile(law, u):
    """u in 0..1 -> value under a law; tails without end are cut at a share of 1e-9."""
    kind, a, b = law
    if kind == "beta":
        return bisect(lambda x: beta_cdf(x, a, b), u, 0.0, 1.0)
    if kind.endswith("normal"):
        x = a + b * bisect(normal_cdf, min(max(u, 1e-9), 1 - 1e-9), -7.0, 7.0)
    else:
        x = a + u * (b - a)
    return math.exp(x) if kind.startswith("log") else x


def parse_law(where, kind, spec):
    """A numeric parameter's (law, first number, second number); raises ValueError."""
    base = "uniform" if kind == "int_uniform" else kind.removeprefix("q_").removeprefix("inv_")
    first, second = LAWS[base].split()
    a, b = (spec.get(key, DEFAULTS.get(key)) for key in (first, second))
    given, whole = f"{first} {a!r}, {second} {b!r}", kind == "int_uniform"
    if not (is_number(a) and is_number(b)) or whole and {type(a), type(b)} != {int}:
        fail(where, given, f"{kind} needs two {'integers' if whole else 'numbers'}")
    if first == "min" and a >= b:
        fail(where, f"min {a} is not less than max {b}", "swap them or widen the range")
    if first != "min" and (b <= 0 or first == "a" and a <= 0):
        fail(where, given, "a, b and sigma must be above 0")
    if kind.endswith("_values"):
        if a <= 0:
            fail(where, f"min {a} has no logarithm", "give a min above 0")
        a, b = math.log(a), math.log(b)
    if kind == "inv_log_uniform":
        a, b = -b, -a  # 1 / x is log-uniform between e^min and e^max
    if "log" in base and max(abs(a), abs(b)) > 700:
        fail(where, f"{given} are exponents of e", "write values with log_uniform_values")
    return base.removesuffix("_values").replace("_", " "), float(a), float(b)


def parse_dimension(name, spec):
    """One entry of `parameters` -> Dimension; raises ValueError naming parameter and key."""
    where = f"parameters: {name}"
    if not isinstance(spec, dict):
        fail(where, f"is {json.dumps(spec)}", 'a constant is written {"value": ...}')
    kind = spec.get("distribution") or guess_distribution(where, spec)
    if not isinstance(kind, str) or kind not in DISTRIBUTIONS:
        fail(where, f"unknown distribution {kind!r}", "known: " + ", ".join(DISTRIBUTIONS))
    keys = DISTRIBUTIONS[kind].split()
    for key in spec:
        if key not in (*keys, "distribution"):
            fail(where, f"key {key!r} does not belong to {kind}", f"it takes {', '.join(keys)}")
    if kind in LISTS:
        return parse_values(where, name, kind, spec)
    law, q = parse_law(where, kind, spec), spec.get("q", 1) if "q" in keys else 0
    if "q" in keys and not (is_number(q) and q > 0):
        fail(where, f"q is {q!r}", "give a step above 0")
    integer = kind == "int_uniform"
    return with_steps(name, law, 1 if integer else q, integer)


def guess_distribution(where, spec):
    """The distribution W&B assumes where a parameter names none."""
    if "value" in spec or "values" in spec:
        kind = "categorical" + "_w_probabilities" * ("probabilities" in spec)
        return "constant" if "value" in spec else kind
    if not {"min", "max"} <= set(spec):
        fail(where, f"has keys {sorted(spec)}", "give value, values, or min and max")
    return "int_uniform" if {type(spec["min"]), type(spec["max"])} == {int} else "uniform"


def parse_values(where, name, kind, spec):
    """Dimension of listed values. Three numbers or more are points on a scale (the kernel sees
    their ranks: neighbours are alike); two, and anything else, are names without an order."""
    values = [spec["value"]] if "value" in spec else spec.get("values")
    if not isinstance(values, list) or not values:
        fail(where, "values is not a list with an entry", "list what to try")
    if not all(v is None or isinstance(v, (str, int, float)) for v in values):
        fail(where, "values holds a list or an object", "list what to try")
    if len({identity(v) for v in values}) < len(values):
        fail(where, "values has one value twice", "name each once")
    share = np.full(len(values), 1 / len(values))
    if kind == "categorical_w_probabilities":
        share = spec.get("probabilities")
        sound = isinstance(share, list) and all(is_number(p) and p >= 0 for p in share)
        if not sound or len(share) != len(values) or abs(sum(share) - 1) > 1e-6:
            fail(where, f"probabilities {share} are not {len(values)} shares of 1", "correct them")
    scale = len(values) > 2 and all(is_number(v) for v in values)
    ranks = np.argsort(np.argsort(values)) if scale else np.arange(len(values))
    coords = (ranks + 0.5) / len(values) if scale else ranks.astype(float)
    return Dimension(name, None, 0, tuple(values), np.r_[0, np.cumsum(share)], coords, not scale)


def with_steps(name, law, q, integer):
    """Dimension of a numeric parameter; a level for each multiple of q where they are few."""
    if not q:
        return Dimension(name, law)
    low, high = (quantile(law, u) / q for u in (0.0, 1.0))
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if "normal" in law[0]:
        first, last = round(low), round(high)
    if first > last:
        fail(f"parameters: {name}", f"no multiple of q = {q} in the range", "give a smaller q")
    if last - first >= MAX_LEVELS:
        return Dimension(name, law, q)
    if integer:
        law = ("uniform", first - 0.5, last + 0.5)
    edges = np.array([0.0] + [cumulative(law, (k + 0.5) * q) for k in range(first, last)] + [1.0])
    levels = tuple(rounded(k * q, q) for k in range(first, last + 1))
    return Dimension(name, law, q, levels, edges, (edges[1:] + edges[:-1]) / 2)


def parse_space(space):
    """W&B sweep dict -> list of Dimension, nested parameters joined by dots; raises ValueError."""
    parameters = space.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        fail("parameters", "is missing or empty", "name at least one hyperparameter")
    dims = []
    for name, spec in parameters.items():
        if isinstance(spec, dict) and set(spec) == {"parameters"}:
            dims += [replace(d, name=f"{name}.{d.name}") for d in parse_space(spec)]
        else:
            dims.append(parse_dimension(name, spec))
    return dims


def fail(where, what, remedy):
    raise ValueError(f"{where}: {what[:300]}; {remedy}")


def closest(key, known):
    """A remedy's first words: the key that was meant, if any is near."""
    near = difflib.get_close_matches(key.split("=")[0], known, 1)
    return f"did you mean {near[0]}? Or " if near else ""


class Cube:
    """The parameters of a sweep that vary, as a unit cube of points u [n, d]."""

    def __init__(self, dims):
        self.dims, self.free = dims, [d for d in dims if len(d.levels) != 1]
        self.category = np.array([d.category for d in self.free], bool)
        self.stepped = np.array([bool(d.levels) for d in self.free], bool)

    def features(self, u):
        return np.stack([d.feature(u[:, i]) for i, d in enumerate(self.free)], 1)

    def decode(self, u):
        values = {d.name: d.value(float(x)) for d, x in zip(self.free, u)}
        return {d.name: values.get(d.name, d.levels[0] if d.levels else None) for d in self.dims}

    def encode(self, params):
        return [d.encode(params[d.name]) for d in self.free]

    def key(self, params):
        return tuple(identity(params[d.name]) for d in self.free)

    def combinations(self):
        """Every point, if all parameters have levels (of a probability above 0)."""
        middles = [((d.edges[1:] + d.edges[:-1]) / 2)[np.diff(d.edges) > 0] for d in self.free]
        return itertools.product(*middles)


def maximised(space):
    return space.get("metric", {}).get("goal", "minimize") == "maximize"


# ---------------------------------------------------------------- sweep file

RULE_KEYS = {"brackets": {"eta"}, "pause": {"bands", "eta"}}
RULE_KEYS["hyperband"] = {"min_iter", "max_iter", "eta", "s", "strict"}
GUARDS = {"type", "epochs", "preserve_threshold", "revive"}


def check_rule(rule):
    """Raises ValueError for an early_terminate that is none, naming the key."""
    where, kind = "early_terminate", rule.get("type") if isinstance(rule, dict) else None
    if not isinstance(kind, str) or kind not in RULE_KEYS:
        fail(where, f"{json.dumps(rule)[:80]} has no known type", f"known: {', '.join(RULE_KEYS)}")
    known = RULE_KEYS[kind] | GUARDS
    for key, x in rule.items():
        if key not in known:
            fail(where, f"unknown key {key!r}", f"{kind} takes {', '.join(sorted(known))}")
        if key == "bands" and not (isinstance(x, list) and all(type(b) is int for b in x)):
            fail(where, f"bands is {x!r}", "give a list of epochs")
        if key not in ("type", "strict", "bands") and not is_number(x):
            fail(where, f"{key} is {x!r}", "give a number")
    epochs = [rule.get("min_iter", 1), rule.get("max_iter", 1), *rule.get("bands", ())]
    if not 1.01 <= rule.get("eta", 3) or min(epochs) < 1 or max(epochs) > 1e6:
        fail(where, "eta must be above 1, min_iter, max_iter and bands at least 1", "correct it")
    if not 0 <= rule.get("s", 0) <= 50:
        fail(where, f"s is {rule['s']}", "give a number of bands from 0 to 50")
    if kind == "hyperband" and not ("min_iter" in rule or {"max_iter", "s"} <= set(rule)):
        fail(where, "hyperband has no bands", "give min_iter, or max_iter and s")


METRIC = {"name": "hmean", "goal": "maximize"}
USED = {"method", "metric", "parameters", "early_terminate", "run_cap", "seed", "command"}
NO_EFFECT = set(
    [
        "program",
        "project",
        "name",
        "description",
        "entity",
        "apiVersion",
        "kind",
        "controller",
        "job",
    ]
)
NO_EFFECT |= {"image_uri", "metrics", "scheduler"}


def unique_keys(pairs):
    """The object of a JSON object's pairs; raises ValueError on a key that comes twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(a for a, b in itertools.pairwise(keys) if a == b)
        raise ValueError(f"key {twice!r:.80} comes twice")
    return value


def read_json(path, what):
    """Parsed JSON of a file under 16 MB; raises ValueError naming the file."""
    try:
        if os.path.getsize(path) > 1 << 24:
            fail(path, f"is larger than 16 MB, no {what}", "check the path")
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "not text")
        fail(path, f"cannot be read ({why})", f"give the path of a {what}")
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        fail(path, f"is not JSON ({error})", "W&B's YAML must be exported as JSON")


def load_spec(path):
    """Sweep file -> its dict, with defaults; raises ValueError naming file and key."""
    spec = read_json(path, "sweep file")
    if isinstance(spec, dict) and not {"method", "parameters"} & set(spec):
        fail(path, "has neither method nor parameters", f"one run is: train.py --hparams {path}")
    try:
        return check_spec(spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_spec(spec):
    """A sweep dict -> itself, with defaults; raises ValueError naming the first wrong key."""
    if not isinstance(spec, dict):
        fail("sweep", "is not a JSON object", "see hparams/sweep_lr_wd.json")
    for key in sorted(set(spec) - USED - NO_EFFECT):
        fail("sweep", f"unknown key {key!r}", f"{closest(key, USED | NO_EFFECT)}remove it")
    if spec.get("method") not in ("bayes", "random", "grid"):
        fail("method", f"is {spec.get('method')!r}", "give bayes, random or grid")
    metric = spec.get("metric", METRIC)
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        fail("metric", f"is {json.dumps(metric)[:80]}", "give name and goal")
    for key in set(metric) - {"name", "goal", "target", "impute", "impute_while_running"}:
        fail("metric", f"unknown key {key!r}", "give name and goal")
    if metric.get("goal", "minimize") not in ("maximize", "minimize"):
        fail("metric: goal", f"is {metric['goal']!r}", "give maximize or minimize")
    for key, low in (("run_cap", 1), ("seed", 0)):
        if key in spec and (type(spec[key]) is not int or spec[key] < low):
            fail(key, f"is {spec[key]!r}", f"give an integer of at least {low}")
    if "target" in metric and not is_number(metric["target"]):
        fail("metric: target", f"is {metric['target']!r}", "give a number")
    if spec.get("early_terminate") is not None:
        check_rule(spec["early_terminate"])
    words = spec.get("command") or []
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        fail("command", f"is {json.dumps(words)[:80]}", "give a list of words")
    cube = Cube(parse_space(spec))
    keys = [d.key for d in cube.dims]
    for key in keys:
        if keys.count(key) > 1:
            fail("parameters", f"{key} is named twice (the last part counts)", "remove one")
    if "epochs" in [d.key for d in cube.free]:
        fail("parameters: epochs", "varies", "trials are compared at one length: give one value")
    return {**spec, "metric": metric}


def flags(params):
    """Params -> train.py flags; of a dotted name the last part counts."""

    def text(x):
        return str(x).lower() if isinstance(x, bool) else x if isinstance(x, str) else json.dumps(x)

    return [f"--{leaf(name)}={text(x)}" for name, x in params.items()]


def wandb_form(spec):
    """The sweep without what W&B's schema refuses, and what was dropped."""
    form = {k: v for k, v in spec.items() if k != "seed" and v is not None}
    rule, dropped = form.pop("early_terminate", None), ["seed"] * ("seed" in spec)
    if rule and rule["type"] == "hyperband":
        ours = {k for k in rule if k in GUARDS - {"type"}}
        form["early_terminate"] = {k: v for k, v in rule.items() if k not in ours}
        dropped += [f"early_terminate.{k}" for k in sorted(ours)]
    elif rule:
        dropped.append(f"early_terminate of type {rule['type']}")
    return {**form, "program": "train.py"}, dropped
