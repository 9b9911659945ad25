"""The baselines: each loss against its formula in numpy, weight 0 against the parent, the parts that only one of them has."""

import itertools
import signal
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_script

S, B, OBS, A = 3, 5, 4, 2  # seeds, batch, observation and action dimensions
ALGORITHMS = ["td3", "sac"]
ZERO = {  # the flags that switch a method off
    "caps": {"caps_temporal_weight": 0.0, "caps_spatial_weight": 0.0},
    "grad": {"grad_weight": 0.0},
    "asap": {"predictor_weight": 0.0, "spatial_weight": 0.0, "temporal_weight": 0.0},
    "gp": {"penalty_weight": 0.0},
}


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    return request.param


def baseline(algorithm: str, method: str):
    return load_script(f"baselines/{algorithm}_{method}.py")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def signals_restored():
    """A run takes over Ctrl-C and SIGTERM; pytest wants them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def check(loss: torch.Tensor, expected) -> None:
    assert loss.shape == (S,)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)


def test_caps_loss(algorithm):
    action, next_action, perturbed_action = draw(3, S, B, A)
    a, after, near = action.numpy(), next_action.numpy(), perturbed_action.numpy()
    expected = 0.3 * 0.5 * ((a - after) ** 2).mean((1, 2)) + 0.7 * 0.5 * ((a - near) ** 2).mean((1, 2))
    check(baseline(algorithm, "caps").caps_loss(action, next_action, perturbed_action, 0.3, 0.7), expected)


def grad_by_hand(before, a, after) -> tuple[np.ndarray, np.ndarray]:
    """GRAD's loss [S] and its derivative by a(s) [S, B, A], the weight being a constant."""
    weight = np.tanh((1 / (after - before + 1e-4)) ** 2)
    second = 2 * a - after - before
    return (0.5 * second**2 * weight).mean((1, 2)), 2 * second * weight / (B * A)


def test_grad_loss_and_its_gradient(algorithm):
    """The weight carries no gradient: by a(s') and a(s_prev) the derivative is minus half of that by a(s)."""
    previous_action, action, next_action = actions = [draw(S, B, A).requires_grad_() for _ in range(3)]
    loss = baseline(algorithm, "grad").grad_loss(*actions)
    expected, slope = grad_by_hand(*(a.detach().numpy() for a in actions))
    check(loss, expected)
    loss.sum().backward()
    for leaf, factor in ((action, 1), (next_action, -0.5), (previous_action, -0.5)):
        np.testing.assert_allclose(leaf.grad.numpy(), factor * slope, rtol=1e-10, atol=1e-15)


def test_grad_loss_where_the_actions_return(algorithm):
    """a(s') = a(s_prev), and the one difference at which the weight divides by 0: both finite, with weight 1."""
    grad_loss = baseline(algorithm, "grad").grad_loss
    action, other = torch.zeros(1, 1, 1, requires_grad=True), torch.ones(1, 1, 1)
    for next_action in (other, other * 0, torch.tensor([[[-1e-4]]])):
        previous_action = next_action if next_action.abs() != 1e-4 else torch.zeros(1, 1, 1)
        (loss,) = grad_loss(previous_action, action, next_action)
        assert loss.item() == pytest.approx(0.5 * (next_action + previous_action).item() ** 2)
        assert torch.isfinite(torch.autograd.grad(loss, action)[0]).all()


def test_asap_loss_and_where_its_gradients_go(algorithm):
    actions = [draw(S, B, A).requires_grad_() for _ in range(5)]
    before, a, after, predicted, slow = (x.detach().numpy() for x in actions)
    loss = baseline(algorithm, "asap").asap_loss(*actions, 2.0, 0.3, 0.05)
    temporal, slope = grad_by_hand(before, a, after)
    expected = 0.5 * (2.0 * ((predicted - after) ** 2).mean((1, 2)) + 0.3 * ((after - slow) ** 2).mean((1, 2)))
    check(loss, expected + 0.05 * temporal)
    gradients = torch.autograd.grad(loss.sum(), actions, allow_unused=True)
    assert gradients[4] is None  # the slow copy
    by_next = 0.3 * (after - slow) / (B * A) - 0.05 * 0.5 * slope  # nothing from the predictor's term
    for gradient, known in zip(gradients, (-0.025 * slope, 0.05 * slope, by_next, 2.0 * (predicted - after) / (B * A))):
        np.testing.assert_allclose(gradient.numpy(), known, rtol=1e-10, atol=1e-15)


