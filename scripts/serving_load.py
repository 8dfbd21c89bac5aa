"""The load of `bench_serving.py`: the requests of SGLang's own benchmark client, sent a few at a time.

SGLang's command line spends seconds around every run, so it cannot take short turns between servers; it warms up with
the first prompt, which then is in the radix cache; and its random prompts are runs of consecutive ids, of which a small
vocabulary has too few: late in a run every third prompt would share a prefix with an earlier one. Its request function
and its arrival process have none of that.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """What the client saw of one request, in milliseconds."""

    ttft: float
    tpot: float
    """mean of its own inter-token latencies"""


class Load:
    """Requests of one shape: random token ids, so that no prefix is ever shared; greedy, of fixed length."""

    def __init__(self, model: str, input_len: int, output_len: int) -> None:
        """Args:
        model: directory with the tokenizer.
        """
        # Slow to import.
        from transformers import AutoTokenizer

        serving = _benchmark_client()
        self._serving: Any = serving
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._input_len, self.output_len = input_len, output_len
        serving.set_global_args(
            argparse.Namespace(
                temperature=0.0,
                top_p=1.0,
                disable_ignore_eos=False,
                disable_stream=False,
                return_logprob=False,
                return_routed_experts=False,
                logprob_start_len=-1,
                top_logprobs_num=0,
                token_ids_logprob=None,
            )
        )

    def run(
        self,
        url: str,
        requests: int,
        rate: float,
        seed: int,
        *,
        prompts: int = 0,
        body: Mapping[str, Any] | None = None,
    ) -> list[Timing]:
        """Send `requests` to the server at `url`, `rate` a second, Poisson, and wait for all.

        Args:
            seed: the same one gives the same prompts and arrivals.
            prompts: another number gives other prompts that arrive at the same moments.
            body: more fields of every request.

        Raises:
            RuntimeError: a request failed.
        """
        draw = np.random.default_rng((seed, prompts))
        size = (requests, self._input_len)
        each = draw.integers(10, len(self._tokenizer), size).tolist()
        # By it the arrivals are drawn.
        np.random.seed(seed)
        return asyncio.run(self._run(url, each, rate, dict(body or {})))

    async def _run(
        self, url: str, prompts: list[list[int]], rate: float, body: dict[str, Any]
    ) -> list[Timing]:
        tasks = [
            asyncio.create_task(self._request(url, prompt, body))
            async for prompt in self._serving.get_request(prompts, rate)
        ]
        return list(await asyncio.gather(*tasks))

    async def _request(self, url: str, prompt: list[int], body: dict[str, Any]) -> Timing:
        done = await self._serving.async_request_sglang_generate(
            self._serving.RequestFuncInput(
                prompt=prompt,
                api_url=f"{url}/generate",
                prompt_len=self._input_len,
                output_len=self.output_len,
                model="",
                lora_name=None,
                image_data=None,
                extra_request_body=body,
            )
        )
        if not done.success:
            raise RuntimeError(f"a request to {url} failed: {done.error}")
        return Timing(done.ttft * 1e3, sum(done.itl) / max(1, len(done.itl)) * 1e3)


def _benchmark_client() -> Any:
    """SGLang's `benchmark.serving`. It imports the package `datasets` for an image benchmark that we do not run; where
    that is not installed, an empty module takes its place for as long as the import lasts.
    """
    is_there = importlib.util.find_spec("datasets") is not None
    if not is_there:
        empty = types.ModuleType("datasets")
        empty.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        empty.__dict__["load_dataset"] = None
        sys.modules["datasets"] = empty
    try:
        return importlib.import_module("sglang.benchmark.serving")
    finally:
        if not is_there:
            del sys.modules["datasets"]
