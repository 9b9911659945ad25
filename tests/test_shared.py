"""What all scripts share, by baselines/td3.py, and what holds for each: losses, seeds apart, the replay."""

import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALL, OFF_POLICY, ROOT, Brief, load_script, serial_envs, train
from torch import nn
from torch.nn.functional import silu

td3 = load_script("baselines/td3.py")
S, B = 2, 6  # seeds, batch


def test_one_name_one_source():
    check = subprocess.run([sys.executable, ROOT / "tests/same_code.py"], stdout=subprocess.PIPE, text=True)
    assert check.returncode == 0, check.stdout


def test_every_script_asks_for_what_pyproject_does():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in ALL:
        header = (ROOT / path).read_text().split("# /// script\n# ")[1].split("\n# ///")[0]
        for name, value in tomllib.loads(header.replace("\n# ", "\n")).items():
            assert value == project[name], path


@pytest.mark.parametrize("out_features", [1, 3, 40], ids=["one column", "few columns", "many columns"])
def test_linear_is_a_product_for_each_member(out_features):
    layer, x = td3.Linear((3, 2), 7, out_features), torch.randn(3, 2, 5, 7)
    for rows in (x, x[:, :1]):  # the second: both twins see the same
        expected = torch.einsum("stbi,stio->stbo", rows.expand(3, 2, 5, 7), layer.weight) + layer.bias
        torch.testing.assert_close(layer(rows), expected)
    start = torch.cat([parameter.flatten() for parameter in td3.Linear((4,), 100, 300).parameters()])
    assert start.abs().max() <= 0.1 and start.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)  # as nn.Linear


def test_set_gradients_have_the_parameters_strides():
    """Adam's fused kernels look at none on a CPU and on a GPU at those of dimensions of size 1 too; autograd has its own."""
    layer, x = td3.Linear((2,), 3, 4), torch.randn(2, 5, 4)
    loss = (x @ layer.weight.mT).square().sum((1, 2)) + (layer.bias.mT * torch.ones(2, 4, 1)).sum((1, 2))
    expected = torch.autograd.grad(loss.sum(), list(layer.parameters()), retain_graph=True)
    td3.set_gradients(loss, layer)
    for parameter, gradient in zip(layer.parameters(), expected):
        assert gradient.stride() != parameter.stride() == parameter.grad.stride() and torch.equal(parameter.grad, gradient)


def test_polyak_update():
    online, target = td3.Linear((2,), 3, 4), td3.Linear((2,), 3, 4)
    start = deepcopy(target)
    td3.polyak_update(target, online, 0.1)
    for initial, moved, goal in zip(start.parameters(), target.parameters(), online.parameters()):
        torch.testing.assert_close(moved, 0.9 * initial + 0.1 * goal)
        assert moved.grad_fn is None  # a history that grew with every update would be a leak


@pytest.mark.parametrize("steps, capacity", [(1, 4), (3, 4), (4, 4), (7, 4), (20, 3)])
def test_replay_keeps_the_newest_steps_and_samples_uniformly(steps, capacity, tmp_path):
    """Also restored. Reward of step t, seed s, environment e: 100 t + 10 s + e; the observation is twice that."""
    replay, restored = (td3.ReplayBuffer(2, 3, [1, 1, 1], capacity, torch.device("cpu")) for _ in range(2))
    for t in range(steps):
        rewards = np.add.outer([0, 10], np.arange(3)).ravel() + 100.0 * t  # [S * N], seed-major
        replay.add(2 * rewards, rewards, rewards < 0)
    td3.save_checkpoint(tmp_path, 7, {}, [], replay)
    assert td3.load_checkpoint(tmp_path, {}, restored)[0] == 7 and restored.steps == steps
    for observations, rewards, terminations in (replay.sample(30_000), restored.sample(30_000)):
        assert torch.equal(observations[..., 0], 2 * rewards) and rewards.shape == (2, 30_000) and not terminations.any()
        for seed in range(2):
            values, counts = rewards[seed].unique(return_counts=True)
            newest = [100 * t + 10 * seed + e for t in range(max(0, steps - capacity), steps) for e in range(3)]
            assert values.tolist() == newest
            assert (counts - 30_000 / len(newest)).abs().max() < 5 * (30_000 / len(newest)) ** 0.5


