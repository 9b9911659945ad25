"""One test that learns, in about half a minute of one core."""

import csv

import numpy as np
from conftest import run_script

RANDOM_BEST = -700  # the best of 1000 episodes of uniform random actions returned -711, their mean was -1231


def test_td3_learns_pendulum(tmp_path):
    flags = "--env-id Pendulum-v1 --num-seeds 2 --num-envs 2 --total-timesteps 6000 --learning-starts 500 --eval-every 1000"
    network = "--hidden-sizes 64 64 --batch-size 64 --learning-rate 1e-3 --gamma 0.95 --policy-frequency 1 --device cpu"
    process = run_script("baselines/td3.py", *flags.split(), *network.split(), cwd=tmp_path, timeout=900)
    assert process.returncode == 0, process.stderr
    (table,) = tmp_path.glob("runs/*/eval.csv")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    for seed in ("1", "2"):
        returns = [float(row["return"]) for row in rows if row["seed"] == seed]
        means = np.reshape(returns, (7, 10)).mean(1)  # of the 10 episodes at steps 0, 1000, ..., 6000
        assert means[0] < RANDOM_BEST
        assert means.max() > -350  # six seeds of one run all reached -180 or better
