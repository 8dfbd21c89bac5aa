"""`python -m alchemist.trainer ADDRESS SERVER_PID LEASE_POLICY`: started by the server, never by hand."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_BELOW_NORMAL = "1"


def _stand_back(lease_policy: str) -> None:
    """Where the processor also serves, serving goes first even before the lease says so.

    The lowest class, not only a nice value: two OpenMP teams on the same cores wait for each other at every barrier;
    under `SCHED_IDLE` the server's threads push the trainer's aside at once. Threads started later inherit it. Where
    the trainer may run beside requests it has cores to itself while the server decodes (`protocol/cores.py`). Under
    policy none it has no lower priority, which is to show what the lease and all of this are good for.
    """
    if lease_policy == "none":
        return
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(
            "usage: python -m alchemist.trainer ADDRESS SERVER_PID LEASE_POLICY (the server starts it)"
        )
    address, server_pid, lease_policy = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s trainer] %(message)s")
    # However the server ends, we end.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server_pid:
        sys.exit("the server was gone before its trainer began")
    # A terminal's Ctrl-C and a service manager's stop reach the whole group; the server tells us when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _stand_back(lease_policy)
    # Under NVIDIA's Multi-Process Service serving's kernels go first; without one it means nothing. CUDA reads it when
    # it starts, which whatever imports torch may make it do: before that.
    os.environ.setdefault("CUDA_MPS_CLIENT_PRIORITY", _BELOW_NORMAL)
    # It takes seconds to import, in which the server may die.
    from alchemist.trainer.worker import run

    run(address, server_pid)


if __name__ == "__main__":
    main()
