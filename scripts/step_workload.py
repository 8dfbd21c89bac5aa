"""What the step benchmarks time: one model, one batch of completions, and the ways to train on it.

The same base weights, adapter and token ids go to every variant. "recorded": the prompts' rows are in a pool, as
serving leaves them (filled here by the engine's own forward). "recompute": the same engine without rows. "trl": TRL's
trainer over transformers + PEFT.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alchemist.kernels import fp8_rows
from alchemist.protocol.layout import ActivationDtype
from alchemist.server.config import Config
from alchemist.trainer.batch import TokenBatch
from alchemist.trainer.families import ModelShape
from alchemist.trainer.lora import LoraAdapter, LoraConfig
from alchemist.trainer.replay import Phases
from alchemist.trainer.rows import ActivationView, Recorded
from alchemist.trainer.step import Objective, ReplayEngine, Sample, StepGradients
from alchemist.trainer.weights import BaseWeights, fused_from_hf


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """Sizes of the model and the batch. The layers are those of Qwen3-1.7B, five of its 28."""

    hidden_size: int = 2048
    num_layers: int = 5
    num_heads: int = 16
    num_kv_heads: int = 8
    intermediate_size: int = 6144
    vocab_size: int = 8192
    batch: int = 2
    """completions in the step"""
    shared: int = 0
    """tokens of a system prompt that all prompts begin with"""
    prompt: int = 1024
    """tokens of each prompt after that"""
    response: int = 64
    """tokens"""
    rank: int = 16


def model_config(config: WorkloadConfig) -> Any:
    """The transformers configuration of `build_model`."""
    import transformers

    return transformers.Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def build_model(config: WorkloadConfig) -> Any:
    """A random Qwen3-shaped transformers model, float32."""
    import transformers

    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(model_config(config)).eval()


def make_samples(config: WorkloadConfig) -> list[Sample]:
    """Completions that share the system prompt, if any; votes alternate up and down."""
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (n,), generator=generator).tolist()

    shared = ids(config.shared)
    return [
        Sample(
            prompt_ids=shared + ids(config.prompt),
            response_ids=ids(config.response),
            label=i % 2 == 0,
        )
        for i in range(config.batch)
    ]


def as_pairs(samples: Sequence[Sample]) -> list[Sample]:
    """Neighbours as preference pairs: two answers to the first one's prompt."""
    return [
        dataclasses.replace(s, match=f"pair {i // 2}", prompt_ids=samples[i - i % 2].prompt_ids)
        for i, s in enumerate(samples)
    ]


def make_adapter(shape: ModelShape, config: WorkloadConfig) -> LoraAdapter:
    """An adapter some steps into training: B is small, not zero."""
    adapter = LoraAdapter.init(shape, LoraConfig(rank=config.rank, alpha=2.0 * config.rank), seed=2)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in adapter.weights.items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
    return adapter


class Ours:
    """The replay engine over one model."""

    view: Callable[..., ActivationView] = ActivationView
    """What recorded rows are read through."""

    def __init__(self, weights: BaseWeights, config: WorkloadConfig) -> None:
        self.weights, self.shape = weights, weights.shape
        self.adapter = make_adapter(self.shape, config)

    @classmethod
    def of(cls, model: Any, config: WorkloadConfig) -> Ours:
        shape = ModelShape.from_config(model.config)
        return cls(BaseWeights(fused_from_hf(model), shape), config)

    def record(
        self,
        samples: Sequence[Sample],
        num_recorded: Sequence[int] | None = None,
        *,
        with_responses: bool = False,
        activation_dtype: ActivationDtype = "auto",
        rounded_to: torch.dtype | None = None,
    ) -> tuple[list[Sample], ActivationView]:
        """The samples with their prompts' rows in a fresh pool, row i = token i of the batch; and the pool's view.

        Args:
            num_recorded: how many of each sample's tokens have a row, from the first on; default: all.
            with_responses: the responses' tokens have rows, too, as with `--record decode`.
            activation_dtype: as `--activation-dtype`.
            rounded_to: what is recorded is rounded to this dtype first.
        """
        shape, device, dtype = self.shape, self.weights.device, self.weights.dtype
        layout = shape.row_layout(dtype, activation_dtype)
        tokens = [
            [*s.prompt_ids, *(s.response_ids[:-1] if with_responses else ())] for s in samples
        ]
        total = sum(len(ids) for ids in tokens)
        # As a server has them: a token's own slot first, then the borrowed ones of every row.
        size = layout.slots_per_row
        kv = (total * (1 + size), shape.num_kv_heads, shape.head_dim)
        k = [torch.zeros(kv, dtype=dtype, device=device) for _ in range(shape.num_layers)]
        v = [torch.zeros(kv, dtype=dtype, device=device) for _ in range(shape.num_layers)]
        host = [torch.zeros(0, layout.width, dtype=dtype) for _ in range(shape.num_layers)]
        cells = torch.arange(total, kv[0]).view(total, size)
        gens = torch.ones(total, dtype=torch.int64)
        replay = ReplayEngine(self.weights, shape).replay(Phases(device))
        counts = num_recorded or [len(ids) for ids in tokens]
        taken, start = [], 0

        def rounded(value: Tensor) -> Tensor:
            return value if rounded_to is None else value.to(rounded_to).to(dtype)

        for sample, ids, count in zip(samples, tokens, counts, strict=True):
            n, prompt = len(ids), len(sample.prompt_ids)
            # One more response token than there are rows: the last one is predicted and never read.
            response = [*ids[prompt:], 0]
            batch = TokenBatch([(sample.prompt_ids, response)], [], [None], device)
            kept = replay.forward(batch, self.adapter, gradient=True).kept
            for layer, values in enumerate(kept):
                planes = [t[total:].view(total, -1) for t in (k[layer], v[layer])]
                for field, (_, width) in layout.fields.items():
                    if field in ("keys", "values"):
                        continue
                    value = rounded(getattr(values, field))
                    if layout.is_encoded(field):
                        value = fp8_rows.encode(value)
                    # The last layer keeps, beyond x, keys and values, only the tokens that predict.
                    end = start + n
                    for plane, first, num_cells, offset in layout.parts(field):
                        part = value[:, offset : min(width, offset + num_cells * layout.cell)]
                        column = first * layout.cell
                        target = planes[plane][end - value.shape[0] : end]
                        target[:, column : column + part.shape[1]] = part
                k[layer][start : start + n] = rounded(values.keys)
                v[layer][start : start + n] = rounded(values.values)
            slots = torch.arange(start, start + n)
            rows = torch.where(slots < start + count, slots, -1)
            taken.append(dataclasses.replace(sample, recorded=Recorded(rows, slots, gens[slots])))
            start += n
        return taken, self.view(layout, host, k, v, gens, cells)

    def step(
        self,
        samples: Sequence[Sample],
        objective: Objective,
        view: ActivationView | None = None,
        max_tokens: int | None = None,
    ) -> StepGradients:
        """One step; `max_tokens`: where it is split, by default as the server would."""
        engine = ReplayEngine(
            self.weights,
            self.shape,
            view=view,
            max_tokens=max_tokens or Config().train_max_tokens,
        )
        return engine.gradients(samples, self.adapter, objective)


