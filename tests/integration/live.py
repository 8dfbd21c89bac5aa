"""A real server in real processes, and what tests ask of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

BOOT_S = 300.0
ROOT = Path(__file__).parents[2]


_ENVIRONMENT = {
    # One thread a process: two that wait for each other crawl when the machine is busy.
    "OMP_NUM_THREADS": "1",
    # oneMKL's products of one or two rows have other bits at other alignments of their arguments, unless told not to:
    # equal bits of two servers would be luck.
    "MKL_CBWR": "AUTO",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Any, timeout: float, what: str, every: float = 0.05) -> Any:
    """Poll until `condition()` is truthy and return it; AssertionError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"{what}: not within {timeout} s")


@contextlib.contextmanager
def running(data_dir: Path, *args: str) -> Iterator[Server]:
    """A server that is ready, and ends well with the block."""
    server = Server(data_dir, *args)
    try:
        yield server
    finally:
        status = server.stop()
    assert status == 0, server.tail()


class Server:
    """`python -m alchemist.server` with the given arguments, on a free port, its output in `log`."""

    def __init__(
        self, data_dir: Path, *args: str, wait: bool = True, env: dict[str, str] | None = None
    ) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.with_suffix(f".{self.port}.log")
        command = [
            sys.executable,
            "-m",
            "alchemist.server",
            "--port",
            str(self.port),
            "--data-dir",
            str(data_dir),
        ]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *args],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, **_ENVIRONMENT, **(env or {})},
                # A signal for the tests' process group is not one for the server.
                start_new_session=True,
            )
        self.http = httpx.Client(base_url=self.url, timeout=120)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.tail()}"
            try:
                return self.http.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_for(is_ready, BOOT_S, "ready", every=0.25)
        except AssertionError as error:
            tail = self.tail()
            self.stop()
            raise AssertionError(f"{error}\n{tail}") from None

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def child(self, word: str) -> psutil.Process | None:
        """The oldest process of the server with `word` in its command line."""
        for process in sorted(self.children(), key=lambda p: p.pid):
            # Some live for a moment only, such as what is asked for the processor's name.
            with contextlib.suppress(psutil.NoSuchProcess):
                if word in " ".join(process.cmdline()):
                    return process
        return None

    def trainer_pid(self) -> int | None:
        return self.training()["trainer"]["pid"]

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(timeout)
            # It never fails a request, so nobody else would see it.
            assert "recording has failed" not in self.log.read_text(errors="replace"), self.tail()
            return status
        except subprocess.TimeoutExpired:
            for child in self.children():
                child.kill()
            self.process.kill()
            raise AssertionError(f"the server did not end:\n{self.tail()}") from None

    # Requests

    def chat(self, text: str, **options: Any) -> dict[str, Any]:
        """One answer, the whole response object."""
        body = {
            "model": "alchemist-tiny",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 32,
            "temperature": 0.0,
            **options,
        }
        response = self.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def vote(self, completion_id: str, rating: Any = "up", **fields: Any) -> dict[str, Any]:
        response = self.http.post(
            "/v1/feedback", json={"completion_id": completion_id, "rating": rating, **fields}
        )
        assert response.status_code in (200, 201), response.text
        return response.json()

    def training(self) -> dict[str, Any]:
        return self.http.get("/v1/training").json()

    def versions(self) -> list[dict[str, Any]]:
        """All of them, the oldest first, page by page."""
        found: list[dict[str, Any]] = []
        params: dict[str, Any] = {"limit": 100, "order": "asc"}
        while True:
            page = self.http.get("/v1/versions", params=params).json()
            found += page["data"]
            if not page["has_more"]:
                return found
            params["after"] = found[-1]["id"]

    def receipt(self, completion_id: str) -> dict[str, Any]:
        response = self.http.get(
            f"/v1/completions/{completion_id}/receipt", params={"tokens": "true"}
        )
        assert response.status_code == 200, response.text
        return response.json()

    def flush(self, timeout: float = 120.0) -> dict[str, Any]:
        """Train what is pending and wait until nothing is."""
        assert self.http.post("/v1/training/flush").status_code == 200

        def is_done() -> dict[str, Any] | None:
            status = self.training()
            return status if status["pending"] == 0 and status["state"] == "idle" else None

        try:
            return wait_for(is_done, timeout, "flush")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.training()}\n{self.tail()}") from None
