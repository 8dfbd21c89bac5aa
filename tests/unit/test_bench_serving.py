"""The serving benchmark: what its options start, and which rows its figures become."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from alchemist.server.main import TINY_MODEL

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench_common import Run
from bench_serving import GROUPS, LEVELS, wanted
from process_figures import wait_quiet
from serving_load import Load, Timing
from serving_report import Measured, Slo, report_group
from serving_servers import difference

FIRST, SECOND = (list(group) for group in GROUPS)


@pytest.mark.parametrize(
    ("quick", "only", "groups", "levels", "has_base"),
    [
        (False, None, [FIRST, SECOND], list(LEVELS), True),
        (True, None, [FIRST], [], True),
        (False, "ttft_p50_recording", [["recording"]], [], True),
        (False, "ttft_p50_unrecorded_at25", [["recording", "unrecorded"]], [25], False),
        (False, "ttft_p50_again,tpot_p50_paused", [["again", "idle", "paused"]], [], True),
        (False, "revoke_p99_ms,longest_stretch_ms", [["idle"]], [], True),
        (False, "slo_met,slo_train_share", [["slo"]], [50], False),
        (False, "slo_met_at90", [["slo"]], [90], False),
        (False, "ttft_p50_idle_at25,ttft_p50_none_at75", [["idle"], ["none"]], [25, 75], False),
        (False, "ttft_p99_idle,slo_met", [["idle"], ["slo"]], [50], True),
        (False, "saturation_rate", [[]], [], False),
        (False, "ttft_p50_plain", [[]], [], True),
    ],
)
def test_only_what_its_rows_need_is_started(quick, only, groups, levels, has_base):
    options = argparse.Namespace(quick=quick, only=only)
    assert wanted(options) == (groups, levels, has_base)


def test_twins_get_other_prompts_at_the_same_moments(monkeypatch):
    """What is in the server's radix cache by the one would answer the other."""
    load = Load(str(TINY_MODEL), input_len=8, output_len=1)
    sent = []

    async def request(url, prompt, body):
        sent.append((prompt, np.random.get_state()[1:3], body))
        return Timing(1.0, 1.0)

    monkeypatch.setattr(load, "_request", request)
    for prompts in (0, 0, 1):
        load.run("http://server", 3, 1e6, seed=4, prompts=prompts, body={"a": prompts})
    first, same, other = sent[:3], sent[3:6], sent[6:]
    assert [prompt for prompt, _, _ in first] == [prompt for prompt, _, _ in same]
    assert not {tuple(p) for p, _, _ in first} & {tuple(p) for p, _, _ in other}
    assert [(key[0], at) for _, (key, at), _ in first] == [
        (key[0], at) for _, (key, at), _ in other
    ]
    assert [body for _, _, body in other] == [{"a": 1}] * 3


def test_the_gate_allows_rounding_and_names_what_is_more():
    expected = [[(5, -0.25), (6, -1.5)], [(7, -2.0)]]
    assert difference([[(5, -0.25001), (6, -1.5)], [(7, -2.00002)]], expected) is None
    said = difference([[(5, -0.25), (6, -1.5)], [(7, -2.01)]], expected)
    assert said == "answer 1, token 0: (7, -2.01), expected (7, -2.0)"
    said = difference([[(5, -0.25), (8, -1.5)], [(7, -2.0)]], expected)
    assert said.startswith("answer 0, token 1: (8, -1.5)")


def test_targets_become_flags_and_judge_requests():
    slo = Slo(100.0, 0.0)
    assert slo.flags == ["--slo-ttft-ms", "100.00"]
    assert slo.is_met(Timing(100.0, 1e9))
    assert not slo.is_met(Timing(100.1, 0.0))
    assert Slo(0.0, 0.0).is_open
    both = Slo(100.0, 10.0)
    assert both.is_met(Timing(99, 9))
    assert not both.is_met(Timing(99, 11))


def rows(found: Measured, slo: Slo) -> dict[str, object]:
    run = Run("serving", argparse.Namespace(only=None))
    report_group(run, found, slo, burst=8)
    return {row.name: row for row in run.rows}


