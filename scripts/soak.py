"""A server under full memory pressure that learns all the while: does it ever say a wrong token, fail, or leak?

    python scripts/soak.py [--minutes 30] [--json FILE|-]

Clients hold conversations that do not fit the KV pool together, so that requests queue, running ones are retracted and
borrowed memory is taken back; users vote on the answers, and the trainer learns whenever it may: after every `--burst`
the load pauses for `--lull` seconds, so that policy idle trains and the next burst finds the trainer at work. Every
K-th request is a fixed batch of prompts at temperature 0 on the base model, sent twice: the second time its prompts may
be in the radix tree. Its tokens must be those of plain SGLang, which is asked first, with the same flags; only prompts
are taken whose tokens cannot depend on company (see `fixed_batch.py`), so the comparison is exact.

    wrong_tokens        of fixed batches; bar 0
    logprob_difference  largest to plain SGLang's, nats: what is wrong without changing a token shows here
    errors, log_errors  requests that failed; lines of the server's log that are errors, or begin a traceback
    fds_*, own_*        growth of each process from the second quarter of the time to the last
    reuse_ratio         of trained tokens that came from rows, which lie in memory that serving takes back; bar 0.5
    shared_growth       the same of shared memory; left_behind: processes and files in /dev/shm after the end

"Full pressure" is `kv_in_use`: used by running requests, looked at once a second during bursts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fixed_batch
import psutil
from activation_options import activation_rows, budget_flags, full_status
from bench_common import Row, Run, model_name, quartiles
from process_figures import growth, still_alive
from serving_servers import ALCHEMIST, PLAIN, Target
from serving_targets import started
from sglang_figures import metric_sums
from soak_clients import Seen, Soak

from alchemist.server.main import TINY_MODEL

MIN_REUSE = 0.5
"""Share of the trained tokens that must have come from rows; or what the trainer did was no test of lent memory."""
MAX_GROWTH_FDS = 8
MAX_GROWTH_SHARED = 1 << 20


def settle(
    target: Target, options: argparse.Namespace
) -> tuple[list[list[int]], list[fixed_batch.Answer], float]:
    """The fixed batch, what plain SGLang answers to it, and by how much its own logprobs differ between a prompt alone
    and all at once.
    """
    prompts = fixed_batch.candidates(options.candidates)
    alone = []
    for prompt in prompts:
        asked = fixed_batch.body([prompt], is_plain=True, top=2)
        alone += target.http.post("/generate", json=asked).raise_for_status().json()
    chosen, right = fixed_batch.choose(prompts, alone, options.fixed, options.margin)
    asked = fixed_batch.body(chosen, is_plain=True)
    together = fixed_batch.read(target.http.post("/generate", json=asked).json())
    if [answer.tokens for answer in together] != [answer.tokens for answer in right]:
        sys.exit(
            f"plain SGLang itself answers otherwise in company: --margin {options.margin:g} is too small"
        )
    own = max(fixed_batch.difference(a, b) for a, b in zip(together, right, strict=True))
    return chosen, right, own


def rows(
    seen: Seen,
    own: float,
    status: dict[str, Any],
    counted: Counter[str],
    log_errors: Sequence[str],
    left: Sequence[str],
) -> list[Row]:
    """Args:
    own: difference of plain SGLang's logprobs from its own, nats.
    counted: sums of `/metrics` at the end.
    """

    def count(name: str, value: float, unit: str, bar: float | None = None, n: int = 1) -> Row:
        return Row(name, value, unit, (value, value), n, None, bar, bar is not None)

    out = [
        count("wrong_tokens", seen.wrong_tokens, "tokens", 0, seen.batches),
        count("logprob_difference", seen.difference, "nats", None, seen.batches),
        count("errors", len(seen.errors), "requests", 0, seen.requests),
        count("log_errors", len(log_errors), "lines", 0),
        count("left_behind", len(left), "things", 0),
        count("requests", seen.requests, "requests"),
        count("answer_tokens", seen.answer_tokens, "tokens"),
        count("fixed_cached_share", seen.cached_tokens / max(1, seen.prompt_tokens), "x"),
        count("retractions", counted["sglang:num_retracted_requests_total"], "requests"),
        count("evicted_tokens", counted["sglang:evicted_tokens_total"], "tokens"),
        count("votes", seen.votes, "votes"),
        count("steps", status["step"], "steps"),
        count("votes_failed", status["failed"], "votes", 0),
        count("trainer_restarts", status["trainer"]["restarts"], "times", 0),
        count("revocations_missed", status["lease"]["revocations_missed"], "times"),
    ]
    reuse = float(status["reuse_ratio"])
    out.append(Row("reuse_ratio", reuse, "x", (reuse, reuse), 1, None, MIN_REUSE))
    out[1].against = f"plain SGLang, which differs from itself by {own:.1e}"
    if seen.in_use:
        middle = statistics.median(seen.in_use)
        out.append(Row("kv_in_use", middle, "x", quartiles(seen.in_use), len(seen.in_use)))
    if len(seen.samples) >= 8:
        grown = growth(seen.samples)
        shared = grown.pop("shared")["bytes"]
        out.append(count("shared_growth", shared / 2**20, "MiB", MAX_GROWTH_SHARED / 2**20))
        for role, found in grown.items():
            out.append(count(f"fds_{role}", found["fds"], "files", MAX_GROWTH_FDS))
            out.append(count(f"threads_{role}", found["threads"], "threads"))
            out.append(count(f"own_{role}", found["own_bytes"] / 2**20, "MiB"))
    return [*out, *activation_rows(status)]


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"levels": {"format": "[%(asctime)s] %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "levels"}},
    "loggers": {name: {"level": "WARNING"} for name in ("httpx", "httpcore")},
    "root": {"level": "INFO", "handlers": ["console"]},
}
"""SGLang's own format does not say which lines are errors."""
_ERROR = re.compile(r"^(\[[^]]*\] )?(ERROR|CRITICAL)\b|^Traceback")


