"""Opening a data directory, and whether it fits what the server is asked to do: same base model, same kind of adapter.

Its versions are adapters of one model; its completions are token ids of that model's vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from alchemist.server.config import LINEAR_MODULES, Config
from alchemist.server.errors import LaunchError, LedgerError
from alchemist.server.ledger import Ledger
from alchemist.server.records import Version

_SETTING = "base_model"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_SAMPLE_BYTES = 2**20


def open_ledger(config: Config) -> Ledger:
    """Open the data directory's ledger; the directory is ours until it is closed.

    Raises:
        LaunchError: read-only, full, damaged, or in use by another server.
    """
    try:
        return Ledger(config.ledger_path, keep_completions=config.keep_completions)
    except (LedgerError, OSError) as error:
        raise LaunchError(f"--data-dir {config.data_dir}: {error}") from None


def check_data_dir(config: Config, model_path: str, ledger: Ledger) -> None:
    """Compare with what the directory was made with; a new directory is marked as this model's.

    Raises:
        LaunchError: made for another model, or with an adapter of another shape.
    """
    mark = {"path": model_path, "fingerprint": fingerprint(model_path)}
    made_for = ledger.get_setting(_SETTING).result()
    if made_for is None:
        ledger.set_setting(_SETTING, mark).result()
    elif made_for["fingerprint"] != mark["fingerprint"]:
        same = (
            "whose weights have changed since" if made_for["path"] == model_path else "another one"
        )
        raise LaunchError(
            f"--data-dir {config.data_dir} was made for the model {made_for['path']}; "
            f"--model-path {model_path} is {same}; use another --data-dir"
        )
    _check_adapters(config, ledger.versions().result())


def _check_adapters(config: Config, versions: list[Version]) -> None:
    kept = [v for v in versions if v.path and (Path(v.path) / "adapter_config.json").is_file()]
    if not kept:
        return
    newest = Path(kept[-1].path or "")
    made_with = _adapter_options(json.loads((newest / "adapter_config.json").read_text()))
    asked = {
        "--lora-rank": config.lora_rank,
        "--lora-alpha": config.lora_alpha,
        "--target-modules": ",".join(config.target_modules),
    }
    wrong = [name for name in asked if made_with[name] != asked[name]]
    if not wrong:
        return
    if all(v.version == 0 for v in versions):
        # Nothing has been trained: the trainer makes the base model's adapter anew.
        shutil.rmtree(newest)
        return
    name = wrong[0]
    raise LaunchError(
        f"{name} is {asked[name]}, but the versions in --data-dir {config.data_dir} were made with "
        f"{made_with[name]}; allowed: the same, or another --data-dir"
    )


def _adapter_options(raw: dict[str, Any]) -> dict[str, Any]:
    order = {name: i for i, name in enumerate(LINEAR_MODULES)}
    modules = sorted(raw["target_modules"], key=lambda name: order.get(name, len(order)))
    return {
        "--lora-rank": raw["r"],
        "--lora-alpha": float(raw["lora_alpha"]),
        "--target-modules": ",".join(modules),
    }


def fingerprint(model_path: str) -> str:
    """What tells a model from another: the ends of its weight files, or its name where there are none here.

    A moved or copied model keeps its fingerprint; reading the whole of a large one would take minutes.
    """
    directory = Path(model_path).expanduser()
    files = sorted(f for f in directory.glob("*") if f.suffix in _WEIGHTS and f.is_file())
    if not files:
        config = directory / "config.json"
        return _digest([config]) if config.is_file() else model_path
    return _digest(files)


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
