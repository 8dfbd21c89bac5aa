"""What the capacity benchmark sends and makes of SGLang's figures; how a server is given its memory for activations."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from activation_options import activation_rows, budget_flags
from bench_capacity import (
    BAR,
    PARTS,
    Played,
    body,
    build_trace,
    difference,
    require_saturated,
    rows,
)
from sglang_figures import batches, metric_sums

from alchemist.server import options

LOG = """\
[2026-11-21 17:22:01] Prefill batch, #new-seq: 3, #new-token: 410, #cached-token: 128, token usage: 0.00, \
#running-req: 0, #queue-req: 5, #pending-token: 900, cuda graph: False, input throughput (token/s): 41.00
[2026-11-21 17:22:02] Decode batch, #running-req: 3, #token: 541, token usage: 0.13, cuda graph: False, \
gen throughput (token/s): 30.10, #queue-req: 5
[2026-11-21 17:22:02] Prefill batch, #new-seq: 1, #new-token: 90, #cached-token: 64, token usage: 0.13, \
#running-req: 3, #queue-req: 4, #pending-token: 700, cuda graph: False, input throughput (token/s): 50.00
[2026-11-21 17:22:03] Decode batch, #running-req: 4, #token: 700, token usage: 0.17, cuda graph: False, \
gen throughput (token/s): 31.00, #queue-req: 4
[2026-11-21 17:22:04] Decode batch, #running-req: 2, #token: 300, token usage: 0.07, cuda graph: False, \
gen throughput (token/s): 31.00, #queue-req: 0
"""


def test_batches_of_a_log():
    found = batches(LOG)
    assert found._asdict() == {
        "peak_tokens": 700,
        "peak_running": 4,
        "peak_queue": 5,
        "prefills": 2,
        "decodes": 3,
        "admissions": 4,
        "new_tokens": 500,
        "cached_tokens": 192,
    }


def test_a_log_without_batches_is_refused():
    with pytest.raises(ValueError, match="0 prefill and 0 decode"):
        batches("INFO: started\n")


def test_metrics_are_summed_over_labels_without_buckets():
    text = (
        "# TYPE sglang:evicted_tokens_total counter\n"
        'sglang:evicted_tokens_total{cache_type="A"} 5.0\n'
        'sglang:evicted_tokens_total{cache_type="B"} 7.0\n'
        "# TYPE wait histogram\n"
        'wait_bucket{le="1.0"} 3.0\n'
        'wait_bucket{le="+Inf"} 4.0\n'
        "wait_sum 2.5\nwait_count 4.0\n"
    )
    found = metric_sums(text)
    assert found["sglang:evicted_tokens_total"] == 12
    assert found["wait_sum"] == 2.5
    assert "wait_bucket" not in found


def test_trace_grows_from_one_beginning():
    trace = build_trace(5, 3)
    assert trace == build_trace(5, 3)
    assert trace != build_trace(5, 3, seed=1)
    system = trace[0][0].input_ids[:64]
    for asks in trace:
        assert asks[0].input_ids[:64] == system
        for before, after in pairwise(asks):
            assert after.input_ids[: len(before.input_ids)] == before.input_ids
            # The answer and the next question lie between.
            grown = len(after.input_ids) - len(before.input_ids)
            assert before.max_new_tokens + 40 <= grown <= before.max_new_tokens + 200
    assert len({tuple(asks[0].input_ids) for asks in trace}) == 5


def test_batch_request_fixes_the_length_of_every_answer():
    asks = [asks[0] for asks in build_trace(3, 1)]
    asked = body(asks)
    assert asked["input_ids"] == [ask.input_ids for ask in asks]
    for ask, sampling in zip(asks, asked["sampling_params"], strict=True):
        assert sampling == {
            "max_new_tokens": ask.max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }


def played(**parts):
    return Played(dict.fromkeys(PARTS, 100.0) | parts, [[1, 2], [3]], 0.5, {"activations": {}})


def test_capacity_is_the_worst_part():
    assert difference(101, 100) == 1
    assert difference(99, 100) == 1
    assert difference(3, 0) == 300
    found = {
        row.name: row
        for row in rows(
            {
                "plain": played(),
                "plain_again": played(),
                "recording": played(evicted_tokens=99.0, peak_tokens=100.2),
            }
        )
    }
    row = found["capacity_vs_plain"]
    assert (row.value, row.bar, row.ok) == (pytest.approx(1), BAR, False)
    assert "evicted_tokens" in row.against
    assert found["capacity_plain_again_vs_plain"].value == 0
    assert found["evicted_tokens_recording"].value == 99
    assert found["answers_differ_recording"].value == 0


def test_in_a_closed_loop_there_is_no_bar():
    found = rows({"plain": played(), "recording": played(prefills=90.0)}, is_closed=True)
    by_name = {row.name: row for row in found}
    assert all(name.startswith("closed_") for name in by_name)
    assert by_name["closed_capacity_vs_plain"].value == pytest.approx(10)
    assert by_name["closed_capacity_vs_plain"].bar is None


def test_an_unsaturated_run_is_refused():
    full = played(peak_tokens=95.0, max_total_tokens=100.0)
    require_saturated(full)
    with pytest.raises(SystemExit, match="50% of the pool"):
        require_saturated(played(peak_tokens=50.0, max_total_tokens=100.0))
    with pytest.raises(SystemExit, match="0 tokens were evicted"):
        require_saturated(full._replace(parts=full.parts | {"evicted_tokens": 0.0}))


@pytest.mark.parametrize("host_gb", [0.0, 0.25, 2.0])
def test_budget_flags_are_options_of_the_server(host_gb):
    found, sglang_argv = options.parse(budget_flags(host_gb, 0.5), {})
    assert sglang_argv == []
    assert found.activation_host_bytes == host_gb * 2**30
    assert found.activation_device_fraction == 0.5


def test_rows_of_activations():
    status = {
        "activations": {
            "rows": {"device": 5, "host": 7},
            "reclaim_p99_us_per_1000": 120.5,
            "slots_borrowed": 10,
            "p50": None,
            "policy": "value",
            "is_full": True,
        }
    }
    found = {row.name: row for row in activation_rows(status)}
    assert list(found) == [
        "activations_rows_device",
        "activations_rows_host",
        "reclaim_p99_us_per_1000",
        "activations_slots_borrowed",
    ]
    assert found["activations_rows_host"].value == 7
    assert found["reclaim_p99_us_per_1000"].ok is False
    assert found["activations_slots_borrowed"].unit == "slots"
    assert activation_rows({"activations": {}}) == []
