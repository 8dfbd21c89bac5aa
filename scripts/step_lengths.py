"""Completions of real lengths: labelled conversations, their prompts served by a real server.

The prompt of a conversation is all its messages but the last, as the server's chat template renders them; how many of
its tokens were recorded is what the server's receipt says. The response is the last message in the server's tokens,
ended as the learner ends a correction.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from bench_common import progress
from serving_servers import ALCHEMIST, Target

from alchemist.server.main import TINY_MODEL
from alchemist.trainer.step import Sample

SEED = 0


@dataclass(frozen=True)
class Served:
    """Completions, shortest first; `num_recorded`: of each one's prompt, from the first token on."""

    samples: list[Sample]
    num_recorded: list[int]
    skipped: int
    """Conversations drawn but longer than the server's context."""

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": SEED,
            "prompt_tokens": [len(s.prompt_ids) for s in self.samples],
            "recorded_tokens": self.num_recorded,
            "response_tokens": [len(s.response_ids) for s in self.samples],
            "longer_than_context": self.skipped,
        }


def conversations(path: Path) -> list[dict[str, Any]]:
    """Those of a JSON list of {"messages": [{"role", "content"}, …], "label": bool}, in an order drawn by `SEED`.

    Raises:
        ValueError: the file is something else.
    """
    found = json.loads(path.read_text())
    for entry in found if isinstance(found, list) else [None]:
        is_one = isinstance(entry, dict) and isinstance(entry.get("label"), bool)
        if not is_one or len(entry.get("messages", ())) < 2:
            raise ValueError(f"{path.name} must be a list of labelled conversations")
    random.Random(SEED).shuffle(found)
    return found


def serve(path: Path, count: int) -> Served:
    """Start a server with the embedded model and put the prompts of `count` conversations through it.

    Raises:
        ValueError: the file has too few conversations that fit the model's context.
        SystemExit: the server did not start.
    """
    drawn = conversations(path)
    with tempfile.TemporaryDirectory(prefix="bench-lengths-") as name:
        folder = Path(name)
        data = ["--data-dir", str(folder / "data")]
        with Target("lengths", ALCHEMIST, data, folder) as server:
            server.wait_ready()
            return _ask(server.http, drawn, count)


def _ask(http: httpx.Client, drawn: list[dict[str, Any]], count: int) -> Served:
    config = json.loads((TINY_MODEL / "config.json").read_text())
    taken: list[tuple[Sample, int]] = []
    skipped = 0
    rest = iter(drawn)
    for _ in progress(range(count), "serving conversations"):
        while True:
            conversation = next(rest, None)
            if conversation is None:
                raise ValueError(
                    f"only {len(taken)} conversations fit the embedded model's context"
                )
            found = _one(http, conversation, config)
            if found is not None:
                taken.append(found)
                break
            skipped += 1
    taken.sort(key=lambda one: len(one[0].prompt_ids) + len(one[0].response_ids))
    return Served([sample for sample, _ in taken], [n for _, n in taken], skipped)


def _one(
    http: httpx.Client, conversation: dict[str, Any], config: dict[str, Any]
) -> tuple[Sample, int] | None:
    """A conversation's completion and how many of its prompt's tokens were recorded; None: too long."""
    *prompt, answer = conversation["messages"]
    text = {"prompt": answer["content"], "add_special_tokens": False}
    tokens = http.post("/tokenize", json=text).raise_for_status().json()["tokens"]
    response = [*tokens, config["eos_token_id"]]
    rendered = http.post("/tokenize", json={"messages": prompt}).raise_for_status().json()["count"]
    if rendered + len(response) > config["max_position_embeddings"]:
        return None
    body = {"model": "base", "messages": prompt, "max_tokens": 1, "temperature": 0}
    chat = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    receipt = _receipt(http, chat["id"])
    ids = receipt["prompt_token_ids"]
    return Sample(prompt_ids=ids, response_ids=response, label=conversation["label"]), receipt[
        "recorded_tokens"
    ]


def _receipt(http: httpx.Client, completion_id: str) -> dict[str, Any]:
    # An answer reaches the client a moment before the server has stored it.
    for _ in range(40):
        path = f"/v1/completions/{completion_id}/receipt"
        answer = http.get(path, params={"tokens": "true"})
        if answer.is_success and answer.json().get("prompt_token_ids"):
            return answer.json()
        time.sleep(0.25)
    raise SystemExit(f"the server has no receipt of {completion_id}: {answer.text}")
