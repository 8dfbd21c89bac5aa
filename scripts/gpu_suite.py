"""All checks and benchmarks that need a GPU, on one H200 or H100 without network, in under nine minutes.

    python scripts/gpu_suite.py [--bundle FILE.tar.xz|FOLDER] [--only ipc,kernels,…] [--out FOLDER]
    python scripts/gpu_suite.py --device cpu --tiny          rehearsal: the same code on the embedded model
    python scripts/gpu_suite.py --write-not-run              docs/results/gpu_not_run.md from the rows' list

    ipc       the base weights through CUDA IPC: same bytes, one copy, nothing left by a hundred importers
    kernels   every kernel's error beside PyTorch's, outputs and gradients
    tests     tests/gpu
    step      training steps of 8B models: gradient error, tokens a second with and without reuse, PEFT, memory
    serve     what recording costs a request, publishing, one copy, deaths
    preempt   latency while training, what training keeps, revoke → acknowledge

Each part is a process with a time of its own: one that fails or hangs costs its own rows, which then say why. Results,
`gpu_suite.json` and `gpu_suite.md`, are written again whenever there are new rows. Exit status: 0 if every row has a
value, 1 if not, 2 if this host cannot run it. See docs/gpu_suite.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_host
from gpu_results import head, markdown, missing, not_run, table
from gpu_rows import PARTS, SPECS

ROOT = Path(__file__).parents[1]
NOT_RUN = ROOT / "docs" / "results" / "gpu_not_run.md"
BUDGETS_S = {"ipc": 30, "kernels": 50, "tests": 45, "step": 100, "serve": 125, "preempt": 125}
"""On a GPU. What a part leaves over goes to those after it; what has been lost before, all lose in proportion."""
START_S = 40.0
"""To unpack a bundle and import everything for the first time, as assumed by the budgets."""
DEADLINE_S = {"cuda": 530.0, "cpu": 1500.0}
GRACE_S = 15.0
"""Between asking a part to end and killing it."""
_LOOK_S = 1.0


class Suite:
    """One run: what has been found so far, and the files that say so."""

    def __init__(
        self,
        options: argparse.Namespace,
        parts: Sequence[str],
        *,
        scripts: Mapping[str, Path] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        """Args:
        scripts: part → program; default: those beside this file.
        """
        self.options, self.parts = options, list(parts)
        self.host: dict[str, Any] = {"versions": {}, "smi": {}}
        self._scripts = scripts or {p: Path(__file__).with_name(f"gpu_{p}.py") for p in PARTS}
        self._grace_s = grace_s
        self._started = time.monotonic()
        self._found: dict[str, dict[str, Any]] = {}
        self._why: dict[str, str] = dict.fromkeys(parts, "not run")
        self._written = ""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._started + self.options.deadline - time.monotonic()

    def run(self, env: dict[str, str], folder: Path) -> None:
        """Every part in turn.

        Args:
            folder: for files that do not stay.
        """
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.write()
        for i, part in enumerate(self.parts):
            seconds = self.seconds_of(i)
            if seconds < 1:
                self._why[part] = "left out: the deadline was reached before"
            else:
                self._run_part(part, seconds, env, folder)
            self.write()

    def seconds_of(self, index: int) -> float:
        """What a part gets if it begins now: all but the budgets of those after it, or, where less is left than all of
        theirs and its own, its share of that. A part that is ended may take the grace, too.
        """
        own, *later = (BUDGETS_S[part] for part in self.parts[index:])
        there, needed = self.left - self._grace_s, own + sum(later)
        return there - sum(later) if there >= needed else there * own / needed

    def _run_part(self, part: str, seconds: float, env: dict[str, str], folder: Path) -> None:
        options = self.options
        print(f"== {part}, at most {seconds:.0f} s", flush=True)
        rows, log = folder / f"{part}.json", options.out / f"{part}.log"
        command = [sys.executable, str(self._scripts[part]), "--rows", str(rows)]
        command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
        command += ["--seconds", f"{seconds:.1f}", "--folder", str(folder)]
        command += ["--attention-backend", options.attention_backend]
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=env,
                start_new_session=True,
            )
        try:
            why = self._wait(process, part, rows, began + seconds)
        finally:
            # Whatever it has started and not ended, and itself if this process is told to end.
            _kill_group(process)
        self._read(part, rows)
        if not why and process.returncode:
            why = f"the part ended with status {process.returncode}: {_last_line(log)}"
        self._why[part] = why or "the part ended without it"
        found = self._found.get(part, {"rows": [], "config": {}})
        found["config"]["part_s"] = round(time.monotonic() - began, 1)
        found["config"]["smi_after"] = gpu_host.nvidia_smi() if options.device == "cuda" else {}
        print(f"   {len(found['rows'])} rows in {found['config']['part_s']} s. {why}", flush=True)

    def _wait(self, process: subprocess.Popen[bytes], part: str, rows: Path, until: float) -> str:
        """Until it ends or its time is up; why it was ended, if it was."""
        while time.monotonic() < until:
            try:
                process.wait(min(_LOOK_S, max(0.01, until - time.monotonic())))
                return ""
            except subprocess.TimeoutExpired:
                self._read(part, rows)
                self.write()
        process.terminate()
        try:
            process.wait(self._grace_s)
            return "the part was ended when its time was up"
        except subprocess.TimeoutExpired:
            return "the part was killed: its time was up and it did not end when asked"

    def _read(self, part: str, rows: Path) -> None:
        if rows.is_file():
            self._found[part] = json.loads(rows.read_text())

    def rows(self) -> list[dict[str, Any]]:
        """Of the parts that were asked for, in the order of the list; those without a value say why."""
        out = []
        for spec in SPECS:
            if spec.part not in self.parts:
                continue
            found = self._found.get(spec.part, {"rows": [], "reasons": {}})
            row = next((r for r in found["rows"] if r["name"] == spec.name), None)
            if row is None:
                reason = found["reasons"].get(spec.name) or self._why[spec.part]
                row = missing(spec, reason)
            # Bars are a GPU's.
            out.append(row | {"ok": None} if self.options.device == "cpu" else row)
        return out

    def write(self) -> None:
        """Both results, if there is anything new."""
        rows = self.rows()
        text = json.dumps(rows)
        if text == self._written:
            return
        self._written = text
        data = self._as_json(rows)
        _replace(self.options.out / "gpu_suite.json", json.dumps(data, indent=1) + "\n")
        _replace(self.options.out / "gpu_suite.md", markdown(data))

    def _as_json(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        data = head("gpu_suite")
        smi = self.host["smi"]
        if smi:
            data["machine"] = f"{smi['name']}, {smi['memory.total']}; {data['machine']}"
        if self.options.commit:
            data["commit"] = self.options.commit
        data["versions"] |= self.host["versions"]
        data["config"] = {
            "is_rehearsal": self.options.device == "cpu",
            "only": self.parts,
            "command": self.options.command,
            "deadline_s": self.options.deadline,
            "seconds": round(time.monotonic() - self._started, 1),
            "attention_backend": self.options.attention_backend,
            "cuda": self.host.get("cuda"),
            "mps": self.host.get("mps", {}),
            "smi_before": smi,
            "parts": {part: found.get("config", {}) for part, found in self._found.items()},
        }
        data["rows"] = rows
        return data


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `only` as a list. A usage error exits with 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the embedded model's shape")
    parser.add_argument("--bundle", type=Path, help="packages: a folder with site/, or its .tar.xz")
    parser.add_argument("--out", type=Path, default=Path("gpu-suite"), help="folder for results")
    parser.add_argument("--deadline", type=float, help="seconds for everything (default: 530)")
    parser.add_argument(
        "--attention-backend", default="triton", help="SGLang's: triton (default) or flashinfer"
    )
    parser.add_argument("--commit", help="of this checkout, where there is no git")
    parser.add_argument("--write-not-run", action="store_true", help=f"write {NOT_RUN.name}")
    options = parser.parse_args(argv)
    options.command = shlex.join(["python", "scripts/gpu_suite.py", *argv])
    options.only = [part.strip() for part in options.only.split(",")]
    if unknown := sorted(set(options.only) - set(PARTS)):
        parser.error(f"--only: no part {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: a model of 8B does not run on a CPU")
    options.deadline = options.deadline or DEADLINE_S[options.device]
    if not 30 <= options.deadline <= 7200:
        parser.error(f"--deadline is {options.deadline:g}; allowed: 30 to 7200 seconds")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    if options.write_not_run:
        NOT_RUN.write_text(not_run())
        return
    options.out = options.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    suite = Suite(options, [part for part in PARTS if part in options.only])
    folder = Path(tempfile.mkdtemp(prefix="gpu-suite-"))
    try:
        bundle = gpu_host.unpack_bundle(options.bundle, folder) if options.bundle else None
        backend = options.attention_backend
        env = gpu_host.environment(gpu_host.make_site(folder), bundle, options.device, backend)
        suite.host = gpu_host.look(env, options.device)
        print(json.dumps(suite.host, indent=1), flush=True)
        if found := gpu_host.problems(suite.host, options.device, backend):
            print("\n".join(f"gpu_suite: {problem}" for problem in found), file=sys.stderr)
            sys.exit(2)
        # What the results are written with comes from there, too.
        sys.path[:0] = [
            path for path in env["PYTHONPATH"].split(os.pathsep) if path not in sys.path
        ]
        suite.run(env, folder)
    except ValueError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = suite.rows()
    print(table(rows))
    sys.exit(any(row["value"] is None for row in rows))


if __name__ == "__main__":
    main()
