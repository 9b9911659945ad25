"""Runs a grid of script x environment x seeds: the papers' tables by name, or any grid, here or over a Ray cluster.

    python benchmark/sweep.py pave-table-2 --only Pendulum-v1 --scale 0.05 --seeds 2
    python benchmark/sweep.py ams-table-2 --address auto --gpus-per-run 0.25
    python benchmark/sweep.py --scripts td3_ams baselines/td3.py --env-ids dog-run --flags="--num-envs 8"

Run it where runs/ is to be. A complete run is skipped and a half-written one goes on, so the same command can be given
again after Ctrl-C, a crash or a power cut. With --address that folder must be on a disk that all machines of the cluster
share, at the same path. A run holds a file lock (runs/.sweep/*.lock) for as long as its script lives: it never runs twice
at once.
"""

import csv
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent

# What the papers' tables are made of. What a script sets by itself for an environment is not repeated here.

PAVE_ENVS = ("LunarLander-v3", "Pendulum-v1", "Reacher-v5", "Ant-v5", "Hopper-v5", "Walker2d-v5")
AMS_ENVS = ("cheetah-run", "humanoid-run", "quadruped-walk", "quadruped-run", "dog-stand", "dog-walk", "dog-trot", "dog-run")
AMS_ENVS += ("h1-sit", "h1-slide", "h1-walk", "h1-run")
PAVE_STEPS = {"Pendulum-v1": 100_000, "LunarLander-v3": 500_000, "Reacher-v5": 500_000}
AMS_STEPS = {"humanoid-run": 1_000_000, "dog-run": 1_000_000}


class Cell(NamedTuple):
    """A figure of a table: one script with these flags on one environment, over some seeds."""

    method: str  # the row's name in benchmark/paper/*.csv
    script: str
    env_id: str
    flags: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def pave_cell(backbone: str, method: str, env_id: str, **flags: Any) -> Cell:
    """PAVE's tables train every method by one protocol ("SiLU-unified"); the plain TD3 and SAC scripts need it spelled out."""
    if method != "base":
        return Cell(method, f"{backbone}_{method}", env_id, flags)
    flags = {"activation": "silu", "learning_starts": 10_000, "total_timesteps": PAVE_STEPS.get(env_id, 1_000_000)}
    if backbone == "td3":
        flags |= {"hidden_sizes": (400, 300), "learning_rate": 1e-3}
        if env_id in ("Pendulum-v1", "LunarLander-v3"):
            flags |= {"gamma": 0.98, "buffer_size": 200_000}
    else:
        flags |= {"policy_lr": 1e-3, "q_lr": 1e-3, "batch_size": 100, "update_every": 50, "policy_frequency": 1}
        flags |= {"autotune": False, "log_std_min": -20.0, "log_std_bound": "clamp", "td_loss_scale": 0.5}
    return Cell(method, backbone, env_id, flags)


def ams_cell(method: str, env_id: str, name: str | None = None, **flags: Any) -> Cell:
    if method in ("ppo", "sac", "td3"):
        flags |= {"num_envs": 8, "total_timesteps": AMS_STEPS.get(env_id, 500_000)}
    return Cell(name or method, method, env_id, flags)


def pave_ablation() -> list[Cell]:
    cells = []
    for present in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)):
        terms = zip(("mpr_weight", "vfc_weight", "curvature_weight"), present)
        flags = {name: 0.0 for name, is_present in terms if not is_present}
        cells.append(pave_cell("td3", "pave", "Walker2d-v5", **flags)._replace(method="".join(map(str, present))))
    return cells


def pave_plus_caps() -> list[Cell]:
    cells = [pave_cell("td3", method, "LunarLander-v3") for method in ("base", "caps", "pave")]
    both = pave_cell("td3", "pave", "LunarLander-v3", caps_temporal_weight=0.1, caps_spatial_weight=0.5)
    return [*cells, both._replace(method="caps+pave")]


