"""One physical copy: scheduler and trainer map the same pages of weights, KV pool and recorded rows."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

SIXTEEN = b"\x00\x00\x80\x41"
"""16.0 as little-endian float32."""


def mapping(pid: int, name: str) -> dict[str, int]:
    """Address, inode, and resident and proportional size in kB of a shared segment's mapping in a process."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if f"memfd:alchemist-{name}" in line:
            found = {"start": int(fields[0].split("-")[0], 16), "inode": int(fields[4])}
        elif found and fields[0] in ("Size:", "Rss:", "Pss:", "Private_Dirty:"):
            found[fields[0].rstrip(":").lower()] = int(fields[1])
        elif found and fields[0] == "VmFlags:":
            return found
    raise AssertionError(f"process {pid} does not map {name}")


def logprobs(server) -> list[float]:
    """Of a fixed continuation, scored by the base model."""
    body = {
        "input_ids": list(range(3, 40)),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "lora_path": "base",
    }
    answer = server.http.post("/generate", json=body).json()
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]


def peek(pid: int, address: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), 4, address)


def poke(pid: int, address: int, data: bytes) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), data, address)


@pytest.fixture
def pids(server):
    trainer = server.trainer_pid()
    scheduler = next(
        c.pid
        for c in server.children()
        if "memfd:alchemist-kv" in Path(f"/proc/{c.pid}/maps").read_text() and c.pid != trainer
    )
    return scheduler, trainer


@pytest.mark.parametrize("name", ["weights", "kv", "rows"])
def test_both_processes_map_the_same_segment(pids, name):
    scheduler, trainer = (mapping(pid, name) for pid in pids)
    assert scheduler["inode"] == trainer["inode"]
    assert scheduler["size"] == trainer["size"]


def test_a_byte_written_by_one_is_read_by_the_other(server, pids):
    """Through the processes' own address spaces: the trainer's mapping is changed, the scheduler's has changed, and so
    has what it serves."""
    scheduler, trainer = pids
    mine, theirs = mapping(trainer, "weights"), mapping(scheduler, "weights")
    before = logprobs(server)
    # The embedding (tied to the LM head) comes first: change some floats of its first row.
    old = [peek(trainer, mine["start"] + 4 * i) for i in range(64)]
    try:
        for i in range(64):
            poke(trainer, mine["start"] + 4 * i, SIXTEEN)
        assert peek(scheduler, theirs["start"] + 4) == SIXTEEN
        changed = logprobs(server)
    finally:
        for i, data in enumerate(old):
            poke(trainer, mine["start"] + 4 * i, data)
    assert peek(scheduler, theirs["start"] + 4) == old[1]
    assert logprobs(server) == pytest.approx(before, abs=1e-5)
    assert changed != pytest.approx(before, abs=1e-2)


def test_the_weights_take_memory_once(server, pids):
    """Proportional set sizes of all processes' mappings add up to one copy."""
    size = mapping(pids[0], "weights")["size"]
    total = 0
    for process in [psutil.Process(server.process.pid), *server.children()]:
        try:
            total += mapping(process.pid, "weights")["pss"]
        except AssertionError:
            continue
    assert 0.9 * size <= total <= 1.02 * size


def test_rows_that_are_not_their_tokens_fail_the_vote_and_nothing_else(server, pids):
    """Recorded activations damaged where they lie: that vote says so, and training goes on."""
    spoiled = server.vote(server.chat("What is 3 + 4? Answer me nicely.")["id"], "up")["id"]
    rows = mapping(pids[0], "kv")
    # The first layer's keys, and the rows in borrowed slots among them.
    length = 16 << 20
    with open(f"/proc/{pids[0]}/mem", "r+b", buffering=0) as memory:
        old = os.pread(memory.fileno(), length, rows["start"])
        os.pwrite(memory.fileno(), SIXTEEN * (length // 4), rows["start"])
        try:
            server.flush()
        finally:
            os.pwrite(memory.fileno(), old, rows["start"])
    found = server.http.get(f"/v1/feedback/{spoiled}").json()
    assert found["state"] == "failed"
    assert "the activations recorded for token 0 are not that token's" in found["reason"]
    good = server.vote(server.chat("What is 5 + 4?")["id"], "up")["id"]
    server.flush()
    assert server.http.get(f"/v1/feedback/{good}").json()["state"] == "trained"