def errors_in(log: str) -> list[str]:
    """Lines that a server writes only when something went wrong."""
    return [line[:300] for line in log.splitlines() if _ERROR.search(line)]


def main() -> None:
    options = parse()
    run = Run("soak", options)
    run.config = {"model": model_name(options.model)}
    both = ["--model-path", options.model, "--max-total-tokens", str(options.max_total_tokens)]
    both += ["--enable-metrics", "--schedule-conservativeness", "0.3"]
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "logging.json").write_text(json.dumps(LOGGING))
        os.environ["SGLANG_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
        with started("plain", PLAIN, both, folder) as plain:
            plain.wait_ready()
            prompts, right, own = settle(plain, options)
        ours = [*both, "--data-dir", str(folder / "data"), *options.server_args.split()]
        ours += budget_flags(options.activation_host_gb)
        with started("alchemist", ALCHEMIST, ours, folder) as target:
            target.wait_ready()
            server = psutil.Process(target.process.pid)
            soak = Soak(target, options, prompts, right)
            asyncio.run(soak.run())
            status = full_status(target.http)
            counted = metric_sums(target.http.get("/metrics").text)
            processes = {p.pid: p.create_time() for p in (server, *server.children(recursive=True))}
        time.sleep(2)
        left = [f"process {pid}" for pid in still_alive(processes)]
        files = frozenset[str]().union(*(seen.shm_files for seen in soak.seen.samples))
        left += sorted(path for path in files if Path(path).exists())
        log_errors = errors_in(target.log.read_text(errors="replace"))
    run.config |= {
        "fixed": [len(prompt) for prompt in prompts],
        "wrong": soak.seen.wrong[:20],
        "errors": soak.seen.errors[:20],
        "log_errors": log_errors[:20],
        "left_behind": left,
        "last_error": status["last_error"],
    }
    for row in rows(soak.seen, own, status, counted, log_errors, left):
        run.add(row)
    run.finish()
    for line in (*soak.seen.wrong[:5], *soak.seen.errors[:5], *log_errors[:5]):
        print(line, file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = Run.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=0, help="(default: 30; quick: 1)")
    parser.add_argument("--model", default=str(TINY_MODEL), help="directory (default: embedded)")
    parser.add_argument(
        "--max-total-tokens", type=int, default=4096, help="size of the KV pool (default: 4096)"
    )
    parser.add_argument("--clients", type=int, default=16, help="at once (default: 16)")
    parser.add_argument(
        "--history", type=int, default=600, help="tokens after which a conversation ends"
    )
    parser.add_argument("--every", type=int, default=20, metavar="K", help="(default: 20)")
    parser.add_argument("--fixed", type=int, default=8, help="prompts of the fixed batch")
    parser.add_argument("--candidates", type=int, default=60, help="prompts it is chosen from")
    parser.add_argument("--margin", type=float, default=0.01, help="nats (default: 0.01)")
    # More than can be trained in the pauses would leave votes on versions too old in the queue, and few on recent ones.
    parser.add_argument("--vote-share", type=float, default=0.2, help="of answers (default: 0.2)")
    parser.add_argument("--burst", type=float, default=20, metavar="S", help="of load")
    parser.add_argument("--lull", type=float, default=5, metavar="S", help="without; 0: none")
    parser.add_argument(
        "--activation-host-gb", type=float, default=1.0, help="GiB of the host tier (default: 1)"
    )
    parser.add_argument("--server-args", default="", help="further flags of Alchemist, in one word")
    options = Run.parse(parser)
    options.minutes = options.minutes or (1 if options.quick else 30)
    return options


if __name__ == "__main__":
    main()
