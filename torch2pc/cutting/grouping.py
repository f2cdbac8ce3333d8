"""``group_layers``: a model that people know, as a Sequential of predictive coding layers.

``chain.py`` finds the pieces that the model's forward can be cut into. Here they are grouped, and what
comes of it is held against the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch2pc.cutting.chain import Piece, chain, layer_of
from torch2pc.cutting.forward import check_followable, has_weights, is_block, is_normalisation
from torch2pc.cutting.same import OfModel, check_same, untouched


def group_layers(model: nn.Module, X: Tensor, cut: str = "before") -> nn.Sequential:
    r"""Make an ``nn.Sequential`` of predictive coding layers of a model whose parts run in order.

    Each layer has one module with weights (a matrix or a kernel) or one block, and what belongs to it:

    - ``nn.Sequential`` containers, nested ones too, are opened, and so are other containers whose
      children run one after the other, and the model itself: VGG's ``features``, ``avgpool`` and
      ``classifier``, a ResNet's stem and stages, the encoder of a vision transformer. What the
      forward does between them (``torch.flatten``, a class token, a positional embedding) becomes a
      module that does the same, with the model's own parameters.
    - A module with a connection around one of its parts, such as a residual block or a transformer
      block, is kept whole: one layer (``pc_graph`` has beliefs inside it).
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
    check_followable(model, X)
    if not isinstance(cut, str) or cut not in ("before", "after"):
        raise ValueError(f'cut must be "before" or "after", got {cut!r}')

    with torch.inference_mode(False), torch.enable_grad():
        with untouched(model, X):
            pieces, origin = chain(model, X)
        groups = _groups(pieces, cut)
        _check_not_one_block(groups, X)
        layers = Grouped(*map(layer_of, groups))
        layers.belong_to(model, origin, "group_layers", "Group anew, layers = ")
        check_same(model, layers, X, "a chain")
    return layers


class Grouped(OfModel, nn.Sequential):
    """The layers of a model."""

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
