"""What does a file promise? One exception and the exit codes, bounded reading, writing whole or not
at all, locks, and a command line whose errors are one line.

Exit codes of every command: 0 fine; 1 wrong data, or something could not be written; 2 a wrong
command; 3 out of memory; 4 not finite; 5 a gate did not open; 130, 143 stopped; 137 killed."""

import argparse
import contextlib
import difflib
import fcntl
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

MAX_BYTES, MAX_NODES = 2**30, 10**7  # of a text; lists and objects of a JSON file
MEMORY = "(?i)^$|out of memory|allocate memory|alloc_failed|unable to find an engine"  # CUDA's too
KEPT = "what was written before is whole"


class DataError(ValueError):
    """DataError(where, what, remedy): what is wrong with the user's data, where (file, image, word,
    key) and what to do about it, as one line."""

    code = 1

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
    """A text file of at most `limit` bytes, in UTF-8 or else `other`. Raises DataError."""
    try:
        if not Path(path).is_file():
            raise UsageError(path, "no such file")
        if os.path.getsize(path) > limit:
            raise DataError(path, f"larger than {limit >> 20} MiB", "split it into several files")
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from None
    for name in (encoding, other or encoding):
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(name)
    raise DataError(path, "not text in UTF-8", "save it as such")


def unique_keys(pairs):
    value, seen = dict(pairs), set()
    if len(value) < len(pairs):
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {shown(twice)} comes twice in one object")
    return value


def read_json(path, text=None):
    """The value of a JSON file, or of a text from it. Raises DataError, also on a key twice."""
    text = read_text(path) if text is None else text
    if text.count("[") + text.count("{") > MAX_NODES:
        raise DataError(path, f"more than {MAX_NODES} lists and objects", "split it")
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(path, f"not a JSON file ({error})") from None


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
        temporary.unlink(missing_ok=True)


def write_json(path, value, indent=None):
    """Write JSON as `replace_file` does. Raises ValueError on NaN or infinity."""
    replace_file(path, json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n")


def shown(name):
    """A name from a file as an error message shows it: on one line, and not for ever."""
    name = name if isinstance(name, str) and name.isprintable() and name else ascii(name)
    return name if len(name) <= 80 else name[:77] + "..."


def nearest(name, known):
    """ "; did you mean ...?" where one of the known names is near."""
    near = difflib.get_close_matches(str(name), known, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


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
    """argparse with _ or - in flags, whose errors are one line with the closest one; code 2."""

    def __init__(self, **options):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=100)
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in args]
        return super().parse_known_args(args, namespace)

    def error(self, message):
        groups = [a.choices.values() for a in self._actions if isinstance(a.choices, dict)]
        parsers = [self, *(parser for group in groups for parser in group)]
        known = re.findall(r"[\w-]+", message.partition("choose from")[2])
        known = known or [flag for parser in parsers for flag in parser._option_string_actions]
        wrong = re.search(r"(?:arguments|choice): '?([^ '=]+)", message)
        hint = nearest(wrong[1], known) if wrong else ""
        print(f"error: {message}{hint} (see --help)", file=sys.stderr)
        sys.exit(2)
