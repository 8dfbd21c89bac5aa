"""Version directories: written whole or not at all.

    <root>/vN/adapter_config.json, adapter_model.safetensors: the PEFT adapter: float32 masters
              manifest.json
              optimizer/state.safetensors    apart: loaders read every safetensors file beside the adapter

A directory is made under a temporary name, synced, and renamed; one of that number that nobody committed is replaced.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from alchemist.protocol import manifest
from alchemist.trainer.families import ModelShape
from alchemist.trainer.lora import LoraAdapter
from alchemist.trainer.optimizer import Optimizer

OPTIMIZER_FILE = "optimizer/state.safetensors"


class VersionStore:
    """The version directories of one data directory."""

    def __init__(self, root: Path, base_model: str) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = root
        self._base_model = base_model
        self._parents: dict[int, int | None] = {}
        for left in root.glob(".tmp-*"):
            shutil.rmtree(left, ignore_errors=True)

    def path(self, version: int) -> Path:
        return self.root / f"v{version}"

    def exists(self, version: int) -> bool:
        return (self.path(version) / manifest.FILE).is_file()

    def parent(self, version: int) -> int | None:
        """What a version that exists was trained from; None: of v0.

        Raises:
            OSError, ValueError: its manifest cannot be read.
        """
        if version not in self._parents:
            data = (self.path(version) / manifest.FILE).read_bytes()
            self._parents[version] = manifest.decode(data).parent
        return self._parents[version]

    def load(self, version: int, shape: ModelShape) -> LoraAdapter:
        """Masters of a version.

        Raises:
            FileNotFoundError: its directory is gone. ValueError: it is of another model, or damaged.
        """
        try:
            return LoraAdapter.load_peft(self.path(version), shape)
        except SafetensorError as error:
            raise ValueError(f"{self.path(version)} is damaged: {error}") from error

    def load_optimizer(self, version: int, optimizer: Optimizer) -> bool:
        """Bring back the optimizer state saved with a version; whether there was any that fits."""
        path = self.path(version) / OPTIMIZER_FILE
        if not path.is_file():
            return False
        try:
            optimizer.load(path)
        except (ValueError, SafetensorError):
            # Another kind of optimizer wrote it, or it is damaged: its state means nothing to this one.
            return False
        return True

    def save(self, proof: manifest.Manifest, masters: LoraAdapter, optimizer: Optimizer) -> Path:
        """Write version `proof.version`; it is on disk under its final name when this returns.

        Raises:
            OSError: it cannot be written, as when the disk is full; nothing is left of the attempt.
        """
        final = self.path(proof.version)
        self._parents.pop(proof.version, None)
        temporary = self.root / f".tmp-v{proof.version}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(mode=0o700)
            self._write(temporary, proof, masters, optimizer)
        except SafetensorError as error:
            # The library's own error for any trouble with a file.
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(str(error)) from error
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(self.root)
        return final

    def _write(
        self,
        directory: Path,
        proof: manifest.Manifest,
        masters: LoraAdapter,
        optimizer: Optimizer,
    ) -> None:
        masters.save_peft(directory, self._base_model)
        (directory / OPTIMIZER_FILE).parent.mkdir()
        optimizer.save(directory / OPTIMIZER_FILE)
        (directory / manifest.FILE).write_bytes(manifest.encode(proof))
        for file in directory.rglob("*"):
            _sync(file)
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
