"""What does a file promise? One exception and the exit codes, bounded reading, writing whole or not
at all, and locks. Exit codes of every command: 0 fine; 1 wrong data, or something could not be
written; 2 a wrong command; 3 out of memory; 4 not finite; 5 a gate did not open; 130, 143 stopped;
137 killed."""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from pathlib import Path
from statistics import mode

import yaml

MAX_BYTES = 2**30  # of a text
MAX_NODES = 10**7  # lists and objects of a JSON file
KEPT = "what was written before is whole"
STDOUT = {"-", "/dev/stdout"}  # paths whose content is printed
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # they break a line of text

# ---------------------------------------------------------------- errors


class DataError(ValueError):
    """What is wrong with the user's data, where (file, image, word, key) and a remedy, as one line;
    code: the exit code, if not 1. others: DataErrors found beside it, which are said before it."""

    code = 1
    others = ()

    def __init__(self, where, what="", remedy="", code=None):
        super().__init__(where, what, remedy, code)
        self.code = code or self.code

    def __str__(self):
        where, what, remedy, _ = self.args
        line = f"{where}".strip()
        if what:
            line += f": {what}"
        if remedy:
            line += f"; {remedy}"
        # torch raises an error of a loader process anew, with its traceback in front of the line
        return re.sub(r"(?s)^.*\nfiles\.\w+: ", "", line)


class UsageError(DataError):
    """A flag, a value or what a flag names does not work."""

    code = 2


def print_error(line):
    print(f"error: {line}", file=sys.stderr)


def exit_code(run, say=print_error):
    """Call run() and return its exit code, 0 for None. If it fails for a reason that a user can
    mend, `say` gets a line about it, after one for each of its `others`, and the exit code is the
    failure's. Other errors are bugs: they are raised."""
    with suppress(AttributeError):  # an ASCII terminal lacks letters of names and words
        sys.stdout.reconfigure(errors="replace")
    try:
        return run() or 0
    except DataError as error:
        for other in error.others:
            say(other)
        line = error
        code = error.code
    except OSError as error:
        line = f"{error.filename or 'output'}: {error.strerror or error}; {KEPT}"
        code = 1
    except KeyboardInterrupt:
        line = f"interrupted; {KEPT}"
        code = 130
    except Exception as error:
        # of Python and NumPy, also those of a loader process, of OpenCV, of the CPU's and of CUDA's
        # allocators, of cuDNN
        words = "(?i)memoryerror|(out of|allocate|insufficient) memory|alloc_failed"
        words += "|unable to find an engine"
        if not re.search(words, repr(error)):
            raise
        line = "out of memory; lower --size (and --batch), or use --device cpu"
        code = 3
    say(line)
    return code


def shown(name):
    """A name from a file as an error message shows it: on one line of at most 80 characters."""
    if not isinstance(name, str) or not name or CONTROL.search(name):
        name = ascii(name)
    return name if len(name) <= 80 else f"{name[:77]}..."


def nearest(name, known):
    """A question that ends an error message where one of the known names is near, or ""."""
    matches = get_close_matches(str(name), known, 1)
    return f"; did you mean {matches[0]}?" if matches else ""


# ---------------------------------------------------------------- reading


def read_bytes(path, limit=MAX_BYTES):
    """The content of a file of at most `limit` bytes. Raises DataError, also on a FIFO or device,
    from which a read might never return."""
    if is_stream(path):
        raise DataError(path, "not a regular file")
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from None
    if len(raw) > limit:
        raise DataError(path, f"larger than {limit >> 20} MiB", "split it into several files")
    return raw


def read_text(path, limit=MAX_BYTES, other="utf-8"):
    """A text of at most `limit` bytes, in UTF-8 or else in the encoding `other`. Raises DataError,
    or UsageError where there is no such file."""
    if not os.path.exists(path):
        raise UsageError(path, "no such file")
    raw = read_bytes(path, limit)
    for encoding in ("utf-8-sig", other):
        with suppress(UnicodeDecodeError):
            return raw.decode(encoding)
    raise DataError(path, "not text in UTF-8", "save it as such")


