"""Our options: one frozen dataclass, and what is allowed in each. Where their values come from is in `options.py`.

A child process gets the resolved configuration through the JSON file named by `ALCHEMIST_RUN`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from alchemist.protocol import objectives
from alchemist.protocol.layout import ActivationDtype
from alchemist.protocol.objectives import LossType, Reference
from alchemist.server.machine_memory import physical_memory_bytes

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What `all-linear` stands for, under PEFT's names."""


_SHARE = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The resolved options of one server.

    Raises:
        ValueError: a value is out of range; names the option, the value and what is allowed.
    """

    data_dir: str = "./alchemist-data"
    """Directory of ledger and versions, created with mode 0700 (default: ./alchemist-data)."""

    objective: str = "kto"
    """Loss a vote is trained with, as TRL defines it: kto, apo_zero_unpaired, dpo (pairs: a correction
    and the answer it corrects, or two answers to one prompt with opposite votes; other votes wait), sft
    (up-votes and corrections), or a function of yours as module:function (default: kto)."""

    loss_type: LossType = "sigmoid"
    """Which dpo (default: sigmoid)."""

    label_smoothing: float = 0.0
    """Share of votes that dpo's sigmoid and robust take to be the wrong way round, below 0.5
    (default: 0)."""

    lora_rank: int = 16
    """LoRA rank, PEFT's r (default: 16)."""

    lora_alpha: float = 0.0
    """LoRA alpha; the adapter is scaled by alpha / rank. 0: twice the rank, as by default in TRL
    (default: 0)."""

    target_modules: tuple[str, ...] = LINEAR_MODULES
    """Where the adapter goes: all-linear, or a comma-separated list of
    q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj (default: all-linear)."""

    learning_rate: float = 1e-4
    """Step size of the optimizer (default: 1e-4)."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd without momentum (default: adamw)."""

    weight_decay: float = 0.0
    """Decoupled decay of the adapter per step, times the learning rate (default: 0)."""

    beta: float = 0.1
    """TRL's beta of all objectives but sft: how tightly the reference holds (default: 0.1)."""

    desirable_weight: float = 1.0
    """Weight of up-votes in the loss; not of dpo and sft (default: 1)."""

    undesirable_weight: float = 1.0
    """Weight of down-votes in the loss; not of dpo and sft (default: 1)."""

    reference: Reference = "base"
    """What the log-ratio is taken against: the base model, or the version that served the answer
    (default: base)."""

    max_grad_norm: float = 1.0
    """Largest L2 norm of a step's gradient, larger ones are scaled down; 0: off (default: 1)."""

    train_batch_size: int = 16
    """Votes per training step (default: 16)."""

    train_max_wait: float = 30.0
    """Seconds the oldest pending vote waits before a smaller batch is trained (default: 30)."""

    train_max_tokens: int = 4096
    """Unique tokens the trainer works on at once; a step with more is split, exactly. Less bounds memory
    and how long the trainer takes to stand aside; a completion longer than this is worked on alone
    (default: 4096)."""

    max_staleness: int = 4
    """Versions a recording may be behind the live one; older ones are recomputed, and votes on them are trained
    after all others (default: 4)."""

    record: Literal["prefill", "decode", "none"] = "prefill"
    """Which activations serving keeps for training: of prompts (prefill), of prompts and answers
    (decode), or none (default: prefill)."""

    record_fraction: float = 1.0
    """Share of requests that are recorded, 0 to 1; a request that says
    "alchemist": {"record": false}, or has the header X-Alchemist-Record: false, never is (default: 1)."""

    record_busy_share: float = 0.005
    """On a CPU, the part of the time in which requests run that copying what was recorded may take, 0 to 1. Prompts
    that find no room until then are not recorded, and computed again if they are voted on. 1: all are recorded,
    whoever waits (default: 0.005)."""

    record_min_tokens: int = 1
    """Prompts shorter than this many tokens are not recorded: computing them again costs less. From which
    length on recording pays, scripts/bench_record.py finds (default: 1)."""

    activation_device_fraction: float = 1.0
    """Share of the KV cache's slots that recorded activations may borrow while serving does not need
    them, above 0 up to 1 (default: 1)."""

    activation_host_bytes: int = -1
    """Memory for copies of recorded activations, which outlive the KV cache: a number in GiB, or with a
    unit as in 512MiB; 0: no copies; auto: a tenth of what is free at launch, at most 8 GiB and four times
    the KV cache's tokens (default: auto). Also --activation-memory."""

    activation_dtype: ActivationDtype = "auto"
    """What recorded activations are stored in. auto: as the model has them, and gradients are exact; fp8:
    the widest of them, gate_up, in eight bits with a scale a row: a quarter less memory a token of an 8B
    model, for gradients that are off by one to three percent (default: auto)."""

    activation_eviction: Literal["value", "lru"] = "value"
    """Which recorded activations go first when room is short: those that are longest in being trained from, by
    the delays of the votes and of their training so far, or the least recently used (default: value)."""

    lease_policy: Literal["idle", "share", "slo", "none"] = "idle"
    """When the trainer may run. idle: only while no request is in flight; share: also for --lease-share of the time
    requests are in flight; slo: then too, for as much of it as --slo-ttft-ms and --slo-tpot-ms leave; none: always, at
    no lower priority than serving, to measure what the lease is good for (default: idle)."""

    lease_share: float = _SHARE
    """Policy share: part of the time requests are in flight that the trainer may have, in quanta of
    20 ms (default: 0.2)."""

    slo_ttft_ms: float | None = None
    """Policy slo: target for the time to the first token, in ms, of streamed answers (default: none)."""

    slo_tpot_ms: float | None = None
    """Policy slo: target for the mean time between tokens, in ms. Answers that are not streamed are judged
    where both targets are given, by their sum over the answer (default: none)."""

    keep_versions: int = 16
    """Newest versions whose directories are kept, and that can be asked for by name; the live one always is
    (default: 16).
    """

    keep_completions: int = 100_000
    """Newest completions without feedback that are kept; one with feedback always is
    (default: 100000)."""

    no_train: bool = False
    """Serve and take votes, but do not start the trainer (default: off)."""

    trainer_timeout_s: float = 600.0
    """Seconds that a training step may not get on, of the time the lease lets it run, before the trainer is
    killed and started again; its votes are tried again (default: 600)."""

    seed: int = 0
    """Seed of the weights an adapter begins with (default: 0)."""

    probe_tolerance: float = 0.05
    """Largest difference, in nats per token, between the trainer's and the engine's logprobs of the
    probe; beyond it a version is not published (default: 0.05)."""

    shutdown_timeout: float = 10.0
    """Seconds that requests in flight get to finish at shutdown before they are aborted
    (default: 10)."""

    max_feedback_bytes: int = 262_144
    """Largest body of a feedback request, in bytes (default: 262144)."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            _require(self, name, getattr(self, name) in choices, "one of " + ", ".join(choices))
        for name, (low, high) in _INTEGER_RANGES.items():
            _require(self, name, low <= getattr(self, name) <= high, f"{low} to {high}")
        for name, positive in _NUMBERS.items():
            value = getattr(self, name)
            if value is None:
                continue
            is_allowed = math.isfinite(value) and (value > 0 if positive else value >= 0)
            _require(self, name, is_allowed, "above 0" if positive else "0 or more")
        is_objective = objectives.is_allowed(self.objective)
        _require(self, "objective", is_objective, objectives.ALLOWED)
        _require(self, "label_smoothing", self.label_smoothing < 0.5, "0 or more and below 0.5")
        _require(self, "lease_share", self.lease_share <= 1, "above 0 and up to 1")
        # What would be ignored is refused.
        is_dpo = self.objective == "dpo"
        is_default = self.loss_type == "sigmoid"
        _require(self, "loss_type", is_dpo or is_default, "sigmoid, but with --objective dpo")
        is_used = is_dpo and self.loss_type != "ipo"
        has = "0.0, but with --objective dpo and --loss-type sigmoid or robust"
        _require(self, "label_smoothing", is_used or not self.label_smoothing, has)
        defaults = {field.name: field.default for field in fields(self)}
        for name, without in _UNUSED.items():
            is_used = self.objective not in without
            has = f"{defaults[name]}, but with another --objective than {' and '.join(without)}"
            _require(self, name, is_used or getattr(self, name) == defaults[name], has)
        is_used = self.lease_policy == "share"
        has = f"{_SHARE}, but with --lease-policy share"
        _require(self, "lease_share", is_used or self.lease_share == _SHARE, has)
        targets = [
            name for name in ("slo_ttft_ms", "slo_tpot_ms") if getattr(self, name) is not None
        ]
        if self.lease_policy == "slo":
            has = "slo with --slo-ttft-ms, --slo-tpot-ms or both; idle, share, none without"
            _require(self, "lease_policy", bool(targets), has)
        for name in targets:
            _require(self, name, self.lease_policy == "slo", "only with --lease-policy slo")
        modules = self.target_modules
        is_known = bool(modules) and set(modules) <= set(LINEAR_MODULES)
        _require(
            self, "target_modules", is_known, "all-linear or some of " + ",".join(LINEAR_MODULES)
        )
        _require(self, "data_dir", bool(self.data_dir), "a path")
        _require(self, "record_fraction", 0 <= self.record_fraction <= 1, "0 to 1")
        _require(self, "record_busy_share", 0 <= self.record_busy_share <= 1, "0 to 1")
        fraction = self.activation_device_fraction
        _require(self, "activation_device_fraction", 0 < fraction <= 1, "above 0, up to 1")
        physical = physical_memory_bytes()
        fits = self.activation_host_bytes <= physical
        has = f"auto, or up to the {physical / 2**30:.1f} GiB this machine has"
        _require(self, "activation_host_bytes", fits, has)
        ordered = tuple(m for m in LINEAR_MODULES if m in modules)
        object.__setattr__(self, "target_modules", ordered)
        object.__setattr__(self, "lora_alpha", float(self.lora_alpha or 2 * self.lora_rank))
        object.__setattr__(self, "data_dir", os.path.abspath(self.data_dir))

    @property
    def ledger_path(self) -> Path:
        return Path(self.data_dir) / "ledger.sqlite3"

    @property
    def versions_path(self) -> Path:
        return Path(self.data_dir) / "versions"

    def to_json(self) -> str:
        """One line, every field resolved; what `from_json` reads and what is logged at launch."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Config:
        """The inverse of `to_json`.

        Raises:
            ValueError: unknown field, wrong type or a value out of range.
        """
        data = msgspec.json.decode(text, type=dict[str, Any])
        if unknown := set(data) - {f.name for f in fields(cls)}:
            raise ValueError(f"configuration has unknown fields: {', '.join(sorted(unknown))}")
        return msgspec.convert(data, cls)


CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind)
    for name, kind in get_type_hints(Config).items()
    if get_origin(kind) is Literal
}
# Field → the objectives that make nothing of it.
_UNUSED = {
    "beta": ("sft",),
    "reference": ("sft",),
    "desirable_weight": ("dpo", "sft"),
    "undesirable_weight": ("dpo", "sft"),
}
_INTEGER_RANGES = {
    "lora_rank": (1, 512),
    "train_batch_size": (1, 65536),
    "train_max_tokens": (1, 2**31 - 1),
    "max_staleness": (0, 2**31 - 1),
    "record_min_tokens": (1, 2**31 - 1),
    "keep_versions": (1, 2**31 - 1),
    "keep_completions": (0, 2**31 - 1),
    "seed": (0, 2**63 - 1),
    "max_feedback_bytes": (1024, 2**30),
}
# Field → whether 0 is refused.
_NUMBERS = {
    "lora_alpha": False,
    "learning_rate": True,
    "weight_decay": False,
    "beta": True,
    "desirable_weight": False,
    "undesirable_weight": False,
    "label_smoothing": False,
    "max_grad_norm": False,
    "lease_share": True,
    "slo_ttft_ms": True,
    "slo_tpot_ms": True,
    "train_max_wait": False,
    "probe_tolerance": True,
    "trainer_timeout_s": True,
    "shutdown_timeout": False,
}


def _require(config: Config, name: str, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        value = getattr(config, name)
        if name == "activation_host_bytes":
            value = f"{value / 2**30:.1f} GiB"
        raise ValueError(f"{option_name(name)} is {value!r}; allowed: {allowed}")


def option_name(name: str) -> str:
    """A field's name on the command line."""
    if name == "activation_host_bytes":
        return "--activation-host-gb"
    return "--" + name.replace("_", "-")