def ams_table_3() -> list[Cell]:
    cells, env_id = [], "quadruped-run"
    for backbone in ("td3", "sac"):
        cells.append(ams_cell(backbone, env_id, f"{backbone}:baseline"))
        for variant, flags in (("without_ntd", {"neighborhood": False}), ("without_ln", {"layer_norm": False}), ("ams", {})):
            cells.append(ams_cell(f"{backbone}_ams", env_id, f"{backbone}:{variant}", **flags))
    cells += [ams_cell("td3_ams", env_id, f"td3:radius_{radius}", radius=radius) for radius in (0.2, 0.4, 0.6, 0.8)]
    return cells + [ams_cell("td3_ams", env_id, f"td3:neighbors_{k}", num_neighbors=k) for k in (4, 6, 8, 10)]


PAVE_METHODS = ("base", "caps", "grad", "asap", "pave")
CRITIC_METHODS = ("base", "sn", "gp", "pave")
SUITES: dict[str, list[Cell]] = {
    "pave-table-1": [pave_cell("td3", method, env_id) for env_id in PAVE_ENVS for method in PAVE_METHODS],
    "pave-table-2": [pave_cell("sac", method, env_id) for env_id in PAVE_ENVS for method in PAVE_METHODS],
    "pave-critic-baselines": [
        pave_cell("td3", m, env_id) for env_id in ("LunarLander-v3", "Walker2d-v5") for m in CRITIC_METHODS
    ],
    "pave-ablation": pave_ablation(),
    "pave-plus-caps": pave_plus_caps(),
    "ams-table-2": [ams_cell(method, env_id) for env_id in AMS_ENVS for method in ("ppo", "sac", "td3", "td3_ams", "sac_ams")],
    "ams-table-3": ams_table_3(),
}

# Arguments that do not change what is learned: two runs that differ in these alone are the same run.
INCIDENTAL = {"exp_name", "resume", "log_every", "checkpoint_seconds", "save_replay", "device", "num_threads", "compile"}
INCIDENTAL |= {"cuda_graph", "vector_env", "env_timeout", "track", "wandb_project_name", "wandb_entity", "capture_video"}
BUDGET = ("total_timesteps", "learning_starts", "buffer_size", "eval_every", "log_every")  # what --scale multiplies


class UserError(Exception):
    """A mistake in what the user asked for: one line, exit status 2."""


def script_path(script: str) -> Path:
    """td3_ams, td3_ams.py, baselines/td3 ... -> the file; raises UserError if there is none."""
    name = script.removesuffix(".py") + ".py"
    for path in (ROOT / name, ROOT / "baselines" / name):
        if path.is_file():
            return path
    raise UserError(f"no script is called {script}: looked for {name} and baselines/{name} in {ROOT}")


def load_script(script: str) -> ModuleType:
    """A training script as a module, imported once."""
    path = script_path(script)
    name = f"smoothq_script_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def cell_args(cell: Cell) -> Any:
    """The script's Args with which the cell is trained: its defaults, its table for the environment, the cell's flags."""
    script = load_script(cell.script)
    try:
        return script.Args(**{**script.ENV_SETTINGS.get(cell.env_id, {}), "env_id": cell.env_id, **cell.flags})
    except TypeError as error:
        raise UserError(f"{cell.script}.py does not know a flag of this suite: {error}") from None


def scaled(args: Any, scale: float) -> Any:
    """args with everything that is counted in steps times scale, so that a short run has the shape of a long one."""
    budget = {name: max(1, round(getattr(args, name) * scale)) for name in BUDGET if hasattr(args, name)}
    budget["log_every"] = max(budget["log_every"], 10)
    if "buffer_size" in budget:
        budget["buffer_size"] = max(budget["buffer_size"], args.batch_size, args.num_envs)
    return dataclasses.replace(args, **budget)


class Run(NamedTuple):
    """A folder of runs/."""

    folder: Path
    args: dict[str, Any]  # args.json
    is_complete: bool

    @property
    def seeds(self) -> range:
        return range(self.args["seed"], self.args["seed"] + self.args["num_seeds"])


