"""Which version a completion is of: the scheduler's word counts, and SGLang's order of a batch's outputs."""

from types import SimpleNamespace

import pytest

from alchemist.protocol import messages
from alchemist.server.conversations import Conversations
from alchemist.server.errors import NotFound
from alchemist.server.front import _require_known_tokens, _version_of
from alchemist.server.publisher import Publisher


@pytest.fixture
def conversations(ledger):
    publisher = Publisher(None, 4, 0.1)
    publisher.loaded |= {3: "lora three", 5: "lora five"}
    return Conversations(ledger, publisher, lambda: None)


def finished(rid, lora_id):
    return messages.Finished(
        rid=rid,
        lora_id=lora_id,
        extra_key=lora_id,
        prompt_ids=messages.pack_ids([1]),
        output_ids=messages.pack_ids([2]),
        logprobs=messages.pack_floats([-1.0]),
        finish_reason="stop",
        prompt_recorded=0,
    )


@pytest.mark.parametrize(("lora_id", "version"), [(None, 0), ("lora three", 3), ("lora five", 5)])
async def test_a_completion_is_of_the_version_that_computed_it(
    ledger, conversations, lora_id, version
):
    conversations.saw("a", "v3", SimpleNamespace(sampling_params={}))
    conversations.finished(finished("a", lora_id))
    # What is written is written in the order in which it was asked for.
    ledger.release_batch().result()
    assert ledger.get_completion("a").result().version == version


async def test_a_completion_of_nobody_knows_what_is_not_kept(ledger, conversations):
    conversations.finished(finished("a", "gone"))
    ledger.release_batch().result()
    with pytest.raises(NotFound):
        ledger.get_completion("a").result()


@pytest.mark.parametrize(
    ("each", "versions", "expected"),
    [
        (1, ["v3"], ["v3", "v3", "v3", "v3"]),
        (1, ["v3", "v5"], ["v3", "v5"]),
        (2, ["v3", "v5"], ["v3", "v3", "v5", "v5"]),
    ],
)
def test_a_batch_has_all_answers_to_its_first_prompt_first(each, versions, expected):
    asked = SimpleNamespace(parallel_sample_num=each)
    places = range(len(expected))
    assert [_version_of(place, versions, asked) for place in places] == expected


@pytest.mark.parametrize("ids", [[0, 9], [[0, 9], [3]], [], None, [[]]])
def test_tokens_of_the_vocabulary_pass(ids):
    _require_known_tokens(SimpleNamespace(input_ids=ids), 10)


@pytest.mark.parametrize(("ids", "named"), [([0, 10], "10"), ([[0, 9], [-1]], "-1")])
def test_others_are_named(ids, named):
    with pytest.raises(ValueError, match=f"input_ids has {named}; allowed: 0 to 9"):
        _require_known_tokens(SimpleNamespace(input_ids=ids), 10)
