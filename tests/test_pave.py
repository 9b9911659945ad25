"""PAVE: the scripts' chain rule and losses against torch.func, which knows nothing of the critic's layers."""

import pytest
import torch
from conftest import A, B, O, S, check_loss, load_script
from torch import nn
from torch.func import grad, hessian, vmap

pytestmark = pytest.mark.usefixtures("float64")


def derivatives(critic, observations, actions):
    """dQ/da [S, 2, B, A] and its Hessian [S, 2, B, A, A], a seed and a twin at a time."""
    gradients = []
    hessians = []
    for s, twin in ((0, 0), (0, 1), (1, 0), (1, 1)):

        def q(observation, action, s=s, twin=twin):
            return critic(observation.expand(S, 1, O), action.expand(S, 1, A))[s, twin, 0]

        gradients.append(vmap(grad(q, 1))(observations[s], actions[s]))
        hessians.append(vmap(hessian(q, 1))(observations[s], actions[s]))
    return torch.stack(gradients).unflatten(0, (S, 2)), torch.stack(hessians).unflatten(0, (S, 2))


@pytest.mark.parametrize("delta", [-0.05, 1.0])
@pytest.mark.parametrize("path", ["td3_pave.py", "sac_pave.py"])
def test_field_and_losses(path, delta):
    """Both twins' losses are added."""
    script = load_script(path)
    critic = script.Critic(S, O, A)
    for parameter in critic.parameters():  # so large that the curvature counts
        nn.init.normal_(parameter, std=2 * parameter.shape[-2] ** -0.5)
    observations, next_observations, noise = torch.randn(3, S, B, O)
    actions, probes = torch.randn(2, S, B, A).sign() * torch.tensor([0.4, 1]).view(2, 1, 1, 1)
    g, H = derivatives(critic, observations, actions)
    noisy_g, _ = derivatives(critic, observations + noise, actions)
    next_g, _ = derivatives(critic, next_observations, actions)
    curvature = torch.einsum("sbi,stbij,sbj->stb", probes, H, probes)
    expected = (critic(observations, actions), g, curvature)
    torch.testing.assert_close(critic.action_field(observations, actions, probes), expected)

    columns = (observations, actions, next_observations, noise, probes)
    values, mpr, vfc, curv = script.pave_losses(critic, *columns, delta)
    torch.testing.assert_close(values, critic(observations, actions))
    check_loss(mpr, (noisy_g - g).square().mean((2, 3)).sum(1), critic)
    check_loss(vfc, (next_g - g).square().mean((2, 3)).sum(1), critic)
    check_loss(curv, (curvature + delta).relu().mean(2).sum(1), critic)
