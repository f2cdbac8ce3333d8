r"""
Deep networks
=============

**Question.** Strict's signal does not arrive at the lower layers of a deep network. What do
``"Multipliers"``, ``"ErrorBased"`` and ``"Equilibrium"`` do there, and what is it worth?

Four algorithms start from the same energy,

.. math::

   F = \mathrm{Loss}(f_L(v_{L-1}), Y) + \tfrac12 \sum_{l<L} \lVert\epsilon_l\rVert^2, \qquad
   v_l = f_l(v_{l-1}) - \epsilon_l .

``"Strict"`` moves the beliefs. An error climbs down one layer an iteration, and is multiplied by about
:math:`\eta` at each when it first arrives. ``"Multipliers"`` moves them too, one after the other from the
top, so that an error gets through many layers in one sweep, and adds up what is left of each error in a
Lagrange multiplier until prediction and belief are the same,

.. math::

   v_l \leftarrow v_l + \eta\, \big(\epsilon_l + \lambda_l - J_{l+1}^T (\epsilon_{l+1} + \lambda_{l+1})\big),
   \qquad \lambda_l \leftarrow \lambda_l + \epsilon_l .

``"ErrorBased"`` moves the errors, through all layers at once,

.. math:: \epsilon_l \leftarrow \epsilon_l - \eta\, \frac{\mathrm dF}{\mathrm d\epsilon_l}
   = \epsilon_l + \eta\,\big((J_L \cdots J_{l+1})^T e_L - \epsilon_l\big) ,

with :math:`e_L` the loss's gradient at the output of the perturbed pass. ``"Equilibrium"`` goes on to
where F has its minimum, by a quasi-Newton method, and says how near it came.
"""

import copy
import time
import warnings

import matplotlib.pyplot as plt
import torch
from torch import nn

from paper_figures.data import Batch, load_digits
from torch2pc import EquilibriumResult, PCInfer, PCResult

STEPS = 80  # short: 2
LAYERS = 20  # short: 6
BATCH = 64
CPU = torch.device("cpu")

digits = load_digits(None)
LossFun = nn.CrossEntropyLoss()

# %%
# Networks of 20 layers
# ---------------------
# The items are cut before the activation, and the weights start so that signals keep their size from
# layer to layer: for ReLU by Kaiming's rule, for tanh by Xavier's. (PyTorch's own start shrinks a ReLU's
# signal to :math:`1/\sqrt 6` of its size in each layer. Not even backpropagation learns from what that
# leaves.)


def network(activation: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 128)),
        *[nn.Sequential(activation(), nn.Linear(128, 128)) for _ in range(LAYERS - 2)],
        nn.Sequential(activation(), nn.Linear(128, 10)),
    )
    for *_, linear in model:
        if activation is nn.Tanh:
            nn.init.xavier_normal_(linear.weight)
        else:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
    return model


METHODS = {
    "backprop": {"ErrType": "Exact"},
    "Strict": {"ErrType": "Strict", "eta": 0.1, "n": 20},
    "Multipliers": {"ErrType": "Multipliers", "eta": 0.8, "n": 3},
    "ErrorBased": {"ErrType": "ErrorBased", "eta": "auto", "n": 5, "update_at": "vhat"},
    "Equilibrium": {"ErrType": "Equilibrium", "n": 10, "update_at": "vhat"},
}


def update(method: str, model: nn.Sequential, batch: Batch) -> PCResult:
    """One method's updates in ``.grad``; those of ``"Exact"`` are backpropagation's."""
    return PCInfer(model, LossFun, batch.X, batch.labels, **METHODS[method])


# %%
# With ``eta="auto"`` ErrorBased finds a stable step size in each call, and ``update_at="vhat"`` takes the
# updates at the feed-forward values, :math:`(\partial f_l(\hat v_{l-1}) / \partial \theta_l)^T \epsilon_l`,
# instead of at the beliefs.
#
# Training
# --------
# All start from the same weights, with the same learning rate, and see the same batches. Strict warns,
# once for each model, of what it cannot reach.


@torch.no_grad()
def accuracy(model: nn.Sequential) -> float:
    test = next(digits.all_test_batches(len(digits.test_labels), CPU))
    return (model(test.X).argmax(1) == test.labels).float().mean().item()


def train(method: str) -> tuple[list[float], nn.Sequential]:
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    losses = []
    for batch in digits.train_batches(STEPS, BATCH, seed=0, device=CPU):
        losses.append(update(method, model, batch).Loss.item())
        optimizer.step()
    return losses, model


