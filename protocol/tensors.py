"""Tensors that several processes share.

A tensor never travels in a message, its handle does. The producer keeps the memory; a consumer's tensor is a view
of the same physical pages. On the host a segment is a memfd (`shm.py`), on a GPU an allocation (`cuda.py`); a handle
knows which, and nobody else has to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alchemist.protocol import cuda, shm
from alchemist.protocol.cuda import CudaHandle
from alchemist.protocol.errors import SharingError
from alchemist.protocol.layout import DTYPE_BYTES
from alchemist.protocol.shm import SegmentHandle, TensorHandle

_ALIGN = 64
_DTYPES = {**DTYPE_BYTES, "int64": 8, "int32": 4, "uint8": 1}
_PORTABLE = 1
"""cudaHostRegisterPortable."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Arena:
    """One segment that several tensors are cut from; sizes are declared first, then memory is taken once."""

    def __init__(
        self,
        name: str,
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        populate: bool = False,
    ) -> None:
        """Args:
        specs: tensor name → (shape, dtype).
        populate: touch the pages now.
        """
        offsets: dict[str, int] = {}
        total = 0
        for key, (shape, dtype) in specs.items():
            offsets[key] = total
            size = math.prod(shape) * _DTYPES[dtype_name(dtype)]
            total += -(-size // _ALIGN) * _ALIGN
        self.segment = shm.create(name, total, populate=populate)
        self.handles = {
            key: TensorHandle(
                segment=self.segment.handle,
                offset=offsets[key],
                shape=list(shape),
                dtype=dtype_name(dtype),
            )
            for key, (shape, dtype) in specs.items()
        }
        self.tensors = {key: _view(self.segment, handle) for key, handle in self.handles.items()}

    def pin(self) -> None:
        """Page-lock it for as long as this process lives. Raises SharingError: the system does not lock so much."""
        _pin(self.segment)


class DeviceExport:
    """Tensors on a GPU, shared where they are. Holds them, so that their memory is not freed under a peer."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises:
        SharingError: a tensor's memory cannot be shared, and why.
        """
        self.tensors = dict(tensors)
        self.handles: dict[str, TensorHandle] = {}
        segments: dict[bytes, CudaHandle] = {}
        for key, tensor in self.tensors.items():
            with torch.cuda.device(tensor.device):
                _make_current(tensor.device)
                segment, offset = cuda.export(tensor.data_ptr(), device_uuid(tensor.device))
            self.handles[key] = TensorHandle(
                # Tensors of one allocation have one handle.
                segment=segments.setdefault(segment.handle, segment),
                offset=offset,
                shape=list(tensor.shape),
                dtype=dtype_name(tensor.dtype),
                stride=list(tensor.stride()),
            )


def share(
    name: str, tensors: Mapping[str, Tensor], *, are_zero: bool = False
) -> Arena | DeviceExport:
    """Make tensors, all of one device, readable by other processes: `handles` names them, `tensors` are to be used
    instead of those given. On a GPU they are the same ones; on the host they have moved into one segment.

    Args:
        are_zero: they hold nothing but zeros, on the host all of whose pages are to be touched now.

    Raises:
        SharingError: see `cuda.export`.
    """
    if all(tensor.is_cuda for tensor in tensors.values()):
        return DeviceExport(tensors)
    specs = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
    arena = Arena(name, specs, populate=are_zero)
    if not are_zero:
        for key, tensor in tensors.items():
            arena.tensors[key].copy_(tensor)
    return arena


class Importer:
    """Opens peers' tensors; each segment and each allocation is mapped once."""

    def __init__(self) -> None:
        self._segments: dict[tuple[int, int], shm.Segment] = {}
        self._allocations: dict[bytes, tuple[cuda.Mapping, Tensor]] = {}
        self._pinned: list[shm.Segment] = []

    def open(self, handle: TensorHandle) -> Tensor:
        """Raises:
        PeerGoneError: the owner has ended.
        SharingError: its GPU is not one of ours, or its memory cannot be mapped.
        """
        if isinstance(handle.segment, CudaHandle):
            return _device_view(self._allocation(handle.segment), handle)
        return _view(self._segment(handle.segment), handle)

    def pin(self, handle: TensorHandle) -> None:
        """Page-lock a host tensor's segment, so that copies between it and a GPU run beside everything else.

        Raises:
            SharingError: the system does not lock so much.
        """
        assert isinstance(handle.segment, SegmentHandle)
        segment = self._segment(handle.segment)
        if segment not in self._pinned:
            _pin(segment)
            self._pinned.append(segment)

    def close(self) -> None:
        """Unmap what is on GPUs, and unlock what was locked. No tensor that was opened on a GPU may be used any more.
        A process that ends need not call it.
        """
        if self._allocations or self._pinned:
            torch.cuda.synchronize()
        for segment in self._pinned:
            _runtime().cudaHostUnregister(_host_bytes(segment).data_ptr())
        for mapping, _ in self._allocations.values():
            mapping.close()
        self._pinned.clear()
        self._allocations.clear()

    def _segment(self, handle: SegmentHandle) -> shm.Segment:
        key = (handle.pid, handle.fd)
        segment = self._segments.get(key)
        if segment is None:
            segment = self._segments[key] = shm.attach(handle)
        return segment

    def _allocation(self, segment: CudaHandle) -> Tensor:
        """All of it, uint8 [nbytes]."""
        found = self._allocations.get(segment.handle)
        if found is None:
            device = device_of(segment.device)
            with torch.cuda.device(device):
                _make_current(device)
                mapping = cuda.Mapping(segment)
                found = mapping, torch.as_tensor(_Bytes(mapping), device=device)
            self._allocations[segment.handle] = found
        return found[1]


class _Bytes:
    """Device memory in the words of the CUDA array interface, version 3: what torch can make a tensor of."""

    def __init__(self, mapping: cuda.Mapping) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (mapping.handle.nbytes,),
            "typestr": "|u1",
            "data": (mapping.address, False),
            "strides": None,
            "version": 3,
        }


