"""The CUDA path: graphs, captured and compiled; skipped where there is no GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL, OFF_POLICY, load_script, make_args

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SIZES = dict(env_id="Brief-v0", num_envs=1, learning_starts=20, batch_size=32, update_every=1, eval_episodes=1)
SIZES |= dict(num_steps=50, num_minibatches=4)  # PPO's
td3 = load_script("baselines/td3.py")


def weights(saved: dict) -> dict[str, torch.Tensor]:
    """What actor and critic learn; buffers need not move."""
    named = {f"{network} {name}": saved[network][name] for network in ("actor", "critic") for name in saved[network]}
    return {name: weight for name, weight in named.items() if name.endswith(("weight", "bias", "log_std"))}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(path, **changes) -> (folder, checkpoint) of a real run on Brief-v0."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # a run takes over Ctrl-C, which is pytest's

    def run(path: str, **changes) -> tuple[Path, dict]:
        load_script(path).train(make_args(path, **SIZES | {"runs_dir": str(tmp_path)} | changes))
        folder = max(tmp_path.iterdir(), key=lambda folder: folder.stat().st_ctime_ns)
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
        assert all(weight.isfinite().all() for weight in weights(checkpoint).values())
        return folder, checkpoint

    yield run
    torch.cuda.set_stream(torch.cuda.default_stream())  # a captured run leaves its own


@pytest.mark.parametrize("path", OFF_POLICY)
def test_captured_equals_eager(path, run, monkeypatch):
    """Uncompiled, 14 updates: the first three of a kind (with the actor, without) warm up, the others are replays."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    _, eager = run(path, num_seeds=2, total_timesteps=34, compile=False)
    _, captured = run(path, num_seeds=2, total_timesteps=34, compile=True)
    for name, weight in weights(eager).items():
        assert torch.equal(weight, weights(captured)[name]), name


@pytest.mark.parametrize("path", ALL)
def test_trains_compiled_and_captured(path, run):
    """The default path, 300 steps: every layer of actor and critic moves, for each of 5 seeds."""
    folder, checkpoint = run(path, num_seeds=5, total_timesteps=300)
    start = weights(torch.load(folder / "policies/step_000000000.pt", weights_only=True, map_location="cpu"))
    for name, weight in weights(checkpoint).items():
        assert len(weight) == 5 and (weight != start[name]).flatten(1).any(1).all(), name


def test_graphs_draw_anew_and_see_the_replay_grow():
    """Compiled noise differs at every replay; rows added while the GPU is busy are all there."""
    device = torch.device("cuda")
    noise = td3.compile_gradients(lambda: torch.randn(8, device=device), device)
    td3.leave_default_stream()
    replay = td3.ReplayBuffer(1, 2, (1,) * 5, 100, device)
    update = td3.CapturedUpdate(lambda: {"noise": noise(), "rows": replay.sample(4096).observations})
    torch.cuda._sleep(2_000_000_000)
    draws = []
    newest = []
    for step in range(12):
        replay.add(td3.Batch(*[np.full(2, step)] * len(td3.Batch._fields)))
        metrics = update()
        draws.append(metrics["noise"].clone())
        newest.append(metrics["rows"].max())
    assert torch.stack(newest).tolist() == list(range(12))
    assert len(torch.stack(draws).unique(dim=0)) == 12
    assert replay.rows[0, :12, :, 0].flatten().tolist() == [step for step in range(12) for _ in range(2)]
    torch.cuda.set_stream(torch.cuda.default_stream())
