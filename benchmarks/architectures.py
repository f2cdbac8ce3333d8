"""Published architectures, with random weights: whether PCInfer is right on what others have built.

    python -m benchmarks.architectures

takes those of torchvision, timm and pytorchcv, where these are installed, and cuts each into an
``nn.Sequential`` with one item a block, as a user would: where the model's forward pass is traced and
only one tensor goes on, an item ends. On each of them

- Exact leaves the gradients and buffers of ``loss.backward()``, to the bit, in float32;
- FixedPred's are those gradients times the chance of so many heads in n - 1 throws of a coin;
- Strict's, after 3 iterations, are those of the algorithm as it is written, which evaluates the layers
  and subtracts, in float64.

All in training mode. It prints a line for each of them and a summary, and fails if one is wrong.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from tests import reference
from torch2pc import PCInfer

LIBRARIES = ("torchvision", "timm", "pytorchcv")
SIZES = (64, 224)
BATCH = 2
CLASSES = 10


class Architecture(NamedTuple):
    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]


def architectures() -> Iterator[Architecture]:
    """All image classifiers that are installed, by the file that defines them."""
    if importlib.util.find_spec("torchvision"):
        from torchvision import models

        for name in models.list_models(module=models):
            family = models.get_model_builder(name).__module__
            yield Architecture("torchvision", family, name, _of_torchvision(name))
    if importlib.util.find_spec("timm"):
        import timm

        for name in timm.list_models():
            family = timm.models.model_entrypoint(name).__module__
            yield Architecture("timm", family, name, _of_timm(name))
    if importlib.util.find_spec("pytorchcv"):
        from pytorchcv.model_provider import _models

        for name, build in _models.items():
            yield Architecture("pytorchcv", build.__module__, name, build)


def _of_torchvision(name: str) -> Callable[[], nn.Module]:
    from torchvision import models

    return lambda: models.get_model(name, weights=None)


def _of_timm(name: str) -> Callable[[], nn.Module]:
    import timm

    return lambda: timm.create_model(name, pretrained=False)


def chosen(per_family: int, largest: float) -> Iterator[Architecture]:
    """Those of the first few of each family that have no more than ``largest`` parameters."""
    families = defaultdict(list)
    for architecture in architectures():
        families[architecture.library, architecture.family].append(architecture)
    for family in families.values():
        yield from (a for a in family[:per_family] if _size(a) <= largest)


def _size(architecture: Architecture) -> float:
    """The number of parameters; infinity if the model cannot be built."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in architecture.build().parameters())
    except Exception:
        return math.inf


class Known(fx.Proxy):  # type: ignore[no-untyped-call]
    """A tensor of a traced model, and its value: what is no tensor, as its shape, is what it is."""

    value: Any

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.value, name)
        return super().__getattr__(name) if isinstance(found, Tensor) or callable(found) else found

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[k] for k in range(len(self.value))])


class Tracer(fx.Tracer):
    """Follows the forward pass of a model and its containers, at ``X``, down to the blocks."""

    def __init__(self, depth: int, X: Tensor) -> None:
        super().__init__()
        self.depth, self.X = depth, X
        self.evaluates = False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.evaluates:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.evaluates:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> Known:
        return Known(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any
    ) -> Any:
        """The proxy of a tensor, or of some; but what has another value is known from now on."""
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *more, **options)
        self.evaluates = True
        try:
            value = proxy.value = self.value_of(kind, target, args, kwargs)
        finally:
            self.evaluates = False
        of_tensors = type(value) in (list, tuple) and any(isinstance(x, Tensor) for x in value)
        return proxy if isinstance(value, Tensor) or of_tensors or kind == "output" else value

    def value_of(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self.X
        if kind == "get_attr":
            return functools.reduce(getattr, target.split("."), self.root)
        args, kwargs = fx.node.map_aggregate((args, kwargs), _value_of)
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs) if kind == "call_function" else None


def _value_of(argument: Any) -> Any:
    return argument.value if isinstance(argument, Known) else argument


def cut(model: nn.Module, X: Tensor) -> nn.Sequential | None:
    """The model as a chain of blocks with the same parameters; None if it is none that can be found."""
    whole = nn.Sequential(model)  # whose forward pass has one argument
    for depth in (2, 1):
        try:
            items = nn.Sequential(*_items(whole, Tracer(depth, X).trace(whole)))
            if len(items) > 2 and _same_outputs(model, items, X):
                return items
        except Exception:  # whatever a model does not like about being traced
            continue
    return None


def _items(model: nn.Module, graph: fx.Graph) -> Iterator[fx.GraphModule]:
    """The blocks of a traced model: one ends where nothing but one tensor goes on."""
    last_use = {used: node for node in graph.nodes for used in node.all_input_nodes}
    item, inside, alive = fx.Graph(), {}, set()
    block, previous = "", None

    def copied(used: fx.Node) -> fx.Node:
        if used not in inside and used.op == "get_attr":
            inside[used] = item.node_copy(used)
        return inside[used]

    for node in graph.nodes:
        if node.op in ("get_attr", "output"):
            continue
        if node.op == "call_module":
            name = ".".join(str(node.target).split(".")[:3])
            if block and name != block and alive == {previous}:
                item.output(inside[previous])
                yield fx.GraphModule(model, item)
                item = fx.Graph()
                inside = {previous: item.placeholder("x")}
            block = name
        inside[node] = item.node_copy(node, copied)
        if node in last_use:
            alive.add(node)
            previous = node
        alive -= {used for used in node.all_input_nodes if last_use[used] is node}
    item.output(inside[previous])
    yield fx.GraphModule(model, item)


