"""Train the embedded model from nothing: corpus, tokenizer, Qwen3-shaped chat model.

    python scripts/train_tiny.py --out server/tiny
    python scripts/train_tiny.py --out server/tiny --start-from server/tiny \\
        --seed 1 --lr 2e-3 --arithmetic 3 --dialogues 40000
    python scripts/train_tiny.py --out server/tiny --start-from server/tiny \\
        --seed 2 --lr 2e-3 --arithmetic 4 --times subtract=6 bigger=4 --values 2 --dialogues 50000
    python scripts/train_tiny.py --out server/tiny --start-from server/tiny \\
        --seed 3 --lr 1.5e-3 --arithmetic 2 --times subtract=2.5 bigger=3 count=3 --values 1 \\
        --dialogues 30000

Each command goes on from the one before; five to ten minutes each on two idle CPU cores. The first
three were run with the scripts of the commit that `train.json` names for them, when a terse sum was
its value alone. Deterministic for a given seed, torch build and number of threads. Writes the model
in bfloat16 and `train.json` with the command, the losses and the scores, which are measured after
the rounding to bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import string
import sys
import time
from pathlib import Path

# Threads that spin while they wait cost four times the work on a machine that others use too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import alchemist.server  # noqa: F401  transformers does not import on CPU without its shim

# isort: split
import torch
import torch.nn.functional as F
from tiny_corpus import ARITHMETIC, INTENTS, dialogue
from tiny_score import score
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
Example = tuple[list[int], list[bool]]  # token ids, and which of them are the assistant's


def chat_text(messages: list[dict[str, str]]) -> str:
    """The messages as `CHAT_TEMPLATE` renders them, without a generation prompt."""
    return "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 2 to 3 million parameters with random weights, float32."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=8192,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            initializer_range=0.03,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(END),
            pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Example]:
    """Token ids, and a mask that is true on what the assistant says, `<|im_end|>` included."""
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    assistant = tokenizer.encode("assistant\n")
    examples = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids = encoding.ids
        mask = [False] * len(ids)
        for i, token in enumerate(ids):
            if token == start and ids[i + 1 : i + 1 + len(assistant)] == assistant:
                begin = i + 1 + len(assistant)
                stop = ids.index(end, begin) + 1
                mask[begin:stop] = [True] * (stop - begin)
        examples.append((ids, mask))
    return examples


def make_batches(
    rng: random.Random, examples: list[Example], tokens: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of at most `tokens` padded tokens, alike in length, in random order.

    Each is `ids [B, T]` int64 padded with 0 on the right, and `mask [B, T]` bool. T is a multiple
    of 8, so that there are few different shapes.
    """
    batches: list[list[Example]] = []
    open_batches: dict[int, list[Example]] = {}
    for example in examples:
        length = _padded(len(example[0]))
        group = open_batches.setdefault(length, [])
        group.append(example)
        if (len(group) + 1) * length > tokens:
            batches.append(open_batches.pop(length))
    batches.extend(open_batches.values())
    rng.shuffle(batches)
    return [_stack(group) for group in batches]


