"""PAVE: the three losses against closed forms and against plain autograd, and the theory (lemma 1, proposition 2)."""

import itertools
import json
import math
import shutil

import pytest
import torch
from conftest import load_script, run_script
from torch import nn

S, B, OBS, A, DELTA = 3, 7, 5, 4, 1.0  # seeds, batch, observation and action dimensions, Curv's delta
SCRIPTS = ["td3_pave.py", "sac_pave.py"]


@pytest.fixture(params=SCRIPTS)
def pave(request):
    return load_script(request.param)


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw_batch(batch_size=B):
    """observations, actions, next_observations, noise, probes: what geometry_losses takes between the critic and delta."""
    observations, next_observations, noise = torch.randn(3, S, batch_size, OBS)
    actions, probes = torch.rand(S, batch_size, A) * 2 - 1, torch.randn(S, batch_size, A).sign()
    return observations, actions, next_observations, 0.3 * noise, probes


def silu_critic(pave):
    return pave.Critic(S, OBS, A, pave.Args(hidden_sizes=(16, 12), activation="silu"))


class QuadraticCritic(nn.Module):
    """Q_j(s, a) = a^T H_j a / 2 + a^T M_j s + b_j^T a for each seed and twin j."""

    def __init__(self):
        super().__init__()
        hessian = torch.randn(S, 2, A, A)
        self.hessian = nn.Parameter(hessian + hessian.mT)
        self.mixed = nn.Parameter(torch.randn(S, 2, A, OBS))
        self.slope = nn.Parameter(torch.randn(S, 2, A))

    def forward(self, observations, actions):
        if actions.dim() == 3:
            observations, actions = observations.unsqueeze(1), actions.unsqueeze(1)
        ascent = actions @ self.hessian / 2 + observations @ self.mixed.mT + self.slope.unsqueeze(2)
        return (actions * ascent).sum(-1)


def reference_losses(critic, observations, actions, next_observations, noise, probes, delta):
    """The definitions, one twin, one gradient and one row of the Hessian after the other, by torch.autograd.grad."""
    mpr, vfc, curv = 0, 0, 0
    for twin in range(2):

        def gradient(observations, leaf, twin=twin):
            return torch.autograd.grad(critic(observations, leaf)[:, twin].sum(), leaf, create_graph=True)[0]

        leaf = actions.clone().requires_grad_()
        here = gradient(observations, leaf)
        mpr += (gradient(observations + noise, leaf) - here).square().mean((1, 2))
        vfc += (gradient(next_observations, leaf) - here).square().mean((1, 2))
        rows = [torch.autograd.grad(here[..., i].sum(), leaf, create_graph=True)[0] for i in range(A)]
        curv += (torch.einsum("sbi,isbj,sbj->sb", probes, torch.stack(rows), probes) + delta).relu().mean(1)
    return mpr, vfc, curv


def test_closed_forms_of_a_quadratic_critic(pave):
    """MPR = |M noise|^2 / A, VFC = |M (s - s')|^2 / A, Curv = relu(v^T H v + delta), whatever s and a are."""
    critic, (observations, actions, next_observations, noise, probes) = QuadraticCritic(), draw_batch()
    mixed, hessian = critic.mixed, critic.hessian
    curvature = torch.einsum("sbi,stij,sbj->stb", probes, hessian, probes)
    assert ((curvature + DELTA > 0).any() and (curvature + DELTA < 0).any()).item()  # both sides of the relu
    expected = [
        (noise.unsqueeze(1) @ mixed.mT).square().sum(-1) / A,  # of each critic and row, [S, 2, B]
        ((observations - next_observations).unsqueeze(1) @ mixed.mT).square().sum(-1) / A,
        (curvature + DELTA).relu(),
    ]
    arguments = (observations, actions, next_observations, noise, probes, DELTA)
    losses = pave.geometry_losses(critic, *arguments)
    for loss, each in zip(losses, expected):
        assert loss.shape == (S,)
        torch.testing.assert_close(loss, each.mean(-1).sum(-1), atol=1e-12, rtol=1e-12)
    for seed, row in itertools.product(range(S), range(B)):  # a batch of one row is that row's own value
        one = [argument[:, row : row + 1] for argument in arguments[:-1]]
        for loss, each in zip(pave.geometry_losses(critic, *one, DELTA), expected):
            torch.testing.assert_close(loss[seed], each[seed, :, row].sum(), atol=1e-12, rtol=1e-12)
    geometry = pave.critic_geometry(critic, *arguments)
    torch.testing.assert_close(geometry.concave_share, (curvature < -DELTA).double().mean((1, 2)))
    torch.testing.assert_close(geometry.values, critic(observations, actions))


