"""Part `step`: training steps of 8B-shaped models, random weights: gradients, speed, memory.

A step is loss, gradient, update of the float32 masters and their rounding to the serving dtype. Rows are of 4096
tokens, the last 256 of them the response. Speeds are gated: the replayed gradient must be the recomputed one but for
rounding. How far rounding alone moves it is measured: the same recomputed step in micro-batches of another size.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from gpu_part import Part
from gpu_rows import MODELS
from gpu_timing import free, in_turn, peak_bytes, profile, ratios
from gpu_workload import (
    OBJECTIVES,
    Batch,
    Model,
    PeftStep,
    make_samples,
    our_step,
    relative_error,
)
from step_workload import Ours

from alchemist.server.config import Config
from alchemist.trainer.step import Sample

GATE = 0.02
"""A difference of the replayed and the recomputed gradient, relative to its norm, that is always allowed: both round to
bfloat16.
"""
GATE_NOISE = 3.0
"""Or so many times the difference of two recomputed ones."""
GATE_MOST = 0.25
"""Never more: with that much noise a wrong gradient could not be told."""
FP8_GATE = 2.0**-4
"""The same over rows in eight bits: the largest error of a number in them."""
WHOLE = 1 << 30
"""Tokens: a step that is never split."""
ERRORS = ("grad_error_vs_ordinary", "fp8_grad_error_vs_ordinary")
SIZES_OF_ROWS = "fp8_row_bytes_vs_auto"
MEMORY = ("peak_memory_vs_peft", "tokens_same_memory_vs_peft")


class Sizes(NamedTuple):
    prompt: int
    response: int
    batch: int
    repeats: int
    accuracy_prompt: int
    accuracy_samples: int


SIZES = {False: Sizes(3840, 256, 2, 5, 960, 4), True: Sizes(120, 8, 2, 2, 60, 2)}


class GateError(RuntimeError):
    """What is to be timed does not compute what it should."""


class StepBench:
    """One run of the part."""

    def __init__(self, part: Part) -> None:
        self._part, self._sizes = part, SIZES[part.tiny]
        self._device = torch.device(part.device)
        self._split = Config().train_max_tokens
        self._recorded: tuple[Ours, Batch] | None = None
        self._noise = 0.0
        """Of the model at hand, see `GATE_NOISE`."""
        part.config |= {
            "sizes": self._sizes._asdict(),
            "max_tokens": self._split,
            "seconds_a_step": {},
            "peft_checkpointing": {},
        }

    def run(self) -> None:
        part = self._part
        part.attempt("gradient error", self._accuracy, ERRORS, 10)
        qwen = [n for n in part.row_names if "llama" not in n and n not in ERRORS]
        llama = [n for n in part.row_names if "llama" in n]
        part.attempt("Qwen3-8B", self._qwen, qwen, 30)
        # Its weights and rows go before the other model's come.
        self._recorded = None
        free(self._device)
        part.attempt("Llama-3.1-8B", lambda: self._throughput(self._model("llama31_8b")), llama, 20)

    def _model(self, key: str, num_layers: int = 0) -> Model:
        return Model(
            key,
            is_tiny=self._part.tiny,
            device=self._device,
            dtype=torch.bfloat16,
            num_layers=num_layers,
        )

    def _samples(self, model: Model, count: int, prompt: int, response: int) -> list[Sample]:
        return make_samples(model.shape.vocab_size, count, prompt, response)

    def _accuracy(self) -> None:
        """Four layers of true width: float32 of all of them, twice, would not leave room for much else."""
        model, sizes = self._model("qwen3_8b", num_layers=4), self._sizes
        wide = model.in_float32()
        samples = self._samples(model, sizes.accuracy_samples, sizes.accuracy_prompt, 64)
        exact_engine, engine = wide.engine(), model.engine()
        rows = {"replayed": Batch(*engine.record(samples))}
        rows["fp8"] = Batch(*engine.record(samples, activation_dtype="fp8"))
        errors: dict[str, list[float]] = {"ordinary": [], "replayed": [], "fp8": [], "peft": []}
        for i, plain in enumerate(samples):
            exact = _gradient(exact_engine, Batch([plain]))
            found = {"ordinary": _gradient(engine, Batch([plain]))}
            for name, batch in rows.items():
                found[name] = _gradient(engine, Batch([batch.samples[i]], batch.view))
            found["peft"] = PeftStep(model, [plain], "sft", checkpointing=False).gradient()
            for name, gradient in found.items():
                errors[name].append(relative_error(gradient, exact))
            del found
            free(self._device)
        self._part.config["gradient_errors"] = errors
        against = "float32 of the same four layers"
        for name, row in (("replayed", "grad_error"), ("fp8", "fp8_grad_error")):
            quotients = ratios(errors[name], errors["ordinary"])
            self._part.add(f"{row}_vs_ordinary", quotients, against=against)

    def _qwen(self) -> None:
        part, sizes = self._part, self._sizes
        model = self._model("qwen3_8b")
        # PEFT's activations and the rows of ours do not fit beside each other.
        theirs: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        samples = self._samples(model, sizes.batch, sizes.prompt, sizes.response)
        part.attempt("PEFT", lambda: self._peft(model, samples, theirs, peaks), [], 20)
        free(self._device)
        self._sizes_of_rows(model)
        others = (*ERRORS, *MEMORY, SIZES_OF_ROWS)
        speeds = [n for n in part.row_names if "llama" not in n and n not in others]
        # What follows has no part in the gate: memory is the same whatever the gradient is.
        part.attempt("speeds", lambda: self._throughput(model, theirs), speeds, 15)
        part.attempt("memory", lambda: self._memory(model, peaks), MEMORY, 10)

    def _peft(
        self,
        model: Model,
        samples: Sequence[Sample],
        seconds: dict[str, list[float]],
        peaks: dict[str, int],
    ) -> None:
        for objective, repeats in (("sft", 3), ("kto", 2)):
            for checkpointing in (False, True):
                free(self._device)
                try:
                    if objective == "sft":
                        one = PeftStep(model, samples[:1], "sft", checkpointing=checkpointing)
                        peaks["sft"] = peak_bytes(self._device, one.step)
                        del one
                    step = PeftStep(model, samples, objective, checkpointing=checkpointing).step
                    seconds[objective] = in_turn(self._device, {"": step}, repeats)[""]
                    break
                except torch.OutOfMemoryError:
                    if checkpointing:
                        raise
            self._part.config["seconds_a_step"][f"{objective} peft"] = min(seconds[objective])
            self._part.config["peft_checkpointing"][objective] = checkpointing

    def _throughput(self, model: Model, theirs: dict[str, list[float]] | None = None) -> None:
        """Tokens a second with and without rows; of Qwen3 also the other objectives and PEFT's times.

        Raises:
            GateError: the gradients differ; the gate's row says by how much, and nothing is timed.
        """
        part, sizes = self._part, self._sizes
        key = "llama31_8b" if model.shape.architecture.startswith("Llama") else "qwen3_8b"
        samples = self._samples(model, sizes.batch, sizes.prompt, sizes.response)
        ours = model.engine()
        kinds = {"recompute": Batch(samples), "recorded": Batch(*ours.record(samples))}
        self._recorded = (ours, kinds["recorded"])
        self._gate(ours, kinds, key)
        tokens = sizes.batch * (sizes.prompt + sizes.response)
        times = self._compare(model, ours, "sft", kinds)
        for kind, row in (("recompute", "recompute"), ("recorded", "reuse")):
            speeds = [tokens / s for s in times[kind]]
            part.add(f"sft_tokens_per_s_{row}_{key}", speeds, against=f"{tokens} tokens a step")
        part.add(f"sft_reuse_vs_recompute_{key}", ratios(times["recompute"], times["recorded"]))
        part.config[f"phases_{key}"] = {
            kind: dict(
                ours.step(batch.of("sft"), OBJECTIVES["sft"], batch.view, self._split).seconds
            )
            for kind, batch in kinds.items()
        }
        part.attempt("profile", lambda: self._profile(model, ours, kinds), [], 5)
        if key != "qwen3_8b":
            return
        part.attempt(
            "eight bits",
            lambda: self._eight_bits(model, ours, kinds["recorded"]),
            ["fp8_reuse_vs_auto"],
            8,
        )
        free(self._device)
        of = {"sft": times}
        of["kto"] = self._compare(model, ours, "kto", kinds)
        of["dpo"] = self._compare(model, ours, "dpo", kinds)
        for objective in ("dpo", "kto"):
            quotients = ratios(of[objective]["recompute"], of[objective]["recorded"])
            part.add(f"{objective}_base_reuse_vs_recompute", quotients)
        for objective, seconds in (theirs or {}).items():
            best = statistics.median(of[objective]["recorded"])
            part.add(
                f"{objective}_reuse_vs_peft",
                [s / best for s in seconds],
                against=f"{self._peft_name(objective)}, {statistics.median(seconds):.2f} s a step",
            )
        short = sizes.prompt // 60
        whole = self._samples(model, sizes.batch, short, sizes.prompt + sizes.response - short)
        step = our_step(model, ours, Batch(whole), "sft", self._split)
        found = in_turn(self._device, {"": step}, 2)[""]
        part.add("sft_all_loss_tokens_per_s_recompute", [tokens / s for s in found])

    def _sizes_of_rows(self, model: Model) -> None:
        layouts = [model.shape.row_layout(model.dtype, kind) for kind in ("fp8", "auto")]
        sizes = [layout.row_bytes for layout in layouts]
        slots = " and ".join(str(layout.slots_per_row) for layout in layouts)
        against = f"{sizes[1]} bytes; {slots} KV slots"
        self._part.add(SIZES_OF_ROWS, sizes[0] / sizes[1], against=against)

    def _eight_bits(self, model: Model, ours: Ours, exact: Batch) -> None:
        """The same step over rows whose `gate_up` is in eight bits."""
        narrow = Batch(*ours.record(exact.samples, activation_dtype="fp8"))
        gradients = [_gradient(ours, batch) for batch in (narrow, exact)]
        error = self._part.config["fp8_gradient_error"] = relative_error(*gradients)
        if not error <= min(GATE_MOST, max(FP8_GATE, GATE_NOISE * self._noise)):
            raise GateError(f"the gradient over rows in eight bits is off by {error:.1e}")
        times = self._compare(model, ours, "sft", {"exact": exact, "fp8": narrow})
        self._part.add("fp8_reuse_vs_auto", ratios(times["exact"], times["fp8"]))

    def _profile(self, model: Model, ours: Ours, kinds: Mapping[str, Batch]) -> None:
        """Where the two steps' time goes: what a missed bar is looked up in."""
        self._part.config[f"profile_{model.shape.architecture}"] = {
            kind: profile(self._device, our_step(model, ours, batch, "sft", self._split))
            for kind, batch in kinds.items()
        }

    def _peft_name(self, objective: str) -> str:
        has = self._part.config["peft_checkpointing"][objective]
        return "transformers + PEFT, TRL's loss" + (", gradient checkpointing" if has else "")

    def _gate(self, ours: Ours, kinds: Mapping[str, Batch], key: str) -> None:
        """Raises GateError: the replayed gradient is not the recomputed one, nor within what rounding does to it."""
        recompute, sizes = kinds["recompute"], self._sizes
        exact = _gradient(ours, recompute)
        # Other sizes of products are other kernels, which add up in another order.
        is_split = sizes.batch * (sizes.prompt + sizes.response) > self._split
        again = _gradient(ours, recompute, WHOLE if is_split else 1)
        noise = self._noise = relative_error(again, exact)
        error = relative_error(_gradient(ours, kinds["recorded"]), exact)
        allowed = min(GATE_MOST, max(GATE, GATE_NOISE * noise))
        said = f"{error:.1e}, allowed {allowed:.1e}; two recomputed ones differ by {noise:.1e}"
        self._part.config.setdefault("gate", {})[key] = {"difference": error, "noise": noise}
        self._part.add(f"replay_gradient_{key}", error / allowed, against=said)
        if not error <= allowed:
            raise GateError(f"no speed counts, the replayed gradient is off: {said}")

    def _compare(
        self, model: Model, ours: Ours, objective: str, kinds: Mapping[str, Batch]
    ) -> dict[str, list[float]]:
        steps = {
            kind: our_step(model, ours, batch, objective, self._split)
            for kind, batch in kinds.items()
        }
        times = in_turn(self._device, steps, self._sizes.repeats)
        for kind, seconds in times.items():
            name = f"{objective} {kind} {model.shape.architecture}"
            self._part.config["seconds_a_step"][name] = statistics.median(seconds)
        return times

    def _memory(self, model: Model, peaks: Mapping[str, int]) -> None:
        """One row of 4k tokens against PEFT's, then as many as are recorded, never split, in PEFT's peak."""
        if self._recorded is None or "sft" not in peaks:
            raise RuntimeError("there are no rows, or no peak of PEFT's, to compare with")
        theirs = peaks["sft"]
        ours, (samples, view) = self._recorded
        found = {}
        for count in (1, len(samples)):
            step = our_step(model, ours, Batch(samples[:count], view), "sft", WHOLE)
            found[count] = peak_bytes(self._device, step)
        self._part.config["peak_bytes"] = {"peft, 1 row": theirs} | {
            f"ours, {count} rows": peak for count, peak in found.items()
        }
        against = f"{self._peft_name('sft')}, one row, {theirs / 2**20:.0f} MiB"
        self._part.add("peak_memory_vs_peft", found[1] / theirs, against=against)
        most = max((count for count, peak in found.items() if peak <= theirs), default=0)
        against += ", in one device batch; a lower bound: no more was tried"
        self._part.add("tokens_same_memory_vs_peft", float(most), against=against)


def _gradient(ours: Ours, batch: Batch, limit: int | None = None) -> dict[str, torch.Tensor]:
    """Args:
    limit: tokens at which the step is split; None: as the server splits it.
    """
    found = ours.step(batch.of("sft"), OBJECTIVES["sft"], batch.view, limit).grads
    return {name: g.clone() for name, g in found.items()}


def main() -> None:
    part = Part.from_argv("step", __doc__ or "")
    part.config["models"] = MODELS
    StepBench(part).run()


if __name__ == "__main__":
    main()