@pytest.mark.parametrize("T", [1, 2, 3, 50, 51])
def test_smoothness_is_the_formula(T):
    """protocols.md: 2 / T times the sum over the first T // 2 bins of k / T |FFT(a)|_k, mean over the action; 0 if T < 2."""
    actions, total = np.random.default_rng(0).uniform(-2, 2, (T, 3)), 0.0
    for k in range(T // 2):
        total += 2 / T * k / T * np.abs(np.exp(-2j * np.pi * k * np.arange(T) / T) @ actions).mean()
    assert td3.smoothness(actions) == pytest.approx(total, rel=1e-9)


def test_evaluate_in_the_environments_units():
    """Actions 0.5, 0, 0.5, ... in [-1, 1] are 1, 0, 1, ... in Brief's +-2; only each environment's first episode counts."""
    envs, steps = serial_envs([partial(td3.make_env, "Brief-v0")] * 2, autoreset_mode="SameStep"), iter([0.5, 0.0] * 9)
    envs.envs[1].reset()  # the second environment is an episode ahead
    args = SimpleNamespace(seed=5, num_envs=4, eval_episodes=1)
    rows = td3.evaluate(lambda _: np.full((2, 2), next(steps), np.float32), envs, args, 1000, Brief.action_space)
    for row, seed, T, total in zip(rows, (5, 6), (3, 4), (-2.0, -4.0)):
        taken = np.array([[1.0], [0.0], [1.0], [0.0]][:T])
        assert row == (1000, 4000, seed, 0, total, T, td3.smoothness(taken), pytest.approx((T - 1) / T * 2**0.5))
    assert len(rows) == 2 and len(rows[0]) == len(td3.EVAL_COLUMNS.split(","))


def draw_batch() -> dict[str, torch.Tensor]:
    (s, s2, before), a, (r, d) = 20 * torch.randn(3, S, B, 2), torch.randn(S, B, 2), torch.randn(2, S, B)
    batch = dict(observations=s, actions=a, next_observations=s2, rewards=r, terminations=(d > 0).float())
    return batch | dict(previous_observations=before)


VARIANTS = [(path, {}) for path in OFF_POLICY]
VARIANTS += [(path, own) for path in ("td3_ams.py", "sac_ams.py") for own in ({"num_neighbors": 0}, {"shared_frame": True})]
VARIANTS += [(path, {"geometry_rows": 4}) for path in ("td3_pave.py", "sac_pave.py")]
VARIANTS += [(path, dict(mpr_weight=0.0, vfc_weight=0.0, curvature_weight=0.0)) for path in ("td3_pave.py", "sac_pave.py")]


@pytest.mark.parametrize("path, variant", VARIANTS, ids=[" ".join([path, *variant]) for path, variant in VARIANTS])
def test_losses_are_the_papers(path, variant, monkeypatch):
    """Each loss of an update and its gradient, written down again: learning rates 0, every draw 0.5, targets of their own."""
    script, (algorithm, _, method), losses = load_script(path), Path(path).stem.partition("_"), []

    def perturbed_copy(network: nn.Module) -> nn.Module:
        network = deepcopy(network)
        for parameter in network.parameters():
            parameter.data += 0.02
        return network

    directions, draws = torch.randn(S, B, 8, 2), {"randn_like": lambda x: torch.full_like(x, 0.5)}
    draws["randint_like"] = lambda x, high: torch.ones_like(x)
    monkeypatch.setattr(script, "torch", SimpleNamespace(**vars(torch) | draws))
    shifted = {"ParameterList": lambda values: nn.ParameterList([value - 0.5 for value in values])}  # alpha is not 1
    monkeypatch.setattr(script, "nn", SimpleNamespace(**vars(nn) | shifted))
    monkeypatch.setattr(script, "deepcopy", perturbed_copy)
    monkeypatch.setattr(script, "sample_directions", lambda shape, *_: directions[:, : shape[1]], raising=False)
    flags = dict(learning_rate=0.0, policy_lr=0.0, q_lr=0.0, tau=0.0, predictor_tau=0.0, num_seeds=S, batch_size=B, num_envs=1)
    flags |= dict(autotune=True, caps_temporal_weight=0.3, caps_spatial_weight=0.7, learning_starts=2, total_timesteps=3)
    kept = train(path, batch := draw_batch(), losses, **flags, **variant)
    (s, a, s2, r, d, before), (args, actor, critic) = batch.values(), (kept[name] for name in ("args", "actor", "critic"))

    def mse(x, y):
        return (x - y).square().mean((1, 2))

    def act(observations, network=actor):
        return network(observations) if algorithm == "td3" else network(observations)[0].tanh()

    def sample(observations):
        mean, log_std = actor(observations)
        u = mean + 0.5 * log_std.exp()
        log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - (1 - u.tanh() ** 2 + 1e-6).log()
        return u.tanh(), log_prob.sum(-1)

    if algorithm == "td3":
        alpha, log_prob, anchor = 0.0, 0.0, act(s2, kept["target_actor"])
        next_actions = (anchor + 0.1).clamp(-1, 1)  # policy_noise 0.2
        actor_loss = -critic(s, act(s))[:, 0].mean(1)
    else:
        (actions, log_prob), alpha, anchor = sample(s), kept["log_alpha"][0].exp().unsqueeze(1), act(s2)
        actor_loss = (alpha * log_prob - critic(s, actions).amin(1)).mean(1)
        alpha_loss = -alpha[:, 0] * (log_prob.mean(1) - 2)  # target entropy -A
        next_actions, log_prob = sample(s2)
    next_values = kept["target_critic"](s2, next_actions).amin(1)
    if method == "ams" and args.num_neighbors:
        frames = directions[:, :1] if args.shared_frame else directions
        next_values = script.neighborhood_value(kept["target_critic"], s2, anchor, frames, 0.2)
    targets = r + args.gamma * (1 - d) * (next_values - alpha * log_prob)
    qf_loss = (critic(s, a) - targets.unsqueeze(1)).square().mean(2).sum(1)
    qf_loss *= 1 if algorithm == "td3" or method in ("", "ams") else 0.5  # protocols.md, section 1

    if method == "pave":
        rows = s, a, s2, torch.full_like(s, 0.005), torch.ones_like(a)  # sigma 0.01
        mpr, vfc, curv = script.pave_losses(critic, *(x[:, : args.geometry_rows or B] for x in rows), 1.0)[1:]
        qf_loss += args.mpr_weight * mpr + args.vfc_weight * vfc + args.curvature_weight * curv
    if method == "gp":
        leaf = a.clone().requires_grad_()
        field = [torch.autograd.grad(critic(s, leaf)[:, twin].sum(), leaf, create_graph=True)[0] for twin in range(2)]
        qf_loss += 0.1 * (mse(field[0], 0) + mse(field[1], 0))
    previous_action, action, next_action = act(before), act(s), act(s2)
    if method == "caps" or path == "td3_pave.py":
        actor_loss += 0.5 * (0.3 * mse(action, next_action) + 0.7 * mse(action, act(s + 0.1)))  # caps_sigma 0.2
    if method in ("grad", "asap"):
        weight = torch.tanh((1 / (next_action - previous_action + 1e-4)) ** 2).detach()
        actor_loss += (
            getattr(args, "temporal_weight", 1.0) * 0.5 * mse(weight**0.5 * (2 * action - next_action - previous_action), 0)
        )
    if method == "asap":
        predictions = [network.fc_predict(silu(network.fc2(silu(network.fc1(s))))) for network in (actor, kept["slow_actor"])]
        predictions = [prediction.tanh() if algorithm == "td3" else prediction for prediction in predictions]
        actor_loss += mse(predictions[0], next_action.detach())  # predictor_weight 2
        actor_loss += args.spatial_weight * 0.5 * mse(next_action, predictions[1].detach())
    expected = {"Critic": qf_loss, "Actor": actor_loss} | ({"ParameterList": alpha_loss} if algorithm == "sac" else {})
    assert {name for name, _ in losses} == expected.keys()
    for name, loss in losses:
        network = {"Critic": critic, "Actor": actor}.get(name) or kept["log_alpha"]
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(expected[name].sum(), parameters, retain_graph=True)
        torch.testing.assert_close([loss, *(p.grad for p in parameters)], [expected[name], *gradients], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", OFF_POLICY)
def test_no_seed_touches_another(path):
    """Two updates with other data for the second seed: to the bit, the first one's networks are the same, the other's not."""
    batch, runs = draw_batch(), []
    for _ in range(2):
        kept = train(path, batch, num_seeds=S, num_envs=1, batch_size=B, learning_starts=2, total_timesteps=4, autotune=True)
        runs.append([list(module.parameters()) for module in kept.values() if isinstance(module, nn.Module)])
        batch = {name: torch.stack([column[0], column[1].flip(0) + 1]) for name, column in batch.items()}
    for one, other in zip(*runs):
        assert all(torch.equal(parameter[0], same[0]) for parameter, same in zip(one, other))
        assert not all(torch.equal(parameter[1], changed[1]) for parameter, changed in zip(one, other))


@pytest.mark.parametrize("path", OFF_POLICY)
def test_replay_holds_what_the_environments_did(path):
    """The last observation of an episode, not the next one's first; terminated, not truncated; s_prev of the same episode."""
    T, N = 14, 2
    replay = train(path, num_seeds=S, num_envs=N, total_timesteps=T, learning_starts=T)["replay"]
    rows = replay.rows.split(replay.widths, -1)
    expected = [(parity, step) for parity, length in ((0, 3), (1, 4)) * 2 for step in range(length)]
    for t, (parity, step) in enumerate(expected):
        s, a, s2, *before, r, d = (column[:, t].reshape(S * N, -1) for column in rows)
        for found, known in zip((s, s2, *before), (step, step + 1, max(0, step - 1))):
            assert found.tolist() == [[parity, known]] * 4, t
        torch.testing.assert_close(r[:, 0], -(2 * a - 1).square().sum(1), atol=1e-5, rtol=1e-5)
        assert d.tolist() == [[(parity, step) == (0, 2)]] * 4, t
    assert rows[1].abs().max() <= 1 and len(rows[1].unique()) == T * S * N * 2
