"""Every script end to end, as a user runs it: a run's files, what it prints, resume, wandb, and users' mistakes."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL, ROOT
from processes import SMALL, Run, flags, load, only_run, read_eval, start_script, use_cores
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = 210  # of a run
EVALUATED = [*range(0, STEPS, 40), STEPS]
SIZES = SMALL | dict(total_timesteps=STEPS, learning_starts=180, log_every=30, eval_every=40, num_steps=70)


@pytest.fixture(scope="module", params=[pytest.param(path, marks=pytest.mark.xdist_group(path)) for path in ALL])
def small_run(request, tmp_path_factory) -> tuple[str, Path, int, int, list[str]]:
    """A script, the folder of its run, which stays as it is, S and N (2 and 1, or 1 and 2), and what it printed."""
    S, N = [(2, 1), (1, 2)][ALL.index(request.param) % 2]
    cwd = tmp_path_factory.mktemp("run")
    sizes = SIZES | {"num_seeds": S, "num_envs": N, "eval_episodes": N}
    run = Run(request.param, *flags(request.param, **sizes), cwd=cwd, before=partial(use_cores, 2)).wait(0)
    assert not run.errors
    return request.param, only_run(cwd), S, N, run.output.splitlines()


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's values by name and step; none is logged twice."""
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        values = events.Scalars(name)
        scalars[name] = {event.step: event.value for event in values}
        assert len(scalars[name]) == len(values), name
    return scalars


def assert_equal(state: object, other: object, name: str = "") -> None:
    """Two checkpoints, bit for bit, but for the step and for PPO's statistics, which it gathers without learning."""
    if isinstance(state, dict):
        assert state.keys() == other.keys()
        for key in state.keys() - {"step"} if not name else state:
            assert_equal(state[key], other[key], f"{name}.{key}")
    elif isinstance(state, torch.Tensor) and "normalizer" not in name:
        assert torch.equal(state, other), name


def test_what_a_run_prints_and_writes(small_run):
    """Each evaluation once, and what to do next; every file, readable, and in agreement."""
    path, folder, S, N, printed = small_run
    for step in EVALUATED:
        assert printed.count(f"step {step}/{STEPS} evaluating") == 1
        assert sum(line.startswith(f"step {step}/{STEPS} eval/return -") for line in printed) == 1
    assert any(re.fullmatch(rf"step {STEPS}/{STEPS} SPS [\d.]+ return -[\d.]+ left 00:00", line) for line in printed)
    assert re.fullmatch(rf"finished runs/{folder.name}: .*play.py .*export.py.*", printed[-1])

    assert json.loads((folder / "args.json").read_text())["script"] == Path(path).stem
    assert re.fullmatch(rf"Pendulum-v1__{Path(path).stem}__1__\d+_[0-9a-f]{{6}}", folder.name)

    rows = read_eval(folder)
    keys = [(row["step"], row["transitions"], row["seed"], row["episode"]) for row in rows]
    assert keys == [(step, N * step, 1 + seed, index) for step in EVALUATED for seed in range(S) for index in range(N)]
    for row in rows:
        assert row["length"] == 200 and -2000 < row["return"] < 0
        assert row["smoothness"] >= 0 and 0 <= row["action_fluctuation"] <= 4  # the range of Pendulum's torque

    scalars = read_scalars(folder)
    expected = {"charts/SPS", "charts/transitions", "charts/episodic_return", "eval/return", "eval/smoothness"}
    if "ppo" not in path:
        expected |= {"losses/qf_loss", "losses/actor_loss", "diagnostics/td_target_variance"}
    if "pave" in path:
        expected |= {"losses/mpr", "losses/vfc", "losses/curv"}
    assert expected <= scalars.keys()
    mean = np.mean([row["return"] for row in rows if row["step"] == STEPS])
    assert scalars["eval/return"][STEPS] == pytest.approx(mean, rel=1e-5)

    checkpoint = load(folder / "checkpoint.pt")
    first, *_, last = [load(file) for file in sorted((folder / "policies").iterdir())]
    for name in ("actor", "critic"):
        assert_equal(last[name], checkpoint[name], name)
        assert any(not torch.equal(weights, first[name][key]) for key, weights in last[name].items()), name
    if "ppo" not in path:
        assert load(folder / "replay.pt")["rows"].shape[:3] == (S, STEPS, N)


