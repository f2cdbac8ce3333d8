r"""
A memory that is searched by predictive coding
==============================================

**Question.** A recurrent network has stored twenty sequences. It is shown one of them, noisy. How can it
find out which one it is?

``PCRNN`` generates a sequence from a *cause* c, two numbers in this example, with hidden state h:

.. math::

   h \leftarrow (1 - \tfrac1\tau) h + \tfrac1\tau (W_r \tanh h + W_c c + b_r), \qquad
   x = W_o \tanh h + b_o .

Training finds one cause for each sequence. Retrieval goes the other way: the sequence is clamped at the
output, and the error :math:`\epsilon_x = x - \mathrm{target}` corrects the hidden state, whose
correction :math:`\epsilon_h` corrects the cause,

.. math::

   h \leftarrow h - \alpha_x (1 - \tanh^2 h) \odot W_o^T \epsilon_x, \qquad
   c \leftarrow c - \alpha_h W_c^T \epsilon_h + \sigma_r \lVert \epsilon_h \rVert \xi + \alpha_c s(c),

pass after pass over the sequence. The last two terms are noise that falls silent as the error does, and
the pull :math:`s(c)` of a mixture of Gaussians around the stored causes.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

from paper_figures.letters import load_letters
from torch2pc import PCRNN

STEPS = 700  # short: 10
PASSES = 300  # short: 10
TRIES = 4

letters = load_letters(None)
targets = letters.trajectories  # (time, letters, 2)
time, count, _ = targets.shape

# %%
# Storing
# -------
# A plain loop of autograd and an optimizer, over the network's weights and the causes. Nothing is inferred
# here: the network runs freely from each letter's cause.

generator = torch.Generator().manual_seed(0)
model = PCRNN(2, 50, 2, tau=50, generator=generator)
causes = (0.01 * torch.randn(count, 2, generator=generator)).requires_grad_()
optimizer = torch.optim.Adam([*model.parameters(), causes], lr=0.03)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, 5 * (1 - k / STEPS)))
for _ in range(STEPS):
    loss = (model(causes, steps=time).x_pred - targets).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
model.set_centres(causes)
print(f"mean squared error, as a share of the variance: {(loss / targets.var()).item():.4f}")

# %%
# Searching
# ---------
# Four tries for each letter start at random causes. All 80 run in parallel. Over the passes the
# search cools down: the noise and the pull of the stored causes fall.


def falling(first: float, last: float) -> list[float]:
    return np.geomspace(first, last, PASSES).tolist()


def search(noise: float):
    """Retrieve the letters with Gaussian noise of this deviation added to every coordinate."""
    generator = torch.Generator().manual_seed(1)
    seen = targets + noise * torch.randn(targets.shape, generator=generator)
    found = model.retrieve(
        seen,
        TRIES,
        PASSES,
        alpha_x=0.02,
        alpha_h=0.2,
        alpha_c=falling(2e-3, 1e-4),
        sigma_c=0.06,
        sigma_r=falling(20, 0.5),
        generator=generator,
        progress=False,
    )
    return seen, found


def right(nearest: torch.Tensor) -> list[float]:
    """The share of the tries that are right, after each pass."""
    return (nearest == torch.arange(count)).double().mean((1, 2)).tolist()


print("share of the tries that are right")
figure, (paths, shares) = plt.subplots(1, 2, figsize=(7.4, 3.6), layout="constrained")
for noise, colour in (0.0, "#0072B2"), (0.2, "#009E73"), (0.4, "#D55E00"):
    seen, found = search(noise)
    last, best = right(found.nearest), right(found.best_so_far())
    print(
        f"noise {noise}:   {last[-1]:4.0%} after {PASSES} passes   {best[-1]:4.0%} at least error"
    )
    shares.plot(last, color=colour, label=f"noise {noise}")
    shares.plot(best, color=colour, linestyle=":")
shares.set(xlabel="pass", ylabel="share of the tries right", xscale="log", ylim=(0, 1.02))
shares.legend(title="dotted: least error so far")

_, found = search(0.0)
for character, (x, y) in zip(letters.characters, model.centres.tolist(), strict=True):
    paths.text(x, y, character, ha="center", va="center")
for way in found.paths[:, :, letters.characters.index("q")].unbind(1):
    paths.plot(*way.T, linewidth=0.6)
    paths.plot(*way[-1], "ko", markersize=4, fillstyle="none")
span = model.centres.abs().max().item() * 1.3
paths.set(title="four searches for the letter q", xlim=(-span, span), ylim=(-span, span))
plt.show()

# %%
# **Conclusion.** Inference by prediction errors can search a memory. That the noise is in proportion to the
# error makes the search wander while it is wrong and rest where it is right. With noise on the target
# the error never falls silent, and the last cause is often lost again; the pass of least error is not.
#
# Model: L. Annabi, "Structured memory retrieval". ``python -m paper_figures --figure memory`` compares
# its settings with these over five networks.
