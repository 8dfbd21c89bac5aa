"""While both run, serving and the trainer keep to their parts of the cores; a prompt mostly has all of them."""

from types import SimpleNamespace

import pytest
import torch
from scheduler_support import Scheduler
from sglang.srt.mem_cache.radix_cache import RadixCache

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


@pytest.fixture
def scheduler(tmp_path):
    scheduler = Scheduler(str(tmp_path), 100)
    yield scheduler
    scheduler.engine.close()


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
    cores.take(is_decode=is_decode, is_alone=False)
    is_divided = is_decode and share > 0 and is_running
    assert threads() == (serving_cores(EVERY) if is_divided else EVERY)


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.95, 1.0])
def test_a_prompt_leaves_some_to_a_trainer_with_all_of_the_time_where_nobody_waits_behind_it(
    threads, lease, is_alone, share
):
    cores = Cores(lease)
    lease.set_share(share)
    cores.take(is_decode=False, is_alone=is_alone)
    assert threads() == EVERY
    lease.advance(TrainerEvent.STEP_BEGUN)
    cores.take(is_decode=False, is_alone=is_alone)
    assert threads() == (serving_cores(EVERY) if is_alone and share == 1 else EVERY)


def test_they_are_all_servings_while_the_trainer_sleeps(threads, lease):
    cores = Cores(lease)
    lease.set_share(0.3)
    lease.advance(TrainerEvent.STEP_BEGUN)
    cores.take(is_decode=True, is_alone=False)
    lease.advance(TrainerEvent.REVOKED)
    cores.take(is_decode=True, is_alone=False)
    assert threads() == EVERY
    lease.advance(TrainerEvent.GRANTED)
    cores.take(is_decode=True, is_alone=False)
    assert threads() == serving_cores(EVERY)


@pytest.mark.parametrize(
    ("waiting", "others", "is_alone"), [(0, 0, True), (1, 0, False), (0, 3, False)]
)
def test_the_scheduler_knows_who_waits_behind_a_prompt(
    threads, scheduler, waiting, others, is_alone
):
    engine = scheduler.engine
    engine._cores = Cores(engine.lease)
    for event in (TrainerEvent.ATTACHED, TrainerEvent.STEP_BEGUN):
        engine.lease.advance(event)
    engine.lease.set_share(1.0)
    # Before SGLang's loop begins: a warm-up.
    assert scheduler.prefill(2).begin()
    assert threads() == EVERY
    engine.on_requests(
        SimpleNamespace(
            waiting_queue=[object()] * waiting,
            tree_cache=RadixCache.create_simulated(),
            idle_sleeper=None,
            ps=SimpleNamespace(tp_rank=0),
        ),
        [],
    )
    assert scheduler.prefill(2, but=others).begin()
    assert threads() == (serving_cores(EVERY) if is_alone else EVERY)
