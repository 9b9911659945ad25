"""What the scripts share, by baselines/td3.py, and what holds for each: acting, seeds apart, compiled as uncompiled."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ALL, CPU, OFF_POLICY, ROOT, B, O, S, load_script, make_agent, make_batch, weights

td3 = load_script("baselines/td3.py")


def test_one_name_one_source():
    check = subprocess.run([sys.executable, ROOT / "tests/same_code.py"], stdout=subprocess.PIPE, text=True)
    assert check.returncode == 0, check.stdout


def test_every_script_asks_for_what_pyproject_does():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    overrides = pyproject["tool"]["uv"]["override-dependencies"]
    for path in ALL:
        header = (ROOT / path).read_text().split("# /// script\n# ")[1].split("\n# ///")[0]
        metadata = tomllib.loads(header.replace("\n# ", "\n"))
        assert metadata["requires-python"] == project["requires-python"], path
        assert metadata["dependencies"] == project["dependencies"], path
        assert metadata["tool"]["uv"]["override-dependencies"] == overrides, path


@pytest.mark.parametrize("steps, capacity", [(1, 4), (4, 4), (7, 4)])
def test_replay_keeps_the_newest_steps_and_samples_uniformly(steps, capacity):
    """Reward of step t, seed s and environment e: 100 t + 10 s + e. An observation is twice that."""
    replay = td3.ReplayBuffer(2, 3, (1,) * 5, capacity, CPU)
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


@pytest.mark.parametrize("T", [1, 50, 51])
def test_smoothness_is_the_formula(T):
    """2 / T times the sum over the first T // 2 bins of k / T |FFT(a)|_k, mean over the action; 0 if T < 2."""
    actions = np.random.default_rng(0).uniform(-2, 2, (T, 3))
    k = np.arange(T // 2)
    coefficients = np.exp(-2j * np.pi * np.outer(k, np.arange(T)) / T) @ actions
    expected = (2 / T * k / T * np.abs(coefficients).mean(1)).sum()
    assert td3.smoothness(actions) == pytest.approx(expected, rel=1e-9)


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
@pytest.mark.parametrize("path", ["td3_ams.py", "td3_pave.py"])
def test_compiled_updates_are_the_uncompiled_ones(path):
    """With the same random numbers: on a CPU compile_gradients asks for torch's own."""
    runs = []
    for compile_agent in (lambda agent: None, lambda agent: agent.compile()):
        torch.manual_seed(1)
        agent = make_agent(path)
        compile_agent(agent)
        for step in range(4):
            agent.update(make_batch(path), update_actor=step % 2 == 1)
        runs.append(torch.cat([weight.flatten() for weight in weights(agent)]))
    torch.testing.assert_close(*runs, atol=2e-5, rtol=1e-4)
    assert not torch.equal(*runs)  # its rounding is its own, so it did compile


def test_ppo_clips_each_seeds_gradient_alone():
    parameter = torch.zeros(S, 3, 4)
    parameter.grad = torch.tensor([0.1, 100.0]).view(S, 1, 1).expand(S, 3, 4).clone()
    load_script("baselines/ppo.py").clip_gradients([parameter], 0.5)
    norms = parameter.grad.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([0.1 * 12**0.5, 0.5]))
