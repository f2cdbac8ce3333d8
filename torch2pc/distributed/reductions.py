"""What a loss does over the batch, as far as it can be read: a mean or a sum, and of how many."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def read_reduction(LossFun: Any, given: str | None) -> str:
    """Whether the loss is a mean or a sum over the batch."""
    if given not in (None, "mean", "sum"):
        raise ValueError(f'reduction must be "mean", "sum" or None, got {given!r}')
    function, options = _unwrapped(LossFun)
    found = _reduction_of(function, options)
    known = {"mean": "mean", "batchmean": "mean", "sum": "sum"}.get(str(found))
    if known is None and given is None:
        raise ValueError(
            'reduction must be given ("mean" or "sum"), as it cannot be read from LossFun '
            f"({getattr(function, '__name__', type(function).__name__)}): a mean has to be weighted by "
            "this rank's share of the batch"
        )
    if None not in (known, given) and known != given:
        raise ValueError(f'reduction must be what LossFun does ("{known}"), got "{given}"')
    return given or str(known)


def _reduction_of(function: Any, options: dict[str, Any]) -> object:
    if "reduction" in options or hasattr(function, "reduction"):
        return options.get("reduction", getattr(function, "reduction", None))
    of_pytorch = getattr(F, getattr(function, "__name__", ""), None)
    if of_pytorch is None or of_pytorch is not function:
        return None
    parameter = inspect.signature(of_pytorch).parameters.get("reduction")
    return None if parameter is None else parameter.default


def _unwrapped(LossFun: Any) -> tuple[Any, dict[str, Any]]:
    """The function that a partial is of, and the named arguments it is given."""
    options: dict[str, Any] = {}
    while isinstance(LossFun, partial):
        LossFun, options = LossFun.func, {**LossFun.keywords, **options}
    return LossFun, options


def read_count(LossFun: Any, X: Tensor, Y: Any, given: float | Tensor | None) -> float | Tensor:
    """What a mean over this shard divides by, or is in proportion to it on all ranks."""
    found: float | Tensor = _divisor(LossFun, X, Y)
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int | float | Tensor):
            raise TypeError(f"count must be a number, got {type(given).__name__}")
        if isinstance(given, Tensor) and given.dim():
            raise TypeError(f"count must be a number, got a tensor of shape {tuple(given.shape)}")
        found = given.detach() if isinstance(given, Tensor) else given
    # Without waiting for a GPU: there an empty one shows as NaN.
    if not (isinstance(found, Tensor) and found.device.type != "cpu") and not found > 0:
        raise ValueError(
            "X must have at least one example with a target on each rank, as a mean of none is no "
            f"number, got {float(found):g}: leave out the last batch where it is too small to share "
            "(drop_last=True)"
        )
    return found


_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_ELEMENTS = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss),
    *(nn.KLDivLoss, nn.PoissonNLLLoss),
)
_FUNCTIONS_OF_ELEMENTS = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.kl_div, F.poisson_nll_loss),
)


def _divisor(LossFun: Any, X: Tensor, Y: Any) -> float | Tensor:
    """The number of examples, of elements, or the weight of the targets that are not ignored."""
    examples = X.shape[0] if X.dim() else 1
    function, options = _unwrapped(LossFun)
    of_classes = isinstance(function, _OF_CLASSES) or function in (F.cross_entropy, F.nll_loss)
    of_elements = isinstance(function, _OF_ELEMENTS) or function in _FUNCTIONS_OF_ELEMENTS
    if not isinstance(Y, Tensor) or not (of_classes or of_elements):
        return examples
    if of_elements or Y.is_floating_point():  # probabilities of classes
        is_mean_of_examples = _reduction_of(function, options) == "batchmean"
        each_has_its_own = Y.dim() > 0 and Y.shape[0] == examples
        return Y.numel() if each_has_its_own and not is_mean_of_examples else examples
    if isinstance(function, nn.Module):
        options = vars(function) | function._buffers
    counted = torch.ne(Y, options.get("ignore_index", -100))
    weight = options.get("weight")
    if weight is None:
        return counted.sum()
    return (weight[torch.where(counted, Y, 0)] * counted).sum(dtype=torch.float64)
