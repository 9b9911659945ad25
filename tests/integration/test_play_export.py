"""benchmark/play.py and benchmark/export.py on runs that the scripts have just trained."""

import json
import os
import signal
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from processes import SMALL, Run, flags, only_run

pytest.importorskip("onnxruntime", reason="the benchmark extra is not installed: uv run --extra benchmark pytest")
import export
import imageio.v3 as imageio
import onnxruntime
import pandas as pd
import play

pytestmark = pytest.mark.xdist_group("play")
STEPS = 40
SECOND = STEPS // 2  # of three evaluations
ROBOT = "faulty_envs:Robot-v0"
PAVE = ("td3_pave.py", "Pendulum-v1")
NESTED = ("baselines/td3.py", "faulty_envs:Nested-v0")
LOCKED = ("baselines/sac_asap.py", "faulty_envs:Locked-v0")
RESCALED = ("baselines/ppo.py", "faulty_envs:Rescaled-v0")
RUNS = [PAVE, NESTED, LOCKED, RESCALED]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(script, env_id): the folder of its run with the seeds 1 and 2, made once."""

    @cache
    def train(script: str, env_id: str) -> Path:
        cwd = tmp_path_factory.mktemp("run")
        values = {"env_id": env_id, "num_seeds": 2, "num_envs": 1, "total_timesteps": STEPS, "eval_every": SECOND}
        values["env_kwargs"] = '{"length": 15}' if env_id == NESTED[1] else "{}"
        Run(script, *flags(script, **SMALL | values), cwd=cwd).wait(0)
        return only_run(cwd)

    return train


@pytest.mark.parametrize("path, env_id", RUNS)
def test_scores_are_those_of_the_evaluation(trained, capsys, path, env_id):
    folder = trained(path, env_id)
    play.main(play.Args(folder, seed=2, step=SECOND, episodes=2))
    rows = pd.read_csv(folder / "eval.csv").query("seed == 2 and step == @SECOND")
    _, *lines = capsys.readouterr().out.splitlines()
    for line, column in zip(lines, ("return", "length", "smoothness", "action_fluctuation"), strict=True):
        values = rows[column].to_numpy()
        printed = [float(word) for word in line.rsplit(maxsplit=3)[1::2]]  # mean, deviation
        np.testing.assert_allclose(printed, [values.mean(), values.std()], rtol=5e-3, atol=5e-3 * abs(printed[0]))


def test_a_changed_copy_of_a_script(trained, tmp_path, capsys, monkeypatch):
    """A run is loaded with the script that trained it."""
    monkeypatch.syspath_prepend(tmp_path)
    copy = tmp_path / "my_td3.py"
    copy.write_text((ROOT / "baselines/td3.py").read_text().replace("F.relu", "torch.sin"))
    test_scores_are_those_of_the_evaluation(trained, capsys, str(copy), "Pendulum-v1")


@pytest.mark.parametrize("env_id, dt", [("Pendulum-v1", 0.05), ("Reacher-v5", 0.02), ("LunarLander-v3", 0.02)])
def test_time_step(env_id, dt):
    """Pendulum-v1's render_fps is 30; LunarLander-v3 has no dt."""
    assert play.time_step(load_script("td3_pave.py").make_env(env_id)) == pytest.approx(dt)


def test_delay_is_in_steps_and_noise_in_deviations(trained):
    player = play.load_player(trained(*NESTED))
    box = player.env.action_box
    (late,) = play.play(player, [3], play.Disturbance(delay=2))
    at_once = [player.script.in_own_units(play.act(player.agent, row), box) for row in late.observations]
    np.testing.assert_array_equal(late.actions, at_once[:1] * 2 + at_once[:-2])
    player.agent.actor = lambda observations: observations / 10  # its actions show what it sees
    (noisy,) = play.play(player, [3], play.disturbance_of(0.5, 0, [[late]]))
    noise = noisy.actions - player.script.in_own_units(noisy.observations / 10, box)
    expected = 0.5 * late.observations.std(0) / 10 * (box.high - box.low).ravel() / 2
    np.testing.assert_allclose(noise.std(0), expected, rtol=0.5)


