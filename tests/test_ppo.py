"""PPO: the advantages, the losses, the gradient's bound and the running statistics."""

import math

import pytest
import torch
from conftest import O, S, load_script

pytestmark = pytest.mark.usefixtures("float64")
ppo = load_script("baselines/ppo.py")


def test_gae_is_the_direct_sum():
    """A_t = sum_l (gamma lambda)^l delta_(t+l), to the end of the episode; only a termination drops V(s')."""
    T = 12
    rewards, values, next_values = torch.randn(3, S, T, 4)
    terminations, truncations = (torch.rand(2, S, T, 4) < 0.2).double()
    ends = torch.maximum(terminations, truncations)
    advantages = ppo.gae(rewards, values, next_values, terminations, ends, gamma=0.97, gae_lambda=0.9)
    deltas = rewards + torch.where(terminations == 1, 0, 0.97 * next_values) - values
    for t in range(T):
        expected = torch.zeros(S, 4)
        alive = torch.ones(S, 4)
        for later in range(t, T):
            expected += alive * (0.97 * 0.9) ** (later - t) * deltas[:, later]
            alive[ends[:, later] == 1] = 0
        torch.testing.assert_close(advantages[:, t], expected)


def test_policy_loss():
    """A good action's ratio counts up to 1.2, a bad one's down to 0.8."""
    log_ratio, advantages = torch.randn(2, S, 50)
    ratio = log_ratio.exp()
    counted = torch.where(advantages > 0, ratio.clip(max=1.2), ratio.clip(min=0.8))
    torch.testing.assert_close(ppo.policy_loss(log_ratio, advantages, 0.2), -(counted * advantages).mean(1))


def test_value_loss():
    """The worse of two errors: of the value, and of the value kept close to what it was."""
    values, old_values, returns = torch.randn(3, S, 50)
    error = (values - returns) ** 2
    kept_error = (old_values + (values - old_values).clip(-0.2, 0.2) - returns) ** 2
    expected = torch.where(error > kept_error, error, kept_error).mean(1) / 2
    torch.testing.assert_close(ppo.value_loss(values, old_values, returns, 0.2), expected)
    torch.testing.assert_close(ppo.value_loss(values, old_values, returns, math.inf), error.mean(1) / 2)


def test_each_seeds_gradient_is_clipped_alone():
    """The first seed's is short enough, the second's is not."""
    parameters = [torch.zeros(S, 3, 4), torch.zeros(S, 1, 2)]
    gradients = [torch.randn_like(parameter) * torch.tensor([0.01, 100]).view(S, 1, 1) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    ppo.clip_gradients(parameters, 0.5)
    norm = torch.cat([gradient[1].flatten() for gradient in gradients]).norm()
    for parameter, gradient in zip(parameters, gradients):
        expected = torch.stack([gradient[0], gradient[1] * 0.5 / norm])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=0)


def test_running_statistics():
    """Mean and variance of all rows that a seed has seen; forward standardises by them and clips."""
    normalizer = ppo.RunningNormalizer(S, O)
    rows = torch.randn(S, 400, O) * torch.tensor([0.1, 1, 30]) + torch.tensor([5.0, -3, 100])
    for batch in rows.split(8, 1):
        normalizer.update(batch)
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    torch.testing.assert_close([normalizer.mean, normalizer.var], [mean, var], rtol=1e-3, atol=1e-5)
    expected = (rows - mean) / var.sqrt()
    torch.testing.assert_close(normalizer(rows), expected.float(), rtol=1e-2, atol=1e-2)
    assert (normalizer(rows + 1e6) == 10).all()
