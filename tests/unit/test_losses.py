"""Our losses against TRL's own code, run in this process on the same log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from alchemist.trainer.losses import (
    apo_zero_unpaired_losses,
    dpo_losses,
    kl_estimate,
    kto_losses,
    mismatched_completions,
)


def trl_loss(name, token_logps, labels, reference, kl_logps, reference_kl, beta, weights):
    """`KTOTrainer._compute_loss` around a model that returns `token_logps` [n, tokens]."""
    n, length = token_logps.shape

    class Model:
        training = True

        def __call__(self, **_):
            zeros = torch.zeros_like(token_logps)
            return SimpleNamespace(log_probs=token_logps, entropy=zeros, mean_logits=zeros)

    trainer = SimpleNamespace(
        model=Model(),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        calculate_KL=name == "kto",
        _compute_kl_logps=lambda model, batch: kl_logps,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        loss_type=name,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(n, length + 1, dtype=torch.int64),
        "attention_mask": torch.ones(n, length + 1, dtype=torch.int64),
        "completion_mask": torch.ones(n, length + 1, dtype=torch.int64),
        "label": labels,
        "ref_logps": reference,
        "ref_KL_logps": reference_kl,
    }
    loss = KTOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)
    return loss, {k: v[-1] for k, v in trainer._metrics["train"].items() if isinstance(v, list)}


@pytest.mark.parametrize("shift", [-3.0, 3.0])
@pytest.mark.parametrize("labels", [[True, False, True], [True] * 3, [False] * 3])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_loss_and_gradient_equal_trls(name, labels, shift):
    torch.manual_seed(0)
    tokens = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    reference, kl_logps, reference_kl = torch.randn(3, 3, dtype=torch.float64)
    kl_logps = kl_logps + shift
    labels = torch.tensor(labels)
    options = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    theirs, metrics = trl_loss(
        name, tokens, labels, reference, kl_logps, reference_kl, 0.3, (1.3, 0.7)
    )
    if name == "kto":
        kl = kl_estimate(kl_logps, reference_kl)
        assert float(kl) == pytest.approx(metrics["kl"], abs=1e-6)
        assert (kl > 0) == (shift > 0)
        losses = kto_losses(tokens.sum(-1), reference, labels, kl, **options)
    else:
        losses = apo_zero_unpaired_losses(tokens.sum(-1), reference, labels, **options)
    ours = losses.mean()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tokens), torch.autograd.grad(theirs, tokens), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("loss_type", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("robust", 0.2), ("robust", 0.0)]
)
def test_pair_losses_and_gradients_equal_trls(loss_type, smoothing):
    torch.manual_seed(0)
    lengths = torch.tensor([4, 2, 3, 4])  # two chosen, two rejected
    tokens = torch.randn(4, 4, dtype=torch.float64).requires_grad_()
    mask = torch.arange(4) < lengths[:, None]
    reference = torch.randn(4, dtype=torch.float64)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )

    def forward(**_):
        zeros = torch.zeros_like(tokens)
        said = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return SimpleNamespace(log_probs=tokens * mask, **said)

    whole = torch.cat([torch.zeros(4, 1, dtype=torch.bool), mask], dim=1)
    inputs = {
        "input_ids": torch.zeros(4, 5, dtype=torch.int64),
        "attention_mask": torch.ones(4, 5, dtype=torch.int64),
        "completion_mask": whole.long(),
        "ref_chosen_logps": reference[:2],
        "ref_rejected_logps": reference[2:],
    }
    call = type("Model", (), {"training": True, "__call__": lambda self, **kw: forward(**kw)})()
    trainer.model = call
    theirs = DPOTrainer._compute_loss(trainer, call, inputs, return_outputs=False)
    ratios = (tokens * mask).sum(-1) - reference
    ours = dpo_losses(
        ratios[:2],
        ratios[2:],
        lengths[:2],
        lengths[2:],
        beta=0.3,
        loss_type=loss_type,
        label_smoothing=smoothing,
    ).mean()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tokens), torch.autograd.grad(theirs, tokens), rtol=0, atol=1e-6
    )


def test_completions_rotate_as_trl_rotates_them():
    completions = [[1], [2], [3]]
    trls = [completions[-1], *completions[:-1]]
    assert [completions[i] for i in mismatched_completions(completions)] == trls


@pytest.mark.parametrize(
    ("responses", "sources"),
    [
        (["a"], [None]),
        # Two users liked the same answer.
        (["a", "a"], [None, None]),
        (["x", "a", "a", "c"], [3, 0, 0, 2]),
        (["a", "x", "a"], [1, 0, 1]),
    ],
)
def test_the_kl_estimate_takes_nobodys_own_answer(responses, sources):
    assert mismatched_completions(responses) == sources
