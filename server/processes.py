"""SGLang's subprocess entry points, reached through this package so that `cpu.prepare()` has run when they start.

SGLang spawns fresh interpreters; what they unpickle first is one of these functions.
"""

from __future__ import annotations

from typing import Any


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(*args, **kwargs)


def run_detokenizer(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    run_detokenizer_process(*args, **kwargs)
