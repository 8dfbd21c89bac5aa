"""Part `ipc`: the base weights of an 8B model, opened by other processes as the trainer opens them.

Peers come and go a hundred times, every second one killed; what they leave behind is counted. Figures of memory are the
device's own (`cudaMemGetInfo`, all processes together), on a machine without a GPU the shared memory that is mapped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from gpu_importer import PATTERN, SCRATCH, fingerprint
from gpu_models import model_config, random_weights
from gpu_part import Part
from process_figures import shared_bytes

from alchemist.protocol.errors import ProtocolError
from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Importer, share
from alchemist.trainer.families import ModelShape

PEERS = 100
AT_ONCE = 4
IMPORTER = Path(__file__).with_name("gpu_importer.py")


class Peers:
    """The process that forks peers, and what they answer."""

    def __init__(self, handles: dict[str, TensorHandle], device: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(IMPORTER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        )
        head = {"handles": msgspec.msgpack.encode(handles).hex(), "device": device}
        self._send(head)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def ask(self, *asks: dict[str, Any]) -> list[dict[str, Any]]:
        """What peers answer, in the order in which they are done.

        Raises:
            RuntimeError: one failed, or their parent has ended.
        """
        assert self._process.stdout is not None
        for ask in asks:
            self._send(ask)
        answers = []
        for _ in asks:
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"the importers' parent ended with {self._process.wait(5)}")
            answers.append(json.loads(line))
        if failed := [answer["error"] for answer in answers if "error" in answer]:
            raise RuntimeError(f"an importer failed: {failed[0]}")
        return answers

    @contextlib.contextmanager
    def staying(self, do: str) -> Iterator[dict[str, Any]]:
        """One peer, alive for as long as the block, then killed."""
        (answer,) = self.ask({"do": do, "stay": True})
        try:
            yield answer
        finally:
            kill(answer["pid"])

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def kill(pid: int) -> None:
    """Kill a peer, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.005)


class IpcBench:
    """The owner of the tensors."""

    def __init__(self, part: Part) -> None:
        self._part = part
        device = torch.device(part.device)
        config = model_config("qwen3_8b", is_tiny=part.tiny)
        shape = ModelShape.from_config(config)
        given = random_weights(shape, torch.bfloat16, device)
        self._num_bytes = sum(t.numel() * t.element_size() for t in given.values())
        given[SCRATCH] = torch.zeros(1 << 16, dtype=torch.int32, device=device)
        self._shared = share("weights", given)
        self._prints = self._fingerprints()
        self._peers = Peers(self._shared.handles, part.device)
        part.config |= {"weights_bytes": self._num_bytes, "tensors": len(given), "peers": PEERS}

    def run(self) -> None:
        part = self._part
        try:
            part.attempt(
                "a peer", self._one_peer, ["ipc_wrong_bytes", "ipc_open_ms", "ipc_extra_memory"], 5
            )
            rows = ["ipc_leaked_mib", "ipc_leaked_maps", "ipc_owner_errors"]
            part.attempt(f"{PEERS} peers", self._many_peers, rows, 5)
        finally:
            self._peers.end()
        part.attempt("refusals", self._refusals, ["ipc_refusals"], 5)

    def _fingerprints(self) -> dict[str, list[int]]:
        tensors = self._shared.tensors.items()
        return {name: fingerprint(t) for name, t in tensors if name != SCRATCH}

    def _used_bytes(self, *pids: int) -> int:
        """Of the device by everybody; on the host, of shared memory by this process and `pids`."""
        if self._part.device == "cuda":
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            return int(total - free)
        return shared_bytes(Path(f"/proc/{pid}/maps").read_text() for pid in (os.getpid(), *pids))

    def _one_peer(self) -> None:
        part = self._part
        if part.device == "cuda":
            torch.cuda.empty_cache()
        with self._peers.staying("bare") as bare:
            without = self._used_bytes(bare["pid"])
        time.sleep(0.5)
        with self._peers.staying("read") as peer:
            attached = self._used_bytes(peer["pid"])
        wrong = sum(
            self._shared.tensors[name].nbytes
            for name, print_ in self._prints.items()
            if peer["prints"][name] != print_
        )
        scratch = self._shared.tensors[SCRATCH]
        expected = torch.arange(scratch.numel(), dtype=torch.int32, device=scratch.device) + PATTERN
        wrong += int((scratch != expected).sum()) * scratch.element_size()
        part.add("ipc_wrong_bytes", float(wrong), n=len(self._prints) + 1)
        part.add("ipc_open_ms", peer["opened_ms"], n=len(self._prints) + 1)
        part.add("ipc_extra_memory", max(0, attached - without) / self._num_bytes)

    def _many_peers(self) -> None:
        # The first ones pay for what stays: the driver's own tables.
        self._generation(AT_ONCE)
        time.sleep(1.0)
        descriptors, used = _num_descriptors(), self._used_bytes()
        opened = []
        for _ in range(PEERS // AT_ONCE):
            opened += self._generation(AT_ONCE)
        time.sleep(1.0)
        self._part.config["open_ms"] = statistics.median(opened)
        self._part.add("ipc_leaked_mib", (self._used_bytes() - used) / 2**20, n=PEERS)
        self._part.add("ipc_leaked_maps", float(_num_descriptors() - descriptors), n=PEERS)
        found = self._fingerprints()
        wrong = sum(
            self._shared.tensors[n].nbytes
            for n, print_ in self._prints.items()
            if found[n] != print_
        )
        self._part.add("ipc_owner_errors", float(wrong), n=PEERS)

    def _generation(self, count: int) -> list[float]:
        """Peers at once; every second one unmaps and ends, the others are killed with everything mapped."""
        answers = self._peers.ask(*({"do": "open", "stay": i % 2 == 1} for i in range(count)))
        for answer in answers:
            kill(answer["pid"])
        return [answer["opened_ms"] for answer in answers]

    def _refusals(self) -> None:
        """Each case must be refused by an error of ours that says what to do, not by a crash or a hang."""
        cases = {"a dead owner": self._dead_owner}
        if self._part.device == "cuda":
            cases |= {"expandable segments": _expandable, "another GPU": self._other_gpu}
        said = {}
        for name, case in cases.items():
            try:
                said[name] = case()
            except ProtocolError as error:
                said[name] = str(error)
        self._part.config["refusals"] = said
        refused = sum(1 for words in said.values() if words)
        self._part.add("ipc_refusals", refused / len(cases), n=len(cases))

    def _dead_owner(self) -> str:
        handle = next(iter(self._shared.handles.values()))
        gone = msgspec.structs.replace(handle.segment, birth=handle.segment.birth - 1000)
        Importer().open(msgspec.structs.replace(handle, segment=gone))
        return ""

    def _other_gpu(self) -> str:
        handle = next(iter(self._shared.handles.values()))
        other = msgspec.structs.replace(
            handle.segment, device="00000000-0000-0000-0000-000000000000"
        )
        Importer().open(msgspec.structs.replace(handle, segment=other))
        return ""


def _expandable() -> str:
    env = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, str(IMPORTER), "--share"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"sharing ended with status {done.returncode}: {done.stderr[-300:]}")
    return str(json.loads(done.stdout.splitlines()[-1]).get("refused", ""))


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def main() -> None:
    part = Part.from_argv("ipc", __doc__ or "")
    part.attempt("sharing the weights", lambda: IpcBench(part).run(), part.row_names, 10)


if __name__ == "__main__":
    main()
