import math

import pytest
import torch

from alchemist.trainer.optimizer import Optimizer, OptimizerConfig


def masters():
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(4, 3, generator=generator) for n in ("a.weight", "b.weight")}


def gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(4, 3, generator=generator) for n in ("a.weight", "b.weight")}


def test_plain_sgd_step_is_exactly_theta_minus_lr_times_gradient():
    ours, before, grads = masters(), masters(), gradient(1)
    norm = Optimizer(ours, OptimizerConfig(name="sgd", learning_rate=0.3)).step(grads)
    for name, tensor in ours.items():
        assert torch.equal(tensor, torch.add(before[name], grads[name], alpha=-0.3))
    assert norm == pytest.approx(math.sqrt(sum(float(g.pow(2).sum()) for g in grads.values())))


def test_weight_decay_is_decoupled():
    ours, before, grads = masters(), masters(), gradient(1)
    Optimizer(ours, OptimizerConfig(name="sgd", learning_rate=0.3, weight_decay=0.1)).step(grads)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, before[name] * 0.97 - 0.3 * grads[name])


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_adamw_with_clipping_is_torchs(limit):
    ours = masters()
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, max_grad_norm=limit)
    optimizer = Optimizer(ours, config)
    theirs = [torch.nn.Parameter(t) for t in masters().values()]
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(3):
        grads = gradient(step)
        optimizer.step(grads)
        for parameter, grad in zip(theirs, grads.values(), strict=True):
            parameter.grad = grad.clone()
        if limit:
            torch.nn.utils.clip_grad_norm_(theirs, limit)
        reference.step()
    for tensor, parameter in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(tensor, parameter.detach())


def test_saved_state_continues_bit_equal(tmp_path):
    ours = masters()
    optimizer = Optimizer(ours, OptimizerConfig(learning_rate=0.01))
    optimizer.step(gradient(0))
    optimizer.save(tmp_path / "optimizer.safetensors")
    copy = {n: t.clone() for n, t in ours.items()}
    resumed = Optimizer(copy, OptimizerConfig(learning_rate=0.01))
    resumed.load(tmp_path / "optimizer.safetensors")
    fresh = {n: t.clone() for n, t in ours.items()}
    Optimizer(fresh, OptimizerConfig(learning_rate=0.01)).step(gradient(1))
    optimizer.step(gradient(1))
    resumed.step(gradient(1))
    assert all(torch.equal(ours[n], copy[n]) for n in ours)
    assert not any(torch.equal(ours[n], fresh[n]) for n in ours)


def test_foreign_state_is_refused(tmp_path):
    optimizer = Optimizer(masters(), OptimizerConfig())
    optimizer.step(gradient(0))
    optimizer.save(tmp_path / "state")
    with pytest.raises(ValueError, match=r"a\.weight"):
        Optimizer({"c.weight": torch.zeros(4, 3)}, OptimizerConfig()).load(tmp_path / "state")
    with pytest.raises(ValueError, match="of optimizer adamw, not sgd"):
        Optimizer(masters(), OptimizerConfig(name="sgd")).load(tmp_path / "state")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    ours, before = masters(), masters()
    grads = gradient(0)
    grads["b.weight"][1, 1] = bad
    with pytest.raises(FloatingPointError):
        Optimizer(ours, OptimizerConfig()).step(grads)
    assert all(torch.equal(ours[n], before[n]) for n in ours)


@pytest.mark.parametrize(
    "field", [{"name": "lion"}, {"learning_rate": -1.0}, {"max_grad_norm": float("nan")}]
)
def test_config_is_checked(field):
    with pytest.raises(ValueError, match=next(iter(field)).replace("name", "optimizer")):
        OptimizerConfig(**field)
