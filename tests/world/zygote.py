"""The script with other constants, and started from a process that has imported it already.

    zygote.py --run PATCHES [ARGUMENT ...]
    zygote.py FD

PATCHES is a JSON object: the script's constants by name, such as {"BATCH": 4, "DELETE_TIMEOUT": 2},
and SIGN, [share, seconds]: to sign such a share of the deletes takes so long, as it does when AWS
credentials must be refreshed first.

With FD the script runs in forked copies, one at a time: a start costs little CPU. Each order on
that socket is JSON, [arguments, environment, patches], with the descriptors of standard output and
error; answered by the copy's process id, and by its exit code when it ends (negative: the signal
that killed it). A copy is a process like any other, and the script in it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from botocore.signers import RequestSigner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import retention_purge as rp


def patch(patches: dict[str, Any]) -> None:
    # Whoever started this may ignore SIGHUP (nohup) or SIGINT (a shell's &); the script would, too.
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    for name, value in patches.items():
        if name == "SIGN":
            sign_slowly(*value)
        elif hasattr(rp, name):
            setattr(rp, name, value)
        else:
            raise SystemExit(f"The script has no constant {name}.")


def sign_slowly(share: float, seconds: float) -> None:
    sign = RequestSigner.sign

    def slow(self: Any, operation: str, *arguments: Any, **named: Any) -> Any:
        if operation.startswith("Delete") and random.random() < share:
            time.sleep(seconds)
        return sign(self, operation, *arguments, **named)

    RequestSigner.sign = slow  # type: ignore[method-assign]


def run(arguments: list[str], environment: dict[str, str], patches: dict[str, Any]) -> None:
    """The script, as `python retention_purge.py` would run it; does not return."""
    random.seed()
    os.environ.clear()
    os.environ.update(environment)
    code = 1
    try:
        patch(patches)
        rp.main(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    if sys.argv[1] == "--run":
        patch(json.loads(sys.argv[2]))
        rp.main(sys.argv[3:], "retention_purge.py")
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