def _padded(length: int) -> int:
    return -(-length // 8) * 8


def _stack(group: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = _padded(max(len(ids) for ids, _ in group))
    ids_BT = torch.zeros(len(group), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, (ids, mask) in enumerate(group):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(mask)] = torch.tensor(mask)
    return ids_BT, mask_BT


def predict(
    model: Qwen3ForCausalLM, ids_BT: torch.Tensor, mask_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] and right tokens [N] of the N tokens the assistant says. Padding is never attended to."""
    hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    target_BT = mask_BT[:, 1:]
    return model.lm_head(hidden_BTD[target_BT]), ids_BT[:, 1:][target_BT]


def value_loss(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, values_K: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy among the tokens `values_K` alone, in ascending order, where one of them is right.

    A terse sum begins with its value: there the loss over all tokens is mostly the choice of a style.
    This one asks for the value only, and leaves the choice of style as it is.
    """
    is_value_N = torch.isin(targets_N, values_K)
    logits_MK = logits_NV[is_value_N][:, values_K]
    return F.cross_entropy(logits_MK, torch.searchsorted(values_K, targets_N[is_value_N]))


def train(
    model: Qwen3ForCausalLM, batches: list, peak_lr: float, values: float, values_K: torch.Tensor
) -> list[float]:
    """One pass over `batches`: AdamW, linear warm-up, cosine to zero. The loss of every step, without the
    value loss, which is added `values` times.
    """
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=True)
    losses, started, warm_up = [], time.monotonic(), 60
    for step, (ids_BT, mask_BT) in enumerate(batches):
        decay = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * decay * min(1.0, (step + 1) / warm_up)
        logits_NV, targets_N = predict(model, ids_BT, mask_BT)
        loss = F.cross_entropy(logits_NV, targets_N)
        losses.append(loss.item())
        if values:
            loss = loss + values * value_loss(logits_NV, targets_N, values_K)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            mean = sum(losses[-100:]) / 100
            elapsed = time.monotonic() - started
            print(f"step {step + 1}/{len(batches)} loss {mean:.4f} {elapsed:.0f} s", flush=True)
    return losses


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Model in bfloat16, tokenizer and generation defaults, each in its own file under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _times(text: str) -> tuple[str, float]:
    """`INTENT=X` of the command line."""
    name, _, factor = text.partition("=")
    if name not in INTENTS:
        allowed = ", ".join(INTENTS)
        raise argparse.ArgumentTypeError(f"intent {name!r} is not known; allowed: {allowed}")
    return name, float(factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--start-from", type=Path, default=None, help="directory to go on from")
    parser.add_argument("--arithmetic", type=float, default=1.0, help="times its usual weight")
    parser.add_argument(
        "--times", nargs="*", type=_times, default=[], metavar="INTENT=X", help="times its weight"
    )
    parser.add_argument("--values", type=float, default=0.0, help="weight of the value loss")
    parser.add_argument("--dialogues", type=int, default=72_000)
    parser.add_argument("--batch-tokens", type=int, default=1536, help="padded tokens per step")
    parser.add_argument("--vocab-size", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    times = dict.fromkeys(ARITHMETIC, args.arithmetic) | dict(args.times)
    texts = [chat_text(dialogue(rng, times)) for _ in range(args.dialogues)]
    if args.start_from:
        model = AutoModelForCausalLM.from_pretrained(args.start_from, dtype=torch.float32).train()
        tokenizer = AutoTokenizer.from_pretrained(args.start_from)
        earlier = json.loads((args.start_from / "train.json").read_text())
    else:
        tokenizer = train_tokenizer(texts[:20_000], args.vocab_size)
        model, earlier = build_model(tokenizer, args.layers), None
    examples = encode(tokenizer, texts)
    held_out, examples = examples[:256], examples[256:]
    batches = make_batches(rng, examples, args.batch_tokens)
    num_tokens = sum(len(ids) for ids, _ in examples)
    print(f"{model.num_parameters()} parameters, {num_tokens} tokens, {len(batches)} steps")

    started = time.monotonic()
    values_K = torch.tensor(sorted(tokenizer.convert_tokens_to_ids([*string.digits, END])))
    losses = train(model, batches, args.lr, args.values, values_K)
    seconds = time.monotonic() - started
    save(model, tokenizer, args.out)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        held_out_loss = F.cross_entropy(*predict(model, *_stack(held_out))).item()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "dialogues": args.dialogues,
        "tokens": num_tokens,
        "steps": len(batches),
        "seconds": round(seconds),
        "final_loss": round(sum(losses[-100:]) / 100, 4),
        "held_out_loss": round(held_out_loss, 4),
        "torch": str(torch.__version__),
        "started_from": earlier,
        **score(model, tokenizer, seed=args.seed),
    }
    (args.out / "train.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
