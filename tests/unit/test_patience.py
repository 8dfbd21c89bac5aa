"""Patience with a trainer: what counts as waiting, and what as progress."""

import pytest

from alchemist.server.patience import Patience


def waited(*looks):
    patience = Patience()
    return [patience.look(*look) for look in looks]


def test_time_without_progress_adds_up():
    assert waited((1, 1.0, 1.0), (1, 1.0, 1.0), (1, 2.0, 1.0)) == [0, 1, 3]


def test_progress_begins_anew():
    assert waited((1, 1.0, 1.0), (1, 5.0, 1.0), (2, 5.0, 1.0), (2, 1.0, 1.0)) == [0, 5, 0, 1]


def test_only_time_in_which_it_may_run_counts():
    assert waited((1, 1.0, 1.0), (1, 1000.0, 0.0), (1, 10.0, 0.25)) == pytest.approx([0, 0, 2.5])
