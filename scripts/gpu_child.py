"""Run a Python program that ends when whoever started it ends, however that was.

    python scripts/gpu_child.py -m alchemist.server …

A part of the suite may be killed at the end of its time; a server that outlived it would keep its GPU memory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    # Kept across exec; the server's own children end with it in the same way.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
