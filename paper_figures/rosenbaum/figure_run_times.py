"""Run times: two epochs of the MNIST network by each method, without any measurement.

The methods take turns, a step each, so that whatever else the machine does slows all of them. Data
loading is included, as it is in the paper.
"""

from __future__ import annotations

import time

import torch
from matplotlib.figure import Figure

from paper_figures.data import load_digits
from paper_figures.nets import mnist_net
from paper_figures.plotting import METHODS, panels
from paper_figures.progress import track
from paper_figures.report import Number, Options, save
from paper_figures.training import squared_error
from torch2pc import PCInfer

DOWNLOADS = ("mnist",)
SECONDS = 10, 80

# ErrType, eta and n of each method; backprop has none.
PREDICTIVE_CODING = {
    "Strict, n = 20": ("Strict", 0.1, 20),
    "FixedPred, n = 20": ("FixedPred", 0.1, 20),
    "FixedPred, η = 1, n = 5": ("FixedPred", 1.0, 5),
}
BACKPROP = "backprop"
PAPER_SECONDS = {
    "Strict, n = 20": 30.9,
    "FixedPred, n = 20": 27.4,
    "FixedPred, η = 1, n = 5": 13.0,
    BACKPROP: 7.5,
}
BATCH_SIZE = 300


def run(options: Options) -> list[Number]:
    data = load_digits(options.data)
    steps = options.pick(quick=10, default=40, full=400)
    models, optimizers, batches = {}, {}, {}
    for method in PAPER_SECONDS:
        torch.manual_seed(options.seed)
        models[method] = mnist_net().to(options.device)
        optimizers[method] = torch.optim.Adam(models[method].parameters(), lr=0.002)
        batches[method] = data.train_batches(steps + 1, BATCH_SIZE, options.seed, options.device)

    seconds = dict.fromkeys(PAPER_SECONDS, 0.0)
    for step in track(range(steps + 1), "run times"):
        for method, model in models.items():
            start = time.perf_counter()
            batch = next(batches[method])
            optimizers[method].zero_grad()
            if method == BACKPROP:
                squared_error(model(batch.X), batch.labels).backward()
            else:
                PCInfer(model, squared_error, batch.X, batch.labels, *PREDICTIVE_CODING[method])
            optimizers[method].step()
            wait_for(options.device)
            # The first step of each is not counted: it sets up what later ones find ready.
            if step > 0:
                seconds[method] += time.perf_counter() - start

    times = {method: total / steps * 400 for method, total in seconds.items()}
    ratio = {method: times[method] / times[BACKPROP] for method in times}
    paper_ratio = {method: s / PAPER_SECONDS[BACKPROP] for method, s in PAPER_SECONDS.items()}
    numbers = [
        *(Number(f"{method}: seconds", PAPER_SECONDS[method], times[method]) for method in times),
        *(
            Number(f"{method}: times backprop", paper_ratio[method], ratio[method])
            for method in PREDICTIVE_CODING
        ),
    ]
    save(
        options,
        "figure_run_times",
        draw(ratio, paper_ratio, f"run time of 400 steps of {BATCH_SIZE}, {data.name}"),
        data=data.summary(),
        settings={
            "LossFun": squared_error.__name__,
            "measured steps": steps,
            "threads": torch.get_num_threads(),
        },
        series={"seconds for 400 steps": times},
        numbers=numbers,
    )
    return numbers


def wait_for(device: torch.device) -> None:
    """Until the device has done what was asked: a GPU works on while Python goes ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(ratio: dict[str, float], paper_ratio: dict[str, float], title: str) -> Figure:
    figure, (axes,) = panels(1, 1, (6, 2.6), title)
    rows = range(len(ratio))
    theirs = axes.barh(
        [row + 0.2 for row in rows], paper_ratio.values(), 0.36, color="#BBBBBB", label="paper"
    )
    ours = axes.barh(
        [row - 0.2 for row in rows], ratio.values(), 0.36, color=METHODS["PC"][0], label="torch2pc"
    )
    for bars in theirs, ours:
        axes.bar_label(bars, fmt="%.2g", padding=2, fontsize=8)
    axes.set_yticks(rows, ratio.keys())
    axes.set(xlabel="time over that of backprop", xlim=(0, None))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    figure.legend(handles=[ours, theirs], loc="outside right upper")
    return figure