def _make_current(device: torch.device) -> None:
    """The driver's own calls work in this thread's CUDA context, which torch makes with its first work in it."""
    torch.empty(1, device=device)
    torch.cuda.synchronize(device)


def device_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def device_of(uuid: str) -> torch.device:
    """This process's name of a GPU.

    Raises:
        SharingError: it is not visible here.
    """
    seen = [device_uuid(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise SharingError(
            f"the server's GPU {uuid} is not visible to the trainer, which sees {', '.join(seen) or 'none'}; "
            "CUDA_VISIBLE_DEVICES must be the same for both"
        )
    return torch.device("cuda", seen.index(uuid))


def _pin(segment: shm.Segment) -> None:
    memory = _host_bytes(segment)
    status = int(_runtime().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE))
    if status:
        raise SharingError(
            f"cudaHostRegister of {memory.numel()} bytes of host memory failed with error {status}; "
            "ask for fewer with --activation-host-gb"
        )


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _host_bytes(segment: shm.Segment) -> Tensor:
    return torch.frombuffer(segment.mapping, dtype=torch.uint8)


def _device_view(memory: Tensor, handle: TensorHandle) -> Tensor:
    dtype = getattr(torch, handle.dtype)
    shape = handle.shape
    stride = handle.stride or _contiguous(shape)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=memory.device)
    count = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    part = memory[handle.offset : handle.offset + count * dtype.itemsize]
    return part.view(dtype).as_strided(shape, stride)


def _contiguous(shape: list[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _view(segment: shm.Segment, handle: TensorHandle) -> Tensor:
    count = math.prod(handle.shape)
    dtype = getattr(torch, handle.dtype)
    if count == 0:
        return torch.empty(handle.shape, dtype=dtype)
    flat = torch.frombuffer(segment.mapping, dtype=dtype, count=count, offset=handle.offset)
    return flat.view(handle.shape)
