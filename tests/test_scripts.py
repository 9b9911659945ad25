"""Every script end to end, as a user runs it: the files of a run, resume, wandb, and what mistakes get."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ALL, ROOT, load_script
from processes import SMALL, Run, flags, load, only_run, read_eval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS, EPISODE = 210, 200  # of a run, of an episode of Pendulum-v1
SIZES = SMALL | dict(total_timesteps=STEPS, learning_starts=180, log_every=30, save_every=100, num_steps=70)
COLUMNS = ["step", "transitions", "seed", "episode", "return", "length", "smoothness", "action_fluctuation"]


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's values by name and step; none is logged twice."""
    events = EventAccumulator(str(folder))
    events.Reload()
    series = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert all(len({event.step for event in values}) == len(values) for values in series.values())
    return {name: {event.step: event.value for event in values} for name, values in series.items()}


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def assert_equal(state: object, other: object, name: str = "") -> None:
    """Two checkpoints, bit for bit, but for PPO's statistics, which it gathers without learning, and the step."""
    if isinstance(state, dict):
        for key in state.keys() - {"step", "episodes"} if not name else state:
            assert_equal(state[key], other[key], f"{name}.{key}")
    elif isinstance(state, torch.Tensor) and "normalizer" not in name:
        assert torch.equal(state, other), name


@pytest.fixture(scope="module", params=[pytest.param(path, marks=pytest.mark.xdist_group(path)) for path in ALL])
def small_run(request, tmp_path_factory) -> tuple[str, Path, int, int]:
    """(script, folder of its run, S, N); the tests leave the folder as it is."""
    S, N = [(2, 1), (1, 2)][ALL.index(request.param) % 2]
    cwd = tmp_path_factory.mktemp("run")
    sizes = dict(num_seeds=S, num_envs=N, eval_episodes=N)
    run = Run(request.param, *flags(request.param, **SIZES | sizes), cwd=cwd).wait(0)
    folder = only_run(cwd)
    assert run.output.splitlines()[0] == f"runs/{folder.name}" and not run.errors
    return request.param, folder, S, N


def test_a_run_writes_every_file(small_run):
    """All that DESIGN.md lists, readable, and in agreement."""
    path, folder, S, N = small_run
    args = json.loads((folder / "args.json").read_text())
    assert re.fullmatch(rf"Pendulum-v1__{Path(path).stem}__1__\d+", folder.name)
    assert (args["script"], args["env_id"], args["total_timesteps"]) == (Path(path).stem, "Pendulum-v1", STEPS)

    rows = read_eval(folder)
    assert list(rows[0]) == COLUMNS == load_script(path).EVAL_COLUMNS.split(",")
    keys = [tuple(map(int, list(row.values())[:4])) for row in rows]
    assert keys == [(step, N * step, 1 + seed, episode) for step in (0, STEPS) for seed in range(S) for episode in range(N)]
    for row in rows:
        assert row["length"] == EPISODE and -2000 < row["return"] < 0
        assert row["smoothness"] >= 0 and 0 <= row["action_fluctuation"] <= 4  # the range of Pendulum's torque

    scalars = read_scalars(folder)
    expected = {"charts/SPS", "charts/transitions", "charts/episodic_return", "eval/return", "eval/smoothness"}
    if "ppo" not in path:
        expected |= {"losses/qf_loss", "losses/qf_values", "losses/actor_loss"}
        expected |= {"diagnostics/critic_grad_norm", "diagnostics/td_target_variance"}
    expected |= {"losses/alpha"} if "sac" in path else set()
    expected |= {"losses/mpr", "losses/vfc", "losses/curv"} if "pave" in path else set()
    assert expected <= scalars.keys() and any(name.startswith("losses/") for name in scalars)
    assert scalars["charts/transitions"][STEPS] == N * STEPS
    returns = [np.mean([row["return"] for row in rows if row["step"] == step]) for step in (0, STEPS)]
    assert [scalars["eval/return"][step] for step in (0, STEPS)] == pytest.approx(returns, rel=1e-5)

    checkpoint = load(folder / "checkpoint.pt")
    first, last = (load(folder / f"policies/step_{step:09d}.pt") for step in (0, STEPS))
    assert checkpoint["step"] == STEPS and len(list((folder / "policies").iterdir())) == 2
    for name in ("actor", "critic"):
        assert_equal(last[name], checkpoint[name], name)
        assert any(not torch.equal(weights, first[name][key]) for key, weights in last[name].items()), f"{name} did not learn"
    if "ppo" not in path:
        replay = load(folder / "replay.pt")
        assert replay["steps"] == STEPS and replay["rows"].shape[:3] == (S, STEPS, N) and replay["rows"].isfinite().all()
    assert not list(folder.rglob("*.tmp"))


