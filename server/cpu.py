"""SGLang on a machine without a GPU: an out-of-tree platform and two shims, nothing else.

`prepare()` must run before `sglang` is imported in a process; `alchemist.server` does so on import.
On a CUDA machine both entry points do nothing.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
_library: torch.library.Library | None = None


def prepare() -> None:
    """Make `import sglang` and `import transformers` work beside the CPU build of torch. Idempotent."""
    global _library
    if _library is not None or torch.cuda.is_available() or _has_torchvision_operators():
        return
    # torchvision's Python half registers fake kernels for its operators at import; declaring the schemas is all that
    # needs.
    _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        _library.define(schema)  # type: ignore[no-untyped-call]


def _has_torchvision_operators() -> bool:
    """Whether torchvision's operators load: then they bring their schemas, and a second declaration ends the process.
    They do not where they are linked against CUDA and torch is the CPU build.
    """
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            except OSError:
                continue
            return True
    return False


def ignore_pin_memory() -> None:
    """For a scheduler process: SGLang's LoRA code asks for pinned memory without looking at the device.

    Not for any other process: torch's meta-device context knows these functions by identity, so under it
    transformers would load a model with uninitialised rotary tables.
    """
    if torch.cuda.is_available():
        return
    for name in ("tensor", "zeros", "empty", "ones", "full", "arange"):
        setattr(torch, name, _without_pin_memory(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _without_pin_memory(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapped


def keep_freed_memory() -> None:
    """For a scheduler process: have the C library keep what is freed, up to a gigabyte.

    Activations that are kept until nobody waits are freed later than the next prefill begins. Given back to the system
    in between they come as fresh pages, and each costs a fault: 1300 a prompt of 512 tokens of the embedded model.
    Elsewhere than on glibc nothing is done.
    """
    if torch.cuda.is_available():
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        # The threshold's largest value; a block beyond it is the system's all the same.
        set_option(_M_MMAP_THRESHOLD, 32 << 20)
        set_option(_M_TRIM_THRESHOLD, 1 << 30)


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`: the platform class, or None where CUDA is there."""
    if torch.cuda.is_available():
        return None
    return "alchemist.server.cpu_platform.CpuPlatform"
