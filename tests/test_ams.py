"""AMS: the sampled directions and the neighbourhood value (papers: equations 6 and 9, theorems 3.2 and 3.3)."""

import pytest
import torch
from conftest import load_script

ams = load_script("td3_ams.py")
CPU = torch.device("cpu")
SHAPES = [(8, 38), (8, 8), (1, 3), (8, 6), (8, 3), (3, 1), (1, 1)]  # K neighbours, A action dimensions


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("K, A", SHAPES)
def test_directions_are_orthonormal_within_each_frame(K, A):
    directions = ams.sample_directions((2, 50), A, K, CPU)
    assert directions.shape == (2, 50, K, A)
    for frame in directions.split(A, 2):  # K > A: frames of at most A directions
        gram = frame @ frame.mT
        torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram), atol=2e-6, rtol=0)
    assert len(directions.flatten(0, 1).flatten(1).unique(dim=0)) > (1 if A == 1 else 99)  # a fresh frame for each row


@pytest.mark.parametrize("K, A", SHAPES)
def test_directions_are_haar(K, A):
    """Every direction is uniform on the sphere, so E v = 0, E v v^T = I / A, E v_i^4 = 3 / (A (A + 2)); no two correlate."""
    n = 40_000
    directions = ams.sample_directions((n,), A, K, CPU)
    tolerance = 5 * n**-0.5  # five standard errors of the mean of a number in [-1, 1]
    assert directions.mean(0).abs().max() < tolerance
    moments = torch.einsum("nki,nlj->kilj", directions, directions) / n
    torch.testing.assert_close(moments, torch.eye(K * A).view(K, A, K, A) / A, atol=tolerance, rtol=0)
    torch.testing.assert_close(directions.pow(4).mean(0), torch.full((K, A), 3 / (A * (A + 2))), atol=tolerance, rtol=0)


class QuadraticCritic:
    """Q(s, a) = 1 + g a + a H a / 2, the same for both twins."""

    def __init__(self, A: int):
        self.gradient = torch.randn(A)
        self.hessian = torch.randn(A, A)
        self.hessian = (self.hessian + self.hessian.mT) / 2

    def __call__(self, observations, actions):
        value = 1 + actions @ self.gradient + ((actions @ self.hessian) * actions).sum(-1) / 2
        return value.unsqueeze(1).expand(-1, 2, -1)


@pytest.mark.parametrize("K, A", SHAPES)
def test_neighborhood_value_of_a_quadratic(K, A):
    """Its mean is Q + radius^2 / (2 A) tr H (theorem 3.3, exact for a quadratic); its variance obeys theorem 3.2."""
    n, radius, gamma = 40_000, 0.3, 0.99
    critic, anchor = QuadraticCritic(A), torch.zeros(1, n, A)
    directions = ams.sample_directions((1, n), A, K, CPU)
    values = ams.neighborhood_value(critic, torch.zeros(1, n, 2), anchor, directions, radius)
    assert values.shape == (1, n)
    expected = 1 + radius**2 / (2 * A) * critic.hessian.trace()
    assert (values.mean() - expected).abs() < 5 * values.std() / n**0.5 + 1e-6
    lipschitz = critic.gradient.norm() + radius * torch.linalg.matrix_norm(critic.hessian, 2)  # on the ball
    assert gamma**2 * values.var() < gamma**2 * lipschitz**2 * radius**2 / K
    critic.hessian.zero_()  # linear: the directions do not correlate, so the variance is known, and 1 / A of the bound
    values = ams.neighborhood_value(critic, torch.zeros(1, n, 2), anchor, directions, radius)
    torch.testing.assert_close(values.var(), critic.gradient.square().sum() * radius**2 / (A * K), rtol=0.05, atol=0)


