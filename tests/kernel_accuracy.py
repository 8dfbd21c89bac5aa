"""Accuracy of the Triton kernels: their error beside plain PyTorch's of the same dtype, both against float64 that was
given the same rounded inputs. Outputs and every gradient.

Run by tests/gpu/test_kernels.py on a GPU, by tests/unit/test_kernels_interpreted.py in Triton's interpreter, and as a
program: `python tests/kernel_accuracy.py --device cuda --dtype bfloat16 [--only NAME,NAME]` prints one JSON object a
comparison. A name is that of a case or of a shard (`attention/4x1x128`), of which several processes may take one each.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from alchemist.kernels import (
    fp8_rows,
    gated_mlp,
    linear_logprob,
    pack_rows,
    path_attention,
    replay_linear,
    rms_norm,
    rope,
    swiglu,
)
from alchemist.kernels.dispatch import uses_triton
from alchemist.kernels.fp8_rows import reference as fp8_rows_reference
from alchemist.kernels.gated_mlp import Projection
from alchemist.kernels.gated_mlp import reference as gated_mlp_reference
from alchemist.kernels.linear_logprob import reference as linear_logprob_reference
from alchemist.kernels.pack_rows import Field
from alchemist.kernels.pack_rows import reference as pack_rows_reference
from alchemist.kernels.path_attention import PathBlock, paged
from alchemist.kernels.replay_linear import LoraPart, unread
from alchemist.kernels.replay_linear import reference as replay_linear_reference
from alchemist.kernels.rms_norm import reference as rms_norm_reference
from alchemist.kernels.rope import reference as rope_reference
from alchemist.kernels.swiglu import reference as swiglu_reference


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor: greatest and root-mean-square error of ours and of plain PyTorch."""

    case: str
    tensor: str
    dtype: str
    max_error: float
    max_plain: float
    max_allowed: float
    rms_error: float
    rms_plain: float
    rms_allowed: float

    @property
    def ok(self) -> bool:
        # Written so that a NaN fails.
        return self.max_error <= self.max_allowed and self.rms_error <= self.rms_allowed


def measure(case: str, tensor: str, ours: Tensor, plain: Tensor, truth: Tensor) -> Comparison:
    """Allowed: twice plain PyTorch's greatest error and 1.25 times its rms, and, for where that is exact or nearly so
    by luck, one rounding of the largest number and a tenth of the rms of one rounding each.
    """
    assert ours.shape == plain.shape == truth.shape, (case, tensor, ours.shape, truth.shape)
    assert truth.dtype == torch.float64
    rounding = torch.finfo(plain.dtype).eps / 2
    errors = [(t.double() - truth).abs() for t in (ours, plain)]
    (max_error, max_plain), (rms_error, rms_plain) = (
        [float(f(e)) if e.numel() else 0.0 for e in errors] for f in (torch.amax, _rms)
    )
    top, rms = (float(f(truth)) if truth.numel() else 0.0 for f in (lambda t: t.abs().amax(), _rms))
    return Comparison(
        case=case,
        tensor=tensor,
        dtype=str(plain.dtype).removeprefix("torch."),
        max_error=max_error,
        max_plain=max_plain,
        max_allowed=2 * max_plain + rounding * top,
        rms_error=rms_error,
        rms_plain=rms_plain,
        rms_allowed=1.25 * rms_plain + 0.1 * rounding * rms,
    )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


Function = Callable[..., tuple[Tensor, ...]]


