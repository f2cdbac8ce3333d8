r"""
Incremental predictive coding
=============================

**Question.** Must the beliefs come to rest before the weights learn?

Usually they relax for n iterations, of which only the last is used to update the weights. In
incremental predictive coding (Salvatori et al., arXiv:2212.00720) both descend the same energy together,
a step each at a time,

.. math::

   v_l \leftarrow v_l + \eta\,\big(\epsilon_l - J_{l+1}^T \epsilon_{l+1}\big), \qquad
   \theta_l \leftarrow \theta_l - \alpha\,
   \Big(\frac{\partial f_l}{\partial \theta_l}\Big)^T \epsilon_l, \qquad
   \epsilon_l = f_l(v_{l-1}) - v_l ,

T times on each batch. It is the expectation-maximisation algorithm with partial steps. With ``PCInfer`` it
is ``"Strict"`` with ``n=1`` that goes on from the beliefs that the last call returned.
"""

import copy

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from paper_figures.data import Batch, load_digits
from torch2pc import PCInfer

STEPS = 2000  # short: 40
BATCH = 64
T = 5
CPU = torch.device("cpu")

digits = load_digits(None)

# %%
# The network, cut before its activations, and the loss
# -----------------------------------------------------
# The loss is a sum over the batch, as the energy of the beliefs is.

torch.manual_seed(0)
start = nn.Sequential(
    nn.Sequential(nn.Flatten(), nn.Linear(784, 128)),
    nn.Sequential(nn.Tanh(), nn.Linear(128, 128)),
    nn.Sequential(nn.Tanh(), nn.Linear(128, 10)),
)
LossFun = nn.CrossEntropyLoss(reduction="sum")


# %%
# Two ways to spend belief steps
# ------------------------------
# The usual one spends 20 of them on one update of the weights.


def usual(model: nn.Sequential, optimizer: torch.optim.Optimizer, batch: Batch) -> int:
    PCInfer(model, LossFun, batch.X, batch.labels, "Strict", eta=0.1, n=20)
    optimizer.step()
    return 20


# %%
# The incremental one updates the weights after each, and stays with a batch for T of them. A call starts
# from ``vinit``, the beliefs of the last one; ``None``, for a new batch, is the feed-forward pass. With
# ``update_at="before"`` the weights' update is the energy's gradient at the beliefs before the step, where
# theirs was taken.


def incremental(model: nn.Sequential, optimizer: torch.optim.Optimizer, batch: Batch) -> int:
    X, Y = batch.X, batch.labels
    v: list[Tensor] | None = None
    for _ in range(T):
        result = PCInfer(model, LossFun, X, Y, "Strict", 0.1, n=1, vinit=v, update_at="before")
        v = result.v
        optimizer.step()
    return T


# %%
# Training with the same number of belief steps
# ---------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Sequential) -> float:
    test = next(digits.all_test_batches(len(digits.test_labels), CPU))
    return (model(test.X).argmax(1) == test.labels).float().mean().item()


def train(learn) -> tuple[list[int], list[float]]:
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0005)
    spent, when, accuracies = 0, [], []
    for batch in digits.train_batches(STEPS, BATCH, seed=0, device=CPU):
        if spent >= STEPS:
            break
        spent += learn(model, optimizer, batch)
        if spent % (STEPS // 20) == 0:
            when.append(spent)
            accuracies.append(accuracy(model))
    return when, accuracies


figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for learn in usual, incremental:
    when, accuracies = train(learn)
    print(f"{learn.__name__:12} accuracy {accuracies[-1]:.3f} after {when[-1]} belief steps")
    axes.plot(when, accuracies, label=learn.__name__)
axes.set(xlabel="belief steps", ylabel="test accuracy", ylim=(0, 1))
axes.legend()
plt.show()

# %%
# **Conclusion.** A belief step is worth more when the weights learn at once. The price is noise: an
# update that is taken while the errors are still on their way points less exactly, so that the learning
# rate, and eta, must be smaller than where the beliefs come to rest first.
