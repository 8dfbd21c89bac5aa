"""What other processes do in the GPU tests: each opens handles as a trainer does. Imported by a fork server that never
touches the GPU itself, so that a hundred of them cost no more than their CUDA contexts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec
import torch

from alchemist.protocol.errors import ProtocolError
from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Importer

Handles = dict[str, TensorHandle]


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Peer:
    """A process that opens `handles` and does `what`: a function of this module."""

    def __init__(self, what: str, handles: Handles) -> None:
        context = _context()
        self._ours, theirs = context.Pipe()
        arguments = (what, msgspec.msgpack.encode(handles), theirs)
        self.process: BaseProcess = context.Process(target=_run, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def answer(self, timeout: float = 60.0) -> Any:
        assert self._ours.poll(timeout), "the peer does not answer"
        return self._ours.recv()

    def tell(self, word: str) -> None:
        self._ours.send(word)

    def end(self) -> None:
        """Wait until it is gone."""
        self.process.join(30)
        assert self.process.exitcode == 0
        self._ours.close()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(30)
        self._ours.close()


def _run(what: str, handles: bytes, pipe: Connection) -> None:
    decoded = msgspec.msgpack.decode(handles, type=Handles)
    try:
        globals()[what](decoded, pipe)
    except ProtocolError as error:
        pipe.send(f"{type(error).__name__}: {error}")


def read_and_write(handles: Handles, pipe: Connection) -> None:
    """Answer every tensor's values as float64, then add one to each."""
    importer = Importer()
    tensors = {name: importer.open(handle) for name, handle in handles.items()}
    pipe.send({name: (tuple(t.stride()), t.double().tolist()) for name, t in tensors.items()})
    for tensor in tensors.values():
        tensor += 1
    torch.cuda.synchronize()
    pipe.send(len(importer._allocations))
    importer.close()


def stay(handles: Handles, pipe: Connection) -> None:
    """Open everything, read one element of each, say so, and stay until told to go; then unmap."""
    importer = Importer()
    tensors = [importer.open(handle) for handle in handles.values()]
    pipe.send([float(t.flatten()[0]) for t in tensors])
    pipe.recv()
    del tensors
    importer.close()


def read_for_ever(handles: Handles, pipe: Connection) -> None:
    """Keep the GPU busy with reading, until killed."""
    importer = Importer()
    tensors = [importer.open(handle) for handle in handles.values()]
    pipe.send("reading")
    while True:
        for tensor in tensors:
            tensor.float().sum()
        torch.cuda.synchronize()


def open_again_and_again(handles: Handles, pipe: Connection) -> None:
    """Open and unmap everything twenty times; answer what the device has used after the second and the last time."""
    used = []
    for _ in range(20):
        importer = Importer()
        tensors = [importer.open(handle) for handle in handles.values()]
        first = float(tensors[0].flatten()[0])
        del tensors
        importer.close()
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)
    pipe.send((first, used[1], used[-1]))


def own(handles: Handles, pipe: Connection) -> None:
    """Share a tensor of its own, answer its handle, and stay until told to go."""
    from alchemist.protocol.tensors import share

    shared = share("own", {"t": torch.arange(8.0, device="cuda")})
    pipe.send(msgspec.msgpack.encode(shared.handles))
    pipe.recv()
