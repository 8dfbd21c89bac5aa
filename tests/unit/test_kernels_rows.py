"""Rows in cells, and rows in eight bits, on the CPU: against the reference, and against where the pool puts them."""

import pytest
import torch
from kernel_accuracy import CASES, Bench
from pool_support import World

from alchemist.kernels import fp8_rows, pack_rows
from alchemist.kernels.pack_rows import Field

NAMES = ("x", "q", "attn", "mid", "gate_up")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["packed_rows", "eight_bits", "eight_bit_codes"])
def test_against_the_reference(name, dtype):
    found = list(CASES[name](Bench("cpu", dtype, is_small=True)))
    assert found
    bad = [comparison for comparison in found if not comparison.ok]
    assert not bad, "\n".join(map(str, bad))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("page_size", [1, 4])
def test_rows_are_packed_where_the_pool_writes_them_and_the_trainer_reads_them(kv_dtype, page_size):
    world = World(page_size, kv_dtype=kv_dtype)
    layout, device = world.layout, world.pool.device
    device.borrow(4)
    rows = device.take(3)[::-1].copy()
    planes = [pack_rows.plane(buffer.clone(), torch.float32) for buffer in (world.k[1], world.v[1])]
    # A token that is not recorded in between.
    chosen = torch.tensor([0, 2, 3])
    padded = torch.full((4,), -1)
    padded[chosen] = torch.from_numpy(rows)
    cells = torch.from_numpy(device.cells)
    fields = [
        Field(torch.randn(4, layout.fields[name][1]), layout.fields[name][0] // layout.cell)
        for name in NAMES
    ]
    pack_rows.pack_rows(fields[:2], padded, cells, *planes)
    pack_rows.pack_rows(fields[2:], padded, cells, *planes)
    for name, (value, _) in zip(NAMES, fields, strict=True):
        device.write(1, name, rows, value[chosen])
        out = torch.empty(3, value.shape[1])
        world.view.fetch(1, name, padded[chosen], out)
        assert torch.equal(out, value[chosen])
    for plane, buffer in zip(planes, (world.k[1], world.v[1]), strict=True):
        assert torch.equal(plane, pack_rows.plane(buffer, torch.float32))
    found = [Field(torch.full_like(value, 7.0), start) for value, start in fields]
    pack_rows.unpack_rows(found, padded, cells, *planes)
    for (value, _), (expected, _) in zip(found, fields, strict=True):
        assert torch.equal(value[chosen], expected[chosen])
        assert bool((value[1] == 7.0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": []}, "0 fields given, allowed: 1 to 6"),
        ({"fields": [Field(torch.zeros(3, 9), 0)]}, r"takes cells 0 to 5, a row has 4"),
        ({"fields": [Field(torch.zeros(3, 2), 4)]}, r"takes cells 4 to 5, a row has 4"),
        ({"fields": [Field(torch.zeros(2, 2), 0)]}, r"a field is \(2, 2\).* expected \[3, width\]"),
        ({"fields": [Field(torch.zeros(2, 3).T, 0)]}, "contiguous in the width"),
        ({"fields": [Field(torch.zeros(3, 2).half(), 0)]}, "a field is torch.float16"),
        ({"values": torch.zeros(5, 3)}, r"of one shape: \(5, 2\), \(5, 3\)"),
        ({"rows": torch.zeros(3, dtype=torch.int32)}, "int64 and contiguous: torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    good = {
        "fields": [Field(torch.zeros(3, 2), 0)],
        "rows": torch.arange(3),
        "cells": torch.zeros(3, 2, dtype=torch.int64),
        "keys": torch.zeros(5, 2),
        "values": torch.zeros(5, 2),
    }
    with pytest.raises(ValueError, match=message):
        pack_rows.pack_rows(**(good | change))


def decoded(encoded):
    out = torch.empty(50, 400)
    fp8_rows.decode(encoded, out)
    return out


def test_eight_bits_are_within_their_bound():
    torch.manual_seed(0)
    x = torch.randn(50, 400) * torch.logspace(-6, 6, 50)[:, None]
    x[:, :100] *= 1e-4
    encoded = fp8_rows.encode(x)
    # A float32's place has four codes; the last one has the scale.
    assert (encoded.dtype, encoded.shape) == (torch.float32, (50, 101))
    scale = x.abs().amax(dim=1, keepdim=True) / fp8_rows.LARGEST
    bound = torch.maximum(x.abs() / 16, scale / 1024)
    error = (decoded(encoded) - x).abs()
    # Scale and quotient are rounded, too.
    assert bool((error <= bound * (1 + 1e-5)).all())
    # Bits are all there is to a row: a copy of them reads the same, whatever it is taken for.
    copy = encoded.view(torch.bfloat16)[torch.arange(50)]
    assert torch.equal(decoded(copy), decoded(encoded))
    with pytest.raises(ValueError, match="rows are 6 wide, must be a multiple of 4"):
        fp8_rows.encode(x[:, :6])
