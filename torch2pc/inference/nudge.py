"""Nudging: the slope of the updates in how much the relaxation feels of the loss.

    F(v) = beta LossFun(f_L(v_{L-1}), Y) + 1/2 sum_{l<L} ||epsilon_l||^2

is relaxed at beta and at -beta, from the same recorded network, and

    .grad = (update(beta) - update(-beta)) / (2 beta)

At equilibrium this goes to the gradient of the loss as beta goes to 0, and is off by a multiple of beta^2.
Errors near the feed-forward pass are proportional to beta, of opposite signs, and are computed as
displacements, so that nothing is lost to round-off where beta is small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch2pc.energy.factors import Terms
from torch2pc.graph.network import Inference
from torch2pc.inference.relax import Callback, Relaxation, infer_by


def nudged(
    relaxation_of: Callable[[Terms], Relaxation],
    terms: Terms,
    beta: float,
    n: int,
    callback: Callback | None = None,
) -> Inference:
    """What is inferred at ``beta``, with the slope for the updates and for the input's error."""
    relaxation = relaxation_of(terms._replace(beta=-beta))
    network = relaxation.network
    network.arrived = None  # no update is there before both sides are
    with network.replaying():
        relaxation.run(n)
        of_input, of_parameters = relaxation.updates()
    distance, evaluations = relaxation.distance, relaxation.evaluations
    del relaxation
    found = infer_by(relaxation_of(terms._replace(beta=beta)), n, callback)
    sides = dict(found.updates)
    # A layer that branches on values may use a parameter on one side only.
    parameters = dict.fromkeys([*sides, *of_parameters])
    updates = [(p, slope(sides.get(p), of_parameters.get(p), beta)) for p in parameters]
    epsilon = list(found.epsilon)
    if epsilon[0] is not None:
        epsilon[0] = slope(epsilon[0], of_input, beta)
    found = found._replace(epsilon=epsilon, updates=updates)
    if distance is None or found.distance is None or found.evaluations is None:
        return found
    return found._replace(
        distance=torch.maximum(found.distance, distance),
        evaluations=max(found.evaluations, evaluations),
    )


def slope(above: Tensor | None, below: Tensor | None, beta: float) -> Tensor:
    """(above - below) / (2 beta), where what is missing is 0."""
    if above is None or below is None:
        one, sign = (below, -1) if above is None else (above, 1)
        assert one is not None
        return one * (sign / (2 * beta))
    return (above - below) / (2 * beta)
