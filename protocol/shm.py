"""Anonymous shared memory: a segment is a sealed memfd, opened by others through its owner's /proc entry.

There is no name in any file system, so nothing can be left behind: the kernel frees a segment when the last
process that maps it is gone, however it went. The size limit of /dev/shm does not apply. Only processes of the
same user can open it. Ownership: the creator keeps the descriptor open for as long as others may attach.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import msgspec
import psutil

from alchemist.protocol.cuda import CudaHandle
from alchemist.protocol.errors import PeerGoneError


class SegmentHandle(msgspec.Struct, frozen=True, kw_only=True, tag="memfd"):
    """What a peer needs to attach: small, serialisable, valid while the owner lives."""

    pid: int
    """Owner's process id."""
    birth: float
    """Owner's creation time in seconds since the epoch; tells a recycled pid from the owner."""
    fd: int
    nbytes: int


class TensorHandle(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor at `offset` bytes of a segment of host memory, or of a device allocation."""

    segment: SegmentHandle | CudaHandle
    offset: int
    shape: list[int]
    dtype: str
    stride: list[int] | None = None
    """In elements; None: contiguous."""


class Segment:
    """`nbytes` of zeroed shared memory, mapped readable and writable."""

    def __init__(self, handle: SegmentHandle, mapping: mmap.mmap) -> None:
        self.handle = handle
        self.mapping = mapping


def create(name: str, nbytes: int, *, populate: bool = False) -> Segment:
    """Make a segment of `nbytes` (rounded up to a page).

    Args:
        name: label shown in /proc/<pid>/maps, not an address.
        populate: touch every page now, so that no later write pays for it (and so that
            a machine without the memory says so now).
    """
    nbytes = max(mmap.PAGESIZE, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    fd = os.memfd_create(f"alchemist-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    # A peer must not be able to shrink the file under our mapping (SIGBUS).
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
    mapping = mmap.mmap(fd, nbytes, flags=flags)
    pid = os.getpid()
    handle = SegmentHandle(pid=pid, birth=psutil.Process().create_time(), fd=fd, nbytes=nbytes)
    return Segment(handle, mapping)


def attach(handle: SegmentHandle) -> Segment:
    """Map a peer's segment.

    Raises:
        PeerGoneError: the owner has ended (or its pid now belongs to another process).
    """
    try:
        if abs(psutil.Process(handle.pid).create_time() - handle.birth) > 1.0:
            raise PeerGoneError(f"process {handle.pid} is not the one that made the segment")
        fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
    except (psutil.NoSuchProcess, FileNotFoundError) as error:
        raise PeerGoneError(
            f"the owner of a shared segment, process {handle.pid}, is gone"
        ) from error
    try:
        if os.fstat(fd).st_size != handle.nbytes:
            raise PeerGoneError(f"segment {handle.fd} of process {handle.pid} changed its size")
        return Segment(handle, mmap.mmap(fd, handle.nbytes, flags=mmap.MAP_SHARED))
    finally:
        os.close(fd)
