"""What a user does, against real processes: chat, vote, and get answers from a new version."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from live import wait_for

QUESTIONS = ["What is 2 + 3?", "What colour is grass?", "What sound does a cow make?", "Hello!"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


def ask(client, text, **options):
    return client.chat.completions.create(
        model="alchemist-tiny",
        messages=[{"role": "user", "content": text}],
        **{"max_tokens": 32, "temperature": 0.0} | options,
    )


def train_a_version(server) -> str:
    """Vote on four fresh answers; the version that comes of it."""
    before = server.training()["step"]
    for i, question in enumerate(QUESTIONS):
        answer = server.chat(question, temperature=1.0)
        server.vote(answer["id"], "up" if i % 2 else "down")
    status = server.flush()
    assert status["step"] > before
    return status["live_version"]


def test_votes_make_a_version_that_answers(server, client):
    first = ask(client, "What is 4 + 4?")
    before = first.metadata["weight_version"]
    ids = [ask(client, question, temperature=1.0).id for question in QUESTIONS]
    votes = [
        server.vote(rid, rating) for rid, rating in zip(ids, ["up", "down", 1, False], strict=True)
    ]
    assert {vote["state"] for vote in votes} <= {"pending", "trained"}
    status = server.flush()
    after = ask(client, "What is 4 + 4?").metadata["weight_version"]
    assert after == status["live_version"] != before
    version = next(v for v in server.versions() if v["version"] == after)
    assert version["parent"] == before
    assert version["state"] == "live"
    assert {vote["id"] for vote in votes} <= set(version["feedback_ids"])
    assert status["last_step"]["grad_norm"] > 0
    # The prompts were served from recorded rows, so nobody computed them again.
    assert status["tokens_reused"] > 0


def test_a_stream_finishes_on_the_version_it_began_with(server, client):
    newest = train_a_version(server)
    parent = next(v["parent"] for v in server.versions() if v["version"] == newest)
    options = {
        "max_tokens": 400,
        "temperature": 0.0,
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }
    message = [{"role": "user", "content": "Tell me a story about a duck."}]

    def text_of(stream, until=None):
        parts, versions = [], set()
        for chunk in stream:
            parts += [c.delta.content or "" for c in chunk.choices]
            versions.add(chunk.model_extra["metadata"]["weight_version"])
            if until is not None and len(parts) == 20:
                until()
        return "".join(parts), versions

    undisturbed, _ = text_of(
        client.chat.completions.create(model=parent, messages=message, **options)
    )
    assert server.http.post(f"/v1/versions/{parent}/promote").status_code == 200
    switched = []

    def go_live():
        assert server.http.post(f"/v1/versions/{newest}/promote").status_code == 200
        switched.append(ask(client, "Hello!").metadata["weight_version"])

    text, versions = text_of(
        client.chat.completions.create(model="alchemist-tiny", messages=message, **options),
        until=go_live,
    )
    assert switched == [newest]
    assert versions == {parent}
    assert text == undisturbed


def test_training_waits_while_a_request_is_in_flight(server, client):
    """Policy idle: between two chunks of a stream no step completes, and right after the stream it does."""
    ids = [ask(client, question, temperature=1.0).id for question in QUESTIONS]
    before = server.training()["step"]
    stream = client.chat.completions.create(
        model="alchemist-tiny",
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_tokens=600,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    for rid in ids:
        server.vote(rid)
    assert server.training()["lease"]["granted"] is False
    during = None
    for _ in stream:
        during = during or server.training()["step"]
    assert during == before
    wait_for(lambda: server.training()["step"] > before, 120, "the step after the stream")


@pytest.mark.parametrize(
    ("model", "expected"), [("base", "v0"), ("v0", "v0"), ("v1", "v1"), ("any:v1", "v1")]
)
def test_the_model_name_pins_a_version(server, model, expected):
    if not any(v["version"] == "v1" for v in server.versions()):
        train_a_version(server)
    answer = server.chat("Hello!", model=model)
    assert answer["metadata"]["weight_version"] == expected
    assert server.receipt(answer["id"])["version"] == expected


def test_a_version_that_does_not_exist_is_named(server):
    body = {"model": "v999", "messages": [{"role": "user", "content": "Hi"}]}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "v999" in response.text
    assert "base" in response.text


def test_receipt_has_the_tokens_and_logprobs_that_were_served(server):
    answer = server.chat("What is 3 + 4?", logprobs=True, temperature=0.0)
    receipt = server.receipt(answer["id"])
    assert (
        receipt["prompt_tokens"]
        == answer["usage"]["prompt_tokens"]
        == len(receipt["prompt_token_ids"])
    )
    assert receipt["response_tokens"] == answer["usage"]["completion_tokens"]
    served = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert receipt["response_logprobs"][: len(served)] == pytest.approx(served, abs=1e-5)
    assert receipt["recorded_tokens"] == receipt["prompt_tokens"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_every_answer_of_a_batch_is_of_the_version_it_asked_for(server, is_stream):
    if server.training()["live_version"] == "v0":
        train_a_version(server)
    live = server.training()["live_version"]
    # Two samples of each of two prompts: SGLang answers with those of the first one first.
    body = {
        "text": ["What is 2 + 3?", "Hello!"],
        "lora_path": ["base", live],
        "sampling_params": {"max_new_tokens": 4, "n": 2},
        "stream": is_stream,
    }
    found = {}
    if is_stream:
        with server.http.stream("POST", "/generate", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    item = json.loads(line.removeprefix("data: "))
                    found[item["index"]] = item["meta_info"]
    else:
        answers = server.http.post("/generate", json=body).json()
        found = {place: item["meta_info"] for place, item in enumerate(answers)}
    expected = ["v0", "v0", live, live]
    assert [found[place]["weight_version"] for place in range(4)] == expected
    assert [server.receipt(found[place]["id"])["version"] for place in range(4)] == expected


def test_logprobs_in_receipts_are_untempered(server):
    """At temperature 0.5 SGLang's own logprobs are tempered; the receipt's are the model's."""
    answer = server.chat("Hello!", temperature=0.5, seed=1)
    receipt = server.receipt(answer["id"])
    prompt, response = receipt["prompt_token_ids"], receipt["response_token_ids"]
    version = receipt["version"]
    scored = server.http.post(
        "/generate",
        json={
            "input_ids": prompt + response,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": len(prompt) - 1,
            "lora_path": "base" if version == "v0" else version,
        },
    ).json()
    expected = [entry[0] for entry in scored["meta_info"]["input_token_logprobs"]][-len(response) :]
    assert receipt["response_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_long_prompts_in_chunks_and_shared_prefixes_reuse_their_rows(server):
    """A 700-token prompt goes through three prefill chunks; a second one that shares it is mostly a cache hit."""
    shared = "The duck went to the river. " * 90
    base = server.training()
    first = server.chat(shared + "What is 1 + 1?")
    assert first["usage"]["prompt_tokens"] > 512
    second = server.chat(shared + "What is 2 + 2?")
    for answer in (first, second):
        assert server.receipt(answer["id"])["recorded_tokens"] == answer["usage"]["prompt_tokens"]
        server.vote(answer["id"])
    status = server.flush()
    reused = status["tokens_reused"] - base["tokens_reused"]
    recomputed = status["tokens_recomputed"] - base["tokens_recomputed"]
    # Two prompts, the shared part counted once: it is one branch of the token tree.
    assert first["usage"]["prompt_tokens"] <= reused < first["usage"]["prompt_tokens"] + 60
    responses = first["usage"]["completion_tokens"] + second["usage"]["completion_tokens"]
    assert recomputed <= 2 * responses + 40


@pytest.mark.parametrize("process", ["Scheduler", "Detokenizer Manager", "Tokenizer Manager"])
def test_what_lives_for_good_is_not_searched_for_garbage(server, process):
    # SGLang's own words; the log may be a moment behind.
    said = f"Freezing GC in {process} process"
    wait_for(lambda: said in server.log.read_text(errors="replace"), 10, said)


def test_several_clients_at_once(server):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: server.chat(f"What is {i} + {i}?"), range(12)))
    assert len({a["id"] for a in answers}) == 12
    assert all(a["choices"][0]["message"]["content"] for a in answers)
    alone = server.chat("What is 5 + 5?", model=answers[5]["metadata"]["weight_version"])
    assert (
        answers[5]["choices"][0]["message"]["content"] == alone["choices"][0]["message"]["content"]
    )


