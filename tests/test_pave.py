"""PAVE: README.md's version against a closed form, the scripts' chain rule against that version and torch.func."""

import pytest
import torch
from conftest import README_CODE, A, B, O, S, check_loss, load_script, make_agent, make_batch
from torch import nn
from torch.func import grad, hessian, vmap

pytestmark = pytest.mark.usefixtures("float64")


def readme_pave_terms():
    namespace = {}
    exec(next(code for code in README_CODE if "def pave_terms" in code), namespace)
    return namespace["pave_terms"]


def draw_rows(*shape: int) -> list[torch.Tensor]:
    """observations, actions, next_observations, noise, probes."""
    observations, next_observations, noise = torch.randn(3, *shape, O)
    actions, probes = torch.randn(2, *shape, A)
    return [observations, actions.tanh(), next_observations, noise, probes.sign()]


@pytest.fixture(params=["td3_pave.py", "sac_pave.py"])
def critic(request) -> nn.Module:
    """The script's, with weights so large that its curvature counts; critic.pave_losses is the script's function."""
    script = load_script(request.param)
    critic = script.Critic(S, O, A)
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=2 * parameter.shape[-2] ** -0.5)
    critic.pave_losses = script.pave_losses
    return critic


def test_readmes_version_on_a_quadratic():
    """Q = a^T H a / 2 + a^T M s: MPR = |M eps|^2 / A, VFC = |M (s' - s)|^2 / A, Curv = relu(v^T H v + delta)."""
    M = torch.randn(A, O)
    H = torch.tensor([[1.0, 2], [2, -1]])

    def qf(s, a):
        return ((a @ H) * a).sum(1, keepdim=True) / 2 + (a * (s @ M.mT)).sum(1, keepdim=True)

    s, a, s_next, noise, v = draw_rows(50)
    mpr = (noise @ M.mT).square().mean()
    vfc = ((s_next - s) @ M.mT).square().mean()
    curvature = ((v @ H) * v).sum(1) + 0.3
    terms = readme_pave_terms()(qf, s, a, s_next, noise, v, 0.3)
    torch.testing.assert_close(terms, (mpr, vfc, curvature.relu().mean()))


def member(critic: nn.Module, s: int, twin: int):
    """One of the stack, as the critic of README.md."""

    def qf(observations, actions):
        values = critic(observations.expand(S, -1, -1), actions.expand(S, -1, -1))
        return values[s, twin].unsqueeze(1)

    return qf


@pytest.mark.parametrize("s, twin", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_action_field_is_torch_funcs(critic, s, twin):
    observations, actions, _, _, probes = draw_rows(S, B)
    values, gradients, curvature = critic.action_field(observations, actions, probes)
    torch.testing.assert_close(values, critic(observations, actions))
    torch.testing.assert_close(critic.action_field(observations, actions)[1], gradients)

    def q(observation, action):
        return member(critic, s, twin)(observation.unsqueeze(0), action.unsqueeze(0)).squeeze()

    torch.testing.assert_close(gradients[s, twin], vmap(grad(q, 1))(observations[s], actions[s]))
    H = vmap(hessian(q, 1))(observations[s], actions[s])
    torch.testing.assert_close(curvature[s, twin], torch.einsum("bi,bij,bj->b", probes[s], H, probes[s]))


@pytest.mark.parametrize("delta", [-0.05, 1.0])
def test_losses_and_their_gradients_are_readmes(critic, delta):
    """For each seed, of both twins added."""
    rows = draw_rows(S, B)
    pave_terms = readme_pave_terms()
    values, *losses = critic.pave_losses(critic, *rows, delta)
    torch.testing.assert_close(values, critic(*rows[:2]))
    expected = []
    for s in range(S):
        of_seed = [column[s] for column in rows]
        twins = [torch.stack(pave_terms(member(critic, s, twin), *of_seed, delta)) for twin in range(2)]
        expected.append(twins[0] + twins[1])
    for loss, known in zip(losses, torch.stack(expected, 1)):
        check_loss(loss, known, critic)


@pytest.mark.parametrize("path", ["td3_pave.py", "sac_pave.py"])
@pytest.mark.parametrize("rows", [B, 4])
def test_critic_loss(path, rows):
    """The base's loss, which test_td3.py and test_sac.py check, plus the weighted losses of the first rows."""
    weights = {"mpr_weight": 2.0, "vfc_weight": 3.0, "curvature_weight": 5.0}
    agent = make_agent(path, geometry_rows=rows % B, sigma=0.3, delta=0.5, **weights)
    batch = make_batch(path)
    torch.manual_seed(1)
    loss, _ = agent.critic_loss(batch)
    agent.args.mpr_weight = agent.args.vfc_weight = agent.args.curvature_weight = 0.0
    torch.manual_seed(1)
    base, _ = agent.critic_loss(batch)
    observations, actions, next_observations = [column[:, :rows] for column in batch[:3]]
    noise = 0.3 * torch.randn_like(observations)
    probes = 2 * torch.randint_like(actions, 2) - 1
    inputs = (agent.critic, observations, actions, next_observations, noise, probes, 0.5)
    _, mpr, vfc, curv = load_script(path).pave_losses(*inputs)
    check_loss(loss, base + 2 * mpr + 3 * vfc + 5 * curv, agent.critic)
