"""What the trainer's process sees to before it imports anything."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch:", os.environ.get("CUDA_MPS_CLIENT_PRIORITY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.argv = ["trainer", "ipc:///nowhere", str(os.getppid()), "none"]
runpy.run_module("alchemist.trainer", run_name="__main__")
"""


@pytest.mark.parametrize(("given", "seen"), [(None, "1"), ("0", "0")])
def test_servings_kernels_go_first_from_before_cuda_can_start(given, seen):
    env = {k: v for k, v in os.environ.items() if k != "CUDA_MPS_CLIENT_PRIORITY"}
    env |= {} if given is None else {"CUDA_MPS_CLIENT_PRIORITY": given}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"torch: {seen}\n", done.stderr
