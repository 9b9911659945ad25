"""What the scripts share, by baselines/td3.py, and what holds for each: acting, seeds apart, compiled as uncompiled."""

import shutil
import subprocess
import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ALL, CPU, OFF_POLICY, ROOT, A, B, Brief, O, S, load_script, make_agent, make_args, make_batch
from torch import nn

td3 = load_script("baselines/td3.py")


def weights(agent) -> list[torch.Tensor]:
    """Of all its networks, targets too, each [S, ...]."""
    networks = [module for module in agent.state().values() if isinstance(module, nn.Module)]
    return [parameter for network in networks for parameter in network.parameters()]


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


def test_gradients_have_the_parameters_strides():
    """Adam's fused kernel wants that; autograd gives them others. The norm is each seed's own."""
    layer = td3.Linear((S,), 3, 4)
    loss = (torch.randn(S, 5, 4) @ layer.weight.mT).square().sum((1, 2)) + layer.bias.sum((1, 2))
    weight_gradient, bias_gradient = torch.autograd.grad(loss.sum(), layer.parameters(), retain_graph=True)
    norm = td3.set_gradients(loss, layer)
    assert weight_gradient.stride() != layer.weight.stride() == layer.weight.grad.stride()
    assert torch.equal(layer.weight.grad, weight_gradient) and torch.equal(layer.bias.grad, bias_gradient)
    torch.testing.assert_close(norm, torch.cat([weight_gradient, bias_gradient], 1).flatten(1).norm(dim=1))


def test_polyak_update():
    online, target = [td3.Linear((S,), 3, 4) for _ in range(2)]
    expected = 0.9 * target.weight.detach() + 0.1 * online.weight
    td3.polyak_update(target, online, 0.1)
    torch.testing.assert_close(target.weight, expected)
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
    widths = td3.Batch(observations=O, actions=A, next_observations=O, rewards=1, terminations=1)
    agent, other_agent = [make_agent("baselines/td3.py", resume=str(tmp_path)) for _ in range(2)]
    replay, other_replay = [td3.ReplayBuffer(S, 1, widths, 4, CPU) for _ in range(2)]
    for _ in range(6):
        replay.add(td3.Batch(*[np.random.randn(S, width) for width in widths]))
    agent.update(replay.sample(B), update_actor=True)
    td3.save_evaluation(tmp_path, 9, agent, [{"step": 7, "return": 1.5}, {"step": 9, "return": 2.5}])
    td3.save_checkpoint(tmp_path, 7, agent, replay)
    rows = [{"step": "7", "return": "1.5"}]  # of evaluations up to the checkpoint
    assert td3.load_checkpoint(other_agent.args, other_agent, other_replay) == (7, rows)
    step = td3.Batch(*[np.random.randn(S, width) for width in widths])
    for one, its_replay in ((agent, replay), (other_agent, other_replay)):
        torch.manual_seed(1)
        its_replay.add(step)
        one.update(its_replay.sample(B), update_actor=True)
    assert all(torch.equal(*pair) for pair in zip(weights(agent), weights(other_agent)))


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
    """Actions 0.5, 0, 0.5, ... of [-1, 1] are 1, 0, 1, ... in Brief's +-2; each environment's first episode counts."""
    envs = td3.OneEnv([partial(td3.make_env, "Brief-v0")] * 2, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    envs.envs[1].reset()  # the second environment is an episode ahead
    steps = iter([0.5, 0.0] * 9)
    args = make_args("baselines/td3.py", seed=5, num_envs=4, eval_episodes=1)
    rows = td3.evaluate(lambda _: np.full((2, 2), next(steps), np.float32), envs, args, 1000, Brief.action_space)
    common = {"step": 1000, "transitions": 4000, "episode": 0}
    short = {"seed": 5, "return": -2.0, "length": 3, "action_fluctuation": pytest.approx(2 / 3 * 2**0.5)}
    long = {"seed": 6, "return": -4.0, "length": 4, "action_fluctuation": pytest.approx(3 / 4 * 2**0.5)}
    short["smoothness"] = td3.smoothness(np.array([[1.0], [0], [1]]))
    long["smoothness"] = td3.smoothness(np.array([[1.0], [0], [1], [0]]))
    assert rows == [common | short, common | long]


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
    """Other data for the second seed: to the bit, the first one's weights are the same, the other's are not."""
    batch = make_batch(path)
    changed = type(batch)(*[torch.stack([column[0], column[1].flip(0) + 1]) for column in batch])
    runs = []
    for data in (batch, changed):
        torch.manual_seed(1)
        agent = make_agent(path, autotune=True)
        for update_actor in (False, True, True):
            agent.update(data, update_actor)
        runs.append(weights(agent))
    for weight, other_weight in zip(*runs):
        assert torch.equal(weight[0], other_weight[0]) and not torch.equal(weight[1], other_weight[1])


@pytest.mark.filterwarnings("error:.*Dynamo")  # what it cannot trace
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("path", ["baselines/td3.py", "td3_ams.py", "td3_pave.py"])
def test_compiled_updates_are_the_uncompiled_ones(path):
    """With the same random numbers: on a CPU compile_gradients asks for torch's own."""
    runs = []
    for compile_agent in (lambda agent: None, lambda agent: agent.compile()):
        torch.manual_seed(1)
        agent = make_agent(path, caps_temporal_weight=0.1)
        compile_agent(agent)
        for step in range(4):
            agent.update(make_batch(path), update_actor=step % 2 == 1)
        runs.append(torch.cat([weight.flatten() for weight in weights(agent)]))
    torch.testing.assert_close(*runs, atol=2e-5, rtol=1e-4)
    assert not torch.equal(*runs)  # its rounding is its own, so it did compile
