"""One process records, gives slots back and is killed; another one reads what it was told of, and is never deceived."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from pool_support import as_recorded, layout, read

from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Importer
from alchemist.trainer.rows import ActivationView, RowsRevoked

SCRIPT = Path(__file__).parent / "pool_writer.py"
ASKED = 400


class Reader:
    """The trainer's side of a pool in another process."""

    def __init__(self, seed: int) -> None:
        self.writer = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        importer = Importer()
        where = {
            name: [importer.open(handle) for handle in msgspec.convert(found, list[TensorHandle])]
            if isinstance(found, list)
            else importer.open(msgspec.convert(found, TensorHandle))
            for name, found in self.line().items()
        }
        self.view = ActivationView(layout(1), **where)
        self.num_right = self.num_revoked = 0

    def line(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(self.writer.stdout.readline())
        return found

    def ask(self) -> tuple[Any, list[float]]:
        """Where an answer's tokens are, and what they held."""
        self.writer.stdin.write(b"?")
        told = self.line()
        stamps = told.pop("stamps")
        arrays = {name: torch.tensor(ids).numpy() for name, ids in told.items()}
        return as_recorded(SimpleNamespace(**arrays)), stamps

    def read(self, found: Any, stamps: list[float]) -> None:
        """All that is left of it, as the trainer does: what is read is right, or it is refused."""
        expected = dict(zip(torch.nonzero(found.rows >= 0).flatten().tolist(), stamps, strict=True))
        while bool((found.rows >= 0).any()):
            try:
                values = read(self.view, found, torch.Size((1, 2)))
            except RowsRevoked as revoked:
                self.num_revoked += 1
                found = found.without(torch.tensor(revoked.rows))
                continue
            positions = torch.nonzero(found.rows >= 0).flatten().tolist()
            assert [stamp for stamp, _ in values] == [expected[i] for i in positions]
            self.num_right += 1
            return

    def close(self) -> None:
        self.writer.kill()
        self.writer.wait()
        self.writer.stdin.close()
        self.writer.stdout.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_reader_is_right_or_refused_while_the_writer_works_and_when_it_was_killed(seed):
    reader = Reader(seed)
    try:
        told = []
        # On a busy machine the writer is seldom at work while the reader reads.
        for i in range(10 * ASKED):
            if i >= ASKED and min(reader.num_right, reader.num_revoked) > ASKED / 10:
                break
            told.append(reader.ask())
            # It goes on meanwhile, for a random while.
            time.sleep((i * 7919 % 20) / 20_000)
            reader.read(*told[-1])
        assert reader.num_right > ASKED / 10
        assert reader.num_revoked > ASKED / 10
        # At some instant in the middle of its work.
        told = [reader.ask() for _ in range(20)]
        reader.writer.kill()
        reader.writer.wait()
        for found, stamps in told:
            reader.read(found, stamps)
    finally:
        reader.close()
