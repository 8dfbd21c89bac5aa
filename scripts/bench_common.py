"""What every benchmark shares: options, progress, rows with bars, a table, and the JSON that other programs read.

Progress and table go to standard error; `--json -` puts nothing but JSON on standard output.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

_T = TypeVar("_T")
ROOT = Path(__file__).resolve().parents[1]
_console = Console(stderr=True)


class Row(msgspec.Struct):
    """One figure. Ratios of time are baseline ÷ ours (more is better), of latency and memory ours ÷ baseline."""

    name: str
    value: float
    unit: str
    spread: tuple[float, float]
    """First and third quartile."""
    n: int
    against: str | None = None
    bar: float | None = None
    less_is_better: bool = False

    @property
    def ok(self) -> bool | None:
        """Whether the bar is met; None without one."""
        if self.bar is None:
            return None
        return self.value <= self.bar if self.less_is_better else self.value >= self.bar


def model_name(path: str) -> str:
    """A model's directory as results name it: within the project, or of one elsewhere the last part."""
    resolved = Path(path).resolve()
    if resolved.is_relative_to(ROOT):
        return str(resolved.relative_to(ROOT))
    return resolved.name


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; the value itself, twice, where there is only one."""
    if len(values) < 2:
        return (values[0], values[0])
    q = statistics.quantiles(values, n=4, method="inclusive")
    return (q[0], q[2])


def progress(items: Iterable[_T], what: str) -> Iterable[_T]:
    """The items, with a progress bar on standard error."""
    return track(list(items), description=what, console=_console)


def interleave(
    variants: Mapping[str, Callable[[], Any]], repeats: int, what: str, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each variant, `repeats` times each, in an order that rotates from round to round."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rounds = [r for r in range(-warm_up, repeats) for _ in names]
    for i, round_ in enumerate(progress(rounds, what)):
        name = names[(i + round_) % len(names)]
        start = time.perf_counter()
        variants[name]()
        elapsed = time.perf_counter() - start
        if round_ >= 0:
            seconds[name].append(elapsed)
    return seconds


def speed_up(
    name: str,
    baseline: Sequence[float],
    ours: Sequence[float],
    *,
    against: str,
    bar: float | None = None,
) -> Row:
    """Baseline ÷ ours in seconds, of each round: median and quartiles."""
    ratios = [b / o for b, o in zip(baseline, ours, strict=True)]
    return Row(name, statistics.median(ratios), "x", quartiles(ratios), len(ratios), against, bar)


class Run:
    """One run of one benchmark. `config` is written beside the options."""

    def __init__(self, bench: str, options: argparse.Namespace) -> None:
        self.bench = bench
        self.options = options
        self.rows: list[Row] = []
        self.config: dict[str, Any] = {}

    @staticmethod
    def parser(doc: str | None) -> argparse.ArgumentParser:
        """A parser with the options that all benchmarks share; `doc`: the benchmark's docstring, its help."""
        parser = argparse.ArgumentParser(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument(
            "--json", metavar="FILE", help="write the result here; -: standard output"
        )
        parser.add_argument("--quick", action="store_true", help="the same rows from fewer repeats")
        parser.add_argument("--only", metavar="NAME[,NAME]", help="only these rows")
        return parser

    @staticmethod
    def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
        """The options given. However the benchmark ends from here on, by a signal too, its servers end."""
        options = parser.parse_args()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
        return options

    def wants(self, name: str) -> bool:
        return not self.options.only or name in self.options.only.split(",")

    def add(self, row: Row) -> None:
        if self.wants(row.name):
            self.rows.append(row)

    def finish(self) -> None:
        """Print the table and write the JSON."""
        table = Table(title=f"{self.bench} · {machine()}", title_justify="left")
        for column in ("row", "value", "quartiles", "n", "against", "bar"):
            table.add_column(
                column, justify="left" if column in ("row", "against") else "right", overflow="fold"
            )
        for row in self.rows:
            mark = {True: " ✓", False: " ✗", None: ""}[row.ok]
            bar = (
                "" if row.bar is None else f"{'≤' if row.less_is_better else '≥'} {row.bar:g}{mark}"
            )
            table.add_row(
                row.name,
                f"{row.value:.4g} {row.unit}",
                f"{row.spread[0]:.4g} … {row.spread[1]:.4g}",
                str(row.n),
                row.against or "",
                bar,
            )
        _console.print(table)
        if self.options.json:
            text = json.dumps(self.as_json(), indent=1) + "\n"
            if self.options.json == "-":
                sys.stdout.write(text)
            else:
                Path(self.options.json).write_text(text)

    def as_json(self) -> dict[str, Any]:
        rows = [
            {
                key: value
                for key, value in msgspec.to_builtins(row).items()
                if key != "less_is_better"
            }
            | {"ok": row.ok}
            for row in self.rows
        ]
        config = {k: v for k, v in vars(self.options).items() if k != "json"} | self.config
        return {
            "bench": self.bench,
            "commit": _commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "config": config,
            "rows": rows,
        }


def machine() -> str:
    """Processor, cores and memory, in words."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def versions() -> dict[str, str]:
    names = ("torch", "sglang", "transformers", "peft", "trl")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
