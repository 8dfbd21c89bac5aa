"""How serving and a trainer that runs beside requests in flight divide a CPU's cores (policies `share` and `slo`).

Two processes whose operations each want every core get next to nothing done: each operation is over when its last
thread is, and one of them has always lost its core. Decoding a token for a few requests gains little by more cores, as
it waits for memory or for Python, and so does a training step of a small model by the last ones. So for as long as
both run, each decode step keeps to one part of the cores and the trainer to the other. A prefill takes all of them,
and the trainer, which the operating system puts last, stands back; but where the trainer has all of the time (a share
of 1: under `slo`, latencies leave room), a prefill that nobody waits behind keeps to serving's part, too. It is the
queue that makes a first token late: as soon as there is one, cores are all its.
"""

from __future__ import annotations


def divides(lease_policy: str) -> bool:
    """Not under `none`, which shows what it is like without."""
    return lease_policy in ("share", "slo")


def trainer_cores(num_cores: int) -> int:
    return max(1, num_cores // 2)


def serving_cores(num_cores: int) -> int:
    return num_cores - num_cores // 2
