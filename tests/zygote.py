"""Imports the script once and runs it in forked copies, one at a time: a start costs little CPU.

    zygote.py FD

Each order on the socket FD is JSON, [arguments, environment, batch], with the descriptors of
standard output and error; answered by the copy's process id, and by its exit code when it ends
(negative: the signal that killed it). A copy is a process like any other, and the script in it.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import retention_purge as rp


def run(arguments: list[str], environment: dict[str, str], batch: int | None) -> None:
    """The script, as `python retention_purge.py` would run it; does not return."""
    random.seed()
    os.environ.clear()
    os.environ.update(environment)
    if batch:
        rp.BATCH = rp.ROWS_A_COMMIT = batch
    code = 1
    try:
        rp.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    while True:
        order, descriptors, _, _ = socket.recv_fds(link, 1 << 20, 2)
        if not order:
            return
        pid = os.fork()
        if not pid:
            link.close()
            os.dup2(descriptors[0], 1)
            os.dup2(descriptors[1], 2)
            run(*json.loads(order))
        for descriptor in descriptors:
            os.close(descriptor)
        link.send(str(pid).encode())
        link.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


if __name__ == "__main__":
    main()
