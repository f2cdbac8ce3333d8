"""One training step as each predictive coding package recommends it, in a process of its own.

The task is the same for all: an MLP with ReLU and biases where the package has them, float32,
squared error 1/2 ||y - Y||^2, 20 steps of inference with step size 0.1, then one weight update by
plain gradient descent. `peers` starts ``python -m benchmarks.peer_steps NAME THREADS`` once for each
package, possibly with another interpreter, and sends it commands; nothing is imported here but what
every interpreter has, and the package itself.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

N, ETA, LEARNING_RATE = 20, 0.1, 1e-5

# Makes this many training steps and waits until they are done.
Run = Callable[[int], Any]


def torch_batch(sizes: list[int], batch: int) -> tuple[Any, Any]:
    import torch

    torch.manual_seed(0)
    classes = torch.randint(sizes[-1], (batch,))
    return torch.rand(batch, sizes[0]), torch.nn.functional.one_hot(classes, sizes[-1]).float()


def jax_batch(sizes: list[int], batch: int) -> tuple[Any, Any]:
    import jax

    x, classes = jax.random.split(jax.random.PRNGKey(0))
    Y = jax.random.randint(classes, (batch,), 0, sizes[-1])
    return jax.random.uniform(x, (batch, sizes[0])), jax.nn.one_hot(Y, sizes[-1])


def torch2pc(sizes: list[int], batch: int, **options: Any) -> Run:
    """PCInfer with Strict, then the optimizer."""
    import torch
    from torch import nn

    from benchmarks.nets import mlp
    from torch2pc import PCInfer

    X, Y = torch_batch(sizes, batch)
    model = mlp(len(sizes) - 1, sizes[1], sizes[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    squared_error = nn.MSELoss(reduction="sum")

    def LossFun(yhat: Any, Y: Any) -> Any:
        return 0.5 * squared_error(yhat, Y)

    def run(steps: int) -> None:
        for _ in range(steps):
            PCInfer(model, LossFun, X, Y, "Strict", eta=ETA, n=N, **options)
            optimizer.step()

    return run


def torch2pc_compiled(sizes: list[int], batch: int) -> Run:
    return torch2pc(sizes, batch, compile=True)


def pcx(sizes: list[int], batch: int) -> Run:
    """A model of layers and vodes, energies by vmap and one jitted step, as in its tutorial."""
    import jax
    import optax
    import pcx.functional as pxf
    import pcx.nn as pxnn
    import pcx.predictive_coding as pxc
    import pcx.utils as pxu

    class Model(pxc.EnergyModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [pxnn.Linear(*size) for size in itertools.pairwise(sizes)]
            self.vodes = [pxc.Vode() for _ in self.layers]
            self.vodes[-1].h.frozen = True

        def __call__(self, x: Any, y: Any) -> Any:
            for layer, vode in list(zip(self.layers, self.vodes, strict=True))[:-1]:
                x = vode(jax.nn.relu(layer(x)))
            self.vodes[-1](self.layers[-1](x))
            if y is not None:
                self.vodes[-1].set("h", y)
            return self.vodes[-1].get("u")

    batched = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache).to((None, 0))

    @pxf.vmap(batched, in_axes=(0, 0), out_axes=0)
    def forward(x: Any, y: Any, *, model: Model) -> Any:
        return model(x, y)

    @pxf.vmap(batched, in_axes=(0,), out_axes=(None, 0), axis_name="batch")
    def energy(x: Any, *, model: Model) -> Any:
        y = model(x, None)
        return jax.lax.psum(model.energy(), "batch"), y

    def beliefs() -> Any:
        return pxu.M_hasnot(pxc.VodeParam, frozen=True)

    def gradient(of: Any) -> Any:
        return pxf.value_and_grad(of.to([False, True]), has_aux=True)(energy)

    @pxf.jit(static_argnums=0)
    def train_on_batch(
        T: int, x: Any, y: Any, *, model: Model, optim_w: pxu.Optim, optim_h: pxu.Optim
    ) -> None:
        model.train()
        with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
            forward(x, y, model=model)
        for _ in range(T):
            with pxu.step(model, clear_params=pxc.VodeParam.Cache):
                _, g = gradient(beliefs())(x, model=model)
            optim_h.step(model, g["model"])
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            _, g = gradient(pxu.M(pxnn.LayerParam))(x, model=model)
        optim_w.step(model, g["model"])

    model = Model()
    X, Y = jax_batch(sizes, batch)
    with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
        forward(X, None, model=model)
        optim_h = pxu.Optim(lambda: optax.sgd(ETA), beliefs()(model))
        optim_w = pxu.Optim(lambda: optax.sgd(LEARNING_RATE), pxu.M(pxnn.LayerParam)(model))

    def run(steps: int) -> None:
        for _ in range(steps):
            train_on_batch(N, X, Y, model=model, optim_w=optim_w, optim_h=optim_h)
        jax.block_until_ready([layer.nn.weight.get() for layer in model.layers])

    return run


def jpc(sizes: list[int], batch: int) -> Run:
    """Its updates of activities and of parameters; a step of training is jitted as a whole."""
    import equinox
    import jax
    import optax

    version = importlib.metadata.version
    # A checkout that is not installed has no version, which it asks for when it is imported.
    with mock.patch("importlib.metadata.version", lambda of: "" if of == "jpc" else version(of)):
        import jpc

    # Its energy is a mean over the batch where the others' are sums.
    of_beliefs, of_weights = (optax.sgd(rate * batch) for rate in (ETA, LEARNING_RATE))
    model = jpc.make_mlp(
        jax.random.PRNGKey(0),
        input_dim=sizes[0],
        width=sizes[1],
        depth=len(sizes) - 1,
        output_dim=sizes[-1],
        act_fn="relu",
        use_bias=True,
    )
    X, Y = jax_batch(sizes, batch)
    state = of_weights.init((equinox.filter(model, equinox.is_array), None))

    @equinox.filter_jit
    def train(model: Any, state: Any) -> Any:
        given: dict[str, Any] = dict(params=(model, None), output=Y, input=X)
        beliefs = jpc.init_activities_with_ffwd(model=model, input=X)
        of_step = of_beliefs.init(beliefs)
        for _ in range(N):
            found = jpc.update_pc_activities(
                activities=beliefs, optim=of_beliefs, opt_state=of_step, **given
            )
            beliefs, of_step = found["activities"], found["opt_state"]
        found = jpc.update_pc_params(activities=beliefs, optim=of_weights, opt_state=state, **given)
        return found["model"], found["opt_state"]

    def run(steps: int) -> None:
        nonlocal model, state
        for _ in range(steps):
            model, state = train(model, state)
        jax.block_until_ready(equinox.filter(model, equinox.is_array))

    return run


def fabricpc(sizes: list[int], batch: int) -> Run:
    """A graph of Linear nodes and its jitted training step."""
    import jax
    import optax
    from fabricpc import setup_jax
    from fabricpc.core.activations import ReLUActivation
    from fabricpc.core.inference import InferenceSGD
    from fabricpc.core.topology import Edge
    from fabricpc.graph_assembly import TaskMap, graph
    from fabricpc.graph_initialization import initialize_params
    from fabricpc.nodes import Linear
    from fabricpc.training import make_train_step

    setup_jax("cpu")
    names = [f"layer{index}" for index in range(len(sizes))]
    nodes = [
        Linear(shape=(sizes[0],), name=names[0]),
        *(
            Linear(shape=(size,), name=name, activation=ReLUActivation())
            for size, name in list(zip(sizes, names, strict=True))[1:-1]
        ),
        Linear(shape=(sizes[-1],), name=names[-1]),
    ]
    structure = graph(
        nodes=nodes,
        edges=[
            Edge(source=before, target=after.slot("in"))
            for before, after in itertools.pairwise(nodes)
        ],
        task_map=TaskMap(x=nodes[0], y=nodes[-1]),
        inference=InferenceSGD(eta_infer=ETA, infer_steps=N),
    )
    key = jax.random.PRNGKey(0)
    # Its gradients are means over the batch where the others' are sums.
    optimizer = optax.sgd(LEARNING_RATE * batch)
    params = initialize_params(structure, key)
    state = optimizer.init(params)
    train_step = make_train_step(structure, optimizer)
    X, Y = jax_batch(sizes, batch)

    def run(steps: int) -> None:
        nonlocal params, state
        for _ in range(steps):
            params, state, _, _ = train_step(params, state, {"x": X, "y": Y}, key)
        jax.block_until_ready(params)

    return run


def pcn_torch(sizes: list[int], batch: int) -> Run:
    """Its own training loop; as regression, since classification adds an evaluation to each step.

    Its layers predict the input from the latents, and have no biases; the sizes are the same.
    """
    from pcn_torch import PredictiveCodingNetwork, TrainCallback, TrainConfig, train_pcn

    X, Y = torch_batch(sizes, batch)
    model = PredictiveCodingNetwork(
        dims=sizes[:-1], activation="relu", output_dim=sizes[-1], mode="regression"
    )
    config = TrainConfig(
        task="regression",
        T_infer=N,
        T_learn=1,
        lr_infer=ETA,
        lr_learn=LEARNING_RATE * batch,
        num_epochs=1,
        callback=TrainCallback(),
    )
    return lambda steps: train_pcn(model, [(X, Y)] * steps, config)


def torch_pc(sizes: list[int], batch: int) -> Run:
    """Its own training loop. Its layers predict the input from the latents, too."""
    import torch_pc

    X, Y = torch_batch(sizes, batch)
    model = torch_pc.PCNetwork(dims=sizes[:-1], output_dim=sizes[-1], use_bias=True)
    return lambda steps: torch_pc.train_pcn(
        model,
        [(X, Y)] * steps,
        num_epochs=1,
        eta_infer=ETA,
        eta_learn=LEARNING_RATE * batch,
        infer_steps=N,
        T_learn=1,
        target_transform=lambda y: y,
        device="cpu",
    )


# Name: the distribution it is part of, what it rests on, the function that prepares a step.
PACKAGES: dict[str, tuple[str, str, Callable[[list[int], int], Run]]] = {
    "torch2pc": ("torch2pc", "torch", torch2pc),
    "torch2pc, compile=True": ("torch2pc", "torch", torch2pc_compiled),
    "pcx": ("pcx", "jax", pcx),
    "jpc": ("jpc", "jax", jpc),
    "fabricpc": ("fabricpc", "jax", fabricpc),
    "pcn-torch": ("pcn-torch", "torch", pcn_torch),
    "torch-pc": ("torch-pc", "torch", torch_pc),
}


def serve(name: str, threads: int) -> None:
    """Answer commands, one JSON object a line: {"sizes": [...], "batch": b}, then {"steps": k} at will.

    The answers hold the seconds: of the first step (which compiles) after the preparation, and of
    k steps. Whatever the package prints is dropped.
    """
    answers = os.fdopen(os.dup(1), "w")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        _, basis, prepare = PACKAGES[name]
        if basis == "torch":
            import torch

            torch.set_num_threads(threads)
        for line in sys.stdin:
            try:
                command = json.loads(line)
                if "sizes" in command:
                    run = prepare(command["sizes"], command["batch"])
                start = time.perf_counter()
                run(command.get("steps", 1))
                answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answer["versions"] = {basis: importlib.metadata.version(basis)}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
