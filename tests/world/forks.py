"""Runs the script without the second that its imports take: a process that has made them forks for
each run. The script itself is read anew, and runs as `__main__` in a process of its own.

    forks.run(arguments, environment, code) -> exit code, standard output, standard error
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "retention_purge.py"
SECONDS = 180  # that a run may take


@cache
def compiled(source: str) -> types.CodeType:
    """The script, compiled once for all runs of the same text."""
    return compile(source, str(SCRIPT), "exec")


def child(request: dict[str, Any], streams: list[int]) -> int:
    """What a new Python would do with the script, or with `code`; its exit code."""
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
    for signum in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [str(SCRIPT), *request["arguments"]]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = str(SCRIPT)
    code = 0
    try:
        exec(compiled(request["code"]), module.__dict__)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve(channel: socket.socket) -> None:
    """Fork for each request, one after the other. Runs in a process without threads."""
    import boto3
    import botocore.parsers  # noqa: F401
    import click  # noqa: F401
    import pymysql  # noqa: F401
    from botocore.loaders import JSONFileLoader

    # botocore's models of the services are read once, as they are in one session.
    load = cache(partial(JSONFileLoader.load_file, JSONFileLoader()))
    JSONFileLoader.load_file = lambda _, path: load(path)  # type: ignore[method-assign]
    for service in ("s3", "rds"):
        boto3.Session("key", "secret", region_name="eu-west-1").client(service)
    while True:
        head, streams, _, _ = socket.recv_fds(channel, 8, 2)
        if not head:
            return
        data = b""
        while len(data) < int(head):
            data += channel.recv(int(head) - len(data))
        request = json.loads(data)
        request["code"] = request["code"] or SCRIPT.read_text()
        with suppress(SyntaxError):  # the child will say so
            compiled(request["code"])
        pid = os.fork()
        if pid == 0:
            os._exit(child(request, streams))
        for stream in streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        channel.sendall(f"{code:8}".encode())


@cache
def server() -> socket.socket:
    """The process that forks, started once for each worker of the tests."""
    ours, theirs = socket.socketpair()
    command = ["setpriv", "--pdeathsig=KILL", sys.executable, __file__, str(theirs.fileno())]
    subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    ours.settimeout(SECONDS)
    return ours


def run(arguments: list[str], environment: dict[str, str], code: str) -> tuple[int, str, str]:
    request = {"arguments": arguments, "environment": environment, "code": code}
    data, channel = json.dumps(request).encode(), server()
    with TemporaryFile() as out, TemporaryFile() as err:
        socket.send_fds(channel, [f"{len(data):8}".encode()], [out.fileno(), err.fileno()])
        channel.sendall(data)
        ended = int(channel.recv(8))
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return ended, *texts


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
