"""Votes become samples; one of which none can be made fails alone, with its pair."""

from ledger_support import completion

from alchemist.server.records import TrainingItem
from alchemist.server.samples import train_samples


def item(number, **changes):
    fields = {"label": True, "correction": None, "completion": completion(f"c{number}"), **changes}
    return TrainingItem(feedback_id=f"f{number}", **fields)


def test_a_correction_without_a_tokenizer_fails_alone():
    items = [item(0), item(1, correction="Hello!"), item(2)]
    samples, failed = train_samples(items, "kto", None)
    assert [sample.feedback_id for sample in samples] == ["f0", "f2"]
    assert list(failed) == ["f1"]
    assert "tokenizer" in failed["f1"]


def test_a_pair_fails_together():
    items = [
        item(0, match="m"),
        item(1, match="m", correction="Hello!"),
        item(2, match="n"),
        item(3),
    ]
    samples, failed = train_samples(items, "dpo", None)
    assert [sample.feedback_id for sample in samples] == ["f2", "f3"]
    assert sorted(failed) == ["f0", "f1"]
