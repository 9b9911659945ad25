"""Every script end to end, as a user runs it: the files of a run, resume, kills, wandb, video, and what mistakes get.

Most runs are `__main__` of the script in this process (starting Python with torch costs 5 s); those that are killed,
and those on dog-run, are processes of their own.
"""

import csv
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import moviepy
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, run_script, start_script
from regions import scripts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = [str(path.relative_to(ROOT)) for path in scripts()]
METHODS = ["baselines/td3.py", *(path for path in SCRIPTS if "/" not in path)]  # the costlier checks
LEFT = [path for path in SCRIPTS if path not in ("td3_ams.py", "sac_pave.py", "baselines/ppo.py")]  # CI's 15 minutes
COMPILED = ["td3_ams.py", "sac_pave.py", *(pytest.param(path, marks=pytest.mark.slow) for path in LEFT)]
COLUMNS = ["step", "transitions", "seed", "episode", "return", "length", "smoothness"]

SMALL = {  # a few hundred steps in a second; a script gets the flags that it has
    "env_id": "Pendulum-v1",
    "num_seeds": 2,
    "num_envs": 2,
    "total_timesteps": 240,
    "learning_starts": 100,
    "batch_size": 16,
    "hidden_sizes": (16, 16),
    "eval_every": 120,
    "eval_episodes": 1,
    "log_every": 40,
    "num_steps": 40,  # ppo.py
    "device": "cpu",
}


class Outcome(NamedTuple):
    status: int
    output: str
    errors: str


def small_flags(path: str, **changes) -> list[str]:
    known = {field.name for field in fields(load_script(path).Args)}
    flags = []
    for name, value in {**SMALL, **changes}.items():
        if name in known:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


@contextmanager
def in_folder(cwd: Path) -> Iterator[None]:
    """The working directory is cwd; and Ctrl-C and SIGTERM, which a run takes over, are pytest's again afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def main(monkeypatch, capfd, tmp_path):
    """main(path, *flags, cwd=tmp_path) -> Outcome: the script's __main__, in this process."""

    def run(path: str, *flags: object, cwd: Path = tmp_path) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(ROOT / path), *map(str, flags)])
        capfd.readouterr()
        status = 0
        with in_folder(cwd):
            try:
                runpy.run_path(str(ROOT / path), run_name="__main__")
            except SystemExit as stop:
                status = stop.code
        return Outcome(status, *capfd.readouterr())

    return run


