"""The step benchmark's formula of operations against torch's count of what the engine really multiplies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from step_flops import counted, sft_flops
from step_variants import Variants
from step_workload import WorkloadConfig

# Of so many tokens no two prompts begin with the same.
SHAPE = {
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 1021,
    "rank": 3,
}


@pytest.mark.parametrize("kind", ["recorded", "recompute"])
@pytest.mark.parametrize(("batch", "prompt", "response"), [(1, 200, 5), (3, 61, 70), (2, 64, 2)])
def test_formula_counts_what_the_engine_multiplies(kind, batch, prompt, response):
    config = WorkloadConfig(batch=batch, prompt=prompt, response=response, num_layers=3, **SHAPE)
    step = Variants(config).make(f"sft {kind}")
    assert sft_flops(config, recorded=kind == "recorded").total == counted(step)


def test_formula_refuses_a_shared_prefix():
    with pytest.raises(ValueError, match="share nothing"):
        sft_flops(WorkloadConfig(shared=8), recorded=True)
