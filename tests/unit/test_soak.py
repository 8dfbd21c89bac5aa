"""What the soak compares and counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from fixed_batch import LENGTHS, Answer, body, candidates, choose, difference, lead, num_wrong, read
from process_figures import (
    Held,
    Sample,
    growth,
    sample,
    shared_bytes,
    shm_files,
    still_alive,
)
from soak import LOGGING, errors_in


def raw(best, second, tokens=(7, 8)):
    """An answer as SGLang's API gives it, with the two best logprobs of each step."""
    return {
        "meta_info": {
            "output_token_logprobs": [[p, t, None] for p, t in zip(best, tokens, strict=True)],
            "output_top_logprobs": [
                [[p, t, None], [q, 1, None]] for p, q, t in zip(best, second, tokens, strict=True)
            ],
            "cached_tokens": 3,
        }
    }


def test_candidates_are_of_all_lengths():
    found = candidates(12)
    assert found == candidates(12)
    assert [len(prompt) for prompt in found[: len(LENGTHS)]] == list(LENGTHS)


def test_only_the_server_with_adapters_is_told_base():
    assert "lora_path" not in body([[1]], is_plain=True)
    assert body([[1]], is_plain=False, top=2)["lora_path"] == "base"


def test_only_prompts_whose_best_tokens_lead_are_chosen():
    prompts = [[1], [2, 2], [3, 3, 3]]
    answers = [
        raw((-0.1, -0.5), (-2, -0.505)),
        raw((-0.1, -0.2), (-1, -1)),
        raw((-1, -1), (-2, -3)),
    ]
    assert lead(answers[0]) == pytest.approx(0.005)
    chosen, right = choose(prompts, answers, 2, margin=0.01)
    assert chosen == [[2, 2], [3, 3, 3]]
    assert right == read(answers[1:])
    with pytest.raises(SystemExit, match="2 of 3 candidates"):
        choose(prompts, answers, 3, margin=0.01)


def test_a_wrong_token_is_counted():
    right = Answer([1, 2, 3], [-0.1, -0.2, -0.3], 0)
    assert num_wrong(right, right) == 0
    assert num_wrong(Answer([1, 9, 3], [0, 0, 0], 0), right) == 1
    assert num_wrong(Answer([1], [0], 0), right) == 2
    assert difference(Answer([1, 2, 3], [-0.1, -0.25, -0.3], 0), right) == pytest.approx(0.05)


def test_shared_memory_counts_once():
    maps = (
        "7f0000000000-7f0000002000 rw-s 00000000 00:01 77     /memfd:rows (deleted)\n"
        "7f0000004000-7f0000005000 rw-s 00003000 00:01 77     /memfd:rows (deleted)\n"
        "7f0000006000-7f0000007000 rw-s 00000000 00:19 78     /dev/shm/x\n"
        "7f0000007000-7f0000008000 rw-s 00000000 00:19 80     /dev/shm/gone (deleted)\n"
        "7f0000008000-7f000000a000 r-xp 00000000 08:01 79     /usr/lib/libc.so\n"
    )
    # The first segment ends where its second mapping does: 0x3000 + 0x1000.
    assert shared_bytes([maps, maps]) == 0x4000 + 0x2000
    assert shm_files([maps, maps]) == {"/dev/shm/x"}


def test_this_process_as_it_is():
    before = sample(os.getpid(), None, 0.0)
    segment = shared_memory.SharedMemory(create=True, size=1 << 20)
    try:
        after = sample(os.getpid(), None, 1.0)
    finally:
        segment.close()
        segment.unlink()
    assert after.shared_bytes - before.shared_bytes == 1 << 20
    assert after.held["main"].fds >= before.held["main"].fds + 1
    assert after.held["main"].own_bytes > 1 << 20
    assert after.shm_files - before.shm_files == {f"/dev/shm/{segment.name.lstrip('/')}"}
    assert not Path(f"/dev/shm/{segment.name.lstrip('/')}").exists()


def test_growth_is_from_the_second_quarter_to_the_last():
    # Caches fill at first; then a file leaks every ten seconds.
    samples = [
        Sample(
            float(at),
            {"main": Held(100 if at < 10 else 10 + at // 10, 1000, 4)}
            | ({"trainer": Held(1, 1, 1)} if at != 39 else {}),
            0 if at < 20 else 4096,
            frozenset(),
        )
        for at in range(40)
    ]
    found = growth(samples)
    assert found["main"]["fds"] == 2
    assert found["shared"] == {"bytes": 4096}
    # It was not there at the end.
    assert "trainer" not in found
    with pytest.raises(ValueError, match="7 samples"):
        growth(samples[:7])


def test_who_is_still_alive():
    began = psutil.Process().create_time()
    assert still_alive({os.getpid(): began}) == [os.getpid()]
    assert still_alive({os.getpid(): began - 100}) == []


def test_errors_in_a_log():
    log = (
        "[2026-11-21 10:00:00,1] INFO sglang: Decode batch, #error: 3\n"
        "[2026-11-21 10:00:01,1] ERROR alchemist.server.engine: no\n"
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1\n'
        "ValueError: no\n"
        "[2026-11-21 10:00:01,1] WARNING sglang: an ERROR it is not\n"
        "ERROR:    Exception in ASGI application\n"
    )
    found = errors_in(log)
    assert [line.split()[0] for line in found] == ["[2026-11-21", "Traceback", "ERROR:"]


def test_the_server_writes_levels_as_they_are_looked_for():
    # In a process of its own: a logging configuration is global.
    script = (
        "import json, logging, logging.config, sys\n"
        "logging.config.dictConfig(json.loads(sys.argv[1]))\n"
        "logging.getLogger('a').error('one')\n"
        "logging.getLogger('b').info('two')\n"
    )
    command = [sys.executable, "-c", script, json.dumps(LOGGING)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stderr.splitlines()) == 2
    assert len(errors_in(done.stderr)) == 1
