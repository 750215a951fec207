"""What does a file promise? One exception, bounded reading of text and JSON, writing whole or not
at all, locks, and a command line whose errors are one line."""

import argparse
import contextlib
import difflib
import fcntl
import json
import os
import re
import shutil
import sys
from pathlib import Path

MAX_LABEL_BYTES = 2**27  # of what is read from files, so that a hostile one ends in an error
MAX_NODES = 2**23  # lists and objects in a JSON file


class DataError(ValueError):
    """Something about the user's data: the message says what, where and the remedy."""


def read_text(path, limit=MAX_LABEL_BYTES, encoding="utf-8-sig", other=None):
    """A text file of at most `limit` bytes, in UTF-8 or else `other`. Raises DataError."""
    try:
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file")
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise DataError(f"{path}: larger than {limit >> 20} MiB; split it into several files")
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(encoding)
        return raw.decode(other or encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8 ({error.reason}); save it as such") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def unique_keys(pairs):
    """The object of a JSON object's pairs. Raises DataError on a key that comes twice."""
    value, seen = dict(pairs), set()
    if len(value) < len(pairs):
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DataError(f"key {shown(twice)} comes twice in one object")
    return value


def parse_json(text, where):
    """The value of a JSON text. Raises DataError, also on a key twice in an object."""
    if text.count("[") + text.count("{") > MAX_NODES:
        raise DataError(f"{where}: more than {MAX_NODES} lists and objects; split it")
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise DataError(f"{where}: not a JSON file of ours (nested too deep)") from None
    except ValueError as error:
        raise DataError(f"{where}: not a JSON file ({error})") from None


def read_json(path):
    """The value of a JSON file. Raises DataError."""
    return parse_json(read_text(path), path)


def replace_file(path, content):
    """Write bytes whole or not at all: temporary name, fsync, rename; the old file survives."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file whole or not at all, making its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def write_json(path, value, indent=None):
    """Write JSON whole or not at all. Raises ValueError on NaN or infinity."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def new_folder(out):
    """A folder to fill, which becomes `out` at the end, whole or not at all. Raises DataError if
    there is something in `out`."""
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists; choose another folder or remove it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def shown(name):
    """A name from a file as an error message shows it: on one line, and not for ever."""
    name = name if isinstance(name, str) and name.isprintable() and name else ascii(name)
    return name if len(name) <= 80 else name[:77] + "..."


def lock(path):
    """An exclusive lock on a file; None when another process holds it."""
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the closest flag or choice; exit code 2."""

    def __init__(self, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message):
        wrong, known = message.removeprefix("unrecognized arguments: "), []
        if wrong != message:
            parsers = [self]
            for action in self._actions:  # data.py's commands
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
            known = [flag for parser in parsers for flag in parser._option_string_actions]
        if choice := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            wrong, known = choice[1], re.findall(r"[\w-]+", choice[2])
        near = difflib.get_close_matches(re.split("[= ]", wrong)[0], known, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: {message}{hint} (see --help)", file=sys.stderr)
        sys.exit(2)
