"""A cheap environment, and others that misbehave after 139 good steps: --env-id faulty_envs:Raises-v0, tests/ on PYTHONPATH."""

import os
import sys
import threading
import time

import gymnasium as gym
import numpy as np

GOOD_STEPS = 139  # of one instance, over its episodes; the fault comes with the next step, or the reset in it
EPISODE = 20


class Cheap(gym.Env):
    """A point that the action pushes along a line, rewarded for being at 0. Episodes of 20 steps, a few µs each."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode, self.steps = render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.velocity = self.np_random.uniform(-1, 1, 2)
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.velocity += 0.1 * float(action[0])
        self.position += 0.1 * self.velocity
        return self.observe(), -(self.position**2), False, self.steps % EPISODE == 0, {}

    def observe(self):
        return np.array([self.position, self.velocity], np.float32)


class Faulty(Cheap):
    """Calls fault(observation, reward) -> (observation, reward) in each step after the good ones."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if self.steps > GOOD_STEPS:
            observation, reward = self.fault(observation, reward)
        return observation, reward, *rest


class Raises(Faulty):
    def fault(self, observation, reward):
        raise ValueError("the robot fell off the table\nand broke")


class RaisesUnpicklable(Faulty):
    """A worker cannot send this exception to the trainer."""

    def fault(self, observation, reward):
        raise ValueError(threading.Lock())


class Exits(Faulty):
    def fault(self, observation, reward):
        sys.exit(0)


class Dies(Faulty):
    """As a crash in C, or the kernel's killer of processes that take too much memory."""

    def fault(self, observation, reward):
        os.kill(os.getpid(), 9)


class Hangs(Faulty):
    def fault(self, observation, reward):
        while True:
            time.sleep(1)


class NanObservation(Faulty):
    def fault(self, observation, reward):
        return observation * np.nan, reward


class InfiniteReward(Faulty):
    def fault(self, observation, reward):
        return observation, np.inf


class OverflowingReward(Faulty):
    """A float64 that is infinite in the replay's float32."""

    def fault(self, observation, reward):
        return observation, 1e300


class HugeReward(Faulty):
    """Finite, but its squared error is not, nor the second moment of its gradient."""

    def fault(self, observation, reward):
        return observation, 1e25


class HugerReward(Faulty):
    """Its gradient is not finite, nor are the parameters after it."""

    def fault(self, observation, reward):
        return observation, 2e38


class NanReset(Cheap):
    """The first observation of an episode."""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        return observation * (np.nan if self.steps > GOOD_STEPS else 1), info


class HangsInReset(Cheap):
    def reset(self, *, seed=None, options=None):
        while self.steps > GOOD_STEPS:
            time.sleep(1)
        return super().reset(seed=seed, options=options)


for env in (Cheap, *Faulty.__subclasses__(), NanReset, HangsInReset):
    gym.register(f"{env.__name__}-v0", env)
