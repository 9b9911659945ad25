"""95 % intervals over seeds for report.py and the page of results: rliable's bootstrap."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from rliable import library
from scipy.stats import trim_mean


def mean(scores: np.ndarray) -> np.ndarray:
    """[seeds, T] -> [T]."""
    return scores.mean(0)


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """rliable's aggregate_iqm over the seeds, of all T at once: [seeds, T] -> [T]."""
    return trim_mean(scores, 0.25, axis=0)


def interval(scores: np.ndarray, statistic: Callable = mean, reps: int = 2000) -> np.ndarray | None:
    """The 95 % interval [2, T] of a statistic of scores [seeds, T] or, as numbers, [seeds].

    None with one or two seeds: resampling them says nothing.
    """
    scores = np.asarray(scores, float)
    if len(scores) < 3:
        return None
    np.random.seed(0)  # rliable draws from NumPy's generator: the same interval each time
    tasks = scores.reshape(len(scores), 1, -1)  # rliable wants an axis of tasks

    def over_seeds(tasks: np.ndarray) -> np.ndarray:
        return statistic(tasks[:, 0])

    _, found = library.get_interval_estimates({"": tasks}, over_seeds, reps=reps)
    return found[""].reshape(2, *scores.shape[1:])


def paired_difference(ours: pd.Series, base: pd.Series) -> tuple[float, np.ndarray | None, int] | None:
    """The mean of ours - base over the seeds, the index, that both have; its interval; how many seeds those are.

    For one seed every method begins with the same networks and start states, so a difference says more than two means.
    """
    differences = (ours - base).dropna()
    if differences.empty:
        return None
    return float(differences.mean()), interval(differences.to_numpy()), len(differences)
