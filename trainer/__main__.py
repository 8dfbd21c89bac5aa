"""`python -m alchemist.trainer ADDRESS`: started by the server, never by hand."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

from alchemist.trainer.worker import run

_PR_SET_PDEATHSIG = 1


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m alchemist.trainer ADDRESS (the server starts it)")
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s trainer] %(message)s")
    # However the server ends, we end.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The server's process group gets the terminal's Ctrl-C; it tells us when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # On a machine whose processor also serves, serving goes first even before the lease says so.
    os.nice(10)
    run(sys.argv[1])


if __name__ == "__main__":
    main()
