"""SGLang with the flags Alchemist would give it, LoRA among them, without CUDA graphs and with nothing of Alchemist in
it: what decoding in graphs is compared with.

python scripts/gpu_eager.py --port 30001 [any SGLang flag]
"""

from __future__ import annotations

import os
import sys

from alchemist.server import processes
from alchemist.server.config import Config
from alchemist.server.main import with_defaults


def main() -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    words = [*with_defaults(Config(), sys.argv[1:]), "--disable-cuda-graph"]
    try:
        launch_server(
            prepare_server_args(words),
            run_scheduler_process_func=processes.run_scheduler,
            run_detokenizer_process_func=processes.run_detokenizer,
        )
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
