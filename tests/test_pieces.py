"""Pieces that test_losses.py takes as they are: AMS's directions, PAVE's three losses, SAC's Gaussian, and so on."""

import pytest
import torch
from conftest import CPU, A, B, O, S, check_loss, load_script
from torch import nn
from torch.distributions import Normal
from torch.func import hessian, jacrev, vmap

pytestmark = pytest.mark.usefixtures("float64")
ams = load_script("td3_ams.py")


@pytest.mark.parametrize("K, A", [(8, 38), (8, 6), (3, 1)])
def test_directions_are_orthonormal_and_none_is_likelier(K, A):
    """Of uniform directions E v = 0, E v v^T = I / A and E v_i^4 = 3 / (A (A + 2)), in any basis."""
    n = 5_000
    directions = ams.sample_directions((2, n // 2), A, K, CPU).flatten(0, 1)
    for frame in directions.split(A, 1):  # K > A: several frames of at most A
        torch.testing.assert_close(frame @ frame.mT, torch.eye(frame.shape[1]).expand(n, -1, -1))
    for rows in (directions, directions @ torch.linalg.qr(torch.randn(A, A)).Q):
        flat = rows.flatten(1)
        moments = (rows.mean(0), flat.T @ flat / n, rows.pow(4).mean(0))
        expected = (torch.zeros(K, A), torch.eye(K * A) / A, torch.full((K, A), 3 / (A * (A + 2))))
        torch.testing.assert_close(moments, expected, atol=5 * n**-0.5, rtol=0)  # five standard errors


def test_a_draw_that_is_exactly_zero_gives_no_direction():
    """A float32 Gaussian is 0 once in 10^7; of these 20 000 one is."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(146)
    directions = ams.sample_directions((20_000,), 1, 1, CPU)
    assert directions.round(decimals=3).unique().tolist() == [-1, 0, 1]


def derivatives(critic, observations, actions):
    """dQ/da [S, 2, B, A] and its Hessian [S, 2, B, A, A], by torch.func, which knows nothing of the critic's layers."""

    def q(observation, action):  # [S, O], [S, A] -> [2]; no seed's value depends on another's action
        return critic(observation.unsqueeze(1), action.unsqueeze(1)).sum((0, 2))

    gradients = vmap(jacrev(q, 1), 1)(observations, actions)  # [B, 2, S, A]
    hessians = vmap(hessian(q, 1), 1)(observations, actions)  # [B, 2, S, A, S, A]
    return gradients.permute(2, 1, 0, 3), torch.einsum("btsisj->stbij", hessians)


@pytest.mark.parametrize("path", ["td3_pave.py", "sac_pave.py"])
def test_pave_losses(path):
    """Both twins' are added."""
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
    assert 0 < (curvature > -0.5).double().mean() < 1
    columns = (observations, actions, next_observations, noise, probes)
    _, mpr, vfc, curv = script.pave_losses(critic, *columns, delta=0.5)
    check_loss(mpr, (noisy_g - g).square().mean((2, 3)).sum(1), critic)
    check_loss(vfc, (next_g - g).square().mean((2, 3)).sum(1), critic)
    check_loss(curv, (curvature + 0.5).relu().mean(2).sum(1), critic)


def test_spectral_norm_and_its_gradient():
    """For each member, whatever its weight was multiplied by."""
    layer = load_script("baselines/td3_sn.py").SpectralLinear((S, 2), 8, 6)
    layer.weight.data *= torch.tensor([[0.1, 1], [3, 10]]).view(S, 2, 1, 1)
    for _ in range(3000):
        layer.power_iteration()
    x = torch.randn(S, 2, B, 8)
    probe = torch.randn(S, 2, B, 6)
    expected = x @ (layer.weight / torch.linalg.matrix_norm(layer.weight, ord=2, keepdim=True)) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    gradients = [torch.autograd.grad((output * probe).sum(), layer.weight)[0] for output in (layer(x), expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("path, least", [("baselines/sac.py", -5), ("sac_pave.py", -20)])
def test_sac_sample(path, least):
    """tanh of a Gaussian and its log-probability, bounded at +-1; log standard deviations stay between least and 2."""
    actor = load_script(path).Actor(S, O, A)
    actor.fc_out.weight.data[..., A:] *= 100
    observations = 10 * torch.randn(S, B, O)
    mean, log_std = actor(observations)
    assert [log_std.min().item(), log_std.max().item()] == pytest.approx([least, 2], abs=0.05)
    torch.manual_seed(1)
    actions, log_prob, deterministic = actor.sample(observations)
    torch.manual_seed(1)
    u = mean + log_std.exp() * torch.randn(S, B, A)
    exact = Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2 + 1e-6)
    torch.testing.assert_close([actions, log_prob, deterministic], [torch.tanh(u), exact.sum(-1), torch.tanh(mean)])


def test_gae_is_the_direct_sum():
    """A_t = sum_l (gamma lambda)^l delta_(t+l), to the end of the episode; only a termination drops V(s')."""
    T = 12
    rewards, values, next_values = torch.randn(3, S, T, 4)
    terminations, truncations = (torch.rand(2, S, T, 4) < 0.2).double()
    ends = torch.maximum(terminations, truncations)
    gae = load_script("baselines/ppo.py").gae
    advantages = gae(rewards, values, next_values, terminations, ends, gamma=0.97, gae_lambda=0.9)
    deltas = rewards + torch.where(terminations == 1, 0, 0.97 * next_values) - values
    for t in range(T):
        expected = torch.zeros(S, 4)
        alive = torch.ones(S, 4)
        for later in range(t, T):
            expected += alive * (0.97 * 0.9) ** (later - t) * deltas[:, later]
            alive[ends[:, later] == 1] = 0
        torch.testing.assert_close(advantages[:, t], expected)


def test_memory_that_slurm_grants(monkeypatch):
    script = load_script("td3_ams.py")
    free = script.free_memory()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of it
    assert script.free_memory() > free / 2
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")  # megabyte
    assert script.free_memory() == script.count_cores() * 2**20