def test_ratios_are_over_plain_of_the_same_load_and_group():
    found = Measured(["plain", "slo"], is_first=False, starts=1)
    for at, plain, ours in ((None, 10.0, 11.0), (50, 20.0, 30.0)):
        for _ in range(3):
            found.add("plain", at, [Timing(plain, 2.0)] * 4)
            found.add("slo", at, [Timing(ours, 3.0)] * 4)
    found.add("slo", -1, [Timing(1e9, 1e9)])
    found.add_share("slo", 50, 0.4)
    found.add_share("slo", 50, 0.6)
    found.add_recorded("slo", 50, 1.0)
    found.add_recorded("slo", 50, 0.5)
    named = rows(found, Slo(25.0, 5.0))
    assert named["ttft_p50_slo"].value == pytest.approx(1.1)
    assert named["ttft_p50_slo_at50"].value == pytest.approx(1.5)
    assert named["tpot_p99_slo_at50"].value == pytest.approx(1.5)
    assert named["slo_met"].value == named["slo_met_at50"].value == 0.0
    assert named["slo_met"].ok is False
    assert named["slo_met_plain_at50"].value == 1.0
    assert (named["slo_train_share"].value, named["slo_train_share"].ok) == (0.5, True)
    assert named["recorded_slo_at50"].value == 0.75
    # Plain's own figures are the first group's.
    assert "ttft_p50_plain" not in named
    assert not any("-1" in name for name in named)


def test_pairs_are_of_one_prompt_and_arrival():
    """Half of plain's requests meet others, and so do ours: each takes a tenth more than its own."""
    found = Measured(["plain", "recording"], is_first=True, starts=1)
    found.add("plain", None, [Timing(10.0, 2.0), Timing(40.0, 2.0), Timing(41.0, 0.0)])
    found.add("recording", None, [Timing(11.0, 2.0), Timing(44.0, 2.0), Timing(45.1, 0.0)])
    named = rows(found, Slo(0.0, 0.0))
    assert named["ttft_pair_recording"].value == pytest.approx(1.1)
    assert named["tpot_pair_recording"].value == pytest.approx(1.0)


@pytest.mark.parametrize(("starts", "width"), [(1, 0.0), (3, 0.2)])
def test_spreads_are_those_of_the_starts_where_there_were_several(starts, width):
    """Turns of one start agree, starts do not: what varies is drawn together."""
    found = Measured(["plain", "recording"], is_first=True, starts=starts)
    for ours in (9.0, 10.0, 12.0):
        for _ in range(25):
            found.add("plain", None, [Timing(10.0, 1.0)])
            found.add("recording", None, [Timing(ours, 1.0)])
    row = rows(found, Slo(0, 0))["ttft_p50_recording"]
    assert row.value == pytest.approx(1.0)
    assert row.spread[1] - row.spread[0] == pytest.approx(width)


WORKS = """
import time, sys
end = time.monotonic() + float(sys.argv[1])
print("works", flush=True)
while time.monotonic() < end: pass
time.sleep(60)
"""


@pytest.mark.parametrize("is_child", [False, True])
def test_a_turn_begins_when_a_server_and_its_children_rest(is_child):
    args = [sys.executable, "-c", WORKS, "1.5"]
    if is_child:
        run = "import subprocess, sys; subprocess.run(sys.argv[1:])"
        args = [sys.executable, "-c", run, *args]
    with subprocess.Popen(args, start_new_session=True, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout.readline() == b"works\n"
            started = time.monotonic()
            wait_quiet(server.pid)
            assert time.monotonic() - started > 1.0
            wait_quiet(server.pid, patience_s=1.0)
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def test_a_server_that_does_not_come_to_rest_is_named():
    args = [sys.executable, "-c", WORKS, "60"]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout.readline() == b"works\n"
            with pytest.raises(TimeoutError, match=f"process {server.pid} .* busy for 1 s"):
                wait_quiet(server.pid, patience_s=1.0)
        finally:
            server.kill()