def test_resume_is_exact(small_run, tmp_path):
    """With a longer --total-timesteps, and a --learning-starts that forbids updates: all is what it was, bit for bit."""
    path, folder, *_ = small_run
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    longer = dict(total_timesteps=STEPS + 20, learning_starts=10**6, num_steps=10**4, log_every=10)
    run = Run(path, "--resume", copy, *flags(path, **longer), cwd=tmp_path).wait(0)
    before, after = load(folder / "checkpoint.pt"), load(copy / "checkpoint.pt")
    assert run.steps[0] == STEPS + 10 and after["step"] == STEPS + 20 and before.keys() == after.keys()
    assert_equal(before, after)
    assert read_eval(copy)[: len(read_eval(folder))] == read_eval(folder)
    assert list(read_scalars(copy)["eval/return"]) == [0, STEPS, STEPS + 20]
    if "ppo" not in path:
        replays = load(folder / "replay.pt")["rows"], load(copy / "replay.pt")["rows"]
        assert replays[1].shape[1] == STEPS + 20 and torch.equal(replays[0], replays[1][:, :STEPS])


@pytest.fixture(scope="module")
def td3_run(tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("td3")
    sizes = dict(total_timesteps=60, num_envs=1, eval_episodes=1)
    Run("baselines/td3.py", *flags("baselines/td3.py", **SMALL | sizes), cwd=cwd).wait(0)
    return only_run(cwd)


def test_resume_without_a_replay_and_with_another_learning_rate(td3_run, tmp_path):
    """No update before the new replay holds learning_starts steps; by a learning rate of 0 they change no network."""
    copy = Path(shutil.copytree(td3_run, tmp_path / "run"))
    (copy / "replay.pt").unlink()
    changes = flags("baselines/td3.py", total_timesteps=100, learning_rate=0, log_every=1)
    Run("baselines/td3.py", "--resume", copy, *changes, cwd=tmp_path).wait(0)
    losses = [step for step in read_scalars(copy)["losses/qf_loss"] if step > 60]
    assert losses == list(range(60 + 20 + 1, 101))
    before, after = load(td3_run / "checkpoint.pt"), load(copy / "checkpoint.pt")
    optimizers = before["critic_optimizer"]["state"], after["critic_optimizer"]["state"]
    assert optimizers[1][0]["step"] == optimizers[0][0]["step"] + 20
    assert_equal([before["actor"], before["critic"]], [after["actor"], after["critic"]], "networks")


OTHERS = {
    "--env-id MountainCarContinuous-v0": "env_id was Pendulum-v1",
    "--seed 2": "seed was 1",
    "--num-seeds 2": "num_seeds was",
}
OTHERS |= {"--num-envs 3": "num_envs was 1", "--buffer-size 10": "buffer_size was 1000"}


@pytest.mark.parametrize("words", OTHERS)
def test_resume_refuses_another_protocol(words, td3_run, tmp_path):
    before = contents(td3_run)
    check_refused(Run("baselines/td3.py", "--resume", td3_run, *words.split(), cwd=tmp_path / "cwd"), OTHERS[words])
    assert contents(td3_run) == before


def check_refused(run: Run, *expected: str) -> None:
    """Exit status 2, a short message, no traceback, nothing written."""
    run.wait(2)
    message = re.sub(r"[\s│]+", " ", run.errors)  # tyro draws a box
    assert all(text in message for text in expected) and "Traceback" not in message and len(message) < 1500, message
    assert not list(run.cwd.iterdir()) and not run.output


MISTAKES = {
    "--env-id dog-rnu": "Did you mean: `dog-run`?",
    "--env-id Walker2d-v55": "It provides versioned environments",
    "--env-id CarRacing-v3": "must be real vectors",
    "--env-id CartPole-v1": "must be real vectors",
    "--env-id Unbounded-v0": "bound",
    "--radius -0.1": "--radius -0.1: at least 0",
    "--learning-rate -1": "--learning-rate -1.0: at least 0",
    "--tau 1.5": "--tau 1.5: at least 0, at most 1",
    "--gamma nan": "--gamma nan: at least 0",
    "--batch-size 0": "--batch-size 0: at least 1",
    "--num-envs -2": "--num-envs -2: at least 1",
    "--num-envs two": "two",
    "--hidden-sizes 64": "hidden-sizes",
    "--resume runs/none": "--resume runs/none: no run of this script",
}


class Unbounded(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


gym.register("Unbounded-v0", Unbounded)


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, tmp_path):
    check_refused(Run("td3_ams.py", "--env-id", "Pendulum-v1", *words.split(), cwd=tmp_path / "cwd"), MISTAKES[words])


def test_resume_refuses_another_scripts_run(td3_run, tmp_path):
    check_refused(Run("td3_ams.py", "--resume", td3_run, cwd=tmp_path / "cwd"), "no run of this script (it is another one's)")


def test_without_a_compiler(tmp_path):
    """--compile says so and runs uncompiled; here with a buffer that is smaller than a vector step."""
    (tmp_path / "bin").mkdir()
    words = flags("baselines/td3.py", **SMALL | dict(total_timesteps=25, compile=True, buffer_size=1))
    run = Run("baselines/td3.py", *words, cwd=tmp_path, before=lambda: os.environ.update(PATH=str(tmp_path / "bin"))).wait(0)
    assert (
        "torch.compile needs g++" in run.output and not run.errors and load(only_run(tmp_path) / "checkpoint.pt")["step"] == 25
    )


def test_alone_in_a_folder_and_tracked(tmp_path):
    """A real interpreter, nothing beside the script, an environment named module:id, wandb without a network."""
    shutil.copy(ROOT / "td3_pave.py", tmp_path)
    words = flags("td3_pave.py", **SMALL | dict(env_id="faulty_envs:Cheap-v0", total_timesteps=40, eval_every=20))
    environ = os.environ | dict(OMP_NUM_THREADS="1", WANDB_MODE="offline", PYTHONPATH=str(ROOT / "tests"))
    process = subprocess.run([sys.executable, "td3_pave.py", *words, "--track"], cwd=tmp_path, env=environ, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()
    folder = only_run(tmp_path)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = read_wandb(record)
    run = next(record.run for record in records if record.HasField("run"))
    config = as_dict(run.config.update)
    assert (run.run_group, run.project, run.display_name) == ("faulty_envs:Cheap-v0__td3_pave", "smoothq", folder.name)
    assert (config["env_id"], config["total_timesteps"]) == ("faulty_envs:Cheap-v0", 40)
    assert {record.metric.step_metric for record in records if record.HasField("metric")} >= {"global_step"}
    history = [as_dict(record.history.item) for record in records if record.HasField("history")]
    scalars = read_scalars(folder)
    for name, series in scalars.items():  # the names and steps of TensorBoard
        assert {row["global_step"]: row[name] for row in history if name in row} == pytest.approx(series, rel=1e-5), name
    summary = as_dict(item for record in records for item in record.summary.update)
    for name in ("eval/return", "eval/smoothness", "charts/SPS"):
        assert summary[name] == pytest.approx(scalars[name][40], rel=1e-5)


def as_dict(items) -> dict:
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def read_wandb(path: Path) -> list:
    """The records of a .wandb file: LevelDB's log format after 7 bytes, each record a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a header never crosses a block's end
            position += 32768 - position % 32768
        length, kind = struct.unpack_from("<HB", data, position + 4)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            records.append(Record.FromString(part))
            part = b""
    return records
