"""Plain SGLang with the flags Alchemist would give it, and nothing of Alchemist in it: the baseline of benchmarks.

python scripts/plain_sglang.py --port 30001 [any SGLang flag]
"""

from __future__ import annotations

import os
import sys

from alchemist.server import processes
from alchemist.server.config import Config
from alchemist.server.main import with_defaults

_LORA = {
    "--enable-lora": 0,
    "--max-lora-rank": 1,
    "--max-loras-per-batch": 1,
    "--max-loaded-loras": 1,
    "--lora-backend": 1,
}


def flags(argv: list[str]) -> list[str]:
    """Alchemist's defaults without LoRA."""
    words = with_defaults(Config(), argv)
    out: list[str] = []
    skip = 0
    in_modules = False
    for word in words:
        if word.startswith("--"):
            in_modules = word == "--lora-target-modules"
            skip = _LORA.get(word, -1)
            if in_modules or skip >= 0:
                continue
        elif in_modules:
            continue
        elif skip > 0:
            skip -= 1
            continue
        out.append(word)
    return out


def main() -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        launch_server(
            prepare_server_args(flags(sys.argv[1:])),
            run_scheduler_process_func=processes.run_scheduler,
            run_detokenizer_process_func=processes.run_detokenizer,
        )
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
