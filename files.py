"""What does a file promise? One exception and the exit codes, bounded reading, writing whole or not
at all, locks, and a command line whose errors are one line. Exit codes of every command: 0 fine;
1 wrong data, or something could not be written; 2 a wrong command; 3 out of memory; 4 not finite;
5 a gate did not open; 130, 143 stopped; 137 killed."""

import argparse
import contextlib
import fcntl
import json
import os
import re
import sys
from difflib import get_close_matches
from functools import partial
from pathlib import Path

MAX_BYTES, MAX_NODES = 2**30, 10**7  # of a text; lists and objects of a JSON file
MEMORY = "(?i)^$|out of memory|allocate memory|alloc_failed|unable to find an engine"  # CUDA's too
KEPT = "what was written before is whole"


class DataError(ValueError):
    """DataError(where, what, remedy): what is wrong with the user's data, where (file, image, word,
    key) and what to do about it, as one line; a fourth part is an exit code other than 1."""

    @property
    def code(self):
        return self.args[3] if len(self.args) > 3 else 1

    def __str__(self):
        where, what, remedy = (*map(str, self.args), "", "", "")[:3]
        line = where + f": {what}" * bool(what) + f"; {remedy}" * bool(remedy)
        return re.sub(r"(?s)^.*\nfiles\.\w+: ", "", line.strip())  # as a loader process sends it


class UsageError(DataError):
    """A flag, a value or what a flag names does not work."""

    code = 2


def exit_code(run, say=lambda line: print(f"error: {line}", file=sys.stderr)):
    """run()'s exit code, or where it fails one of the table, and a line to say; raises bugs."""
    try:
        return run() or 0
    except (DataError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        line, code = str(error), getattr(error, "code", 1)
        if isinstance(error, OSError):
            line = f"{error.filename or 'output'}: {error.strerror or error}; {KEPT}"
        elif isinstance(error, KeyboardInterrupt):
            line, code = f"interrupted; {KEPT}", 130
        elif not isinstance(error, DataError):
            if not re.search(MEMORY, line):  # MemoryError is ""
                raise
            line, code = "out of memory; lower --size (and --batch), or use --device cpu", 3
    say(line)
    return code


def read_text(path, limit=MAX_BYTES, encoding="utf-8-sig", other=None):
    """A text file of at most `limit` bytes, in UTF-8 or else `other`. Raises OSError, DataError."""
    if not Path(path).is_file():
        raise UsageError(path, "no such file")
    if os.path.getsize(path) > limit:
        raise DataError(path, f"larger than {limit >> 20} MiB", "split it into several files")
    raw = Path(path).read_bytes()
    for name in (encoding, other or encoding):
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(name)
    raise DataError(path, "not text in UTF-8", "save it as such")


def as_dict(pairs, flat=False):
    if flat:
        parts = (x if isinstance(x, dict) else {key.rpartition(".")[2]: x} for key, x in pairs)
        pairs = [pair for part in parts for pair in part.items()]
    value, seen = dict(pairs), set()
    if len(value) < len(pairs):
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {shown(twice)} comes twice in one object")
    return value


def read_json(path, text=None, flat=False):
    """The value of a JSON or YAML file, or of a text from it; flat: of nested objects and dotted
    keys the last part counts. Raises OSError, DataError, also on a key twice."""
    import yaml  # which timm needs

    def value(node):  # of YAML, where 5e-4 is a number and off a text, as in version 1.2
        if node.id == "mapping":
            return as_dict([(key.value, value(x)) for key, x in node.value], flat)
        if node.id == "sequence":
            return [value(x) for x in node.value]
        for kind in (int, float, lambda x: json.loads(x.lower())) if not node.style else ():
            with contextlib.suppress(ValueError):
                return kind(node.value.strip("~") or "null")
        return node.value

    kind = "YAML" if Path(path).suffix in (".yaml", ".yml") else "JSON"
    text = read_text(path, MAX_BYTES if kind == "JSON" else 2**20) if text is None else text
    try:
        top = yaml.compose(text, yaml.SafeLoader) if kind == "YAML" else None
        aliases = top and yaml.AliasToken in map(type, yaml.scan(text))
        if aliases or text.count("[") + text.count("{") > MAX_NODES:
            raise ValueError(f"aliases, or more than {MAX_NODES} lists and objects")
        return value(top) if top else json.loads(text, object_pairs_hook=lambda x: as_dict(x, flat))
    except (AttributeError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise DataError(path, f"not a {kind} file ({' '.join(str(error).split())})") from None


def replace_file(path, content):
    """Write bytes or text whole or not at all (temporary name, fsync, rename), and its folder."""
    path, content = Path(path), content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # its folder may be a file
            temporary.unlink()


def write_json(path, value, indent=None):
    """Write JSON as `replace_file` does. Raises ValueError on NaN or infinity."""
    replace_file(path, json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n")


def shown(name):
    """A name from a file as an error message shows it: on one line, and not for ever."""
    name = name if isinstance(name, str) and name.isprintable() and name else ascii(name)
    return name if len(name) <= 80 else name[:77] + "..."


def nearest(name, known):
    """ "; did you mean ...?" where one of the known names is near."""
    return "".join(f"; did you mean {x}?" for x in get_close_matches(str(name), known, 1, 0.6))


def lock(path):
    """An exclusive lock on a file, held while it is open; None when another process has it."""
    file = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # others come where a file system has no locks
        if isinstance(error, BlockingIOError):
            return file.close()
    return file


class Parser(argparse.ArgumentParser):
    """argparse that takes --a_b, --x.a-b, --no-a-b; errors are one line with the closest flag."""

    def __init__(self, **options):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=100)
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = [re.sub("^--([^=]+[.])?", "--", w) for w in (sys.argv[1:] if args is None else args)]
        args = [re.sub("^--no[-_]([^=]+)$", r"--\1=none", word) for word in args]
        args = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in args]
        return super().parse_known_args(args, namespace)

    def error(self, message):
        groups = ([*a.choices.values()] for a in self._actions if isinstance(a.choices, dict))
        known = re.findall(r"[\w-]+", message.partition("choose from")[2])
        known = known or [flag for p in sum(groups, [self]) for flag in p._option_string_actions]
        wrong = re.search(r"(?:arguments|choice): '?(?:-m )?([^ '=]+)", message)
        hydra = re.search(r"arguments: (?:-m )?[+~]*(?:\w+[.])*(\w+=\S+)", message)  # its a.b=c
        hint = f"; use --{hydra[1]}" if hydra else nearest(wrong[1], known) if wrong else ""
        self.exit(2, f"error: {message}{hint} (see --help)\n")