def read_runs(runs: Path) -> list[Run]:
    """Every run in the folder, oldest first; a folder whose args.json is missing or unreadable is none."""
    found = []
    for path in sorted(runs.glob("*/args.json"), key=lambda path: path.stat().st_mtime):
        try:
            args = json.loads(path.read_text())
            last_step = -1
            if (path.parent / "eval.csv").exists():
                with open(path.parent / "eval.csv", newline="") as file:
                    last_step = max((int(row["step"]) for row in csv.DictReader(file)), default=-1)
            found.append(Run(path.parent, args, last_step == args["total_timesteps"]))
        except (ValueError, KeyError, TypeError, OSError):
            print(f"{path.parent}: passed over, its args.json or eval.csv cannot be read", file=sys.stderr)
    return found


def plain(args: Any) -> dict[str, Any]:
    """Args as args.json has them: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(args)))


def differences(run: Run, wanted: dict[str, Any], defaults: dict[str, Any], ignore: set[str] = frozenset()) -> list[str]:
    """The arguments in which a run differs from wanted, incidental ones aside. One that the script did not have yet when the
    run was made counts as its default."""
    names = wanted.keys() - INCIDENTAL - ignore
    return sorted(name for name in names if run.args.get(name, defaults.get(name)) != wanted[name])


def other_arguments(run: Run, cell: Cell) -> list[str]:
    """The arguments in which a run is not the cell's, however short the run and whatever its seeds and evaluations."""
    if run.args.get("script") != Path(cell.script).stem or run.args.get("env_id") != cell.env_id:
        return ["script" if run.args.get("env_id") == cell.env_id else "env_id"]
    args = cell_args(cell)
    wanted = scaled(args, run.args["total_timesteps"] / args.total_timesteps)
    evaluation = {"seed", "num_seeds", "eval_every", "eval_episodes"}
    other = differences(run, plain(wanted), plain(type(args)()), evaluation)
    rounded = {name for name in BUDGET if name in other and math.isclose(run.args[name], getattr(wanted, name), abs_tol=1)}
    return [name for name in other if name not in rounded]


def is_of(run: Run, cell: Cell) -> bool:
    try:
        return not other_arguments(run, cell)
    except UserError:  # a script that this checkout lacks
        return False


class Task(NamedTuple):
    """One process to run: a script, its arguments, and the folder to run it in."""

    name: str
    script: str
    directory: str
    flags: list[str]
    args: dict[str, Any]
    defaults: dict[str, Any]

    def path(self, suffix: str) -> Path:
        return Path(self.directory) / "runs" / ".sweep" / (self.name + suffix)


def command_line(args: Any, default: Any) -> list[str]:
    """The flags that turn the script's default Args into args."""
    flags = []
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if value == getattr(default, field.name):
            continue
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        else:
            flags += [flag, *(str(part) for part in (value if isinstance(value, tuple) else (value,)))]
    return flags


def plan(cells: list[Cell], options: "Options", runs: list[Run]) -> tuple[list[Task], int]:
    """The tasks still to do, and the number of cells that are complete already."""
    tasks, complete = {}, 0
    for cell in cells:
        script, stem = load_script(cell.script), Path(cell.script).stem
        default = script.Args(**{**script.ENV_SETTINGS.get(cell.env_id, {}), "env_id": cell.env_id})
        args = cell_args(cell)
        changed = command_line(args, default)
        variant = (
            "_".join(re.sub(r"[^\w.-]+", "", word.lstrip("-")) for word in changed)
            if script_path(cell.script).parent == ROOT
            else ""
        )
        args = tyro.cli(script.Args, args=shlex.split(options.flags), default=scaled(args, options.scale))
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        wanted, defaults = {"script": stem, **plain(args)}, plain(script.Args())
        same = [run for run in runs if not differences(run, wanted, defaults, {"seed", "num_seeds"})]
        missing = [seed for seed in seeds if not any(run.is_complete and seed in run.seeds for run in same)]
        complete += not missing
        while missing:  # side by side in one process: consecutive seeds, at most seeds_per_run of them
            size = next((n for n in range(1, len(missing)) if missing[n] != missing[0] + n), len(missing))
            size = min(size, options.seeds_per_run or size)
            block = dataclasses.replace(args, exp_name="_".join(filter(None, (stem, variant))), seed=missing[0], num_seeds=size)
            missing = missing[size:]
            values = {"script": stem, **plain(block)}
            settings = json.dumps({key: value for key, value in values.items() if key not in INCIDENTAL})
            digest = hashlib.sha256(settings.encode()).hexdigest()[:6]
            name = f"{cell.env_id}__{block.exp_name}__{block.seed}-{block.seed + size - 1}__{digest}"
            name = re.sub(r"[^\w.-]", "_", name)
            flags = ["--env-id", cell.env_id, *command_line(block, default)]
            tasks.setdefault(name, Task(name, str(script_path(cell.script)), os.getcwd(), flags, values, defaults))
    return list(tasks.values()), complete


