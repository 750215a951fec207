"""A Python whose packages are loaded, for trainers: torch and timm take them six seconds of a core,
a fork takes none.

python warm.py SCRIPT WORDS... runs a script in a process forked from the server whose socket is
$WARM. This one hands on the stop signals that it gets and ends as the other ends; the other is
killed with it. `python warm.py --serve` is the server, until its standard input ends.
"""

import contextlib
import importlib
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path


def serve():
    """Fork for each client. A fork that is to run a script returns the words of its command."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    for package in ("timm", "torch._dynamo", "train"):  # an optimizer loads the second
        importlib.import_module(package)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the attendants
    address = os.environ["WARM"]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address + ".new")
    listener.listen()
    os.rename(address + ".new", address)

    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return attend(client)
        client.close()
    return None


def attend(client):
    """Fork once more: the one returns the words of the client's command, the other waits for it and
    tells the client how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, files, *_ = socket.recv_fds(client, 2**18, 3)
    pid = os.fork()
    if pid == 0:
        client.close()
        return take_over(json.loads(text), files)

    ended = os.pidfd_open(pid)
    while ended not in select.select([client, ended], [], [])[0]:
        os.kill(pid, int(client.recv(9) or signal.SIGKILL))  # nothing: the client is gone
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        client.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def take_over(command, files):
    """Be the process that the client stands for; returns the words of its command."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", number) for number in (1, 2))
    os.chdir(command["folder"])
    multiprocessing.process.ORIGINAL_DIR = command["folder"]  # in which loaders find the script
    os.environ.clear()
    os.environ.update(command["environment"])
    return command["words"]


def ask():
    """Have the server run the command of this process; returns its exit code, below 0 a signal."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(os.environ["WARM"])
    command = {"words": sys.argv[1:], "folder": os.getcwd(), "environment": {**os.environ}}
    socket.send_fds(server, [json.dumps(command).encode()], [0, 1, 2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: server.send(str(int(number)).encode()))
    return int(server.recv(9))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        words = serve()
        if words:
            sys.argv = words
            sys.path[1] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    else:
        code = ask()
        if code < 0:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        sys.exit(code)
