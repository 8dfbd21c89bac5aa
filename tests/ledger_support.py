"""What tests put into a ledger."""

from __future__ import annotations

from alchemist.server.ledger import Ledger
from alchemist.server.records import Completion, Vote


def completion(rid: str = "c1", **changes) -> Completion:
    fields = {
        "id": rid,
        "version": 0,
        "prompt_ids": [1, 2, 3],
        "response_ids": [4, 5],
        "response_logprobs": [-0.5, -0.25],
        "sampling": {"temperature": 0.5},
        "finish_reason": "stop",
    }
    return Completion(**{**fields, **changes})


def vote(ledger: Ledger, rid: str = "c1", rating: int = 1, **changes):
    return ledger.put_feedback(Vote(completion_id=rid, rating=rating, **changes)).result()
