"""PPO: the advantages, the losses, the gradient's bound and the running statistics."""

import math

import pytest
import torch
from conftest import A, B, O, S, load_script
from torch.distributions import Normal

pytestmark = pytest.mark.usefixtures("float64")
ppo = load_script("baselines/ppo.py")


def test_gae_is_the_direct_sum():
    """A_t = sum_l (gamma lambda)^l delta_(t+l), to the end of the episode; only a termination drops V(s')."""
    T, N = 12, 4
    rewards, values, next_values = torch.randn(3, S, T, N)
    terminations = (torch.rand(S, T, N) < 0.2).double()
    ends = torch.maximum(terminations, (torch.rand(S, T, N) < 0.2).double())
    advantages = ppo.gae(rewards, values, next_values, terminations, ends, gamma=0.97, gae_lambda=0.9)
    for t in range(T):
        expected = torch.zeros(S, N)
        alive = torch.ones(S, N)
        for later in range(t, T):
            bootstrap = torch.where(terminations[:, later] == 1, 0, 0.97 * next_values[:, later])
            delta = rewards[:, later] + bootstrap - values[:, later]
            expected += alive * (0.97 * 0.9) ** (later - t) * delta
            alive[ends[:, later] == 1] = 0
        torch.testing.assert_close(advantages[:, t], expected)


def test_policy_loss():
    """A good action's ratio counts up to 1.2, a bad one's down to 0.8."""
    log_ratio, advantages = torch.randn(2, S, 50)
    ratio = log_ratio.exp()
    counted = torch.where(advantages > 0, ratio.clip(max=1.2), ratio.clip(min=0.8))
    expected = -(counted * advantages).mean(1)
    torch.testing.assert_close(ppo.policy_loss(log_ratio, advantages, 0.2), expected)


def test_value_loss():
    """The worse of two errors: of the value, and of the value kept close to what it was."""
    values, old_values, returns = torch.randn(3, S, 50)
    error = (values - returns) ** 2
    kept_error = (old_values + (values - old_values).clip(-0.2, 0.2) - returns) ** 2
    expected = torch.where(error > kept_error, error, kept_error).mean(1) / 2
    torch.testing.assert_close(ppo.value_loss(values, old_values, returns, 0.2), expected)
    torch.testing.assert_close(ppo.value_loss(values, old_values, returns, math.inf), error.mean(1) / 2)


def test_policy_is_a_gaussian():
    actor = ppo.Actor(S, O, A)
    torch.nn.init.uniform_(actor.log_std, -1, 1)
    mean, actions = torch.randn(2, S, B, A)
    gaussian = Normal(mean, actor.log_std.exp())
    torch.testing.assert_close(actor.log_prob(mean, actions), gaussian.log_prob(actions).sum(-1))
    torch.testing.assert_close(actor.entropy(), gaussian.entropy().sum(-1)[:, 0])


def test_each_seeds_gradient_is_clipped_alone():
    size = torch.tensor([0.01, 100.0]).view(S, 1, 1)
    parameters = [torch.zeros(S, 3, 4), torch.zeros(S, 1, 2)]
    for parameter in parameters:
        parameter.grad = size * torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters]
    ppo.clip_gradients(parameters, 0.5)
    for seed in range(S):
        norm = torch.cat([gradient[seed].flatten() for gradient in before]).norm()
        factor = min(1.0, 0.5 / norm)
        for parameter, gradient in zip(parameters, before):
            torch.testing.assert_close(parameter.grad[seed], factor * gradient[seed], rtol=1e-5, atol=0)


def test_running_statistics():
    """Mean and variance of all rows that a seed has seen; forward standardises by them and clips."""
    normalizer = ppo.RunningNormalizer(S, O)
    rows = torch.randn(S, 400, O) * torch.tensor([0.1, 1, 30]) + torch.tensor([5.0, -3, 100])
    for batch in rows.split(8, 1):
        normalizer.update(batch)
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    torch.testing.assert_close(normalizer.mean, mean, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(normalizer.var, var, rtol=1e-3, atol=1e-5)
    expected = (rows - mean) / var.sqrt()
    torch.testing.assert_close(normalizer(rows), expected.float(), rtol=1e-2, atol=1e-2)
    assert (normalizer(rows + 1e6) == 10).all()
