"""What the host tier is worth in the same device memory: tokens trainable without a forward, and the trainer's memory.

    python scripts/bench_activation_memory.py [--quick] [--only NAME,…] [--json FILE|-]

For each host budget a server of its own with the same KV pool answers many prompts that share nothing, each is voted
on, and all votes are one step. A row takes several KV slots, so what the prompts' own keys and values leave of the pool
cannot hold the rows of all of them.

    recorded_tokens_<GiB>             prompt tokens that the receipts say are recorded, before the first vote
    reused_tokens_<GiB>               tokens that the trainer took from rows: these were trainable
    trainable_tokens_vs_device_only   reused tokens with the largest budget ÷ with none
    train_memory_<GiB>                most private memory of the trainer during the step, above what it had before;
                                      what it maps of the server's is not in it
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from activation_options import activation_rows, budget_flags, full_status
from bench_common import Row, Run, model_name, progress
from serving_servers import ALCHEMIST, Target
from serving_targets import finish_training, started

from alchemist.server.main import TINY_MODEL

BAR = 2.0
ANSWER_TOKENS = 8
BATCH = 4
"""Prompts sent at once."""


class Measured(NamedTuple):
    """Of one server."""

    recorded: int
    prompt: int
    reused: int
    peak_bytes: int
    status: dict[str, Any]


class Peak:
    """Highest resident anonymous memory of a process inside a `with` block, above that at its start; looked at every
    10 ms.
    """

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._before = self._look()
        self._highest = self._before
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @property
    def num_bytes(self) -> int:
        return self._highest - self._before

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._highest = max(self._highest, self._look())

    def _look(self) -> int:
        match = re.search(r"^RssAnon:\s+(\d+)", self._status.read_text(), re.MULTILINE)
        assert match
        return int(match[1]) << 10


def answers(target: Target, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """`meta_info` of the answer to each prompt."""
    sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 1.0, "ignore_eos": True}
    out = []
    for first in range(0, len(prompts), BATCH):
        asked = {"input_ids": prompts[first : first + BATCH], "sampling_params": sampling}
        found = target.http.post("/generate", json=asked).raise_for_status().json()
        out += [answer["meta_info"] for answer in found]
    return out


def wait_for_copies(target: Target) -> None:
    """Until the host tier has no backlog."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not full_status(target.http)["activations"]["hedge_backlog"]:
            return
        time.sleep(0.2)
    sys.exit("the host tier still has a backlog after 120 s")


def measure(target: Target, prompts: list[list[int]]) -> Measured:
    metas = answers(target, prompts)
    wait_for_copies(target)
    recorded = 0
    for meta in metas:
        receipt = target.http.get(f"/v1/completions/{meta['id']}/receipt").raise_for_status()
        recorded += receipt.json()["recorded_tokens"]
    target.http.post("/v1/training/pause").raise_for_status()
    for i, meta in enumerate(metas):
        vote = {"completion_id": meta["id"], "rating": "up" if i % 2 else "down"}
        target.http.post("/v1/feedback", json=vote).raise_for_status()
    trainer = target.http.get("/v1/training").json()["trainer"]["pid"]
    with Peak(trainer) as peak:
        target.http.post("/v1/training/resume").raise_for_status()
        finish_training(target)
    status = full_status(target.http)
    if status["step"] != 1:
        sys.exit(f"the votes became {status['step']} steps, not one: {status['last_error']}")
    prompt = sum(len(ids) for ids in prompts)
    return Measured(recorded, prompt, status["tokens_reused"], peak.num_bytes, status)


def rows(measured: dict[float, Measured]) -> list[Row]:
    """Args:
    measured: budget in GiB → what was found; 0 is among them.
    """

    def row(name: str, value: float, unit: str) -> Row:
        return Row(name, value, unit, (value, value), 1)

    out = []
    for budget, found in measured.items():
        recorded = row(f"recorded_tokens_{budget:g}", found.recorded, "tokens")
        recorded.against = f"{found.prompt} prompt tokens"
        out += [
            recorded,
            row(f"reused_tokens_{budget:g}", found.reused, "tokens"),
            row(f"train_memory_{budget:g}", found.peak_bytes / 2**20, "MiB"),
        ]
    most = max(measured)
    if not measured[0].reused:
        sys.exit(
            "gate: without a host tier the trainer took nothing from rows: there is no ratio to that "
            "(a larger --max-total-tokens, fewer --prompts)"
        )
    ratio = row("trainable_tokens_vs_device_only", measured[most].reused / measured[0].reused, "x")
    ratio.against, ratio.bar = f"no host tier; with {most:g} GiB", BAR
    return [*out, ratio, *activation_rows(measured[most].status)]


def main() -> None:
    parser = Run.parser(__doc__)
    parser.add_argument("--model", default=str(TINY_MODEL), help="directory (default: embedded)")
    parser.add_argument(
        "--max-total-tokens", type=int, default=32768, help="size of the KV pool (default: 32768)"
    )
    parser.add_argument("--prompts", type=int, default=0, help="(default: 96; quick: 32)")
    parser.add_argument("--prompt-len", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument("--activation-host-gb", type=float, default=2.0, help="(default: 2)")
    parser.add_argument("--server-args", default="", help="further flags of Alchemist, in one word")
    options = Run.parse(parser)
    options.prompts = options.prompts or (32 if options.quick else 96)
    run = Run("activation_memory", options)
    run.config = {"model": model_name(options.model)}
    rng = random.Random(0)
    prompts = [
        [rng.randrange(10, 900) for _ in range(options.prompt_len)] for _ in range(options.prompts)
    ]
    args = ["--model-path", options.model, "--max-total-tokens", str(options.max_total_tokens)]
    args += ["--train-batch-size", str(options.prompts), "--train-max-wait", "3600"]
    measured = {}
    with tempfile.TemporaryDirectory(prefix="bench-activation-memory-") as name:
        for budget in progress([0.0, options.activation_host_gb], "host budgets"):
            folder = Path(name, f"{budget:g}")
            folder.mkdir()
            ours = ["--data-dir", str(folder / "data"), *budget_flags(budget)]
            ours += options.server_args.split()
            with started("alchemist", ALCHEMIST, [*args, *ours], folder) as target:
                target.wait_ready()
                measured[budget] = measure(target, prompts)
    for row in rows(measured):
        run.add(row)
    run.finish()


if __name__ == "__main__":
    main()
