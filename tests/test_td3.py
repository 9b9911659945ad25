"""TD3's losses, in baselines/td3.py and in what the methods on TD3 leave as it is."""

import pytest
import torch
from conftest import OFF_POLICY, A, B, S, check_loss, make_agent, make_batch

pytestmark = pytest.mark.usefixtures("float64")
TD3 = [path for path in OFF_POLICY if "td3" in path]
# what a method adds is tested with the method: none of its own here; scripts leave out the flags that they lack
PLAIN = {"num_neighbors": 0, "mpr_weight": 0.0, "vfc_weight": 0.0, "curvature_weight": 0.0, "gamma": 0.9}


@pytest.mark.parametrize("path", TD3)
def test_next_values(path):
    """The twins' minimum at the target actor's action with clipped noise, clipped to the bounds."""
    agent = make_agent(path, policy_noise=0.8, noise_clip=0.5, **PLAIN)
    batch = make_batch(path)
    torch.manual_seed(1)
    next_values = agent.next_values(batch.next_observations)
    torch.manual_seed(1)
    noise = (0.8 * torch.randn(S, B, A)).clamp(-0.5, 0.5)
    next_actions = (agent.target_actor(batch.next_observations) + noise).clamp(-1, 1)
    twins = agent.target_critic(batch.next_observations, next_actions)
    torch.testing.assert_close(next_values, torch.minimum(twins[:, 0], twins[:, 1]))


@pytest.mark.parametrize("path", [path for path in TD3 if "_gp" not in path and "_sn" not in path])
def test_critic_loss(path):
    """Both critics' mean squared TD error; a row that did not terminate bootstraps, truncated or not."""
    agent = make_agent(path, **PLAIN)
    batch = make_batch(path)
    torch.manual_seed(1)
    loss, _ = agent.critic_loss(batch)
    torch.manual_seed(1)
    next_values = agent.next_values(batch.next_observations)
    targets = torch.where(batch.terminations == 1, batch.rewards, batch.rewards + 0.9 * next_values)
    values = agent.critic(batch.observations, batch.actions)
    errors = (values[:, 0] - targets).square() + (values[:, 1] - targets).square()
    check_loss(loss, errors.mean(1), agent.critic)


@pytest.mark.parametrize("path", ["baselines/td3.py", "baselines/td3_gp.py", "baselines/td3_sn.py", "td3_ams.py", "td3_pave.py"])
def test_actor_loss(path):
    """Minus the first critic's value of the actor's action."""
    agent = make_agent(path)
    batch = make_batch(path)
    values = agent.critic(batch.observations, agent.actor(batch.observations))
    check_loss(agent.actor_loss(batch)[0], -values[:, 0].mean(1), agent.actor)


def test_exploration_is_clipped_noise():
    agent = make_agent("baselines/td3.py", exploration_noise=0.7)
    observations = make_batch("baselines/td3.py").observations
    torch.manual_seed(1)
    actions = agent.act(observations, explore=True)
    torch.manual_seed(1)
    noise = 0.7 * torch.randn(S, B, A)
    torch.testing.assert_close(actions, (agent.actor(observations) + noise).clamp(-1, 1))
