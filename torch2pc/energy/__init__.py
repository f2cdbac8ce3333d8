"""The energy that every relaxation descends: a sum of factors, and one way to go through them.

    F(v) = beta LossFun(f_L(v_parents), Y) + sum_i pi_i/2 ||f_i(v_parents) - v_i||^2 + prior(v)

``factors.py`` has the terms. A ``Factor`` knows the beliefs that it depends on and how it pulls at them,
which is its gradient. ``energy.py`` adds them up, in either of two sets of variables: the beliefs
(``Beliefs``), or the errors, from which the beliefs follow (``Errors``). Both go through the factors from
the top down in one ``sweep``, and tell whoever moves the variables (a step rule) of each one's gradient as
soon as it is whole. ``divergences.py`` has other energies between prediction and belief than half the
squared difference. ``curvature.py`` has the same energy made linear, so that its sweep multiplies with the
Hessian, and what is read off it.

Held is how far each belief has moved from its feed-forward value, delta_i = v_i - vhat_i, and factor i is
given d_i(delta_parents) = f_i(vhat + delta) - f_i(vhat) (``displacement``), so that nothing large is
subtracted. Above ``graph``; which variables are moved, how far and how often is up to ``inference``.
"""

from torch2pc.energy.energy import Beliefs, Energy, Errors, Parts
from torch2pc.energy.factors import Factor

__all__ = ["Beliefs", "Energy", "Errors", "Factor", "Parts"]
