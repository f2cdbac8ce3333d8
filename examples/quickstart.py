r"""
Predictive coding beside backpropagation
========================================

**Question.** What happens to training when ``loss.backward()`` is replaced by ``PCInfer``, and what
do its three algorithms write into ``.grad``?

A network of L layers computes :math:`\hat v_0 = X,\ \hat v_l = f_l(\hat v_{l-1})`. Backpropagation
updates layer l's parameters by :math:`(\partial f_l / \partial \theta_l)^T g_l` with
:math:`g_l = \partial \mathrm{Loss} / \partial \hat v_l`. Predictive coding has the same form, with a
*prediction error* :math:`\epsilon_l` in the place of :math:`g_l`,

.. math:: \Delta\theta_l = \Big(\frac{\partial f_l}{\partial \theta_l}\Big)^T \epsilon_l ,

and finds the errors by letting *beliefs* :math:`v_l` about each layer's value relax, n times with step
size :math:`\eta`, each from what its neighbours say:

.. math::

   \epsilon_l = f_l(v_{l-1}) - v_l, \qquad
   v_l \leftarrow v_l + \eta\,\big(\epsilon_l - J_{l+1}^T \epsilon_{l+1}\big) .

This is ``"Strict"``. ``"FixedPred"`` keeps predictions and Jacobians J at the feed-forward values, and
``"Exact"`` takes the errors where it would end: at the gradients themselves.
"""

import copy
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from paper_figures.data import load_digits
from torch2pc import PCInfer

STEPS = 400  # short: 12
BATCH = 100
CPU = torch.device("cpu")

digits = load_digits(None)

# %%
# The network
# -----------
# Each item of an ``nn.Sequential`` is one layer of predictive coding, with a belief of its own. The
# items are cut *before* the activation: the belief is about what goes into the ReLU.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 128)),
        nn.Sequential(nn.ReLU(), nn.Linear(128, 64)),
        nn.Sequential(nn.ReLU(), nn.Linear(64, 32)),
        nn.Sequential(nn.ReLU(), nn.Linear(32, 10)),
    )


LossFun = nn.CrossEntropyLoss()

# %%
# One batch: what is in ``.grad``?
# --------------------------------
# For each algorithm we compare the update of every layer's weights with the gradient: its length, as
# a share of the gradient's, and the angle between them.

model = network()
batch = next(digits.train_batches(1, BATCH, seed=1, device=CPU))
LossFun(model(batch.X), batch.labels).backward()
gradients = [item[-1].weight.grad.clone() for item in model]


def compare(ErrType: str) -> tuple[list[float], list[float]]:
    """Each layer's length relative to the gradient, and its angle to it in degrees."""
    PCInfer(model, LossFun, batch.X, batch.labels, ErrType, eta=0.1, n=20)
    lengths, angles = [], []
    for item, g in zip(model, gradients, strict=True):
        update = item[-1].weight.grad
        cosine = nn.functional.cosine_similarity(update.double().flatten(), g.double().flatten(), 0)
        lengths.append((update.norm() / g.norm()).item())
        angles.append(torch.rad2deg(cosine.clamp(-1, 1).acos()).item())
    return lengths, angles


print("            length / gradient's         angle (degrees)")
print("layer         1     2     3     4         1     2     3     4")
for ErrType in "Exact", "FixedPred", "Strict":
    lengths, angles = compare(ErrType)
    numbers = "".join(f"{x:6.3f}" for x in lengths) + "    " + "".join(f"{x:6.2f}" for x in angles)
    print(f"{ErrType:10}", numbers)

# %%
# Exact *is* the gradient. FixedPred is parallel to it, and shorter in lower layers: the error climbs
# down one layer an iteration and arrives by degrees. How much of it is there at the n-th iteration
# does not depend on the weights; the closed form, which ``PCInfer`` computes, is
#
# .. math:: \epsilon_l = P[\mathrm{Binomial}(n-1, \eta) \ge L-l]\; g_l .

shares = [
    sum(math.comb(19, k) * 0.1**k * 0.9 ** (19 - k) for k in range(m, 20)) for m in (3, 2, 1, 0)
]
print(*(f"layer {layer}: {share:.3f}" for layer, share in enumerate(shares, 1)), sep=", ")

# %%
# These are the lengths in FixedPred's row. Strict, whose predictions follow the beliefs, has an update
# of its own: on the way it is a little behind, and it points a few degrees away from the gradient.

# %%
# Training
# --------
# The loop is the same for all: no ``zero_grad`` is needed, as ``PCInfer`` replaces ``.grad``. All four
# start from the same weights and see the same batches; Adam does not mind that an update is shorter.


def train(ErrType: str) -> tuple[list[float], nn.Sequential]:
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = []
    for batch in digits.train_batches(STEPS, BATCH, seed=0, device=CPU):
        if ErrType == "backprop":
            optimizer.zero_grad()
            Loss = LossFun(model(batch.X), batch.labels)
            Loss.backward()
        else:
            _, Loss, _, _, _ = PCInfer(model, LossFun, batch.X, batch.labels, ErrType)
        optimizer.step()
        losses.append(Loss.item())
    return losses, model


@torch.no_grad()
def accuracy(model: nn.Sequential) -> float:
    right = sum(
        (model(batch.X).argmax(1) == batch.labels).sum().item()
        for batch in digits.all_test_batches(500, CPU)
    )
    return right / len(digits.test_labels)


start = network()
curves = {}
for ErrType in "backprop", "Exact", "FixedPred", "Strict":
    curves[ErrType], trained = train(ErrType)
    print(
        f"{ErrType:10} loss {sum(curves[ErrType][-10:]) / 10:.3f}  accuracy {accuracy(trained):.3f}"
    )

# %%
# The curves of backprop and Exact are one. FixedPred's differs by the lengths of its updates alone, which
# Adam evens out, and Strict's stays close.

figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
styles = {"backprop": "-", "Exact": ":", "FixedPred": "--", "Strict": "-."}
for ErrType, losses in curves.items():
    means = torch.tensor(losses).unfold(0, 10, 1).mean(1)
    axes.plot(range(5, 5 + len(means)), means, styles[ErrType], label=ErrType)
axes.set(xlabel="training step", ylabel="loss, mean over 10 steps", yscale="log")
axes.legend()
plt.show()

# %%
# **Conclusion.** One call takes the place of ``backward()``, and a network learns as it does with
# backpropagation. FixedPred costs about as much as backpropagation, whatever n is; Strict costs n
# passes through the layers, and is the one whose updates are really different and computed by local
# steps alone. Which to choose when is on the page about the algorithms.