class Bench:
    """Where and in what dtype to compare, and how large. `is_small`: for the interpreter."""

    def __init__(self, device: str, dtype: torch.dtype, *, is_small: bool) -> None:
        self.device, self.dtype, self.is_small = torch.device(device), dtype, is_small
        self._generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers, rounded to the dtype."""
        x = torch.randn(*shape, generator=self._generator, dtype=torch.float64) * scale
        return x.to(self.device, self.dtype)

    def index(self, high: int, n: int) -> Tensor:
        return torch.randint(high, (n,), generator=self._generator).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator)

    def compare(
        self, case: str, ours: Function, plain: Function, leaves: dict[str, Tensor], **fixed: Tensor
    ) -> Iterator[Comparison]:
        """Both functions take `leaves` and `fixed` by name; leaves are differentiated. The gradient of the outputs is
        random, so every gradient is.
        """
        with torch.no_grad():
            shapes = [o.shape for o in plain(**leaves, **fixed)]
        upstream = [self.random(*shape) for shape in shapes]
        runs = [
            _run(ours, leaves, fixed, upstream, self.dtype),
            _run(plain, leaves, fixed, upstream, self.dtype),
            _run(plain, leaves, fixed, upstream, torch.float64),
        ]
        names = [f"output {i}" for i in range(len(shapes))] + [f"d {name}" for name in leaves]
        for name, *tensors in zip(names, *runs, strict=True):
            yield measure(case, name, *tensors)


def _run(
    function: Function,
    leaves: dict[str, Tensor],
    fixed: dict[str, Tensor],
    upstream: list[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    own = {name: t.to(dtype).detach().requires_grad_() for name, t in leaves.items()}
    rest = {name: t.to(dtype) if t.is_floating_point() else t for name, t in fixed.items()}
    outputs = function(**own, **rest)
    grads = torch.autograd.grad(
        outputs, list(own.values()), [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    )
    return [*(o.detach() for o in outputs), *grads]


def exact(case: str, tensor: str, ours: Tensor, expected: Tensor) -> Comparison:
    """Bits are compared; the errors are numbers of elements that differ."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    different = float((ours.view(kind) != expected.view(kind)).sum())
    dtype = str(expected.dtype).removeprefix("torch.")
    return Comparison(case, tensor, dtype, different, 0.0, 0.0, different, 0.0, 0.0)