def test_each_critic_counts(pave):
    """Both twins' terms are added: what one flat twin leaves is the other's own, so the two add up to the whole."""
    critic, batch = QuadraticCritic(), draw_batch()
    whole, alone = pave.geometry_losses(critic, *batch, DELTA), []
    for flat in range(2):
        other = QuadraticCritic()
        other.load_state_dict(critic.state_dict())
        for parameter in other.parameters():
            parameter.data[:, flat] = 0
        alone.append(pave.geometry_losses(other, *batch, DELTA))
    for loss, first, second, of_flat in zip(whole, *alone, (0.0, 0.0, 2 * DELTA)):  # a flat critic's Curv is delta
        assert (first - second).abs().min() > 1e-6
        torch.testing.assert_close(loss, first + second - of_flat)


def test_mpr_expectation_is_the_mixed_hessian(pave):
    """Over noise ~ N(0, sigma^2 I), MPR estimates sigma^2 ||M||_F^2 / A."""
    sigma, n = 0.01, 200_000
    critic, (observations, actions, *_) = QuadraticCritic(), draw_batch(1)
    expand = [x.expand(-1, n, -1) for x in (observations, actions)]
    mpr, *_ = pave.geometry_losses(critic, *expand, None, sigma * torch.randn(S, n, OBS), None, DELTA)
    expected = sigma**2 * critic.mixed.square().sum((1, 2, 3)) / A
    # the variance of |M noise|^2 is 2 sigma^4 ||M M^T||_F^2: five standard errors
    error = sigma**2 / A * ((critic.mixed @ critic.mixed.mT).square().sum((1, 2, 3)) * 2 / n).sqrt()
    assert ((mpr - expected).abs() < 5 * error).all() and (error < expected / 50).all()


@pytest.mark.parametrize("own_field", [True, False])
def test_against_autograd_on_a_silu_critic(pave, own_field):
    """Values to 1e-10, and the gradient of each loss by each of the critic's parameters to 1e-8.

    Both by the critic's own action_field and by the one for any callable.
    """
    critic, batch = silu_critic(pave), draw_batch()
    parameters, callable_ = list(critic.parameters()), critic if own_field else critic.forward
    for delta in (-0.05, 0.0, DELTA):  # few rows, about half and all of them on the relu's slope
        for loss, expected in zip(pave.geometry_losses(callable_, *batch, delta), reference_losses(critic, *batch, delta)):
            torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
            for seed in range(S):  # one seed's loss moves that seed's parameters only
                ours = torch.autograd.grad(loss[seed], parameters, retain_graph=True, allow_unused=True)
                theirs = torch.autograd.grad(expected[seed], parameters, retain_graph=True, allow_unused=True)
                for gradient, reference in zip(ours, theirs):  # unused: the last bias is in no action gradient
                    gradient, reference = (torch.zeros(S, 1) if g is None else g for g in (gradient, reference))
                    torch.testing.assert_close(gradient, reference, atol=1e-8, rtol=1e-8)
                    assert not gradient[torch.arange(S) != seed].any()
    values = pave.critic_geometry(critic, *batch, DELTA).values
    torch.testing.assert_close(values, critic(*batch[:2]))


def test_gradients_reach_the_critic_and_nothing_else(pave):
    """Not even an actor whose actions are used: its gradient stays what its own loss gives, as in the parent."""
    critic, (observations, _, next_observations, noise, probes) = silu_critic(pave), draw_batch()
    actor = nn.Linear(OBS, A)
    leaves = [x.requires_grad_() for x in (observations, next_observations, noise, probes)]

    def actor_gradients():
        return torch.autograd.grad(-critic(observations, torch.tanh(actor(observations))).mean(), list(actor.parameters()))

    before = actor_gradients()
    actions = torch.tanh(actor(observations))
    losses = pave.geometry_losses(critic, observations, actions, next_observations, noise, probes, DELTA)
    sum(loss.sum() for loss in losses).backward()
    assert all(leaf.grad is None for leaf in [*leaves, *actor.parameters()])
    *others, last_bias = critic.parameters()
    assert all(parameter.grad.abs().sum() > 0 for parameter in others)
    assert last_bias.grad is None or not last_bias.grad.any()  # no action gradient depends on it
    for after, expected in zip(actor_gradients(), before):
        assert torch.equal(after, expected)