def _same_outputs(model: nn.Module, items: nn.Module, X: Tensor) -> bool:
    outputs = []
    for module in (model, items):
        torch.manual_seed(0)
        outputs.append(copy.deepcopy(module)(X))
    is_classifier = isinstance(outputs[0], Tensor) and outputs[0].dim() == 2
    return is_classifier and torch.equal(*outputs)


LossFun = nn.functional.cross_entropy


def backpropagated(items: nn.Sequential, X: Tensor, Y: Tensor) -> nn.Sequential:
    """A copy with the gradients and buffers that backprop leaves."""
    items = copy.deepcopy(items)
    torch.manual_seed(0)
    LossFun(items(X), Y).backward()
    return items


def inferred(
    items: nn.Sequential, X: Tensor, Y: Tensor, ErrType: str, **options: Any
) -> nn.Sequential:
    """A copy with what PCInfer leaves."""
    items = copy.deepcopy(items)
    torch.manual_seed(0)
    PCInfer(items, LossFun, X, Y, ErrType, **options)
    return items


def difference(
    found: nn.Sequential,
    gradients: dict[str, Tensor | None],
    factor_of: Callable[[str], float] = lambda name: 1.0,
) -> float:
    """The largest relative difference of a gradient of ``found`` from what it should be.

    One that is a millionth of the largest is nothing but round-off, as a bias's before BatchNorm is.
    """
    pairs = []
    for name, parameter in found.named_parameters():
        expected, gradient = gradients[name], parameter.grad
        if expected is None and gradient is None:
            continue
        if expected is None or gradient is None:
            return math.inf
        expected = expected * factor_of(name)
        if not torch.equal(gradient.isfinite(), expected.isfinite()):
            return math.inf
        of_finite = (gradient - expected).nan_to_num(), expected.nan_to_num()
        pairs.append([float(x.norm()) for x in of_finite])
    least = max([1e-6 * size for _, size in pairs if size > 0], default=1.0)
    return max(distance / max(size, least) for distance, size in pairs)


def gradients(items: nn.Sequential) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in items.named_parameters()}


def of_exact(items: nn.Sequential, X: Tensor, Y: Tensor) -> float:
    """How far Exact is from backprop."""
    expected, found = backpropagated(items, X, Y), inferred(items, X, Y, "Exact")
    for one, other in zip(found.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    return difference(found, gradients(expected))


def of_fixed_pred(items: nn.Sequential, X: Tensor, Y: Tensor) -> float:
    """How far FixedPred is from the gradients times the chance of L-l heads in n-1 throws."""
    L, n = len(items), 2 * len(items)
    heads = [math.comb(n - 1, m) / 2 ** (n - 1) for m in range(n)]
    found = inferred(items, X, Y, "FixedPred", eta=0.5, n=n)
    layers = {name: int(name.partition(".")[0]) + 1 for name, _ in items.named_parameters()}
    expected = gradients(backpropagated(items, X, Y))
    return difference(found, expected, lambda name: sum(heads[L - layers[name] :]))


def of_strict(items: nn.Sequential, X: Tensor, Y: Tensor, n: int = 3) -> float:
    """How far Strict is from the algorithm as it is written, in float64."""
    items, X = copy.deepcopy(items).double(), X.double()
    found = inferred(items, X, Y, "Strict", eta=0.1, n=n)
    torch.manual_seed(0)
    expected = reference.strict(reference.freeze(items, X), LossFun, X, Y, 0.1, n)
    updates = {name: expected.updates.get(p) for name, p in items.named_parameters()}
    return difference(found, updates)


# What is checked, and the largest difference that is round-off.
CHECKS: dict[str, tuple[Callable[[nn.Sequential, Tensor, Tensor], float], float]] = {
    "Exact": (of_exact, 0.0),
    "FixedPred": (of_fixed_pred, 1e-5),
    "Strict": (of_strict, 1e-7),
}


def check(build: Callable[[], nn.Module]) -> tuple[int, dict[str, float | str]]:
    """The number of items that a model is cut into, 0 if it is no chain, and what each check gives."""
    torch.manual_seed(0)
    model = build().train()
    for size in SIZES:
        X, Y = torch.randn(BATCH, 3, size, size), torch.randint(CLASSES, (BATCH,))
        items = cut(model, X)
        if items is not None:
            break
    else:
        return 0, {}
    found: dict[str, float | str] = {}
    for name, (measure, _) in CHECKS.items():
        try:
            found[name] = measure(items, X, Y)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return len(items), found


def is_right(found: dict[str, float | str]) -> bool:
    return all(
        isinstance(found[name], float) and found[name] <= tolerance
        for name, (_, tolerance) in CHECKS.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.architectures",
        description="Holds PCInfer against backprop and the plain algorithms on published models.",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models only")
    parser.add_argument(
        "--per-family", type=int, default=3, metavar="N", help="of each file that has some (3)"
    )
    parser.add_argument(
        "--largest", type=float, default=15.0, metavar="M", help="million parameters (15)"
    )
    asked = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    models: Iterable[Architecture]
    if asked.only:
        models = [a for a in architectures() if a.name in asked.only]
    else:
        models = chosen(asked.per_family, asked.largest * 1e6)
    total, chains, wrong = 0, 0, []
    for architecture in tqdm(models, unit="model"):
        total += 1
        count, found = check(architecture.build)
        name = f"{architecture.library} {architecture.name}"
        if not count:
            tqdm.write(f"{name}: no chain of blocks was found")
            continue
        chains += 1
        if not is_right(found):
            wrong.append(name)
        told = [f"{k} {v:.0e}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()]
        tqdm.write(f"{name}: {count} items, {', '.join(told)}")
    print(
        f"\n{len(models)} models, {chains} of them chains; not right: {', '.join(wrong) or 'none'}."
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