def find_run(task: Task) -> Run | None:
    """The run of this task: a complete one, else the newest that can be resumed."""
    runs = read_runs(Path(task.directory) / "runs")
    same = [run for run in runs if not differences(run, task.args, task.defaults)]
    usable = [run for run in same if run.is_complete or (run.folder / "checkpoint.pt").exists()]
    return sorted(usable, key=lambda run: run.is_complete)[-1] if usable else None


# Between a Ray worker and the script: asks the script to stop (it saves) when the worker closes the pipe or dies, even killed;
# writes its exit status. It forks away from the worker, for Ray kills a dead worker's children, and asks once, for a second
# SIGTERM would end the script unsaved (prctl's death signal comes again from every process that adopts the orphan).
GUARD = """
import os, subprocess, sys, threading
if os.fork():
    os._exit(0)
os.setsid()
script = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=2, close_fds=False)
def stop_at_end_of_input():
    os.read(0, 1)
    script.terminate()
threading.Thread(target=stop_at_end_of_input, daemon=True).start()
status = script.wait() % 256
try:
    os.write(1, bytes([status]))
finally:
    os._exit(status)
"""


def work(task: Task) -> None:
    """Brings a task to its end, from wherever an earlier try left it. Runs on a Ray worker.

    Raises ValueError for a mistake in the arguments (no use in a retry) and RuntimeError for a fault. A KeyboardInterrupt
    (ray.cancel) stops the script, which saves first. The script inherits the open lock, so that the lock outlives a killed
    worker until the script has saved and ended.
    """
    if not Path(task.directory).is_dir():
        raise ValueError(f"{task.directory} is not on {os.uname().nodename}; a cluster needs a folder that all machines share")
    task.path(".lock").parent.mkdir(parents=True, exist_ok=True)
    with open(task.path(".lock"), "w") as lock, open(task.path(".log"), "a") as log:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # an earlier try still saves, or another sweep runs it
                time.sleep(0.2)
        run = find_run(task)
        if run and run.is_complete:
            return
        flags = ["--resume", str(run.folder.relative_to(task.directory))] if run else task.flags
        command = [sys.executable, task.script, *flags]
        print(f"# {os.uname().nodename}, {time.strftime('%F %T')}\n$ {shlex.join(command)}", file=log, flush=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "pass_fds": [lock.fileno()]}
        guard = subprocess.Popen([sys.executable, "-c", GUARD, *command], cwd=task.directory, **pipes)
        try:
            while not select.select([guard.stdout], [], [], 0.1)[0]:  # short waits: ray.cancel interrupts no system call
                pass
        finally:
            guard.stdin.close()
            status = guard.stdout.read(1)  # the script has ended; empty if the guard was killed
            guard.wait()
        if status == b"\0" and (run := find_run(task)) and run.is_complete:
            return
    last_line = (task.path(".log").read_text().strip().splitlines() or [""])[-1]
    code = status[0] if status else "unknown"
    raise (ValueError if code == 2 else RuntimeError)(f"exit status {code}: {last_line}")


class Progress(NamedTuple):
    """What the end of a task's log says."""

    is_running: bool
    step: int = 0
    rate: float = math.nan
    episodic_return: float = math.nan
    tries: int = 0


def read_progress(task: Task, log_start: int) -> Progress:
    """Reads what the log holds past log_start, its size when this sweep began."""
    path = task.path(".log")
    if not path.exists() or path.stat().st_size <= log_start:
        return Progress(False)
    with open(path, errors="replace") as file:
        file.seek(log_start)
        text = file.read()
    lines = re.findall(r"^step (\d+)/\d+(.*)$", text, re.M)
    step, shown = lines[-1] if lines else (0, "")
    values = {name: float(value) for name, value in re.findall(r"(\w+) (\S+)", shown)}
    tries = len(re.findall(r"^\$ ", text, re.M))
    return Progress(True, int(step), values.get("SPS", math.nan), values.get("return", math.nan), tries)


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