class CountingCritic:
    """How many rows the critic was asked for."""

    def __init__(self, critic):
        self.critic, self.rows = critic, []

    def __call__(self, observations, actions):
        self.rows.append(actions.shape[-2])
        return self.critic(observations, actions)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_a_term_without_its_input_is_zero_and_free(pave, wanted):
    """The paper's 2^3 ablation: the other terms keep their values, and no row is evaluated for what is off."""
    critic, (observations, actions, next_observations, noise, probes) = silu_critic(pave), draw_batch()
    expected = pave.geometry_losses(critic, observations, actions, next_observations, noise, probes, DELTA)
    mpr, vfc, curv = wanted
    counting = CountingCritic(critic)
    inputs = (next_observations if vfc else None, noise if mpr else None, probes if curv else None)
    geometry = pave.critic_geometry(counting, observations, actions, *inputs, DELTA)
    for on, loss, full in zip(wanted, geometry[:3], expected):
        torch.testing.assert_close(loss, full if on else torch.zeros(S))
    torch.testing.assert_close(geometry.values, critic(observations, actions))
    assert sum(counting.rows) == B * (1 + mpr + vfc)
    assert any(loss.requires_grad for loss in geometry[:3]) == any(wanted)


def test_greedy_action_of_a_concave_critic(pave):
    """Lemma 1 and proposition 2: the Jacobian of argmax_a Q is -H^-1 M, its norm at most M / mu, both read off the losses."""
    critic = QuadraticCritic()
    critic.hessian.data = -critic.hessian.data @ critic.hessian.data.mT - torch.eye(A)
    hessian, mixed = critic.hessian.detach(), critic.mixed.detach()

    def greedy(observations, twin):
        """argmax_a Q_twin [S, B, A] by gradient ascent, on the very gradients that the losses are made of."""
        actions = torch.zeros(*observations.shape[:-1], A)
        step = 1 / torch.linalg.eigvalsh(-hessian[:, twin]).amax(-1)[:, None, None]
        for _ in range(20_000):
            gradient = pave.action_field(critic, observations, actions, None).gradient[:, twin].detach()
            actions = actions + step * gradient
            if gradient.abs().max() < 1e-11:
                return actions
        raise AssertionError("gradient ascent did not converge")

    basis, state = torch.eye(OBS).expand(S, OBS, OBS), torch.randn(S, 1, OBS)
    jacobian = torch.stack(  # [S, 2, A, OBS], exact for a quadratic
        [(greedy(state + 0.5 * basis, twin) - greedy(state - 0.5 * basis, twin)).mT for twin in range(2)], 1
    )
    torch.testing.assert_close(jacobian, -torch.linalg.solve(hessian, mixed), atol=1e-8, rtol=1e-8)

    eigenvalues, eigenvectors = torch.linalg.eigh(hessian)
    for twin in range(2):
        flattest = eigenvectors[:, twin, :, -1].unsqueeze(1)  # the direction v of least curvature: v^T H v = -mu

        def this_twin(observations, actions, twin=twin):
            values = critic(observations, actions)
            return torch.stack([values[:, twin], torch.zeros_like(values[:, twin])], 1)

        zeros, large = torch.zeros(S, OBS, A), 1e3
        mpr, _, curv = pave.geometry_losses(this_twin, basis, zeros, None, basis, flattest.expand(-1, OBS, -1), large)
        mu = 2 * large - curv  # the flat twin's own term is delta
        torch.testing.assert_close(mu, -eigenvalues[:, twin, -1])
        frobenius = (mpr * A * OBS).sqrt()  # over the basis, the mean of |M e|^2 / A is ||M||_F^2 / (A OBS)
        torch.testing.assert_close(frobenius, torch.linalg.matrix_norm(mixed[:, twin]))
        lipschitz = torch.linalg.matrix_norm(jacobian[:, twin], 2)
        spectral = torch.linalg.matrix_norm(mixed[:, twin], 2)
        assert (lipschitz <= spectral / mu * (1 + 1e-9)).all() and (spectral <= frobenius).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(pave):
    """Losses and the critic's gradients, as one graph without a break."""
    critic, batch = silu_critic(pave), draw_batch()
    parameters = list(critic.parameters())

    def loss(*arguments):
        mpr, vfc, curv, _, values = pave.critic_geometry(critic, *arguments)
        return torch.stack([mpr.sum(), vfc.sum(), curv.sum(), values.square().sum()])

    compiled = torch.compile(loss, fullgraph=True)(*batch, DELTA)
    eager = loss(*batch, DELTA)
    torch.testing.assert_close(compiled, eager, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(losses @ torch.tensor([2.0, 0.5, 3.0, 1.0]), parameters) for losses in (compiled, eager)]
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-11)


