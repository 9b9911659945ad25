"""What every script shares: the regions are the same bytes, and each of them does what it says. All on baselines/td3.py."""

import shutil
import subprocess
import sys
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from regions import differences, regions, scripts

td3 = load_script("baselines/td3.py")
CPU = torch.device("cpu")


def test_regions_are_equal():
    diffs = differences(ROOT / "baselines/td3.py")
    assert not diffs, "".join(diffs)


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.stem)
def test_every_script_has_the_regions(path):
    optional = {"replay", "compilation"} if path.stem == "ppo" else set()  # on-policy, and short updates
    assert regions(ROOT / "baselines/td3.py").keys() - regions(path).keys() <= optional


@pytest.mark.parametrize("out_features", [4, 3, 1], ids=["wide", "few columns", "one column"])
def test_linear_is_a_stack_of_torch_linears(out_features):
    stack, B, in_features = (3, 2), 5, 7
    layer = td3.Linear(stack, in_features, out_features)
    x = torch.randn(*stack, B, in_features)
    y, y_first_twin, y_shared = layer(x), layer(x[:, :1], slice(1)), layer(x[:, :1])  # the last: both twins, one input
    for s in range(3):
        for twin in range(2):
            plain = torch.nn.Linear(in_features, out_features)
            plain.load_state_dict({"weight": layer.weight[s, twin].mT, "bias": layer.bias[s, twin, 0]})
            torch.testing.assert_close(y[s, twin], plain(x[s, twin]))
            torch.testing.assert_close(y_shared[s, twin], plain(x[s, 0]))
        torch.testing.assert_close(y_first_twin[s, 0], y[s, 0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_runs_in_one_process_do_not_answer_for_each_other():
    """Compiled gradients check no guards, so two runs of one script must not share Dynamo's cache."""

    def run(factor: float, width: int):
        layer = torch.nn.Linear(width, 1)

        def gradients(batch):
            return {"loss": factor * layer(batch["x"]).detach().sum()}

        return layer, td3.compile_gradients(gradients)

    runs = [(2.0, 3), (5.0, 3), (5.0, 4)]
    compiled = [run(*settings) for settings in runs]
    for _ in range(2):
        for (factor, width), (layer, gradients) in zip(runs, compiled):
            x = torch.randn(7, width)
            torch.testing.assert_close(gradients({"x": x})["loss"], factor * layer(x).detach().sum())


def test_linear_starts_as_torch_linear_does():
    for sample in (td3.Linear((4,), 100, 300), torch.nn.Linear(100, 300)):
        for parameter in (sample.weight, sample.bias):  # uniform in +-1/sqrt(in)
            assert 0.095 < parameter.abs().max() <= 0.1
            assert parameter.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_initial_weights_of_a_seed_do_not_depend_on_the_others():
    args = td3.Args(hidden_sizes=(16, 16))
    for network in (td3.Actor, td3.Critic):
        alone, together = network(1, 3, 2, args), network(4, 3, 2, args)
        td3.seed_parameters(alone, range(7, 8))
        td3.seed_parameters(together, range(5, 9))
        for one, four in zip(alone.parameters(), together.parameters()):
            assert torch.equal(one[0], four[2])
            assert len(four.flatten(1).unique(dim=0)) == 4


def random_actions(steps: int, num_envs: int, env_id: str) -> np.ndarray:
    action_dim = gym.make(env_id).action_space.shape[0]
    return np.random.default_rng(0).uniform(-1, 1, (steps, num_envs, action_dim)).astype(np.float32)


def vector_steps(env_id: str, seeds: list[int], actions: np.ndarray, parallel: bool) -> tuple[np.ndarray, list]:
    envs = td3.VectorEnv(env_id, len(seeds), parallel, timeout=60)
    first, steps = envs.reset(seeds), []
    for action in actions:
        envs.send(action)
        steps.append(envs.receive())
    envs.close()
    return first, steps


def plain_transitions(env_id: str, seed: int, actions: np.ndarray) -> list[tuple]:
    """(s, a, true s', reward, terminated, truncated), from gymnasium alone."""
    env = gym.wrappers.RescaleAction(gym.make(env_id), np.float32(-1), np.float32(1))
    (observation, _), transitions = env.reset(seed=seed), []
    for action in actions:
        next_observation, reward, terminated, truncated, _ = env.step(action)
        transitions.append((observation, action, next_observation, reward, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else next_observation
    return transitions


@pytest.mark.parametrize("env_id, steps", [("Hopper-v5", 300), ("Pendulum-v1", 450)])
def test_termination_cuts_the_bootstrap_and_truncation_does_not(env_id, steps):
    """Environments -> replay -> target: Hopper falls (terminates), Pendulum runs out of time (truncates)."""
    seeds, gamma, value = [3, 4], 0.9, 100.0
    actions = random_actions(steps, 2, env_id)
    observations, answers = vector_steps(env_id, seeds, actions, parallel=False)
    observation_dim, action_dim = observations.shape[1], actions.shape[2]
    columns = {"observations": observation_dim, "actions": action_dim, "next_observations": observation_dim}
    replay = td3.ReplayBuffer(td3.Args(num_envs=2), {**columns, "rewards": 0, "terminations": 0}, CPU)
    for action, answer in zip(actions, answers):
        transition = {"observations": observations, "actions": action, "next_observations": answer.next_observations}
        replay.add(**transition, rewards=answer.rewards, terminations=answer.terminations)
        observations = answer.observations
    stored = dict(zip(columns | {"rewards": 0, "terminations": 0}, replay.rows[0, : 2 * steps].split(replay.widths, -1)))

    terminated, truncated = 0, 0
    for index, seed in enumerate(seeds):
        names = ("observations", "actions", "next_observations", "rewards", "terminations")
        for step, transition in enumerate(plain_transitions(env_id, seed, actions[:, index])):
            row = {name: stored[name][2 * step + index] for name in names}
            for name, expected in zip(names, transition):
                assert torch.equal(row[name], torch.as_tensor(expected, dtype=torch.float32).view(-1)), (name, step)
            target = td3.td_target(row["rewards"], row["terminations"], torch.tensor([value]), gamma).item()
            bootstrap = 0 if transition[4] else gamma * value
            assert target == pytest.approx(transition[3] + bootstrap, rel=1e-5)
            terminated, truncated = terminated + transition[4], truncated + transition[5]
    assert (terminated, truncated) > (5, 0) if env_id == "Hopper-v5" else (terminated, truncated) == (0, 4)


@pytest.mark.parametrize("env_id", ["Hopper-v5", "dm_control/cheetah-run-v0"])
def test_parallel_environments_give_what_serial_ones_give(env_id):
    td3.make_env(env_id)  # registers it
    actions = random_actions(100, 2, env_id)
    (first, serial), (first_parallel, parallel) = (vector_steps(env_id, [1, 2], actions, flag) for flag in (False, True))
    np.testing.assert_array_equal(first, first_parallel)
    for one, other in zip(serial, parallel):
        for mine, theirs in zip(one, other):
            np.testing.assert_array_equal(mine, theirs)
    assert any(step.terminations.any() for step in serial) == (env_id == "Hopper-v5")


def test_workers_end_with_the_script_whatever_ended_it():
    """They ignore the SIGTERM that multiprocessing sends its children at exit, before it waits for them."""
    body = "envs = td3.VectorEnv('Pendulum-v1', 2, parallel=True, timeout=60); raise KeyError('unforeseen')"
    code = f"from conftest import load_script; td3 = load_script('baselines/td3.py'); {body}"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and "KeyError: 'unforeseen'" in process.stderr


def make_replay(capacity: int, num_envs: int = 3) -> "td3.ReplayBuffer":
    args = td3.Args(num_seeds=2, num_envs=num_envs, batch_size=1, buffer_size=capacity)
    return td3.ReplayBuffer(args, {"observations": 2, "rewards": 0}, CPU)


def add_steps(replay, steps: range) -> None:
    """Transition t of environment e of seed s: reward 100 t + 10 s + e, and twice and three times that to observe."""
    for t in steps:
        rewards = np.add.outer([0, 10], np.arange(3)).ravel() + 100.0 * t  # [S * N], seed-major
        replay.add(observations=np.stack([2 * rewards, 3 * rewards], -1), rewards=rewards)


def sampled(replay, seed: int) -> set[float]:
    """Every reward that the seed's samples hold."""
    batch = replay.sample(2_000)
    assert batch["observations"].shape == (2, 2_000, 2) and batch["rewards"].shape == (2, 2_000)
    torch.testing.assert_close(batch["observations"], torch.stack([2 * batch["rewards"], 3 * batch["rewards"]], -1))
    return set(batch["rewards"][seed].tolist())


def newest(seed: int, steps: int, capacity: int) -> set[float]:
    rewards = [100.0 * t + 10 * seed + e for t in range(steps) for e in range(3)]
    return set(rewards[-capacity:])


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 20])
@pytest.mark.parametrize("capacity", [3, 10, 12])
def test_replay_returns_the_newest_across_the_end_of_the_ring(steps, capacity):
    replay = make_replay(capacity)
    add_steps(replay, range(steps))
    for seed in (0, 1):
        assert sampled(replay, seed) == newest(seed, steps, capacity)


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("capacity", [4, 10, 25])
def test_replay_loads_into_another_capacity_and_goes_on(steps, capacity, tmp_path):
    replay, other = make_replay(10), make_replay(capacity)
    add_steps(replay, range(steps))
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    held = min(10, capacity, 3 * steps)
    for seed in (0, 1):
        assert sampled(other, seed) == newest(seed, steps, held)
    for more in range(steps, steps + 10):  # what it writes over is the oldest
        add_steps(other, range(more, more + 1))
        held = min(capacity, held + 3)
        for seed in (0, 1):
            assert sampled(other, seed) == newest(seed, more + 1, held)


def test_a_batch_larger_than_the_replay_is_an_error():
    with pytest.raises(td3.UserError, match="--buffer-size must be at least --batch-size"):
        td3.ReplayBuffer(td3.Args(batch_size=256, buffer_size=255), {"rewards": 0}, CPU)


def test_smoothness_of_a_sinusoid_is_amplitude_times_frequency():
    t = np.arange(200)
    for amplitude, cycles in [(0.5, 3), (2.0, 40)]:
        wave = amplitude * np.sin(2 * np.pi * cycles * t / 200 + 0.3)
        assert td3.smoothness(wave[:, None]) == pytest.approx(amplitude * cycles / 200)
        still = np.stack([wave, np.full(200, 0.7)], -1)  # a constant action has no frequency; the mean is over actions
        assert td3.smoothness(still) == pytest.approx(amplitude * cycles / 200 / 2)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 50, 51])