@dataclass
class Options:
    suites: tyro.conf.Positional[tuple[str, ...]] = ()
    """pave-table-1, pave-table-2, pave-critic-baselines, pave-ablation, pave-plus-caps, ams-table-2, ams-table-3"""
    scripts: tuple[str, ...] = ()
    """a grid of your own: these scripts (td3_ams, baselines/td3.py) ..."""
    env_ids: tuple[str, ...] = ()
    """... on each of these environments"""
    flags: str = ""
    """flags added to every command, as one string: --flags="--num-envs 4 --device cpu" """
    seeds: int = 5
    """how many seeds"""
    first_seed: int = 1
    """the first of them"""
    seeds_per_run: int = 0
    """most seeds side by side in one process; 0 is all of them"""
    scale: float = 1.0
    """factor of every run's length: steps, warm-up, replay, and the intervals of evaluation and log"""
    only: tuple[str, ...] = ()
    """keep only these environments and methods (Pendulum-v1 pave)"""
    dry_run: bool = False
    """print the commands, start nothing"""
    address: str | None = None
    """a Ray cluster's address, or auto; without it one is started on this machine for as long as the sweep lasts"""
    cpus_per_run: float = 1.0
    """share of the CPU cores that Ray sets aside for a run"""
    gpus_per_run: float | None = None
    """share of a GPU for a run; by default 0.25 where there are GPUs"""
    retries: int = 10
    """how often a run is resumed after its process, its worker or its machine died"""


def select_cells(options: Options) -> list[Cell]:
    """The cells that the options name; raises UserError for a name that is none."""
    for suite in options.suites:
        if suite not in SUITES:
            raise UserError(f"no suite is called {suite}; there are {', '.join(SUITES)}")
    if bool(options.scripts) != bool(options.env_ids) or not (options.suites or options.scripts):
        raise UserError(f"name a suite ({', '.join(SUITES)}), or a grid with --scripts and --env-ids")
    cells = [cell for suite in options.suites for cell in SUITES[suite]]
    cells += [Cell(Path(script).stem, script, env_id) for script in options.scripts for env_id in options.env_ids]
    env_ids = {cell.env_id for cell in cells}
    methods = {name for cell in cells for name in (cell.method, Path(cell.script).stem)}
    for word in options.only:
        if word not in env_ids | methods:
            raise UserError(f"--only {word}: there are {', '.join(sorted(env_ids))}; {', '.join(sorted(methods))}")
    for wanted, of in ((env_ids & set(options.only), lambda c: {c.env_id}), (methods & set(options.only), lambda c: {*c[:2]})):
        cells = [cell for cell in cells if not wanted or wanted & of(cell)]
    return cells


