"""Losses that users name: what is accepted, and what is refused with which words."""

import pytest
import torch

from alchemist.trainer.user_loss import LossBatch, UserLossError, load_user_loss, user_loss


def batch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return LossBatch(
        logps=(-torch.rand(2, 3, generator=generator) * mask).requires_grad_(),
        reference_logps=-torch.rand(2, 3, generator=generator) * mask,
        mask=mask,
        labels=torch.tensor([True, False]),
        weights=torch.tensor([1.0, 0.5]),
        beta=0.1,
    )


def test_a_good_loss_and_its_gradient():
    given = batch()
    loss, grad = user_loss("it", load_user_loss("user_losses:hinge"), given)
    ratio = ((given.logps - given.reference_logps) * given.mask).sum(-1).detach()
    margins = torch.relu(1 - torch.tensor([1.0, -1.0]) * ratio)
    assert loss == pytest.approx(float((torch.tensor([1.0, 0.5]) * margins**2).sum()))
    expected = torch.tensor([-2.0, 1.0]) * margins
    torch.testing.assert_close(grad, expected[:, None] * given.mask)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:loss", "No module named 'no_such_module'"),
        ("user_losses:nothing", "nothing"),
        ("user_losses:not_callable", "not a function"),
        ("user_losses:", "user_losses"),
        (":hinge", "Empty module name"),
        ("user_losses:vector", r"a tensor of shape \(2,\); allowed: a scalar"),
        ("user_losses:number", "returned 1.0; allowed: a scalar tensor"),
        ("user_losses:not_finite", "returned nan; allowed: a finite scalar"),
        ("user_losses:detached", "detached from the log-probabilities"),
        ("user_losses:unrelated", "does not depend on logps"),
        ("user_losses:broken", "failed: KeyError: 'advantage'"),
        ("user_losses:infinite_gradient", "gradient that is not finite"),
        ("user_losses:in_place", "cannot be differentiated: .*inplace operation"),
        ("user_losses:imaginary", r"returned torch\.complex64; allowed: a real number"),
    ],
)
def test_what_is_no_loss_is_refused_by_name(name, words):
    with pytest.raises(UserLossError, match=words) as error:
        user_loss(name, load_user_loss(name), batch())
    assert name in str(error.value)
