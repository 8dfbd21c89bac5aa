"""What a vote teaches: every objective and reference on the embedded model, with simulated users over HTTP.

    python scripts/bench_learning.py [--quick] [--only NAME,…] [--json FILE|-] [--plot FILE.png]

Each variant gets a server of its own with an empty data directory and the same number of votes by the same users. The
options are those of the embedded model's preset, which was found for kto, except what `VARIANTS` says. Rows, for every
scenario and variant:

    preferred               share of liked answers after the last step, temperature 1, fixed questions
    kl                      to the base model, from answers to those questions
    arithmetic, other       change of right answers at temperature 0
    votes_used              votes the trainer learned from: dpo leaves those without a partner, sft the thumbs down
    seconds_per_vote        from the first vote until the last is trained; users hold back while the trainer is behind
    train_seconds_per_vote  of it the trainer's own steps, less what it waited for requests

Values are medians over seeds. --quick is the seven variants without corrections on the first scenario, 64 votes each.
It takes more than the two minutes of other benchmarks: seven servers are started, each in 20 s, on a busy machine 60 s.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml
from bench_common import Row, Run, progress, quartiles
from learning_report import Results, compare, plot_curves
from rich.console import Console
from serving_servers import ALCHEMIST, Target
from simulate_users import Rule, parse, simulate

from alchemist.server.options import TINY_OPTIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """How a server learns and what its users do, beyond the preset and plain votes."""

    server: Mapping[str, str]
    """Options of ours without the dashes."""
    users: tuple[str, ...] = ()
    """Options of `simulate_users.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What the users like; options of `simulate_users.py`."""

    users: tuple[str, ...]
    has_corrections: bool = False
    """Whether the variants whose users correct answers are run, too."""
    rule: Rule = field(init=False)

    def __post_init__(self) -> None:
        args = parse(list(self.users))
        rule = Rule(prefer=args.prefer, keyword=args.keyword, max_length=args.max_length)
        object.__setattr__(self, "rule", rule)


TWICE = ("--answers", "2")
"""Every question is asked twice: the only way in which votes alone make pairs."""
CORRECTING = ("--corrections", "0.3")
PAIRS = {"objective": "dpo", "train-batch-size": "4"}
"""Two votes in three find no partner: in batches of eight, dpo takes a third of the others' steps and hardly moves."""

VARIANTS = {
    "kto": Variant(server={"objective": "kto"}),
    "kto_served": Variant(server={"objective": "kto", "reference": "served"}),
    "apo": Variant(server={"objective": "apo_zero_unpaired"}),
    "apo_served": Variant(server={"objective": "apo_zero_unpaired", "reference": "served"}),
    "dpo": Variant(server=PAIRS, users=TWICE),
    "dpo_served": Variant(server={**PAIRS, "reference": "served"}, users=TWICE),
    "sft": Variant(server={"objective": "sft"}),
    "kto_corrections": Variant(server={"objective": "kto"}, users=CORRECTING),
    "dpo_corrections": Variant(server=PAIRS, users=(*TWICE, *CORRECTING)),
    "sft_corrections": Variant(server={"objective": "sft"}, users=CORRECTING),
}
SCENARIOS = {
    "formal": Scenario(users=("--prefer", "formal"), has_corrections=True),
    "formal_noise10": Scenario(users=("--prefer", "formal", "--noise", "0.1")),
    "formal_noise30": Scenario(users=("--prefer", "formal", "--noise", "0.3")),
    "keyword": Scenario(users=("--keyword", "certainly")),
    "length": Scenario(users=("--max-length", "24")),
}
METRICS = {
    "preferred": "%",
    "kl": "nats/token",
    "arithmetic": "points",
    "other": "points",
    "votes_used": "votes",
    "seconds_per_vote": "s",
    "train_seconds_per_vote": "s",
}


def main() -> None:
    parser = Run.parser(__doc__)
    parser.add_argument("--votes", type=int, default=0, help="per run (default: 200; quick: 64)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of everything (default: 1)")
    parser.add_argument("--plot", metavar="FILE", help="write the curves here, as PNG")
    options = Run.parse(parser)
    # Two threads that wait for each other crawl on a busy machine; servers inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    options.votes = options.votes or (64 if options.quick else 200)
    run = Run("learning", options)
    failed: dict[str, str] = {}
    run.config = {
        "preset": yaml.safe_load(TINY_OPTIONS.read_text()),
        "variants": {n: {"server": v.server, "users": v.users} for n, v in VARIANTS.items()},
        "scenarios": {n: s.users for n, s in SCENARIOS.items()},
        "failed": failed,
    }
    results = measure(run, failed)
    medians = {}
    for (scenario, variant), runs in results.items():
        of_variant = rows(f"{scenario}_{variant}", runs)
        for row in of_variant:
            run.add(row)
        medians[scenario, variant] = dict(zip(METRICS, (r.value for r in of_variant), strict=True))
    run.finish()
    Console(stderr=True).print(compare(medians, METRICS))
    if options.plot and results:
        plot_curves(results, Path(options.plot))


def measure(run: Run, failed: dict[str, str]) -> Results:
    """Everything that is wanted, one server at a time; what cannot be finished goes to `failed`."""
    quick = run.options.quick
    wanted = [
        (scenario, variant, seed)
        for seed in range(run.options.seeds)
        for scenario, of in SCENARIOS.items()
        for variant, learns in VARIANTS.items()
        if not quick or scenario == "formal"
        if "--corrections" not in learns.users or (of.has_corrections and not quick)
        if any(run.wants(f"{scenario}_{variant}_{metric}") for metric in METRICS)
    ]
    if not wanted:
        sys.exit(f"nothing to run for --only {run.options.only}")
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    # The base model is the same in every run: asked once per rule.
    before: dict[Rule, dict[str, float]] = {}
    try:
        for scenario, variant, seed in progress(wanted, "users vote"):
            try:
                rule = SCENARIOS[scenario].rule
                result = one_run(run.options, scenario, variant, seed, before.get(rule))
                before[rule] = result["before"]
                results.setdefault((scenario, variant), []).append(result)
            except (httpx.HTTPError, openai.APIError, TimeoutError, ValueError) as error:
                failed[f"{scenario}_{variant}_seed{seed}"] = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        failed["interrupted"] = "what has no row was not run"
    return results


def one_run(
    options: argparse.Namespace,
    scenario: str,
    variant: str,
    seed: int,
    before: dict[str, float] | None,
) -> dict[str, Any]:
    """A new server, its users, and what `simulate` says of them."""
    likes, learns = SCENARIOS[scenario], VARIANTS[variant]
    with tempfile.TemporaryDirectory(prefix="bench-learning-") as name:
        folder = Path(name)
        server = [f"--{key}={value}" for key, value in learns.server.items()]
        server += ["--config", str(TINY_OPTIONS), "--seed", str(seed)]
        server += ["--data-dir", str(folder / "data")]
        with Target("alchemist", ALCHEMIST, server, folder) as target:
            target.wait_ready()
            users = [*likes.users, *learns.users]
            users += ["--url", target.url, "--votes", str(options.votes), "--seed", str(seed)]
            # All get the same number of votes, content or not.
            users += ["--until", "2", "--eval-questions", "40" if options.quick else "120"]
            return asyncio.run(simulate(parse(users), likes.rule, Console(quiet=True), before))


def rows(name: str, runs: list[dict[str, Any]]) -> list[Row]:
    """One row per metric."""
    values = [metrics(result) for result in runs]
    out = []
    for metric, unit in METRICS.items():
        of_seeds = [v[metric] for v in values]
        row = Row(
            f"{name}_{metric}",
            statistics.median(of_seeds),
            unit,
            quartiles(of_seeds),
            len(of_seeds),
        )
        if metric in ("preferred", "arithmetic", "other"):
            base = statistics.median(100 * result["before"][metric] for result in runs)
            row.against = f"base model: {base:.1f} %"
        out.append(row)
    return out


def metrics(result: dict[str, Any]) -> dict[str, float]:
    """One run's value of each of `METRICS`."""
    before, after, num_votes = result["before"], result["after"], len(result["votes"])
    training = [step["step_s"] - step["lease_wait_s"] for step in result["steps"]]
    # Steps that were not seen took as long as the others.
    train_seconds = statistics.mean(training) * result["training"]["step"] if training else 0.0
    return {
        "preferred": 100 * after["preferred"],
        "kl": result["kl_after"],
        "arithmetic": 100 * (after["arithmetic"] - before["arithmetic"]),
        "other": 100 * (after["other"] - before["other"]),
        "votes_used": result["training"]["trained"],
        "seconds_per_vote": result["seconds_voting"] / num_votes,
        "train_seconds_per_vote": train_seconds / num_votes,
    }


if __name__ == "__main__":
    main()
