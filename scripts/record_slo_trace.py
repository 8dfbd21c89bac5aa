"""Records what policy slo's controller is tested on: latencies of a real server, training under calm and heavy load.

python scripts/record_slo_trace.py tests/data/slo_trace.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import msgspec
from bench_common import machine, progress
from serving_load import Load
from serving_servers import ALCHEMIST, Backlog, Target

from alchemist.server.main import TINY_MODEL
from alchemist.server.slo import Observation

TTFT_MS, TPOT_MS = 400.0, 60.0
OUTPUT_LEN = 24
PHASES = (("calm", 40, 2.0), ("heavy", 32, math.inf), ("calm", 40, 2.0))
"""Load, requests, requests a second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slo-trace-") as name:
        args = ["--model-path", str(TINY_MODEL), "--data-dir", str(Path(name) / "data")]
        args += ["--lease-policy", "slo", "--slo-ttft-ms", str(TTFT_MS)]
        args += ["--slo-tpot-ms", str(TPOT_MS)]
        with Target("slo", ALCHEMIST, args, Path(name)) as target:
            load = Load(str(TINY_MODEL), 512, OUTPUT_LEN)
            target.wait_ready()
            load.run(target.url, 4, math.inf, seed=99)
            backlog = Backlog(target)
            backlog.start()
            phases = []
            for seed, (label, requests, rate) in progress(list(enumerate(PHASES)), "recording"):
                timings = load.run(target.url, requests, rate, seed)
                seen = [
                    Observation(
                        ttft_ms=round(timing.ttft, 2),
                        tpot_ms=round(timing.tpot, 2),
                        num_tokens=OUTPUT_LEN,
                    )
                    for timing in timings
                ]
                phases.append({"load": label, "requests": msgspec.to_builtins(seen)})
            backlog.stop()
    trace = {
        "machine": machine(),
        "targets": {"ttft_ms": TTFT_MS, "tpot_ms": TPOT_MS},
        "phases": phases,
    }
    options.file.write_text(json.dumps(trace, indent=1) + "\n")


if __name__ == "__main__":
    main()
