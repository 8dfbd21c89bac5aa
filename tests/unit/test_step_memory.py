"""A step that does not fit into memory is split until it does, and its gradient stays what it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "with_little_memory.py"


@pytest.mark.parametrize("case", ["split", "refused", "refused-by-reference"])
def test_little_memory(case):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), case],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # As in test_recording_fails.py: what is freed is given back.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory: steps are split at" in done.stderr
    tokens = int(done.stdout.split()[-1])
    # Later steps, whose completions may fit, are split as this one was before.
    assert 256 <= tokens < 4096 if case == "split" else tokens == 1 << 16
