"""What README.md says: its commands run, shortened, one after another in one folder; its code is the tests' code."""

import glob
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SHORT = {  # flags that end a command in seconds
    "td3_ams.py": "--total-timesteps 40 --learning-starts 30 --batch-size 16 --num-envs 1 --eval-episodes 1 --no-compile",
    "sac_pave.py": "--total-timesteps 300 --learning-starts 100 --eval-episodes 2 --no-compile",
    "sweep.py": "--scale 0.001 --seeds 1 --only Pendulum-v1 base --flags='--no-compile --eval-episodes 1'",
    "speed.py": "'baselines/td3.py --env-id Pendulum-v1 --no-compile' --rounds 1 --settle 300 --steps 50",
    "play.py": "--episodes 2",
}
COMMANDS = [line.split("   #")[0] for line in re.findall(r"^(?:pip install uv && )?uv run (.*\.py.*)$", README, re.M)]


@pytest.mark.slow
def test_commands(tmp_path):
    pytest.importorskip("ray")  # the extra
    for command in COMMANDS:
        script, *flags = shlex.split(command.replace("--extra benchmark ", ""))
        flags = [word for flag in flags for word in (glob.glob(flag, root_dir=tmp_path) if "*" in flag else [flag])]
        assert "runs/*" not in command or flags, command
        command = [sys.executable, str(ROOT / script), *flags, *shlex.split(SHORT.get(script.split("/")[-1], ""))]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (command, done.stderr[-2000:])
    for pattern in ("*sac_pave*/*.mp4", "*sac_pave*/*.png", "*sac_pave*/*.onnx", "*sac_pave*/*.pt2"):
        assert glob.glob(f"runs/{pattern}", root_dir=tmp_path), pattern
    assert (tmp_path / "report/report.html").exists()


def test_the_pave_to_copy_is_the_tests_reference():
    assert (ROOT / "tests/reference_pave.py").read_text().split('"""\n\n', 1)[1].strip() in README


def test_files_named_exist():
    for path in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).exists(), path
