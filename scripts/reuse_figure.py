"""The curve of `bench_reuse.py`: what is left when the vote comes, by budget and by how late it comes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chat_trace import LogNormal

if TYPE_CHECKING:
    from bench_reuse import Voted

BINS = 6
"""Points of a curve over delays: each of as many votes."""


def by_delay(voted: Sequence[Voted], bins: int = BINS) -> list[tuple[float, float]]:
    """(median delay in seconds, share of prompt tokens still recorded) of votes sorted by delay, in equal parts."""
    ordered = sorted(voted, key=lambda vote: vote.turn.delay_s)
    size = max(1, -(-len(ordered) // bins))
    out = []
    for part in (ordered[i : i + size] for i in range(0, len(ordered), size)):
        recorded = sum(vote.recorded_tokens for vote in part)
        left = recorded / sum(vote.prompt_tokens for vote in part)
        out.append((statistics.median(vote.turn.delay_s for vote in part), left))
    return out


def plot(
    curves: Mapping[str, Sequence[tuple[float, float, Sequence[Voted]]]],
    delay: LogNormal,
    path: Path,
) -> None:
    """Args:
    curves: policy ("": the server's own) → (budget in GiB, share, the votes) in ascending order of budgets.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    styles = dict(zip(curves, ("-o", "--s", ":^", "-.v"), strict=False))
    for policy, points in curves.items():
        budgets = [budget for budget, _, _ in points]
        shares = [100 * value for _, value, _ in points]
        left.plot(budgets, shares, styles[policy], label=policy or "reused")
        for i, (budget, _, voted) in enumerate(points):
            curve = by_delay(voted)
            label = f"{budget:g} GiB {policy}".strip()
            right.plot(
                [seconds for seconds, _ in curve],
                [100 * value for _, value in curve],
                styles[policy],
                color=f"C{i}",
                label=label,
            )
    left.set(xlabel="host tier, GiB", ylabel="prompt tokens still recorded, %", ylim=(0, 103))
    law = f"log-normal, median {delay.median:g} s, σ {delay.sigma:g}, at most {delay.longest:g} s"
    right.set(xlabel="delay of the vote, s", ylabel="still recorded, %", ylim=(0, 103))
    right.set_xscale("log")
    right.xaxis.set_major_formatter(ScalarFormatter())
    right.xaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(f"Votes' delays: {law}", fontsize="medium")
    if len(curves) > 1:
        left.legend()
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
