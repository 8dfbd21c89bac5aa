"""Peers of `gpu_ipc.py`: short-lived processes that open its tensors as a trainer does.

    python scripts/gpu_importer.py            one process that imports torch once and forks the peers it is asked for
    python scripts/gpu_importer.py --share    allocate on the GPU, share, and say what was refused

Input is a line of JSON with the handles, then one line for each peer; output is a line of JSON from each. A peer that
was asked to stay lives until it is killed. The forking process itself never touches CUDA: a context does not survive a
fork.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

import msgspec
import torch
from torch import Tensor

from alchemist.protocol.errors import ProtocolError
from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Importer, share

SCRATCH = "scratch"
"""A tensor that peers write to, int32."""
PATTERN = 0x5A5A0000
_PR_SET_PDEATHSIG = 1


def fingerprint(tensor: Tensor) -> list[int]:
    """Of its bytes and their order: two sums of its 16-bit words, one of them by position."""
    words = tensor.detach().reshape(-1).view(torch.int16)
    plain = weighted = 0
    for start in range(0, words.numel(), 1 << 26):
        part = words[start : start + (1 << 26)].long()
        index = torch.arange(start, start + part.numel(), device=part.device) % 65_521
        plain += int(part.sum())
        weighted += int((part * index).sum())
    return [plain, weighted]


def _peer(ask: dict[str, Any], handles: dict[str, TensorHandle], device: str) -> dict[str, Any]:
    """What a peer does.

    bare       use the device and nothing of the owner's
    read       open everything, fingerprint all of it, write the scratch tensor
    open       open everything, read one element, unmap it again unless it stays
    """
    torch.ones(1 << 12, dtype=torch.bfloat16, device=device).sum().item()
    if ask["do"] == "bare":
        fingerprint(torch.ones(1 << 12, dtype=torch.bfloat16, device=device))
        _free(device)
        return {}
    importer = Importer()
    started = time.perf_counter()
    tensors = {name: importer.open(handle) for name, handle in handles.items()}
    opened_ms = (time.perf_counter() - started) * 1e3
    _kept.append((importer, tensors))
    if ask["do"] == "read":
        prints = {n: fingerprint(t) for n, t in tensors.items() if n != SCRATCH}
        scratch = tensors[SCRATCH]
        scratch.copy_(torch.arange(scratch.numel(), dtype=torch.int32, device=device) + PATTERN)
        _free(device)
        return {"opened_ms": opened_ms, "prints": prints}
    first = next(iter(tensors.values()))
    value = float(first.reshape(-1)[0])
    if not ask.get("stay"):
        del first, tensors
        _kept.clear()
        importer.close()
    return {"opened_ms": opened_ms, "value": value}


_kept: list[Any] = []
"""What a peer holds for as long as it lives."""


def _free(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _fork(ask: dict[str, Any], handles: dict[str, TensorHandle], device: str) -> None:
    if os.fork():
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        answer = {"pid": os.getpid(), **_peer(ask, handles, device)}
    except Exception as error:
        answer = {"pid": os.getpid(), "error": f"{type(error).__name__}: {error}"}
    os.write(1, json.dumps(answer).encode() + b"\n")
    while ask.get("stay"):
        signal.pause()
    os._exit(0)


def _refused() -> dict[str, str]:
    """Share memory of this process, as its environment makes the allocator."""
    try:
        share("refused", {"tensor": torch.ones(1 << 20, device="cuda")})
    except ProtocolError as error:
        return {"refused": str(error)}
    return {"shared": "it was not refused"}


def main() -> None:
    if sys.argv[1:] == ["--share"]:
        print(json.dumps(_refused()))
        return
    # Peers are nobody's to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    head = json.loads(sys.stdin.readline())
    handles = msgspec.msgpack.decode(bytes.fromhex(head["handles"]), type=dict[str, TensorHandle])
    for line in sys.stdin:
        _fork(json.loads(line), handles, head["device"])


if __name__ == "__main__":
    main()
