"""CAPS, GRAD and ASAP: what they add to the actor's loss of TD3 and of SAC."""

import pytest
import torch
from conftest import check_loss, make_agent, make_batch
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("float64")


def td3_loss(agent, batch):
    return -agent.critic(batch.observations, agent.actor(batch.observations))[:, 0].mean(1)


def sac_loss(agent, batch):
    """With alpha 0.3, for which make_agent is told."""
    actions, log_prob, _ = agent.actor.sample(batch.observations)
    return (0.3 * log_prob - agent.critic(batch.observations, actions).amin(1)).mean(1)


def mean_square(x):
    return x.square().mean((1, 2))


CAPS = [("baselines/td3_caps.py", td3_loss), ("td3_pave.py", td3_loss), ("baselines/sac_caps.py", sac_loss)]


@pytest.mark.parametrize("path, base", CAPS)
def test_caps(path, base):
    """The change from one step to the next, and the change that noise on the observation makes."""
    weights = {"caps_temporal_weight": 0.3, "caps_spatial_weight": 0.7, "caps_sigma": 0.5}
    agent = make_agent(path, alpha=0.3, **weights)
    batch = make_batch(path)
    torch.manual_seed(1)
    loss, _ = agent.actor_loss(batch)
    torch.manual_seed(1)
    expected = base(agent, batch)
    perturbed = batch.observations + 0.5 * torch.randn_like(batch.observations)
    actions = agent.act(batch.observations, explore=False)
    temporal = mean_square(actions - agent.act(batch.next_observations, explore=False))
    spatial = mean_square(actions - agent.act(perturbed, explore=False))
    check_loss(loss, expected + 0.3 * temporal / 2 + 0.7 * spatial / 2, agent.actor)


def grad_closed_form(agent, batch):
    """The second difference of three successive actions, weighted less where they move far; the weight is a constant."""
    actions = agent.act(batch.observations, explore=False)
    next_actions = agent.act(batch.next_observations, explore=False)
    previous_actions = agent.act(batch.previous_observations, explore=False)
    weight = torch.tanh(1 / (next_actions - previous_actions + 1e-4) ** 2).detach()
    return ((2 * actions - next_actions - previous_actions) ** 2 * weight).mean((1, 2)) / 2


@pytest.mark.parametrize("path, base", [("baselines/td3_grad.py", td3_loss), ("baselines/sac_grad.py", sac_loss)])
def test_grad(path, base):
    agent = make_agent(path, alpha=0.3, grad_weight=0.6)
    batch = make_batch(path)
    torch.manual_seed(1)
    loss, _ = agent.actor_loss(batch)
    torch.manual_seed(1)
    check_loss(loss, base(agent, batch) + 0.6 * grad_closed_form(agent, batch), agent.actor)


ASAP = [("baselines/td3_asap.py", td3_loss, torch.tanh), ("baselines/sac_asap.py", sac_loss, lambda x: x)]


@pytest.mark.parametrize("path, base, squash", ASAP)
def test_asap(path, base, squash):
    """The predictor learns the next action; the next action keeps to what the slow predictor foresaw; GRAD."""
    agent = make_agent(path, alpha=0.3, predictor_weight=0.5, spatial_weight=0.6, temporal_weight=0.7)
    batch = make_batch(path)
    torch.manual_seed(1)
    loss, _ = agent.actor_loss(batch)
    torch.manual_seed(1)
    expected = base(agent, batch) + 0.7 * grad_closed_form(agent, batch)

    def predict(actor):
        features = F.silu(actor.fc2(F.silu(actor.fc1(batch.observations))))
        return squash(actor.fc_predict(features))

    next_actions = agent.act(batch.next_observations, explore=False)
    predictor = mean_square(predict(agent.actor) - next_actions.detach())
    spatial = mean_square(next_actions - predict(agent.slow_actor))
    check_loss(loss, expected + 0.5 * predictor / 2 + 0.6 * spatial / 2, agent.actor)
