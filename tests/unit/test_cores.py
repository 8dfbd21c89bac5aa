"""While both run, serving and the trainer keep to their parts of the cores; alone, or with a prompt, each has all."""

import pytest
import torch

from alchemist.protocol.cores import divides, serving_cores, trainer_cores
from alchemist.protocol.lease import Lease
from alchemist.protocol.states import TrainerEvent
from alchemist.server.config import CHOICES
from alchemist.server.cores import Cores

EVERY = 6


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(EVERY)
    yield torch.get_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def lease():
    lease = Lease.create()
    lease.advance(TrainerEvent.ATTACHED)
    return lease


@pytest.mark.parametrize("num_cores", range(2, 20))
def test_the_parts_are_the_whole(num_cores):
    serving, trainer = serving_cores(num_cores), trainer_cores(num_cores)
    assert serving + trainer == num_cores
    assert serving >= trainer >= 1


def test_a_single_core_is_both_parts():
    assert serving_cores(1) == trainer_cores(1) == 1


def test_only_policies_that_let_the_trainer_run_beside_requests_divide():
    assert {policy for policy in CHOICES["lease_policy"] if divides(policy)} == {"share", "slo"}


@pytest.mark.parametrize("is_decode", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("is_running", [True, False])
def test_decoding_leaves_cores_to_a_trainer_that_runs_and_may(
    threads, lease, is_decode, share, is_running
):
    cores = Cores(lease)
    lease.set_share(share)
    if is_running:
        lease.advance(TrainerEvent.STEP_BEGUN)
    cores.take(is_decode=is_decode)
    is_divided = is_decode and share > 0 and is_running
    assert threads() == (serving_cores(EVERY) if is_divided else EVERY)


def test_they_are_all_servings_while_the_trainer_sleeps(threads, lease):
    cores = Cores(lease)
    lease.set_share(0.3)
    lease.advance(TrainerEvent.STEP_BEGUN)
    cores.take(is_decode=True)
    lease.advance(TrainerEvent.REVOKED)
    cores.take(is_decode=True)
    assert threads() == EVERY
    lease.advance(TrainerEvent.GRANTED)
    cores.take(is_decode=True)
    assert threads() == serving_cores(EVERY)
