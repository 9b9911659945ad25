"""benchmark/play.py and benchmark/export.py on runs that the scripts have just trained."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script, run_script
from same_code import ROOT

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra benchmark is not installed")
imageio = pytest.importorskip("imageio.v3")
sys.path.append(str(ROOT / "benchmark"))
import export  # noqa: E402
import play  # noqa: E402

pytestmark = pytest.mark.xdist_group("play")
STEPS = 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(script): the folder of its run on Pendulum-v1 with the seeds 1 and 2, made once."""
    root, folders = tmp_path_factory.mktemp("runs"), {}

    def train(script: str) -> Path:
        if script not in folders:
            flags = ["--env-id", "Pendulum-v1", "--num-seeds", 2, "--total-timesteps", STEPS, "--eval-every", STEPS // 2]
            flags += ["--eval-episodes", 2]
            if "ppo" in script:
                flags += ["--num-steps", 16, "--num-envs", 2, "--num-minibatches", 4]
            else:
                flags += ["--learning-starts", 16, "--batch-size", 16, "--no-compile"]
            process = run_script(script, *flags, cwd=root)
            assert process.returncode == 0, process.stderr
            folders[script] = root / process.stdout.splitlines()[0]
        return folders[script]

    return train


def test_scores_are_those_of_the_evaluation(trained, capsys):
    folder = trained("baselines/td3.py")
    play.main(play.Args(folder, seed=2, step=STEPS // 2, episodes=2))
    header, *lines = capsys.readouterr().out.splitlines()
    assert "Pendulum-v1, seed 2, step 32, 2 episodes" in header
    with open(folder / "eval.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == "2" and row["step"] == str(STEPS // 2)]
    assert len(rows) == 2
    for line, column in zip(lines, ("return", "length", "smoothness", "action_fluctuation"), strict=True):
        mean, deviation = map(float, line.rsplit(maxsplit=3)[1::2])
        values = np.array([float(row[column]) for row in rows])
        np.testing.assert_allclose([mean, deviation], [values.mean(), values.std()], rtol=5e-3, atol=1e-3 * abs(mean))


def test_two_runs_side_by_side(trained, tmp_path):
    """A film in real time and a figure, without a display; the film is with the run's own page too."""
    left, right = trained("baselines/td3.py"), trained("td3_pave.py")
    flags = [left, right, "--episodes", 1, "--film", "--plot", "--track"]
    process = run_script("benchmark/play.py", *flags, cwd=tmp_path, WANDB_MODE="offline", DISPLAY="")
    assert process.returncode == 0, process.stderr
    (film,), (figure,) = left.glob("play_*_beside_*.mp4"), left.glob("play_*_beside_*.png")
    properties = imageio.immeta(film, plugin="FFMPEG")
    assert properties["fps"] == 20 and properties["size"] == (1000, 500)
    frames = imageio.imread(film, plugin="FFMPEG")
    assert len(frames) == 200
    assert np.abs(frames[100, :, :500].astype(int) - frames[100, :, 500:]).max() > 100  # each its own policy
    assert imageio.imread(figure).std() > 10
    (uploaded,) = tmp_path.glob(f"wandb/offline-run-*-{left.name}/files/media/videos/play/film*.mp4")
    assert uploaded.read_bytes() == film.read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [({"run": Path("runs/none")}, "runs/none"), ({"seed": 3}, "seeds 1 to 2"), ({"step": 7}, "steps 0, 32, 64")],
)
def test_mistakes_end_in_one_line(trained, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        play.main(play.Args(**{"run": trained("baselines/td3.py"), **change}))
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


def test_where_nothing_renders(trained, tmp_path):
    """One line with the remedy, from the first frame: no film is begun."""
    arguments = json.loads((trained("baselines/td3.py") / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(arguments | {"env_id": "Hopper-v5"}))
    (tmp_path / "policies").mkdir()
    torch.save({"actor": load_script("baselines/td3.py").Actor(2, 11, 3).state_dict()}, tmp_path / "policies/step_000000000.pt")
    process = run_script("benchmark/play.py", tmp_path, "--film", cwd=tmp_path, MUJOCO_GL="disabled")
    assert process.returncode == 2 and "MUJOCO_GL=egl and libegl1" in process.stderr
    assert process.stderr.count("\n") == 1 and not [*tmp_path.glob("*.mp4")]
    process = run_script("benchmark/play.py", trained("baselines/td3.py"), tmp_path, cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.endswith(
        f"is of another environment than {trained('baselines/td3.py')}\n"
    )


@pytest.mark.parametrize("script", ["td3_pave.py", "baselines/sac_asap.py", "baselines/ppo.py"])
def test_exported_policies_act_as_the_script(trained, capsys, script):
    """Both formats against the script's own actor, all seeds of it, on 1000 observations at once and on one."""
    folder, observations = trained(script), np.random.default_rng(0).uniform(-8, 8, (1000, 3)).astype(np.float32)
    export.main(export.Args(folder, seed=2))
    printed = capsys.readouterr().out
    assert printed.count(" us a call") == 2
    actor = load_script(script).Actor(2, 3, 1)
    actor.load_state_dict(torch.load(folder / f"policies/step_{STEPS:09d}.pt", weights_only=True)["actor"])
    with torch.no_grad():
        output = actor(torch.from_numpy(observations).expand(2, -1, -1))
    actions = {"td3": lambda: output, "sac": lambda: output[0].tanh(), "ppo": lambda: output.clamp(-1, 1)}
    expected = 2 * actions[Path(script).stem[:3]]()[1].numpy()  # Pendulum's torque is within +-2
    assert expected.std() > 1e-3

    session = onnxruntime.InferenceSession(folder / f"policy_seed2_step{STEPS:09d}.onnx")
    assert [node.type for node in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2
    module = torch.export.load(folder / f"policy_seed2_step{STEPS:09d}.pt2").module()
    for batch, target in ((observations, expected), (observations[:1], expected[:1])):
        np.testing.assert_allclose(session.run(None, {"observations": batch})[0], target, rtol=0, atol=1e-5)
        np.testing.assert_allclose(module(torch.from_numpy(batch)).numpy(), target, rtol=0, atol=1e-5)
