"""What `simulate_users.py` shows of a run: the table by version and the learning curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

WINDOW = 32
"""Votes that a recent share is of."""


def by_version(votes: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The votes of each version, versions in their order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for vote in votes:
        groups.setdefault(vote["version"], []).append(vote)
    return dict(sorted(groups.items(), key=lambda item: _number(item[0])))


def recent_rates(votes: list[dict[str, Any]]) -> list[float]:
    """After each vote, how many of the last `WINDOW` answers were liked, in percent."""
    liked = [v["liked"] for v in votes]
    recent = [liked[max(0, i - WINDOW) : i] for i in range(1, len(liked) + 1)]
    return [100 * sum(part) / len(part) for part in recent]


def table(result: dict[str, Any]) -> Table:
    """One row per version: votes, preferred rate, KL to base, share of right answers."""
    out = Table(title="Answers by version (temperature 1)")
    for column in ("version", "votes", "preferred", "KL to base", "arithmetic", "other intents"):
        out.add_column(column, justify="right")
    for version, votes in by_version(result["votes"]).items():
        kl = result["kl"].get(version)
        out.add_row(
            version,
            str(len(votes)),
            _percent([v["liked"] for v in votes]),
            "" if kl is None else f"{kl:.3f}",
            _percent([v["arithmetic"] for v in votes if v["arithmetic"] is not None]),
            _percent([v["other"] for v in votes if v["other"] is not None]),
        )
    return out


def plot(result: dict[str, Any], path: Path) -> None:
    """Preferred rate over the votes with the versions' borders, and the KL to base, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    votes = result["votes"]
    rate = recent_rates(votes)
    figure, axis = plt.subplots(figsize=(8, 4.2))
    axis.plot(range(1, len(rate) + 1), rate, color="tab:blue", label=f"preferred (last {WINDOW})")
    for name, colour in (("preferred", "tab:blue"), ("arithmetic", "tab:green")):
        ends = [100 * result[when][name] for when in ("before", "after")]
        axis.plot([0, len(votes)], ends, "o", color=colour, label=f"{name}, evaluation set")
    axis.set(xlabel="votes", ylabel="%", ylim=(0, 103), xlim=(-5, len(votes) + 5))
    starts = {v["version"]: i for i, v in reversed(list(enumerate(votes, 1)))}
    drift = axis.twinx()
    points = sorted((starts[v], kl) for v, kl in result["kl"].items() if v in starts)
    first_votes, kls = [start for start, _ in points], [kl for _, kl in points]
    drift.plot(first_votes, kls, ".--", color="tab:red", label="KL to base (nats/token)")
    drift.set(ylabel="KL to base", ylim=(0, 1.1 * max([*kls, 0.1])))
    for start in starts.values():
        axis.axvline(start, color="0.9", linewidth=0.8, zorder=0)
    handles = [h for a in (axis, drift) for h in a.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.06, 0.97), fontsize=8)
    rule = ", ".join(f"{k} {v}" for k, v in result["rule"].items() if v is not None)
    axis.set_title(f"{len(votes)} votes in {result['seconds_voting']:.0f} s ({rule})")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _number(version: str) -> int:
    return int(version[1:]) if version[1:].isdigit() else -1


def _percent(hits: list[bool]) -> str:
    return f"{100 * sum(hits) / len(hits):.0f} %" if hits else ""