def start_ray(options: Options) -> float:
    """Connects to the cluster, or starts one here; returns the GPU share of a run. Raises UserError if none answers or fits."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # or Ray copies this folder, runs/ and all, to every worker
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed; run with: uv run --extra benchmark benchmark/sweep.py ...") from None
    if match := re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", options.address or ""):
        try:  # Ray itself tries for minutes
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise UserError(f"--address {options.address}: no Ray cluster answers there ({error})") from None
    local = {} if options.address else {"include_dashboard": False}
    for attempts_left in (0,) if options.address else (2, 1, 0):  # Ray gives itself 30 s to start: not enough on a busy machine
        try:
            ray.init(address=options.address or "local", log_to_driver=False, logging_level="ERROR", **local)
            break
        except Exception as error:  # Ray raises half a dozen types, plain Exception among them
            ray.shutdown()
            reason = str(error).splitlines()[0]
            if options.address:
                raise UserError(f"--address {options.address}: no Ray cluster answers there ({reason})") from None
            if not attempts_left:
                raise SystemExit(f"sweep.py: Ray does not start on this machine ({reason})") from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = options.gpus_per_run
    if gpus is None:
        gpus = 0.25 if any(node.get("GPU") for node in nodes) else 0.0
    if not any(node.get("CPU", 0) >= options.cpus_per_run and node.get("GPU", 0) >= gpus for node in nodes):
        raise UserError(f"no machine of the cluster has {options.cpus_per_run:g} CPU cores and {gpus:g} of a GPU for a run")
    return gpus


def run_all(tasks: list[Task], options: Options, gpus: float) -> dict[str, str]:
    """Runs the tasks to their end behind a live table; returns {name: what went wrong}. Ctrl-C stops and saves them all."""
    import ray
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table

    console = Console()
    log_starts = {task.name: task.path(".log").stat().st_size if task.path(".log").exists() else 0 for task in tasks}
    retry = {"max_retries": options.retries, "retry_exceptions": [RuntimeError]}
    remote = ray.remote(num_cpus=options.cpus_per_run, num_gpus=gpus, **retry)(work)
    pending = {remote.options(name=task.name).remote(task): task for task in tasks}
    done, failed = [], {}

    def table() -> Group:
        rows = Table("run", "try", "step", "of", "steps/s", "return", "left", title="smoothq sweep", title_justify="left")
        for column in rows.columns[1:]:
            column.justify = "right"
        waiting, steps_left, rate = 0, 0, 0.0
        for task in pending.values():
            progress, total = read_progress(task, log_starts[task.name]), task.args["total_timesteps"]
            steps_left += total - progress.step
            if not progress.is_running:
                waiting += 1
                continue
            left = duration((total - progress.step) / progress.rate) if progress.rate > 0 else "?"
            rate += progress.rate if progress.rate > 0 else 0
            numbers = (progress.tries, progress.step, total, progress.rate, progress.episodic_return)
            rows.add_row(task.name, *(f"{n:.4g}" if isinstance(n, float) else f"{n:,}" for n in numbers), left)
        counts = f"{len(pending) - waiting} running, {waiting} waiting, {len(done)} finished, {len(failed)} failed"
        left = f"; about {duration(steps_left / rate)} left" if rate else ""
        return Group(rows, counts + left, *(f"failed: {name}: {why}" for name, why in failed.items()))

    try:
        with Live(table(), console=console, refresh_per_second=1, transient=True) as live:
            while pending:
                ready, _ = ray.wait(list(pending), timeout=1.0)
                for reference in ready:
                    task = pending.pop(reference)
                    try:
                        ray.get(reference)
                        done.append(task.name)
                        console.print(f"finished {task.name}", soft_wrap=True)
                    except (ray.exceptions.RayTaskError, ray.exceptions.RayError) as error:
                        cause = getattr(error, "cause", error)
                        failed[task.name] = str(cause).splitlines()[-1]
                        console.print(f"failed {task.name}: {failed[task.name]}", soft_wrap=True, style="red")
                live.update(table())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("stopping: the runs save what they have", flush=True)
        for reference in pending:
            ray.cancel(reference)
        for reference in pending:
            try:
                ray.get(reference)
            except ray.exceptions.RayError:
                pass
        print(f"stopped: {len(done)} finished, {len(pending)} to go; the same command goes on", flush=True)
        return failed
    print(f"{len(done)} finished, {len(failed)} failed")
    return failed


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(options: Options) -> None:
    if options.scale <= 0 or options.seeds < 1 or options.seeds_per_run < 0 or options.cpus_per_run <= 0:
        raise UserError("--scale, --seeds and --cpus-per-run must be above 0, --seeds-per-run at least 0")
    tasks, complete = plan(select_cells(options), options, read_runs(Path("runs")))
    if complete:
        print(f"# {complete} complete already", flush=True)
    if options.dry_run:
        for task in tasks:
            run = find_run(task)
            flags = ["--resume", os.path.relpath(run.folder)] if run else task.flags
            print(shlex.join(["python", os.path.relpath(task.script), *flags]))
        return
    if not tasks:
        return
    gpus = start_ray(options)
    signal.signal(signal.SIGTERM, interrupt)
    failed = run_all(tasks, options, gpus)
    if failed:
        raise SystemExit("\n".join(f"failed: {name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        sys.exit(2)
