"""A version answers alike whether all requests of a batch have it (one way to add an adapter) or not (another)."""

from concurrent.futures import ThreadPoolExecutor

from live import wait_for


def logprobs(server, model, salt, prompt="Tell me all about cats, please. " * 60):
    body = {"model": model, "logprobs": True, "max_tokens": 100, "ignore_eos": True}
    choice = server.chat(prompt, cache_salt=salt, **body)["choices"][0]
    return [entry["logprob"] for entry in choice["logprobs"]["content"]]


def difference(one, other):
    # Of the first tokens: where two are nearly as likely, rounding decides, and then the answers differ.
    return max(abs(a - b) for a, b in zip(one[:8], other[:8], strict=True))


def test_alone_and_together(server):
    before = server.training()["step"]
    for text in ("Hello!", "What is 3 + 4?", "Tell me a joke.", "And a story?"):
        server.vote(server.chat(text)["id"])
    server.flush()
    wait_for(lambda: server.training()["step"] > before, 60, "a step")
    live = server.training()["live_version"]
    alone = {model: logprobs(server, model, f"alone {model}") for model in (live, "base")}
    effect = difference(alone[live], alone["base"])
    assert effect > 1e-5
    with ThreadPoolExecutor(4) as pool:
        together = [
            pool.submit(logprobs, server, model, f"together {i}")
            for i, model in enumerate((live, "base", live, "base"))
        ]
        for model, answer in zip((live, "base") * 2, together, strict=True):
            assert difference(answer.result(), alone[model]) < 0.1 * effect
