"""HumanoidBench's four tasks with the AMS scripts; skipped where it is not installed.

In the environment that README.md makes for it, with pytest beside:
PYTHONPATH=humanoid-bench hb/bin/python -m pytest tests/test_humanoidbench.py
"""

import csv

import numpy as np
import pytest
from conftest import load_script, run_script

TASKS = {"h1-walk": "h1-walk-v0", "h1-run": "h1-run-v0", "h1-slide": "h1-slide-v0", "h1-sit": "h1-sit_simple-v0"}
FLAGS = "--num-envs 2 --total-timesteps 40 --learning-starts 20 --batch-size 16 --eval-every 40 --eval-episodes 1 --no-compile"


@pytest.mark.parametrize("task", TASKS)
def test_environment(task):
    pytest.importorskip("humanoid_bench", reason="HumanoidBench is not installed")
    env = load_script("td3_ams.py").make_env(task)
    assert env.spec.id == TASKS[task] and env.spec.max_episode_steps == 1000
    assert env.action_space.shape == (19,) and (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    observation, _ = env.reset(seed=0)
    next_observation, reward, terminated, truncated, _ = env.step(np.zeros(19, np.float32))
    assert observation.shape == next_observation.shape == env.observation_space.shape == (51,)
    assert observation.dtype == next_observation.dtype == np.float32 and not (observation == next_observation).all()
    assert 0 < reward <= 1 and not terminated and not truncated


@pytest.mark.parametrize("script, task", [("td3_ams.py", "h1-walk"), ("sac_ams.py", "h1-sit")])
def test_training(script, task, tmp_path):
    pytest.importorskip("humanoid_bench", reason="HumanoidBench is not installed")
    run = run_script(script, "--env-id", task, *FLAGS.split(), cwd=tmp_path, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    (folder,) = tmp_path.glob(f"runs/{task}__*")
    first, last = csv.DictReader((folder / "eval.csv").read_text().splitlines())
    assert (first["step"], last["step"], last["transitions"]) == ("0", "40", "80")
    assert 0 < float(last["return"]) <= int(last["length"]) <= 1000


def test_where_it_is_not_installed(tmp_path):
    run = run_script("td3_ams.py", "--env-id", "h1-walk", cwd=tmp_path, PYTHONPATH="")
    assert run.returncode == 2 and not run.stdout and not list(tmp_path.iterdir())
    (line,) = run.stderr.splitlines()
    assert line.startswith("td3_ams.py: --env-id h1-walk: No module named 'humanoid_bench'") and line.endswith("README.md)")
