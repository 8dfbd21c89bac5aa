"""Rows as the trainer reads them on a GPU, on tensors of the CPU: the same values, proved after the last read."""

import threading
import time

import pytest
import torch
from engine_support import NUM_DEVICE, make_view

from alchemist.trainer import gpu_rows
from alchemist.trainer.gpu_rows import DEPTH, GpuView
from alchemist.trainer.rows import RowsRevoked


def make_views():
    """The plain view, and one as on a GPU over the same tensors; `gens` and `counts`."""
    plain, layout, host, k, v, gens, cells = make_view()
    counts = torch.zeros(2, dtype=torch.int64)
    return plain, GpuView(layout, host, k, v, gens, cells, counts), layout, k, gens, counts


@pytest.mark.parametrize("rows", [[4, 9, 5], [3, 0, 2], [3, 9, 0, 4, 1], [5, 6, 7, 2], []], ids=str)
@pytest.mark.parametrize("is_ahead", [False, True])
def test_values_are_those_of_the_plain_view(rows, is_ahead):
    plain, view, layout, k, _, _ = make_views()
    rows = torch.tensor(rows, dtype=torch.int64)
    slots = torch.arange(rows.numel())
    for layer in range(layout.num_layers - 1, -1, -1):
        if is_ahead:
            view.prefetch(layer, rows)
        for field, width in layout.widths.items():
            if field not in ("keys", "values"):
                found, expected = torch.empty(2, rows.numel(), width)
                view.fetch(layer, field, rows, found)
                plain.fetch(layer, field, rows, expected)
                assert torch.equal(found, expected)
        kv = torch.empty(4, rows.numel(), *k[0].shape[1:])
        view.fetch_kv(layer, rows, slots, kv[0], kv[1])
        plain.fetch_kv(layer, rows, slots, kv[2], kv[3])
        assert torch.equal(kv[:2], kv[2:])


def test_no_more_layers_are_copied_ahead_than_can_be_used():
    _, view, layout, *_ = make_views()
    rows = torch.tensor([NUM_DEVICE, NUM_DEVICE + 2])
    for layer in range(layout.num_layers - 1, -1, -1):
        view.prefetch(layer, rows)
        assert {at for at, _ in view._ahead} >= set(range(max(0, layer - DEPTH), layer + 1))
        assert len(view._ahead) <= DEPTH + 2
    view.confirm()
    assert not view._ahead


def test_a_row_that_ends_after_it_was_checked_is_found_by_the_proof():
    _, view, *_, gens, _ = make_views()
    rows, known = torch.tensor([5, 0, 3]), torch.tensor([15, 10, 13])
    view.check(rows, known)
    view.confirm()
    view.check(rows, known)
    gens[3] += 1
    with pytest.raises(RowsRevoked) as error:
        view.confirm()
    assert error.value.rows == [3]
    # What was read for a result that is not used is nobody's any more.
    view.confirm()


def test_a_row_that_is_lost_already_is_found_early():
    _, view, *_, gens, _ = make_views()
    gens[0] += 1
    with pytest.raises(RowsRevoked) as error:
        view.check(torch.tensor([5, 0]), torch.tensor([15, 10]))
    assert error.value.rows == [0]


def test_the_proof_waits_for_ends_that_have_begun():
    """As the server does it: count, and only later change the generation, then count again."""
    _, view, *_, gens, counts = make_views()
    view.check(torch.tensor([5, 0]), torch.tensor([15, 10]))
    counts[0] += 1

    def settle():
        time.sleep(0.05)
        gens[0] += 1
        counts[1] += 1

    thread = threading.Thread(target=settle)
    thread.start()
    with pytest.raises(RowsRevoked) as error:
        view.confirm()
    thread.join()
    assert error.value.rows == [0]


def test_a_server_that_does_not_settle_costs_the_rows(monkeypatch):
    monkeypatch.setattr(gpu_rows, "SETTLE_S", 0.02)
    _, view, *_, counts = make_views()
    view.check(torch.tensor([5, 0]), torch.tensor([15, 10]))
    counts[0] += 1
    with pytest.raises(RowsRevoked) as error:
        view.confirm()
    assert sorted(error.value.rows) == [0, 5]
