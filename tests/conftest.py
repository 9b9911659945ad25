"""What every test needs: the scripts as modules and as processes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_script(path: str) -> ModuleType:
    """A script, named from the root (baselines/td3.py), as a module; loaded once."""
    name = "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def start_script(path: str, *flags: object, cwd: Path, **environment: str) -> subprocess.Popen:
    """The script as a user starts it, in the folder cwd, on one thread; its output in pipes, as text."""
    command = [sys.executable, str(ROOT / path), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **environment}
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_script(path: str, *flags: object, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """start_script, to its end."""
    process = start_script(path, *flags, cwd=cwd, **environment)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
