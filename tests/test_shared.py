"""What the scripts share, mostly by baselines/td3.py, and what holds for each: seeds apart, acting, compiled as uncompiled."""

import shutil
import subprocess
import sys
from copy import deepcopy
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ALL, CPU, OFF_POLICY, ROOT, A, B, Brief, O, S, load_script, make_agent, make_args, make_batch
from torch import nn

td3 = load_script("baselines/td3.py")


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


@pytest.mark.parametrize("out_features", [1, 3])
def test_linear_is_a_product_for_each_member(out_features):
    layer = td3.Linear((3, 2), 7, out_features)
    x = torch.randn(3, 2, 5, 7)
    for rows in (x, x[:, :1]):  # the second: both twins see the same
        expected = torch.einsum("stbi,stio->stbo", rows.expand(3, 2, 5, 7), layer.weight) + layer.bias
        torch.testing.assert_close(layer(rows), expected)
    weight = td3.Linear((4,), 100, 300).weight
    assert weight.abs().max() <= 0.1 and weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)  # as nn.Linear


def test_gradients_have_the_parameters_strides():
    """Adam's fused kernel wants that; autograd gives them others. The norm is each seed's own."""
    layer = td3.Linear((S,), 3, 4)
    x = torch.randn(S, 5, 4)
    loss = (x @ layer.weight.mT).square().sum((1, 2)) + layer.bias.mT.sum((1, 2))
    weight_gradient, bias_gradient = torch.autograd.grad(loss.sum(), [layer.weight, layer.bias], retain_graph=True)
    assert weight_gradient.stride() != layer.weight.stride()
    norm = td3.set_gradients(loss, layer)
    assert layer.weight.grad.stride() == layer.weight.stride()
    assert torch.equal(layer.weight.grad, weight_gradient) and torch.equal(layer.bias.grad, bias_gradient)
    flat = torch.cat([weight_gradient.flatten(1), bias_gradient.flatten(1)], 1)
    torch.testing.assert_close(norm, flat.norm(dim=1))


def test_polyak_update():
    online = td3.Linear((S,), 3, 4)
    target = td3.Linear((S,), 3, 4)
    start = deepcopy(target)
    td3.polyak_update(target, online, 0.1)
    torch.testing.assert_close(target.weight, 0.9 * start.weight + 0.1 * online.weight)
    assert target.weight.grad_fn is None  # a history that grew with every update would be a leak


def test_action_saturation():
    actions = torch.tensor([[[0.99, -1.0], [0.97, 0.0]], [[0.0, 0.0], [-0.985, 0.5]]])
    assert td3.action_saturation(actions).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("steps, capacity", [(1, 4), (4, 4), (7, 4), (20, 3)])
def test_replay_keeps_the_newest_steps_and_samples_uniformly(steps, capacity):
    """Reward of step t, seed s and environment e: 100 t + 10 s + e. An observation is twice that."""
    widths = td3.Batch(observations=1, actions=1, next_observations=1, rewards=1, terminations=1)
    replay = td3.ReplayBuffer(2, 3, widths, capacity, CPU)
    for t in range(steps):
        rewards = 100.0 * t + np.add.outer([0, 10], np.arange(3)).ravel()  # [S * N], seed-major
        replay.add(td3.Batch(2 * rewards, rewards, rewards, rewards, rewards < 10))
    batch = replay.sample(30_000)
    assert batch.rewards.shape == (2, 30_000) and torch.equal(batch.observations.squeeze(-1), 2 * batch.rewards)
    assert torch.equal(batch.terminations, (batch.rewards < 10).float())
    for seed in range(2):
        values, counts = batch.rewards[seed].unique(return_counts=True)
        newest = [100 * t + 10 * seed + e for t in range(max(0, steps - capacity), steps) for e in range(3)]
        assert values.tolist() == newest
        expected = 30_000 / len(newest)
        assert (counts - expected).abs().max() < 5 * expected**0.5