def test_gradient_penalty(algorithm):
    """Q_j = a^T H_j a / 2 + a^T M_j s: g = H_j a + M_j s; the loss, and its derivative by M."""
    hessian, mixed = draw(S, 2, A, A), draw(S, 2, A, OBS).requires_grad_()
    hessian = hessian + hessian.mT
    observations, actions = draw(S, B, OBS), draw(S, B, A)

    def critic(observations, actions):
        return ((actions @ hessian / 2 + observations @ mixed.mT) * actions).sum(-1)

    loss = baseline(algorithm, "gp").gradient_penalty(critic, observations, actions)
    expected, slope = np.zeros(S), np.zeros(mixed.shape)
    H, M, o, a = hessian.numpy(), mixed.detach().numpy(), observations.numpy(), actions.numpy()
    for s, j, b in itertools.product(range(S), range(2), range(B)):
        g = H[s, j] @ a[s, b] + M[s, j] @ o[s, b]
        expected[s] += (g**2).sum() / (B * A)
        slope[s, j] += 2 * np.outer(g, o[s, b]) / (B * A)
    check(loss, expected)
    np.testing.assert_allclose(torch.autograd.grad(loss.sum(), mixed)[0].numpy(), slope, rtol=1e-10)


PROTOCOL = [  # algorithm, method, environment, what reference/protocols.md says
    ("td3", "caps", "Pendulum-v1", {"caps_temporal_weight": 1.0, "caps_spatial_weight": 5.0, "gamma": 0.98}),
    ("sac", "caps", "Pendulum-v1", {"caps_temporal_weight": 1.0, "caps_spatial_weight": 5.0, "gamma": 0.99}),
    ("td3", "caps", "Walker2d-v5", {"caps_temporal_weight": 0.1, "caps_spatial_weight": 0.5, "caps_sigma": 0.2}),
    ("td3", "grad", "LunarLander-v3", {"grad_weight": 1.0, "gamma": 0.98, "total_timesteps": 500_000, "buffer_size": 200_000}),
    ("sac", "grad", "LunarLander-v3", {"grad_weight": 1.0, "gamma": 0.99, "total_timesteps": 500_000}),
    ("td3", "asap", "Ant-v5", {"predictor_weight": 2.0, "spatial_weight": 0.3, "temporal_weight": 0.05}),
    ("td3", "asap", "Hopper-v5", {"spatial_weight": 0.3, "temporal_weight": 0.07, "total_timesteps": 1_000_000}),
    ("td3", "asap", "LunarLander-v3", {"spatial_weight": 0.03, "temporal_weight": 0.005}),
    ("td3", "asap", "Reacher-v5", {"spatial_weight": 0.1, "temporal_weight": 0.1, "total_timesteps": 500_000}),
    ("td3", "asap", "Pendulum-v1", {"spatial_weight": 0.03, "temporal_weight": 0.005, "total_timesteps": 100_000}),
    ("td3", "asap", "Walker2d-v5", {"spatial_weight": 0.3, "temporal_weight": 0.05, "predictor_tau": 0.01}),
    ("sac", "asap", "Ant-v5", {"predictor_weight": 2.0, "spatial_weight": 30.0, "temporal_weight": 0.5}),
    ("sac", "asap", "Hopper-v5", {"spatial_weight": 10.0, "temporal_weight": 0.5}),
    ("sac", "asap", "LunarLander-v3", {"spatial_weight": 10.0, "temporal_weight": 0.5}),
    ("sac", "asap", "Reacher-v5", {"spatial_weight": 5.0, "temporal_weight": 0.5}),
    ("sac", "asap", "Pendulum-v1", {"spatial_weight": 5.0, "temporal_weight": 0.5}),
    ("sac", "asap", "Walker2d-v5", {"spatial_weight": 5.0, "temporal_weight": 0.5}),
    ("td3", "sn", "Walker2d-v5", {"hidden_sizes": (400, 300), "activation": "silu", "learning_rate": 1e-3, "batch_size": 256}),
    ("td3", "gp", "Walker2d-v5", {"penalty_weight": 0.1, "learning_starts": 10_000, "policy_frequency": 2, "num_envs": 1}),
    ("sac", "sn", "Ant-v5", {"policy_lr": 1e-3, "q_lr": 1e-3, "hidden_sizes": (256, 256), "activation": "silu"}),
    ("sac", "sn", "Ant-v5", {"batch_size": 100, "buffer_size": 1_000_000, "total_timesteps": 1_000_000, "gamma": 0.99}),
    ("sac", "sn", "Ant-v5", {"update_every": 50, "policy_frequency": 1, "autotune": False, "alpha": 0.2, "td_loss_scale": 0.5}),
    ("sac", "gp", "Ant-v5", {"penalty_weight": 0.1, "log_std_min": -20.0, "log_std_bound": "clamp", "learning_starts": 10_000}),
]


