"""``group_layers``: a model that people know, as a Sequential of predictive coding layers.

``chain.py`` finds the pieces that the model's forward can be cut into. Here they are grouped, and what
comes of it is held against the model itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch2pc.checks import check_tensor, check_unwrapped
from torch2pc.cutting.chain import (
    Between,
    NoChain,
    Piece,
    chain,
    has_weights,
    is_block,
    is_normalisation,
)
from torch2pc.cutting.origin import Attributes, Origin
from torch2pc.graph.state import Snapshot, devices_of, generators_in, generators_kept, modules_in


def group_layers(model: nn.Module, X: Tensor, cut: str = "before") -> nn.Sequential:
    r"""Make an ``nn.Sequential`` of predictive coding layers of a model whose parts run in order.

    Each layer has one module with weights (a matrix or a kernel) or one block, and what belongs to it:

    - ``nn.Sequential`` containers, nested ones too, are opened, and so are other containers whose
      children run one after the other, and the model itself: VGG's ``features``, ``avgpool`` and
      ``classifier``, a ResNet's stem and stages, the encoder of a vision transformer. What the
      forward does between them (``torch.flatten``, a class token, a positional embedding) becomes a
      module that does the same, with the model's own parameters.
    - A module with a connection around one of its parts, such as a residual block or a transformer
      block, is kept whole: one layer.
    - ``cut="before"`` cuts before the activation: modules without weights (activations, pooling,
      dropout, flattening) open the layer that they feed, and trailing ones close the last. Normalisation
      and embeddings directly after a module with weights stay with it (``Conv, BatchNorm | ReLU, Conv,
      BatchNorm | ...``); after an activation or a block they go with the next. With
      ``cut="after"`` everything up to the next module with weights stays with the one before it, as in
      the paper's networks (for Strict, then use ``update_at="vhat"``).

    The layers hold the same modules as the model, not copies: their parameters, buffers and hooks are
    the model's, training one trains the other. Keep the model to save and load: its ``state_dict`` has
    the names it always had, and what ``load_state_dict`` copies into it is in the layers as well.
    Move or convert it first, and group then. Call ``train()``
    and ``eval()`` on the result.

    The result is held against the model on ``X``: in train mode on ``X`` and in eval mode on ``X`` twice
    over, outputs, gradients and buffers must be equal. Nothing of the model is changed by that (buffers,
    ``.grad``, random generators, modes). The forward is followed once: where it branches on the
    shape of its input, the branch that X took is taken ever after.

    If the model is changed later, the layers follow where its forward hands a number to an operation as
    it is (``x / self.tau``), is told a mode, or uses a tensor. Where it computed with a number, branched
    on a flag, read a configuration or a global, or called a module, and that is another one now, they
    raise an error that names it when they are used.

    Args:
        model: a module that takes one tensor and returns one.
        X: a small batch of inputs, ``(batch, *features)``, of the shape that it is used with; two or
            more examples if it normalises over the batch.
        cut: ``"before"`` or ``"after"`` the activations.

    Returns:
        An ``nn.Sequential`` with one item for each layer, for ``PCInfer``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or wrapped (DistributedDataParallel, torch.compile);
            ``X`` is no tensor.
        ValueError: ``cut`` is unknown; the model is no chain of layers (the message names the
            connection in the way), cannot be followed, has lazy modules or none with weights, has
            hooks on a container that would be opened; the result does not do what the model does.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import PCInfer, group_layers
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
        ...         self.classifier = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
        ...     def forward(self, x):
        ...         return self.classifier(torch.flatten(self.features(x), 1))
        >>> model = Net()
        >>> layers = group_layers(model, torch.rand(2, 1, 8, 8))
        >>> [[type(m).__name__ for m in layer] for layer in layers[1:]]
        [['ReLU', 'MaxPool2d', 'Flatten', 'Linear'], ['ReLU', 'Linear']]
        >>> X, Y = torch.rand(16, 1, 8, 8), torch.randint(3, (16,))
        >>> result = PCInfer(layers, nn.CrossEntropyLoss(), X, Y, "Strict", eta=0.1, n=20)
        >>> all(p.grad is not None for p in model.parameters())
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_unwrapped(model)
    check_tensor("X", X)
    if not isinstance(cut, str) or cut not in ("before", "after"):
        raise ValueError(f'cut must be "before" or "after", got {cut!r}')
    if any(map(torch.nn.parameter.is_lazy, itertools.chain(model.parameters(), model.buffers()))):
        raise ValueError(
            "model must have all its parameters, got lazy modules: call model(X) first"
        )

    with torch.inference_mode(False), torch.enable_grad():
        with untouched(model, X):
            pieces, origin = chain(model, X)
        groups = _groups(pieces, cut)
        _check_not_one_block(groups, X)
        layers = Grouped(*map(_layer, groups))
        origin.keep_in([part.run for part in layers.modules() if isinstance(part, Between)])
        layers.origin = origin
        _set_mode(layers, set(model.modules()), model.training)
        for training, sample in ((True, X), (False, torch.cat([X, X]))):
            _check_same(model, layers, sample, training)
    return layers


