"""How often the base weights are in device memory, and what is left when a trainer or a server is killed.

Memory is the device's, of all processes; on a machine without a GPU, the shared memory that the servers' processes map.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import psutil
from gpu_ipc import Peers
from gpu_part import Part
from gpu_servers import Server, device_bytes, prompts
from process_figures import still_alive

from alchemist.trainer.families import ModelShape


class Lives:
    """Of servers that are up; the first one's trainer is the one that dies, and the second one with its own."""

    def __init__(
        self, part: Part, servers: Sequence[Server], before: int, shape: ModelShape
    ) -> None:
        """Args:
        before: device memory before the servers were started.
        """
        self._part, self.servers, self._before = part, servers, before
        self._weights = _weight_bytes(shape, part.tiny)

    def one_copy(self) -> None:
        """Before any step: later a trainer has an optimizer's state, too."""
        part, server = self._part, self.servers[0]
        attached = device_bytes(part, self.servers)
        pid = server.status()["trainer"]["pid"]
        killed = time.monotonic()
        _kill(pid)
        # A new one needs seconds to import what it needs before it touches the device.
        time.sleep(0.7)
        without = device_bytes(part, self.servers)
        server.wait_trainer(other_than=pid)
        part.add("trainer_restart_s", time.monotonic() - killed)
        # Both have not trained, so that nothing else differs.
        leaked = device_bytes(part, self.servers) - attached
        part.add("trainer_restart_leaked_mib", leaked / 2**20)
        peers = Peers({}, part.device)
        try:
            before = device_bytes(part, self.servers)
            with peers.staying("bare"):
                context = device_bytes(part, self.servers) - before
        finally:
            peers.end()
        extra = attached - without - context
        part.config["memory"] = {
            "attached": attached,
            "without": without,
            "bare_context": context,
            "weights": self._weights,
        }
        part.add(
            "one_copy_server",
            extra / self._weights,
            against="the device's own count, all processes",
        )

    def trainer_death(self) -> None:
        part, server = self._part, self.servers[0]
        pid = server.status()["trainer"]["pid"]
        draw = prompts(part, 128, seed=17)
        failed: list[str] = []

        def ask(ids: list[int]) -> None:
            try:
                server.stream(ids, 64)
            except Exception as error:
                failed.append(str(error))

        threads = [threading.Thread(target=ask, args=(next(draw),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        _kill(pid)
        for thread in threads:
            thread.join()
        part.add("trainer_death_failed_requests", float(len(failed)), n=len(threads))

    def server_death(self) -> None:
        part = self._part
        # Its trainer is ready; the first one's has just been killed.
        dying = self.servers[1]
        others = [server for server in self.servers if server is not dying]
        for server in others:
            server.process.terminate()
        for server in others:
            server.process.wait(15)
        tree = psutil.Process(dying.process.pid).children(recursive=True)
        trainer = dying.status()["trainer"]["pid"]
        born = {trainer: psutil.Process(trainer).create_time()}
        dying.process.kill()
        dying.process.wait(5)
        psutil.wait_procs(tree, timeout=10)
        part.add("server_death_trainer_left", float(len(still_alive(born))), n=len(tree))
        time.sleep(1.0)
        part.add("server_death_leaked_mib", (device_bytes(part, []) - self._before) / 2**20)


def _kill(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    psutil.wait_procs([process], timeout=10)


def _weight_bytes(shape: ModelShape, is_tiny: bool) -> int:
    qkv, hidden, inner = sum(shape.qkv_splits), shape.hidden_size, shape.intermediate_size
    layer = qkv * hidden + shape.qkv_splits[0] * hidden + 3 * inner * hidden
    tables = shape.vocab_size * hidden * (1 if shape.tied_embeddings else 2)
    # On a CPU the embedded model is served in float32.
    return (shape.num_layers * layer + tables) * (4 if is_tiny else 2)
