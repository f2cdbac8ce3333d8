"""Step rules: how the beliefs move in an iteration, to be given as ``eta``.

A number for ``eta`` is ``Descent``. What a rule is told, and how it moves the beliefs, is in
``torch2pc.inference.steps``.
"""

from torch2pc.inference.steps import Descent, Halving, Langevin, Momentum, Optim, Rule

__all__ = ["Descent", "Halving", "Langevin", "Momentum", "Optim", "Rule"]
