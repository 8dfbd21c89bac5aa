"""Servers of an 8B model with random weights, several on one GPU, and what is asked of them."""

from __future__ import annotations

import contextlib
import json
import math
import random
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import torch
from gpu_models import model_config, model_directory
from gpu_part import Part
from process_figures import shared_bytes
from serving_servers import Target

from alchemist.server.machine_memory import free_memory_bytes

PLAIN = ["scripts/gpu_child.py", "scripts/plain_sglang.py"]
EAGER = ["scripts/gpu_child.py", "scripts/gpu_eager.py"]
ALCHEMIST = ["scripts/gpu_child.py", "-m", "alchemist.server"]
NOT_RECORDED = {"X-Alchemist-Record": "false"}


LOG_CHARS = 20_000
"""Of each server's log that are kept."""


def host_room(part: Part) -> str:
    """`--activation-host-gb` for each of a few servers: 2 GiB, or what the host can spare."""
    if part.tiny:
        return "64MiB"
    return f"{min(2 << 30, free_memory_bytes() // 8) >> 20}MiB"


class Flags(NamedTuple):
    """What all servers of a part have in common."""

    model: Path
    words: list[str]

    @classmethod
    def of(cls, part: Part, max_total_tokens: int) -> Flags:
        """Args:
        max_total_tokens: KV slots; several servers share the GPU, so that none may take what is free.
        """
        model = model_directory("qwen3_8b", part.options.folder, is_tiny=part.tiny)
        words = ["--model-path", str(model), "--max-total-tokens", str(max_total_tokens)]
        if part.device == "cuda":
            words += ["--load-format", "dummy", "--dtype", "bfloat16", "--grammar-backend", "none"]
            words += ["--attention-backend", part.options.attention_backend]
            words += ["--sampling-backend", "pytorch", "--mem-fraction-static", "0.9"]
            words += ["--max-running-requests", "32", "--cuda-graph-max-bs-decode", "32"]
        return cls(model, words)


class Server(Target):
    """One server that ends with this process."""

    def __init__(self, name: str, module: list[str], words: Sequence[str], folder: Path) -> None:
        self.key = secrets.token_hex(16)
        super().__init__(name, module, [*words, "--admin-api-key", self.key], folder)
        self.http.headers["Authorization"] = f"Bearer {self.key}"

    @classmethod
    def alchemist(cls, name: str, flags: Flags, folder: Path, *more: str) -> Server:
        training = ["--train-batch-size", "4", "--train-max-wait", "3600", "--objective", "sft"]
        training += ["--lora-rank", "16", "--learning-rate", "1e-3"]
        data = ["--data-dir", str(folder / name)]
        return cls(name, ALCHEMIST, [*flags.words, *data, *training, *more], folder)

    @classmethod
    def plain(cls, flags: Flags, folder: Path) -> Server:
        return cls("plain", PLAIN, flags.words, folder)

    @classmethod
    def eager(cls, flags: Flags, folder: Path) -> Server:
        return cls("eager", EAGER, flags.words, folder)

    def wait_ready_by(self, part: Part, seconds: float = math.inf) -> None:
        """Raises RuntimeError with the log's end: it ended, or is not ready after `seconds` or when the part's time is
        nearly up.
        """
        until = max(10.0, part.left - seconds)
        while part.left > until and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health").status_code == 200:
                    return
            time.sleep(0.3)
        tail = self.log.read_text(errors="replace")[-3000:]
        print(tail, flush=True)
        if self.process.poll() is None:
            raise RuntimeError(f"server {self.name} was not ready in time")
        raise RuntimeError(f"server {self.name} ended: {_last_error(tail)}")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/v1/training").raise_for_status().json()
        return found

    def flush_cache(self) -> None:
        """Forget every prefix; refused for a moment while the last request is being finished."""
        for _ in range(20):
            answer = self.http.post("/flush_cache")
            if answer.is_success:
                return
            time.sleep(0.1)
        answer.raise_for_status()

    def load_adapter(self, name: str, path: Path) -> None:
        """Of SGLang without Alchemist, which has versions of its own."""
        body = {"lora_name": name, "lora_path": str(path)}
        answer = self.http.post("/load_lora_adapter", json=body)
        if not answer.is_success:
            raise RuntimeError(f"server {self.name} does not load {name}: {answer.text[:300]}")

    def generate(
        self, ids: Sequence[int], tokens: int, *, is_recorded: bool = True, **more: Any
    ) -> dict[str, Any]:
        """A greedy answer to token ids, with its logprobs."""
        body = _body(ids, tokens) | {"return_logprob": True} | more
        headers = {} if is_recorded else NOT_RECORDED
        answer = self.http.post("/generate", json=body, headers=headers)
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    def stream(self, ids: Sequence[int], tokens: int, *, is_recorded: bool = True) -> Streamed:
        """The same, token by token, timed."""
        headers = {} if is_recorded else NOT_RECORDED
        times, rid = [], ""
        started = time.perf_counter()
        body = _body(ids, tokens) | {"stream": True}
        with self.http.stream("POST", "/generate", json=body, headers=headers) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter() - started)
                    rid = rid or json.loads(line[6:])["meta_info"]["id"]
        if not times:
            raise RuntimeError(f"server {self.name} streamed nothing")
        tpot = (times[-1] - times[0]) / max(1, tokens - 1)
        return Streamed(rid, times[0] * 1e3, tpot * 1e3)

    def train(self, completions: Sequence[str]) -> dict[str, Any]:
        """One step of up-votes on completions, published; its metrics.

        Raises:
            RuntimeError: no version came of it.
        """
        before = self.status()["step"]
        for rid in completions:
            vote = {"completion_id": rid, "rating": "up"}
            self.http.post("/v1/feedback", json=vote).raise_for_status()
        self.http.post("/v1/training/resume").raise_for_status()
        self.http.post("/v1/training/flush").raise_for_status()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            status = self.status()
            # The step is committed first and published then.
            if status["step"] > before and status["last_step"].get("step") == status["step"]:
                metrics: dict[str, Any] = status["last_step"]
                if status["last_error"]:
                    raise RuntimeError(f"the version was not published: {status['last_error']}")
                return metrics
            if status["last_error"]:
                raise RuntimeError(f"the step failed: {status['last_error']}")
            time.sleep(0.01)
        raise RuntimeError("no step within 60 s")

    def wait_trainer(self, other_than: int | None) -> float:
        """Seconds until a trainer with another pid is ready."""
        started = time.monotonic()
        while time.monotonic() < started + 90:
            is_new = self.status()["trainer"]["pid"] not in (None, other_than)
            # 503 until the trainer has said that it is ready.
            if is_new and self.http.get("/health").status_code == 200:
                return time.monotonic() - started
            time.sleep(0.05)
        raise RuntimeError("no new trainer was ready within 90 s")


