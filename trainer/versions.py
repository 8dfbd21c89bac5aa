"""Version directories: written whole or not at all.

    <root>/vN/adapter_config.json, adapter_model.safetensors    the PEFT adapter: float32 masters
              manifest.json
              optimizer/state.safetensors                       apart: loaders read every safetensors file beside the adapter

A directory is made under a temporary name, synced, and renamed; one of that number that nobody committed is replaced.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

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
        for left in root.glob(".tmp-*"):
            shutil.rmtree(left, ignore_errors=True)

    def path(self, version: int) -> Path:
        return self.root / f"v{version}"

    def exists(self, version: int) -> bool:
        return (self.path(version) / manifest.FILE).is_file()

    def load(self, version: int, shape: ModelShape) -> LoraAdapter:
        """Masters of a version.

        Raises:
            FileNotFoundError: its directory is gone. ValueError: it is of another model.
        """
        return LoraAdapter.load_peft(self.path(version), shape)

    def load_optimizer(self, version: int, optimizer: Optimizer) -> bool:
        """Bring back the optimizer state saved with a version; whether there was any that fits."""
        path = self.path(version) / OPTIMIZER_FILE
        if not path.is_file():
            return False
        try:
            optimizer.load(path)
        except ValueError:
            # Another kind of optimizer wrote it: its state means nothing to this one.
            return False
        return True

    def save(self, proof: manifest.Manifest, masters: LoraAdapter, optimizer: Optimizer) -> Path:
        """Write version `proof.version`; it is on disk under its final name when this returns."""
        final = self.path(proof.version)
        temporary = self.root / f".tmp-v{proof.version}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        masters.save_peft(temporary, self._base_model)
        (temporary / OPTIMIZER_FILE).parent.mkdir()
        optimizer.save(temporary / OPTIMIZER_FILE)
        (temporary / manifest.FILE).write_bytes(manifest.encode(proof))
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(self.root)
        return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
