"""README.md's commands run, shortened, one after another in one folder; the files that it names exist."""

import glob
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SHORT = {  # flags that end a command in seconds
    "td3_ams.py": "--total-timesteps 40 --learning-starts 30 --num-envs 1 --eval-episodes 1 --no-compile",
    "td3_pave.py": "--total-timesteps 40 --learning-starts 30 --num-envs 1 --eval-episodes 1 --no-compile",
    "sac_pave.py": "--total-timesteps 300 --learning-starts 100 --eval-episodes 2 --no-compile",
    "sweep.py": "--scale 0.001 --seeds 1 --only Pendulum-v1 base --flags='--no-compile --eval-episodes 1'",
    "speed.py": "'baselines/td3.py --env-id Pendulum-v1 --no-compile' --rounds 1 --settle 300 --steps 50",
    "play.py": "--episodes 2",
    "geometry.py": "runs/Pendulum-v1__sac_pave__*",
}
COMMANDS = re.findall(
    r"^(?:PYTHONPATH=\. )?uv run (?:--extra benchmark )?(\S+\.py.*?)(?:   #.*)?$", README, re.MULTILINE
)


@pytest.mark.slow
def test_commands(tmp_path):
    pytest.importorskip("ray")  # the extra
    robot = "import faulty_envs, gymnasium as gym\ngym.register('Robot-v0', lambda payload: faulty_envs.Point())\n"
    (tmp_path / "my_robot.py").write_text(robot)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent}"}
    for command in COMMANDS:
        script, *words = shlex.split(command)
        words += shlex.split(SHORT.get(Path(script).name, ""))
        words = [path for word in words for path in glob.glob(word, root_dir=tmp_path) or [word]]
        done = subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path, env=environment, timeout=600)
        assert done.returncode == 0, command
    for pattern in ("*sac_pave*/*.mp4", "*sac_pave*/*.png", "*sac_pave*/*.onnx", "*sac_pave*/*.pt2"):
        assert list(tmp_path.glob(f"runs/{pattern}")), pattern
    assert (tmp_path / "report/report.html").exists()


def test_files_named_exist():
    for path in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).exists(), path
