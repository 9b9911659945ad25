"""Vector steps a second of whole training commands, side by side: they take turns, and the median over the rounds counts.

    python benchmark/race.py "td3_ams.py --env-id dog-run" "baselines/td3.py --env-id dog-run --num-envs 8"
    python benchmark/race.py "baselines/td3.py --num-seeds 5" "5 x baselines/td3.py"        # five processes at once
    python benchmark/race.py "td3_ams.py --env-id blind_env:Blind-223-38-v0 --num-envs 1" ...   # the update alone
    python benchmark/race.py "baselines/td3.py" "/path/to/cleanrl/cleanrl/td3_continuous_action.py --env-id HalfCheetah-v4"

A command is a Python script with its flags, from this repository's root or any other that prints its step ("step 500/..." or
"global_step=500"). The clock runs between the first two such lines at or after --settle and --settle + --steps; then the
process is ended. "seed steps" counts the seeds of a process and of all its copies. Run it on a machine that does nothing else.
"""

import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
OURS = ["--learning-starts", "256", "--log-every", "50", "--eval-episodes", "1", "--eval-every", str(10**9), "--no-save-replay"]


@dataclass
class Options:
    commands: tyro.conf.Positional[tuple[str, ...]]
    """scripts with their flags; "5 x script" runs five at once"""
    settle: int = 600
    """vector steps before the clock runs"""
    steps: int = 400
    """vector steps that are timed"""
    rounds: int = 3
    """times each command runs"""
    timeout: float = 600.0
    """seconds after which a command that shows no such step has failed"""


def watch(process: subprocess.Popen, options: Options, rates: list[float]) -> None:
    """Appends the process's vector steps a second, then ends it."""
    first = None
    for line in process.stdout:
        now, match = time.perf_counter(), re.search(r"(?:\bstep |global_step=)(\d+)", line)
        step = int(match[1]) if match else -1
        if first is None and step >= options.settle:
            first = step, now
        elif first and step >= first[0] + options.steps:
            rates.append((step - first[0]) / (now - first[1]))
            break
    process.kill()
    process.wait()


def race(command: str, options: Options) -> float:
    """Seed steps a second of all copies of the command together; raises SystemExit with its last words if it fails."""
    copies, script, flags = re.fullmatch(r"(?:(\d+) x )?(\S+)\s*(.*)", command).groups()
    copies, flags = int(copies or 1), shlex.split(flags)
    if (ROOT / script).exists() and not Path(script).is_absolute():
        script, flags = str(ROOT / script), [*OURS, *flags]  # flags given come later and win
    seeds = int(flags[flags.index("--num-seeds") + 1]) if "--num-seeds" in flags else 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmark"), "PYTHONUNBUFFERED": "1"}
    rates, watchers = [], []
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "errors"), "w+") as errors:
        for _ in range(copies):
            pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
            process = subprocess.Popen([sys.executable, script, *flags], cwd=folder, env=environment, **pipes)
            killer = threading.Timer(options.timeout, process.kill)
            killer.start()
            watchers.append((threading.Thread(target=watch, args=(process, options, rates)), killer))
            watchers[-1][0].start()
        for watcher, killer in watchers:
            watcher.join()
            killer.cancel()
        if len(rates) < copies:
            errors.seek(0)
            sys.exit(f"race.py: {command} ended early: {(errors.read().strip().splitlines() or ['without a word'])[-1]}")
    return sum(rates) * seeds


def main(options: Options) -> None:
    results = {command: [] for command in options.commands}
    for _ in range(options.rounds):
        for command, rates in results.items():
            rates.append(race(command, options))
    reference = statistics.median(results[options.commands[0]])
    print("seed steps a second: median (minimum to maximum), and its ratio to the first command's")
    for command, rates in results.items():
        median = statistics.median(rates)
        print(f"{median:9.1f} ({min(rates):.1f} to {max(rates):.1f})  {median / reference:6.2f} x  {command}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
