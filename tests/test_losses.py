"""Each script's losses [S] against closed forms: a loss is a sum of terms, and a term is a function of a few lines.

The loss and its terms draw the same random numbers in the same order. FLAGS gives every weight a value of its own.
"""

import pytest
import torch
from conftest import CPU, A, B, S, check_loss, load_script, make_agent, make_batch
from torch.distributions import Normal

pytestmark = pytest.mark.usefixtures("float64")
FLAGS = {"gamma": 0.9, "policy_noise": 0.8, "noise_clip": 0.5, "autotune": False, "alpha": 0.3, "penalty_weight": 0.4}
FLAGS |= {"mpr_weight": 2.0, "vfc_weight": 3.0, "curvature_weight": 5.0, "sigma": 0.3, "delta": 0.5, "grad_weight": 0.8}
FLAGS |= {"caps_temporal_weight": 0.7, "caps_spatial_weight": 0.6, "caps_sigma": 0.5}
FLAGS |= {"predictor_weight": 0.7, "spatial_weight": 0.6, "temporal_weight": 0.8, "geometry_rows": 4, "ent_coef": 0.1}


def td_error(agent, batch, next_values):
    """Both critics' mean squared TD error; only a termination cuts the bootstrap."""
    targets = torch.where(batch.terminations == 1, batch.rewards, batch.rewards + 0.9 * next_values.detach())
    values = agent.critic(batch.observations, batch.actions)
    return ((values[:, 0] - targets) ** 2 + (values[:, 1] - targets) ** 2).mean(1)


def td3_error(agent, batch):
    """The twins' minimum at the target actor's action, with clipped noise, within the bounds."""
    noise = (0.8 * torch.randn(S, B, A)).clamp(-0.5, 0.5)
    next_actions = (agent.target_actor(batch.next_observations) + noise).clamp(-1, 1)
    twins = agent.target_critic(batch.next_observations, next_actions)
    return td_error(agent, batch, torch.minimum(twins[:, 0], twins[:, 1]))


def sac_error(agent, batch):
    """The twins' minimum at a sampled action, plus its entropy."""
    next_actions, log_prob, _ = agent.actor.sample(batch.next_observations)
    twins = agent.target_critic(batch.next_observations, next_actions)
    return td_error(agent, batch, torch.minimum(twins[:, 0], twins[:, 1]) - 0.3 * log_prob)


def half_sac_error(agent, batch):
    """The PAVE paper's protocol."""
    return 0.5 * sac_error(agent, batch)


def td3_ams_error(agent, batch):
    """Around the target actor's action, without noise."""
    return td_error(agent, batch, value_around(agent, batch, agent.target_actor(batch.next_observations)))


def sac_ams_error(agent, batch):
    """Around the deterministic action; the entropy is that of a sampled one."""
    _, log_prob, anchor = agent.actor.sample(batch.next_observations)
    return td_error(agent, batch, value_around(agent, batch, anchor) - 0.3 * log_prob)


def value_around(agent, batch, anchor):
    """The mean over 8 neighbours of the twins' minimum; the neighbours of all rows may share their directions."""
    frames = 1 if agent.args.shared_frame else B
    directions = load_script("td3_ams.py").sample_directions((S, frames), A, 8, CPU)
    values = []
    for k in range(8):
        neighbor = (anchor + 0.2 * directions[:, :, k]).clamp(-1, 1)
        values.append(agent.target_critic(batch.next_observations, neighbor).amin(1))
    return torch.stack(values).mean(0)


def pave(agent, batch):
    """Of the first geometry_rows = 4 rows; test_pieces.py has the three losses themselves."""
    observations = batch.observations[:, :4]
    actions = batch.actions[:, :4]
    noise = 0.3 * torch.randn_like(observations)
    probes = 2 * torch.randint_like(actions, 2) - 1
    columns = (observations, actions, batch.next_observations[:, :4], noise, probes)
    _, mpr, vfc, curv = load_script("td3_pave.py").pave_losses(agent.critic, *columns, 0.5)
    return agent.args.mpr_weight * mpr + agent.args.vfc_weight * vfc + 5 * curv


def gradient_penalty(agent, batch):
    actions = batch.actions.clone().requires_grad_()
    values = agent.critic(batch.observations, actions)
    (first,) = torch.autograd.grad(values[:, 0].sum(), actions, create_graph=True)
    (second,) = torch.autograd.grad(values[:, 1].sum(), actions, create_graph=True)
    return 0.4 * (first**2 + second**2).sum(2).mean(1)


def td3_value(agent, batch):
    return -agent.critic(batch.observations, agent.actor(batch.observations))[:, 0].mean(1)


def sac_value(agent, batch):
    actions, log_prob, _ = agent.actor.sample(batch.observations)
    twins = agent.critic(batch.observations, actions)
    return (0.3 * log_prob - torch.minimum(twins[:, 0], twins[:, 1])).mean(1)


def caps(agent, batch):
    """The action's change from one step to the next, and its change where the observation has noise."""
    noisy_observations = batch.observations + 0.5 * torch.randn_like(batch.observations)
    actions = agent.act(batch.observations, explore=False)
    temporal = actions - agent.act(batch.next_observations, explore=False)
    spatial = actions - agent.act(noisy_observations, explore=False)
    return (0.7 * temporal**2 + 0.6 * spatial**2).mean((1, 2)) / 2


