"""PAVE's three losses for any critic: what to copy into a project that has its own."""

import torch
from torch.func import grad, jvp, vmap


def pave_losses(q, observations, actions, next_observations, noise, probes, delta=1.0):
    """MPR, VFC and Curv (PAVE, ICML 2026) of a twice differentiable critic q(observation [O], action [A]) -> number.

    Means over a batch: observations, next_observations and noise, of standard deviation 0.01, [B, O]; actions and probes, of
    random signs, [B, A]. MPR and VFC are means over A too, as the published weights want. Add weight * loss to the critic's.
    """
    g = grad(q, argnums=1)  # dQ/da [A]

    def of_a_row(s, a, s_next, eps, v):
        field, curvature = jvp(lambda a: g(s, a), (a,), (v,))  # g and H v
        mpr, vfc = (g(s + eps, a) - field).square().mean(), (g(s_next, a) - field).square().mean()
        return mpr, vfc, torch.relu(v @ curvature + delta)

    return [loss.mean() for loss in vmap(of_a_row)(observations, actions, next_observations, noise, probes)]
