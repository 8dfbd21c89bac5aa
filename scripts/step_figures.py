"""The figures of `bench_step_growth.py`, drawn from its rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_common import Row

PHASES = {
    "rows": "tab:olive",
    "forward": "tab:blue",
    "reference": "tab:cyan",
    "loss": "tab:pink",
    "backward": "tab:orange",
    "optimizer": "tab:green",
    "other": "0.7",
}


def plot(rows: Sequence[Row], path: Path) -> None:
    """One panel for each part that was measured, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    by_name = {row.name: row for row in rows}
    panels = {"prompt": _prompt, "completions": _completions, "phases": _phases}
    drawn = [draw for part, draw in panels.items() if any(n.startswith(part) for n in by_name)]
    figure, axes = plt.subplots(1, len(drawn), figsize=(5.2 * len(drawn), 4.2), squeeze=False)
    for draw, axis in zip(drawn, axes[0], strict=True):
        draw(axis, by_name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(axis: Any, rows: dict[str, Row], pattern: str, **style: Any) -> None:
    """The rows of one variant by the number in their name, with their quartiles."""
    points = sorted(
        (int(match[1]), row)
        for name, row in rows.items()
        if (match := re.fullmatch(pattern.replace("N", r"(\d+)"), name))
    )
    if not points:
        return
    sizes, found = [n for n, _ in points], [row for _, row in points]
    line = axis.plot(sizes, [row.value for row in found], **style)[0]
    low, high = zip(*(row.spread for row in found), strict=True)
    axis.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _whole_numbers(axis: Any, rows: dict[str, Row], pattern: str) -> None:
    """A tick at every size that was measured, without exponents."""
    sizes = [int(match[1]) for name in rows if (match := re.fullmatch(pattern, name))]
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.minorticks_off()


def _prompt(axis: Any, rows: dict[str, Row]) -> None:
    operations = axis.twinx()
    for kind, colour in (("recompute", "tab:red"), ("recorded", "tab:blue")):
        _line(axis, rows, f"prompt_N_{kind}", label=kind, marker="o", color=colour)
        name = f"prompt_N_{kind}_operations"
        _line(operations, rows, name, label=f"{kind}, operations", color=colour, linestyle=":")
    for each, label in ((axis, "seconds a step"), (operations, "GFLOP a step")):
        each.set(xscale="log", yscale="log", ylabel=label)
    axis.set(xlabel="tokens of the completion", title="one completion, sft")
    _whole_numbers(axis, rows, r"prompt_(\d+)_recorded")
    handles = [h for a in (axis, operations) for h in a.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, fontsize=8)


def _completions(axis: Any, rows: dict[str, Row]) -> None:
    labels = {"trl": "TRL + PEFT", "apart": "ours, each laid out by itself", "recorded": "ours"}
    for kind, label in labels.items():
        _line(axis, rows, f"completions_N_{kind}", label=label, marker="o")
    axis.set(xscale="log", yscale="log", xlabel="completions", ylabel="seconds a step")
    axis.set_title("completions on one 1024-token prefix, sft")
    _whole_numbers(axis, rows, r"completions_(\d+)_recorded")
    axis.legend(fontsize=8)


def _phases(axis: Any, rows: dict[str, Row]) -> None:
    titles = {"sft": "sft", "kto": "kto, base", "served": "kto, served"}
    bars = [(o, kind) for o in titles for kind in ("recompute", "recorded")]
    places = [i + 0.4 * (i // 2) for i in range(len(bars))]
    bottoms = [0.0] * len(bars)
    for phase, colour in PHASES.items():
        heights = [rows[f"phases_{o}_{kind}_{phase}"].value for o, kind in bars]
        axis.bar(places, heights, bottom=bottoms, color=colour, label=phase, width=0.85)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    for place, (objective, kind), top in zip(places, bars, bottoms, strict=True):
        if kind == "recompute":
            share = rows[f"phases_{objective}_repeated_forward"].value
            axis.text(place, top, f"{share:.0%}\nrepeated", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(places, [f"{kind}\n{titles[o]}" for o, kind in bars], fontsize=6)
    axis.set(
        ylabel="seconds a step", ylim=(0, 1.18 * max(bottoms)), title="where a step's time goes"
    )
    axis.legend(fontsize=7, loc="upper right")
