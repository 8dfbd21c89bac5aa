"""Rows in eight bits, live: tokens as without recording, votes, versions, and steps that are off by the rounding."""

from __future__ import annotations

from test_kv_formats import round_of


def test_a_round_with_rows_in_eight_bits(tmp_path):
    # No number is off by more than 2^-4 of itself, or of a thousandth of its row's largest, and the errors of many
    # numbers cancel in part. Exact rows are within 1e-4.
    errors = round_of(tmp_path, "--activation-dtype", "fp8", tolerance=2**-4)
    assert min(errors) > 1e-4
