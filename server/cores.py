"""The scheduler's cores: all of them, or its part beside the trainer (`protocol/cores.py`)."""

from __future__ import annotations

import torch

from alchemist.protocol.cores import serving_cores
from alchemist.protocol.lease import Lease
from alchemist.protocol.states import TrainerState


class Cores:
    """Of the thread that computes; made before it has taken anything less than all."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._every = lease, torch.get_num_threads()

    def take(self, *, is_decode: bool, is_alone: bool) -> None:
        """What the next pass gets.

        Args:
            is_alone: it is of one request, and none waits behind it.
        """
        lease, every = self._lease, self._every
        share = lease.share
        leaves_some = share > 0 if is_decode else share >= 1 and is_alone
        is_beside = leaves_some and lease.state is TrainerState.RUNNING
        torch.set_num_threads(serving_cores(every) if is_beside else every)