def test_film_and_figure_of_two_disturbed_runs(trained, tmp_path):
    left = trained("baselines/td3.py", "Pendulum-v1")
    words = "--episodes 1 --noise 0.5 --delay 2 --gif --seconds 1 --plot".split()
    run = Run("benchmark/play.py", left, trained(*PAVE), *words, cwd=tmp_path / "film").wait(0)
    assert "noise 0.5, delay 2" in run.output
    (film,) = left.glob("play_*_beside_*.mp4")
    frames = imageio.imread(film, plugin="FFMPEG").astype(int)
    assert frames.shape == (20, 500, 1000, 3)  # in real time: a step takes 0.05 s
    assert np.abs(frames[-1, :, :500] - frames[-1, :, 500:]).max() > 100  # each its own policy
    assert imageio.imread(film.with_suffix(".png")).std() > 10
    moving = imageio.imread(film.with_suffix(".gif"), index=None).astype(int)
    assert moving.shape[:3] == (15, 250, 500) and np.abs(moving[-1] - moving[0]).max() > 100


def test_interrupted_film_leaves_nothing(trained, tmp_path):
    folder = trained(*PAVE)
    run = Run("benchmark/play.py", folder, "--episodes", 1, "--film", cwd=tmp_path / "film")
    run.until(lambda: [*folder.glob("*.part.mp4")])
    os.killpg(run.pid, signal.SIGINT)  # ffmpeg gets it too, as from a terminal
    run.wait(130)
    assert "Traceback" not in run.errors and not [*folder.glob("*.mp4")]


def test_mistakes_end_in_one_line(trained, tmp_path):
    pendulum = trained(*PAVE)
    robot = trained(*NESTED)
    for words, message in [
        (["runs/none"], "runs/none: not a run"),
        ([pendulum, "--seed", 3], f"seeds 1 to 2 and policies of the steps 0, {SECOND}, {STEPS}"),
        ([pendulum, robot], "is of another environment"),
        ([robot, "--film"], f"{NESTED[1]} takes no render_mode"),
        ([trained("baselines/td3.py", "Hopper-v5"), "--film"], "MUJOCO_GL=egl and libegl1"),
    ]:
        before = partial(os.environ.update, MUJOCO_GL="disabled")
        run = Run("benchmark/play.py", *words, cwd=tmp_path / "cwd", before=before).wait(2)
        assert message in run.errors and run.errors.count("\n") == 1


@pytest.mark.parametrize("path, env_id", RUNS)
def test_exported_policies(trained, path, env_id):
    """Both formats act as the script's own agent does, in the environment's units, and say what they are."""
    folder = trained(path, env_id)
    export.main(export.Args(folder, seed=2))
    session = onnxruntime.InferenceSession(folder / f"policy_seed2_step{STEPS:09d}.onnx")
    about = session.get_modelmeta().custom_metadata_map
    same = dict.fromkeys(about, "")
    module = torch.export.load(folder / f"policy_seed2_step{STEPS:09d}.pt2", extra_files=same).module()
    assert same == about
    player = play.load_player(folder, seed=2)
    box = player.env.action_box
    O = player.env.observation_space.shape[0]
    observations = np.random.default_rng(0).uniform(-8, 8, (100, O)).astype(np.float32)
    expected = player.script.in_own_units(np.stack([play.act(player.agent, row) for row in observations]), box)
    for part in (slice(100), slice(1)):
        (exported,) = session.run(None, {"observations": observations[part]})
        np.testing.assert_allclose(exported, expected[part], rtol=0, atol=1e-5)
        np.testing.assert_allclose(module(torch.from_numpy(observations[part])), expected[part], rtol=0, atol=1e-5)

    known = {"env_id": env_id, "env_kwargs": player.args.env_kwargs, "seed": "2", "step": f"{STEPS}"}
    assert known.items() <= about.items()
    rows = pd.read_csv(folder / "eval.csv").query("seed == 2 and step == @STEPS")
    assert json.loads(about["return"]) == pytest.approx(rows["return"].mean())
    low, high, shape = (json.loads(about[name]) for name in ("action_low", "action_high", "action_shape"))
    np.testing.assert_allclose(np.reshape([low, high], [2, *shape]), [box.low, box.high])
    parts = {part["path"]: part["size"] for part in json.loads(about["observation_parts"])}
    assert parts == ({"clock/0": 3, "clock/1": 1, "place": 2} if O == 6 else {"": O})
