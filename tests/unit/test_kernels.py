"""Every kernel against its plain-torch reference in float64, output and gradients, and against its recorded form."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alchemist.kernels import (
    dispatch,
    gated_mlp,
    linear_logprob,
    path_attention,
    replay_linear,
    rms_norm,
    rope,
    swiglu,
)
from alchemist.kernels.gated_mlp import Projection
from alchemist.kernels.gated_mlp import reference as gated_mlp_reference
from alchemist.kernels.linear_logprob import reference as linear_logprob_reference
from alchemist.kernels.path_attention import PathBlock
from alchemist.kernels.path_attention import cpu as cpu_attention
from alchemist.kernels.path_attention import reference as path_attention_reference
from alchemist.kernels.replay_linear import LoraPart, unread
from alchemist.kernels.replay_linear import reference as replay_linear_reference
from alchemist.kernels.rms_norm import reference as rms_norm_reference
from alchemist.kernels.rope import reference as rope_reference
from alchemist.kernels.swiglu import reference as swiglu_reference

# float64: a sum of n terms of order one is wrong by about n·2e-16; the tests stay below a thousand terms.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(outputs, leaves, weights):
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def compare(ours, reference, leaves):
    """Both are functions of nothing that return a tuple of outputs. Returns the reference's outputs,
    the weights of the loss, and the gradients.
    """
    expected, found = reference(), ours()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    weights = [torch.randn_like(o) for o in expected]
    grads = gradients(expected, leaves, weights)
    assert_equal(gradients(found, leaves, weights), grads)
    return [o.detach() for o in expected], weights, grads


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.fixture(params=[(1, 1), (2, 3), (4, 2), (7, 5), (100, 100)], ids=str)
def in_blocks(request, monkeypatch):
    """Products as with large weights, by (columns, rows): with a rest, without, and where it is all there is."""
    monkeypatch.setattr(dispatch, "LARGE", 0)
    monkeypatch.setattr(dispatch, "_by_blocks_is_faster", {})
    monkeypatch.setattr(dispatch, "by_blocks_is_faster", lambda a, b: True)
    monkeypatch.setattr(dispatch, "COLUMNS", request.param[0])
    monkeypatch.setattr(dispatch, "ROWS", request.param[1])


@pytest.mark.parametrize("num_rows", [0, 1, 2, 7])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_in_blocks(num_rows, transposed, in_blocks):
    torch.manual_seed(0)
    a = torch.randn(num_rows, 5, dtype=torch.float64)
    b = torch.randn(9, 5).double().T if transposed else torch.randn(5, 9).double()
    product = dispatch.matmul(a, b)
    assert product.is_contiguous()
    torch.testing.assert_close(product, a @ b, **TOLERANCE)


@pytest.mark.parametrize("bias", [False, True])
def test_replay_linear_in_blocks(bias, in_blocks):
    torch.manual_seed(0)
    x, weight = leaf(3, 5), torch.randn(9, 5).double()
    bias = torch.randn(9).double() if bias else None
    parts = [LoraPart(0, 4, leaf(2, 5), leaf(4, 2)), LoraPart(7, 9, leaf(2, 5), leaf(2, 2))]
    compare(
        lambda: replay_linear.replay_linear(x, weight, bias, parts, 0.7, (4, 3, 2)),
        lambda: replay_linear_reference.replay_linear(x, weight, bias, parts, 0.7, (4, 3, 2)),
        [x, *(t for p in parts for t in (p.a, p.b))],
    )


def test_products_with_large_factors_go_by_blocks_where_that_is_faster(monkeypatch):
    """Which is found once for sizes that are alike, so that the same product comes out the same."""
    blocks, trials = [], []
    bmm = torch.bmm

    def trial(a, b):
        trials.append(a.shape[0])
        return a.shape[0] > 256

    monkeypatch.setattr(torch, "bmm", lambda *args: blocks.append(args[0].shape[:2]) or bmm(*args))
    monkeypatch.setattr(dispatch, "_by_blocks_is_faster", {})
    monkeypatch.setattr(dispatch, "by_blocks_is_faster", trial)
    weight = torch.randn(1024, dispatch.LARGE // 1024)
    for rows in (1, 2, 3, dispatch.ROWS, dispatch.ROWS + 2, dispatch.ROWS, 3000, 4000):
        a = torch.randn(rows, 1024)
        torch.testing.assert_close(dispatch.matmul(a, weight), a @ weight, rtol=1e-4, atol=1e-3)
    dispatch.matmul(torch.randn(2, 1024), weight[:, 1:])
    assert trials == [2, dispatch.ROWS, dispatch.TRIAL_ROWS]
    for tokens in (2049, 2050, 4000):
        dispatch.matmul(torch.randn(16, tokens), torch.randn(tokens, 1024))
    assert trials[3:] == [16]
    half = dispatch.ROWS // 2 + 1
    assert blocks[:4] == [(4, dispatch.ROWS), (4, half), (4, half), (4, dispatch.ROWS)]
    assert sum(rows for _, rows in blocks[4:]) == 7000


@pytest.mark.parametrize(
    ("seconds", "expected"), [((3, 2), True), ((2, 3), False), ((3, 3), False)]
)
def test_trial_takes_what_is_clearly_faster(seconds, expected, monkeypatch):
    times = iter(seconds * dispatch.TRIALS)
    monkeypatch.setattr(dispatch, "_seconds", lambda product, a, b: next(times))
    assert dispatch.by_blocks_is_faster(torch.randn(2, 3), torch.randn(3, 2)) == expected


@pytest.mark.parametrize("num_tokens", [0, 1, 7, dispatch.ROWS + 1])
@pytest.mark.parametrize("adapted", [(), (0,), (1, 2), (0, 1, 2)])
def test_replay_linear(num_tokens, adapted):
    torch.manual_seed(0)
    x, weight, bias = leaf(num_tokens, 5), torch.randn(9, 5).double(), torch.randn(9).double()
    splits = (4, 3, 2)
    ranges = [(0, 4), (4, 7), (7, 9)]
    parts = [
        LoraPart(*ranges[i], leaf(2, 5), leaf(ranges[i][1] - ranges[i][0], 2)) for i in adapted
    ]
    leaves = [x, *(t for p in parts for t in (p.a, p.b))]

    def ours(recorded=None):
        return replay_linear.replay_linear(x, weight, bias, parts, 0.7, splits, recorded)

    expected, weights, grads = compare(
        ours,
        lambda: replay_linear_reference.replay_linear(x, weight, bias, parts, 0.7, splits),
        leaves,
    )
    poisoned = [unread(o.shape, o) for o in expected]
    assert_equal(torch.autograd.grad(ours(poisoned), leaves, weights), grads)


def test_replay_linear_two_adapters_in_one_output_and_a_zero_one():
    torch.manual_seed(0)
    x, weight = leaf(6, 5), torch.randn(8, 5).double()
    zero = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    parts = [LoraPart(0, 4, leaf(2, 5), zero, True), LoraPart(4, 8, leaf(2, 5), leaf(4, 2))]
    compare(
        lambda: replay_linear.replay_linear(x, weight, None, parts, 2.0),
        lambda: replay_linear_reference.replay_linear(x, weight, None, parts, 2.0),
        [x, *(t for p in parts for t in (p.a, p.b))],
    )


@pytest.mark.parametrize("with_addend", [True, False])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_add_rms_norm(with_addend, scale):
    torch.manual_seed(0)
    x = (torch.randn(7, 6, dtype=torch.float64) * scale).requires_grad_()
    addend = leaf(7, 6) if with_addend else None
    weight = torch.randn(6).double()
    leaves = [x, addend] if with_addend else [x]

    def ours(recorded=None):
        return rms_norm.add_rms_norm(x, addend, weight, 1e-5, recorded)

    expected, weights, grads = compare(
        ours, lambda: rms_norm_reference.add_rms_norm(x, addend, weight, 1e-5), leaves
    )
    assert_equal(gradients(ours(expected[0]), leaves, weights), grads)


def test_rms_norm_of_heads():
    x, weight = leaf(3, 4, 6), torch.randn(6).double()
    compare(
        lambda: (rms_norm.rms_norm(x, weight, 1e-6),),
        lambda: (rms_norm_reference.add_rms_norm(x, None, weight, 1e-6)[1],),
        [x],
    )


def test_rope_and_its_replay_from_the_output_alone():
    x, angles = leaf(5, 3, 8), torch.randn(5, 4).double()
    cos, sin = angles.cos(), angles.sin()
    expected, weights, grads = compare(
        lambda: (rope.rope(x, cos, sin),), lambda: (rope_reference.rope(x, cos, sin),), [x]
    )
    poisoned = unread(x.shape, x).requires_grad_()
    y = rope.rope(poisoned, cos, sin, recorded=expected[0])
    assert torch.equal(y, expected[0])
    assert_equal(torch.autograd.grad(y, poisoned, weights), grads)


def test_norm_and_rope_at_once():
    x, weight, angles = leaf(5, 3, 8), torch.randn(8).double(), torch.randn(5, 4).double()
    cos, sin = angles.cos(), angles.sin()
    _, weights, grads = compare(
        lambda: (rope.norm_rope(x, weight, 1e-6, cos, sin),),
        lambda: (rope_reference.norm_rope(x, weight, 1e-6, cos, sin),),
        [x],
    )
    replayed = rope.norm_rope(x, weight, 1e-6, cos, sin, recorded=unread(x.shape, x))
    assert_equal(torch.autograd.grad(replayed, x, weights), grads)


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 129, 300])
def test_swiglu(num_tokens):
    x = leaf(num_tokens, 10)
    compare(lambda: (swiglu.swiglu(x),), lambda: (swiglu_reference.swiglu(x),), [x])


def mlp(adapted=("gate", "up", "down"), *, has_bias=True):
    """The projections of an MLP of 5 and 6, and the leaves of the adapters named in `adapted`."""

    def part(name, start, end, width):
        return (
            [LoraPart(start, end, leaf(2, width), leaf(end - start, 2))] if name in adapted else []
        )

    bias = (torch.randn(12).double(), torch.randn(5).double()) if has_bias else (None, None)
    ups = [*part("gate", 0, 6, 5), *part("up", 6, 12, 5)]
    gate_up = Projection(torch.randn(12, 5).double(), bias[0], ups)
    down = Projection(torch.randn(5, 6).double(), bias[1], part("down", 0, 5, 6))
    return gate_up, down, [t for p in (*gate_up.parts, *down.parts) for t in (p.a, p.b)]


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 11])
@pytest.mark.parametrize("adapted", [(), ("gate",), ("down",), ("gate", "up", "down")])
@pytest.mark.parametrize("needs_x", [True, False])
def test_gated_mlp(num_tokens, adapted, needs_x, monkeypatch):
    monkeypatch.setattr(gated_mlp, "MOST_TOKENS", 4)
    torch.manual_seed(0)
    x = leaf(num_tokens, 5).detach().requires_grad_(needs_x)
    gate_up, down, lora = mlp(adapted, has_bias=num_tokens != 5)
    leaves = [x, *lora] if needs_x else lora
    inner, expected = gated_mlp_reference.gated_mlp(x, gate_up, down, 0.7)
    recorded, y = gated_mlp.gated_mlp(x, gate_up, down, 0.7)
    assert_equal((recorded, y), (inner, expected))
    none, y_only = gated_mlp.gated_mlp(x.detach(), gate_up, down, 0.7, keep=False)
    assert_equal((y_only,), (expected,))
    assert none.isnan().all()
    if not leaves:
        return
    weights = [torch.randn_like(expected)]
    grads = gradients((expected,), leaves, weights)
    assert not recorded.requires_grad
    assert_equal(gradients((y,), leaves, weights), grads)
    seen = []

    def pause(value):
        seen.append(value.shape[0])
        return value

    same, replayed = gated_mlp.gated_mlp(x, gate_up, down, 0.7, recorded, pause=pause)
    assert same.data_ptr() == recorded.data_ptr()
    assert replayed.isnan().all()
    assert not seen
    assert_equal(torch.autograd.grad(replayed, leaves, weights), grads)
    assert max(seen, default=0) <= 4


def test_of_the_mlp_only_what_is_asked_for_is_differentiated():
    """An adapter of `down` alone, below which nothing has a gradient."""
    gate_up, down, lora = mlp()
    for part in gate_up.parts:
        part.a.requires_grad_(False)
        part.b.requires_grad_(False)
    x = torch.randn(3, 5).double()
    inner, expected = gated_mlp_reference.gated_mlp(x, gate_up, down, 0.7)
    seen = []
    _, y = gated_mlp.gated_mlp(
        x, gate_up, down, 0.7, inner.detach(), pause=lambda v: seen.append(v) or v
    )
    weights = [torch.randn_like(expected)]
    found = torch.autograd.grad(y, lora[-2:], weights)
    assert_equal(found, gradients((expected,), lora[-2:], weights))
    assert not seen


@st.composite
def attention_cases(draw):
    """Blocks over shuffled keys: each a path with queries at some of its depths."""
    num_keys = draw(st.integers(1, 12))
    blocks, num_queries = [], 0
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.permutations(range(num_keys)))[: draw(st.integers(1, num_keys))]
        depths = sorted(draw(st.sets(st.integers(0, len(path) - 1), min_size=1)))
        blocks.append((num_queries, depths, path[: depths[-1] + 1]))
        num_queries += len(depths)
    order = draw(st.permutations(range(num_queries)))
    plan = [
        PathBlock(
            torch.tensor(order[start : start + len(depths)]),
            torch.tensor(depths),
            torch.tensor(path),
        )
        for start, depths, path in blocks
    ]
    return plan, num_queries, num_keys, draw(st.sampled_from([1, 2, 3]))


@given(attention_cases(), st.sampled_from([1, 2, 128]))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_path_attention(case, tile):
    plan, num_queries, num_keys, groups = case
    torch.manual_seed(0)
    q, k, v = leaf(num_queries, 2 * groups, 4), leaf(num_keys, 2, 4), leaf(num_keys, 2, 4)
    default, cpu_attention.TILE = cpu_attention.TILE, tile
    try:
        _, weights, grads = compare(
            lambda: (path_attention.path_attention(q, k, v, plan),),
            lambda: (path_attention_reference.path_attention(q, k, v, plan),),
            [q, k, v],
        )
        # The backward must not read the recorded output.
        replayed = path_attention.path_attention(q, k, v, plan, unread(q.shape, q))
        assert_equal(torch.autograd.grad(replayed, [q, k, v], weights), grads)
    finally:
        cpu_attention.TILE = default


def test_tokens_that_are_nearly_certain_keep_their_gradient_in_16_bits():
    """Rounded first, a probability of 0.999 is 1, and what is left of the gradient is the rounding of others."""
    torch.manual_seed(0)
    weight = (torch.randn(777, 40) * 0.5).bfloat16()
    rows, targets = torch.arange(33), torch.randint(777, (33,))
    h = (2.5 * weight[targets]).bfloat16()
    exact = h.double().requires_grad_()
    logps = linear_logprob_reference.linear_logprob(exact, weight.double(), rows, targets)
    assert logps.detach().exp().quantile(0.2) > 0.99
    d_logps = torch.randn(33)
    (truth,) = torch.autograd.grad(logps, exact, d_logps.double())
    result = linear_logprob.linear_logprob(h, weight, rows, targets, gradient=True)
    found = linear_logprob.linear_logprob_backward(result, weight, rows, targets, d_logps)
    assert float((found.double() - truth).norm() / truth.norm()) < 0.05


@pytest.mark.parametrize("chunk_bytes", [1, 13 * 8 * 2, 1 << 20])
def test_linear_logprob(chunk_bytes, monkeypatch):
    monkeypatch.setattr(linear_logprob, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    h, weight = leaf(5, 4), torch.randn(13, 4).double()
    rows = torch.tensor([0, 0, 1, 3, 4, 4, 4])
    targets = torch.tensor([12, 3, 0, 7, 7, 7, 1])
    expected = linear_logprob_reference.linear_logprob(h, weight, rows, targets)
    result = linear_logprob.linear_logprob(h.detach(), weight, rows, targets, gradient=True)
    torch.testing.assert_close(result.logps, expected.detach(), **TOLERANCE)
    d_logps = torch.randn(7).double()
    d_h = linear_logprob.linear_logprob_backward(result, weight, rows, targets, d_logps)
    torch.testing.assert_close(d_h, torch.autograd.grad(expected, h, d_logps)[0], **TOLERANCE)
    nothing = linear_logprob.linear_logprob(
        h.detach()[:0], weight, rows[:0], targets[:0], gradient=False
    )
    assert nothing.logps.shape == (0,)