def unique_dict(pairs):
    """A dict of (key, value). Raises ValueError where a key comes twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"key {shown(mode(key for key, _ in pairs))} comes twice in one object")
    return value


def yaml_value(node):
    """The value of a YAML node in version 1.2, where 5e-4 is a number and off a text."""
    if node.id == "mapping":
        return unique_dict([(key.value, yaml_value(value)) for key, value in node.value])
    if node.id == "sequence":
        return [yaml_value(value) for value in node.value]
    if node.style:  # in quotes
        return node.value

    # a plain word: ~ and nothing stand for null, and True for true
    word = node.value.strip("~").lower() or "null"
    for kind in (int, float, json.loads):
        with suppress(ValueError):
            return kind(word)
    return node.value


def read_json(path, text=None):
    """The value of a JSON or YAML file, or of a text from it. Raises DataError."""
    is_yaml = Path(path).suffix in (".yaml", ".yml")
    if text is None:
        text = read_text(path, 2**20 if is_yaml else MAX_BYTES)
    try:
        if text.count("[") + text.count("{") > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} lists and objects")
        # an empty JSON file goes on as YAML, which tells that it is empty
        if not is_yaml and text.strip():
            return json.loads(text, object_pairs_hook=unique_dict)
        if yaml.AliasToken in map(type, yaml.scan(text)):  # a few of them can fill the memory
            raise ValueError("aliases are not read")
        node = yaml.compose(text, yaml.SafeLoader)
        if not node:  # spaces, or comments of YAML
            raise ValueError("it is empty")
        return yaml_value(node)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        what = f"not a {'YAML' if is_yaml else 'JSON'} file ({' '.join(str(error).split())})"
        raise DataError(path, what) from None


# ---------------------------------------------------------------- writing


def is_stream(path):
    """Whether what is written there cannot be replaced as a whole: a FIFO, a device, stdout."""
    return str(path) in STDOUT or (os.path.exists(path) and not os.path.isfile(path))


def replace_file(path, content):
    """Write bytes or text whole or not at all (temporary name, fsync, rename), and the folder. A
    link stays and its target is replaced; a FIFO or device is written into; STDOUT is printed."""
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")  # a path may not be UTF-8
    try:
        if str(path) in STDOUT:
            sys.__stdout__.flush()
            sys.__stdout__.buffer.write(content)
        elif is_stream(path):
            Path(path).write_bytes(content)
        else:
            write_whole(Path(os.path.realpath(path)), content)
    except OSError as error:
        error.filename = str(path)  # and not the temporary one, nor none
        raise


def write_whole(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # the name itself may fill 255 bytes
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(out):
    """A folder to fill that becomes `out`, or the target of that link, whole or not at all. Raises
    UsageError if `out` is a file, or a folder that holds something."""
    out = Path(os.path.realpath(out))
    if (out.exists() and not out.is_dir()) or any(out.glob("*")):
        raise UsageError(out, "exists", "choose another folder")
    # the name of `out` may fill 255 bytes
    partial = out.with_name(f".{out.name[:50]}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, True)


def text_aside(*outputs):
    """A context in which text is printed on stderr if one of the outputs is printed on stdout, so
    that a program which reads stdout gets the output alone."""
    return redirect_stdout(sys.stderr if STDOUT & {*map(str, outputs)} else sys.stdout)


def check_writable(path):
    """Raise the OSError that writing to the path would raise; nothing is made or left behind."""
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists():
        folder = folder.parent
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)  # its name may be too long
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if not is_stream(path):
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b" ")  # a full disk gives a file, and no room in it
    except OSError as error:
        error.filename = str(path)
        raise


def write_json(path, value, indent=None):
    """Write JSON as `replace_file` does. Raises ValueError on NaN or infinity."""
    replace_file(path, json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n")


def guard(outputs, inputs, derived=()):
    """Raise UsageError before an output replaces an input of the same command. `derived` are
    outputs whose names nobody typed, since they follow from other names: these may replace no file
    at all. All are paths, or None."""
    read = {os.path.realpath(path) for path in inputs if path}
    for path in filter(None, (*outputs, *derived)):
        if os.path.realpath(path) in read:
            raise UsageError(path, "is read by this command", "write to another file")
        if path in derived and os.path.exists(path):
            raise UsageError(path, "exists, and no flag names it", "name it by --out, or remove it")


# ---------------------------------------------------------------- locks


def lock(path):
    """An exclusive lock on a file, held while it is open; None when another process has it."""
    file = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


def lock_folder(folder, name, what):
    """Take the lock on the file folder/name and remove temporary files that killed processes left
    in the folder. Returns the locked file. Raises UsageError if another process has the lock;
    `what` says what that process is doing."""
    held = lock(folder / name)
    if not held:
        raise UsageError(folder, what, "wait for it, or stop it")
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return held
