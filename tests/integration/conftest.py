"""One shared server for what does not end it: plain SGD, so that a step can be checked from outside."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

SGD = [
    *(
        "--optimizer",
        "sgd",
        "--learning-rate",
        "0.05",
        "--weight-decay",
        "0",
        "--max-grad-norm",
        "0",
    ),
    *(
        "--train-batch-size",
        "4",
        "--train-max-wait",
        "3600",
        "--chunked-prefill-size",
        "256",
        "--enable-metrics",
        "--beta",
        "0.1",
    ),
]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    from live import Server

    running = Server(tmp_path_factory.mktemp("shared") / "data", *SGD)
    yield running
    assert running.stop() == 0, running.tail()
