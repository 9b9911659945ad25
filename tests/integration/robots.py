"""Environments as README.md's Robot, without render_mode or metadata: --env-id robots:Robot-v0."""

from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Tuple

FORCES = Box(np.float32([[-1, -2, 0], [-1, -2, 0]]), np.float32([[1, 2, 3], [1, 2, 3]]))
LOCKED = Box(np.float32([[-1, 0.5, 0], [-1, -2, 0]]), np.float32([[1, 0.5, 3], [1, 2, 3]]))


class Robot(gym.Env):
    """A point that all forces together push along a line, rewarded for being at 0."""

    observation_space = Dict({"place": Box(-9, 9, (1, 2)), "clock": Tuple([Discrete(3), Box(-9, 9, (1,))])})

    def __init__(self, forces=FORCES, payload=1.0):
        self.action_space = forces
        self.payload = payload

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.observe(), {}

    def observe(self):
        clock = (self.steps % 3, np.float32([np.sin(self.steps)]))
        return {"place": self.state.astype(np.float32)[None], "clock": clock}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        self.state += 0.1 * np.array([self.state[1], action.sum() / self.payload])
        return self.observe(), -abs(self.state[0]), False, self.steps == 20, {}


gym.register("Robot-v0", Robot)
gym.register("Locked-v0", partial(Robot, LOCKED))
gym.register("Rescaled-v0", lambda: gym.wrappers.RescaleAction(Robot(), np.float32(0), np.float32(5)))
