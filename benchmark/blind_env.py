"""Environments that cost nothing and ignore the action: what is left of a run's time is the update.

    PYTHONPATH=benchmark python td3_ams.py --env-id blind_env:Blind-223-38-v0

Blind-O-A-v0 has O observations and A actions: 223, 38 are dog-run's, 17, 6 are Walker2d-v5's, 3, 1 are Pendulum-v1's.
Its numbers depend on the seed alone, so two runs that differ in rounding see the same transitions for ever.
Blind-overflow-v0 has rewards of 1e30, whose squared error float32 does not hold.
"""

import gymnasium as gym
import numpy as np


class BlindEnv(gym.Env):
    """Standard normal observations [O] and rewards from a table of 512 rows, walked in a circle from a random row."""

    def __init__(self, observation_dim: int, action_dim: int, reward_scale: float = 1.0, render_mode: None = None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (action_dim,), np.float32)
        self.reward_scale = reward_scale
        self.table = np.random.default_rng(0).standard_normal((512, observation_dim), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row = int(self.np_random.integers(512))
        return self.table[self.row], {}

    def step(self, action):
        self.row = (self.row + 1) % 512
        return self.table[self.row], self.reward_scale * float(self.table[self.row, 0]), False, False, {}


SIZES = {  # observations, actions, reward_scale
    "223-38": (223, 38, 1.0),
    "17-6": (17, 6, 1.0),
    "3-1": (3, 1, 1.0),
    "overflow": (17, 6, 1e30),
}
for name, (observation_dim, action_dim, reward_scale) in SIZES.items():
    gym.register(
        id=f"Blind-{name}-v0",
        entry_point=BlindEnv,
        max_episode_steps=200,
        kwargs={"observation_dim": observation_dim, "action_dim": action_dim, "reward_scale": reward_scale},
    )
