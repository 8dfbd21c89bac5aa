"""The rows of `gpu_suite.py`: what each shows, and its bar. Ratios of time are baseline ÷ ours (more is better), of
latency and memory ours ÷ baseline (less is better).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PARTS = ("ipc", "kernels", "tests", "step", "serve", "preempt")
"""In the order in which they run."""
MODELS = {"qwen3_8b": "Qwen3-8B", "llama31_8b": "Llama-3.1-8B"}
LENGTHS = (1024, 2048, 4096, 8192)
"""Prompt tokens at which recording's cost is measured."""
POLICIES = ("idle", "slo")
KERNEL_DTYPES = ("bfloat16", "float32")
KERNEL_CASES = {
    "norms": "residual sum and RMSNorm",
    "heads": "norm and rotation of heads",
    "gates": "SwiGLU",
    "attention": "path attention",
    "pooled_attention": "attention over keys in the pool's slots and others",
    "log_probabilities": "LM head and log-probabilities",
    "linears": "replayed linear with adapters",
    "mlps": "gated MLP with adapters",
    "packed_rows": "rows packed and unpacked",
    "eight_bits": "rows in eight bits and back",
    "eight_bit_codes": "every number of eight bits",
}
"""Of `tests/kernel_accuracy.py`."""


class Spec(NamedTuple):
    """One row: where it is measured and what it must show."""

    name: str
    part: str
    what: str
    unit: str = "x"
    bar: float | None = None
    less_is_better: bool = False

    def is_met(self, value: float) -> bool | None:
        if self.bar is None:
            return None
        return value <= self.bar if self.less_is_better else value >= self.bar

    @property
    def bar_text(self) -> str:
        if self.bar is None:
            return ""
        unit = "" if self.unit == "x" else f" {self.unit}"
        return f"{'≤' if self.less_is_better else '≥'} {self.bar:g}{unit}"


def _at_most(name: str, part: str, what: str, bar: float, unit: str = "x") -> Spec:
    return Spec(name, part, what, unit, bar, less_is_better=True)


