"""The start of Linear, SN-Critic's SpectralLinear, SAC's squashed Gaussian; test_ams.py has the layers themselves."""

import pytest
import torch
from conftest import A, B, O, S, load_script, make_agent, make_batch
from torch.distributions import Normal

pytestmark = pytest.mark.usefixtures("float64")
sn = load_script("baselines/td3_sn.py")


def test_linear_starts_as_torchs():
    weights = torch.cat([parameter.flatten() for parameter in sn.Linear((4,), 100, 300).parameters()])
    assert weights.abs().max() <= 0.1
    assert weights.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)


def test_spectral_norm_and_its_gradient():
    """For each member, whatever its weight was multiplied by."""
    layer = sn.SpectralLinear((S, 2), 8, 6)
    layer.weight.data *= torch.tensor([[0.1, 1], [3, 10]]).view(S, 2, 1, 1)
    for _ in range(3000):
        layer.power_iteration()
    x = torch.randn(S, 2, B, 8)
    probe = torch.randn(S, 2, B, 6)
    expected = x @ (layer.weight / torch.linalg.matrix_norm(layer.weight, ord=2, keepdim=True)) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    gradients = [torch.autograd.grad((output * probe).sum(), layer.weight)[0] for output in (layer(x), expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("path", ["baselines/td3_sn.py", "baselines/sac_sn.py"])
def test_spectral_norms_follow_the_training(path):
    """An iteration an update is enough, for the target critic's own vectors too."""
    agent = make_agent(path, learning_rate=0.01, q_lr=0.01, tau=0.5)
    for _ in range(20):
        agent.update(make_batch(path), update_actor=True)
    for layer in [*agent.critic.children(), *agent.target_critic.children()]:
        norms = torch.linalg.matrix_norm(layer.normalized_weight(), ord=2)
        torch.testing.assert_close(norms, torch.ones(S, 2), atol=0.1, rtol=0)


@pytest.mark.parametrize("path, least", [("baselines/sac.py", -5), ("sac_pave.py", -20)])
def test_sac_sample(path, least):
    """tanh of a Gaussian and its log-probability, bounded at +-1; log standard deviations stay between least and 2."""
    actor = load_script(path).Actor(S, O, A)
    observations = 10 * torch.randn(S, B, O)
    torch.manual_seed(1)
    actions, log_prob, deterministic = actor.sample(observations)
    torch.manual_seed(1)
    mean, log_std = actor(observations)
    u = mean + log_std.exp() * torch.randn(S, B, A)
    exact = Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2 + 1e-6)
    torch.testing.assert_close([actions, log_prob], [torch.tanh(u), exact.sum(-1)])
    torch.testing.assert_close(deterministic, torch.tanh(mean))
    actor.fc_out.weight.data *= 1e4
    _, log_std = actor(observations)
    assert [log_std.min().item(), log_std.max().item()] == pytest.approx([least, 2], abs=0.05)
