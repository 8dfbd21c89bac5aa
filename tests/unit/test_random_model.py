"""Models of another width, made for measuring, and how results name them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from alchemist.server.main import TINY_MODEL

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench_common import model_name

SCRIPT = Path(__file__).parents[2] / "scripts" / "random_model.py"


def make(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_model_of_another_width_has_the_embedded_ones_proportions(tmp_path):
    made = make(tmp_path / "wide", "--hidden-size", "384", "--layers", "2")
    assert made.returncode == 0, made.stderr
    config, base = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "wide", TINY_MODEL)
    )
    assert config["hidden_size"] == 384 == 2 * base["hidden_size"]
    assert config["intermediate_size"] == 2 * base["intermediate_size"]
    assert config["num_attention_heads"] * config["head_dim"] == 2 * 4 * 64
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 2
    weights = load_file(tmp_path / "wide" / "model.safetensors")
    assert weights["model.layers.1.mlp.gate_proj.weight"].shape == (1024, 384)
    # What it says depends on nothing but its seed: servers of it are compared token by token.
    assert make(tmp_path / "again", "--hidden-size", "384", "--layers", "2").returncode == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(again[name].equal(value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hidden-size", "200"], "--hidden-size 200: must be a multiple of 192"),
        (["--hidden-size", "0"], "--hidden-size 0: must be a multiple of 192"),
        (["--layers", "0"], "--layers 0: must be at least 1"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, args, message):
    made = make(tmp_path / "model", *args)
    assert made.returncode == 2
    assert message in made.stderr
    assert not (tmp_path / "model").exists()


def test_what_is_there_is_not_overwritten(tmp_path):
    made = make(tmp_path)
    assert made.returncode == 2
    assert f"{tmp_path} exists already" in made.stderr


def test_results_name_a_model_without_the_place_where_it_lies(tmp_path):
    assert model_name(str(TINY_MODEL)) == "server/tiny"
    assert model_name(str(tmp_path / "wide")) == "wide"
