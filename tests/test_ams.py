"""AMS: its random directions (equation 9) and its critic; test_losses.py has its target (equation 6)."""

import pytest
import torch
from conftest import CPU, A, B, O, S, load_script
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("float64")
ams = load_script("td3_ams.py")


@pytest.mark.parametrize("K, A", [(8, 38), (8, 8), (1, 3), (8, 6), (3, 1)])
def test_directions_are_orthonormal_and_none_is_likelier(K, A):
    """Of uniform directions E v = 0, E v v^T = I / A and E v_i^4 = 3 / (A (A + 2)), in any basis."""
    n = 5_000
    directions = ams.sample_directions((2, n // 2), A, K, CPU).flatten(0, 1)
    assert directions.shape == (n, K, A)
    for frame in directions.split(A, 1):  # K > A: several frames of at most A
        torch.testing.assert_close(frame @ frame.mT, torch.eye(frame.shape[1]).expand(n, -1, -1))
    for rows in (directions, directions @ torch.linalg.qr(torch.randn(A, A)).Q):
        flat = rows.flatten(1)
        moments = (rows.mean(0), flat.T @ flat / n, rows.pow(4).mean(0))
        expected = (torch.zeros(K, A), torch.eye(K * A) / A, torch.full((K, A), 3 / (A * (A + 2))))
        torch.testing.assert_close(moments, expected, atol=5 * n**-0.5, rtol=0)  # five standard errors


def test_a_draw_that_is_exactly_zero_gives_no_direction():
    """A float32 Gaussian is 0 once in 10^7: with one action, a run of 100 000 updates meets that."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(146)
    draws = torch.randn(20_000)
    assert (draws == 0).sum() == 1
    torch.manual_seed(146)
    directions = ams.sample_directions((20_000,), 1, 1, CPU)
    torch.testing.assert_close(directions.flatten(), draws.sign())


@pytest.mark.parametrize("A", [1, 3, 6])
def test_a_frame_and_its_opposite_measure_the_trace(A):
    """Theorem 3.3, exact for a quadratic: mean Q(a + radius v) = Q(a) + radius^2 / (2 A) tr H; the gradient cancels."""
    gradient = torch.randn(A)
    hessian = torch.randn(A, A)

    def critic(observations, actions):
        values = actions @ gradient + ((actions @ hessian) * actions).sum(-1) / 2
        return torch.stack([values, values + 1], 1)

    anchor = torch.rand(S, B, A) - 0.5
    frame = ams.sample_directions((S, B), A, A, CPU)
    values = ams.neighborhood_value(critic, None, anchor, torch.cat([frame, -frame], 2), 0.3)
    torch.testing.assert_close(values, critic(None, anchor)[:, 0] + 0.3**2 / (2 * A) * hessian.trace())


def test_the_twins_minimum_is_inside_the_mean():
    """Q_1 = a_1, Q_2 = -a_1, around 0: the minimum is -0.25 at both neighbours; of the means it would be 0."""
    directions = torch.tensor([[1.0, 0], [-1, 0]]).expand(S, B, 2, 2)

    def critic(observations, actions):
        return torch.stack([actions[..., 0], -actions[..., 0]], 1)

    values = ams.neighborhood_value(critic, None, torch.zeros(S, B, 2), directions, 0.25)
    torch.testing.assert_close(values, torch.full((S, B), -0.25))


@pytest.mark.parametrize("s, twin", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_critic_is_torchs_own_layers(s, twin):
    """With 4 actions for each observation."""
    critic = ams.Critic(S, O, A, layer_norm=True)
    for parameter in critic.parameters():  # LayerNorm starts at weight 1 and bias 0, which would hide a mistake in them
        nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5)
    observations = torch.randn(S, B, O)
    actions = torch.randn(S, B * 4, A)
    x = torch.cat([observations[s].repeat_interleave(4, 0), actions[s]], -1)
    for linear, norm in ((critic.fc1, critic.norm1), (critic.fc2, critic.norm2)):
        x = F.linear(x, linear.weight[s, twin].mT, linear.bias[s, twin, 0])
        x = F.relu(F.layer_norm(x, (256,), norm.weight[s, twin, 0], norm.bias[s, twin, 0]))
    values = F.linear(x, critic.fc_q.weight[s, twin].mT, critic.fc_q.bias[s, twin, 0]).squeeze(1)
    torch.testing.assert_close(critic(observations, actions)[s, twin], values)
