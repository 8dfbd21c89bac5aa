"""Log-probabilities of what is sampled, as the model gives them: untempered and unpenalised.

They are read when a request ends. On a CPU the calls cost a small model's decode step more than their numbers do, so
logits are put aside, as far as `ASIDE_BYTES` go, and many steps' are computed together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from alchemist.protocol.streams import copied

logger = logging.getLogger(__name__)

ASIDE_BYTES = 1 << 20
"""Of logits that wait: of the embedded model's 1536 words 170 tokens', of 150 000 words one token's."""
_NUM_ENDED = 4096
"""Requests whose end is remembered: a step that was under way may still sample for one."""


class _Step:
    """Tokens of one batch."""

    def __init__(self, values: Tensor | list[float] | None = None) -> None:
        """Args:
        values: [batch] log-probabilities, of a tensor once the device has come so far; None: not computed yet.
        """
        self.values = values


class Sampled:
    """Of the requests in flight; trouble is logged once, and costs log-probabilities."""

    def __init__(self) -> None:
        self._of: dict[str, list[tuple[int, _Step, int]]] = {}
        """By request: sequence length, and the token's place in its batch."""
        self._aside: list[tuple[_Step, Tensor, Tensor]] = []
        """Steps, their logits and what was sampled."""
        self._num_aside_bytes = 0
        self._ended: dict[str, None] = {}
        self._has_complained = False

    def began(self, rids: Iterable[str]) -> None:
        """Requests have come; their ids may be those of earlier ones."""
        for rid in rids:
            self._ended.pop(rid, None)

    def before(self, logits: Tensor) -> Tensor | None:
        """What `after` needs of [batch, vocab] logits: the sampler may change them. None: there is no memory for it."""
        try:
            return logits.clone() if _can_wait(logits) else torch.log_softmax(logits.float(), -1)
        except RuntimeError as error:
            self._complain(error)
            return None

    def after(self, batch: Any, kept: Tensor, token_ids: Tensor) -> None:
        """`token_ids` [batch] were sampled.

        Args:
            kept: as `before` gave it.
        """
        if batch.rids is None:
            return
        try:
            step = self._step(kept, token_ids)
        except RuntimeError as error:
            self._complain(error)
            return
        lengths = (batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu).tolist()
        for place, (rid, length) in enumerate(zip(batch.rids, lengths, strict=False)):
            if rid not in self._ended:
                self._of.setdefault(rid, []).append((length, step, place))

    def _step(self, kept: Tensor, token_ids: Tensor) -> _Step:
        if not _can_wait(kept):
            picked = kept.gather(1, token_ids.long()[:, None])[:, 0]
            return _Step(copied(picked) if picked.is_cuda else picked.tolist())
        if len(token_ids) != len(kept):
            raise RuntimeError(f"{len(token_ids)} tokens of {len(kept)} rows of logits")
        if self._num_aside_bytes + kept.nbytes > ASIDE_BYTES:
            self._compute()
        step = _Step()
        self._aside.append((step, kept, token_ids.clone()))
        self._num_aside_bytes += kept.nbytes
        return step

    def ended(self, rid: str) -> Noted:
        """The request is over; what was noted of it."""
        self._ended[rid] = None
        if len(self._ended) > _NUM_ENDED:
            del self._ended[next(iter(self._ended))]
        noted = self._of.pop(rid, [])
        if self._aside and any(step.values is None for _, step, _ in noted):
            try:
                self._compute()
            except RuntimeError as error:
                self._complain(error)
        return Noted(noted)

    def clear(self) -> None:
        """No request is in flight: what is left belongs to nobody."""
        self._of.clear()
        self._aside.clear()
        self._num_aside_bytes = 0

    def _compute(self) -> None:
        """All that was put aside."""
        aside, self._aside, self._num_aside_bytes = self._aside, [], 0
        steps, logits, token_ids = zip(*aside, strict=True)
        raw = torch.log_softmax(torch.cat(logits).float(), -1)
        picked = raw.gather(1, torch.cat(token_ids).long()[:, None])[:, 0].tolist()
        start = 0
        for step, own in zip(steps, token_ids, strict=True):
            step.values = picked[start : start + len(own)]
            start += len(own)

    def _complain(self, error: Exception) -> None:
        if not self._has_complained:
            self._has_complained = True
            logger.error("log-probabilities of some answers are missing: %s", error)


def _can_wait(logits: Tensor) -> bool:
    return not logits.is_cuda and logits.nbytes <= ASIDE_BYTES


class Noted:
    """Log-probabilities of one request that has ended."""

    def __init__(self, noted: list[tuple[int, _Step, int]]) -> None:
        self._noted = noted

    def of_answer(self, prompt_tokens: int, output_tokens: int) -> list[float]:
        """[output_tokens]; NaN: not known. On a GPU what was enqueued by the request's end has to be complete."""
        found = [float("nan")] * output_tokens
        for length, step, place in self._noted:
            # A prefill chunk before the last samples a token nobody uses: its length is below the prompt's.
            index = length - prompt_tokens
            if step.values is not None and 0 <= index < output_tokens:
                found[index] = float(step.values[place])
        return found
