import pytest
import torch
from engine_support import random_model

from alchemist.trainer.families import ModelShape
from alchemist.trainer.rows import ActivationView, Recorded, RowsRevoked


def make_view():
    shape = ModelShape.from_config(random_model("llama").config)
    layout = shape.row_layout(torch.float32)
    pool = [torch.randn(6, layout.width) for _ in range(shape.num_layers)]
    k, v = ([torch.randn(9, 2, 6) for _ in range(shape.num_layers)] for _ in range(2))
    row_gen = torch.arange(10, 16)
    return ActivationView(layout, pool, k, v, row_gen), layout, pool, k, v, row_gen


def test_fields_and_keys_are_read_from_their_place():
    view, layout, pool, k, v, _ = make_view()
    rows, slots = torch.tensor([5, 0, 3]), torch.tensor([8, 2, 2])
    for field, (start, width) in layout.fields.items():
        out = torch.empty(3, width)
        view.fetch(1, field, rows, out)
        assert torch.equal(out, pool[1][rows, start : start + width])
    keys, values = torch.empty(3, 2, 6), torch.empty(3, 2, 6)
    view.fetch_kv(2, slots, keys, values)
    assert torch.equal(keys, k[2][slots])
    assert torch.equal(values, v[2][slots])


def test_a_changed_generation_revokes_exactly_its_row():
    view, *_, row_gen = make_view()
    rows, gens = torch.tensor([5, 0, 3]), torch.tensor([15, 10, 13])
    view.check(rows, gens)
    row_gen[3] += 1
    with pytest.raises(RowsRevoked) as error:
        view.check(rows, gens)
    assert error.value.rows == [3]


def test_records_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="length"):
        Recorded(torch.zeros(3), torch.zeros(2), torch.zeros(3))
