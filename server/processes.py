"""SGLang's subprocess entry points, and how our processes end.

SGLang spawns fresh interpreters; what they unpickle first is one of these functions, so `cpu.prepare()` has run when
SGLang is imported there.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import threading
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from alchemist.server import cpu

_PR_SET_PDEATHSIG = 1
_FILES = "files"
_END_TIMEOUT_S = 10.0


def run_scheduler(server_args: Any, port_args: Any, *args: Any, **kwargs: Any) -> None:
    _begin()
    # Of its default lock a killed process leaves a named semaphore behind.
    tqdm.set_lock(threading.RLock())
    from sglang.srt.managers.load_snapshot import shm_path_for

    cpu.ignore_pin_memory()
    cpu.keep_freed_memory()
    from sglang.srt.managers.scheduler import run_scheduler_process

    from alchemist.server import run

    this_run = run.current()
    if this_run is not None:
        # SGLang never removes this file; whoever removes the run does.
        note_file(this_run.directory, shm_path_for(port_args.instance_id))
    run_scheduler_process(server_args, port_args, *args, **kwargs)


def run_detokenizer(*args: Any, **kwargs: Any) -> None:
    _begin()
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    run_detokenizer_process(*args, **kwargs)


def _begin() -> None:
    # A terminal's Ctrl-C and a service manager's stop reach the whole group; requests in flight need us to go on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        # It died before the line above.
        os._exit(1)


def end_children(timeout: float = _END_TIMEOUT_S) -> None:
    """Kill every process below this one and wait up to `timeout` seconds until they are gone.

    multiprocessing's resource tracker is left: it ends by itself after this process, and removes the named
    semaphores that the killed ones could not.
    """
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    children = [c for c in psutil.Process().children(recursive=True) if c.pid != tracker]
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout)


def note_file(directory: str, path: str) -> None:
    """Remember a file outside the run directory that is to go with it."""
    with (Path(directory) / _FILES).open("a") as file:
        file.write(path + "\n")


def remove_run(directory: str | os.PathLike[str]) -> None:
    """Remove a run directory and the files noted in it. Idempotent, never raises."""
    try:
        noted = (Path(directory) / _FILES).read_text().split()
    except OSError:
        noted = []
    for path in noted:
        try:
            os.unlink(path)
        except OSError:
            continue
    shutil.rmtree(directory, ignore_errors=True)
