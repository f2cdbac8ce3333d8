"""Graphs: one relaxation step against a plain step by autograd on the same energy, and its memory.

The plain step is what one would write without the library: all beliefs are leaves, F is computed, and its
gradient moves them. It subtracts beliefs from predictions, where the library has rules for displacements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.memory import peak_memory
from benchmarks.nets import CLASSES, Case, make_case
from benchmarks.report import Options, Row, device_name, save_rows
from benchmarks.speed import ratio
from benchmarks.steps import Step
from benchmarks.timing import alternate, threads
from torch2pc import PCGraph, PCInfer
from torch2pc.graph.network import Network
from torch2pc.graph.nodes import nodes_of
from torch2pc.inference.strict import strict

METHOD = (
    "One step of Strict, in which all beliefs move, in units of a plain one: F of all beliefs, its gradient "
    "by torch.autograd.grad with frozen parameters, and v -= eta gradient. They take turns in one process; a "
    "number is the median of the ratios within the rounds. Memory is the peak of ten steps in a row, on top "
    "of what was there."
)

ETA = 0.01


class Sum(nn.Module):
    def forward(self, *x: Tensor) -> Tensor:
        return sum(x[1:], x[0])


class Concatenated(nn.Module):
    """DenseNet's layer: of all that came before."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(count * width, width)

    def forward(self, *x: Tensor) -> Tensor:
        return self.linear(torch.cat(x, -1))


class Attend(nn.Module):
    """Attention with 4 heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (q, k, v))
        p = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        return (p @ v).transpose(1, 2).flatten(2)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def residual(width: int = 256, blocks: int = 6) -> PCGraph:
    """Products of matrices and sums alone, with beliefs inside the blocks."""
    layers: dict[str, tuple[object, ...]] = {"stem": (nn.Linear(width, width), "x")}
    last = "stem"
    for b in range(blocks):
        layers[f"a{b}"] = nn.Linear(width, width), last
        layers[f"b{b}"] = nn.Linear(width, width), f"a{b}"
        layers[f"c{b}"] = Sum(), f"b{b}", last
        last = f"c{b}"
    return PCGraph(**layers, out=(nn.Linear(width, CLASSES), last))


def dense(width: int = 128, count: int = 10) -> PCGraph:
    """Each layer has all that came before as its parents."""
    layers: dict[str, tuple[object, ...]] = {"l0": (nn.Linear(width, width), "x")}
    for l in range(1, count):
        layers[f"l{l}"] = Concatenated(l, width), *layers
    return PCGraph(**layers, out=(nn.Linear(width, CLASSES), f"l{count - 1}"))


def transformer(width: int = 64, blocks: int = 2, precise: bool = True) -> PCGraph:
    """With beliefs at q, k, v, the attention's output and the hidden layer; or without norms and GELUs."""

    def normed(out: int) -> nn.Module:
        linear = nn.Linear(width, out)
        return nn.Sequential(nn.LayerNorm(width), linear) if precise else linear

    layers: dict[str, tuple[object, ...]] = {"stem": (nn.Linear(width, width), "x")}
    last = "stem"
    for b in range(blocks):
        layers.update({f"{name}{b}": (normed(width), last) for name in "qkv"})
        layers[f"heads{b}"] = Attend(), f"q{b}", f"k{b}", f"v{b}"
        layers[f"projected{b}"] = nn.Linear(width, width), f"heads{b}"
        layers[f"added{b}"] = Sum(), f"projected{b}", last
        layers[f"hidden{b}"] = normed(4 * width), f"added{b}"
        down: nn.Module = nn.Linear(4 * width, width)
        layers[f"mlp{b}"] = nn.Sequential(nn.GELU(), down) if precise else down, f"hidden{b}"
        last = f"block{b}"
        layers[last] = Sum(), f"mlp{b}", f"added{b}"
    return PCGraph(**layers, out=(nn.Sequential(Mean(), nn.Linear(width, CLASSES)), last))


# Name: builder, shape of a batch, what a step may cost in units of a plain one.
GRAPHS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float | None]] = {
    "residual": (residual, (64, 256), 1.1),
    "dense": (dense, (64, 128), 1.1),
    "attention": (lambda: transformer(precise=False), (16, 16, 64), None),
    "transformer": (transformer, (16, 16, 64), None),
}


def run(options: Options) -> None:
    """Measure, print and save the table."""
    rows: list[Row] = []
    for device, count in options.devices():
        for name in tqdm(GRAPHS, "graphs"):
            build, shape, bar = GRAPHS[name]
            case = make_case(name, "graph", build, shape, device)  # type: ignore[arg-type]
            with threads(count):
                steps = {"Strict's step": library(case), "plain step": plain(case)}
                times = alternate(steps, device, options.seconds, name)
                found = [ratio(times, "Strict's step", "plain step", bar)]
                peaks = {what: peak_memory(ten(step), device) for what, step in steps.items()}
            value = peaks["Strict's step"] / peaks["plain step"]
            found.append(dict(what="Strict's memory", of="the plain step's", value=value))
            rows += [Row(name, device_name(device, count), **row) for row in found]
    save_rows(options, "graphs", rows, method=METHOD)


def ten(step: Step) -> Step:
    """Ten in a row."""

    def steps() -> None:
        for _ in range(10):
            step()

    return steps


def library(case: Case) -> Step:
    """One step of Strict, of beliefs that have all moved."""
    vhat = PCInfer(case.model, case.LossFun, case.X, case.Y, "Exact").vhat
    network = Network(case.model, case.LossFun, case.X, case.Y)
    return strict(network, ETA, [v + 0.01 * torch.randn_like(v) for v in vhat]).step


def plain(case: Case) -> Step:
    """The same by autograd on F."""
    vhat = PCInfer(case.model, case.LossFun, case.X, case.Y, "Exact").vhat
    *hidden, last = nodes_of(case.model)
    for p in case.model.parameters():
        p.requires_grad_(False)
    v = [case.X, *[v_i.clone().requires_grad_() for v_i in vhat[1:-1]]]
    # That of layers of the input alone does not move.
    fixed = {i: vhat[i] for i, node in enumerate(hidden, start=1) if node.parents == (0,)}

    def step() -> None:
        F = case.LossFun(last.function(*[v[p] for p in last.parents]), case.Y)
        for i, node in enumerate(hidden, start=1):
            f = fixed[i] if i in fixed else node.function(*[v[p] for p in node.parents])
            F = F + 0.5 * (f - v[i]).square().sum()
        found = torch.autograd.grad(F, v[1:])
        with torch.no_grad():
            torch._foreach_add_(v[1:], found, alpha=-ETA)

    return step
