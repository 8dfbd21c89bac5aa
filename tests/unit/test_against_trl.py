"""One whole training step of TRL's own trainers and one of ours: same model, adapter and completions, same new adapter.

Nothing of TRL is replaced. Its trainers get text whose words are token numbers, so that their own code tokenises, ends
each completion with EOS, pairs completions for the KL estimate, pads, and runs transformers + PEFT and torch's SGD.
"""

import dataclasses

import pytest
import torch
import trl
from datasets import Dataset
from engine_support import VOCAB, Recorder, engine_of, random_adapter, random_model
from peft import LoraConfig as PeftConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alchemist.trainer.lora import LoraConfig
from alchemist.trainer.optimizer import Optimizer, OptimizerConfig
from alchemist.trainer.step import Objective, Sample

# float32 on both sides; sums of some hundred terms in different orders.
LIMIT = 1e-4
BETA = 0.3
# So large that the update is not lost in the rounding of the weights it is added to.
LEARNING_RATE = 2.0
PAD, EOS = VOCAB - 2, VOCAB - 1


def tokenizer():
    vocabulary = {str(i): i for i in range(PAD)} | {"<pad>": PAD, "<eos>": EOS}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


def text(ids):
    return " ".join(map(str, ids))


def words(sample):
    """What TRL is given of a sample: it adds EOS itself."""
    assert sample.response_ids[-1] == EOS
    return text(sample.prompt_ids), " " + text(sample.response_ids[:-1])


def unpaired_columns(samples):
    prompts, completions = zip(*map(words, samples), strict=True)
    return {"prompt": prompts, "completion": completions, "label": [s.label for s in samples]}


def completion_columns(samples):
    columns = unpaired_columns([s for s in samples if s.label])
    return {name: columns[name] for name in ("prompt", "completion")}


def pair_columns(samples):
    chosen, rejected = samples[::2], samples[1::2]
    assert [s.prompt_ids for s in chosen] == [s.prompt_ids for s in rejected]
    return {
        "prompt": [words(s)[0] for s in chosen],
        "chosen": [words(s)[1] for s in chosen],
        "rejected": [words(s)[1] for s in rejected],
    }


TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, completion_columns),
    "kto": (trl.KTOTrainer, trl.KTOConfig, unpaired_columns),
    "apo_zero_unpaired": (trl.KTOTrainer, trl.KTOConfig, unpaired_columns),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, pair_columns),
}


