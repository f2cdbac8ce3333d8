r"""
Rao and Ballard's fields
========================

**Question.** Cells of the primary visual cortex answer to small oriented edges. Does predictive coding of
natural images find such fields, and what does it need for that?

One level of R. Rao and D. Ballard's model: an image patch is predicted from causes r by the columns of
a matrix U, the fields, and causes and fields descend the same energy, the causes fast, the fields slowly:

.. math:: F = \tfrac12 \lVert \mathrm{patch} - \tanh(U r) \rVert^2 + h(r) .

The prior h is what matters. A quadratic one, :math:`\sum r_i^2`, makes all causes small. A kurtotic one,
:math:`\sum \log(1 + (r_i/s)^2)`, likes most causes to be near zero and lets a few be large.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from paper_figures.decoders import mosaic, signed, unit_columns
from paper_figures.rao_ballard.figure_rao_ballard import Fields, gabor_fit, whitened_patches
from torch2pc import PCInferLatent

STEPS = 220  # short: 4
SIDE, CAUSES, BATCH = 12, 100, 200
FITTED = 40  # short: 2

# %%
# The data
# --------
# Patches of 12 by 12 pixels from scikit-learn's two sample photographs, grey and whitened: neighbouring
# pixels of a photograph are so alike that nothing else would be learned.

torch.manual_seed(0)
patches = whitened_patches(Fields("kurtotic", weight=0.12, scale=0.15, patches=5000))

# %%
# Two priors
# ----------
# ``prior`` is any function of the list of beliefs; here only ``v[0]``, the causes.


def kurtotic(v: list[Tensor]) -> Tensor:
    return 0.12 * (v[0] / 0.15).square().log1p().sum()


def quadratic(v: list[Tensor]) -> Tensor:
    return 0.1 * v[0].square().sum()


# The largest second derivative of each.
CURVATURE = {kurtotic: 2 * 0.12 / 0.15**2, quadratic: 0.2}


def half_squared_error(output: Tensor, Y: Tensor) -> Tensor:
    return 0.5 * (output - Y).square().sum()


# %%
# Learning
# --------
# The step size has to stay below 2 over the energy's largest curvature in r, which is at most that of
# the prior and the square of U's largest singular value together. The fields are kept at length 1, or the
# prior could be had for nothing, by small causes and large fields.


def infer(decoder: nn.Sequential, prior, Y: Tensor) -> Tensor:
    """The causes of a batch of patches, and the update of the fields in ``.grad``."""
    U = decoder[0][0].weight.detach()
    eta = 1.5 / (torch.linalg.matrix_norm(U, 2).item() ** 2 + CURVATURE[prior])
    causes = torch.zeros(len(Y), CAUSES)
    return PCInferLatent(decoder, half_squared_error, Y, causes, eta, n=40, prior=prior).v[0]


def learn(prior) -> tuple[Tensor, Tensor]:
    """The fields (causes, side, side), and the causes of the last patches."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Sequential(nn.Linear(CAUSES, SIDE**2, bias=False), nn.Tanh()))
    U = decoder[0][0]
    nn.init.normal_(U.weight)
    unit_columns(U)
    optimizer = torch.optim.Adam(U.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, STEPS // 2), 0.25)
    for _ in range(STEPS):
        infer(decoder, prior, patches[torch.randint(len(patches), (BATCH,))])
        optimizer.step()
        schedule.step()
        unit_columns(U)
    causes = infer(decoder, prior, patches[:1000])
    return U.weight.detach().T.unflatten(1, (SIDE, SIDE)), causes


# %%
# How much of a field a Gabor function explains, a wave under a Gaussian, tells whether it is a small
# oriented edge; excess kurtosis, 0 for a normal distribution, tells how sparse the causes are.

figure, all_axes = plt.subplots(1, 2, figsize=(7, 3.7), layout="constrained")
for axes, prior in zip(all_axes, (kurtotic, quadratic), strict=True):
    fields, causes = learn(prior)
    fits = torch.tensor([gabor_fit(field.double().numpy()) for field in fields[:FITTED]])
    kurtosis = (causes.pow(4).mean() / causes.square().mean() ** 2 - 3).item()
    print(
        f"{prior.__name__:9} prior: {(fits > 0.75).double().mean():4.0%} of the fields are Gabor "
        f"functions (over 75% explained), excess kurtosis of the causes {kurtosis:.1f}"
    )
    picture = mosaic(signed(fields[:, None]), 10).squeeze(2).numpy()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axes.set(title=f"{prior.__name__} prior", xticks=[], yticks=[])
plt.show()

# %%
# **Conclusion.** The energy alone does not make edges; sparseness does. Under the quadratic prior any
# rotation of the fields is as good, and they stay the noise that they started as. The full
# figure, with the hierarchy of two levels, is ``python -m paper_figures --figure rao_ballard``.
#
# Model: R. Rao and D. Ballard, Nature Neuroscience 2, 79-87 (1999).