def test_a_checkpoint_restores_agent_and_replay(tmp_path):
    """Networks, optimisers and stored transitions: the next update is the same to the bit."""
    args = make_args("baselines/td3.py", num_seeds=S, batch_size=B, resume=str(tmp_path))
    widths = td3.Batch(observations=O, actions=A, next_observations=O, rewards=1, terminations=1)
    runs = []
    for _ in range(2):
        runs.append((make_agent("baselines/td3.py"), td3.ReplayBuffer(S, 1, widths, 4, CPU)))
    (agent, replay), (restored_agent, restored_replay) = runs
    for _ in range(6):
        replay.add(td3.Batch(*[np.random.randn(S, width) for width in widths]))
    agent.update(replay.sample(B), update_actor=True)
    rows = [{"step": 7, "return": 1.5}, {"step": 9, "return": 2.5}]
    td3.save_evaluation(tmp_path, 9, agent, rows)
    td3.save_checkpoint(tmp_path, 7, agent, replay)
    assert td3.load_checkpoint(args, restored_agent, restored_replay) == (7, [{"step": "7", "return": "1.5"}])
    for agent, replay in runs:
        torch.manual_seed(1)
        agent.update(replay.sample(B), update_actor=True)
    for name in ("actor", "critic", "target_actor", "target_critic"):
        one, other = [agent.state()[name].state_dict() for agent, _ in runs]
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("T", [1, 2, 3, 50, 51])
def test_smoothness_is_the_formula(T):
    """2 / T times the sum over the first T // 2 bins of k / T |FFT(a)|_k, mean over the action; 0 if T < 2."""
    actions = np.random.default_rng(0).uniform(-2, 2, (T, 3))
    total = 0.0
    for k in range(T // 2):
        coefficient = np.exp(-2j * np.pi * k * np.arange(T) / T) @ actions
        total += 2 / T * k / T * np.abs(coefficient).mean()
    assert td3.smoothness(actions) == pytest.approx(total, rel=1e-9)


def test_in_own_units():
    box = gym.spaces.Box(np.array([-2.0, 1.0, 0.0]), np.array([2.0, 1.0, 10.0]), dtype=np.float64)
    actions = np.array([[1.0, 0.3, -0.5], [-0.5, -1.0, 1.0]])
    assert td3.in_own_units(actions, box).tolist() == [[2, 1, 2.5], [-1, 1, 10]]  # the second dimension is constant


def test_evaluate_in_the_environments_units():
    """Actions 0.5, 0, 0.5, ... in [-1, 1] are 1, 0, 1, ... in Brief's +-2; only each environment's first episode counts."""
    envs = td3.OneEnv([partial(td3.make_env, "Brief-v0")] * 2, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    envs.envs[1].reset()  # the second environment is an episode ahead
    steps = iter([0.5, 0.0] * 9)
    args = make_args("baselines/td3.py", seed=5, num_envs=4, eval_episodes=1)
    rows = td3.evaluate(lambda _: np.full((2, 2), next(steps), np.float32), envs, args, 1000, Brief.action_space)
    expected = []
    for seed, T, total in ((5, 3, -2.0), (6, 4, -4.0)):
        taken = np.array([[1.0], [0.0], [1.0], [0.0]][:T])
        row = {"step": 1000, "transitions": 4000, "seed": seed, "episode": 0, "return": total, "length": T}
        row["smoothness"] = td3.smoothness(taken)
        row["action_fluctuation"] = pytest.approx((T - 1) / T * 2**0.5)
        expected.append(row)
    assert rows == expected


@pytest.mark.parametrize("path", ALL)
def test_acting_without_exploration_draws_nothing(path):
    agent = make_agent(path)
    observations = torch.randn(S, B, O)
    before = torch.get_rng_state()
    actions = agent.act(observations, explore=False)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(agent.act(observations, explore=False), actions)
    assert not torch.equal(agent.act(observations, explore=True), actions)


@pytest.mark.parametrize("path", OFF_POLICY)
def test_no_seed_touches_another(path):
    """Two updates with other data for the second seed: to the bit, the first one's networks are the same, the other's not."""
    batch = make_batch(path)
    changed = type(batch)(*[torch.stack([column[0], column[1].flip(0) + 1]) for column in batch])
    states = []
    for data in (batch, changed):
        torch.manual_seed(1)
        agent = make_agent(path, autotune=True)
        agent.update(data, update_actor=False)
        agent.update(data, update_actor=True)
        states.append([list(module.parameters()) for module in agent.state().values() if isinstance(module, nn.Module)])
    for network, other in zip(*states):
        assert all(torch.equal(one[0], same[0]) for one, same in zip(network, other))
        assert not all(torch.equal(one[1], moved[1]) for one, moved in zip(network, other))


@pytest.mark.filterwarnings("error:.*Dynamo")  # what it cannot trace
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("path", ["baselines/td3.py", "td3_ams.py", "td3_pave.py"])
def test_compiled_updates_are_the_uncompiled_ones(path):
    """With the same random numbers, since compile_gradients asks for torch's own on a CPU."""
    states = []
    for compiled in (False, True):
        torch.manual_seed(1)
        agent = make_agent(path, caps_temporal_weight=0.1)
        if compiled:
            agent.compile()
        for step in range(4):
            agent.update(make_batch(path), update_actor=step % 2 == 1)
        networks = (agent.actor, agent.critic, agent.target_actor, agent.target_critic)
        states.append(torch.cat([parameter.flatten() for network in networks for parameter in network.parameters()]))
    torch.testing.assert_close(*states, atol=2e-5, rtol=1e-4)
    assert not torch.equal(*states)  # its rounding is its own, so it did compile
