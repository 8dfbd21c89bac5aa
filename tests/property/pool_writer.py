"""Run by test_pool_processes.py: a pool at work, as fast as it can, until it is killed.

Prints where its memory is; then, for every line on its standard input, where one answer's tokens are recorded at that
moment and what was recorded there.
"""

import os
import random
import select
import sys
from pathlib import Path

import msgspec
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pool_support import World


def tell(message: dict) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def main(seed: int) -> None:
    draw = random.Random(seed)
    world = World(host_rows=6, is_shared=True)
    pool = world.pool
    host, gens, cells = pool.handles
    k, v = ([world.kv.handles[f"{kind}{layer}"] for layer in range(2)] for kind in "kv")
    tell({"host": host, "gens": gens, "cells": cells, "k": k, "v": v})
    owned: list[torch.Tensor] = []
    content: dict[int, float] = {}
    answers: dict[str, list[tuple[int, float]]] = {}
    now = 0.0
    while True:
        now += 1.0
        slots = world.serve(draw.randint(1, 10))
        if slots is None:
            gone = owned.pop(draw.randrange(len(owned)))
            world.allocator.free(gone)
            for slot in gone.tolist():
                content.pop(slot, None)
        else:
            owned.append(slots)
            content |= world.record(slots)
            rid = f"r{draw.randrange(3)}"
            pool.forget(rid, now)
            pool.finish(rid, slots, slots.numel(), now)
            answers[rid] = [(slot, content.get(slot, -1.0)) for slot in slots.tolist()]
            pool.hedge(draw.randint(1, 8))
        if answers and select.select([sys.stdin], [], [], 0)[0]:
            os.read(0, 1)
            rid, known = draw.choice(sorted(answers.items()))
            is_there = all(content.get(slot) == stamp for slot, stamp in known)
            slots = torch.tensor([slot for slot, _ in known if is_there], dtype=torch.int64)
            out = pool.check_out(rid, slots, len(known))
            pool.check_in(out.ticket)
            found = {name: getattr(out, name).tolist() for name in out._fields if name != "ticket"}
            stamps = [known[i][1] for i in np.flatnonzero(out.rows >= 0)]
            tell(found | {"stamps": stamps})


if __name__ == "__main__":
    main(int(sys.argv[1]))