def train(path: str, cwd: Path, **changes) -> Path:
    """A small run in the folder cwd, in this process; returns the run's folder."""
    script, before = load_script(path), set(cwd.glob("runs/*"))
    with in_folder(cwd):
        script.train(script.parse_args(small_flags(path, **changes)))
    (folder,) = set(cwd.glob("runs/*")) - before
    return folder


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def read_eval(folder: Path) -> list[dict]:
    with open(folder / "eval.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_scalars(folder: Path) -> dict[str, list]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def check_files(folder: Path, path: str, env_id: str, steps: list[int], episode_length: int) -> None:
    """All that DESIGN.md lists, readable, and in agreement."""
    script, total = load_script(path), steps[-1]
    arguments = json.loads((folder / "args.json").read_text())
    assert re.fullmatch(rf"{env_id}__{Path(path).stem}__1__\d+(_\d+)?", folder.name)
    assert (arguments["script"], arguments["env_id"], arguments["total_timesteps"]) == (Path(path).stem, env_id, total)

    with open(folder / "eval.csv", newline="") as file:
        assert next(csv.reader(file)) == COLUMNS
    rows = read_eval(folder)
    keys = [(int(row["step"]), int(row["transitions"]), int(row["seed"]), int(row["episode"])) for row in rows]
    assert keys == [(step, 2 * step, seed, 0) for step in steps for seed in (1, 2)]
    assert {int(row["length"]) for row in rows} == {episode_length}
    assert all(np.isfinite(float(row["return"])) and float(row["smoothness"]) >= 0 for row in rows)

    scalars = read_scalars(folder)
    for name in ("charts/SPS", "charts/transitions", "eval/return", "eval/smoothness"):
        assert name in scalars, name
    assert any(name.startswith("losses/") for name in scalars)
    assert [event.step for event in scalars["eval/return"]] == steps
    for step, event in zip(steps, scalars["eval/return"]):
        returns = [float(row["return"]) for row in rows if int(row["step"]) == step]
        assert event.value == pytest.approx(np.mean(returns), rel=1e-5)
    assert (scalars["charts/transitions"][-1].step, scalars["charts/transitions"][-1].value) == (total, 2 * total)

    checkpoint = load(folder / "checkpoint.pt")
    assert checkpoint["step"] == total
    policies = sorted((folder / "policies").iterdir())
    assert [policy.name for policy in policies] == [f"step_{step:09d}.pt" for step in steps]
    first, last = load(policies[0]), load(policies[-1])
    assert last.keys() == {"actor", "critic"}
    for name, network in last.items():
        for key, tensor in network.items():
            assert torch.equal(tensor, checkpoint["modules"][name][key])
        assert any(not torch.equal(tensor, first[name][key]) for key, tensor in network.items()), f"{name} did not learn"
    if "save_replay" in script.Args.__dataclass_fields__:
        rows = load(folder / "replay.pt")["rows"]
        assert rows.shape[:2] == (2, 2 * total) and torch.isfinite(rows).all()
    assert not list(folder.rglob("*.tmp"))


@pytest.fixture(scope="module", params=[pytest.param(path, marks=pytest.mark.xdist_group(path)) for path in SCRIPTS])
def small_run(request, tmp_path_factory) -> tuple[str, Path]:
    """(script, folder of its run) on Pendulum-v1; the tests must leave the folder as it is."""
    return request.param, train(request.param, tmp_path_factory.mktemp("small"))


def test_a_run_writes_every_file(small_run):
    path, folder = small_run
    check_files(folder, path, "Pendulum-v1", [0, 120, 240], 200)
    scalars = read_scalars(folder)
    assert {"charts/episodic_return", "charts/episodic_length"} <= scalars.keys()
    assert scalars["charts/episodic_length"][0].value == 200


def test_initial_weights_of_a_seed_do_not_depend_on_the_others(small_run, tmp_path):
    path, folder = small_run
    together = load(folder / "policies/step_000000000.pt")
    alone = load(train(path, tmp_path, num_seeds=1, seed=2, total_timesteps=1) / "policies/step_000000000.pt")
    for name, network in alone.items():
        for key, tensor in network.items():
            assert torch.equal(tensor[0], together[name][key][1]), key
            assert not torch.equal(tensor[0], together[name][key][0]) or tensor.unique().numel() == 1, key


class Jolted(gym.Wrapper):
    """Pendulum with a reward and an observation of its own for the environments reset with one of the seeds in jolted."""

    jolted: tuple[int, ...] = ()

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.jolt = 0.1 * (seed in self.jolted)
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        return observation + np.float32(self.jolt), reward + self.jolt, *rest


def test_seeds_do_not_touch_each_other(small_run, tmp_path, monkeypatch):
    """Other data for seed 2: seed 1's networks and optimisers stay the same, bit for bit, over all updates."""
    path, _ = small_run
    gym.register("Jolted-v0", lambda **kwargs: Jolted(gym.make("Pendulum-v1", **kwargs)), max_episode_steps=200)
    script = load_script(path)
    flags = {"env_id": "Jolted-v0", "vector_env": "sync", "total_timesteps": 140}
    seeds = script.env_seeds(script.parse_args(small_flags(path, **flags)), 2, 0, 0)
    states = []
    for jolted in ((), tuple(seeds[2:])):
        monkeypatch.setattr(Jolted, "jolted", jolted)
        states.append(load(train(path, tmp_path, **flags) / "checkpoint.pt")["modules"])
    compared = 0
    for name, state in states[0].items():
        for one, other in zip(stacked_tensors(state), stacked_tensors(states[1][name])):
            assert torch.equal(one[0], other[0]), name
            compared += not torch.equal(one[1], other[1])
    assert compared > 20  # and seed 2's do change


def stacked_tensors(state: dict) -> list[torch.Tensor]:
    """The tensors of a network's or an optimiser's state_dict whose first axis is the seed."""
    if "param_groups" in state:
        return [tensor for entry in state["state"].values() for tensor in entry.values() if tensor.dim()]
    return [tensor for tensor in state.values() if tensor.dim()]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("path", COMPILED)
def test_a_compiled_run_learns_what_an_eager_one_does(path, tmp_path):
    """The same numbers drawn, 60 updates: the networks agree; loss and gradients are one graph each, without a break."""
    from torch._dynamo.utils import counters

    counters.clear()
    flags = {"total_timesteps": 70, "learning_starts": 10}
    with torch._inductor.config.patch(fallback_random=True):  # else compiled code has a generator of its own
        folders = [train(path, tmp_path, compile=compiled, **flags) for compiled in ("off", "on")]
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 2
    eager, compiled = (load(folder / "checkpoint.pt")["modules"] for folder in folders)
    networks = [name for name in eager if not name.endswith("optimizer")]  # Adam's moments scatter more: Curv has a kink
    for name in networks:
        for tensor, other in zip(stacked_tensors(eager[name]), stacked_tensors(compiled[name])):
            torch.testing.assert_close(other, tensor, atol=2e-4, rtol=2e-3, msg=lambda text: f"{name}: {text}")


def test_no_gradient_flows_into_the_targets(small_run, tmp_path):
    """With tau 0 the target networks keep their initial weights, bit for bit, while the online ones learn."""
    path, _ = small_run
    if "tau" not in {field.name for field in fields(load_script(path).Args)}:
        pytest.skip("no target network")
    folder = train(path, tmp_path, tau=0, total_timesteps=140)
    start, end = load(folder / "policies/step_000000000.pt"), load(folder / "checkpoint.pt")["modules"]
    targets = [name for name in start if f"target_{name}" in end]
    assert "critic" in targets
    for name in targets:
        weights = {key: initial for key, initial in start[name].items() if key.endswith(("weight", "bias"))}
        for key, initial in weights.items():
            assert torch.equal(end[f"target_{name}"][key], initial), key
        assert any(not torch.equal(end[name][key], initial) for key, initial in weights.items())


def test_sigterm_saves_and_resume_goes_on(main, small_run, tmp_path):
    """SIGTERM in the middle of a run: exit status 0, the resume command on the last line, and that command goes on."""
    path, _ = small_run

    ended = threading.Event()

    def terminate_this_process():
        wait_for_evaluation(tmp_path, 120)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    terminate = threading.Thread(target=terminate_this_process, daemon=True)
    terminate.start()
    try:
        stopped = main(path, *small_flags(path, total_timesteps=40_000, log_every=20))
    finally:
        ended.set()
    (folder,) = (tmp_path / "runs").iterdir()
    assert stopped.status == 0 and "stopping: saving the run" in stopped.errors
    step = load(folder / "checkpoint.pt")["step"]
    assert stopped.output.splitlines()[-1] == (
        f"runs/{folder.name}: stopped at step {step}, go on with: python {ROOT / path} --resume runs/{folder.name}"
    )
    rows = read_eval(folder)
    total = step + 100
    resumed = main(path, "--resume", f"runs/{folder.name}", "--total-timesteps", total)
    assert (resumed.status, resumed.output.splitlines()[-1]) == (0, f"runs/{folder.name}: finished")
    check_continued(folder, path, rows, total)


def wait_for_evaluation(cwd: Path, step: int) -> None:
    """Returns once the run in cwd has evaluated its policy at step, or after five minutes."""
    deadline = time.monotonic() + 300
    while not list(cwd.glob(f"runs/*/policies/step_{step:09d}.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)


def check_continued(folder: Path, path: str, rows: list[dict], total: int) -> None:
    """The run in folder, whose eval.csv held rows, went on to total."""
    checkpoint, evaluations = load(folder / "checkpoint.pt"), read_eval(folder)
    assert checkpoint["step"] == total and int(evaluations[-1]["step"]) == total
    assert evaluations[: len(rows)] == rows
    keys = [(row["step"], row["seed"]) for row in evaluations]
    assert len(set(keys)) == len(keys)  # no evaluation twice
    if "save_replay" in load_script(path).Args.__dataclass_fields__:
        assert load(folder / "replay.pt")["rows"].shape[:2] == (2, 2 * total)  # what was stored before is still there


KILLS = [(path, signal.SIGKILL) for path in METHODS] + [(path, signal.SIGTERM) for path in ("baselines/td3.py", "td3_ams.py")]


@pytest.mark.parametrize("path, number", KILLS)
def test_resume_after_a_kill(main, path, number, tmp_path):
    """A process with parallel environments; SIGKILL loses only what came after the last checkpoint, SIGTERM nothing."""
    changes = {"total_timesteps": 40_000, "checkpoint_seconds": 0.1, "log_every": 20, "vector_env": "async"}
    process = start_script(path, *small_flags(path, **changes), cwd=tmp_path)
    wait_for_evaluation(tmp_path, 240)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL), errors
    (folder,) = (tmp_path / "runs").iterdir()
    step = load(folder / "checkpoint.pt")["step"]  # whole, whenever the signal came
    assert step >= 240 if number == signal.SIGTERM else step > 0
    rows = [row for row in read_eval(folder) if int(row["step"]) <= step]
    resumed = main(path, "--resume", folder, "--total-timesteps", step + 50, "--vector-env", "sync")
    assert (resumed.status, resumed.output.splitlines()[-1]) == (0, f"{folder}: finished")
    check_continued(folder, path, rows, step + 50)


@pytest.mark.parametrize("path", ["baselines/td3.py", "td3_ams.py"])
def test_dog_run_with_wandb(path, tmp_path):
    """A process of its own, its environments in parallel; --track without a network."""
    flags = small_flags(path, env_id="dog-run", vector_env="async", total_timesteps=200, eval_every=200)
    process = run_script(path, *flags, "--track", cwd=tmp_path, WANDB_MODE="offline")
    assert process.returncode == 0, process.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    check_files(folder, path, "dog-run", [0, 200], 1000)

    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    config, history = read_wandb(record)
    assert (config["env_id"], config["num_seeds"], config["total_timesteps"]) == ("dog-run", 2, 200)
    logged = {name: [event.step for event in events] for name, events in read_scalars(folder).items()}
    for name, steps in logged.items():  # the names of TensorBoard reach wandb, at the same steps
        assert [row["_step"] for row in history if name in row] == steps, name
    assert {"losses/qf_loss", "losses/actor_loss", "eval/return", "charts/SPS"} <= logged.keys()


def read_wandb(path: Path) -> tuple[dict, list[dict]]:
    """(config, rows of the history) of a .wandb file: LevelDB's log format after 7 bytes, each record a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record, config, history = path.read_bytes(), 7, b"", {}, []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a header never crosses a block's end
            position += 32768 - position % 32768
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            message = Record.FromString(record)
            record = b""
            config |= {item.key: json.loads(item.value_json) for item in message.run.config.update}
            if message.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in message.history.item}
                history.append({**items, "_step": message.history.step.num})
    return config, history


@pytest.mark.parametrize("path", METHODS)
def test_capture_video_writes_the_evaluation_policy(path, tmp_path):
    folder = train(path, tmp_path, total_timesteps=1, capture_video=True)
    videos = sorted((folder / "videos").iterdir())
    assert [video.name[:14] for video in videos] == ["step_000000000", "step_000000001"]
    for video in videos:
        with moviepy.VideoFileClip(str(video)) as clip:
            frames = [clip.get_frame(second) for second in (0, clip.duration / 2)]
            assert clip.duration * clip.fps == pytest.approx(200, abs=2)
        assert frames[0].std() > 5 and np.abs(frames[0] - 1.0 * frames[1]).mean() > 0.1


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def check_mistake(outcome: Outcome, path: str, *expected: str) -> None:
    assert outcome.status == 2
    assert outcome.errors.count("\n") == 1 and outcome.errors.startswith(f"{Path(path).name}: "), outcome.errors
    for text in expected:
        assert text in outcome.errors
    assert not outcome.output


MISTAKES = {  # flags -> what the line says
    "--env-id dog-rnu": ["no environment is called 'dog-rnu'; the closest: dog-run"],
    "--env-id Walker2d-v55": ["no environment is called 'Walker2d-v55'; the closest: Walker2d-v5"],
    "--env-id nothing/like-it-v0": ["no environment is called 'nothing/like-it-v0'"],
    "--env-id CartPole-v1": ["CartPole-v1 has the action space Discrete(2); it must be continuous"],
    "--env-id CarRacing-v3": ["CarRacing-v3 has the observation space", "must be a vector, not an image"],
    "--num-neighbors 0": ["--num-neighbors must be from 1 to", "not 0"],
    "--radius -0.1": ["--radius must be from 0 to 2, not -0.1"],
    "--radius nan": ["--radius must be from 0 to 2, not nan"],
    "--learning-rate 0": ["--learning-rate must be above 0, at most 1, not 0"],
    "--learning-rate inf": ["--learning-rate must be above 0, at most 1, not inf"],
    "--tau 1.5": ["--tau must be from 0 to 1, not 1.5"],
    "--gamma -0.5": ["--gamma must be from 0 to 1, not -0.5"],
    "--gamma nan": ["--gamma must be from 0 to 1, not nan"],
    "--hidden-sizes 64 0": ["--hidden-sizes must be from 1 to", "not (64, 0)"],
    "--batch-size 200 --buffer-size 100": ["--buffer-size must be at least --batch-size", "not 100"],
    "--resume runs/none": ["--resume runs/none: no run of this script"],
    "--device cuda": ["--device cuda: PyTorch finds no CUDA device here; use --device cpu"],
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(main, flags, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("CUDA is there")
    outcome = main("td3_ams.py", "--env-id", "Pendulum-v1", *flags.split())
    check_mistake(outcome, "td3_ams.py", *MISTAKES[flags])
    assert not list(tmp_path.iterdir())


def test_a_mistake_seen_from_the_shell(tmp_path):
    process = run_script("td3_ams.py", "--env-id", "dog-rnu", cwd=tmp_path)
    check_mistake(Outcome(process.returncode, process.stdout, process.stderr), "td3_ams.py", "the closest: dog-run")
    assert not list(tmp_path.iterdir())


def test_tracking_without_an_account_is_a_mistake(main, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    outcome = main("td3_ams.py", "--env-id", "Pendulum-v1", "--track")
    check_mistake(outcome, "td3_ams.py", "--track:", "WANDB_MODE=offline needs no account")
    assert not list(tmp_path.iterdir())


def test_resume_refuses_what_is_not_its_run(main, small_run, tmp_path):
    """Another script's run, another environment's, a folder that is no run, a damaged checkpoint or replay."""
    path, folder = small_run
    before = contents(folder)
    other = SCRIPTS[SCRIPTS.index(path) - 1]
    check_mistake(main(other, "--resume", folder), other, f"that run was made by {Path(path).name}, not by {Path(other).name}")
    check_mistake(main(path, "--resume", folder / "policies"), path, "no run of this script")
    outcome = main(path, "--resume", folder, "--env-id", "Hopper-v5")
    check_mistake(outcome, path, "is a run of env_id Pendulum-v1, not Hopper-v5")
    assert contents(folder) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "replay.pt"])
def test_resume_refuses_a_damaged_file(main, name, damage, damaged_run):
    """The line says how to go on without it."""
    file = damaged_run / name
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[damage])
    before = contents(damaged_run)
    outcome = main("td3_ams.py", "--resume", damaged_run, "--total-timesteps", 2, cwd=damaged_run.parent)
    if (name, damage) == ("replay.pt", "missing"):  # as with --no-save-replay: goes on with an empty one
        assert outcome.status == 0
    else:
        check_mistake(outcome, "td3_ams.py", "start again without --resume", "" if damage == "missing" else name)
        assert contents(damaged_run) == before
    file.write_bytes(whole)


@pytest.fixture(scope="module")
def damaged_run(tmp_path_factory) -> Path:
    """A run of td3_ams.py for its files to be damaged."""
    return train("td3_ams.py", tmp_path_factory.mktemp("damaged"), total_timesteps=1)


class Payload:
    """What a checkpoint from a stranger could hold: loading it with plain pickle would make the folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_resume_runs_no_code_of_a_checkpoint(main, damaged_run, tmp_path):
    file = damaged_run / "checkpoint.pt"
    whole = file.read_bytes()
    torch.save({"version": Payload(tmp_path / "payload")}, file)
    check_mistake(main("td3_ams.py", "--resume", damaged_run), "td3_ams.py", "checkpoint.pt is damaged or does not fit")
    assert not list(tmp_path.iterdir())
    file.write_bytes(whole)
