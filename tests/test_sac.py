"""SAC's policy and losses, in baselines/sac.py and in what the methods on SAC leave as it is."""

import math

import pytest
import torch
from conftest import OFF_POLICY, A, B, O, S, check_loss, load_script, make_agent, make_batch
from test_td3 import PLAIN
from torch.distributions import Normal, TanhTransform, TransformedDistribution

pytestmark = pytest.mark.usefixtures("float64")
SAC = [path for path in OFF_POLICY if "sac" in path]


@pytest.mark.parametrize("path, least", [("baselines/sac.py", -5), ("sac_pave.py", -20)])
def test_sample(path, least):
    """tanh of a Gaussian and its log-probability; log standard deviations stay between least and 2."""
    actor = load_script(path).Actor(S, O, A)
    observations = torch.randn(S, B, O)
    mean, log_std = actor(observations)
    torch.manual_seed(1)
    actions, log_prob, deterministic = actor.sample(observations)
    torch.manual_seed(1)
    torch.testing.assert_close(actions, torch.tanh(mean + log_std.exp() * torch.randn(S, B, A)))
    torch.testing.assert_close(deterministic, torch.tanh(mean))
    exact = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform()])
    torch.testing.assert_close(log_prob, exact.log_prob(actions).sum(-1), atol=1e-3, rtol=0)  # log(1 - a^2 + 1e-6)
    actor.fc_out.weight.data *= 1e4
    _, log_std = actor(observations)
    assert [log_std.min().item(), log_std.max().item()] == pytest.approx([least, 2], abs=0.05)


def test_no_gradient_is_left_at_a_saturated_action():
    """The exact log-probability would pull every saturated mean back, with a gradient of 2 a row."""
    actor = load_script("baselines/sac.py").Actor(S, O, A)
    actor.fc_out.weight.data.zero_()
    actor.fc_out.bias.data.copy_(torch.tensor([10.0, 10, -30, -30]))  # mean and log standard deviation
    _, log_prob, _ = actor.sample(torch.randn(S, B, O))
    (gradient,) = torch.autograd.grad(log_prob.sum(), actor.fc_out.bias)
    assert gradient[..., :A].abs().max() < 0.02 * B


@pytest.mark.parametrize("path", SAC)
def test_next_values(path):
    """min_j Q'_j(s', a') - alpha log pi(a' | s'), each seed with its own alpha."""
    agent = make_agent(path, **PLAIN)
    agent.log_alpha[0].data = torch.tensor([0.3, 0.7]).log()
    batch = make_batch(path)
    torch.manual_seed(1)
    next_values = agent.next_values(batch.next_observations)
    torch.manual_seed(1)
    next_actions, log_prob, _ = agent.actor.sample(batch.next_observations)
    twins = agent.target_critic(batch.next_observations, next_actions)
    alpha = torch.tensor([[0.3], [0.7]])
    torch.testing.assert_close(next_values, torch.minimum(twins[:, 0], twins[:, 1]) - alpha * log_prob)


HALF = ["baselines/sac_caps.py", "baselines/sac_grad.py", "baselines/sac_asap.py", "sac_pave.py"]  # PAVE's protocol
FACTORS = [("baselines/sac.py", 1), ("sac_ams.py", 1), *[(path, 0.5) for path in HALF]]


@pytest.mark.parametrize("path, factor", FACTORS)
def test_critic_loss(path, factor):
    """Both critics' mean squared TD error, in the PAVE paper's protocol half of it."""
    agent = make_agent(path, **PLAIN)
    batch = make_batch(path)
    torch.manual_seed(1)
    loss, _ = agent.critic_loss(batch)
    torch.manual_seed(1)
    next_values = agent.next_values(batch.next_observations)
    targets = torch.where(batch.terminations == 1, batch.rewards, batch.rewards + 0.9 * next_values)
    values = agent.critic(batch.observations, batch.actions)
    errors = (values[:, 0] - targets).square() + (values[:, 1] - targets).square()
    check_loss(loss, factor * errors.mean(1), agent.critic)


@pytest.mark.parametrize("path", ["baselines/sac.py", "baselines/sac_gp.py", "baselines/sac_sn.py", "sac_ams.py", "sac_pave.py"])
def test_actor_loss(path):
    """alpha log pi(a | s) - min_j Q_j(s, a) of a sampled action."""
    agent = make_agent(path, autotune=False, alpha=0.3)
    batch = make_batch(path)
    torch.manual_seed(1)
    loss, _ = agent.actor_loss(batch)
    torch.manual_seed(1)
    actions, log_prob, _ = agent.actor.sample(batch.observations)
    twins = agent.critic(batch.observations, actions)
    expected = 0.3 * log_prob - torch.minimum(twins[:, 0], twins[:, 1])
    check_loss(loss, expected.mean(1), agent.actor)


@pytest.mark.parametrize("path", SAC)
def test_alpha_is_tuned_to_the_target_entropy(path):
    """d/d log alpha of alpha (entropy + A): alpha falls while the entropy is above -A."""
    agent = make_agent(path, autotune=True)
    agent.log_alpha[0].data.fill_(-1)
    batch = make_batch(path)
    torch.manual_seed(1)
    agent.actor_gradients(batch)
    torch.manual_seed(1)
    _, log_prob, _ = agent.actor.sample(batch.observations)
    entropy = -log_prob.mean(1)
    torch.testing.assert_close(agent.alpha_loss(entropy), math.exp(-1) * (entropy + A))
    torch.testing.assert_close(agent.log_alpha[0].grad, math.exp(-1) * (entropy + A).detach())
