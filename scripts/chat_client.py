"""A user of a running server over plain HTTP: chat, vote, watch the training, score under the base.

Chat goes through the official `openai` client, everything else through `httpx`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx
from openai import AsyncOpenAI

LIVE = "default"
"""A model name that pins nothing: the live version answers."""
MAX_ANSWER_TOKENS = 96
IDLE_LOOKS = 4
"""Quarter seconds without a step after which no pair is left to train."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`version` is the one that served the answer; `text` is empty if it said nothing."""

    completion_id: str
    version: str
    text: str


class ChatClient:
    """One server, any number of concurrent callers. Use as an async context manager.

    Every method raises `httpx.HTTPError` or `openai.APIError` when the server refuses or is gone.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=120)
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key or "none", timeout=120)

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()
        await self._openai.close()

    async def ask(self, question: str, temperature: float, model: str = LIVE) -> Answer:
        """One question in a conversation of its own; `model` as the server takes it."""
        completion = await self._openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=temperature,
            max_tokens=MAX_ANSWER_TOKENS,
        )
        metadata = (completion.model_extra or {}).get("metadata") or {}
        text = completion.choices[0].message.content or ""
        return Answer(completion.id, str(metadata.get("weight_version", "?")), text)

    async def vote(self, completion_id: str, rating: str, correction: str | None = None) -> None:
        """Up or down, and what the answer should have been; on return the vote is on the server's disk."""
        body = {"completion_id": completion_id, "rating": rating}
        if correction is not None:
            body["correction"] = correction
        await self._post("/v1/feedback", body)

    async def training(self) -> dict[str, Any]:
        """State, step, live version and counts of votes, as `GET /v1/training` has them."""
        response = await self._http.get("/v1/training")
        return response.raise_for_status().json()

    async def flush(self, timeout: float) -> dict[str, Any]:
        """Train what is pending now and wait until it is done; the training status after it.

        With objective dpo a vote without a partner stays pending for ever, and the status does not tell how many
        do: there it is done when the trainer has had nothing to do for a few looks.

        Raises:
            TimeoutError: votes are still pending after `timeout` seconds.
        """
        await self._post("/v1/training/flush", {})
        deadline, idle_looks = time.monotonic() + timeout, 0
        while (status := await self.training())["pending"]:
            idle_looks = idle_looks + 1 if status["state"] == "idle" else 0
            if status["objective"] == "dpo" and idle_looks == IDLE_LOOKS:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{status['pending']} votes pending {timeout:.0f} s after a flush"
                )
            await asyncio.sleep(0.25)
        return status

    async def kl_to_base(self, completion_id: str) -> list[float]:
        """log p_version − log p_base of each response token, in nats, at temperature 1.

        The mean over answers sampled at temperature 1 estimates the KL divergence per token.

        Raises:
            ValueError: no logprobs were kept, or other tokens were scored than were answered.
        """
        receipt = await self._receipt(completion_id)
        prompt, answer = receipt["prompt_token_ids"], receipt["response_token_ids"]
        scored = await self._post(
            "/generate",
            {
                "input_ids": prompt + answer,
                "lora_path": "base",
                "return_logprob": True,
                "logprob_start_len": len(prompt) - 1,
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            },
        )
        # Entries are (logprob, token id, text), one per input token from logprob_start_len on.
        base = scored["meta_info"]["input_token_logprobs"][-len(answer) :]
        # SGLang writes 0 for the vocabulary's last token.
        if any(entry[1] not in (token, 0) for entry, token in zip(base, answer, strict=True)):
            raise ValueError(f"/generate scored other tokens than the receipt of {completion_id}")
        served = receipt["response_logprobs"]
        return [p - entry[0] for p, entry in zip(served, base, strict=True)]

    async def _receipt(self, completion_id: str) -> dict[str, Any]:
        # An answer reaches the user a moment before the server has stored it.
        path = f"/v1/completions/{completion_id}/receipt"
        for _ in range(40):
            response = await self._http.get(path, params={"tokens": "true"})
            if response.is_success and response.json().get("response_logprobs"):
                return response.json()
            await asyncio.sleep(0.25)
        response.raise_for_status()
        raise ValueError(f"the receipt of {completion_id} has no response_logprobs")

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._http.post(path, json=body)
        return response.raise_for_status().json()
