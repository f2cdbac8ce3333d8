r"""
Skips and attention, with beliefs inside
========================================

**Question.** Does predictive coding need a chain of layers? Can a belief lie inside a residual block, or
between the queries and the output of an attention?

In a graph each layer i predicts the belief at its place from those of its parents,

.. math::

   F(v) = \mathrm{Loss}(f_L(v_\mathrm{parents}), Y)
   + \tfrac12 \sum_{i<L} \lVert f_i(v_\mathrm{parents}) - v_i \rVert^2 ,

and the errors of all its children arrive at a belief. ``PCGraph`` has names for the places; ``PCInfer``
takes it where it takes an ``nn.Sequential``.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from paper_figures.data import load_digits
from torch2pc import PCGraph, PCInfer, follow

STEPS = 100  # short: 3
BATCH = 100  # short: 10
CPU = torch.device("cpu")

digits = load_digits(None)
torch.manual_seed(0)


# %%
# A residual network
# ------------------
# As a chain a whole block would be one layer. Here what its branch hands to its end is a belief, too.


class Join(nn.Module):
    """skip + W tanh(branch): the end of a block."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, branch, skip):
        return skip + self.linear(torch.tanh(branch))


def inner(width):
    return nn.Sequential(nn.Tanh(), nn.Linear(width, width))


residual = PCGraph(
    stem=(nn.Sequential(nn.Flatten(), nn.Linear(784, 64)), "x"),
    branch1=(inner(64), "stem"),
    block1=(Join(64), "branch1", "stem"),
    branch2=(inner(64), "block1"),
    block2=(Join(64), "branch2", "block1"),
    out=(nn.Sequential(nn.Tanh(), nn.Linear(64, 10)), "block2"),
)
print(residual.names)

# %%
# Attention
# ---------
# An image is a sequence of its 28 rows. Queries, keys, values, what the attention makes of them and the
# hidden layer of the block's perceptron are beliefs.


class Attend(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Rows(nn.Module):
    """Each row of an image, with a learnt vector for its place."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.place = nn.Linear(28, width), nn.Parameter(torch.empty(28, width))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.place, std=0.1)

    def forward(self, x):
        return self.linear(x.flatten(1, 2)) + self.place


class Head(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 10)

    def forward(self, x):
        return self.linear(x.mean(1))


def normed(width, out):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out))


attention = PCGraph(
    rows=(Rows(32), "x"),
    q=(normed(32, 32), "rows"),
    k=(normed(32, 32), "rows"),
    v=(normed(32, 32), "rows"),
    heads=(Attend(), "q", "k", "v"),
    added=(Join(32), "heads", "rows"),
    hidden=(normed(32, 64), "added"),
    out=(nn.Sequential(nn.GELU(), nn.Linear(64, 32), Head(32)), "hidden"),
)

# %%
# What an inference does in them
# ------------------------------
# ``follow`` draws the graph, with the energy that is left at each place in the end. (In a notebook, a
# ``PCGraph`` shows itself.) The errors take the shortest way first: from the end of a block they go down
# the skip and past its inside.

LossFun = nn.CrossEntropyLoss(reduction="sum")
batch = next(digits.train_batches(1, BATCH, seed=1, device=CPU))
for model in (residual, attention):
    record = follow(model, LossFun, batch.X, batch.labels, "ErrorBased", eta=0.1, n=10)
    record.plot()
    plt.show()
    print(record.verdict[0])

# %%
# Learning
# --------
# The same call for every algorithm. FixedPred adds up what has come along ways of each length, and equals
# the iteration; Strict is local: no error goes further than one layer in an iteration. The attention, at its
# start, learns more slowly from ErrorBased's errors than from backpropagation's, which Exact's are.

figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
test = next(digits.all_test_batches(1000, CPU))
runs = [
    ("residual, Strict", residual, "Strict", dict(eta=0.1, n=20)),
    ("residual, FixedPred", residual, "FixedPred", dict(eta=0.5, n=10)),
    ("attention, ErrorBased", attention, "ErrorBased", dict(eta=0.02, n=5)),
    ("attention, Exact", attention, "Exact", {}),
]
for name, model, ErrType, options in runs:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    losses = []
    for training in digits.train_batches(STEPS, BATCH, seed=0, device=CPU):
        result = PCInfer(model, LossFun, training.X, training.labels, ErrType, **options)
        optimizer.step()
        losses.append(result.Loss.item() / BATCH)
    with torch.no_grad():
        right = (model(test.X).argmax(1) == test.labels).float().mean()
    print(f"{name}: {right:.0%} of the test digits after {STEPS} steps")
    axes.plot(losses, label=name)
axes.set(xlabel="training step", ylabel="loss", yscale="log")
axes.legend()
plt.show()

# %%
# **Conclusion.** Where beliefs lie is a choice, and a chain one of many. ``PCGraph`` needs the layers by
# name, each with the names of its parents; gradients, buffers and random numbers are as in a chain, and so
# is every option of ``PCInfer``.
