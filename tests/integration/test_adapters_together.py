"""A version answers alike whether all requests of a batch have it or not."""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

from live import wait_for


def logprobs(server, model, salt, prompt="Tell me all about cats, please. " * 60):
    body = {"model": model, "logprobs": True, "max_tokens": 100, "ignore_eos": True}
    choice = server.chat(prompt, cache_salt=salt, **body)["choices"][0]
    return [entry["logprob"] for entry in choice["logprobs"]["content"]]


def difference(one, other):
    # Of the first tokens: where two are nearly as likely, rounding decides, and then the answers differ.
    return max(abs(a - b) for a, b in zip(one[:8], other[:8], strict=True))


def new_version(server):
    before = server.training()["step"]
    for text in ("Hello!", "What is 3 + 4?", "Tell me a joke.", "And a story?"):
        server.vote(server.chat(text)["id"])
    server.flush()
    wait_for(lambda: server.training()["step"] > before, 60, "a step")
    return server.training()["live_version"]


def test_alone_and_together(server):
    models = "base", new_version(server), new_version(server)
    alone = {model: logprobs(server, model, f"alone {model}") for model in models}
    # What the adapter of any one changes against any other.
    effect = min(difference(alone[a], alone[b]) for a, b in combinations(models, 2))
    assert effect > 1e-5
    with ThreadPoolExecutor(6) as pool:
        together = [
            (model, pool.submit(logprobs, server, model, f"together {i}"))
            for i, model in enumerate(models * 2)
        ]
        for model, answer in together:
            assert difference(answer.result(), alone[model]) < 0.1 * effect
