"""Memory runs out while something is recorded: recording ends, serving has every slot, and the trainer is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "without_memory.py"


@pytest.mark.parametrize("moment", ["begin", "record", "write", "flush", "hedge", "reclaim"])
def test_no_memory(moment):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), moment],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # Every allocation of some size is asked of the operating system, and given back to it.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "allocate" in done.stdout, done.stdout
    assert "recording has failed and ends here; serving and training go on" in done.stderr
