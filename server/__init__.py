"""The serving side: launcher, SGLang plugin, feedback API, ledger, learner."""

from alchemist.server import cpu

# Every process that imports this package may go on to import sglang, the spawned ones included.
cpu.prepare()
