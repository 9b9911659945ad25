"""Environments of unusual spaces, and some that misbehave: --env-id faulty_envs:Raises-v0. None has metadata."""

import multiprocessing
import os
import random
import subprocess
import threading
import time
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from gymnasium.wrappers import ClipAction, RescaleAction

GOOD_STEPS = 50  # before a fault; counted over an instance's episodes
STATE = Box(-np.inf, np.inf, (2,), np.float32)
TORQUE = Box(-2, 2, (1,), np.float32)
IMAGE = Box(0, 255, (8, 8, 3), np.uint8)
LARGEST = np.finfo(np.float32).max


class Point(gym.Env):
    """A point that the action pushes along a line, rewarded for being at 0. It takes no action outside its space."""

    def __init__(self, action_space=TORQUE, observation_space=STATE, observe=np.float32, length=20):
        self.action_space = action_space
        self.observation_space = observation_space
        self.observe = observe
        self.length = length  # of an episode; 0: it never ends
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        assert seed is None or seed < 2**31  # as a simulator in C++ would have it
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.observe(self.state), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        self.state += 0.1 * np.array([self.state[1], np.mean(action)])
        truncated = self.length > 0 and self.steps % self.length == 0
        return self.observe(self.state), -float(self.state[0] ** 2), False, truncated, {}


class Faulty(Point):
    """After good_steps it is fault(observation, reward) that answers; the second of several is sound."""

    def __init__(self, fault, good_steps=GOOD_STEPS):
        super().__init__()
        self.fault = fault
        self.good_steps = good_steps

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if self.steps > self.good_steps and not multiprocessing.current_process().name.endswith("-1"):
            observation, reward = self.fault(observation, reward)
        return observation, reward, *rest


class GlobalRandom(Point):
    """It draws from the random generators of the process."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        self.state = np.array([np.random.uniform(), random.uniform(0, 1)])
        return self.observe(self.state), {}


class HangsInReset(Point):
    """In the third that an evaluation asks for; a new episode after an ended one is not asked for, and has no seed."""

    def reset(self, *, seed=None, options=None):
        if seed is not None and self.steps >= 2 * self.length:
            time.sleep(10**6)
        return super().reset(seed=seed)


class NanInReset(Point):
    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        return observation * (np.nan if self.steps > GOOD_STEPS else 1), info


class Simulator(Point):
    """Its steps take a while, need a program of its own, which each reset starts anew, and for which close() waits."""

    program = None

    def reset(self, **kwargs):
        if self.program:
            self.program.terminate()
            self.program.wait()
        self.program = subprocess.Popen(["sleep", "1000"])
        return super().reset(**kwargs)

    def step(self, action):
        time.sleep(0.05)
        if self.program.poll() is not None:
            raise RuntimeError("the simulator is gone")
        return super().step(action)

    def close(self):
        if self.program and multiprocessing.current_process().name != "MainProcess":
            self.program.wait()
        elif self.program:
            self.program.kill()


class ComputesWithTorch(Point):
    """On all threads that it may use."""

    def reset(self, **kwargs):
        torch.ones(300_000).tanh().sum()
        return super().reset(**kwargs)


class UnsendableError(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()  # cannot be pickled


def bits(state):
    return {"door": np.array([True, False]), "gear": 2, "state": np.float32(state), "touch": np.ones(2, np.int8)}


def nested(state):
    clock = (int(state[0] > 0), np.float32(state[1:]))
    return {"place": np.float32([state]), "clock": clock}


def raises(observation, reward):
    raise ValueError("the robot fell off the table\nand broke")


def raises_unsendable(observation, reward):
    raise UnsendableError("the simulator is gone")


def unfinished():
    raise RuntimeError(f"no task given, MUJOCO_GL is {os.environ.get('MUJOCO_GL')}")


FAULTS = {
    "Raises": raises,
    "RaisesUnsendable": raises_unsendable,
    "Dies": lambda observation, reward: os._exit(0),  # as a crash in C, or the kernel's killer of processes
    "Hangs": lambda observation, reward: time.sleep(10**6),
    "NanObservation": lambda observation, reward: (observation * np.nan, reward),
    "InfiniteReward": lambda observation, reward: (observation, np.inf),
    "OverflowingReward": lambda observation, reward: (observation, 1e300),  # infinite in the replay's float32
    "HugeReward": lambda observation, reward: (observation, 1e25),  # its squared error is, and that of its gradient
    "HugerReward": lambda observation, reward: (observation, 2e38),  # its gradient is
}
BITS = Dict(door=Box(0, 1, (2,), bool), gear=Discrete(4), state=STATE, touch=MultiBinary(2))
NESTED = Dict(place=Box(-9, 9, (1, 2)), clock=Tuple([Discrete(3), Box(-9, 9, (1,))]))
FORCES = Box(np.float32([[-1, -2, 0], [-1, -2, 0]]), np.float32([[1, 2, 3], [1, 2, 3]]))
SOUND = {  # and the numbers in an observation and in an action
    "Cheap": (Point, 2, 1),
    "List": (partial(Point, observe=np.ndarray.tolist), 2, 1),
    "Bits": (partial(Point, observation_space=BITS, observe=bits), 10, 1),
    "Scalar": (partial(Point, Box(-2, 2, ()), Box(-99, 99, ()), lambda state: np.float32(state[0])), 1, 1),
    "Matrix": (partial(Point, Box(-2, 2, (2, 3)), Box(-99, 99, (3, 2)), lambda state: np.float32([state] * 3)), 6, 6),
    "Nested": (partial(Point, FORCES, NESTED, nested), 6, 6),
    "Locked": (partial(Point, Box(np.float32([-1, 0.5]), np.float32([1, 0.5]))), 2, 2),
    "Rescaled": (lambda: RescaleAction(Point(), np.float32(0), np.float32(5)), 2, 1),
    "Clipped": (lambda: ClipAction(Point()), 2, 1),
    "ArrayReward": (partial(Faulty, lambda observation, reward: (observation, np.array([reward])), 0), 2, 1),
    "GlobalRandom": (GlobalRandom, 2, 1),
    "ComputesWithTorch": (ComputesWithTorch, 2, 1),
    "Endless": (partial(Point, length=0), 2, 1),
}
REFUSED = {  # and why
    "Integer": (partial(Point, Box(0, 10, (1,), np.int64)), "its actions must be a Box of real numbers"),
    "DiscreteInDict": (partial(Point, Dict(arm=TORQUE, grip=Discrete(2))), "its actions must be a Box of real numbers"),
    "Huge": (partial(Point, Box(-1e10, 1e10)), "its actions must be bounded"),
    "Limitless": (partial(Point, Box(-LARGEST, LARGEST)), "its actions must be bounded"),
    "ImageInDict": (partial(Point, TORQUE, Dict(camera=IMAGE, state=STATE)), "it observes images"),
    "RewardVector": (partial(Faulty, lambda observation, _: (observation, np.ones(3)), 0), "reward must be one number"),
    "Unfinished": (unfinished, "RuntimeError: no task given"),
}
for name, fault in FAULTS.items():
    gym.register(f"{name}-v0", partial(Faulty, fault))
for env in (HangsInReset, NanInReset, Simulator):
    gym.register(f"{env.__name__}-v0", env)
for name, (make, *_) in (SOUND | REFUSED).items():
    gym.register(f"{name}-v0", make)
