"""`python -m alchemist.trainer ADDRESS SERVER_PID`: started by the server, never by hand."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _stand_back() -> None:
    """Where the processor also serves, serving goes first even before the lease says so.

    The lowest class, not only a nice value: two OpenMP teams on the same cores wait for each other at every barrier;
    under `SCHED_IDLE` the server's threads push the trainer's aside at once. Threads started later inherit it.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)


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
    _stand_back()
    # It takes seconds to import, in which the server may die.
    from alchemist.trainer.worker import run

    run(address, server_pid)


if __name__ == "__main__":
    main()
