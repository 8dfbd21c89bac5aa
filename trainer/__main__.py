"""`python -m alchemist.trainer ADDRESS SERVER_PID`: started by the server, never by hand."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m alchemist.trainer ADDRESS SERVER_PID (the server starts it)")
    address, server_pid = sys.argv[1], int(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s trainer] %(message)s")
    # However the server ends, we end.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server_pid:
        sys.exit("the server was gone before its trainer began")
    # A terminal's Ctrl-C and a service manager's stop reach the whole group; the server tells us when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # On a machine whose processor also serves, serving goes first even before the lease says so.
    os.nice(10)
    # It takes seconds to import, in which the server may die.
    from alchemist.trainer.worker import run

    run(address, server_pid)


if __name__ == "__main__":
    main()