def trl_settings(name: str, batch: int, checkpointing: bool, accumulate: int = 1) -> dict[str, Any]:
    """TRL's settings, the fastest that give the same step: float32, SDPA attention, one device batch where completions
    are of one length and else several that are sorted by it, no gradient checkpointing (except in the memory row that
    asks for it), no precomputed reference (each completion is trained on once). See also `_score_responses_only`.
    """
    settings = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_checkpointing": checkpointing,
        "bf16": False,
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "remove_unused_columns": False,
    }
    return settings | ({"completion_only_loss": True} if name == "sft" else {"loss_type": name})


def trl_step(
    model: Any,
    samples: Sequence[Sample],
    adapter: LoraAdapter,
    name: str,
    *,
    device_batch: int,
    checkpointing: bool = False,
) -> Callable[[], dict[str, Tensor]]:
    """A function that runs TRL's own `training_step`, once for each device batch, and returns the adapter's gradient by
    PEFT name.
    """
    import trl
    from datasets import Dataset
    from peft import LoraConfig as PeftConfig

    groups = [samples[i : i + device_batch] for i in range(0, len(samples), device_batch)]
    settings = trl_settings(name, device_batch, checkpointing, len(groups))
    _score_responses_only()
    prompts = [list(s.prompt_ids) for s in samples]
    responses = [list(s.response_ids) for s in samples]
    if name == "sft":
        columns = {
            "input_ids": [p + r for p, r in zip(prompts, responses, strict=True)],
            "labels": [[-100] * len(p) + r for p, r in zip(prompts, responses, strict=True)],
        }
        base, arguments_class = trl.SFTTrainer, trl.SFTConfig
    else:
        columns = {
            "prompt_ids": prompts,
            "completion_ids": responses,
            # As TRL makes them: rotated within the device batch.
            "KL_completion_ids": [
                list(group[i - 1].response_ids) for group in groups for i in range(len(group))
            ],
            "label": [s.label for s in samples],
        }
        base, arguments_class = trl.KTOTrainer, trl.KTOConfig

    class Trainer(base):
        """Token ids are given: nothing to tokenise."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=model,
            args=arguments_class(output_dir=directory, **settings),
            train_dataset=Dataset.from_dict(columns),
            processing_class=_tokenizer(),
            peft_config=PeftConfig(
                r=adapter.config.rank,
                lora_alpha=adapter.config.alpha,
                target_modules=list(adapter.config.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
    parameters = {
        n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if ".lora_" in n
    }
    for key, parameter in parameters.items():
        parameter.data.copy_(adapter.weights[key])
    batches = list(trainer.get_train_dataloader())
    # What the loop around `training_step` does before the first step.
    trainer.current_gradient_accumulation_steps = len(batches)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})

    def step() -> dict[str, Tensor]:
        trainer.model.zero_grad(set_to_none=True)
        for batch in batches:
            trainer.training_step(trainer.model, dict(batch))
        return {key: p.grad for key, p in parameters.items() if p.grad is not None}

    return step


def _score_responses_only() -> None:
    """Let TRL's LM head skip the prompt, as it does on a GPU. On a CPU it would score every position, because it takes
    every other device for one whose compiler cannot have shapes that change; the loss and the gradient are the same.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


def _tokenizer() -> Any:
    """TRL wants a tokenizer for its padding token; the ids are ours."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