class Grouped(nn.Sequential):
    """The layers of a model, which notice where it was changed since."""

    origin: Origin | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers, if they still are the model's."""
        self.check_origin()
        return super().__call__(*args, **kwargs)

    def check_origin(self) -> None:
        """Raises an error if the model would now be followed to other layers."""
        if self.origin is not None and not torch.compiler.is_compiling():
            self.origin.check()

    def __getitem__(self, index: Any) -> Any:
        """One layer, or for a slice some, which are as watchful."""
        found = super().__getitem__(index)
        if isinstance(found, Grouped):
            found.origin = self.origin
        return found

    def _get_name(self) -> str:
        return "Sequential"


def _groups(pieces: Sequence[Piece], cut: str) -> list[list[Piece]]:
    """The pieces of each layer."""
    groups: list[list[Piece]] = []
    pending: list[Piece] = []
    for piece in pieces:
        module = piece.module
        if piece.weighted:
            groups.append([*pending, piece])
            pending = []
        elif not groups:
            pending.append(piece)
        elif cut == "after" or (module is None and piece.has_parameters):
            groups[-1] += [*pending, piece]
            pending = []
        elif _normalises(module) and not pending and not _is_block(groups[-1][-1]):
            groups[-1].append(piece)
        else:
            pending.append(piece)
    if not groups:
        raise ValueError("model must have a module with weights, got none in its forward")
    groups[-1] += pending
    return groups


def _normalises(module: nn.Module | None) -> bool:
    return module is not None and is_normalisation(module)


def _is_block(piece: Piece) -> bool:
    return piece.module is None or is_block(piece.module)


def _check_not_one_block(groups: Sequence[Sequence[Piece]], X: Tensor) -> None:
    """A model that is one block in one layer could not be learnt from: say what is in the way."""
    if len(groups) > 1:
        return
    blocks = [piece for piece in groups[0] if piece.module is not None and piece.weighted]
    for piece in blocks:
        module = piece.module
        if module is not None and sum(map(has_weights, module.modules())) > 2:
            entry = piece.nodes[0].all_input_nodes[0].meta["value"]
            with untouched(module, entry):
                chain(module, entry, str(piece.nodes[0].target))


def _layer(pieces: Sequence[Piece]) -> nn.Module:
    """One module that runs the pieces; modules by themselves stay what they are."""
    items: list[nn.Module] = []
    for is_module, run in itertools.groupby(pieces, lambda piece: piece.module is not None):
        if is_module:
            items += [piece.module for piece in run if piece.module is not None]
        else:
            items.append(_between(list(run)))
    if any(getattr(part, "inplace", False) for item in items for part in item.modules()):
        # What they write into may be a view of the layer's input.
        for item in items:
            if isinstance(item, Between):
                item.inplace = True
    return items[0] if len(items) == 1 else nn.Sequential(*items)


def _between(pieces: Sequence[Piece]) -> nn.Module:
    """The operations as a module, PyTorch's own for flattening."""
    nodes = [node for piece in pieces for node in piece.nodes]
    if len(nodes) == 1 and nodes[0].target in (torch.flatten, "flatten"):
        axes = dict(zip(("start_dim", "end_dim"), nodes[0].args[1:], strict=False))
        axes = {"start_dim": 0, **axes, **nodes[0].kwargs}
        if all(isinstance(axis, int) for axis in axes.values()):
            return nn.Flatten(**axes)  # type: ignore[arg-type]
    return Between(pieces)


def _set_mode(layers: nn.Module, of_model: set[nn.Module], training: bool) -> None:
    for module in layers.modules():
        if module not in of_model:
            module.training = training


def _check_same(model: nn.Module, layers: nn.Sequential, X: Tensor, training: bool) -> None:
    """The layers do what the model does: its outputs, gradients, and changes of buffers."""
    mode = "train" if training else "eval"
    names = {parameter: f"the gradient of {name}" for name, parameter in model.named_parameters()}
    inputs = [parameter for parameter in names if parameter.requires_grad]
    expected = _run(model, [model, layers], X, inputs, training)
    found = _run(layers, [model, layers], X, inputs, training)
    what = ["output", *(names[parameter] for parameter in inputs), "the gradient of X"]
    what += [f"buffer {name}" for name, _ in model.named_buffers()]
    for name, wanted, got in zip(what, expected, found, strict=True):
        if not _equal(wanted, got):
            raise NoChain(
                f"model could not be made a chain of layers: in {mode} mode they give another "
                f"{name}. Does its forward do something besides calling modules and functions on "
                "tensors (autocast, no_grad, numbers read from tensors)? Write it as an "
                "nn.Sequential, with a module for that"
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
            if module is not model:
                raise
            twice = "" if training else ", with each example twice"
            raise ValueError(
                f"X must be a batch that the model accepts in {'train' if training else 'eval'} mode"
                f"{twice}, but it raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(y, Tensor):
            raise ValueError(f"model must return one tensor, got {type(y).__name__}")
        direction = torch.arange(y.numel(), device=y.device).reshape(y.shape).cos().to(y.dtype)
        asked = [*inputs, *([x] if x.is_floating_point() else [])]
        gradients: list[Any] = [None] * len(asked)
        if y.requires_grad and asked:
            gradients = list(torch.autograd.grad(y, asked, direction, allow_unused=True))
        if not x.is_floating_point():
            gradients.append(None)
        return [y.detach(), *gradients, *(b.detach().clone() for b in model.buffers())]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal but for the order of sums, which is not always the same on a GPU."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or torch.equal(a, b):
        return torch.equal(a, b)
    scale = a.abs().nan_to_num(posinf=0).max().item()
    tolerance = 1000 * torch.finfo(a.dtype).eps * scale
    return torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)


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
