"""A cheap environment, and others that misbehave after 50 good steps: --env-id faulty_envs:Raises-v0, tests/ on PYTHONPATH."""

import multiprocessing
import os
import time
from functools import partial

import gymnasium as gym
import numpy as np

GOOD_STEPS, EPISODE = 50, 20  # the good ones are counted over an instance's episodes


class Faulty(gym.Env):
    """A point that the action pushes along a line, rewarded for being at 0."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, fault, render_mode=None):
        self.fault, self.render_mode, self.steps = fault, render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.state.astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        self.state += 0.1 * np.array([self.state[1], float(action[0])])
        observation, reward = self.state.astype(np.float32), -(self.state[0] ** 2)
        if self.steps > GOOD_STEPS and not multiprocessing.current_process().name.endswith("-1"):  # the second one is sound
            observation, reward = self.fault(observation, reward)
        return observation, reward, False, self.steps % EPISODE == 0, {}


def raises(observation, reward):
    raise ValueError("the robot fell off the table\nand broke")


FAULTS = {
    "Cheap": lambda observation, reward: (observation, reward),
    "Raises": raises,
    "Dies": lambda observation, reward: os._exit(0),  # as a crash in C, or the kernel's killer of processes
    "Hangs": lambda observation, reward: time.sleep(10**6),
    "NanObservation": lambda observation, reward: (observation * np.nan, reward),
    "InfiniteReward": lambda observation, reward: (observation, np.inf),
    "OverflowingReward": lambda observation, reward: (observation, 1e300),  # infinite in the replay's float32
    "HugeReward": lambda observation, reward: (observation, 1e25),  # its squared error is, and the square of its gradient
    "HugerReward": lambda observation, reward: (observation, 2e38),  # its gradient is
}
for name, fault in FAULTS.items():
    gym.register(f"{name}-v0", partial(Faulty, fault))
