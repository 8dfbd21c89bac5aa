"""Tensors in shared memory: the only file of this package that imports torch.

A tensor never travels in a message, its handle does. The producer keeps the segment; a consumer's tensor is a view
of the same physical pages and keeps the mapping alive by itself.
"""

from __future__ import annotations

import math

import torch

from alchemist.protocol import shm
from alchemist.protocol.layout import DTYPE_BYTES
from alchemist.protocol.shm import TensorHandle

_ALIGN = 64
_DTYPES = {**DTYPE_BYTES, "int64": 8, "int32": 4, "uint8": 1}


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


class Importer:
    """Opens peers' tensors; each segment is mapped once."""

    def __init__(self) -> None:
        self._segments: dict[tuple[int, int], shm.Segment] = {}

    def open(self, handle: TensorHandle) -> torch.Tensor:
        """Raises:
        PeerGoneError: the owner has ended.
        """
        key = (handle.segment.pid, handle.segment.fd)
        segment = self._segments.get(key)
        if segment is None:
            segment = self._segments[key] = shm.attach(handle.segment)
        return _view(segment, handle)


def _view(segment: shm.Segment, handle: TensorHandle) -> torch.Tensor:
    count = math.prod(handle.shape)
    dtype = getattr(torch, handle.dtype)
    if count == 0:
        return torch.empty(handle.shape, dtype=dtype)
    flat = torch.frombuffer(segment.mapping, dtype=dtype, count=count, offset=handle.offset)
    return flat.view(handle.shape)
