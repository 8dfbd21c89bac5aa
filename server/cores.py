"""The scheduler's cores: all of them, or its part while it decodes beside the trainer (`protocol/cores.py`)."""

from __future__ import annotations

import torch

from alchemist.protocol.cores import serving_cores
from alchemist.protocol.lease import Lease
from alchemist.protocol.states import TrainerState


class Cores:
    """Of the thread that computes; made before it has taken anything less than all."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._every = lease, torch.get_num_threads()

    def take(self, *, is_decode: bool) -> None:
        """What the next pass gets."""
        lease, every = self._lease, self._every
        is_beside = is_decode and lease.share > 0 and lease.state is TrainerState.RUNNING
        torch.set_num_threads(serving_cores(every) if is_beside else every)
