"""A model of any width and depth, random weights and the embedded model's tokenizer: to measure, not to talk to.

    python scripts/random_model.py DIRECTORY [--hidden-size 768] [--layers 4] [--seed 0]

What recording and training cost beside serving depends on a model's width: a token's activations grow with it, the
work of computing them with its square. Heads, and the MLP's width, grow as the hidden size does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alchemist.server.main import TINY_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="must not exist")
    parser.add_argument("--hidden-size", type=int, default=768, help="(default: 768)")
    parser.add_argument("--layers", type=int, default=4, help="(default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(TINY_MODEL)
    times, rest = divmod(options.hidden_size, config.hidden_size)
    if rest or times < 1:
        parser.error(
            f"--hidden-size {options.hidden_size}: must be a multiple of {config.hidden_size}"
        )
    if options.layers < 1:
        parser.error(f"--layers {options.layers}: must be at least 1")
    if options.directory.exists():
        parser.error(f"directory {options.directory} exists already")
    for size in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        setattr(config, size, getattr(config, size) * times)
    config.num_hidden_layers = options.layers
    config.layer_types = config.layer_types[:1] * options.layers
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(options.directory)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(options.directory)
    print(f"{options.directory}: {model.num_parameters() / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
