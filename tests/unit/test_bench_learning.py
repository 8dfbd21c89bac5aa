"""What the learning benchmark makes of its runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench_learning import METRICS, SCENARIOS, VARIANTS, metrics, rows
from learning_report import compare, plot_curves
from simulate_users import parse

from alchemist.protocol.objectives import is_allowed


def result(liked, preferred=0.5, steps=2):
    return {
        "before": {"preferred": 0.25, "arithmetic": 0.9, "other": 0.8},
        "after": {"preferred": preferred, "arithmetic": 0.8, "other": 0.9},
        "kl_after": 0.1,
        "seconds_voting": 2.0,
        "votes": [{"liked": like} for like in liked],
        "training": {"step": steps, "trained": 3},
        "steps": [{"step_s": 0.5, "lease_wait_s": 0.1}],
    }


def test_metrics_of_a_run():
    found = metrics(result([True, False, True, True]))
    assert list(found) == list(METRICS)
    assert found["preferred"] == 50
    assert found["arithmetic"] == pytest.approx(-10)
    assert found["other"] == pytest.approx(10)
    assert found["seconds_per_vote"] == 0.5
    # Two steps, of which one was seen: 0.4 s each over four votes.
    assert found["train_seconds_per_vote"] == pytest.approx(0.2)


def test_rows_are_medians_over_seeds():
    runs = [result([True], preferred) for preferred in (0.2, 0.9, 0.4)]
    by_name = {row.name: row for row in rows("formal_kto", runs)}
    assert list(by_name) == [f"formal_kto_{metric}" for metric in METRICS]
    row = by_name["formal_kto_preferred"]
    assert (row.value, row.n, row.against) == (40, 3, "base model: 25.0 %")
    assert row.spread == pytest.approx((30, 65))


def test_variants_and_scenarios_are_options_that_exist():
    for variant in VARIANTS.values():
        assert is_allowed(variant.server["objective"])
        parse(list(variant.users))
    assert SCENARIOS["length"].rule.max_length is not None
    assert {parse(list(s.users)).noise for s in SCENARIOS.values()} == {0, 0.1, 0.3}


def test_report_of_runs_of_unequal_length(tmp_path):
    results = {
        ("formal", "kto"): [result([True] * 5), result([False] * 4)],
        ("keyword", "dpo"): [result([False] * 3)],
    }
    table = compare({key: metrics(runs[0]) for key, runs in results.items()}, METRICS)
    assert table.row_count == 2
    plot_curves(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