start = network(nn.ReLU)
curves, trained = {}, {}
for method in METHODS:
    begin = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curves[method], trained[method] = train(method)
    spent = 1000 * (time.process_time() - begin) / STEPS
    for warning in caught:
        print("warning:", str(warning.message).partition(";")[0])
    print(f"{method:20} test accuracy {accuracy(trained[method]):.3f}, {spent:3.0f} ms a step")

styles = dict(zip(METHODS, ("k-", "C1:", "C3-", "C0-", "C2-"), strict=True))
figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for method, losses in curves.items():
    means = torch.tensor(losses).unfold(0, min(10, STEPS), 1).mean(1)
    axes.plot(range(5, 5 + len(means)), means, styles[method], label=method)
axes.set(xlabel="training step", ylabel="loss, mean over 10 steps", ylim=(0, 3.4))
axes.legend(loc="upper right", fontsize="small")
plt.show()

# %%
# What arrives at each layer
# --------------------------
# In the network that backpropagation has trained, the updates of all methods for the same batch: their
# lengths as shares of the gradient's, and their cosines to it.

model = trained["backprop"]
weights = [item[-1].weight for item in model]
batch = next(digits.train_batches(1, BATCH, seed=1, device=CPU))
update("backprop", model, batch)
gradients = [weight.grad.double() for weight in weights]

figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
places = [0, LAYERS // 4, LAYERS // 2, LAYERS - 1]
print(f"{'':20} length / gradient's, and cosine to it, at layers", *(place + 1 for place in places))
for method in list(METHODS)[1:]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of above
        update(method, model, batch)
    lengths, cosines = [], []
    for weight, gradient in zip(weights, gradients, strict=True):
        length = weight.grad.double().norm() / gradient.norm()
        cosine = (weight.grad.double() * gradient).sum() / gradient.norm().square() / length
        lengths.append(length.item())
        cosines.append(cosine.item())
    left.plot(range(1, LAYERS + 1), lengths, styles[method], label=method)
    right.plot(range(1, LAYERS + 1), cosines, styles[method])
    print(
        f"{method:20}",
        *(f"{lengths[place]:7.0e}" for place in places),
        " ",
        *(f"{cosines[place]:5.2f}" for place in places),
    )
left.set(xlabel="layer", ylabel="length / gradient's", yscale="log")
right.set(xlabel="layer", ylabel="cosine to the gradient", ylim=(0, 1.05))
left.legend()
plt.show()

# %%
# At layer 1 Strict's update is :math:`10^{-19}` of the gradient: what has arrived after 19 steps down
# with :math:`\eta = 0.1`. It is right to float precision, and of no use: Adam divides an update by its
# size, but by no less than its ``eps`` of :math:`10^{-8}`, so that Strict trains the upper layers alone.
# The others reach every layer. Of the gradient three sweeps bring 0.04 to layer 1, in nearly its direction,
# and Adam makes of it what it makes of the whole. More sweeps bring more: where Multipliers come to rest, the
# errors are the gradients. The further the other two relax, the less they point where the gradient does.
#
# How far is Equilibrium?
# -----------------------
# ``result.distance`` is the length of F's gradient, in units of the errors', for each example;
# ``result.evaluations`` says after how many passes it stopped. It stops early once all examples are below
# the square root of the precision, 3e-4 in float32. Where it stays far from 0 in most, a warning says so.

print("                    n  evaluations   distance: median, largest")
for activation in nn.ReLU, nn.Tanh:
    model = network(activation)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for training in digits.train_batches(STEPS, BATCH, seed=0, device=CPU):
        update("backprop", model, training)
        optimizer.step()
    for n in 3, 10, 50:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = PCInfer(model, LossFun, batch.X, batch.labels, "Equilibrium", n=n)
        assert isinstance(result, EquilibriumResult)
        distance = result.distance
        print(
            f"{activation.__name__:10} {n:10} {result.evaluations:12}"
            f" {distance.median().item():14.0e} {distance.max().item():10.0e}"
        )

# %%
# With tanh Equilibrium arrives after a few evaluations. With ReLU it does not, however many there are:
# the minimum lies where units switch, and the gradient jumps there. Half of the examples come to a percent,
# and some stay far away.
#
# **Conclusion.** At 20 layers Strict learns with its upper layers alone, and ends far behind. The others
# reach every layer, and end near backpropagation after these few steps, at a multiple of its time.
# Multipliers do so locally: each belief and each multiplier needs no more than its neighbours, though a sweep
# has an order, from the top, as backpropagation's pass has. An iteration of the other two carries the loss's
# gradient through all layers, and only the updates are each layer's own. These are one seed and one learning
# rate; the page on the paper's figures has networks of 3 to 128 layers, each method at a rate of its own.
