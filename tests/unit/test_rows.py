import pytest
import torch
from engine_support import NUM_DEVICE, make_view

from alchemist.trainer.rows import Recorded, RowsRevoked


@pytest.mark.parametrize("rows", [[4, 9, 5], [3, 0, 2], [3, 9, 0, 4, 1]])
def test_fields_and_keys_are_read_from_their_place(rows):
    """On the host, on the device, and mixed."""
    view, layout, host, k, v, _, cells = make_view()
    slots = torch.tensor([8, 2, 2, 0, 5])[: len(rows)]
    for field, (start, width) in layout.fields.items():
        if field in ("keys", "values"):
            continue
        out = torch.empty(len(rows), width)
        view.fetch(1, field, torch.tensor(rows), out)
        for value, row in zip(out, rows, strict=True):
            if row >= NUM_DEVICE:
                expected = host[1][row - NUM_DEVICE, start : start + width]
            else:
                # All cells of the row, in order: first those in the keys, then those in the values.
                whole = torch.cat([k[1][cells[row]].flatten(), v[1][cells[row]].flatten()])
                expected = whole[start : start + width]
            assert torch.equal(value, expected)
    keys, values = (torch.empty(len(rows), *k[0].shape[1:]) for _ in range(2))
    view.fetch_kv(2, torch.tensor(rows), slots, keys, values)
    for i, row in enumerate(rows):
        for out, pool, field in ((keys, k, "keys"), (values, v, "values")):
            start, width = layout.fields[field]
            copy = host[2][row - NUM_DEVICE, start : start + width] if row >= NUM_DEVICE else None
            expected = pool[2][slots[i]].flatten() if copy is None else copy
            assert torch.equal(out[i].flatten(), expected)


def test_a_changed_generation_revokes_exactly_its_row():
    view, *_, gens, _ = make_view()
    rows, known = torch.tensor([5, 0, 3]), torch.tensor([15, 10, 13])
    view.check(rows, known)
    gens[3] += 1
    with pytest.raises(RowsRevoked) as error:
        view.check(rows, known)
    assert error.value.rows == [3]


def test_what_is_taken_away_is_replaced_by_its_copy():
    found = Recorded(
        torch.tensor([3, 0, -1, 7]),
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([13, 10, 0, 17]),
        (torch.tensor([8, -1, -1, 7]), torch.tensor([18, 0, 0, 17])),
    )
    left = found.without(torch.tensor([3, 0]))
    assert left.rows.tolist() == [8, -1, -1, 7]
    assert left.gens[[0, 3]].tolist() == [18, 17]
    # A copy can end as well.
    assert left.without(torch.tensor([8, 7])).rows.tolist() == [-1, -1, -1, -1]


def test_records_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="length"):
        Recorded(torch.zeros(3), torch.zeros(2), torch.zeros(3))
