"""A chat answer that comes token by token on a thread of its own."""

from __future__ import annotations

import json
import threading

import httpx
from live import Server


class Stream:
    """Begins at once; `started` is set with the first token, `done` when the answer has ended, however it ended."""

    def __init__(self, server: Server, max_tokens: int, *, wait: bool = True) -> None:
        """Args:
        wait: return with the first token, not at once.
        """
        self.id = ""
        self.num_tokens: int | None = None
        """Of the whole answer; None: it was cut off."""
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.started = threading.Event()
        self.done = threading.Event()
        self._cut = threading.Event()
        body = {
            "model": "alchemist-tiny",
            "messages": [{"role": "user", "content": "tell me a story about a fox"}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._thread = threading.Thread(target=self._read, args=(server.url, body), daemon=True)
        self._thread.start()
        if wait:
            assert self.started.wait(60), "no first token"

    def _read(self, url: str, body: dict[str, object]) -> None:
        try:
            with httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=body, timeout=120
            ) as answer:
                for line in answer.iter_lines():
                    if self._cut.is_set():
                        break
                    if line.startswith("data: {"):
                        self._chunk(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = error
        finally:
            self.done.set()

    def _chunk(self, chunk: dict[str, object]) -> None:
        self.id = str(chunk.get("id", self.id))
        if chunk.get("usage"):
            self.num_tokens = chunk["usage"]["completion_tokens"]  # type: ignore[index]
        for choice in chunk.get("choices", []):  # type: ignore[attr-defined]
            if choice["delta"].get("content"):
                self.started.set()
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def cut(self) -> None:
        """Hang up, as a client does that has seen enough."""
        self._cut.set()
        self.wait()

    def wait(self, timeout: float = 120.0) -> None:
        assert self.done.wait(timeout), "the stream did not end"
