"""How much memory there is, and how much is free: of the machine, or of the control groups this process is in, where
that is less. A container's limit is such a group; what goes beyond it is killed, without an error one could catch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class _Names(NamedTuple):
    """What a version of the memory controller calls its files, and where they are."""

    folder: str
    limit: str
    usage: str
    reclaimable: str
    """Line of `memory.stat` with cached files: they count as used, and go when memory is wanted."""


_V1 = _Names("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("", "memory.max", "memory.current", "inactive_file")


class _Group(NamedTuple):
    limit_bytes: int
    free_bytes: int


def physical_memory_bytes(root: Path = Path("/")) -> int:
    """Most that this process could ever have.

    Args:
        root: below it are proc/self/cgroup and sys/fs/cgroup.
    """
    limits = [group.limit_bytes for group in _groups(root)]
    return min([psutil.virtual_memory().total, *limits])


def free_memory_bytes(root: Path = Path("/")) -> int:
    """What this process could have now; see `physical_memory_bytes`."""
    free = [group.free_bytes for group in _groups(root)]
    return max(0, min([psutil.virtual_memory().available, *free]))


def auto_host_bytes(free_bytes: int) -> int:
    """What `--activation-host-gb auto` means at most, with `free_bytes` free."""
    return min(free_bytes // 10, 8 * 2**30)


def _groups(root: Path) -> Iterator[_Group]:
    """This process's memory groups that have a limit, and those around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _V1 if controllers else _V2
        top = root / "sys/fs/cgroup" / names.folder
        # In a container the path may be the host's: then only the top is there, and it is the container's.
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(top) and (group := _read(folder, names)):
                yield group


def _read(folder: Path, names: _Names) -> _Group | None:
    try:
        limit = (folder / names.limit).read_text().strip()
        usage = (folder / names.usage).read_text().strip()
        stat = (folder / "memory.stat").read_text()
    except OSError:
        return None
    if not limit.isdigit():
        return None
    words = stat.split()
    counts = dict(zip(words[::2], words[1::2], strict=False))
    used = int(usage) - int(counts.get(names.reclaimable, 0))
    return _Group(int(limit), int(limit) - used)
