"""Spectral normalisation, SAC's policy and PPO, against loops and torch's own; the others' losses are in test_shared.py."""

import numpy as np
import pytest
import torch
from conftest import load_script, train

S, B, O, A = 3, 5, 4, 2  # seeds, batch, observation and action dimensions
sn, ppo = load_script("baselines/td3_sn.py"), load_script("baselines/ppo.py")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check(loss: torch.Tensor, expected) -> None:
    torch.testing.assert_close(loss, torch.as_tensor(expected))
    assert loss.shape == (S,)


def test_spectral_norm_and_its_gradient():
    """For every twin and seed, whatever the weight was multiplied by; u is a constant, yet the gradient is the exact one's."""
    layer, probe, x = sn.SpectralLinear((S, 2), 8, 6).double(), draw(S, 2, 8, 6), draw(S, 2, B, 8)
    layer.weight.data *= torch.linspace(0.1, 10, 2 * S).view(S, 2, 1, 1)
    for _ in range(3000):
        layer.power_iteration()
    exact = layer.weight / torch.linalg.matrix_norm(layer.weight, ord=2)[..., None, None]
    torch.testing.assert_close(layer(x), x @ exact + layer.bias)
    ours, known = (torch.autograd.grad((w * probe).sum(), layer.weight)[0] for w in (layer.normalized_weight(), exact))
    torch.testing.assert_close(ours, known, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["td3", "sac"])
def test_spectral_norms_follow_the_training(algorithm):
    kept = train(f"baselines/{algorithm}_sn.py", learning_rate=0.01, q_lr=0.01, learning_starts=4, total_timesteps=24, tau=0.5)
    for layer in (layer for name in ("critic", "target_critic") for layer in kept[name].children()):
        norms = torch.linalg.matrix_norm(layer.normalized_weight(), ord=2)
        torch.testing.assert_close(norms, torch.ones(1, 2), atol=0.1, rtol=0)


@pytest.mark.parametrize("script, low", [("baselines/sac.py", -5), ("sac_pave.py", -20)])
def test_sac_sample_and_log_probability(script, low):
    """torch's TanhTransform where actions are not saturated; where they are, the exact form pulls and the 1e-6 form lets go."""
    actor, observations = load_script(script).Actor(S, O, A).double(), draw(S, B, O)
    mean, log_std = actor(observations)
    actions, log_prob, deterministic = actor.sample(observations)
    squashed = [torch.distributions.transforms.TanhTransform()]
    exact = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, log_std.exp()), squashed)
    torch.testing.assert_close(log_prob, exact.log_prob(actions).sum(-1), atol=1e-3, rtol=0)
    torch.testing.assert_close(deterministic, mean.tanh())
    actor.fc_out.weight.data *= 1e3
    log_std = actor(observations)[1]
    assert [log_std.min().item(), log_std.max().item()] == pytest.approx([low, 2], abs=0.05)
    actor.fc_out.weight.data.zero_()
    actor.fc_out.bias.data.copy_(torch.tensor([10.0, 10, -30, -30]))  # mean and log std
    (gradient,) = torch.autograd.grad(actor.sample(observations)[1].sum(), actor.fc_out.bias)
    assert gradient[..., :A].abs().max() < 0.02 * B  # protocols.md: the exact Jacobian's is 2 a row and action


def test_ppo_gae_is_the_direct_sum():
    """A_t = sum_l (gamma lambda)^l delta_{t+l} to the end of the episode or of the rollout; only a termination drops V(s')."""
    (rewards, values, next_values), terminations = draw(3, S, 12, 4), (torch.rand(S, 12, 4) < 0.2).double()
    ends = torch.maximum(terminations, (torch.rand(S, 12, 4) < 0.2).double())
    advantages = ppo.gae(rewards, values, next_values, terminations, ends, 0.97, 0.9)
    for t in range(12):
        total, alive = 0.0, torch.ones(S, 4)
        for later in range(t, 12):
            bootstrap = torch.where(terminations[:, later] == 1, 0, 0.97 * next_values[:, later])
            total += alive * (0.97 * 0.9) ** (later - t) * (rewards[:, later] + bootstrap - values[:, later])
            alive[ends[:, later] == 1] = 0
        torch.testing.assert_close(advantages[:, t], total)


