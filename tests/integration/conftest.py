"""Shared servers for what does not end them. One learns by plain SGD, so that a step can be checked from outside; the
other records and learns nothing.
"""

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
    from live import running

    with running(tmp_path_factory.mktemp("shared") / "data", *SGD) as server:
        yield server


@pytest.fixture(scope="session")
def silent(tmp_path_factory):
    from live import running

    args = ["--record", "none", "--no-train", "--chunked-prefill-size", "256"]
    with running(tmp_path_factory.mktemp("silent") / "data", *args) as server:
        yield server
