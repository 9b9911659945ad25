"""The CUDA path: one captured graph a step against eager, and eager against float64 on the CPU. Skips where there is no GPU."""

import itertools
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, run_script, start_script

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SCRIPTS = [
    "baselines/td3.py",
    "td3_ams.py",
    "td3_pave.py",
    "baselines/sac.py",
    "sac_ams.py",
    "sac_pave.py",
]
PROTOCOL = ["--env-id", "blind_env:Blind-17-6-v0", "--num-envs", 2, "--num-seeds", 2, "--device", "cuda"]
PROTOCOL += ["--learning-starts", 100, "--eval-every", 10**6, "--eval-episodes", 1, "--vector-env", "sync"]
PATH = {"PYTHONPATH": str(ROOT / "benchmark")}


def train(script: str, folder: Path, *flags: object) -> dict:
    """Runs the script on transitions that do not depend on the actions; returns its checkpoint."""
    folder.mkdir()
    result = run_script(script, *PROTOCOL, *flags, cwd=folder, **PATH)
    assert result.returncode == 0, result.stderr
    (run,) = (folder / "runs").iterdir()
    return torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_captured_graph_equals_eager(script, tmp_path):
    """500 updates from the same state, batches and noise: every network agrees to 1e-4 of its size."""
    flags = ["--total-timesteps", 600, "--compile", "off"]
    captured = train(script, tmp_path / "captured", *flags, "--cuda-graph")["modules"]
    eager = train(script, tmp_path / "eager", *flags, "--no-cuda-graph")["modules"]
    for name in ("actor", "critic", "target_critic"):
        for key, value in eager[name].items():
            assert torch.isfinite(value).all()
            distance = (captured[name][key] - value).norm() / value.norm().clamp(min=1e-12)
            assert distance < 1e-4, f"{name}.{key}: {distance:.1e}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_graph_trains(script, tmp_path):
    """The default path, torch.compile inside the capture: it runs, stays finite and moves every network."""
    modules = train(script, tmp_path / "compiled", "--total-timesteps", 300)["modules"]
    start = next((tmp_path / "compiled" / "runs").glob("*/policies/step_000000000.pt"))
    initial = torch.load(start, map_location="cpu", weights_only=True)
    for name in ("actor", "critic"):
        assert all(torch.isfinite(value).all() for value in modules[name].values())
        assert any(not torch.equal(modules[name][key], initial[name][key]) for key in initial[name])


@pytest.mark.parametrize("script", SCRIPTS)
def test_eager_gpu_against_cpu_float64(script):
    """The critic's gradient for one batch: float32 on the GPU against float64 on the CPU."""
    module = load_script(script)
    args = module.Args()
    torch.manual_seed(0)
    S, B, A = 2, 64, 6
    critic = module.Critic(S, 17, A, args)
    batch = torch.randn(S, B, 17), torch.rand(S, B, A) * 2 - 1, torch.randn(S, B, 17), torch.rand(S, B, A) * 2 - 1
    rewards, terminations, probes = torch.randn(S, B), torch.zeros(S, B), torch.randint(0, 2, (S, B, A)) * 2.0 - 1
    directions = module.sample_directions((S, B), A, 8, torch.device("cpu")) if hasattr(module, "sample_directions") else None

    def gradient(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        critic.to(device, dtype).zero_grad()
        observations, actions, next_observations, next_actions = (x.to(device, dtype) for x in batch)
        with torch.no_grad():
            if directions is None:
                next_values = critic(next_observations, next_actions).amin(1)
            else:
                frames = directions.to(device, dtype)
                next_values = module.neighborhood_value(critic, next_observations, next_actions, frames, 0.2)
            targets = module.td_target(rewards.to(device, dtype), terminations.to(device, dtype), next_values, 0.99)
        loss = module.critic_loss(critic(observations, actions), targets).sum()
        if hasattr(module, "geometry_losses"):
            noise = 0.01 * torch.ones_like(observations)
            losses = module.geometry_losses(
                critic, observations, actions, next_observations, noise, probes.to(device, dtype), 1.0
            )
            loss = loss + sum(losses).sum()
        loss.backward()
        return [parameter.grad.double().cpu() for parameter in critic.parameters()]

    exact = gradient("cpu", torch.float64)
    for value, expected in zip(gradient("cuda", torch.float32), exact):
        assert (value - expected).norm() < 1e-4 * expected.norm().clamp(min=1e-9)


def test_every_replay_draws_anew_and_sees_the_growing_replay():
    module = load_script("baselines/td3.py")
    args = module.Args(buffer_size=4096, total_timesteps=4096, num_envs=1, batch_size=256)
    device = torch.device("cuda")
    replay = module.ReplayBuffer(args, {"index": 0}, device)
    replay.rows.copy_(torch.arange(4096.0, device=device).view(1, -1, 1))

    def update(update_actor: bool) -> dict[str, torch.Tensor]:
        return {"index": replay.sample(256)["index"], "noise": torch.randn(8, device=device)}

    captured, draws = module.CapturedUpdate(update), []
    for size in (10, 10, 10, 10, 10, 10, 10, 1000, 4096):
        replay.size = size
        replay.device_size.fill_(size)
        draws.append({name: value.clone() for name, value in captured(True).items()})
        assert draws[-1]["index"].max() < size
    assert len(captured.graphs) == 1  # the last five calls were replays
    assert draws[-2]["index"].max() > 500 and draws[-1]["index"].max() > 2000
    for one, other in itertools.pairwise(draws):
        assert not torch.equal(one["noise"], other["noise"])
    assert not torch.equal(draws[4]["index"], draws[5]["index"])


@pytest.mark.parametrize("script", ["td3_ams.py", "sac_pave.py"])
def test_resumes_from_a_checkpoint_between_replays(script, tmp_path):
    process = start_script(script, *PROTOCOL, "--total-timesteps", 10**6, "--log-every", 50, cwd=tmp_path, **PATH)
    for line in process.stdout:
        if line.startswith("step 200/"):  # updates began at 100: graphs are being replayed
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    (run,) = (tmp_path / "runs").iterdir()
    stopped = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    result = run_script(script, "--resume", run, "--total-timesteps", stopped["step"] + 50, cwd=tmp_path, **PATH)
    assert result.returncode == 0, result.stderr
    resumed = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    assert resumed["step"] == stopped["step"] + 50
    moved = resumed["modules"]["critic"]["layers.0.weight"] - stopped["modules"]["critic"]["layers.0.weight"]
    assert 0 < moved.abs().max() < 1


def test_a_loss_that_is_not_finite_is_noticed_at_log_time(tmp_path):
    flags = ["--total-timesteps", 1000, "--env-id", "blind_env:Blind-overflow-v0", "--log-every", 50]
    result = run_script("baselines/td3.py", *PROTOCOL, *flags, cwd=tmp_path, **PATH)
    assert result.returncode == 1 and "losses/qf_loss is not finite" in result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    assert all(math.isfinite(value.sum()) for value in state["modules"]["critic"].values())
