"""Run by test_step_memory.py: a step for which there is not enough memory in one piece.

    python with_little_memory.py split|refused|refused-by-reference

Prints by how many tokens steps are split in the end.
"""

import gc
import resource
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from step_workload import Ours, WorkloadConfig, build_model, make_samples

from alchemist.trainer.step import Objective, ReplayEngine, SampleTooLarge, StepGradients

CONFIG = WorkloadConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=1024,
    vocab_size=512,
    batch=16,
    prompt=240,
    response=16,
)
MARGIN = {"split": 40 << 20, "refused": 1 << 20, "refused-by-reference": 1 << 20}
"""Bytes beyond what the process has: a part of what 4096 tokens at once take, and less than one completion takes."""


def main(case: str) -> None:
    torch.set_num_threads(1)
    ours = Ours.of(build_model(CONFIG), CONFIG)
    engine = ReplayEngine(ours.weights, ours.shape)
    samples = make_samples(CONFIG)

    # Against the base, the reference's forward is the first that does not fit.
    objective = Objective(name="kto", reference="base" if "reference" in case else "served")

    def step() -> StepGradients:
        return engine.gradients(samples, ours.adapter, objective)

    expected = step()
    gc.collect()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    was = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MARGIN[case], was[1]))
    if case != "split":
        with pytest.raises(SampleTooLarge, match="by itself") as refused:
            step()
        assert len(refused.value.samples) == 1
        resource.setrlimit(resource.RLIMIT_AS, was)
        print(engine.max_tokens)
        return
    found = step()
    resource.setrlimit(resource.RLIMIT_AS, was)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(found.grads[name], grad, rtol=1e-4, atol=1e-6)
    print(engine.max_tokens)


if __name__ == "__main__":
    main(sys.argv[1])