def grad(agent, batch):
    """The second difference of three successive actions, less where they move far; that weight is a constant."""
    actions = agent.act(batch.observations, explore=False)
    next_actions = agent.act(batch.next_observations, explore=False)
    previous_actions = agent.act(batch.previous_observations, explore=False)
    weight = torch.tanh(1 / (next_actions - previous_actions + 1e-4) ** 2).detach()
    return 0.8 * ((2 * actions - next_actions - previous_actions) ** 2 * weight).mean((1, 2)) / 2


def asap(agent, batch):
    """A second head of the actor learns the next action, which keeps to what the head's slow copy foresaw."""
    next_actions = agent.act(batch.next_observations, explore=False)
    predictor = agent.actor.predict(batch.observations) - next_actions.detach()
    spatial = next_actions - agent.slow_actor.predict(batch.observations)
    return (0.7 * predictor**2 + 0.6 * spatial**2).mean((1, 2)) / 2


def ppo_value(agent, batch):
    """The worse of two errors: of the value, and of the value kept close to what it was."""
    values = agent.critic(batch.observations)
    near_values = batch.values + (values - batch.values).clip(-0.2, 0.2)
    return torch.maximum((values - batch.returns) ** 2, (near_values - batch.returns) ** 2).mean(1) / 2


def ppo_policy(agent, batch):
    """A good action's ratio counts up to 1.2, a bad one's down to 0.8; and the entropy."""
    policy = Normal(agent.actor.network(batch.observations), agent.actor.log_std.exp())
    ratio = (policy.log_prob(batch.actions).sum(-1) - batch.log_probs).exp()
    deviation, mean = torch.std_mean(batch.advantages, 1, keepdim=True)
    advantages = (batch.advantages - mean) / deviation
    counted = torch.where(advantages > 0, ratio.clip(max=1.2), ratio.clip(min=0.8))
    return -(counted * advantages + 0.1 * policy.entropy().sum(-1)).mean(1)


PAVE_WEIGHTS = ("mpr_weight", "vfc_weight", "curvature_weight")
LOSSES = [  # script, other flags, terms of the critic's loss, terms of the actor's
    ("baselines/td3.py", {}, [td3_error], [td3_value]),
    ("baselines/td3_caps.py", {}, [td3_error], [td3_value, caps]),
    ("baselines/td3_grad.py", {}, [td3_error], [td3_value, grad]),
    ("baselines/td3_asap.py", {}, [td3_error], [td3_value, grad, asap]),
    ("baselines/td3_gp.py", {}, [td3_error, gradient_penalty], [td3_value]),
    ("baselines/td3_sn.py", {}, [td3_error], [td3_value]),
    ("td3_pave.py", {}, [td3_error, pave], [td3_value]),
    ("td3_pave.py", {"mpr_weight": 0.0, "vfc_weight": 0.0}, [td3_error, pave], [td3_value]),
    ("td3_pave.py", dict.fromkeys(PAVE_WEIGHTS, 0.0), [td3_error], [td3_value]),
    ("td3_ams.py", {}, [td3_ams_error], [td3_value]),
    ("td3_ams.py", {"shared_frame": True}, [td3_ams_error], [td3_value]),
    ("td3_ams.py", {"num_neighbors": 0}, [td3_error], [td3_value]),
    ("baselines/sac.py", {}, [sac_error], [sac_value]),
    ("baselines/sac_caps.py", {}, [half_sac_error], [sac_value, caps]),
    ("baselines/sac_grad.py", {}, [half_sac_error], [sac_value, grad]),
    ("baselines/sac_asap.py", {}, [half_sac_error], [sac_value, grad, asap]),
    ("baselines/sac_gp.py", {}, [half_sac_error, gradient_penalty], [sac_value]),
    ("baselines/sac_sn.py", {}, [half_sac_error], [sac_value]),
    ("sac_pave.py", {}, [half_sac_error, pave], [sac_value]),
    ("sac_ams.py", {}, [sac_ams_error], [sac_value]),
    ("sac_ams.py", {"num_neighbors": 0}, [sac_error], [sac_value]),
    ("baselines/ppo.py", {}, [ppo_value], [ppo_policy]),
]


@pytest.mark.parametrize("path, flags, critic_terms, actor_terms", LOSSES, ids=[f"{row[0]} {row[1]}" for row in LOSSES])
def test_losses(path, flags, critic_terms, actor_terms):
    agent = make_agent(path, **FLAGS | flags)
    batch = make_batch(path)
    torch.manual_seed(1)
    critic_loss, _ = agent.critic_loss(batch)
    actor_loss, _ = agent.actor_loss(batch)
    torch.manual_seed(1)
    check_loss(critic_loss, sum(term(agent, batch) for term in critic_terms), agent.critic)
    check_loss(actor_loss, sum(term(agent, batch) for term in actor_terms), agent.actor)


@pytest.mark.parametrize("path", ["baselines/sac.py", "sac_ams.py", "sac_pave.py"])
def test_alpha_is_tuned_to_the_target_entropy(path):
    """d/d log alpha of alpha (entropy + A), at alpha = 1: alpha falls while the entropy is above -A."""
    agent = make_agent(path, autotune=True)
    batch = make_batch(path)
    torch.manual_seed(1)
    agent.actor_gradients(batch)
    torch.manual_seed(1)
    _, log_prob, _ = agent.actor.sample(batch.observations)
    torch.testing.assert_close(agent.log_alpha[0].grad, (A - log_prob.mean(1)).detach())