@pytest.mark.parametrize("algorithm, method, env_id, expected", PROTOCOL)
def test_defaults_are_the_protocol(algorithm, method, env_id, expected):
    args = baseline(algorithm, method).parse_args(["--env-id", env_id])
    assert {name: getattr(args, name) for name in expected} == expected


FAST = {  # 50 updates in a second
    "env_id": "Pendulum-v1",
    "num_seeds": 2,
    "total_timesteps": 100,
    "learning_starts": 50,
    "update_every": 1,
    "batch_size": 16,
    "hidden_sizes": (16, 16),
    "eval_episodes": 1,
    "device": "cpu",
    "vector_env": "sync",
}


def make_args(script, **changes):
    known = {field.name for field in fields(script.Args)}
    return script.Args(**{name: value for name, value in {**FAST, **changes}.items() if name in known})


def train(script, folder: Path, args) -> Path:
    """A run in folder, in this process; returns its own folder."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script.train(args)
    return max((folder / "runs").iterdir(), key=lambda run: run.stat().st_mtime_ns)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def trained(script, folder: Path, args) -> dict[str, torch.Tensor]:
    """Every tensor of the networks and optimisers after the run, by name.

    From the making of the replay on, the random numbers are the same for every script: ASAP's second head has drawn some more.
    """
    make_replay = script.ReplayBuffer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "ReplayBuffer", lambda *arguments: torch.manual_seed(0) and make_replay(*arguments))
        modules = load(train(script, folder, args) / "checkpoint.pt")["modules"]
    tensors = {}
    for name, state in modules.items():
        for key, value in state.get("state", state).items():  # an optimiser has a dict for each parameter
            parts = value if isinstance(value, dict) else {"value": value}
            tensors |= {f"{name}.{key}.{part}": tensor for part, tensor in parts.items()}
    return tensors


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """TD3's and SAC's tensors after 50 updates under the children's protocol."""
    runs = {}
    for algorithm in ALGORITHMS:
        script, child = load_script(f"baselines/{algorithm}.py"), make_args(baseline(algorithm, "sn"))
        shared = {field.name: getattr(child, field.name) for field in fields(script.Args)}
        runs[algorithm] = trained(script, tmp_path_factory.mktemp(algorithm), script.Args(**shared))
    return runs


@pytest.mark.parametrize("method", ZERO)
def test_weight_0_is_the_parent_bit_for_bit(algorithm, method, parents, tmp_path):
    """Over 50 updates: every network, target and moment of Adam. With the default weights the actor's or critic's differ."""
    script, parent = baseline(algorithm, method), parents[algorithm]
    assert parent["critic_optimizer.0.step"] == 50
    without = trained(script, tmp_path, make_args(script, **ZERO[method]))
    for name, tensor in parent.items():
        assert torch.equal(tensor, without[name]), name
    with_it = trained(script, tmp_path, make_args(script))
    regularised = "critic" if method == "gp" else "actor"
    changed = [not torch.equal(tensor, with_it[name]) for name, tensor in parent.items() if name.startswith(f"{regularised}.")]
    assert changed and all(changed)


def test_pave_with_caps_alone_is_caps(tmp_path):
    """td3_pave.py has CAPS for the paper's table e: with PAVE's weights 0 it is baselines/td3_caps.py, bit for bit."""
    caps, pave = load_script("baselines/td3_caps.py"), load_script("td3_pave.py")
    weights = {"caps_temporal_weight": 0.1, "caps_spatial_weight": 0.5}
    off = {"mpr_weight": 0.0, "vfc_weight": 0.0, "curvature_weight": 0.0}
    runs = [trained(script, tmp_path, make_args(script, **weights, **off)) for script in (caps, pave)]
    assert runs[0].keys() == runs[1].keys()
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


