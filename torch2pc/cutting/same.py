"""Layers that were made of a model: they do what it does, and notice where it was changed since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch2pc.cutting.between import Between
from torch2pc.cutting.forward import NoLayers
from torch2pc.cutting.origin import Attributes, Origin
from torch2pc.graph.state import Snapshot, devices_of, generators_in, generators_kept, modules_in


class OfModel(nn.Module):
    """A container of the layers of a model, which notices where that was changed since."""

    origin: Origin

    def belong_to(self, model: nn.Module, origin: Origin, maker: str, anew: str) -> None:
        """Watch the model, and take over its mode; ``anew``: how to call the ``maker`` again."""
        origin.keep_in([part.run for part in self.modules() if isinstance(part, Between)])
        origin.maker, origin.anew = maker, anew
        self.origin = origin
        own = set(model.modules())
        for module in self.modules():
            if module not in own:
                module.training = model.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers, if they still are the model's."""
        self.check_origin()
        return super().__call__(*args, **kwargs)

    def check_origin(self) -> None:
        """Raises an error if the model would now be followed to other layers."""
        if not torch.compiler.is_compiling():
            self.origin.check()


def check_same(model: nn.Module, layers: nn.Module, X: Tensor, kind: str) -> None:
    """The layers do what the model does: its outputs, gradients, and changes of buffers.

    In train mode on ``X``, in eval mode on ``X`` twice over. ``kind``: what they form.
    """
    for training, sample in ((True, X), (False, torch.cat([X, X]))):
        _check_same(model, layers, sample, training, kind)


def _check_same(model: nn.Module, layers: nn.Module, X: Tensor, training: bool, kind: str) -> None:
    """The layers do what the model does: its outputs, gradients, and changes of buffers."""
    mode = "train" if training else "eval"
    names = {parameter: f"the gradient of {name}" for name, parameter in model.named_parameters()}
    inputs = [parameter for parameter in names if parameter.requires_grad]
    expected = _run(model, [model, layers], X, inputs, training)
    found = _run(layers, [model, layers], X, inputs, training)
    what = ["output", *(names[parameter] for parameter in inputs), "the gradient of X"]
    what += [f"buffer {name}" for name, _ in model.named_buffers()]
    # Sums in another order differ by their terms' round-off, even where they come to nothing.
    least = max([0.0, *(_scale(g) for g in expected[1 : len(inputs) + 2] if g is not None)]) / 100
    for name, wanted, got in zip(what, expected, found, strict=True):
        if not _equal(wanted, got, least if "gradient" in name else 0.0):
            raise NoLayers(
                f"model could not be made {kind} of layers: in {mode} mode they give another "
                f"{name}. Does its forward do something besides calling modules and functions on "
                "tensors (autocast, no_grad, numbers read from tensors, writing into a tensor that is used "
                "again)? Make a module of that"
            )


def _run(
    module: nn.Module,
    both: Sequence[nn.Module],
    X: Tensor,
    inputs: Sequence[Tensor],
    training: bool,
) -> list[Tensor | None]:
    """The module's output, the gradients of a fixed function of it, and the model's buffers after."""
    model, layers = both
    with untouched(nn.ModuleList(both), X):
        for part in [*model.modules(), *layers.modules()]:
            part.training = training
        x = X.detach().clone()
        if x.is_floating_point():
            x.requires_grad_()
        try:
            y = module(x.clone())
        except Exception as error:
            mode, raised = "train" if training else "eval", f"{type(error).__name__}: {error}"
            if module is not model:
                raise NoLayers(
                    f"model could not be made of layers: in {mode} mode they raise {raised}. Does its "
                    "forward do what depends on the size of the batch? Make a module of that"
                ) from error
            twice = "" if training else ", with each example twice"
            raise ValueError(
                f"X must be a batch that the model accepts in {mode} mode{twice}, but it raised {raised}"
            ) from error
        direction = torch.arange(y.numel(), device=y.device).reshape(y.shape).cos().to(y.dtype)
        asked = [*inputs, *([x] if x.is_floating_point() else [])]
        gradients: list[Any] = [None] * len(asked)
        if y.requires_grad and asked:
            gradients = list(torch.autograd.grad(y, asked, direction, allow_unused=True))
        if not x.is_floating_point():
            gradients.append(None)
        return [y.detach(), *gradients, *(b.detach().clone() for b in model.buffers())]


def _equal(a: Tensor | None, b: Tensor | None, least: float) -> bool:
    """Equal but for the order of sums, of which some term is at least this large."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or torch.equal(a, b):
        return torch.equal(a, b)
    tolerance = 1000 * torch.finfo(a.dtype).eps * max(_scale(a), least)
    return torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)


def _scale(a: Tensor) -> float:
    return a.abs().nan_to_num(posinf=0).max().item() if a.numel() else 0.0


@contextmanager
def untouched(model: nn.Module, X: Tensor) -> Iterator[None]:
    """Leaves generators, buffers, modes and attributes as they are before the body."""
    modules = modules_in(model)
    before, attributes = Snapshot(modules, devices_of(modules, X)), Attributes(modules)
    with generators_kept(generators_in(model, modules)):
        try:
            yield
        finally:
            before.restore(Exception())
            attributes.restore()
