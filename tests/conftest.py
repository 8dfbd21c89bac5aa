"""Shared by all tests: CPU shims before transformers, and the folder of shared test code on the path."""

import sys
from pathlib import Path

from alchemist.server import cpu

cpu.prepare()
sys.path.insert(0, str(Path(__file__).parent))
