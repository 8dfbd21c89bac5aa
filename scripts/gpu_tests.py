"""Part `tests`: the tests in `tests/gpu`, by pytest, without those that parts `ipc` and `kernels` make more of.

They say what they find line by line, so that those which time did not suffice for are known.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gpu_part import Part

ROOT = Path(__file__).parents[1]
FOLDER = "tests/gpu"
ELSEWHERE = (
    f"{FOLDER}/test_kernels.py::test_error_is_that_of_plain_torch",
    f"{FOLDER}/test_sharing.py::test_a_hundred_peers_come_and_go_and_leave_nothing",
)
"""What other parts have rows for."""
READ_S = 3.0
"""Kept for reading what was found."""
_OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def outcomes(lines: Iterable[str]) -> dict[str, str]:
    """Test → outcome, of what `pytest -v` prints; one that fails and then cannot be cleaned up has failed."""
    found: dict[str, str] = {}
    for line in lines:
        if match := _OUTCOME.match(line):
            test, outcome = match.groups()
            found[test] = "FAILED" if "FAILED" in (outcome, found.get(test)) else outcome
    return found


def run(part: Part) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed")
    command = [sys.executable, "-m", "pytest", FOLDER, "-v", "-p", "no:cacheprovider", "--tb=short"]
    command += [word for test in ELSEWHERE for word in ("--deselect", test)]
    log, started = part.options.folder / "tests.log", time.monotonic()
    is_late = False
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(max(1.0, part.left - READ_S))
        except subprocess.TimeoutExpired:
            is_late = True
            process.kill()
            status = process.wait()
    text = log.read_text(errors="replace")
    print(text, flush=True)
    report(part, text, status, is_late=is_late, seconds=time.monotonic() - started)


def report(part: Part, text: str, status: int, *, is_late: bool, seconds: float) -> None:
    """The row, from pytest's output.

    Raises:
        RuntimeError: not all of them ran; says how far they came.
    """
    found = outcomes(text.splitlines())
    counts = Counter(found.values())
    failed = [test for test, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    said = ", ".join(f"{count} {outcome.lower()}" for outcome, count in sorted(counts.items()))
    part.config |= {"outcomes": dict(counts), "failed": failed, "elsewhere": ELSEWHERE}
    if is_late:
        # What did not run has not passed.
        raise RuntimeError(f"after {seconds:.0f} s its time was up: {said or 'no test had ended'}")
    # 1: some failed. Anything else that is not 0 is pytest's own trouble.
    if status not in (0, 1) or not found:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        raise RuntimeError(f"pytest ended with status {status}: {last.strip()[:200]}")
    num_run = len(found) - counts["SKIPPED"]
    if not num_run:
        raise RuntimeError(f"all {len(found)} tests were skipped: no CUDA device")
    against = f"{said}; {seconds:.0f} s; those of other parts left out"
    part.add("gpu_tests_failed", float(len(failed)), n=num_run, against=against)


def main() -> None:
    part = Part.from_argv("tests", __doc__ or "")
    part.attempt("tests/gpu", lambda: run(part), part.row_names, 10)


if __name__ == "__main__":
    main()
