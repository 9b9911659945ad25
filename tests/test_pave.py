"""PAVE: a version by torch.func against closed forms, the scripts' chain rule against that, and compiled against eager."""

import shutil

import pytest
import torch
from conftest import load_script, train
from reference_pave import pave_losses as reference_losses
from torch import nn
from torch._inductor import config
from torch.func import grad, hessian, vmap

S, B, O, A = 2, 7, 5, 3  # seeds, batch, observation and action dimensions


def draw_rows(*shape: int) -> list[torch.Tensor]:
    """observations, actions, next_observations, noise, probes in float64."""
    (s, s2, noise), (a, v) = torch.randn(3, *shape, O).double(), torch.randn(2, *shape, A).double()
    return [s, a.tanh(), s2, noise, v.sign()]


@pytest.fixture(params=["td3_pave.py", "sac_pave.py"])
def critic(request) -> nn.Module:
    """The script's, with weights so large that its curvature counts; critic.pave_losses is the script's function."""
    script = load_script(request.param)
    critic = script.Critic(S, O, A).double()
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=2 * parameter.shape[-2] ** -0.5)
    critic.pave_losses = script.pave_losses
    return critic


def member(critic: nn.Module, seed: int, twin: int):
    """One of the stack, as a function of an observation [O] and an action [A]."""
    return lambda s, a: critic(s.expand(S, 1, O), a.expand(S, 1, A))[seed, twin, 0]


def test_reference_on_a_quadratic():
    """Q = a^T H a / 2 + a^T M s: MPR = |M eps|^2 / A, VFC = |M (s' - s)|^2 / A, Curv = relu(v^T H v + delta)."""
    H, M, (s, a, s2, eps, v) = torch.randn(A, A).double(), torch.randn(A, O).double(), draw_rows(B)
    losses = reference_losses(lambda s, a: a @ (H + H.mT) @ a / 2 + a @ M @ s, s, a, s2, eps, v, 0.3)
    curvature = 2 * ((v @ H) * v).sum(-1) + 0.3
    assert (curvature > 0).any() and (curvature < 0).any()
    expected = [(eps @ M.mT).square().mean(), ((s2 - s) @ M.mT).square().mean(), curvature.relu().mean()]
    torch.testing.assert_close(losses, expected)


def test_action_field_is_torch_funcs(critic):
    s, a, *_, v = draw_rows(S, B)
    values, g, curvature = critic.action_field(s, a, v)
    torch.testing.assert_close([critic(s, a), critic.action_field(s, a)[1]], [values, g])
    for seed, twin in ((0, 0), (0, 1), (1, 0), (1, 1)):
        q = member(critic, seed, twin)
        torch.testing.assert_close(g[seed, twin], vmap(grad(q, 1))(s[seed], a[seed]))
        H = vmap(hessian(q, 1))(s[seed], a[seed])
        torch.testing.assert_close(curvature[seed, twin], torch.einsum("bi,bij,bj->b", v[seed], H, v[seed]))


@pytest.mark.parametrize("delta", [-0.05, 1.0])
def test_losses_and_their_gradients_are_the_references(critic, delta):
    """Of both twins added, for each seed, and by every parameter of the critic."""
    rows, parameters = draw_rows(S, B), list(critic.parameters())
    values, *losses = critic.pave_losses(critic, *rows, delta)
    torch.testing.assert_close(values, critic(*rows[:2]))
    for seed in range(S):
        of_seed = [x[seed] for x in rows]
        for loss, *twins in zip(losses, *(reference_losses(member(critic, seed, twin), *of_seed, delta) for twin in range(2))):
            torch.testing.assert_close(loss[seed], sum(twins))
            kwargs = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
            ours, theirs = (torch.autograd.grad(each, parameters, **kwargs) for each in (loss[seed], sum(twins)))
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("error:.*Dynamo")  # what it cannot trace
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_updates_are_the_eager_ones():
    """Several of train()'s updates, with all terms; in half a minute to two."""
    flags = dict(num_seeds=S, batch_size=16, learning_starts=4, total_timesteps=12, caps_temporal_weight=0.1)
    with config.patch(fallback_random=True):  # eager's random numbers
        eager, compiled = (train("td3_pave.py", **flags, compile=compile) for compile in (False, True))
    for name in ("actor", "critic", "target_actor", "target_critic"):
        parameters = [torch.cat([p.flatten() for p in run[name].parameters()]) for run in (compiled, eager)]
        torch.testing.assert_close(*parameters, atol=2e-5, rtol=1e-4)
        assert not torch.equal(*parameters)  # its rounding is its own, so it did compile