def test_evaluations_change_no_weight(small_run, tmp_path):
    """--eval-every 20 and 40: the same networks, optimisers and replay, bit for bit."""
    path, folder, S, N, _ = small_run
    sizes = SIZES | {"num_seeds": S, "num_envs": N, "eval_episodes": N, "eval_every": 20}
    Run(path, *flags(path, **sizes), cwd=tmp_path).wait(0)
    assert {row["step"] for row in read_eval(only_run(tmp_path))} == {*range(0, STEPS, 20), STEPS}
    for file in ["checkpoint.pt"] if "ppo" in path else ["checkpoint.pt", "replay.pt"]:
        assert_equal(load(folder / file), load(only_run(tmp_path) / file), file)


def test_resume_is_exact(small_run, tmp_path):
    """With a longer --total-timesteps, and a --learning-starts that forbids updates: all is as it was, bit for bit."""
    path, folder, *_ = small_run
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    longer = {"total_timesteps": STEPS + 20, "learning_starts": 10**6, "num_steps": 10**4, "log_every": 10}
    run = Run(path, "--resume", copy, *flags(path, **longer), cwd=tmp_path).wait(0)
    before = load(folder / "checkpoint.pt")
    after = load(copy / "checkpoint.pt")
    assert run.steps[0] == STEPS + 10 and after["step"] == STEPS + 20
    assert_equal(before, after)
    assert read_eval(copy)[: len(read_eval(folder))] == read_eval(folder)
    assert list(read_scalars(copy)["eval/return"]) == [*EVALUATED, STEPS + 20]
    if "ppo" not in path:
        rows = load(copy / "replay.pt")["rows"]
        assert rows.shape[1] == STEPS + 20 and torch.equal(rows[:, :STEPS], load(folder / "replay.pt")["rows"])


def check_refused(run: Run, *expected: str) -> None:
    """Exit status 2, a short message, no traceback, nothing written."""
    run.wait(2)
    message = re.sub(r"[\s│]+", " ", run.errors)  # tyro draws a box
    assert all(text in message for text in expected) and "Traceback" not in message and len(message) < 1500, message
    assert not list(run.cwd.iterdir())


MISTAKES = {
    "--env-id h1-walk": "No module named 'humanoid_bench'",
    "--env-id dog-rnu": "Did you mean: `dog-run`?",
    "--env-id Walker2d-v55": "It provides versioned environments",
    "--env-kwargs {": "--env-kwargs {: not a JSON object",
    '--env-kwargs {"lenght":1}': "unexpected keyword argument 'lenght'",
    "--learning-rate 1.5": "--learning-rate 1.5: at least 0, at most 1",
    "--gamma nan": "--gamma nan: at least 0",
    "--batch-size 0": "--batch-size 0: at least 1",
    "--resume runs/none": "--resume runs/none: no run of this script",
    "--runs-dir /dev/null/runs": "cannot be written: Not a directory (--runs-dir names another place)",
    "--buffer-size 4000000000 --total-timesteps 4000000000": "the replay cannot fit",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, tmp_path):
    check_refused(Run("td3_ams.py", "--env-id", "Pendulum-v1", *words.split(), cwd=tmp_path / "cwd"), MISTAKES[words])


def test_alone_in_a_folder_and_tracked(tmp_path):
    """A real interpreter, nothing beside the script, an environment named module:id, wandb without a network."""
    script = shutil.copy(ROOT / "td3_pave.py", tmp_path)
    words = flags("td3_pave.py", **SMALL | {"env_id": "faulty_envs:Cheap-v0", "total_timesteps": 40, "eval_every": 20})
    environment = {"WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parent)}
    process = start_script(script, *words, "--track", cwd=tmp_path, **environment)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    folder = only_run(tmp_path)

    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", record]
    lines = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout.splitlines()
    records = {}
    for line in map(json.loads, lines):
        records.setdefault(line["type"], []).append(line[line["type"]])
    (logged,) = records["run"]
    assert logged["display_name"] == folder.name
    assert logged["config"]["update"]["env_id"] == "faulty_envs:Cheap-v0"
    assert records["metric"][0]["step_metric"] == "global_step"
    history = [entry["item"] for entry in records["history"]]
    for name, series in read_scalars(folder).items():  # the names and steps of TensorBoard
        tracked = {row["global_step"]: row[name] for row in history if name in row}
        assert tracked == pytest.approx(series, rel=1e-5), name
