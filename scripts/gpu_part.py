"""What a part of `gpu_suite.py` shares with the others: its options, its clock, and rows that are on disk at once.

A part is a process of its own. It writes its rows to `--rows FILE` as it finds them, so that whatever happens to it
later costs only the rows that are still to come.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
from gpu_rows import BY_NAME, SPECS

TERM_GRACE_S = 15.0
"""What a part that is told to end gets to end its servers."""


class Part:
    """One part's run."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.device: str = options.device
        self.tiny: bool = options.tiny
        self.config: dict[str, Any] = {}
        """Whatever explains a figure; written beside the rows."""
        self._rows: dict[str, dict[str, Any]] = {}
        self._reasons: dict[str, str] = {}
        self._end = time.monotonic() + options.seconds
        self._is_told = False

    @classmethod
    def from_argv(cls, name: str, doc: str) -> Part:
        """From the command line that the suite gives its parts; takes SIGTERM."""
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--rows", type=Path, required=True, help="file that gets the rows")
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--tiny", action="store_true", help="the embedded model's shape")
        parser.add_argument("--seconds", type=float, default=600.0, help="time there is")
        parser.add_argument("--folder", type=Path, required=True, help="for files that do not stay")
        parser.add_argument("--attention-backend", default="triton", help="SGLang's")
        part = cls(name, parser.parse_args())
        # Its time began when it was started; what it imports takes seconds.
        part._end -= time.time() - psutil.Process().create_time()
        signal.signal(signal.SIGTERM, part._told_to_end)
        return part

    def _told_to_end(self, *_: Any) -> None:
        self._is_told = True
        sys.exit(f"ended by the suite after {self.options.seconds:.0f} s")

    @property
    def left(self) -> float:
        """Seconds there still are."""
        return self._end - time.monotonic()

    def add(
        self,
        name: str,
        values: float | Sequence[float],
        *,
        against: str | None = None,
        n: int | None = None,
        value: float | None = None,
    ) -> None:
        """Write a row.

        Args:
            values: samples; the row's value is their median, its spread their quartiles.
            n: samples behind the figure where `values` is one number.
            value: the figure itself, where it is not the median.
        """
        spec = BY_NAME[name]
        samples = (
            [float(values)] if isinstance(values, (int, float)) else [float(v) for v in values]
        )
        figure = statistics.median(samples) if value is None else value
        self._rows[name] = {
            "name": name,
            "value": figure,
            "unit": spec.unit,
            "spread": quartiles(samples),
            "n": n or len(samples),
            "against": against,
            "bar": spec.bar,
            "ok": spec.is_met(figure),
            "part": self.name,
        }
        self.flush()
        print(f"{name}: {figure:.6g} {spec.unit}", flush=True)

    def attempt(
        self, what: str, function: Callable[[], None], rows: Iterable[str], seconds: float = 0.0
    ) -> str:
        """Run `function`, which adds `rows`. If it fails, or needs more `seconds` than are left, the rows that it has
        not added get the reason, and the part goes on. The reason; "": it did not fail.
        """
        started, why = time.monotonic(), ""
        print(f"{what}, {self.left:.0f} s left", flush=True)
        if seconds > self.left:
            why = f"left out: {what} takes {seconds:.0f} s, {self.left:.0f} s were left"
            self.give_up(rows, why)
            return why
        try:
            function()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            reason = " ".join(str(error).split()) or type(error).__name__
            why = f"{what}: {type(error).__name__}: {reason[:400]}"
            self.give_up(rows, why)
            if self._is_told:
                raise
        else:
            self.give_up(rows, f"{what} ended without it")
        self.config.setdefault("seconds", {})[what] = round(time.monotonic() - started, 1)
        self.flush()
        return why

    def give_up(self, rows: Iterable[str], why: str) -> None:
        """Say why there will be no value, of those that have neither one nor a reason yet."""
        for name in rows:
            if name not in self._rows:
                # Whoever was nearest to it knows best.
                self._reasons.setdefault(name, why)
        self.flush()

    def flush(self) -> None:
        """Rows, reasons and configuration to disk; a reader never sees half of them."""
        text = json.dumps(
            {
                "rows": list(self._rows.values()),
                "reasons": self._reasons,
                "config": self.config,
            }
        )
        path = self.options.rows
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)

    @property
    def row_names(self) -> list[str]:
        """All that this part has."""
        return [spec.name for spec in SPECS if spec.part == self.name]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third; the value itself, twice, where there is only one."""
    if len(values) < 2:
        return (values[0], values[0])
    q = statistics.quantiles(values, n=4, method="inclusive")
    return (q[0], q[2])