def trls_step(name, model, samples, adapter, directory, **options):
    """TRL's `train()` of one step over all samples: (the update by PEFT name, what it logged)."""
    trainer_class, config_class, columns = TRAINERS[name]
    settings = {
        "output_dir": str(directory),
        "per_device_train_batch_size": len(samples),
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer = trainer_class(
        model=model,
        args=config_class(**settings | options),
        train_dataset=Dataset.from_dict(columns(samples)),
        processing_class=tokenizer(),
        peft_config=PeftConfig(
            r=adapter.config.rank,
            lora_alpha=adapter.config.alpha,
            use_rslora=adapter.config.use_rslora,
            target_modules=list(adapter.config.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    parameters = {
        name.replace(".default", ""): p
        for name, p in trainer.model.named_parameters()
        if ".lora_" in name
    }
    assert parameters.keys() == adapter.weights.keys()
    for key, parameter in parameters.items():
        parameter.data.copy_(adapter.weights[key])
    trainer.train()
    update = {key: p.detach() - adapter.weights[key] for key, p in parameters.items()}
    return update, trainer.state.log_history[0]


def our_step(engine, samples, adapter, objective):
    """The same of ours: (the update by PEFT name, the step's result)."""
    masters = adapter.clone()
    result = engine.gradients(samples, masters.as_served(torch.float32), objective)
    sgd = OptimizerConfig(name="sgd", learning_rate=LEARNING_RATE)
    Optimizer(masters.weights, sgd).step(result.grads)
    return {key: masters.weights[key] - t for key, t in adapter.weights.items()}, result


def make_samples():
    """Three prompts of different lengths, two of which begin alike; of each an answer up and one down."""
    generator = torch.Generator().manual_seed(7)

    def ids(n):
        return torch.randint(0, PAD, (n,), generator=generator).tolist()

    head = ids(6)
    prompts = [head + ids(3), ids(4), head + ids(11)]
    return [
        Sample(
            prompt_ids=prompts[i // 2],
            response_ids=[*ids(2 + 3 * i % 7), EOS],
            label=i % 2 == 0,
            match=f"pair {i // 2}",
        )
        for i in range(6)
    ]


def recorded(engine, model, samples, adapter):
    """All of the first prompt for one of its answers only, nothing of the second, half of the third."""
    recorder = Recorder(engine.shape, torch.float32)
    engine.view = recorder.view
    half = torch.rand(len(samples[4].prompt_ids), generator=torch.Generator().manual_seed(8)) < 0.5
    assert half.any()
    assert not half.all()
    masks = {0: torch.ones(len(samples[0].prompt_ids), dtype=torch.bool), 4: half}
    rows = {
        i: recorder.record(model, adapter, samples[i].prompt_ids, mask) for i, mask in masks.items()
    }
    return [dataclasses.replace(s, recorded=rows.get(i)) for i, s in enumerate(samples)]


def norm(update):
    return float(torch.nn.utils.get_total_norm(list(update.values())))


def difference(ours, theirs):
    """Norm of the difference over the norm of TRL's update."""
    return norm({key: ours[key] - theirs[key] for key in theirs}) / norm(theirs)


def adapter_for(shape, **changes):
    return random_adapter(shape, torch.float32, 2, LoraConfig(rank=3, alpha=5.0, **changes))


KTO_OPTIONS = {"beta": BETA, "desirable_weight": 1.3, "undesirable_weight": 0.7}
KTO = Objective(name="kto", **KTO_OPTIONS)
DPO = Objective(name="dpo", beta=BETA)
# TRL's `sigmoid` takes no label smoothing. Ours, −(1 − ε) log σ(βΔ) − ε log σ(−βΔ), is this sum of two of TRL's losses.
SMOOTHING = 0.2
SMOOTHED = {
    "loss_type": ["sigmoid", "robust"],
    "loss_weights": [2 * (1 - SMOOTHING), 2 * SMOOTHING - 1],
    "label_smoothing": SMOOTHING,
}
STEPS = {
    "sft": (Objective(name="sft"), {"completion_only_loss": True}),
    "kto": (KTO, {"loss_type": "kto", **KTO_OPTIONS}),
    "apo_zero_unpaired": (
        dataclasses.replace(KTO, name="apo_zero_unpaired"),
        {"loss_type": "apo_zero_unpaired", **KTO_OPTIONS},
    ),
    "dpo": (DPO, {"loss_type": "sigmoid", "beta": BETA}),
    "dpo smoothed": (
        dataclasses.replace(DPO, label_smoothing=SMOOTHING),
        {"beta": BETA, **SMOOTHED},
    ),
    "dpo robust": (
        dataclasses.replace(DPO, loss_type="robust", label_smoothing=SMOOTHING),
        {"loss_type": "robust", "label_smoothing": SMOOTHING, "beta": BETA},
    ),
    "dpo ipo": (
        dataclasses.replace(DPO, loss_type="ipo"),
        {"loss_type": "ipo", "beta": BETA},
    ),
}


CASES = [(step, "qwen3") for step in STEPS]
CASES += [(step, family) for step in ("sft", "kto", "dpo") for family in ("llama", "qwen2")]


@pytest.mark.parametrize(("step", "family"), CASES)
def test_the_adapter_after_a_step_is_trls(step, family, tmp_path):
    objective, options = STEPS[step]
    model, samples = random_model(family), make_samples()
    engine = engine_of(model)
    adapter = adapter_for(engine.shape)
    rows = recorded(engine, model, samples, adapter)
    # TRL changes the model it is given.
    theirs, log = trls_step(
        objective.name, random_model(family), samples, adapter, tmp_path, **options
    )
    assert norm(theirs) > 1e-2 * norm(adapter.weights)
    # 24 tokens: the pairs and the KL estimate's completions are in several micro-batches.
    for given, max_tokens in ((samples, 1 << 16), (rows, 1 << 16), (rows, 24)):
        engine.max_tokens = max_tokens
        ours, result = our_step(engine, given, adapter, objective)
        assert difference(ours, theirs) < LIMIT
        assert result.loss == pytest.approx(log["loss"], rel=1e-4)
        for name in log.keys() & result.metrics.keys() - {"kl"}:
            assert result.metrics[name] == pytest.approx(log[name], rel=1e-4, abs=1e-5)
        assert (result.tokens_reused > 0) == (given is rows)
    if objective.name != "sft":
        assert {"rewards/chosen", "rewards/rejected", "logps/chosen"} < log.keys()
    if objective.name == "kto":
        # Not clamped at zero, or it would not be tested.
        assert log["kl"] > 0.1
        assert result.kl == pytest.approx(log["kl"], rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{"use_rslora": True}, {"target_modules": ("q_proj", "up_proj", "o_proj")}], ids=str
)
def test_adapters_of_other_kinds(changes, tmp_path):
    model, samples = random_model("qwen3"), make_samples()
    engine = engine_of(model)
    adapter = adapter_for(engine.shape, **changes)
    rows = recorded(engine, model, samples, adapter)
    theirs, _ = trls_step(
        "kto", random_model("qwen3"), samples, adapter, tmp_path, **STEPS["kto"][1]
    )
    assert difference(our_step(engine, rows, adapter, KTO)[0], theirs) < LIMIT


def test_a_small_difference_would_be_seen(tmp_path):
    """One percent of β, or one vote."""
    model, samples = random_model("qwen3"), make_samples()
    engine = engine_of(model)
    adapter = adapter_for(engine.shape)
    theirs, _ = trls_step(
        "kto", random_model("qwen3"), samples, adapter, tmp_path, **STEPS["kto"][1]
    )
    wrong = dataclasses.replace(KTO, beta=1.01 * BETA)
    assert difference(our_step(engine, samples, adapter, wrong)[0], theirs) > 10 * LIMIT
    one_vote_turned = [dataclasses.replace(samples[0], label=False), *samples[1:]]
    assert difference(our_step(engine, one_vote_turned, adapter, KTO)[0], theirs) > 10 * LIMIT


def test_label_smoothing_of_trls_sigmoid_does_nothing(tmp_path):
    """Where we differ from TRL, and knowingly; when this fails, TRL has changed and `SMOOTHED` can go."""
    samples = make_samples()
    adapter = adapter_for(engine_of(random_model("qwen3")).shape)
    updates = [
        trls_step(
            "dpo",
            random_model("qwen3"),
            samples,
            adapter,
            tmp_path,
            beta=BETA,
            label_smoothing=smoothing,
        )[0]
        for smoothing in (0.0, SMOOTHING)
    ]
    assert difference(*updates) < LIMIT