def test_a_whole_frame_measures_the_trace_exactly():
    critic = QuadraticCritic(6)
    critic.gradient.zero_()
    directions = ams.sample_directions((1, 100), 6, 6, CPU)
    values = ams.neighborhood_value(critic, torch.zeros(1, 100, 2), torch.zeros(1, 100, 6), directions, 0.3)
    torch.testing.assert_close(values, (1 + 0.3**2 / 12 * critic.hessian.trace()).expand(1, 100))


def test_the_minimum_over_twins_is_inside_the_mean():
    def critic(observations, actions):
        return torch.stack([actions[..., 0], -actions[..., 0]], 1)

    directions = torch.tensor([[1.0, 0], [-1, 0]]).expand(1, 5, 2, 2)
    values = ams.neighborhood_value(critic, torch.zeros(1, 5, 3), torch.zeros(1, 5, 2), directions, 0.25)
    torch.testing.assert_close(values, torch.full((1, 5), -0.25))  # the minimum of the means would be 0


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("K, A", [(8, 5), (8, 12), (1, 1)])
def test_any_callable_gives_what_the_cheaper_path_gives(K, A, layer_norm):
    S, B, observation_dim = 3, 7, 4
    critic = ams.Critic(S, observation_dim, A, ams.Args(hidden_sizes=(32, 16), layer_norm=layer_norm))
    for parameter in critic.parameters():  # LayerNorm starts at weight 1, bias 0, which would hide a mistake in them
        torch.nn.init.normal_(parameter)
    anchor = torch.rand(S, B, A) * 2 - 1  # some neighbours are clipped
    inputs = torch.randn(S, B, observation_dim), anchor, ams.sample_directions((S, B), A, K, CPU), 0.5
    cheaper = ams.neighborhood_value(critic, *inputs)
    general = ams.neighborhood_value(lambda observations, actions: critic(observations, actions), *inputs)
    torch.testing.assert_close(cheaper, general, rtol=1e-4, atol=1e-4)
    for s in range(S):  # and what plain layers give for one row, one neighbour, one twin at a time
        neighbors = (anchor[s, 0] + 0.5 * inputs[2][s, 0]).clamp(-1, 1)
        values = [min(plain_critic(critic, s, twin, inputs[0][s, 0], neighbor) for twin in (0, 1)) for neighbor in neighbors]
        torch.testing.assert_close(torch.stack(values).mean(), cheaper[s, 0], rtol=1e-4, atol=1e-4)


def plain_critic(critic, seed, twin, observation, action):
    """One member of the stack, written with torch's own layers: [O], [A] -> a number."""
    hidden = torch.cat([observation, action])
    for index, layer in enumerate(critic.layers):
        hidden = torch.nn.functional.linear(hidden, layer.weight[seed, twin].mT, layer.bias[seed, twin, 0])
        if index < len(critic.norms):
            if isinstance(norm := critic.norms[index], ams.LayerNorm):
                weight, bias = norm.weight[seed, twin, 0], norm.bias[seed, twin, 0]
                hidden = torch.nn.functional.layer_norm(hidden, hidden.shape, weight, bias)
            hidden = hidden.relu()
    return hidden.squeeze()


def test_neighbors_are_at_the_radius_and_clipped_to_the_box():
    seen = {}

    def critic(observations, actions):
        seen["observations"], seen["actions"] = observations, actions
        return actions.new_zeros(1, 2, actions.shape[1])

    observations = torch.randn(1, 3, 2)
    anchor = torch.stack([torch.zeros(4), torch.ones(4), -torch.ones(4)]).unsqueeze(0)
    ams.neighborhood_value(critic, observations, anchor, ams.sample_directions((1, 3), 4, 4, CPU), 0.2)
    inner, *corners = seen["actions"].view(3, 4, 4)
    torch.testing.assert_close(inner.norm(dim=-1), torch.full((4,), 0.2))
    for corner in corners:
        assert corner.abs().max() == 1 and corner.abs().min() < 1
    torch.testing.assert_close(seen["observations"], observations.repeat_interleave(4, 1))