def norms(bench: Bench) -> Iterator[Comparison]:
    """Residual sum and norm, computed and from a recorded sum."""
    eps = 1e-5

    def ours(x: Tensor, addend: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return rms_norm.add_rms_norm(x, addend, weight, eps)

    def plain(x: Tensor, addend: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return rms_norm_reference.add_rms_norm(x, addend, weight, eps)

    def replayed(x: Tensor, addend: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        recorded = (x + addend).detach()
        return rms_norm.add_rms_norm(x, addend + float("nan"), weight, eps, recorded)

    width = 200 if bench.is_small else 4096
    for num_tokens, scale in ((1, 1.0), (0, 1.0), (13, 1e-2), (64, 30.0)):
        leaves = {
            "x": bench.random(num_tokens, width, scale=scale),
            "addend": bench.random(num_tokens, width, scale=scale),
        }
        weight = bench.random(width)
        case = f"add_rms_norm T={num_tokens} scale={scale}"
        yield from bench.compare(case, ours, plain, leaves, weight=weight)
        yield from bench.compare(f"{case} recorded", replayed, plain, leaves, weight=weight)


def heads(bench: Bench) -> Iterator[Comparison]:
    """Norm of heads, rotation, and both at once, of views into a fused tensor."""
    eps = 1e-6

    def view(fused: Tensor, dim: int) -> Tensor:
        return fused[:, dim : 4 * dim].unflatten(-1, (3, dim))

    for dim, num_tokens in ((64, 9), (128, 1), (128, 65), (80, 7)):
        leaves = {"fused": bench.random(num_tokens, 5 * dim)}
        angles = bench.random(num_tokens, dim // 2)
        fixed = {"weight": bench.random(dim), "cos": angles.cos(), "sin": angles.sin()}

        def norm(dim: int, module, fused: Tensor, weight: Tensor, cos: Tensor, sin: Tensor):
            if module is rms_norm:
                return (rms_norm.rms_norm(view(fused, dim), weight, eps),)
            return module.add_rms_norm(view(fused, dim), None, weight, eps)[1:]

        def turn(dim: int, module, fused: Tensor, weight: Tensor, cos: Tensor, sin: Tensor):
            return (module.rope(view(fused, dim), cos, sin),)

        def both(dim: int, module, fused: Tensor, weight: Tensor, cos: Tensor, sin: Tensor):
            return (module.norm_rope(view(fused, dim), weight, eps, cos, sin),)

        def replayed(dim: int, fused: Tensor, weight: Tensor, cos: Tensor, sin: Tensor):
            x = view(fused, dim)
            recorded = rope_reference.norm_rope(x, weight, eps, cos, sin).detach()
            return (rope.norm_rope(x, weight, eps, cos, sin, recorded),)

        for name, ours, plain in (
            (
                "rms_norm of heads",
                partial(norm, dim, rms_norm),
                partial(norm, dim, rms_norm_reference),
            ),
            ("rope", partial(turn, dim, rope), partial(turn, dim, rope_reference)),
            ("norm_rope", partial(both, dim, rope), partial(both, dim, rope_reference)),
            ("norm_rope recorded", partial(replayed, dim), partial(both, dim, rope_reference)),
        ):
            yield from bench.compare(f"{name} T={num_tokens} d={dim}", ours, plain, leaves, **fixed)


def gates(bench: Bench) -> Iterator[Comparison]:
    """SwiGLU."""
    for num_tokens, width, scale in ((0, 24, 1.0), (1, 24, 1e-2), (5, 2500, 1.0), (65, 40, 10.0)):
        width = width if bench.is_small else 5 * width
        yield from bench.compare(
            f"swiglu T={num_tokens} I={width} scale={scale}",
            lambda gate_up: (swiglu.swiglu(gate_up),),
            lambda gate_up: (swiglu_reference.swiglu(gate_up),),
            {"gate_up": bench.random(num_tokens, 2 * width, scale=scale)},
        )


def tree_plan(
    bench: Bench, nodes: list[tuple[int, int]], share: float
) -> tuple[list[PathBlock], int, int]:
    """A plan over the tree of `nodes` (parent or −1, tokens), rows shuffled; about `share` of the tokens are queries.
    Returns it with the numbers of queries and of keys.
    """
    num_tokens = sum(length for _, length in nodes)
    key_row = bench.permutation(num_tokens)
    is_query = bench.permutation(num_tokens) < share * num_tokens
    query_row = torch.full((num_tokens,), -1)
    num_queries = int(is_query.sum())
    query_row[is_query] = bench.permutation(num_queries)
    plan, paths, start = [], [], 0
    for parent, length in nodes:
        tokens = torch.arange(start, start + length)
        start += length
        path = torch.cat([paths[parent], tokens]) if parent >= 0 else tokens
        paths.append(path)
        (depths,) = torch.where(
            is_query[path] & (torch.arange(path.numel()) >= path.numel() - length)
        )
        if depths.numel():
            plan.append(
                PathBlock(
                    query_row[path[depths]].to(bench.device),
                    depths,
                    key_row[path[: int(depths[-1]) + 1]].to(bench.device),
                )
            )
    return plan, num_queries, num_tokens


def plan_mask(plan: list[PathBlock], num_queries: int, num_keys: int) -> Tensor:
    """[Q, S], True: seen."""
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool, device=plan[0].keys.device)
    for block in plan:
        for query, depth in zip(block.queries.tolist(), block.depths.tolist(), strict=True):
            mask[query, block.keys[: depth + 1]] = True
    return mask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain PyTorch: the whole score matrix. `mask` [Q, S], True: seen."""
    queries = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("qkgd,skd->kgqs", queries, k) / math.sqrt(q.shape[-1])
    p = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("kgqs,skd->qkgd", p, v).flatten(1, 2)


TREES = {
    "chain": ([(-1, 70)], 1.0),
    "one token": ([(-1, 1)], 1.0),
    "branches": ([(-1, 33), (0, 13), (0, 6), (1, 5), (1, 30)], 1.0),
    "few missing": ([(-1, 40), (0, 3), (0, 17), (-1, 9)], 0.3),
}


ATTENTION = ((1, 2, 64), (2, 1, 64), (3, 1, 80), (4, 1, 128), (8, 1, 64))
"""Heads of a group, heads of keys, head size."""
TRAINED = (4, 8, 128)
"""Of the models that the suite's steps train: what is compiled for it here is there when they begin."""
ATTENTION_LARGE = ((1, 8, 128), (2, 4, 128), (8, 2, 128), (7, 2, 128), (5, 2, 64))
"""Not in the interpreter, and in 16 bits only: exact products of float32 take Triton's compiler a minute a shape."""


def attention_shapes(dtype: torch.dtype, *, is_small: bool) -> tuple[tuple[int, int, int], ...]:
    if is_small:
        return ATTENTION
    large = tuple(TRAINED if shape == (4, 1, 128) else shape for shape in ATTENTION)
    return large if dtype == torch.float32 else large + ATTENTION_LARGE


def attention(
    bench: Bench, shapes: Sequence[tuple[int, int, int]] | None = None
) -> Iterator[Comparison]:
    """Paths of trees; groups of 1 to 8 heads; outputs computed and recorded."""
    for shape in shapes or attention_shapes(bench.dtype, is_small=bench.is_small):
        groups, kv_heads, dim = shape
        # Of float32's large heads every variant takes the compiler ten seconds.
        is_slow = bench.dtype == torch.float32 and dim > 64
        has_all = shape == ATTENTION[1] if bench.is_small else not is_slow
        names = list(TREES) if has_all else ["branches"]
        for name in names:
            nodes, share = TREES[name]
            if not bench.is_small:
                nodes = [(parent, 9 * length + 4) for parent, length in nodes]
            plan, num_queries, num_keys = tree_plan(bench, nodes, share)
            mask = plan_mask(plan, num_queries, num_keys)
            leaves = {
                "q": bench.random(num_queries, groups * kv_heads, dim),
                "k": bench.random(num_keys, kv_heads, dim),
                "v": bench.random(num_keys, kv_heads, dim),
            }
            case = f"path_attention {name} G={groups} K={kv_heads} d={dim}"
            yield from _attention_of(bench, case, plan, mask, leaves)


def _attention_of(
    bench: Bench, case: str, plan: list[PathBlock], mask: Tensor, leaves: dict[str, Tensor]
) -> Iterator[Comparison]:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (dense_attention(q, k, v, mask),)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        # Values are a view into a wider tensor, as those of a fused projection are.
        wide = torch.cat([v, v], dim=-1)[..., : v.shape[-1]]
        return (path_attention.path_attention(q, k, wide, plan),)

    def replayed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        recorded = dense_attention(q, k, v, mask).detach()
        return (path_attention.path_attention(q, k, v, plan, recorded),)

    yield from bench.compare(case, ours, plain, leaves)
    if mask.shape[1] > 1:
        # Of one key the gradient is zero, a difference of equals; how equal, depends on who rounded the output.
        yield from bench.compare(f"{case} recorded", replayed, plain, leaves)


def pooled_attention(bench: Bench) -> Iterator[Comparison]:
    """Keys that are read in a pool's slots and keys that are given, each by our kernel, put together."""
    from alchemist.kernels.path_attention import triton as module

    def over_pool(
        q: Tensor, k: Tensor, v: Tensor, plan: paged.PagedPlan
    ) -> tuple[Tensor | None, Tensor]:
        tables = plan.slots.to(q.device, torch.int64).split(plan.num_slots)
        rows = torch.arange(q.shape[0], device=q.device).split(plan.num_queries)
        sees_all = [
            PathBlock(own, torch.full(own.shape, table.numel() - 1), table)
            for own, table in zip(rows, tables, strict=True)
        ]
        return module.forward(q, k, v, sees_all)

    kernels = paged.Kernels(over_pool, module.forward)
    for tree in ("chain", "branches"):
        for shape in ((2, 2, 64), (3, 2, 80)):
            yield pooled(bench, tree, shape, kernels)


def pooled(
    bench: Bench, tree: str, shape: tuple[int, int, int], kernels: paged.Kernels
) -> Comparison:
    """Outputs over a tree a third of whose tokens are queries, the others' keys at scattered slots of a pool that holds
    nothing else.

    Args:
        shape: heads of a group, heads of keys, head size.
    """
    groups, kv_heads, dim = shape
    nodes, _ = TREES[tree]
    if not bench.is_small:
        nodes = [(parent, 9 * length + 4) for parent, length in nodes]
    plan, num_queries, num_keys = tree_plan(bench, nodes, 0.3)
    q = bench.random(num_queries, groups * kv_heads, dim)
    k, v = (bench.random(num_keys, kv_heads, dim) for _ in range(2))
    slots = bench.permutation(3 * num_keys)[:num_keys]
    for block in plan:
        slots[block.keys[block.depths.to(block.keys.device)].cpu()] = -1
    at = slots.to(bench.device)
    pools = [k.new_full((3 * num_keys, kv_heads, dim), math.nan) for _ in range(2)]
    for pool, tensor in zip(pools, (k, v), strict=True):
        pool[at[at >= 0]] = tensor[at >= 0]
    divided = paged.split(plan, slots)
    ours = paged.attention(q, k[at < 0], v[at < 0], *pools, divided, kernels)
    mask = plan_mask(plan, num_queries, num_keys)
    plain = dense_attention(q, k, v, mask)
    truth = dense_attention(q.double(), k.double(), v.double(), mask)
    case = f"pooled attention {tree} G={groups} K={kv_heads} d={dim}"
    return measure(case, "output", ours, plain, truth)


def log_probabilities(bench: Bench) -> Iterator[Comparison]:
    """LM head and log-probabilities, several targets a token, in several chunks."""
    from alchemist.kernels.linear_logprob import triton as module

    width, num_words = (40, 777) if bench.is_small else (1024, 50_001)
    default = module.CHUNK_BYTES
    for num_tokens, num_chunks in ((1, 1), (9, 3), (33, 2)):
        # The logits of a language model spread over some ten nats.
        h, table = (
            bench.random(num_tokens, width),
            bench.random(num_words + 7, width, scale=3 / width**0.5),
        )
        weight = table[:num_words]
        rows = torch.cat([torch.arange(num_tokens), torch.arange(0, num_tokens, 3)]).sort().values
        rows = rows.to(bench.device)
        targets = bench.index(num_words, rows.numel())
        d_logps = bench.random(rows.numel()).float()
        size = -(-num_tokens // num_chunks)
        module.CHUNK_BYTES = 4 * num_words * size
        try:
            result = linear_logprob.linear_logprob(h, weight, rows, targets, gradient=True)
        finally:
            module.CHUNK_BYTES = default
        d_h = linear_logprob.linear_logprob_backward(result, weight, rows, targets, d_logps)
        runs = []
        for dtype in (bench.dtype, torch.float64):
            leaf = h.to(dtype).detach().requires_grad_()
            # In the same pieces: how exact a product is depends on its number of rows, too.
            parts = []
            for start in range(0, num_tokens, size):
                is_in = (rows >= start) & (rows < start + size)
                args = leaf[start : start + size], weight.to(dtype), rows[is_in] - start
                parts.append(linear_logprob_reference.linear_logprob(*args, targets[is_in]))
            logps = torch.cat(parts)
            runs.append([logps.detach(), *torch.autograd.grad(logps, leaf, d_logps.to(dtype))])
        case = f"linear_logprob T={num_tokens} chunks={num_chunks}"
        for name, *tensors in zip(("logps", "d h"), (result.logps, d_h), *runs, strict=True):
            yield measure(case, name, *tensors)
        empty = linear_logprob.linear_logprob(h[:0], weight, rows[:0], targets[:0], gradient=False)
        assert empty.logps.shape == (0,)


def linears(bench: Bench) -> Iterator[Comparison]:
    """Replayed linear with adapters; also with gradients of the adapters kept in float32."""
    width = 64 if bench.is_small else 1024
    rank, splits, scaling = 16, (width, width // 4, width // 4), 2.0
    ends = [sum(splits[: i + 1]) for i in range(3)]
    for num_tokens in (1, 65, 130):
        leaves = {"x": bench.random(num_tokens, width)}
        for i, size in enumerate(splits):
            leaves[f"a{i}"] = bench.random(rank, width, scale=width**-0.5)
            leaves[f"b{i}"] = bench.random(size, rank, scale=0.1)
        fixed = {
            "weight": bench.random(sum(splits), width, scale=width**-0.5),
            "bias": bench.random(sum(splits)),
        }

        def call(function, recorded, x: Tensor, weight: Tensor, bias: Tensor, **lora: Tensor):
            parts = [
                LoraPart(end - splits[i], end, lora[f"a{i}"], lora[f"b{i}"])
                for i, end in enumerate(ends)
            ]
            given = {} if recorded is None else {"recorded": recorded(x)}
            return function(x, weight, bias, parts, scaling, splits, **given)

        def poison(x: Tensor) -> list[Tensor]:
            return [unread((x.shape[0], n), x) for n in splits]

        plain = partial(call, replay_linear_reference.replay_linear, None)
        case = f"replay_linear T={num_tokens}"
        yield from bench.compare(
            case, partial(call, replay_linear.replay_linear, None), plain, leaves, **fixed
        )
        # A recorded output is never read; its value is no result of ours.
        for found in bench.compare(
            f"{case} recorded",
            partial(call, replay_linear.replay_linear, poison),
            plain,
            leaves,
            **fixed,
        ):
            if found.tensor.startswith("d "):
                yield found


def mlps(bench: Bench) -> Iterator[Comparison]:
    """Gated MLP with adapters."""
    h, inner, rank, scaling = (32, 96, 4, 2.0) if bench.is_small else (1024, 3072, 16, 2.0)
    fixed = {
        "up_weight": bench.random(2 * inner, h, scale=h**-0.5),
        "down_weight": bench.random(h, inner, scale=inner**-0.5),
    }
    for num_tokens in (1, 65, 130):
        leaves = {"x": bench.random(num_tokens, h)}
        for name, rows, columns in (("gate", inner, h), ("up", inner, h), ("down", h, inner)):
            leaves[f"{name}_a"] = bench.random(rank, columns, scale=columns**-0.5)
            leaves[f"{name}_b"] = bench.random(rows, rank, scale=0.1)

        def call(function, x: Tensor, up_weight: Tensor, down_weight: Tensor, **lora: Tensor):
            a, b = ([lora[f"{name}_{ab}"] for name in ("gate", "up", "down")] for ab in "ab")
            ups = [
                LoraPart(0, inner, a[0], b[0]),
                LoraPart(inner, 2 * inner, a[1], b[1]),
            ]
            gate_up = Projection(up_weight, None, ups)
            down = Projection(down_weight, None, [LoraPart(0, h, a[2], b[2])])
            return (function(x, gate_up, down, scaling)[1],)

        yield from bench.compare(
            f"gated_mlp T={num_tokens}",
            partial(call, gated_mlp.gated_mlp),
            partial(call, gated_mlp_reference.gated_mlp),
            leaves,
            **fixed,
        )


def packed_rows(bench: Bench) -> Iterator[Comparison]:
    """Rows in cells and back, bit for bit; cells of the activations' width and of half of it; rows left out."""
    num_heads, dim = 2, 8 if bench.is_small else 128
    num_slots, num_rows, slots_per_row = 300, 20, 8
    for narrow, num_tokens in ((False, 1), (False, 7), (True, 13)):
        kv_dtype = {2: torch.uint8, 4: torch.int16}[bench.dtype.itemsize] if narrow else bench.dtype
        shape = (num_slots, num_heads, dim)
        noise = bench.random(*shape).to(bench.dtype).contiguous().view(torch.uint8)
        buffers = [
            noise[..., : dim * kv_dtype.itemsize].contiguous().view(kv_dtype).clone()
            for _ in range(4)
        ]
        keys, values, expected_keys, expected_values = (
            pack_rows.plane(buffer, bench.dtype) for buffer in buffers
        )
        size = keys.shape[1]
        cells = bench.permutation(num_slots)[: num_rows * slots_per_row].view(
            num_rows, slots_per_row
        )
        cells = cells.to(bench.device)
        rows = bench.permutation(num_rows)[:num_tokens].to(bench.device)
        rows[num_tokens // 2 :: 5] = -1 if num_tokens > 1 else rows[0]
        # One field ends inside a cell, one crosses from keys to values, one is a view of something wider.
        widths = (3 * size, 2 * size - size // 2, 5 * size, size // 4)
        starts = (0, 3, 5, 15)
        fields = [
            Field(bench.random(num_tokens, width + 3)[:, :width], start)
            for width, start in zip(widths, starts, strict=True)
        ]
        pack_rows.pack_rows(fields, rows, cells, keys, values)
        pack_rows_reference.pack_rows(fields, rows, cells, expected_keys, expected_values)
        case = f"pack_rows T={num_tokens} cell={size}"
        yield exact(case, "keys", keys, expected_keys)
        yield exact(case, "values", values, expected_values)
        found, expected = (
            [Field(bench.random(*value.shape), start) for value, start in fields] for _ in range(2)
        )
        for ours, theirs in zip(found, expected, strict=True):
            theirs.value.copy_(ours.value)
        pack_rows.unpack_rows(found, rows, cells, keys, values)
        pack_rows_reference.unpack_rows(expected, rows, cells, keys, values)
        for i, (ours, theirs, source) in enumerate(zip(found, expected, fields, strict=True)):
            yield exact(f"un{case}", f"field {i}", ours.value, theirs.value)
            kept = rows >= 0
            yield exact(f"un{case}", f"field {i} again", ours.value[kept], source.value[kept])


def eight_bits(bench: Bench) -> Iterator[Comparison]:
    """Rows in e4m3 and back: no worse than the nearest number there is."""
    for num_tokens, width, scale in ((1, 8, 1e-3), (9, 300, 1.0), (5, 4100, 50.0)):
        x = bench.random(num_tokens, width, scale=scale)
        x[:, 0] *= 30
        x[1:2] = 0
        back = torch.empty_like(x)
        fp8_rows.decode(fp8_rows.encode(x), back)
        plain = fp8_rows_reference.round_trip(x.double()).to(bench.dtype)
        case = f"fp8_rows T={num_tokens} D={width} scale={scale}"
        yield measure(case, "round trip", back, plain, x.double())


def eight_bit_codes(bench: Bench) -> Iterator[Comparison]:
    """Every finite e4m3 number, decoded."""
    codes = torch.arange(256, dtype=torch.uint8, device=bench.device)
    codes = codes[(codes & 127) != 127].expand(3, -1)
    # A multiple of 4.
    codes = torch.cat([codes, codes[:, :2]], dim=1)
    scales = torch.tensor([[1.0], [2.0**-20], [0.3]], device=bench.device)
    encoded = torch.cat([codes, scales.view(torch.uint8)], dim=1)
    expected = (codes.view(torch.float8_e4m3fn).float() * scales).to(bench.dtype)
    back = torch.empty_like(expected)
    fp8_rows.decode(encoded, back)
    yield exact("fp8_rows", "every code", back, expected)


Case = Callable[[Bench], Iterator[Comparison]]
CASES: dict[str, Case] = {
    "norms": norms,
    "heads": heads,
    "gates": gates,
    "attention": attention,
    "pooled_attention": pooled_attention,
    "log_probabilities": log_probabilities,
    "linears": linears,
    "mlps": mlps,
    "packed_rows": packed_rows,
    "eight_bits": eight_bits,
    "eight_bit_codes": eight_bit_codes,
}


def shards(dtype: torch.dtype, *, is_small: bool) -> dict[str, Case]:
    """All comparisons in portions, by name: the cases, but attention, most of whose time is Triton's compiler's, by
    shape.
    """
    out = {name: case for name, case in CASES.items() if case is not attention}
    for shape in attention_shapes(dtype, is_small=is_small):
        out["attention/" + "x".join(map(str, shape))] = partial(attention, shapes=[shape])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated cases or shards")
    args = parser.parse_args()
    if not uses_triton(torch.empty(1, device=args.device)):
        parser.error("on the CPU the kernels need TRITON_INTERPRET=1 in the environment")
    dtype, is_small = getattr(torch, args.dtype), args.device == "cpu"
    known = CASES | shards(dtype, is_small=is_small)
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"--only: no case {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names:
        case = name.partition("/")[0]
        for found in known[name](Bench(args.device, dtype, is_small=is_small)):
            print(
                json.dumps({"name": case, **dataclasses.asdict(found), "ok": found.ok}), flush=True
            )


if __name__ == "__main__":
    main()
