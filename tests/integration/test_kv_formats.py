"""KV caches of other shapes than the usual one: pages of several slots, and elements narrower than the activations.

Recorded rows lie in the cache's slots whatever these hold, so each format is taken through a whole round: tokens equal
to those of a server that records nothing, a vote, a version, and a step that is the one computed outside.
"""

from __future__ import annotations

import pytest
import torch
from conftest import SGD
from live import running
from test_recording_changes_nothing import answers
from test_step_from_outside import train_and_compare


def round_of(tmp_path, *flags, tolerance, kv_dtype=torch.float32):
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
            step, _, error = train_and_compare(server, kv_dtype)
            reused, computed = step["tokens_reused"], step["tokens_recomputed"]
            assert reused > computed
            assert error <= tolerance
            errors.append(error)
        assert server.training()["live_version"] == "v2"
    return errors


def test_pages_of_four_slots(tmp_path):
    round_of(tmp_path, "--page-size", "4", tolerance=1e-4)


# The computation outside rounds the served tokens' keys and values as the cache does. Sums of another order bring few
# of them to the format's next value.
@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [
        pytest.param("bf16", torch.bfloat16, marks=pytest.mark.slow),
        ("fp8_e4m3", torch.float8_e4m3fn),
        pytest.param("fp8_e5m2", torch.float8_e5m2, marks=pytest.mark.slow),
    ],
)
def test_keys_and_values_narrower_than_activations(tmp_path, name, kv_dtype):
    flags = ["--kv-cache-dtype", name, "--probe-tolerance", "0.5"]
    round_of(tmp_path, *flags, tolerance=0.005, kv_dtype=kv_dtype)
