"""Entry point `sglang.srt.plugins`: SGLang calls `register` once in its launcher and once in every scheduler."""

from __future__ import annotations

import multiprocessing

from alchemist.server import run


def register() -> None:
    """Put the hooks of this process in place; nothing at all in a process that is not of a run of ours."""
    this_run = run.current()
    if this_run is None:
        return
    from alchemist.server import hooks

    if multiprocessing.parent_process() is None:
        from alchemist.server.front import FRONT

        hooks.register(hooks.main_hooks(FRONT))
        return
    from alchemist.server.engine import Engine

    hooks.register(hooks.scheduler_hooks(Engine(this_run)))
