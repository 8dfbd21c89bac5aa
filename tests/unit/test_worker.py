"""What a trainer trains and what it refuses: a worker over shared weights, with no server behind it."""

from __future__ import annotations

import os

import msgspec
import pytest
import torch
import zmq
from engine_support import VOCAB, random_model

from alchemist.protocol import messages
from alchemist.protocol.cores import trainer_cores
from alchemist.protocol.lease import Lease
from alchemist.protocol.states import TrainerEvent
from alchemist.protocol.tensors import share
from alchemist.server.config import Config
from alchemist.trainer.families import ModelShape
from alchemist.trainer.weights import fused_from_hf
from alchemist.trainer.worker import Worker

LIMIT = 24
"""Tokens the model takes."""


@pytest.fixture
def start(tmp_path):
    """Starts a worker on the same versions, as often as it is called; the last one is closed."""
    model = random_model("qwen3", torch.float32, max_position_embeddings=LIMIT)
    model.config.save_pretrained(tmp_path / "model")
    weights = share("weights", fused_from_hf(model))
    lease = Lease.create()
    layout = ModelShape.from_config(model.config).row_layout(torch.float32)
    welcome = messages.Welcome(
        config=b"",
        data_dir=str(tmp_path / "data"),
        model_path=str(tmp_path / "model"),
        context_length=LIMIT,
        memory=messages.SharedMemory(layout=layout, weights=weights.handles, k=[], v=[], rows=None),
        lease=lease.segment.handle,
        rows_address=None,
    )
    workers = []

    def start(**options):
        if workers:
            workers.pop().close()
            lease.advance(TrainerEvent.DIED)
        config = Config(lora_rank=2, objective="kto", **options).to_json().encode()
        told = msgspec.structs.replace(welcome, config=config)
        workers.append(Worker(told, context, os.getppid()))
        return workers[-1]

    with zmq.Context() as context:
        yield start
        for worker in workers:
            worker.close()


@pytest.fixture
def worker(start):
    return start()


def completion(name, prompt_tokens, response_tokens, version=0):
    generator = torch.Generator().manual_seed(len(name))
    ids = torch.randint(0, VOCAB, (prompt_tokens + response_tokens,), generator=generator).tolist()
    return messages.TrainSample(
        feedback_id=name,
        completion_id=f"completion {name}",
        label=True,
        prompt_ids=messages.pack_ids(ids[:prompt_tokens]),
        response_ids=messages.pack_ids(ids[prompt_tokens:]),
        version=version,
        extra_key=None,
    )


def train(worker, *samples, version=1):
    request = messages.Train(
        step=version, parent=version - 1, version=version, samples=list(samples)
    )
    return worker.train(request)


@pytest.mark.parametrize("response_tokens", [1, 8, LIMIT - 1])
def test_a_completion_of_as_many_tokens_as_the_model_takes_is_trained(worker, response_tokens):
    """Up to its last token; beside it one with a token more is refused, and only that one."""
    fits = completion("fits", LIMIT - response_tokens, response_tokens)
    too_long = completion("too long", LIMIT + 1 - response_tokens, response_tokens)
    done = train(worker, too_long, fits)
    assert isinstance(done, messages.StepDone)
    assert done.failed == {"too long": f"{LIMIT + 1} tokens; the model takes {LIMIT}"}
    assert done.metrics["num_samples"] == 1
    # The last one is predicted and never read.
    assert done.tokens_recomputed == LIMIT - 1
    assert not worker.store.load(1, worker.shape).is_zero
    masters = worker.store.load(1, worker.shape).weights
    alone = train(worker, fits)
    assert isinstance(alone, messages.StepDone)
    assert alone.failed == {}
    again = worker.store.load(1, worker.shape).weights
    assert all(torch.equal(masters[name], again[name]) for name in masters)


def test_when_every_completion_is_too_long_no_version_comes_of_it(worker):
    failed = train(worker, completion("one", LIMIT, 1), completion("two", 1, LIMIT + 20))
    assert isinstance(failed, messages.StepFailed)
    assert failed.failed == {
        "one": f"{LIMIT + 1} tokens; the model takes {LIMIT}",
        "two": f"{LIMIT + 21} tokens; the model takes {LIMIT}",
    }
    assert not worker.store.exists(1)


def test_what_an_older_version_served_is_differentiated_at_what_it_was(start):
    """Not at what its masters have become since: a trainer that has just read it from disk makes the same of it."""
    worker = start()
    for version in (1, 2):
        assert isinstance(train(worker, completion("a", 8, 8), version=version), messages.StepDone)
    found = []
    for trainer in (worker, None):
        done = train(trainer or start(), completion("old", 8, 8, version=1), version=3)
        assert done.metrics["num_stale"] == 0
        found.append((worker.store.load(3, worker.shape).weights, done.metrics["grad_norm"]))
    (kept, kept_norm), (read, read_norm) = found
    assert kept_norm == read_norm
    assert all(torch.equal(kept[name], read[name]) for name in kept)


def test_what_was_rolled_back_is_differentiated_at_what_is_trained(worker):
    for version in (1, 2):
        train(worker, completion("a", 8, 8), version=version)
    sample = completion("a", 8, 8)
    # Rolled back to v1: v3 is made from it, and v4 from v3.
    worker.train(messages.Train(step=3, parent=1, version=3, samples=[sample]))
    num_stale = []
    for version in (1, 2, 3):
        old = completion("old", 8, 8, version=version)
        request = messages.Train(step=4, parent=3, version=4, samples=[old])
        num_stale.append(worker.train(request).metrics["num_stale"])
    assert num_stale == [0, 1, 0]


def test_a_step_can_be_tried_before_there_are_votes(worker, start):
    """As on a GPU at every start: it leaves nothing behind."""
    first = train(worker, completion("one", 6, 4))
    again = start()
    again._try_out(again.engine._weights)
    second = train(again, completion("one", 6, 4))
    assert second.metrics["grad_norm"] == first.metrics["grad_norm"]


@pytest.mark.parametrize("policy", ["share", "none", "idle"])
def test_beside_requests_it_keeps_to_its_part_of_the_cores_where_they_are_divided(start, policy):
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        worker = start(lease_policy=policy)
        worker.lease.advance(TrainerEvent.STEP_BEGUN)
        worker.lease.set_share(1.0)
        worker.lease.set_front_busy(1)
        worker.gate()
        assert torch.get_num_threads() == (trainer_cores(6) if policy == "share" else 6)
        worker.lease.set_front_busy(0)
        worker.gate()
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)