def test_ppo_gives_gae_the_episodes_ends(monkeypatch):
    """From a real rollout: what terminated, what ended, and V of the last observation, not of the next episode's first."""
    calls, gae = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda **kwargs: calls.append(kwargs) or gae(**kwargs))
    flags = dict(num_envs=2, num_steps=14, total_timesteps=14, num_minibatches=2, learning_rate=0.0)
    kept = train("baselines/ppo.py", num_seeds=S, **flags)
    for t in range(14):  # episodes of 3, 4, 3, 4 steps
        assert (calls[0]["ends"][:, t] == (t in (2, 6, 9, 13))).all()
        assert (calls[0]["terminations"][:, t] == (t in (2, 9))).all()
    last = torch.tensor([1.0, 4.0]).expand(S, 2, 2)
    torch.testing.assert_close(calls[0]["next_values"][:, -1], kept["critic"](kept["actor"].normalizer(last)).detach())


def test_ppo_losses_and_policy():
    log_ratio, advantages, values, old, returns = draw(5, S, B)
    ratio, errors = log_ratio.exp(), ((values - returns) ** 2, (old + (values - old).clip(-0.2, 0.2) - returns) ** 2)
    gains = torch.where(advantages > 0, ratio.clip(max=1.2), ratio.clip(min=0.8)) * advantages
    check(ppo.policy_loss(log_ratio, advantages, 0.2), -gains.mean(-1))
    check(ppo.value_loss(values, old, returns, 0.2), 0.5 * torch.where(errors[0] > errors[1], *errors).mean(-1))
    check(ppo.value_loss(values, old, returns, np.inf), 0.5 * errors[0].mean(-1))
    actor, mean, actions = ppo.Actor(S, O, A).double(), *draw(2, S, B, A)
    torch.nn.init.uniform_(actor.log_std, -1, 1)
    gaussian = torch.distributions.Normal(mean, actor.log_std.exp())
    torch.testing.assert_close(actor.log_prob(mean, actions), gaussian.log_prob(actions).sum(-1))
    torch.testing.assert_close(actor.entropy(), gaussian.entropy().sum(-1)[:, 0])


def test_ppo_clips_each_seeds_gradient_alone():
    parameters, expected = [torch.zeros(S, 3, 4), torch.zeros(S, 1, 2)], []
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * torch.tensor([0.01, 1.0, 100.0]).view(S, 1, 1)
    for seed in range(S):
        alone = [torch.zeros_like(parameter[seed]) for parameter in parameters]
        for one, parameter in zip(alone, parameters):
            one.grad = parameter.grad[seed].clone()
        torch.nn.utils.clip_grad_norm_(alone, 0.5)
        expected.append([one.grad for one in alone])
    ppo.clip_gradients(parameters, 0.5)
    torch.testing.assert_close([[parameter.grad[seed] for parameter in parameters] for seed in range(S)], expected)


def test_ppo_running_statistics():
    """Of all rows that each seed has seen; forward standardises and clips."""
    normalizer = ppo.RunningNormalizer(S, O)
    rows = draw(S, 400, O) * torch.tensor([0.1, 1, 30, 3]) + torch.tensor([5.0, -3, 100, 0])
    for batch in rows.split(8, 1):
        normalizer.update(batch)
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    torch.testing.assert_close([normalizer.mean, normalizer.var], [mean, var], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(normalizer(rows), ((rows - mean) / var.sqrt()).float(), rtol=1e-2, atol=1e-2)
    assert (normalizer(rows + 1e6) == 10).all()


def test_ppo_learns():
    """The whole loop: Brief's best action is 0.5."""
    kept = train("baselines/ppo.py", num_steps=32, num_minibatches=4, total_timesteps=640, learning_rate=0.01)
    assert (kept["actor"](torch.tensor([[[0.0, 0], [0, 2], [1, 0], [1, 3]]])) - 0.5).abs().max() < 0.2
