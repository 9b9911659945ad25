"""AMS: the sampled directions and the neighbourhood value (equations 6 and 9, theorem 3.3)."""

from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from torch import nn
from torch.nn import functional as F

ams = load_script("td3_ams.py")
CPU = torch.device("cpu")


@pytest.mark.parametrize("K, A", [(8, 38), (8, 8), (1, 3), (8, 6), (3, 1), (1, 1)])
def test_directions_are_orthonormal_and_haar(K, A):
    """Whatever the axes, E v = 0, E v_i^4 = 3 / (A (A + 2)), E v v^T = I / A, and no two of a row's K directions correlate."""
    n = 20_000
    directions = ams.sample_directions((2, n // 2), A, K, CPU)
    assert directions.shape == (2, n // 2, K, A)
    for frame in directions.split(A, 2):  # K > A: frames of at most A directions
        identity = torch.eye(frame.shape[2]).expand(2, n // 2, -1, -1)
        torch.testing.assert_close(frame @ frame.mT, identity, atol=1e-6, rtol=0)
    for rows in (directions.flatten(0, 1), directions.flatten(0, 1) @ torch.linalg.qr(torch.randn(A, A)).Q):
        means = rows.mean(0), rows.flatten(1).T @ rows.flatten(1) / n, rows.pow(4).mean(0)
        expected = torch.zeros(K, A), torch.eye(K * A) / A, torch.full((K, A), 3 / (A * (A + 2)))
        torch.testing.assert_close(means, expected, atol=5 * n**-0.5, rtol=0)  # five standard errors of a number in [-1, 1]


@pytest.mark.parametrize("A", [1, 2])
def test_directions_where_a_draw_is_exactly_zero(A, monkeypatch):
    """A float32 Gaussian is 0 once in 10^7: with one action, a run of 100 000 updates meets that."""
    draw = {"randn": lambda *shape, **kwargs: torch.randn(*shape, **kwargs).index_fill(-1, torch.tensor(3), 0)}
    monkeypatch.setattr(ams, "torch", SimpleNamespace(**vars(torch) | draw))
    directions = ams.sample_directions((10,), A, 2, CPU)
    assert directions.isfinite().all()
    norms = torch.ones(10, 2).index_fill(0, torch.tensor(3), 0)
    torch.testing.assert_close(directions.norm(dim=-1), norms, atol=1e-6, rtol=0)


@pytest.mark.parametrize("A", [1, 3, 6])
def test_a_frame_and_its_opposite_measure_the_trace(A):
    """Theorem 3.3 is exact for a quadratic: mean Q(a + radius v) = Q(a) + radius^2 / (2 A) tr H; what is linear cancels."""
    gradient, hessian = torch.randn(A), torch.randn(A, A)

    def critic(observations, actions):
        return (actions @ gradient + ((actions @ hessian) * actions).sum(-1) / 2).unsqueeze(1).expand(-1, 2, -1)

    observations, anchor, frame = torch.zeros(2, 50, 3), torch.rand(2, 50, A) - 0.5, ams.sample_directions((2, 50), A, A, CPU)
    values = ams.neighborhood_value(critic, observations, anchor, torch.cat([frame, -frame], 2), 0.3)
    torch.testing.assert_close(values, critic(observations, anchor)[:, 0] + 0.3**2 / (2 * A) * hessian.trace())


def test_the_minimum_over_twins_is_inside_the_mean_and_neighbors_are_clipped():
    def critic(observations, actions):
        return torch.stack([actions[..., 0], -actions[..., 0]], 1)

    directions = torch.tensor([[1.0, 0], [-1, 0]]).expand(1, 5, 2, 2)
    for anchor, expected in ((0.0, -0.25), (0.9, -(1 + 0.65) / 2)):  # at 0 the minimum of the means would be 0
        values = ams.neighborhood_value(critic, torch.zeros(1, 5, 3), torch.full((1, 5, 2), anchor), directions, 0.25)
        torch.testing.assert_close(values, torch.full((1, 5), expected))


@pytest.mark.parametrize("frames", ["shared", "own"])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("K, A", [(8, 5), (8, 12), (1, 1)])
def test_against_torchs_own_layers(K, A, layer_norm, frames):
    """Our Critic's cheaper way with K neighbours, any callable's, and torch's layers for a seed and a twin each."""
    S, B, O = 2, 4, 3
    critic = ams.Critic(S, O, A, layer_norm).double()
    for parameter in critic.parameters():  # LayerNorm starts at weight 1, bias 0, which would hide a mistake in them
        nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5)
    observations, anchor = torch.randn(S, B, O).double(), torch.rand(S, B, A).double() * 2 - 1  # some neighbours are clipped
    directions = ams.sample_directions((S, 1 if frames == "shared" else B), A, K, CPU).double()
    values = ams.neighborhood_value(critic, observations, anchor, directions, 0.5)
    torch.testing.assert_close(values, ams.neighborhood_value(critic.forward, observations, anchor, directions, 0.5))

    def plain(s: int, twin: int, x: torch.Tensor) -> torch.Tensor:
        for linear, norm in ((critic.fc1, critic.norm1), (critic.fc2, critic.norm2)):
            x = F.linear(x, linear.weight[s, twin].mT, linear.bias[s, twin, 0])
            x = F.layer_norm(x, (256,), norm.weight[s, twin, 0], norm.bias[s, twin, 0]).relu() if layer_norm else x.relu()
        return F.linear(x, critic.fc_q.weight[s, twin].mT, critic.fc_q.bias[s, twin, 0])

    for s in range(S):
        neighbors = (anchor[s].unsqueeze(1) + 0.5 * directions[s]).clamp(-1, 1)  # [B, K, A]
        inputs = torch.cat([observations[s].unsqueeze(1).expand(B, K, O), neighbors], -1)
        torch.testing.assert_close(values[s], torch.minimum(plain(s, 0, inputs), plain(s, 1, inputs)).mean((1, 2)))
