"""A SGLang plugin of the suite's servers, plain and ours alike: what a host without checkpoints and without a compiler
needs. The suite's environment has it in `sglang.srt.plugins`; nothing else loads it.

    dummy weights   as large as trained ones are. SGLang's are below 1e-3, norms included: every log-probability is the
                    vocabulary's logarithm then, with and without an adapter, and no comparison could fail
    norms           sgl_kernel's own where FlashInfer's are neither compiled nor may be
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import torch

DEVIATION = 0.02
"""Of weights; as transformers initialises them."""


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.model_loader.loader.initialize_dummy_weights"
    HookRegistry.register(target, fill, HookType.AROUND)
    if torch.cuda.is_available() and os.environ.get("FLASHINFER_DISABLE_JIT"):
        _use_built_in_norms()


def fill(original: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """AROUND `initialize_dummy_weights`: norms are ones, biases zero, the rest normal and by their names, so that all
    servers have the same.
    """
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        if value.dim() == 1:
            value.fill_(1.0 if "norm" in name else 0.0)
            continue
        generator = torch.Generator(device=value.device)
        generator.manual_seed(zlib.crc32(name.encode()))
        value.normal_(0.0, DEVIATION, generator=generator)


def _use_built_in_norms() -> None:
    try:
        from flashinfer.jit.norm import gen_norm_module
        from sgl_kernel import elementwise
    except ImportError:
        return
    if not gen_norm_module().is_aot:
        elementwise._has_flashinfer = False
