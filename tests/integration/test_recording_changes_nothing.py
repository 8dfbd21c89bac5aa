"""Tokens and logprobs at temperature 0 are bit-equal with recording on and off, for the same requests one by one."""

from __future__ import annotations

import uuid

import pytest
from conftest import SGD
from live import running, wait_for
from openai import OpenAI

PROMPTS = [
    "Hello!",
    "What is 7 + 8?",
    "Tell me a story.",
    "What sound does a dog make? " * 60,
    "What sound does a dog make? " * 60 + "And a cow?",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Nobody votes here: where versions come, the base is soon too old to be recorded."""
    with running(tmp_path_factory.mktemp("recording") / "data", *SGD) as server:
        yield server


def answers(server):
    # Of its own, so that nothing but earlier prompts of this call is cached: a token computed alone has other bits than
    # one that is computed with its whole prompt.
    salt = str(uuid.uuid4())
    out = []
    for prompt in PROMPTS:
        answer = server.chat(
            prompt, model="base", logprobs=True, top_logprobs=3, max_tokens=48, cache_salt=salt
        )
        choice = answer["choices"][0]
        out.append(
            (choice["message"]["content"], [t["logprob"] for t in choice["logprobs"]["content"]])
        )
    return out


def test_bit_equal(server, silent):
    with_recording = answers(server)
    receipt = server.receipt(server.chat(PROMPTS[0], model="base")["id"])
    assert receipt["recorded_tokens"] > 0
    assert answers(silent) == with_recording


def ask(server, text, *, headers=None, **fields):
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 4,
        "cache_salt": text,
        **fields,
    }
    return server.http.post("/v1/chat/completions", json=body, headers=headers)


YES, NO = {"alchemist": {"record": True}}, {"alchemist": {"record": False}}
HEADER = {"headers": {"X-Alchemist-Record": "false"}}


@pytest.mark.parametrize(
    ("said", "is_recorded"),
    [
        ({}, True),
        (YES, True),
        ({"alchemist": {}}, True),
        (NO, False),
        (HEADER, False),
        ({**YES, **HEADER}, False),
        ({**NO, "headers": {"X-Alchemist-Record": "true"}}, False),
    ],
)
def test_a_request_can_ask_not_to_be_recorded(server, said, is_recorded):
    answer = ask(server, f"What is 4 + 5, please? {said}", **said)
    assert answer.status_code == 200, answer.text
    receipt = server.receipt(answer.json()["id"])
    assert receipt["prompt_tokens"] > 10
    assert receipt["recorded_tokens"] == (receipt["prompt_tokens"] if is_recorded else 0)


def test_a_stream_a_text_completion_and_a_batch_can_ask_not_to_be_recorded(server):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    chunks = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "And what is 5 + 5, please?"}],
        max_tokens=4,
        stream=True,
        extra_body={**NO, "cache_salt": "stream"},
    )
    ids = {chunk.id for chunk in chunks}
    text = client.completions.create(
        model="base", prompt="Six and six is", max_tokens=4, extra_body={**NO, "cache_salt": "text"}
    )
    body = {"text": ["One and one is", "Two and two is"], "sampling_params": {"max_new_tokens": 4}}
    batch = server.http.post("/generate", json={**body, **NO}).raise_for_status().json()
    for completion_id in (*ids, text.id, *(answer["meta_info"]["id"] for answer in batch)):
        receipt = server.receipt(completion_id)
        assert (receipt["recorded_tokens"], receipt["prompt_tokens"] > 0) == (0, True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"alchemist": {"record": 0}}, "alchemist.record is 0; allowed: true or false"),
        ({"alchemist": {"record": "no"}}, 'alchemist.record is "no"; allowed: true or false'),
        ({"alchemist": {"recrod": False}}, "alchemist.recrod is not known; allowed: record"),
        ({"alchemist": [False]}, "alchemist is [false]; allowed: an object"),
        (
            {"headers": {"X-Alchemist-Record": "no"}},
            "header X-Alchemist-Record is 'no'; allowed: true or false",
        ),
    ],
)
def test_a_choice_that_cannot_be_understood_is_refused(server, said, named, stream):
    answer = ask(server, "Hello!", stream=stream, **said)
    assert answer.status_code == 400, answer.text
    assert named in answer.json()["message"]


def test_without_training_votes_are_kept(silent):
    vote = silent.vote(silent.chat("Hello!")["id"], "up")["id"]
    # The answer is here before the report that its request has ended.
    wait_for(lambda: silent.http.get(f"/v1/feedback/{vote}").json()["state"] == "pending", 30, "it")
    assert silent.training()["state"] == "off"
