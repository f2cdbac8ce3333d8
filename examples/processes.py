r"""
Several processes
=================

**Question.** A batch is divided over several processes, or GPUs. Do they learn what one process learns
from the whole batch?

With backpropagation it is enough to average the processes' gradients. Strict's updates are not linear in
the loss: in its energy, a mean over the N examples of the batch weighs :math:`1/N` against the hidden
errors of each. So a process r that has :math:`B_r` of the N examples must relax with

.. math::

   F_r = \frac{B_r}{N}\, \mathrm{Loss}_r + \tfrac12 \sum_{l<L} \lVert\epsilon_l\rVert^2, \qquad
   \Delta\theta = \sum_r \frac{\partial F_r}{\partial \theta} ,

and the updates are summed, not averaged. ``torch2pc.distributed.PCInfer`` does both. It is called as
``PCInfer`` is, with each process's own part of the batch.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from paper_figures.data import load_digits
from torch2pc import PCInfer

STEPS = 200  # short: 3
BATCH = 64
CPU = torch.device("cpu")

digits = load_digits(None)


# %%
# One process
# -----------
# First the updates of all algorithms for one batch, then a training by Strict, in float64.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 64)),
        nn.Sequential(nn.Tanh(), nn.Linear(64, 32)),
        nn.Sequential(nn.Tanh(), nn.Linear(32, 10)),
    ).double()


ALGORITHMS = ("Exact", "FixedPred", "Strict", "ErrorBased", "Equilibrium")
LossFun = nn.CrossEntropyLoss()


def updates(ErrType: str, X: Tensor, Y: Tensor) -> Tensor:
    model = network()
    PCInfer(model, LossFun, X, Y, ErrType, eta=0.1, n=20)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


first = next(digits.train_batches(1, BATCH, seed=0, device=CPU))
one = {name: updates(name, first.X.double(), first.labels) for name in ALGORITHMS}

model, losses = network(), []
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
for batch in digits.train_batches(STEPS, BATCH, seed=0, device=CPU):
    result = PCInfer(model, LossFun, batch.X.double(), batch.labels, "Strict", eta=0.1, n=20)
    optimizer.step()
    losses.append(result.Loss.item())

# %%
# Two processes
# -------------
# This is the program that each of them runs. They start from the same weights and draw the same batches,
# of which the first takes 40 examples and the second 24. The loop is the one above but for the import
# and for ``mine``.

PROGRAM = """
import sys

import torch
from torch import distributed, nn

from paper_figures.data import load_digits
from torch2pc.distributed import PCInfer

distributed.init_process_group("gloo")  # "nccl" on GPUs
rank = distributed.get_rank()
mine = [slice(0, 40), slice(40, 64)][rank]
steps, results = int(sys.argv[1]), sys.argv[2]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 64)),
        nn.Sequential(nn.Tanh(), nn.Linear(64, 32)),
        nn.Sequential(nn.Tanh(), nn.Linear(32, 10)),
    ).double()


def batches(count):
    for batch in load_digits(None).train_batches(count, 64, 0, torch.device("cpu")):
        yield batch.X.double()[mine], batch.labels[mine]


LossFun = nn.CrossEntropyLoss()
updates, losses = {}, []
for ErrType in "Exact", "FixedPred", "Strict", "ErrorBased", "Equilibrium":
    model = network()
    for X, Y in batches(1):
        PCInfer(model, LossFun, X, Y, ErrType, eta=0.1, n=20)
    updates[ErrType] = torch.cat([p.grad.flatten() for p in model.parameters()])

model = network()
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
for X, Y in batches(steps):
    result = PCInfer(model, LossFun, X, Y, "Strict", eta=0.1, n=20)
    optimizer.step()
    losses.append(result.Loss.item())  # the whole batch's, on both

torch.save((updates, losses, model.state_dict()), f"{results}/{rank}.pt")
distributed.destroy_process_group()
"""

# %%
# In a shell it is started by ``torchrun --nproc-per-node=2 train.py``; here it is written to a file and
# started by the same means. ``--standalone`` finds a free port on this machine.

with tempfile.TemporaryDirectory() as folder:
    program = Path(folder, "train.py")
    program.write_text(PROGRAM, "utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the two meet on this machine
    done = subprocess.run(
        [*torchrun, "--local-addr=127.0.0.1", str(program), str(STEPS), folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"the processes failed:\n{done.stdout}{done.stderr}")
    ranks = [torch.load(Path(folder, f"{rank}.pt")) for rank in (0, 1)]

(two, losses_of_two, parameters), other = ranks
same = all(torch.equal(p, other[2][name]) for name, p in parameters.items())
print(f"the two processes end with the same parameters: {same}")

# %%
# Are they the same?
# ------------------
# Beside them, what would come of relaxing each part with its own mean and averaging the updates, as
# ``DistributedDataParallel`` averages gradients. It is right for Exact and FixedPred if the parts are
# equal, or weighed by their sizes as here.


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


X, Y = first.X.double(), first.labels
print("distance from one process's updates:   two processes   averaged")
for name in ALGORITHMS:
    parts = [(rows, len(Y[rows]) / BATCH) for rows in (slice(0, 40), slice(40, 64))]
    averaged = sum(share * updates(name, X[rows], Y[rows]) for rows, share in parts)
    print(f"{name:37} {distance(two[name], one[name]):15.0e} {distance(averaged, one[name]):10.0e}")

apart = max((parameters[name] - p).abs().max().item() for name, p in model.state_dict().items())
print(f"after {STEPS} steps of training the parameters differ by at most {apart:.0e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
left.plot(losses, label="one process")
left.plot(losses_of_two, ":", label="two processes", linewidth=2.5)
left.set(xlabel="training step", ylabel="loss of the whole batch", yscale="log")
left.legend()
differences = [max(abs(a - b), 1e-17) for a, b in zip(losses_of_two, losses, strict=True)]
right.plot(differences, ".", markersize=3)
right.set(xlabel="training step", ylabel="difference (0 drawn at 1e-17)", yscale="log")
plt.show()

# %%
# **Conclusion.** Two processes with unequal parts of a batch learn what one learns, with every algorithm,
# to the round-off of sums taken in another order. Relaxing needs no messages: each gradient is sent once a
# step, whatever n is, as with backpropagation. What is asked of the program is the same weights at the
# start on all processes. Parts may differ in size, and none may be empty.
