"""What a vote gives the trainer to learn from: the answer with its label, and the correction if there is one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from alchemist.protocol import messages
from alchemist.server.records import Completion, TrainingItem

logger = logging.getLogger(__name__)


def train_samples(
    items: Sequence[TrainingItem], objective: str, tokenizer: Any
) -> tuple[list[messages.TrainSample], dict[str, str]]:
    """The samples of all votes but of those of which none can be made; these, and why: feedback id → reason. One whose
    pair has lost its other answer fails with it.
    """
    found: list[tuple[TrainingItem, list[messages.TrainSample]]] = []
    failed: dict[str, str] = {}
    lost: set[str] = set()
    for item in items:
        try:
            found.append((item, _samples(item, objective, tokenizer)))
        except Exception as error:
            # Whatever it is: no vote may keep others from being trained.
            logger.exception("feedback %s cannot be trained", item.feedback_id)
            failed[item.feedback_id] = f"no sample can be made of it: {error}"
            lost |= {item.match} - {""}
    samples: list[messages.TrainSample] = []
    for item, own in found:
        if item.match in lost:
            failed[item.feedback_id] = "no sample can be made of the other answer of its pair"
        else:
            samples += own
    return samples, failed


def _samples(item: TrainingItem, objective: str, tokenizer: Any) -> list[messages.TrainSample]:
    """The samples of one vote.

    A corrected answer is the rejected one of its pair, whatever its vote; objective `sft` learns from the
    correction instead of the answer.
    """
    completion, is_corrected = item.completion, item.correction is not None
    answers: list[tuple[list[int], bool, bool]] = []
    if not is_corrected or objective != "sft":
        label = item.label and not (is_corrected and item.match)
        answers.append((completion.response_ids, label, False))
    if item.correction is not None:
        answers.append((correction_ids(item.correction, completion, tokenizer), True, True))
    prompt = messages.pack_ids(completion.prompt_ids)
    return [
        messages.TrainSample(
            feedback_id=item.feedback_id,
            completion_id=completion.id,
            label=label,
            prompt_ids=prompt,
            response_ids=messages.pack_ids(ids),
            version=completion.version,
            extra_key=completion.extra_key,
            is_correction=is_correction,
            match=item.match,
        )
        for ids, label, is_correction in answers
    ]


def correction_ids(text: str, completion: Completion, tokenizer: Any) -> list[int]:
    """Token ids of a corrected answer; it ends the way the served one did, if that one ended by itself."""
    if tokenizer is None:
        raise ValueError("a correction needs a tokenizer, and this server has none")
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    end = tokenizer.eos_token_id
    if completion.finish_reason == "stop" and completion.response_ids:
        end = completion.response_ids[-1]
    return [*ids, end] if end is not None else ids