def test_spectral_norms_are_1(algorithm):
    """Every layer of every twin and seed, after convergence, whatever the weights were multiplied by."""
    script = baseline(algorithm, "sn")
    critic = script.Critic(S, OBS, A, script.Args(hidden_sizes=(40, 30)))
    with torch.no_grad():
        for layer, factor in zip(critic.layers, (0.1, 1.0, 10.0)):
            layer.weight *= factor * torch.linspace(0.5, 2, 2 * S).view(S, 2, 1, 1)
    for _ in range(300):
        critic.power_iteration()
    for layer in critic.layers:
        norms = torch.linalg.matrix_norm(layer.normalized_weight(), 2)
        torch.testing.assert_close(norms, torch.ones(S, 2), atol=1e-3, rtol=0)
    observations, actions = torch.randn(S, B, OBS), torch.randn(S, B, A)
    values = critic(observations, actions)
    for seed, twin in itertools.product(range(S), range(2)):  # the same network with the normalised weights, one by one
        hidden = torch.cat([observations[seed], actions[seed]], -1)
        for layer in critic.layers:
            weight = layer.weight[seed, twin] / torch.linalg.matrix_norm(layer.weight[seed, twin], 2)
            hidden = hidden @ weight + layer.bias[seed, twin]
            hidden = hidden if layer is critic.layers[-1] else torch.nn.functional.silu(hidden)
        torch.testing.assert_close(values[seed, twin], hidden[:, 0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(critic(observations, actions, slice(1)), values[:, :1])


def test_gradient_through_the_spectral_norm(algorithm):
    """u is a constant, yet the gradient is that of weight / (largest singular value)."""
    script = baseline(algorithm, "sn")
    layer = script.SpectralLinear((S, 2), 4, 3).double()
    for _ in range(3000):
        layer.power_iteration()
    probe = draw(S, 2, 4, 3)
    exact = layer.weight / torch.linalg.svdvals(layer.weight)[..., :1].unsqueeze(-1)
    ours, known = (
        torch.autograd.grad((weight * probe).sum(), layer.weight)[0] for weight in (layer.normalized_weight(), exact)
    )
    torch.testing.assert_close(ours, known, atol=1e-6, rtol=1e-6)


def test_spectral_norms_follow_the_training(algorithm, tmp_path):
    """u moves with the weights, in the critic and in its target: nearer to the norm than where it began."""
    script = baseline(algorithm, "sn")
    run = train(script, tmp_path, make_args(script))
    start, end = load(run / "policies/step_000000000.pt")["critic"], load(run / "checkpoint.pt")["modules"]
    for name in ("critic", "target_critic"):
        for index in range(2):  # the last layer's u is the number 1
            weight, u = end[name][f"layers.{index}.weight"], end[name][f"layers.{index}.u"]
            norm = torch.linalg.matrix_norm(weight, 2)
            now, at_first = ((weight @ u).norm(dim=(-2, -1)) / norm for u in (u, start[f"layers.{index}.u"]))
            assert (now > at_first).all() and (now > 0.8).all() and (now < 1 + 1e-5).all()
    assert not torch.equal(end["critic"]["layers.0.u"], end["target_critic"]["layers.0.u"])


def test_asap_predictor_learns_by_its_own_term_only(algorithm, tmp_path):
    """Without its term the second head stays as it was, bit for bit, while the rest of the actor learns."""
    script = baseline(algorithm, "asap")
    for weight in (0.0, 2.0):
        run = train(script, tmp_path, make_args(script, predictor_weight=weight, spatial_weight=5.0, temporal_weight=1.0))
        start, end = load(run / "policies/step_000000000.pt")["actor"], load(run / "checkpoint.pt")["modules"]["actor"]
        moved = {key for key in start if not torch.equal(start[key], end[key])}
        assert {"layers.0.weight", "layers.2.weight"} <= moved
        assert {key for key in moved if "predictor" in key} == ({"predictor.weight", "predictor.bias"} if weight else set())


def test_asap_slow_actor_moves_at_001(algorithm, tmp_path):
    """After one update the whole slow copy has gone 1 % of the actor's way."""
    script = baseline(algorithm, "asap")
    run = train(script, tmp_path, make_args(script, total_timesteps=51))
    start, end = load(run / "policies/step_000000000.pt")["actor"], load(run / "checkpoint.pt")["modules"]
    for key, initial in start.items():
        assert not torch.equal(end["actor"][key], initial), key
        torch.testing.assert_close(end["slow_actor"][key], initial + 0.01 * (end["actor"][key] - initial))
        assert not torch.equal(end["slow_actor"][key], initial), key


class Brief(gym.Wrapper):
    """Pendulum in episodes of 5 steps that terminate and of 7 that are truncated, by turns."""

    episodes, steps = 0, 0

    def reset(self, **kwargs):
        self.episodes, self.steps = self.episodes + 1, 0
        return self.env.reset(**kwargs)

    def step(self, action):
        observation, reward, *_, info = self.env.step(action)
        self.steps += 1
        terminates = self.episodes % 2 == 1
        return observation, reward, terminates and self.steps == 5, not terminates and self.steps == 7, info


TERMINATED, TRUNCATED = [4, 16, 28], [11, 23, 35]  # the steps at which 36 steps of Brief end an episode


@pytest.fixture
def brief():
    gym.register("Brief-v0", lambda **kwargs: Brief(gym.make("Pendulum-v1", **kwargs)))
    yield "Brief-v0"
    del gym.registry["Brief-v0"]


@pytest.mark.parametrize("method", ["grad", "asap"])
def test_previous_observation_is_of_the_same_episode(algorithm, method, brief, tmp_path):
    """At an episode's first step it is the observation itself, else the one before."""
    script, T, N = baseline(algorithm, method), 36, 2
    args = make_args(script, env_id=brief, num_envs=N, total_timesteps=T, learning_starts=100)
    rows = load(train(script, tmp_path, args) / "replay.pt")["rows"].unflatten(1, (T, N))  # [S, T, N, W]
    observations, _, following, previous, _, terminations = rows.split([3, 1, 3, 3, 1, 1], -1)
    first = [0] + [end + 1 for end in TERMINATED + TRUNCATED if end + 1 < T]
    for t in range(T):
        assert (terminations[:, t] == (t in TERMINATED)).all()
        assert torch.equal(previous[:, t], observations[:, t if t in first else t - 1]), t
        if t > 0:
            assert torch.equal(observations[:, t], following[:, t - 1]) == (t not in first), t


@pytest.fixture
def ppo():
    return load_script("baselines/ppo.py")


def test_gae_is_the_direct_sum(ppo):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} to the end of the episode or of the rollout; only a termination drops V(s')."""
    T, N, gamma, gae_lambda = 12, 4, 0.97, 0.9
    rewards, values, next_values = draw(3, S, T, N)
    terminations = (torch.rand(S, T, N) < 0.2).double()
    truncations = (torch.rand(S, T, N) < 0.2).double() * (1 - terminations)
    ends = terminations + truncations
    assert all((kind[:, :-1].sum() > 3) & (kind[:, -1].sum() > 0) for kind in (terminations, truncations))
    advantages = ppo.gae(rewards, values, next_values, terminations, ends, gamma, gae_lambda)
    for s, t, n in itertools.product(range(S), range(T), range(N)):
        total = 0.0
        for later in range(t, T):
            bootstrap = 0.0 if terminations[s, later, n] else gamma * next_values[s, later, n].item()
            delta = rewards[s, later, n].item() + bootstrap - values[s, later, n].item()
            total += (gamma * gae_lambda) ** (later - t) * delta
            if ends[s, later, n]:
                break
        assert advantages[s, t, n].item() == pytest.approx(total, rel=1e-12)


def test_ppo_gives_gae_the_episodes_ends(ppo, brief, tmp_path, monkeypatch):
    """From a real rollout: where episodes terminate, where they only end, and V of the last observation, not of the next."""
    calls, compute = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *arguments: calls.append(arguments) or compute(*arguments))
    args = make_args(ppo, env_id=brief, num_envs=4, num_steps=36, total_timesteps=36, num_minibatches=4)
    train(ppo, tmp_path, args)
    ((_, values, next_values, terminations, ends, *_),) = calls
    assert ends.shape == (2, 36, 4)
    for t in range(36):
        assert (terminations[:, t] == (t in TERMINATED)).all() and (ends[:, t] == (t in TERMINATED + TRUNCATED)).all(), t
    change = (next_values[:, :-1] - values[:, 1:]).abs().mean((0, 2))  # the statistics of the observations moved a little
    at_ends = [t for t in TERMINATED + TRUNCATED if t < 35]
    assert change[at_ends].min() > 3 * change[[t for t in range(10, 35) if t not in at_ends]].max()


def test_ppo_losses(ppo):
    log_ratio, advantages, values, old_values, returns = draw(5, S, B)
    expected_policy, expected_value = np.zeros(S), np.zeros(S)
    for s, b in itertools.product(range(S), range(B)):
        ratio, a = np.exp(log_ratio[s, b].item()), advantages[s, b].item()
        expected_policy[s] -= min(a * ratio, a * min(max(ratio, 0.8), 1.2)) / B
        v, old, target = (x[s, b].item() for x in (values, old_values, returns))
        clipped = old + min(max(v - old, -0.2), 0.2)
        expected_value[s] += 0.5 * max((v - target) ** 2, (clipped - target) ** 2) / B
    check(ppo.policy_loss(log_ratio, advantages, 0.2), expected_policy)
    check(ppo.value_loss(values, old_values, returns, 0.2), expected_value)
    check(ppo.value_loss(values, old_values, returns, np.inf), 0.5 * ((values - returns) ** 2).mean(-1).numpy())


def test_ppo_policy_is_a_gaussian(ppo):
    actor = ppo.Actor(range(S), OBS, A, ppo.Args()).double()
    torch.nn.init.uniform_(actor.log_std, -1, 1)
    mean, actions = actor(draw(S, B, OBS)), draw(S, B, A)
    gaussian = torch.distributions.Normal(mean, actor.log_std.exp())
    torch.testing.assert_close(actor.log_prob(mean, actions), gaussian.log_prob(actions).sum(-1))
    torch.testing.assert_close(actor.entropy(), gaussian.entropy().sum(-1)[:, 0])
    for layer, gain in zip(actor.layers, (2**0.5, 2**0.5, 0.01)):  # orthogonal
        singular_values = torch.linalg.svdvals(layer.weight)
        torch.testing.assert_close(singular_values, torch.full_like(singular_values, gain), rtol=1e-5, atol=0)


def test_ppo_clips_each_seeds_gradient_alone(ppo):
    def networks(seeds):
        args = ppo.Args(hidden_sizes=(8,))
        pair = torch.nn.ModuleList([ppo.Actor(seeds, OBS, A, args), ppo.Critic(seeds, OBS, args)])
        for parameter in pair.parameters():  # seed k's gradient is k + 1 times the same
            generator = torch.Generator().manual_seed(parameter[0].numel())
            gradient = torch.randn(parameter[:1].shape, generator=generator)
            factors = 1.0 + torch.tensor([*seeds]).view(-1, *[1] * (parameter.dim() - 1))
            parameter.grad = gradient * factors
        return pair

    limit = 2.0 * float(torch.nn.utils.clip_grad_norm_(networks(range(1)).parameters(), 1.0))  # between seed 0's and seed 2's
    together = networks(range(S))
    ppo.clip_gradients(together, limit)
    for seed in range(S):
        alone = networks(range(seed, seed + 1))
        torch.nn.utils.clip_grad_norm_(alone.parameters(), limit)
        for one, other in zip(together.parameters(), alone.parameters()):
            torch.testing.assert_close(one.grad[seed], other.grad[0], rtol=1e-5, atol=1e-7)


def test_ppo_running_statistics(ppo):
    """After many batches: mean and variance of all rows of each seed; forward standardises and clips."""
    normalizer = ppo.RunningNormalizer(S, OBS)
    rows = draw(S, 400, OBS) * torch.tensor([0.1, 1.0, 30.0, 0.03]) + torch.tensor([5.0, -3.0, 100.0, 0.0])
    for batch in rows.split(8, 1):
        normalizer.update(batch)
    torch.testing.assert_close(normalizer.mean, rows.mean(1, keepdim=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalizer.var, rows.var(1, correction=0, keepdim=True), rtol=1e-3, atol=1e-6)
    scaled = normalizer(torch.cat([rows, rows + 1e6], 1))
    expected = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 1e-8).sqrt()
    torch.testing.assert_close(scaled[:, :400], expected.clamp(-10, 10).float(), rtol=1e-2, atol=1e-2)
    assert (scaled[:, 400:] == 10).all()
