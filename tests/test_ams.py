"""AMS: the random directions, the neighbourhood's value (equations 6 and 9, theorem 3.3) and the target made of it."""

import pytest
import torch
from conftest import CPU, A, B, O, S, load_script, make_agent, make_batch
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("float64")
ams = load_script("td3_ams.py")


@pytest.mark.parametrize("K, A", [(8, 38), (8, 8), (1, 3), (8, 6), (3, 1)])
def test_directions_are_orthonormal_and_none_is_likelier(K, A):
    """Of uniform directions E v = 0, E v v^T = I / A and E v_i^4 = 3 / (A (A + 2)), in any basis."""
    n = 20_000
    directions = ams.sample_directions((2, n // 2), A, K, CPU)
    assert directions.shape == (2, n // 2, K, A)
    for frame in directions.split(A, 2):  # K > A: several frames of at most A
        identity = torch.eye(frame.shape[2]).expand(2, n // 2, -1, -1)
        torch.testing.assert_close(frame @ frame.mT, identity)
    rotation = torch.linalg.qr(torch.randn(A, A)).Q
    for rows in (directions.flatten(0, 1), directions.flatten(0, 1) @ rotation):
        flat = rows.flatten(1)
        moments = (rows.mean(0), flat.T @ flat / n, rows.pow(4).mean(0))
        expected = (torch.zeros(K, A), torch.eye(K * A) / A, torch.full((K, A), 3 / (A * (A + 2))))
        torch.testing.assert_close(moments, expected, atol=5 * n**-0.5, rtol=0)  # five standard errors


def test_a_draw_that_is_exactly_zero_gives_no_direction():
    """A float32 Gaussian is 0 once in 10^7: with one action, a run of 100 000 updates meets that."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(146)
    draws = torch.randn(1, 1, 20_000)
    torch.manual_seed(146)
    directions = ams.sample_directions((20_000,), 1, 1, CPU)
    assert (draws == 0).sum() == 1
    torch.testing.assert_close(directions.flatten(), draws.flatten().sign())


@pytest.mark.parametrize("A", [1, 3, 6])
def test_a_frame_and_its_opposite_measure_the_trace(A):
    """Theorem 3.3, exact for a quadratic: mean Q(a + radius v) = Q(a) + radius^2 / (2 A) tr H; what is linear cancels."""
    gradient = torch.randn(A)
    hessian = torch.randn(A, A)

    def critic(observations, actions):
        values = actions @ gradient + ((actions @ hessian) * actions).sum(-1) / 2
        return values.unsqueeze(1).expand(-1, 2, -1)

    observations = torch.zeros(S, B, O)
    anchor = torch.rand(S, B, A) - 0.5
    frame = ams.sample_directions((S, B), A, A, CPU)
    values = ams.neighborhood_value(critic, observations, anchor, torch.cat([frame, -frame], 2), 0.3)
    expected = critic(observations, anchor)[:, 0] + 0.3**2 / (2 * A) * hessian.trace()
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("anchor, expected", [(0.0, -0.25), (0.9, -(1 + 0.65) / 2)])
def test_the_minimum_is_inside_the_mean_and_neighbors_are_clipped(anchor, expected):
    """Q_1 = a_1, Q_2 = -a_1 and v = +-1: at 0 the minimum of the means would be 0; from 0.9 the way ends at 1."""

    def critic(observations, actions):
        return torch.stack([actions[..., 0], -actions[..., 0]], 1)

    directions = torch.tensor([[1.0, 0], [-1, 0]]).expand(1, B, 2, 2)
    values = ams.neighborhood_value(critic, torch.zeros(1, B, O), torch.full((1, B, 2), anchor), directions, 0.25)
    torch.testing.assert_close(values, torch.full((1, B), expected))


@pytest.mark.parametrize("layer_norm", [True, False])
def test_critic_is_torchs_own_layers(layer_norm):
    """For each seed and twin, with several actions for each observation."""
    K = 4
    critic = ams.Critic(S, O, A, layer_norm)
    for parameter in critic.parameters():  # LayerNorm starts at weight 1 and bias 0, which would hide a mistake in them
        nn.init.normal_(parameter, std=parameter.shape[-2] ** -0.5)
    observations = torch.randn(S, B, O)
    actions = torch.randn(S, B * K, A)
    values = critic(observations, actions)
    for s, twin in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x = torch.cat([observations[s].repeat_interleave(K, 0), actions[s]], -1)
        for linear, norm in ((critic.fc1, critic.norm1), (critic.fc2, critic.norm2)):
            x = F.linear(x, linear.weight[s, twin].mT, linear.bias[s, twin, 0])
            if layer_norm:
                x = F.layer_norm(x, (256,), norm.weight[s, twin, 0], norm.bias[s, twin, 0])
            x = F.relu(x)
        expected = F.linear(x, critic.fc_q.weight[s, twin].mT, critic.fc_q.bias[s, twin, 0])
        torch.testing.assert_close(values[s, twin], expected.squeeze(-1))


def value_around(critic: nn.Module, observations: torch.Tensor, anchor: torch.Tensor, frames: int) -> torch.Tensor:
    """The closed form, a neighbour at a time; frames: B, or 1 that the batch shares."""
    directions = ams.sample_directions((S, frames), A, 8, CPU)
    values = []
    for k in range(8):
        neighbor = (anchor + 0.2 * directions[:, :, k]).clamp(-1, 1)
        values.append(critic(observations, neighbor).amin(1))
    return torch.stack(values).mean(0)


@pytest.mark.parametrize("shared_frame, frames", [(False, B), (True, 1)])
def test_td3_next_values(shared_frame, frames):
    """Around the target actor's action, without noise."""
    agent = make_agent("td3_ams.py", shared_frame=shared_frame)
    observations = make_batch("td3_ams.py").next_observations
    torch.manual_seed(1)
    next_values = agent.next_values(observations)
    torch.manual_seed(1)
    expected = value_around(agent.target_critic, observations, agent.target_actor(observations), frames)
    torch.testing.assert_close(next_values, expected)


@pytest.mark.parametrize("shared_frame, frames", [(False, B), (True, 1)])
def test_sac_next_values(shared_frame, frames):
    """Around the deterministic action; the entropy is that of a sampled one."""
    agent = make_agent("sac_ams.py", shared_frame=shared_frame, autotune=False, alpha=0.3)
    observations = make_batch("sac_ams.py").next_observations
    torch.manual_seed(1)
    next_values = agent.next_values(observations)
    torch.manual_seed(1)
    _, log_prob, anchor = agent.actor.sample(observations)
    expected = value_around(agent.target_critic, observations, anchor, frames) - 0.3 * log_prob
    torch.testing.assert_close(next_values, expected)
