"""Tokens and logprobs at temperature 0 are bit-equal with recording on and off, for the same requests one by one."""

from __future__ import annotations

PROMPTS = [
    "Hello!",
    "What is 7 + 8?",
    "Tell me a story.",
    "What sound does a dog make? " * 60,
    "What sound does a dog make? " * 60 + "And a cow?",
]


def answers(server):
    out = []
    for prompt in PROMPTS:
        answer = server.chat(
            prompt, model="base", logprobs=True, top_logprobs=3, max_tokens=48, cache_salt="bits"
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


def test_a_request_can_ask_not_to_be_recorded(server):
    def recorded(text, **headers):
        body = {
            "model": "base",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 4,
            "cache_salt": text,
        }
        answer = server.http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200
        receipt = server.receipt(answer.json()["id"])
        return receipt["recorded_tokens"], receipt["prompt_tokens"]

    kept, length = recorded("What is 4 + 5, please?")
    assert kept == length
    kept, length = recorded("What is 5 + 5, please?", **{"X-Alchemist-Record": "false"})
    assert (kept, length > 0) == (0, True)


def test_without_training_votes_are_kept(silent):
    vote = silent.vote(silent.chat("Hello!")["id"], "up")
    assert vote["state"] == "pending"
    assert silent.training()["state"] == "off"