def test_a_client_that_goes_away_aborts_its_request(server):
    body = {
        "model": "alchemist-tiny",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": 6000,
        "ignore_eos": True,
        "stream": True,
    }
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        line = next(line for line in response.iter_lines() if line.startswith("data: {"))
    rid = json.loads(line.removeprefix("data: "))["id"]
    wait_for(lambda: server.training()["lease"]["granted"], 60, "the aborted request to be over")

    def receipt():
        response = server.http.get(f"/v1/completions/{rid}/receipt")
        return response.json() if response.status_code == 200 else None

    ended = wait_for(
        lambda: (r := receipt()) and r["state"] != "streaming" and r, 30, "its receipt"
    )
    assert ended["state"] == "aborted"


def test_a_vote_on_a_streaming_answer_joins_when_it_is_done(server, client):
    stream = client.chat.completions.create(
        model="alchemist-tiny",
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_tokens=300,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    rid = next(iter(stream)).id
    vote = server.vote(rid, "up")
    assert vote["state"] == "waiting"
    for _ in stream:
        pass
    wait_for(
        lambda: server.http.get(f"/v1/feedback/{vote['id']}").json()["state"] != "waiting",
        30,
        "joined",
    )
    server.flush()
    assert server.http.get(f"/v1/feedback/{vote['id']}").json()["state"] == "trained"


def test_a_correction_is_learned_as_an_answer(server):
    answer = server.chat("What colour is snow?")
    vote = server.vote(answer["id"], "down", correction="Snow is white.")
    server.flush()
    assert server.http.get(f"/v1/feedback/{vote['id']}").json()["state"] == "trained"


def test_pause_holds_training_and_resume_releases_it(server):
    assert server.http.post("/v1/training/pause").status_code == 200
    answer = server.chat("Hello!")
    vote = server.vote(answer["id"])
    assert server.http.post("/v1/training/flush").status_code == 200
    assert server.training()["state"] == "paused"
    pending = threading.Event()
    assert not pending.wait(1.0)
    assert server.http.get(f"/v1/feedback/{vote['id']}").json()["state"] == "pending"
    assert server.http.post("/v1/training/resume").status_code == 200
    server.flush()
    assert server.http.get(f"/v1/feedback/{vote['id']}").json()["state"] == "trained"


def test_metrics_tell_of_learning(server):
    def metrics() -> tuple[str, dict[str, float]]:
        text = server.http.get("/metrics").text
        lines = (line.split() for line in text.splitlines() if line.startswith("alchemist_"))
        return text, {line[0]: float(line[1]) for line in lines}

    train_a_version(server)
    status = server.training()
    text, values = metrics()
    assert values["alchemist_steps_total"] >= 1
    assert values["alchemist_live_version"] == int(status["live_version"][1:])
    assert values['alchemist_tokens_total{origin="reused"}'] == status["tokens_reused"]
    assert "sglang:" in text

    def rows_are_told() -> bool:
        found, (_, values) = server.training()["activations"], metrics()
        names = ("hedged", "hedge_backlog", "slots_borrowed", "tokens_voted_held")
        told = [values.get(f"alchemist_{name}") for name in names]
        return found["hedged"] > 0 and told == [found[name] for name in names]

    wait_for(rows_are_told, 60, "metrics of the activation pool")
