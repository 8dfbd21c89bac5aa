"""What the launcher tells the processes it starts: one JSON file, named in the environment.

Without that variable the plugin does nothing, so plain SGLang in the same virtual environment stays plain.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from alchemist.protocol.shm import SegmentHandle
from alchemist.server.config import Config

ENV = "ALCHEMIST_RUN"
OPT_OUT = "alchemist_no_record"
"""Key in a request's `custom_params`, which SGLang hands on from the HTTP process to the scheduler."""


class Run(msgspec.Struct, kw_only=True, frozen=True):
    """One run of the server."""

    directory: str
    """0700; every socket is in it; gone when the server is."""
    config: str
    """`Config` as JSON."""
    lease: SegmentHandle

    @property
    def control_address(self) -> str:
        """Scheduler → launcher."""
        return f"ipc://{self.directory}/control.ipc"

    @property
    def trainer_address(self) -> str:
        """Trainer ↔ launcher."""
        return f"ipc://{self.directory}/trainer.ipc"

    def rows_address(self, tp_rank: int = 0) -> str:
        """Trainer ↔ scheduler."""
        return f"ipc://{self.directory}/rows-tp{tp_rank}.ipc"

    def load_config(self) -> Config:
        return Config.from_json(self.config)

    def publish(self) -> None:
        """Write the file and name it for this process's children."""
        path = Path(self.directory) / "run.json"
        path.write_bytes(msgspec.json.encode(self))
        os.environ[ENV] = str(path)


def current() -> Run | None:
    """The run this process belongs to, or None: then it is no process of ours."""
    path = os.environ.get(ENV)
    return msgspec.json.decode(Path(path).read_bytes(), type=Run) if path else None
