"""Messages: what goes in comes out; anything else is refused with one kind of error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alchemist.protocol import messages as m
from alchemist.protocol.errors import PeerProtocolError

SAMPLES = [
    m.Stop(),
    m.CheckedOut(
        ticket=3,
        places=[
            None,
            m.Places(slots=b"1", rows=b"2", gens=b"3", hedge_rows=b"4", hedge_gens=b"5"),
        ],
    ),
    m.Train(
        step=1,
        parent=0,
        version=1,
        samples=[
            m.TrainSample(
                feedback_id="f",
                completion_id="c",
                label=True,
                prompt_ids=m.pack_ids([1, 2]),
                response_ids=m.pack_ids([3]),
                version=0,
                extra_key=None,
            )
        ],
    ),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda s: type(s).__name__)
def test_round_trip(message):
    assert m.decode_to_trainer(m.encode(message)) == message


@pytest.mark.parametrize("decode", [m.decode_to_main, m.decode_to_trainer, m.decode_to_scheduler])
@given(data=st.binary(max_size=200))
def test_random_bytes_raise_only_protocol_errors(decode, data):
    with pytest.raises(PeerProtocolError):
        decode(data)


def test_a_message_for_somebody_else_is_refused():
    with pytest.raises(PeerProtocolError, match="undecodable"):
        m.decode_to_scheduler(m.encode(m.Stop()))


@given(ids=st.lists(st.integers(0, 2**31 - 1)))
def test_token_ids_survive_packing(ids):
    assert m.unpack_ids(m.pack_ids(ids)) == ids


@given(values=st.lists(st.floats(width=32, allow_nan=False)))
def test_logprobs_survive_packing(values):
    assert m.unpack_floats(m.pack_floats(values)) == values
