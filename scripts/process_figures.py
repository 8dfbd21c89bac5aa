"""What the processes of a server hold, and whether they work: files, memory, processor time. Linux only."""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_SHARED = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (\S+) (\d+) +(/memfd:|/dev/shm/)", re.MULTILINE
)


QUIET_S = 0.25
QUIET_SHARE = 0.2
"""Of one core: what servers take that have nothing to do is a tenth of it, what one takes that copies is five times as
much.
"""


class Held(NamedTuple):
    """By one process, at one moment."""

    fds: int
    own_bytes: int
    """resident anonymous memory"""
    threads: int


class Sample(NamedTuple):
    """Of all processes of a server."""

    at_s: float
    held: dict[str, Held]
    """main, scheduler, detokenizer, trainer → what it holds"""
    shared_bytes: int
    """of memfds and files in /dev/shm that any of them maps, each once"""
    shm_files: frozenset[str]
    """paths of those in /dev/shm"""


def sample(main_pid: int, trainer_pid: int | None, at_s: float) -> Sample:
    """Processes that live for a moment only, and multiprocessing's resource tracker, are left out."""
    held: dict[str, Held] = {}
    maps: list[str] = []
    for pid, role in _roles(main_pid, trainer_pid).items():
        # It may end between two looks.
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            fds = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
            maps.append(Path(f"/proc/{pid}/maps").read_text())
            held[role] = Held(fds, _field(status, "RssAnon") << 10, _field(status, "Threads"))
    return Sample(at_s, held, shared_bytes(maps), shm_files(maps))


def wait_quiet(pid: int, patience_s: float = 60.0) -> None:
    """Wait until a process and what it has started do next to nothing.

    Raises:
        TimeoutError: they go on.
    """
    deadline = time.monotonic() + patience_s
    used_s = _processor_s(pid)
    while time.monotonic() < deadline:
        time.sleep(QUIET_S)
        before_s, used_s = used_s, _processor_s(pid)
        if used_s - before_s < QUIET_SHARE * QUIET_S:
            return
    raise TimeoutError(f"process {pid} and its children were busy for {patience_s:.0f} s")


def _processor_s(pid: int) -> float:
    main = psutil.Process(pid)
    total = 0.0
    for process in (main, *main.children(recursive=True)):
        # It may end between two looks.
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _roles(main_pid: int, trainer_pid: int | None) -> dict[int, str]:
    out = {main_pid: "main"}
    for child in psutil.Process(main_pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(child.cmdline())
            if child.pid == trainer_pid:
                out[child.pid] = "trainer"
            elif "sglang::" in words:
                out[child.pid] = words.partition("sglang::")[2].split()[0].partition("_")[0]
    return out


def _field(status: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    assert match, f"/proc/PID/status has no {name}"
    return int(match[1])


def shared_bytes(maps: Iterable[str]) -> int:
    """Bytes of shared memory in texts of /proc/PID/maps; a segment that several map counts once, at its largest."""
    ends: dict[tuple[str, str], int] = {}
    for text in maps:
        for low, high, offset, device, inode, _ in _SHARED.findall(text):
            end = int(offset, 16) + int(high, 16) - int(low, 16)
            ends[device, inode] = max(end, ends.get((device, inode), 0))
    return sum(ends.values())


def shm_files(maps: Iterable[str]) -> frozenset[str]:
    """Paths in /dev/shm in texts of /proc/PID/maps that had not been removed then."""
    lines = (line for text in maps for line in text.splitlines())
    paths = {line.partition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line}
    return frozenset(f"/dev/shm/{path}" for path in paths if not path.endswith(" (deleted)"))


def growth(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Median of the last quarter of the time less median of the second: by role "fds", "own_bytes" and "threads", and
    under "shared" "bytes". The first quarter is when caches fill.

    Raises:
        ValueError: there are fewer than eight samples.
    """
    if len(samples) < 8:
        raise ValueError(f"{len(samples)} samples; 8 are needed to see growth")
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    roles = set.intersection(*(set(s.held) for s in (*early, *late)))
    out: dict[str, dict[str, float]] = {
        role: {
            field: _median(getattr(s.held[role], field) for s in late)
            - _median(getattr(s.held[role], field) for s in early)
            for field in Held._fields
        }
        for role in sorted(roles)
    }
    out["shared"] = {
        "bytes": _median(s.shared_bytes for s in late) - _median(s.shared_bytes for s in early)
    }
    return out


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def still_alive(started: Mapping[int, float]) -> list[int]:
    """Args:
    started: pid → when that process began, as psutil gives it: a pid may be somebody else's by now.
    """
    out = []
    for pid, began in started.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE:
                out.append(pid)
    return out
