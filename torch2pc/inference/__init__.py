"""The algorithms: how the errors of a recorded batch are inferred, and the updates that they make.

``relax.py`` has the one loop of the relaxations, ``steps.py`` how a variable is moved, ``updates.py``
what the errors make of the parameters. ``strict.py``, ``multipliers.py``, ``error_based.py`` and
``equilibrium.py`` say what is relaxed, ``nudge.py`` relaxes twice; ``exact.py`` and ``fixed_pred.py``
relax nothing. Above ``energy``; it knows nothing of compilation.
"""

from torch2pc.inference.equilibrium import equilibrium
from torch2pc.inference.error_based import error_based
from torch2pc.inference.multipliers import multipliers
from torch2pc.inference.strict import strict

# What relaxes, each called as ``(network, eta, vinit, update_at, terms)`` for a Relaxation.
RELAXATIONS = {
    "Strict": strict,
    "Multipliers": multipliers,
    "ErrorBased": error_based,
    "Equilibrium": equilibrium,
}

__all__ = ["RELAXATIONS"]