def test_smoothness_is_the_formula(length):
    """protocols.md: (2 / n) times the sum over the first n // 2 bins of f_k |FFT(a)|_k, mean over the action; 0 if n < 2."""
    actions = np.random.default_rng(0).uniform(-2, 2, (length, 3)).astype(np.float32)
    scores = [0.0]
    if length >= 2:
        scores = []
        for d in range(3):
            total = 0.0
            for k in range(length // 2):
                phases = np.exp(-2j * np.pi * k * np.arange(length) / length)
                total += k / length * abs(np.sum(actions[:, d].astype(np.float64) * phases))
            scores.append(2 / length * total)
    assert td3.smoothness(actions) == pytest.approx(np.mean(scores), rel=1e-9)


def test_evaluate_reports_returns_lengths_and_smoothness_in_environment_units():
    """On Pendulum, whose actions are +-2: a sinusoid of amplitude 0.5 in normalised units is one of amplitude 1."""
    args = td3.Args(env_id="Pendulum-v1", num_seeds=2, seed=5, num_envs=4, eval_episodes=3)
    wave = 0.5 * np.sin(2 * np.pi * 10 * np.arange(200) / 200).astype(np.float32)
    steps = iter(wave)
    envs = td3.VectorEnv("Pendulum-v1", 6, False, 60)
    spec = td3.read_env_spec("Pendulum-v1")
    episodes = td3.evaluate(lambda _: torch.full((2, 3, 1), float(next(steps))), envs, spec, args, 1000, lambda: False)
    assert [(episode.seed, episode.episode) for episode in episodes] == [(s, e) for s in (5, 6) for e in range(3)]
    for episode, seed in zip(episodes, td3.env_seeds(args, 3, 1, 1000)):
        plain = plain_transitions("Pendulum-v1", seed, wave[:, None])
        assert episode.episodic_return == pytest.approx(sum(transition[3] for transition in plain))
        assert episode.smoothness == pytest.approx(1.0 * 10 / 200, rel=1e-4)
        assert (episode.step, episode.transitions, episode.length) == (1000, 4000, 200)
    assert len({episode.episodic_return for episode in episodes}) == 6  # a fresh start each


def test_environment_seeds_of_a_seed_do_not_depend_on_the_others():
    seeds = td3.env_seeds(td3.Args(seed=1, num_seeds=3), 4, 0, 0)
    assert seeds[4:8] == td3.env_seeds(td3.Args(seed=2, num_seeds=1), 4, 0, 0)
    assert len(set(seeds)) == 12


def test_set_gradients_serves_adams_fused_kernel():
    """As backward() and plain Adam, also for a gradient that autograd hands out transposed, as it does second derivatives."""
    torch.manual_seed(0)
    layer, x = td3.Linear((2,), 3, 4), torch.randn(2, 5, 4)
    reference = deepcopy(layer)
    optimizers = torch.optim.Adam(layer.parameters(), fused=True), torch.optim.Adam(reference.parameters(), foreach=False)

    def loss(layer):  # its gradient is that of the transposed weight, transposed
        return (x @ layer.weight.mT).square().sum((1, 2)) + layer.bias.square().sum((1, 2))

    assert not torch.autograd.grad(loss(layer).sum(), layer.weight)[0].is_contiguous()
    for _ in range(3):
        td3.set_gradients(loss(layer), layer)
        reference.zero_grad()
        loss(reference).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        for parameter, other in zip(layer.parameters(), reference.parameters()):
            torch.testing.assert_close(parameter.grad, other.grad)
            torch.testing.assert_close(parameter, other, atol=1e-7, rtol=1e-5)


def test_polyak_update_moves_the_target_and_leaves_no_history():
    """(1 - tau)^n and the rest, and no graph: one that grew with every update would be a leak, and a way for gradients."""
    online, target = (td3.Linear((2,), 3, 4) for _ in range(2))
    target.requires_grad_(False)
    start = [parameter.clone() for parameter in target.parameters()]
    for _ in range(5):
        td3.polyak_update(target, online, 0.1)
    for initial, moved, goal in zip(start, target.parameters(), online.parameters()):
        torch.testing.assert_close(moved, 0.9**5 * initial + (1 - 0.9**5) * goal.detach())
        assert moved.is_leaf and not moved.requires_grad