_IPC = [
    _at_most("ipc_wrong_bytes", "ipc", "bytes that another process reads otherwise", 0.0, "bytes"),
    Spec("ipc_open_ms", "ipc", "opening the base weights' handles", "ms"),
    _at_most(
        "ipc_extra_memory",
        "ipc",
        "memory of a process that has opened the base weights, less that of one that has not, ÷ weights",
        0.02,
    ),
    Spec("ipc_refusals", "ipc", "cases where IPC cannot work that are refused in words", "x", 1.0),
    _at_most("ipc_leaked_mib", "ipc", "memory left after 100 importers came and went", 16.0, "MiB"),
    _at_most("ipc_leaked_maps", "ipc", "the owner's descriptors left by them", 0.0, "files"),
    _at_most(
        "ipc_owner_errors", "ipc", "the owner's bytes changed by importers killed", 0.0, "bytes"
    ),
]
_KERNELS = [
    Spec("kernels_cases", "kernels", "outputs and gradients that were compared", "tensors"),
    *(
        _at_most(
            f"kernels_failed_{case}_{dtype}",
            "kernels",
            f"{what}, {dtype}: those whose error against float64 is not within the two bars below",
            0.0,
            "tensors",
        )
        for case, what in KERNEL_CASES.items()
        for dtype in KERNEL_DTYPES
    ),
    _at_most(
        "kernels_max_error",
        "kernels",
        "the worst one's largest error ÷ that of PyTorch in the same dtype",
        2.0,
    ),
    _at_most("kernels_rms_error", "kernels", "the worst one's rms error ÷ the same", 1.25),
    Spec(
        "attention_forward_vs_sdpa",
        "kernels",
        "path attention at 4k tokens, 32 heads on 8; PyTorch's flash attention ÷ ours",
    ),
    Spec("attention_backward_vs_sdpa", "kernels", "its backward"),
    Spec("attention_flashinfer", "kernels", "our forward's time ÷ FlashInfer's"),
    _at_most(
        "attention_pool_max_error",
        "kernels",
        "FlashInfer over scattered slots of a KV pool, put together with our forward over the rest: "
        "largest error ÷ that of PyTorch",
        2.0,
    ),
    _at_most("attention_pool_rms_error", "kernels", "its rms error ÷ the same", 1.25),
    Spec(
        "attention_pool_vs_copy",
        "kernels",
        "8 sequences of 3840 tokens in slots and 256 computed; keys and values copied and our forward ÷ that",
    ),
    Spec("attention_flex_forward_vs_ours", "kernels", "FlexAttention's forward, 4k tokens ÷ ours"),
    Spec("attention_flex_both_vs_ours", "kernels", "its forward and backward ÷ ours"),
    Spec("liger_rms_norm_vs_ours", "kernels", "Liger's RMSNorm, both directions ÷ ours"),
    Spec("liger_swiglu_vs_ours", "kernels", "Liger's SwiGLU, both directions ÷ ours"),
    Spec("liger_linear_loss_vs_ours", "kernels", "Liger's linear loss, both directions ÷ ours"),
    Spec(
        "fp8_encode_vs_copy",
        "kernels",
        "gate_up of 4k tokens of Llama-3.1-8B into eight bits; a plain copy of it ÷ that",
    ),
    Spec("fp8_decode_vs_copy", "kernels", "the same, and back"),
]
_TESTS = [
    _at_most("gpu_tests_failed", "tests", "tests in tests/gpu that fail", 0.0, "tests"),
]
_STEP = [
    _at_most(
        "grad_error_vs_ordinary",
        "step",
        "error of the replayed bf16 gradient against float32 ÷ that of the ordinary bf16 step",
        1.1,
    ),
    Spec(
        "fp8_grad_error_vs_ordinary",
        "step",
        "the same with gate_up recorded in eight bits (--activation-dtype fp8)",
    ),
    *(
        spec
        for key, model in MODELS.items()
        for spec in (
            _at_most(
                f"replay_gradient_{key}",
                "step",
                f"{model}, difference of the replayed and the recomputed gradient ÷ what rounding allows; "
                "above one no speed of this model counts",
                1.0,
            ),
            Spec(
                f"sft_tokens_per_s_recompute_{key}",
                "step",
                f"{model}, LoRA r16, SFT of 4k-token rows, without reuse",
                "tokens/s",
                12_500.0,
            ),
            Spec(
                f"sft_tokens_per_s_reuse_{key}",
                "step",
                f"{model}, the same with prompts recorded",
                "tokens/s",
                20_000.0,
            ),
            Spec(
                f"sft_reuse_vs_recompute_{key}", "step", f"{model}, the one ÷ the other", "x", 1.8
            ),
        )
    ),
    Spec(
        "sft_all_loss_tokens_per_s_recompute",
        "step",
        "Qwen3-8B, without reuse, loss on every token",
        "tokens/s",
    ),
    Spec(
        "fp8_reuse_vs_auto",
        "step",
        "Qwen3-8B, SFT with prompts recorded; seconds with rows as the model has them ÷ in eight bits",
    ),
    Spec(
        "fp8_row_bytes_vs_auto", "step", "Qwen3-8B, a row in eight bits ÷ as the model has it", "x"
    ),
    Spec("dpo_base_reuse_vs_recompute", "step", "Qwen3-8B, DPO against the base", "x", 1.45),
    Spec("kto_base_reuse_vs_recompute", "step", "Qwen3-8B, KTO against the base", "x", 1.45),
    Spec("sft_reuse_vs_peft", "step", "Qwen3-8B, SFT over PEFT with TRL's loss", "x", 2.0),
    Spec("kto_reuse_vs_peft", "step", "Qwen3-8B, KTO over PEFT with TRL's loss", "x", 2.0),
    _at_most(
        "peak_memory_vs_peft", "step", "peak of one SFT step above what was there before", 0.53
    ),
    Spec("tokens_same_memory_vs_peft", "step", "tokens of one SFT step in PEFT's peak", "x", 2.0),
]
_SERVE = [
    _at_most(
        "recording_changed_tokens", "serve", "greedy tokens that recording changes", 0.0, "tokens"
    ),
    *(
        _at_most(f"ttft_recording_{n}", "serve", f"TTFT of {n}-token prompts, recorded ÷ not", 1.03)
        for n in LENGTHS
    ),
    _at_most(
        "tpot_decode_recording", "serve", "TPOT with decode recorded in CUDA graphs ÷ not", 1.02
    ),
    _at_most(
        "graph_vs_eager_logprobs",
        "serve",
        "LoRA logprobs of decoded tokens, CUDA graphs on against off",
        0.1,
        "nats",
    ),
    _at_most(
        "decode_vs_prefill_logprobs",
        "serve",
        "LoRA logprobs of the same tokens, decoded against prefilled",
        0.1,
        "nats",
    ),
    _at_most(
        "publish_to_first_token_ms",
        "serve",
        "publish → first token of the new version",
        100.0,
        "ms",
    ),
    _at_most("publish_failed_requests", "serve", "requests that failed meanwhile", 0.0, "requests"),
    _at_most(
        "one_copy_server",
        "serve",
        "device memory with the trainer less without it, less a bare context's, ÷ weights",
        0.02,
    ),
    _at_most(
        "trainer_death_failed_requests",
        "serve",
        "requests that a killed trainer fails",
        0.0,
        "requests",
    ),
    _at_most(
        "trainer_restart_leaked_mib",
        "serve",
        "device memory left by trainers that were killed",
        16.0,
        "MiB",
    ),
    Spec("trainer_restart_s", "serve", "until a new trainer is ready", "s"),
    _at_most(
        "server_death_trainer_left",
        "serve",
        "trainers alive 10 s after their server",
        0.0,
        "processes",
    ),
    _at_most("server_death_leaked_mib", "serve", "device memory left then", 64.0, "MiB"),
]
_PREEMPT = [
    _at_most(
        "revoke_p99_ms",
        "preempt",
        "revoke → acknowledge, p99, while training at 4k tokens",
        10.0,
        "ms",
    ),
    Spec("revoke_p50_ms", "preempt", "the same, p50", "ms"),
    Spec("train_tokens_dedicated", "preempt", "the trainer with nobody to serve", "tokens/s"),
    *(
        _at_most(
            f"{what}_{quantile}_{policy}",
            "preempt",
            f"{what.upper()} {quantile} while training under {policy} ÷ plain SGLang, 5 requests/s",
            bar,
        )
        for policy in POLICIES
        for what in ("ttft", "tpot")
        for quantile, bar in (("p50", 1.05), ("p99", 1.5))
    ),
    *(
        Spec(
            f"{what}_{quantile}_paused",
            "preempt",
            f"the same with the trainer paused: what a live adapter costs by itself, {what.upper()} {quantile}",
        )
        for what in ("ttft", "tpot")
        for quantile in ("p50", "p99")
    ),
    *(
        Spec(
            f"output_throughput_{policy}",
            "preempt",
            f"output tokens/s under {policy} ÷ plain SGLang's, a burst",
        )
        for policy in POLICIES
    ),
    Spec(
        "train_share_light",
        "preempt",
        "dedicated training rate kept under slo, 1 request/s",
        "x",
        0.62,
    ),
    Spec(
        "train_share_5rps",
        "preempt",
        "dedicated training rate kept under slo, 5 requests/s",
        "x",
        0.47,
    ),
    Spec("tpot_45ms_met_5rps", "preempt", "requests with TPOT ≤ 45 ms meanwhile", "x", 0.97),
]
SPECS: tuple[Spec, ...] = (*_IPC, *_KERNELS, *_TESTS, *_STEP, *_SERVE, *_PREEMPT)
BY_NAME: Mapping[str, Spec] = {spec.name: spec for spec in SPECS}
