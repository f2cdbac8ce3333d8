"""Energies between a layer's prediction and its belief, to be given by ``energies=``.

Without one a layer has half the squared difference. What one of your own must provide is said at
``LayerEnergy``; how they are computed is in ``torch2pc.energy.divergences``.
"""

from torch2pc.energy.divergences import Categorical, Huber, Laplace, LayerEnergy

__all__ = ["Categorical", "Huber", "Laplace", "LayerEnergy"]
