"""The adapter's gradient over rows whose `gate_up` is in eight bits, against that over exact rows."""

import dataclasses

import pytest
import torch
from engine_support import (
    FAMILIES,
    Recorder,
    branching_samples,
    engine_of,
    random_adapter,
    random_model,
)

from alchemist.kernels import fp8_rows
from alchemist.trainer.step import Objective

DTYPES = [torch.float32, torch.bfloat16]
OBJECTIVE = Objective(name="kto", beta=0.4)


class Changed(Recorder):
    """Exact rows, but for what `change` makes of `gate_up`."""

    def __init__(self, shape, dtype, change):
        super().__init__(shape, dtype)
        self._change = change

    def _store(self, layer, found, token, row, slot):
        value = self._change(found["gate_up"][token][None])[0]
        changed = found["gate_up"].clone()
        changed[token] = value
        super()._store(layer, found | {"gate_up": changed}, token, row, slot)


def rounded(value):
    out = torch.empty_like(value)
    fp8_rows.decode(fp8_rows.encode(value), out)
    return out


def off_by_the_bound(seed):
    """Every number off by as much as the encoding may be, up or down at random."""
    generator = torch.Generator().manual_seed(seed)

    def change(value):
        scale = value.float().abs().amax(dim=1, keepdim=True) / fp8_rows.LARGEST
        bound = torch.maximum(value.float().abs() / 16, scale / 1024)
        sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
        return (value + sign * bound).to(value.dtype)

    return change


class Bench:
    """One model and its completions, and steps over their rows however these are stored."""

    def __init__(self, family, dtype):
        self.model, self.dtype = random_model(family, dtype), dtype
        self.engine = engine_of(self.model)
        self.adapter = random_adapter(self.engine.shape, dtype, 3)

    def step(self, recorder, *, with_heads=False, as_on_gpu=False):
        """A step over recorded prompts; `with_heads`: the last token of each, which predicts, is among them."""
        taken = []
        for sample in branching_samples(4, own=8):
            mask = torch.ones(len(sample.prompt_ids), dtype=torch.bool)
            mask[-1] = with_heads
            rows = recorder.record(self.model, self.adapter, sample.prompt_ids, mask)
            taken.append(dataclasses.replace(sample, recorded=rows))
        self.engine.view = recorder.as_on_gpu() if as_on_gpu else recorder.view
        return self.engine.gradients(taken, self.adapter, OBJECTIVE)

    def exact(self, **kind):
        return self.step(Recorder(self.engine.shape, self.dtype), **kind)

    def in_eight_bits(self, **kind):
        return self.step(Recorder(self.engine.shape, self.dtype, activation_dtype="fp8"), **kind)

    def changed(self, change, **kind):
        return self.step(Changed(self.engine.shape, self.dtype, change), **kind)


def error(found, exact):
    """Norm of the gradients' difference ÷ norm."""
    pairs = [(found.grads[n].double(), g.double()) for n, g in exact.grads.items()]
    norm = sum(float(g.norm()) ** 2 for _, g in pairs) ** 0.5
    return sum(float((f - g).norm()) ** 2 for f, g in pairs) ** 0.5 / norm


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("as_on_gpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_it_is_the_gradient_over_rounded_rows(family, dtype, as_on_gpu):
    """Nothing but `gate_up` is approximate, and that by its rounding alone: bit by bit the same step."""
    bench = Bench(family, dtype)
    narrow = bench.in_eight_bits(as_on_gpu=as_on_gpu)
    expected = bench.changed(rounded, as_on_gpu=as_on_gpu)
    assert narrow.loss == expected.loss
    assert narrow.tokens_reused == expected.tokens_reused > 0
    assert all(torch.equal(narrow.grads[n], g) for n, g in expected.grads.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_error_is_less_than_the_encodings_bound_allows(family, dtype):
    """The gradient moves in proportion to the rows' errors. Rounding errors lie anywhere below the encoding's bound, at
    a random place each, so what they make of the gradient is less than what errors of the bound's size make of it.
    """
    bench = Bench(family, dtype)
    exact = bench.exact()
    largest = [error(bench.changed(off_by_the_bound(seed)), exact) for seed in range(3)]
    found = error(bench.in_eight_bits(), exact)
    assert 0 < found < min(largest)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_log_probabilities_are_not_rounded(family, dtype, limit):
    """A recorded token that predicts has its output from `mid`, which is exact."""
    bench = Bench(family, dtype)
    exact, narrow = bench.exact(with_heads=True), bench.in_eight_bits(with_heads=True)
    plain = bench.exact()
    for found in (exact, narrow):
        assert found.tokens_reused > plain.tokens_reused
    assert narrow.loss == pytest.approx(exact.loss, rel=limit)
