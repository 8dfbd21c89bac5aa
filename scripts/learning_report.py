"""What `bench_learning.py` shows: a line per scenario and variant, and the learning curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from users_report import WINDOW, recent_rates

Results = Mapping[tuple[str, str], list[dict[str, Any]]]
"""Scenario and variant → what `simulate_users.simulate` returned, a seed each."""


def compare(
    values: Mapping[tuple[str, str], Mapping[str, float]], units: Mapping[str, str]
) -> Table:
    """Args:
    values: scenario and variant → its metrics.
    units: of the metrics, in the order of the columns.
    """
    out = Table(title="What votes taught", title_justify="left")
    # Numbers may fold in a narrow terminal, names would be cut.
    out.add_column("scenario", no_wrap=True)
    out.add_column("variant", no_wrap=True)
    for metric, unit in units.items():
        out.add_column(f"{metric.replace('_', ' ')}, {unit}", justify="right", overflow="fold")
    last = ""
    for (scenario, variant), found in values.items():
        if last and scenario != last:
            out.add_section()
        last = scenario
        out.add_row(scenario, variant, *(f"{found[metric]:.3g}" for metric in units))
    return out


def plot_curves(results: Results, path: Path) -> None:
    """Preferred rate over the votes, a panel per scenario, and in the last panel against the KL to the base; as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scenarios = list(dict.fromkeys(scenario for scenario, _ in results))
    variants = list(dict.fromkeys(variant for _, variant in results))
    colours = {v: f"C{i}" for i, v in enumerate(variants)}
    columns = min(3, len(scenarios) + 1)
    lines = math.ceil((len(scenarios) + 1) / columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    for axis, scenario in zip(axes, scenarios, strict=False):
        for variant in variants:
            runs = results.get((scenario, variant))
            if runs:
                curves = [recent_rates(result["votes"]) for result in runs]
                rate = [statistics.mean(at) for at in zip(*curves, strict=False)]
                # A share of the first few votes says nothing.
                first = min(WINDOW, len(rate))
                axis.plot(
                    range(first, len(rate) + 1),
                    rate[first - 1 :],
                    color=colours[variant],
                    label=variant,
                )
                axis.plot(len(rate) + 3, _preferred(runs), "o", color=colours[variant])
                axis.plot(0, 100 * runs[0]["before"]["preferred"], "o", color="0.6")
        axis.set(
            title=scenario, xlabel="votes", ylabel=f"preferred, % of last {WINDOW}", ylim=(0, 103)
        )
    drift = axes[len(scenarios)]
    for (_, variant), runs in results.items():
        kl = statistics.median(result["kl_after"] for result in runs)
        drift.plot(kl, _preferred(runs), "o", color=colours[variant])
    drift.set(
        title="all, after the last vote", xlabel="KL to base, nats/token", ylabel="preferred, %"
    )
    drift.set(ylim=(0, 103), xlim=(0, None))
    for axis in axes[len(scenarios) + 1 :]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _preferred(runs: list[dict[str, Any]]) -> float:
    return statistics.median(100 * result["after"]["preferred"] for result in runs)
