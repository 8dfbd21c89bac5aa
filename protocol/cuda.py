"""Device memory between processes: legacy CUDA IPC handles, as plain bytes and integers. No torch, no pickle.

The driver's own calls (libcuda, by ctypes), not `UntypedStorage._share_cuda_`, for three reasons. torch's handle is for
one receiver, once: it comes with a reference counter in a file of /dev/shm and an event, which a second trainer would
count down again and a killed one leaves behind. It counts storages; what is mapped are whole allocations, and hundreds
of parameters lie in a few of them. And libcuda has a stable name and interface, where libcudart has one per version.

    owner                                   peer
    export(address) ── CudaHandle ─────────► Mapping(handle), once per allocation
                                             Mapping.close(), or the process ends

A handle names a whole allocation, valid while it is not freed: whoever exports keeps its tensors for as long as peers
may come. A peer that dies, however, takes nothing with it: the driver unmaps what it had. A peer must not outlive the
owner's allocation; ours ends when its server does.

No event travels: what a peer is told of was complete on the device before it was told (see `server.arrivals`), and a
message between two processes orders the rest.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import msgspec
import psutil

from alchemist.protocol.errors import PeerGoneError, SharingError

HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1
LEGACY_CUDA_IPC_CAPABLE = 10
"""Pointer attribute: whether the allocation can be exported in this way."""

_ALLOC_CONF = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class _IpcMemHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


_DevicePointer = ctypes.c_uint64
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuMemGetAddressRange_v2": (
        ctypes.POINTER(_DevicePointer),
        ctypes.POINTER(ctypes.c_size_t),
        _DevicePointer,
    ),
    "cuPointerGetAttribute": (ctypes.c_void_p, ctypes.c_int, _DevicePointer),
    "cuIpcGetMemHandle": (ctypes.POINTER(_IpcMemHandle), _DevicePointer),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_DevicePointer), _IpcMemHandle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_DevicePointer,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}
"""Functions of libcuda and their arguments; each returns a CUresult."""


class CudaHandle(msgspec.Struct, frozen=True, kw_only=True, tag="cuda"):
    """A device allocation of a living process: what a peer needs to map it."""

    pid: int
    """Owner's process id."""
    birth: float
    """Owner's creation time in seconds since the epoch; tells a recycled pid from the owner."""
    device: str
    """UUID of the GPU, as torch and nvidia-smi print it: indices differ between processes."""
    handle: bytes
    """The driver's 64 bytes (`CUipcMemHandle`)."""
    nbytes: int
    """Of the whole allocation."""


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SharingError(f"the CUDA driver's library cannot be loaded: {error}") from None
    for name, arguments in PROTOTYPES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library


def _call(name: str, *arguments: Any, hint: str = "") -> None:
    """Raises SharingError with the driver's words and `hint`."""
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        said = (text.value or b"unknown error").decode()
        raise SharingError(f"{name}: {said} ({status}){hint}")


def require_shareable_allocator(environ: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Refuse torch's settings under which device memory cannot be shared in this way, before any is allocated.

    Raises:
        SharingError: names variable, value and what is allowed.
    """
    for variable in _ALLOC_CONF:
        for setting in environ.get(variable, "").split(","):
            name, _, value = (part.strip() for part in setting.partition(":"))
            if name == "expandable_segments" and value.lower() == "true":
                raise SharingError(
                    f"{variable} has expandable_segments:{value}; allowed: False. Such memory has no CUDA IPC handle, "
                    "and the trainer could not map the server's weights"
                )
            if name == "backend" and value != "native":
                raise SharingError(
                    f"{variable} has backend:{value}; allowed: native. Memory of a CUDA pool has no CUDA IPC handle"
                )


def export(address: int, device: str) -> tuple[CudaHandle, int]:
    """A handle of the allocation that holds device memory at `address`, and the offset of `address` in it, in bytes.

    The calling thread's CUDA context must be the allocation's (after any CUDA work of torch it is).

    Args:
        device: UUID of the GPU.

    Raises:
        SharingError: the memory cannot be shared, and why.
    """
    capable = ctypes.c_int(0)
    _call("cuPointerGetAttribute", ctypes.byref(capable), LEGACY_CUDA_IPC_CAPABLE, address)
    if not capable.value:
        raise SharingError(
            "this GPU memory cannot be shared by CUDA IPC: it is virtual memory of expandable segments "
            "(PYTORCH_CUDA_ALLOC_CONF), of a CUDA memory pool, of --enable-memory-saver, or of a KV pool that is sized "
            "after graph capture (SGLANG_ENABLE_POST_CAPTURE_KV_SIZING); allowed: none of them"
        )
    base, size = _DevicePointer(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    handle = _IpcMemHandle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return (
        CudaHandle(
            pid=os.getpid(),
            birth=psutil.Process().create_time(),
            device=device,
            handle=bytes(handle),
            nbytes=size.value,
        ),
        address - base.value,
    )


class Mapping:
    """A peer's allocation in this process's address space.

    Attributes:
        address: where it begins; 0 once closed.
    """

    def __init__(self, handle: CudaHandle) -> None:
        """The calling thread's CUDA context must be on the handle's GPU.

        Raises:
            PeerGoneError: the owner has ended.
            SharingError: it cannot be mapped, and what may be the reason.
        """
        if len(handle.handle) != HANDLE_BYTES:
            raise SharingError(
                f"a CUDA handle has {len(handle.handle)} bytes; allowed: {HANDLE_BYTES}"
            )
        _require_alive(handle)
        self.handle = handle
        raw, address = _IpcMemHandle.from_buffer_copy(handle.handle), _DevicePointer()
        _call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            raw,
            LAZY_ENABLE_PEER_ACCESS,
            hint=". Server and trainer must run in one container (one IPC and one PID namespace), on a system whose "
            "driver supports CUDA IPC (not WSL)",
        )
        self.address: int = address.value or 0

    def close(self) -> None:
        """Unmap. No tensor over it may be used any more, and no kernel that reads it may still run."""
        address, self.address = self.address, 0
        if address:
            _call("cuIpcCloseMemHandle", address)


def _require_alive(handle: CudaHandle) -> None:
    try:
        is_owner = abs(psutil.Process(handle.pid).create_time() - handle.birth) <= 1.0
    except psutil.NoSuchProcess:
        is_owner = False
    if not is_owner:
        raise PeerGoneError(f"the owner of shared GPU memory, process {handle.pid}, is gone")