class Streamed(NamedTuple):
    rid: str
    ttft_ms: float
    tpot_ms: float
    """Mean over the answer."""


class Background:
    """Requests that come while something else happens, and how many of them fail."""

    def __init__(
        self, server: Server, prompts: Iterator[list[int]], *, tokens: int, pause_s: float
    ):
        self._server, self._prompts = server, prompts
        self._tokens, self._pause = tokens, pause_s
        self._stop = threading.Event()
        self.done = 0
        self.failed: list[str] = []

    def _run(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as http:
            while not self._stop.wait(self._pause):
                body = _body(next(self._prompts), self._tokens)
                try:
                    answer = http.post("/generate", json=body).raise_for_status().json()
                    if len(answer["output_ids"]) != self._tokens:
                        raise ValueError(f"{len(answer['output_ids'])} tokens")
                    self.done += 1
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self.failed.append(str(error))

    def __enter__(self) -> Background:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def prompts(part: Part, length: int, seed: int) -> Iterator[list[int]]:
    """Random token ids without end: no two share a prefix."""
    vocabulary = model_config("qwen3_8b", is_tiny=part.tiny).vocab_size
    draw = random.Random(seed)
    while True:
        yield [draw.randrange(10, vocabulary - 10) for _ in range(length)]


def device_bytes(part: Part, servers: Sequence[Server]) -> int:
    """In use on the GPU by everybody; without one, shared memory that the servers' processes map."""
    if part.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    maps = []
    for server in servers:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(server.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(OSError):
                    maps.append(Path(f"/proc/{process.pid}/maps").read_text())
    return shared_bytes(maps)


def total_gib() -> float:
    """Memory of the GPU."""
    return float(torch.cuda.mem_get_info()[1] / 2**30)


@contextlib.contextmanager
def running(part: Part, servers: Sequence[Server], others: Sequence[Server] = ()) -> Iterator[None]:
    """Wait for all of `servers`, and end them with the block, and `others`, too."""
    started = time.monotonic()
    try:
        for server in servers:
            server.wait_ready_by(part)
            part.config.setdefault("ready_s", {})[server.name] = time.monotonic() - started
        yield
    finally:
        alive = [s for s in (*servers, *others) if s.process.poll() is None]
        for server in alive:
            server.http.close()
            server.process.send_signal(signal.SIGTERM)
        for server in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(8)
            server.process.kill()
        for server in (*servers, *others):
            # Into the part's own log, which comes back from the host.
            text = server.log.read_text(errors="replace")[-LOG_CHARS:]
            print(f"== the end of {server.name}'s log\n{text}", flush=True)


def _body(ids: Sequence[int], tokens: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    return {"input_ids": list(ids), "sampling_params": sampling}


def _last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "Error" in line or "error" in line]
    return (lines or log.splitlines() or ["its log is empty"])[-1].strip()[:300]
