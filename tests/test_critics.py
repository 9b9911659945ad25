"""GP-Critic and SN-Critic: a penalty on the critic's action gradient, and layers of spectral norm 1."""

import pytest
import torch
from conftest import S, check_loss, make_agent, make_batch

pytestmark = pytest.mark.usefixtures("float64")


def td_loss(agent, critic, batch):
    """Both twins' mean squared TD error, for a critic in the agent's critic's place; the agent's gamma is 0.9."""
    with torch.no_grad():
        next_values = agent.next_values(batch.next_observations)
    targets = batch.rewards + 0.9 * (1 - batch.terminations) * next_values
    values = critic(batch.observations, batch.actions)
    return (values[:, 0] - targets).square().mean(1) + (values[:, 1] - targets).square().mean(1)


@pytest.mark.parametrize("path, factor", [("baselines/td3_gp.py", 1), ("baselines/sac_gp.py", 0.5)])
def test_gradient_penalty(path, factor):
    agent = make_agent(path, gamma=0.9, penalty_weight=0.3)
    batch = make_batch(path)
    torch.manual_seed(1)
    loss, _ = agent.critic_loss(batch)
    torch.manual_seed(1)
    expected = factor * td_loss(agent, agent.critic, batch)
    actions = batch.actions.requires_grad_()
    values = agent.critic(batch.observations, actions)
    for twin in range(2):
        (gradients,) = torch.autograd.grad(values[:, twin].sum(), actions, create_graph=True)
        expected = expected + 0.3 * gradients.square().mean((1, 2))
    check_loss(loss, expected, agent.critic)


SN = [("baselines/td3_sn.py", "baselines/td3_caps.py", 1), ("baselines/sac_sn.py", "baselines/sac_caps.py", 0.5)]


@pytest.mark.parametrize("path, plain, factor", SN)
def test_spectral_norm(path, plain, factor):
    """The loss is that of an ordinary critic whose weights are divided by their largest singular values."""
    agent = make_agent(path, gamma=0.9)
    critic = make_agent(plain).critic
    batch = make_batch(path)
    weights = {}
    for name, layer in agent.critic.named_children():
        inputs, outputs = layer.weight.shape[-2:]
        far = torch.randn(S, 2, inputs, 1) * torch.randn(S, 2, 1, outputs)  # a direction that the iteration finds soon
        layer.weight.data += 0.1 * far
        weights[f"{name}.weight"] = layer.weight / torch.linalg.matrix_norm(layer.weight, ord=2, keepdim=True)
        weights[f"{name}.bias"] = layer.bias
    for _ in range(50):
        agent.critic.power_iteration()
    torch.manual_seed(1)
    loss, _ = agent.critic_loss(batch)
    torch.manual_seed(1)
    expected = td_loss(agent, lambda *inputs: torch.func.functional_call(critic, weights, inputs), batch)
    check_loss(loss, factor * expected, agent.critic)


@pytest.mark.parametrize("path", ["baselines/td3_sn.py", "baselines/sac_sn.py"])
def test_spectral_norms_follow_the_training(path):
    """An iteration an update is enough, for the target critic's own vectors too."""
    agent = make_agent(path, learning_rate=0.01, q_lr=0.01, tau=0.5)
    for _ in range(20):
        agent.update(make_batch(path), update_actor=True)
    for network in (agent.critic, agent.target_critic):
        for layer in network.children():
            norms = torch.linalg.matrix_norm(layer.normalized_weight(), ord=2)
            torch.testing.assert_close(norms, torch.ones(S, 2), atol=0.1, rtol=0)
