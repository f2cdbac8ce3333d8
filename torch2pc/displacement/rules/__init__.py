"""How each operation passes a displacement on: f(a + d) - f(a), without subtracting nearly equal numbers.

``core.py`` says what a rule is. The other files hold the rules, by kind of operation; to import them
enters each in ``PREPARED``, by the operation that it serves. ``recorder.py`` records which
operations a layer is made of and runs their rules.
"""

from torch2pc.displacement.rules import axes, kinks, linear, maxima, smooth
from torch2pc.displacement.rules.core import (
    PREPARED,
    Call,
    Rule,
    Step,
    aten,
    base,
    belief_dtype,
    difference_step,
    linear_step,
    storage,
)
from torch2pc.displacement.rules.maxima import pooled_before_relu
from torch2pc.displacement.rules.smooth import COMPOSING, composed_step

__all__ = [
    "COMPOSING",
    "PREPARED",
    "Call",
    "Rule",
    "Step",
    "aten",
    "axes",
    "base",
    "belief_dtype",
    "composed_step",
    "difference_step",
    "kinks",
    "linear",
    "linear_step",
    "maxima",
    "pooled_before_relu",
    "smooth",
    "storage",
]
