"""KV caches of other shapes than the usual one: pages of several slots, and elements narrower than the activations.

Recorded rows lie in the cache's slots whatever these hold, so each format is taken through a whole round: tokens equal
to those of a server that records nothing, a vote, a version, and a step that is the one computed outside.
"""

from __future__ import annotations

import pytest
from conftest import SGD
from live import running
from test_recording_changes_nothing import answers
from test_step_from_outside import train_and_compare


def round_of(tmp_path, *flags, tolerance):
    """A server with `flags`; recording must change no token, and rows must make the gradient that there is. How far two
    steps were off.
    """
    plain = ["--record", "none", "--no-train", "--chunked-prefill-size", "256"]
    with running(tmp_path / "silent", *plain, *flags) as silent:
        expected = answers(silent)
    with running(tmp_path / "data", *SGD, "--record", "decode", *flags) as server:
        assert answers(server) == expected
        errors = []
        for parent in ("v0", "v1"):
            assert server.training()["live_version"] == parent
            step, _, error = train_and_compare(server)
            reused, computed = step["tokens_reused"], step["tokens_recomputed"]
            assert reused > computed
            assert error <= tolerance
            errors.append(error)
        assert server.training()["live_version"] == "v2"
    return errors


def test_pages_of_four_slots(tmp_path):
    round_of(tmp_path, "--page-size", "4", tolerance=1e-4)


# Serving and the recorded tokens' attention see keys and values rounded to the cache's format, the computation outside
# does not: the gradient is off by a few times the format's relative rounding error (2^-9, 2^-4, 2^-3), and by all of it
# where other bytes are taken for keys and values.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bf16", 0.05), ("fp8_e4m3", 0.2), ("fp8_e5m2", 0.3)]
)
def test_keys_and_values_narrower_than_activations(tmp_path, dtype, tolerance):
    flags = ["--kv-cache-dtype", dtype, "--probe-tolerance", "0.5"]
    round_of(tmp_path, *flags, tolerance=tolerance)
