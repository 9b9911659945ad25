"""Strangers' environments and machines: what has a bounded real action trains in its own units, or is refused."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import load_script
from faulty_envs import REFUSED, SOUND
from processes import SMALL, Run, flags, load, only_run, read_eval, start_script, use_cores
from test_scripts import check_refused

TD3 = "baselines/td3.py"
td3 = load_script(TD3)


def start(cwd: Path, name: str, before: Callable = lambda: None, **changes) -> Run:
    sizes = dict(env_id=f"faulty_envs:{name}-v0", total_timesteps=30, num_envs=1, eval_episodes=1)
    return Run(TD3, *flags(TD3, **SMALL | sizes | changes), cwd=cwd, before=before)


@pytest.mark.parametrize("name", SOUND)
def test_trains_or_evaluates(name, tmp_path):
    """The environments assert that their actions are in their own space."""
    _, O, A = SOUND[name]
    run = start(tmp_path, name).wait(0)
    assert not run.errors
    shown = "an evaluation's episode had no end and was cut at 10000 steps"
    assert (shown in run.output) == (name == "Endless")
    rows = read_eval(only_run(tmp_path))
    assert {row["length"] for row in rows} == {10_000 if name == "Endless" else 20}
    assert np.isfinite([list(row.values()) for row in rows]).all()
    assert load(only_run(tmp_path) / "replay.pt")["rows"].shape[-1] == O + A + O + 2


def test_is_scored_in_the_units_of_its_id(tmp_path):
    """One first policy on one point, with actions from -2 to 2, with any that are clipped to these, and from 0 to 5."""
    rows = {}
    for name in ("Cheap", "Clipped", "Rescaled"):
        start(tmp_path / name, name).wait(0)
        rows[name] = read_eval(only_run(tmp_path / name))[0]
    assert rows["Clipped"] == rows["Cheap"]
    for measure, factor in {"return": 1, "smoothness": 5 / 4, "action_fluctuation": 5 / 4}.items():
        assert rows["Rescaled"][measure] == pytest.approx(factor * rows["Cheap"][measure], rel=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name, tmp_path):
    check_refused(start(tmp_path / "cwd", name), REFUSED[name][1])


def test_rendering_is_the_users_choice(tmp_path, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    message = "no task given, MUJOCO_GL is disabled ("
    check_refused(start(tmp_path / "cwd", "Unfinished"), message, "MUJOCO_GL=egl lets it render")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    check_refused(start(tmp_path / "cwd", "Unfinished"), "no task given, MUJOCO_GL is egl (")


def test_env_kwargs(tmp_path):
    """Episodes of 7 steps, in training and in the evaluation, and in a resumed run."""
    start(tmp_path, "Cheap", env_kwargs='{"length": 7}').wait(0)
    folder = only_run(tmp_path)
    Run(TD3, "--resume", folder, "--total-timesteps", 40, cwd=tmp_path).wait(0)
    assert {row["length"] for row in read_eval(folder)} == {7}
    rows = load(folder / "replay.pt")["rows"][0, :, 0]
    continues = (rows[:-1, 3:5] == rows[1:, :2]).all(1)  # next_observations, observations
    assert [step for step in range(1, 40) if not continues[step - 1]] == [7, 14, 21, 28, 30, 37]


def test_environments_that_share_processes_are_the_same(tmp_path):
    """Four in this process, in two and in four."""
    found = []
    for cores in (1, 2, 4):
        cwd = tmp_path / f"{cores}_cores"
        start(cwd, "Cheap", partial(use_cores, cores), num_envs=4, eval_episodes=4).wait(0)
        found.append((read_eval(only_run(cwd)), load(only_run(cwd) / "replay.pt")["rows"].tolist()))
    assert found[0] == found[1] == found[2]


def test_workers_draw_different_numbers_and_the_same_in_another_run(tmp_path):
    replays = []
    for cwd in (tmp_path / "one", tmp_path / "other"):
        start(cwd, "GlobalRandom", partial(use_cores, 2), num_envs=2).wait(0)
        replays.append(load(only_run(cwd) / "replay.pt")["rows"])
    assert replays[0].equal(replays[1])
    starts = replays[0][0, [0, 20], :, :2].flatten(0, 1)  # two episodes of both environments
    assert all(len(column.unique()) == 4 for column in starts.T)


def test_workers_that_compute_with_torch(tmp_path):
    """They are forks of a trainer that has used two threads."""
    words = flags(TD3, **SMALL | dict(env_id="faulty_envs:ComputesWithTorch-v0", total_timesteps=30, num_envs=1))
    environment = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "2"}
    process = start_script(TD3, *words, cwd=tmp_path, **environment)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_without_a_compiler_that_works(tmp_path):
    """A g++ that says its version and compiles nothing."""
    script = f"""[ "$1" = --version ] && exec {shutil.which("g++")} --version; echo "no omp.h" >&2; exit 1"""
    (tmp_path / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "g++").chmod(0o755)
    changes = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = start(tmp_path / "cwd", "Cheap", lambda: os.environ.update(changes), compile=True).wait(0)
    (line,) = [line for line in run.output.splitlines() if line.startswith("torch.compile does not work here")]
    assert "no omp.h" in line


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gymnasium_and_dm_control(monkeypatch):
    """A reset and a step in each that a benchmark may name: the last task of each of dm_control's domains."""
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    from dm_control import suite

    names = ["LunarLander-v3", "BipedalWalker-v3", "Pendulum-v1", "MountainCarContinuous-v0"]
    names += [name for name in gym.registry if name.endswith("-v5")]
    tasks = {domain: task for domain, task in suite.ALL_TASKS if domain != "lqr"}  # whose actions are unbounded
    names += [f"{domain}-{task}" for domain, task in tasks.items()]
    for env_id in names:
        env = td3.make_env(env_id)
        observation, _ = env.reset(seed=0)
        next_observation, reward, *_ = env.step(env.action_space.sample())
        for array in (observation, next_observation):
            assert array.ndim == 1 and array.dtype == np.float32 and np.isfinite(array).all(), env_id
        assert np.isfinite(reward), env_id
        env.close()
