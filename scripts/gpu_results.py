"""How results of `gpu_suite.py` are written. A row has a value or, where there is none, a reason."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

from gpu_rows import BY_NAME, PARTS, SPECS, Spec

_TABLES = {"rich": "", "rich.console": "Console", "rich.progress": "track", "rich.table": "Table"}
"""Module → what `bench_common` takes from it."""


def head(bench: str) -> dict[str, Any]:
    """What every benchmark's result has: commit, date, machine, versions. `bench_common` prints tables with `rich`,
    which need not be here: nothing of that is called.
    """
    try:
        from bench_common import Run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        for name, what in _TABLES.items():
            sys.modules[name] = module = types.ModuleType(name)
            module.__dict__[what] = lambda **_: None
        try:
            from bench_common import Run
        finally:
            for name in _TABLES:
                del sys.modules[name]
    return Run(bench, argparse.Namespace()).as_json()


def missing(spec: Spec, why: str) -> dict[str, Any]:
    """A row without a value."""
    return {
        "name": spec.name,
        "value": None,
        "unit": spec.unit,
        "spread": None,
        "n": 0,
        "against": None,
        "bar": spec.bar,
        "ok": None,
        "part": spec.part,
        "why": why,
    }


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; those without a value say why."""
    lines = ["| row | what | value | quartiles | n | bar | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        spec = BY_NAME[row["name"]]
        if row["value"] is None:
            value, spread, mark = row["why"], "", ""
        else:
            unit = "" if row["unit"] == "x" else f" {row['unit']}"
            value = f"{row['value']:.4g}{unit}"
            spread = f"{row['spread'][0]:.4g} … {row['spread'][1]:.4g}"
            mark = {True: "met", False: "**missed**", None: ""}[row["ok"]]
        what = spec.what + (f"; against {row['against']}" if row["against"] else "")
        cells = (f"`{spec.name}`", what, value, spread, str(row["n"] or ""), spec.bar_text, mark)
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def markdown(data: Mapping[str, Any]) -> str:
    """The result as a page."""
    config, smi = data["config"], data["config"]["smi_before"]
    lines = ["# GPU suite", ""]
    if config["is_rehearsal"]:
        lines += [
            "**A rehearsal on a CPU with the embedded model: no figure here is a GPU's.**",
            "",
        ]
    lines += [
        f"* {data['date']}, commit {data['commit']}",
        f"* {data['machine']}",
        "* " + ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
    ]
    if smi:
        lines.append("* as found: " + ", ".join(f"{key} {value}" for key, value in smi.items()))
    mps = "runs" if config["mps"].get("is_running") else "does not run"
    lines += [
        f"* `{config['command']}`, SGLang with `--attention-backend {config['attention_backend']}`; "
        f"{config['seconds']:.0f} s in all; NVIDIA's Multi-Process Service {mps}",
        "",
    ]
    for part in config["only"]:
        rows = [row for row in data["rows"] if row["part"] == part]
        lines += [f"## {part}", "", table(rows)]
    return "\n".join(lines)


def not_run() -> str:
    """The page that stands for a result until there is one."""
    head = (
        "# GPU suite: not run\n\n"
        "No GPU was there when this was written: of what `python scripts/gpu_suite.py` measures, no row has a value. "
        "Written by\n`python scripts/gpu_suite.py --write-not-run` from the list of rows that the suite itself uses; "
        "[how to run it](../gpu_suite.md).\n"
    )
    parts = [head]
    for part in PARTS:
        rows = [missing(spec, "not run") for spec in SPECS if spec.part == part]
        parts.append(f"\n## {part}\n\n{table(rows)}")
    return "".join(parts)