def test_arguments(pave):
    weights = {"mpr_weight": "--mpr-weight", "vfc_weight": "--vfc-weight", "curvature_weight": "--curvature-weight"}
    flags = {**weights, "sigma": "--sigma", "delta": "--delta"}
    for name, flag in flags.items():
        assert getattr(pave.parse_args([flag, "0"]), name) == 0
        for value in ("-0.1", "nan", "inf"):
            with pytest.raises(pave.UserError, match=flag):
                pave.parse_args([flag, value])
    with pytest.raises(pave.UserError, match="relu"):
        pave.parse_args(["--activation", "relu"])
    off = [argument for flag in weights.values() for argument in (flag, "0")]
    assert pave.parse_args([*off, "--activation", "relu"]).activation == "relu"  # nothing left that needs a second derivative


PUBLISHED = {  # protocols: lambda_MPR, lambda_VFC, lambda_Curv
    "td3_pave.py": {
        "Ant-v5": (0.1, 0.005, 0.5), "Hopper-v5": (0.1, 0.005, 0.5), "LunarLander-v3": (0.1, 0.1, 0.01),
        "Reacher-v5": (0.1, 0.1, 0.01), "Pendulum-v1": (2.0, 0.005, 2.0), "Walker2d-v5": (0.1, 0.1, 0.01),
        "dog-run": (0.1, 0.1, 0.01),
    },
    "sac_pave.py": {
        "Ant-v5": (0.1, 0.0005, 1.0), "Hopper-v5": (2.0, 0.0005, 3.0), "LunarLander-v3": (0.1, 0.5, 0.05),
        "Reacher-v5": (0.1, 0.0005, 1.0), "Pendulum-v1": (0.1, 0.005, 0.5), "Walker2d-v5": (2.0, 0.005, 2.0),
        "dog-run": (0.1, 0.1, 0.01),
    },
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_weights(script):
    for env_id, weights in PUBLISHED[script].items():
        args = load_script(script).parse_args(["--env-id", env_id])
        assert (args.mpr_weight, args.vfc_weight, args.curvature_weight) == weights, env_id
        assert (args.sigma, args.delta) == (0.01, 1.0)
        assert load_script(script).parse_args(["--env-id", env_id, "--vfc-weight", "7"]).vfc_weight == 7


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_its_terms_pave_is_its_parent(script, tmp_path):
    """All weights 0: after some updates every network is the parent's, bit for bit; with one term on, the critic is not."""
    parent = "baselines/" + script.replace("_pave", "")
    common = ["--env-id", "Pendulum-v1", "--total-timesteps", 100, "--learning-starts", 50, "--batch-size", 16]
    common += ["--hidden-sizes", 16, 16, "--eval-episodes", 1, "--device", "cpu", "--compile", "off"]
    off = ["--mpr-weight", 0, "--vfc-weight", 0, "--curvature-weight", 0]

    def train(script, name, *flags):
        (tmp_path / name).mkdir()
        result = run_script(script, *flags, cwd=tmp_path / name)
        assert result.returncode == 0, result.stderr
        (folder,) = (tmp_path / name / "runs").iterdir()
        modules = torch.load(folder / "checkpoint.pt", weights_only=True)["modules"]
        networks = {name: state for name, state in modules.items() if not name.endswith("_optimizer")}
        assert all(math.isfinite(x.sum()) for state in networks.values() for x in state.values())
        return json.loads((folder / "args.json").read_text()), networks

    args, without = train(script, "off", *common, *off)
    flags = []  # the same protocol for the parent
    for field in load_script(parent).Args.__dataclass_fields__.keys() - {"exp_name", "resume"}:
        value, flag = args[field], "--" + field.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-"))
        elif value is not None:
            flags += [flag, *(value if isinstance(value, list) else [value])]
    _, expected = train(parent, "parent", *flags)
    _, with_curvature = train(script, "on", *common, *off[:-1], 1)
    for name, state in expected.items():
        for key, value in state.items():
            assert torch.equal(without[name][key], value), f"{name}.{key}"
    assert not torch.equal(with_curvature["critic"]["layers.0.weight"], expected["critic"]["layers.0.weight"])
