"""The step part's gate: a gradient that is off costs the speeds, and nothing else."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_step
from gpu_part import Part
from gpu_rows import BY_NAME
from gpu_step import ERRORS, MEMORY, SIZES_OF_ROWS, Sizes, StepBench

GATES = [f"replay_gradient_{key}" for key in ("qwen3_8b", "llama31_8b")]


def run(tmp_path):
    options = argparse.Namespace(rows=tmp_path / "rows.json", device="cpu", tiny=True, seconds=600)
    StepBench(Part("step", options)).run()
    found = json.loads(options.rows.read_text())
    return {row["name"]: row for row in found["rows"]}, found["reasons"], found["config"]


def test_a_red_gate_costs_the_speeds_only(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_step, "GATE_MOST", 1e-9)
    monkeypatch.setitem(gpu_step.SIZES, True, Sizes(24, 4, 2, 1, 12, 1))
    rows, reasons, _ = run(tmp_path)
    assert set(rows) == {*ERRORS, *MEMORY, SIZES_OF_ROWS, *GATES}
    assert all(rows[gate]["value"] > 1 and rows[gate]["ok"] is False for gate in GATES)
    speeds = {name for name, spec in BY_NAME.items() if spec.part == "step"} - set(rows)
    assert set(reasons) >= speeds
    assert all("no speed counts" in reasons[name] for name in speeds)


@pytest.mark.slow
def test_rounding_alone_does_not_close_it(tmp_path):
    rows, reasons, config = run(tmp_path)
    assert {name for name in BY_NAME if BY_NAME[name].part == "step"} == set(rows), reasons
    assert all(rows[gate]["ok"] for gate in GATES)
    assert all(0 < of["noise"] < gpu_step.GATE_MOST for of in config["gate"].values())
