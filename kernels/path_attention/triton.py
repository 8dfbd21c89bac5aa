"""Triton: flash attention over paths, forward and backward.

A tile's rows are queries times the heads of a group, so keys are read once for the whole group.
Keys, values and queries are gathered by index as they are loaded. Products take the inputs' dtype
and add up in float32 (float32 inputs: exact products, no TF32).

The backward is two kernels. One goes over tiles of queries for dq, the other over tiles of keys for
dk and dv; each recomputes the probabilities. That is seven products where five would do, but every
number is summed by one program in a fixed order: no atomics, no float32 copies of dk and dv,
bit-equal from run to run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import PathBlock
from .packing import packed

_LOG2E = math.log2(math.e)


class _Config(NamedTuple):
    """Rows and keys of a tile, warps, loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


class _Configs(NamedTuple):
    forward: _Config
    dq: _Config
    dkv: _Config


def _configs(q: Tensor) -> _Configs:
    """Fixed per class of shapes, by what sm_90's compiler says of registers and shared memory; not tuned on a GPU
    yet. To be tried there first: 32 rows for dk and dv at head dim 128, which spill a few registers with 64.
    """
    if q.dtype == torch.float32:
        return _Configs(*(_Config(32, 32, 4, 1),) * 3)
    if q.shape[-1] <= 64:
        return _Configs(_Config(128, 64, 4, 3), _Config(128, 64, 8, 2), _Config(64, 128, 8, 2))
    if q.shape[-1] <= 128:
        return _Configs(_Config(128, 64, 8, 3), _Config(128, 64, 8, 2), _Config(64, 128, 8, 2))
    return _Configs(_Config(64, 32, 8, 2), _Config(64, 32, 8, 2), _Config(32, 64, 8, 1))


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: list[PathBlock], *, with_output: bool = True
) -> tuple[Tensor | None, Tensor]:
    """(output [Q, N, D] or None, log-sum-exp of the scaled scores [Q, N] float32, natural)."""
    config = _configs(q).forward
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    groups = _groups(q, k)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if with_output else None
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.shape[0] == 0:
        return out, lse
    table = packed(plan, config.rows // groups, _configs(q).dkv.keys)
    _forward_kernel[(table.q_tiles.shape[0] * k.shape[1],)](
        q,
        k,
        v,
        q if out is None else out,
        lse,
        table.q_rows,
        table.depths,
        table.key_rows,
        table.q_tiles,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        k.shape[1],
        _LOG2E / math.sqrt(q.shape[-1]),
        WITH_OUTPUT=with_output,
        **_constants(q, groups, config),
    )
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    plan: list[PathBlock],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the inputs' dtypes. `lse` as `forward` gives it."""
    configs = _configs(q)
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    out, d_out = _last_contiguous(out), _last_contiguous(d_out)
    groups = _groups(q, k)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Rows that no query sees are in no tile.
    dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    if q.shape[0] == 0:
        return dq, dk, dv
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    scale = 1 / math.sqrt(q.shape[-1])
    table = packed(plan, configs.dq.rows // groups, configs.dkv.keys)
    indices = (table.q_rows, table.depths, table.key_rows)
    strides = [n for t in (q, k, v, d_out) for n in t.stride()[:2]]
    _dq_kernel[(table.q_tiles.shape[0] * k.shape[1],)](
        q,
        k,
        v,
        d_out,
        out,
        lse,
        delta,
        dq,
        *indices,
        table.q_tiles,
        *strides,
        *out.stride()[:2],
        k.shape[1],
        scale,
        scale * _LOG2E,
        **_constants(q, groups, configs.dq),
    )
    _dkv_kernel[(table.k_tiles.shape[0] * k.shape[1],)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        dk,
        dv,
        *indices,
        table.k_tiles,
        table.spans,
        *strides,
        k.shape[1],
        scale,
        scale * _LOG2E,
        **_constants(q, groups, configs.dkv),
    )
    return dq, dk, dv


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """`paged.merge_` in one pass, for outputs [n, N, D] and float32 log-sum-exps [n, N], all contiguous."""
    num_rows, width, rows = lse.numel(), out.shape[-1], 32
    if num_rows:
        _merge_kernel[(triton.cdiv(num_rows, rows),)](
            out,
            lse,
            other,
            other_lse,
            num_rows,
            D=width,
            BLOCK_D=max(16, triton.next_power_of_2(width)),
            ROWS=rows,
        )


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _groups(q: Tensor, k: Tensor) -> int:
    return q.shape[1] // k.shape[1]


def _constants(q: Tensor, groups: int, config: _Config) -> dict[str, int]:
    width = q.shape[-1]
    return {
        "GROUPS": groups,
        "D": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    q_rows,
    depths,
    key_rows,
    tiles,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    num_kv_heads,
    scale_log2e,
    WITH_OUTPUT: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile, kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    first, end = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1)
    path = key_rows + tl.load(tiles + tile * 3 + 2)
    d = tl.arange(0, BLOCK_D)
    query, head, ok = _queries(first, end, kv_head, GROUPS, ROWS)
    row = tl.load(q_rows + query, mask=ok, other=0).to(tl.int64)
    # Rows without a query see one key, so that their softmax is a number.
    depth = tl.load(depths + query, mask=ok, other=0)
    q_tile = _gather(q, row * q_t + head * q_h, d, ok, True, D, BLOCK_D)
    k += kv_head.to(tl.int64) * k_h
    v += kv_head.to(tl.int64) * v_h
    high = tl.load(depths + end - 1) + 1
    low = (tl.load(depths + first) + 1) // KEYS * KEYS
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top, total, acc = _attend(
        q_tile, k, v, path, k_t, v_t, depth, d, 0, low, top, total, acc, scale_log2e,
        False, WITH_OUTPUT, D, BLOCK_D, KEYS,
    )  # fmt: skip
    top, total, acc = _attend(
        q_tile, k, v, path, k_t, v_t, depth, d, low, high, top, total, acc, scale_log2e,
        True, WITH_OUTPUT, D, BLOCK_D, KEYS,
    )  # fmt: skip
    at = row * (num_kv_heads * GROUPS) + head
    tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453, mask=ok)
    if WITH_OUTPUT:
        y = acc / total[:, None]
        ok_out = ok[:, None] & (d < D)[None, :]
        tl.store(out + at[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=ok_out)


@triton.jit
def _attend(
    q_tile, k, v, path, k_t, v_t, depth, d, low, high, top, total, acc, scale_log2e,
    MASKED: tl.constexpr, WITH_OUTPUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys at depths [low, high)."""
    for start in range(low, high, KEYS):
        position = start + tl.arange(0, KEYS)
        ok = position < high
        row = tl.load(path + position, mask=ok, other=0).to(tl.int64)
        k_tile = _gather(k, row * k_t, d, ok, MASKED, D, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2e
        if MASKED:
            s = tl.where(position[None, :] <= depth[:, None], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, axis=1)
        if WITH_OUTPUT:
            v_tile = _gather(v, row * v_t, d, ok, MASKED, D, BLOCK_D)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        top = new
    return top, total, acc


@triton.jit
def _dq_kernel(
    q,
    k,
    v,
    d_out,
    out,
    lse,
    delta,
    dq,
    q_rows,
    depths,
    key_rows,
    tiles,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    do_t,
    do_h,
    out_t,
    out_h,
    num_kv_heads,
    scale,
    scale_log2e,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile, kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    first, end = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1)
    path = key_rows + tl.load(tiles + tile * 3 + 2)
    d = tl.arange(0, BLOCK_D)
    query, head, ok = _queries(first, end, kv_head, GROUPS, ROWS)
    row = tl.load(q_rows + query, mask=ok, other=0).to(tl.int64)
    depth = tl.load(depths + query, mask=ok, other=0)
    q_tile = _gather(q, row * q_t + head * q_h, d, ok, True, D, BLOCK_D)
    do_tile = _gather(d_out, row * do_t + head * do_h, d, ok, True, D, BLOCK_D)
    out_tile = _gather(out, row * out_t + head * out_h, d, ok, True, D, BLOCK_D)
    at = row * (num_kv_heads * GROUPS) + head
    # Σ_j p_j · dp_j of a row is d_out · out: what the softmax's backward takes off.
    delta_row = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    tl.store(delta + at, delta_row, mask=ok)
    lse2 = tl.load(lse + at, mask=ok, other=float("inf")) * 1.4426950408889634
    k += kv_head.to(tl.int64) * k_h
    v += kv_head.to(tl.int64) * v_h
    high = tl.load(depths + end - 1) + 1
    low = (tl.load(depths + first) + 1) // KEYS * KEYS
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    acc = _add_dq(
        q_tile, do_tile, k, v, path, k_t, v_t, depth, d, lse2, delta_row, 0, low, acc, scale_log2e,
        False, D, BLOCK_D, KEYS,
    )  # fmt: skip
    acc = _add_dq(
        q_tile, do_tile, k, v, path, k_t, v_t, depth, d, lse2, delta_row, low, high, acc, scale_log2e,
        True, D, BLOCK_D, KEYS,
    )  # fmt: skip
    ok_out = ok[:, None] & (d < D)[None, :]
    tl.store(dq + at[:, None] * D + d[None, :], (acc * scale).to(dq.dtype.element_ty), mask=ok_out)


@triton.jit
def _add_dq(
    q_tile, do_tile, k, v, path, k_t, v_t, depth, d, lse2, delta, low, high, acc, scale_log2e,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq, unscaled, over the keys at depths [low, high)."""
    for start in range(low, high, KEYS):
        position = start + tl.arange(0, KEYS)
        ok = position < high
        row = tl.load(path + position, mask=ok, other=0).to(tl.int64)
        k_tile = _gather(k, row * k_t, d, ok, MASKED, D, BLOCK_D)
        v_tile = _gather(v, row * v_t, d, ok, MASKED, D, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2e
        p = tl.exp2(s - lse2[:, None])
        if MASKED:
            p = tl.where(position[None, :] <= depth[:, None], p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _dkv_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    dk,
    dv,
    q_rows,
    depths,
    key_rows,
    tiles,
    spans,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    do_t,
    do_h,
    num_kv_heads,
    scale,
    scale_log2e,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile, kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    begin, num_keys = tl.load(tiles + tile * 5), tl.load(tiles + tile * 5 + 1)
    first_depth = tl.load(tiles + tile * 5 + 2)
    first_span, num_spans = tl.load(tiles + tile * 5 + 3), tl.load(tiles + tile * 5 + 4)
    d = tl.arange(0, BLOCK_D)
    column = tl.arange(0, KEYS)
    ok = column < num_keys
    row = tl.load(key_rows + begin + column, mask=ok, other=0).to(tl.int64)
    k_tile = _gather(k + kv_head.to(tl.int64) * k_h, row * k_t, d, ok, True, D, BLOCK_D)
    v_tile = _gather(v + kv_head.to(tl.int64) * v_h, row * v_t, d, ok, True, D, BLOCK_D)
    dk_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for span in range(first_span, first_span + num_spans):
        sees_one, sees_all = tl.load(spans + span * 3), tl.load(spans + span * 3 + 1)
        end = tl.load(spans + span * 3 + 2)
        dk_acc, dv_acc = _add_dkv(
            q, d_out, lse, delta, k_tile, v_tile, dk_acc, dv_acc, q_rows, depths, q_t, q_h, do_t, do_h,
            first_depth + column, d, sees_one, sees_all, kv_head, num_kv_heads, scale_log2e,
            True, GROUPS, D, BLOCK_D, ROWS,
        )  # fmt: skip
        dk_acc, dv_acc = _add_dkv(
            q, d_out, lse, delta, k_tile, v_tile, dk_acc, dv_acc, q_rows, depths, q_t, q_h, do_t, do_h,
            first_depth + column, d, sees_all, end, kv_head, num_kv_heads, scale_log2e,
            False, GROUPS, D, BLOCK_D, ROWS,
        )  # fmt: skip
    to = ((row * num_kv_heads + kv_head) * D)[:, None] + d[None, :]
    ok_out = ok[:, None] & (d < D)[None, :]
    tl.store(dk + to, (dk_acc * scale).to(dk.dtype.element_ty), mask=ok_out)
    tl.store(dv + to, dv_acc.to(dv.dtype.element_ty), mask=ok_out)


@triton.jit
def _add_dkv(
    q, d_out, lse, delta, k_tile, v_tile, dk_acc, dv_acc, q_rows, depths, q_t, q_h, do_t, do_h,
    key_depth, d, first, end, kv_head, num_kv_heads, scale_log2e,
    MASKED: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """dk, unscaled, and dv of a tile over the queries [first, end). Scores are held transposed: they
    are then the first operand of the products that follow, and stay in registers."""
    for start in range(first, end, ROWS // GROUPS):
        query, head, ok = _queries(start, end, kv_head, GROUPS, ROWS)
        row = tl.load(q_rows + query, mask=ok, other=0).to(tl.int64)
        q_tile = _gather(q, row * q_t + head * q_h, d, ok, True, D, BLOCK_D)
        do_tile = _gather(d_out, row * do_t + head * do_h, d, ok, True, D, BLOCK_D)
        at = row * (num_kv_heads * GROUPS) + head
        # Rows without a query have probability zero.
        lse2 = tl.load(lse + at, mask=ok, other=float("inf")) * 1.4426950408889634
        delta_row = tl.load(delta + at, mask=ok, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale_log2e
        p = tl.exp2(s - lse2[None, :])
        if MASKED:
            depth = tl.load(depths + query, mask=ok, other=0)
            p = tl.where(key_depth[:, None] <= depth[None, :], p, 0.0)
        dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - delta_row[None, :])
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    return dk_acc, dv_acc


@triton.jit
def _merge_kernel(
    out, lse, other, other_lse, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < num_rows
    d = tl.arange(0, BLOCK_D)
    own = _gather(out, row * D, d, ok, True, D, BLOCK_D).to(tl.float32)
    part = _gather(other, row * D, d, ok, True, D, BLOCK_D).to(tl.float32)
    gap = tl.load(other_lse + row, mask=ok, other=0.0) - tl.load(lse + row, mask=ok, other=0.0)
    y = own + (part - own) * tl.sigmoid(gap)[:, None]
    ok_out = ok[:, None] & (d < D)[None, :]
    tl.store(out + row[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=ok_out)


@triton.jit
def _queries(first, end, kv_head, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Of each row of a tile: its query, its head, and whether there is one."""
    row = tl.arange(0, ROWS)
    query = first + row // GROUPS
    ok = (row < ROWS // GROUPS * GROUPS) & (query < end)
    return query, kv_head * GROUPS + row % GROUPS, ok


@triton.jit
def _gather(base, offsets, d, ok, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]; without MASKED every row is there."""
    at = base + offsets[:, None] + d[None, :]
    if MASKED:
        tile = tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile
