"""Shared by all tests: CPU shims before transformers, and the folder of shared test code on the path."""

import sys
from pathlib import Path

import torch

from alchemist.server import cpu

cpu.prepare()
# The models of the unit tests are tiny: a second thread only waits for the first.
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
