r"""
See an inference, choose eta and n
==================================

**Question.** Has my inference converged? Which step size and how many iterations does it need? Are its
updates still like backpropagation's?

``"Strict"`` lets the beliefs descend the energy of their errors,

.. math::

   F = \mathrm{Loss}(f_L(v_{L-1}), Y) + \tfrac12 \sum_{l<L} \lVert\epsilon_l\rVert^2, \qquad
   \epsilon_l = f_l(v_{l-1}) - v_l, \qquad
   v_l \leftarrow v_l - \eta\, \frac{\partial F}{\partial v_l} ,

n times. It is stable for :math:`\eta < 2/\lambda_{\max}`, with the largest eigenvalue of F's Hessian, and
takes the longer, the smaller the other eigenvalues are. All of this depends on the weights, the loss and the
batch. ``follow`` runs the same inference as ``PCInfer`` without touching the model, and tells.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from paper_figures.data import load_digits
from torch2pc import PCInfer, follow

STEPS = 300  # short: 5
EVERY = 20  # short: 4
BATCH = 100
INSIDE = 4  # short: 1
CPU = torch.device("cpu")

digits = load_digits(None)

# %%
# A network of six layers, and the defaults
# -----------------------------------------
# The loss is a sum over the batch, as the energy of the beliefs is.

torch.manual_seed(0)
model = nn.Sequential(
    nn.Sequential(nn.Flatten(), nn.Linear(784, 128)),
    *[nn.Sequential(nn.Tanh(), nn.Linear(128, 128)) for _ in range(INSIDE)],
    nn.Sequential(nn.Tanh(), nn.Linear(128, 10)),
)
LossFun = nn.CrossEntropyLoss(reduction="sum")
batch = next(digits.train_batches(1, BATCH, seed=1, device=CPU))

record = follow(model, LossFun, batch.X, batch.labels, "Strict", eta=0.1, n=20)
record.summary()

# %%
# The last column is what float32 would leave of the errors if they were computed as the difference of
# predictions and beliefs; ``PCInfer`` does not compute them so. The verdict is below the table. The
# error climbs down one layer an iteration, and its share that has arrived after 20 iterations is small in
# the lower layers. The picture shows it on its way.

record.plot()
plt.show()

# %%
# Following the advice
# --------------------
# Take the step size that it recommends, and the number of iterations, and look again.

eta = record.stable_eta / 2
n = record.iterations_to(0.01, eta)
better = follow(model, LossFun, batch.X, batch.labels, "Strict", eta=eta, n=n)
print(
    f"eta = {eta:.2g}, n = {n} was to lead to a distance of 1 %, and led to {better.distance[-1]:.2%}"
)
print("size of the updates, layers 1 to 6:", *[f"{size:.2f}" for size in better.size[-1, 1:]])

# %%
# Above the largest stable step size F falls at first, and then grows.

unstable = follow(model, LossFun, batch.X, batch.labels, "Strict", eta=2.4 * eta, n=40)
print(unstable.verdict[0])

# %%
# Other algorithms need other numbers. In the errors, as ``"ErrorBased"`` relaxes them, the Hessian is the
# identity plus a matrix of low rank, and a few iterations are enough at any depth.

slow = follow(model, LossFun, batch.X, batch.labels, "Strict", eta=0.1, n=record.n_needed)
of_errors = follow(model, LossFun, batch.X, batch.labels, "ErrorBased", eta=0.3, n=40)

figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
runs = {
    "Strict, eta = 0.1": slow,
    f"Strict, eta = {eta:.2g}": better,
    f"Strict, eta = {2.4 * eta:.2g}": unstable,
    "ErrorBased, eta = 0.3": of_errors,
}
for (label, run), style in zip(runs.items(), ("-", "--", ":", "-."), strict=True):
    axes.plot(run.distance, style, label=label)
axes.axhline(0.01, color="0.6", linewidth=0.8)
axes.set(xlabel="iteration", ylabel="distance from equilibrium", yscale="log", ylim=(3e-3, 3))
axes.legend()
plt.show()

# %%
# While it learns
# ---------------
# Weights grow, and the largest stable step size shrinks with them. ``to_dict()`` is for the loggers
# (``writer.add_scalar``, ``wandb.log``); here two of its numbers are kept every few steps.

optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
logged = []
for step, training in enumerate(digits.train_batches(STEPS, BATCH, seed=0, device=CPU)):
    if step % EVERY == 0:
        now = follow(model, LossFun, training.X, training.labels, "Strict", eta=0.1, n=20)
        logged.append((step, now.to_dict()))
    PCInfer(model, LossFun, training.X, training.labels, "Strict", eta=0.1, n=20)
    optimizer.step()

figure, axes = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
steps = [step for step, _ in logged]
axes.plot(steps, [numbers["stable_eta"] for _, numbers in logged], label="largest stable eta")
axes.plot(steps, [numbers["size/1"] for _, numbers in logged], "--", label="size of update 1")
axes.set(xlabel="training step", yscale="log")
axes.legend()
plt.show()
first, last = (logged[place][1]["stable_eta"] for place in (0, -1))
print(f"largest stable eta: {first:.2f} at first, {last:.2f} at last")

# %%
# **Conclusion.** One call says whether an inference has converged and what it would take, and a second
# one shows that it does. ``eta="auto"`` takes the safe step size by itself at each batch;
# ``follow_latent`` does the same for ``PCInferLatent``; and for a measure of your own both functions have
# a ``callback``, called with ``(k, v, epsilon)`` after each iteration.
