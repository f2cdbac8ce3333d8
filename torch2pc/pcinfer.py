"""The public function: check, feed forward, infer the errors, write them into ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch2pc.checks import (
    check_eta,
    check_LossFun,
    check_model,
    check_modules,
    check_n,
    check_no_transform,
    check_tensor,
    check_update_at,
    check_vinit_length,
)
from torch2pc.exact import exact
from torch2pc.fixed_pred import fixed_pred, warn_of_short_inference
from torch2pc.layers import Inference, Network
from torch2pc.state import Snapshot, modules_in, write_gradients
from torch2pc.strict import strict

ALGORITHMS: dict[str, Callable[..., Inference]] = {
    "Exact": exact,
    "FixedPred": fixed_pred,
    "Strict": strict,
}


class PCResult(NamedTuple):
    """What ``PCInfer`` returns, in the order in which Torch2PC returns it; nothing requires grad.

    The lists have L+1 entries, one for the input and one for each layer's output.
    """

    vhat: list[Tensor]
    """Feed-forward values: ``vhat[0] = X``, ``vhat[l] = model[l-1](vhat[l-1])``."""
    Loss: Tensor
    """``LossFun(vhat[L], Y)``, a scalar."""
    dLdy: Tensor
    """dLoss/dvhat_L, with the shape of the output."""
    v: list[Tensor]
    """Beliefs; ``v[0]`` is the input."""
    epsilon: list[Tensor | None]
    """Prediction errors; ``epsilon[0]`` is None unless ``X.requires_grad``."""


# So that torch.load reads a saved result with weights_only=True, its default.
torch.serialization.add_safe_globals([PCResult])


def PCInfer(
    model: nn.Sequential,
    LossFun: Callable[[Tensor, Any], Tensor],
    X: Tensor,
    Y: Any,
    ErrType: str,
    eta: float | Tensor = 0.1,
    n: int | None = 20,
    vinit: Sequence[Any] | None = None,
    *,
    accumulate: bool = False,
    compile: bool = False,
    update_at: str = "v",
) -> PCResult:
    r"""Compute predictive coding updates for a batch and write them into ``.grad``.

    A drop-in replacement for ``loss.backward()``: call it, then ``optimizer.step()``. Each of the
    L items of ``model`` is one layer ``f_l`` (nest an ``nn.Sequential`` to make several modules one
    layer), with belief ``v_l``, and ``vhat_l`` is its output in a feed-forward pass. The update of
    layer l's parameters is ``(df_l/dtheta_l)^T epsilon_l``, where the prediction error ``epsilon_l``
    is, for ``ErrType``

    - ``"Exact"``: ``epsilon_l = dLoss/dvhat_l`` and ``v_l = vhat_l - epsilon_l``; the updates are
      the gradients of the loss, as ``Loss.backward()`` leaves them.
    - ``"FixedPred"``: ``epsilon_L = dLoss/dvhat_L`` and, from ``v = vhat``, n times
      ``epsilon_l = vhat_l - v_l``, ``v_l += eta (epsilon_l - J_{l+1}(vhat_l)^T epsilon_{l+1})``.
      Computed in closed form: ``epsilon_l = c dLoss/dvhat_l`` with ``c = P[Binomial(n-1, eta) >= L-l]``
      (for 0 <= eta <= 1), in one forward and one backward pass whatever ``n`` is.
    - ``"Strict"``: from ``v = vinit`` (or ``vhat``), n times ``epsilon_l = f_l(v_{l-1}) - v_l`` with
      ``epsilon_L = dLossFun(f_L(v_{L-1}), Y)/df_L``, then
      ``v_l += eta (epsilon_l - J_{l+1}(v_l)^T epsilon_{l+1})``: gradient descent on the energy
      ``F = LossFun(f_L(v_{L-1}), Y) + 1/2 sum_{l<L} ||f_l(v_{l-1}) - v_l||^2``. The updates are
      ``(df_l(v_{l-1})/dtheta_l)^T epsilon_l`` at the returned ``v``, or at ``vhat`` if ``update_at``
      says so, with the ``epsilon`` of the last iteration. What is iterated is
      ``v_l - vhat_l``, by a rule for each operation of the layers, so that no round-off is taken for
      an error: in float32, errors are right to about 1e-6 of their size, however small they are.

    The errors climb down one layer an iteration, so that with ``n < L`` nothing arrives at layer 1, and
    with eta .1 and n 20 a share of 2e-3 of the gradient at 8 layers and 7e-11 at 15. FixedPred brings
    at least half of it everywhere from ``n = 1 + (L-1)/eta`` on; Strict takes somewhat longer. A warning
    says so, once for each model, where less than 1e-6 arrives at a layer that could learn.

    The call has the side effects of one forward pass: dropout masks are drawn once and kept, running
    statistics move once, and if it raises, everything is as it was. (Checkpointed modules are evaluated
    once more in the backward pass, with the effects that it has there.) A parameter of the model, or of
    a ``LossFun`` that is a module, that the call does not reach has ``.grad`` None afterwards. For
    Strict a layer is one function during the call if its state is in buffers and its random numbers
    come from PyTorch's generators or from a ``torch.Generator`` that is an attribute of the module or
    held by ``LossFun``; a layer that draws in its backward pass (shake-shake) does so anew each time,
    and one that is another function when it is evaluated again is named in a warning. Hooks of modules
    fire as in one forward pass; with Strict also when a layer is evaluated for its update, and once
    more the first time that its operations are met, to hold them against the layer itself. A layer
    whose operations cannot be followed (it branches on values, leaves PyTorch, draws random numbers
    from its input, has backward hooks) is evaluated in each iteration instead, and its errors are
    differences. ``displacement_rule`` teaches Strict a module. Tensor hooks of a parameter see each
    layer's gradient before FixedPred weighs it; post-accumulate-grad hooks run when ``.grad`` is
    written.

    With half-precision outputs, beliefs and errors are held in float32, and half precision costs Strict
    no more than it costs backpropagation. (A model that accelerate has prepared runs outside its
    autocast: call PCInfer under ``accelerator.autocast()``.) With a ``GradScaler``, let ``LossFun``
    return the scaled loss: that scales the updates of Exact and FixedPred, but changes the energy that
    Strict descends.

    Threads may train models of their own, and call one that is being trained. The generators are the
    process's, though: Strict winds those back that a layer drew from, so that another thread may draw the
    same numbers again; where models draw, use processes. Between processes nothing is synchronised:
    after the call, sum ``p.grad`` by ``torch.distributed.all_reduce`` and divide it by their number.
    ``Loss`` requires no grad, so that Lightning needs ``automatic_optimization = False``. Hooks that
    gather gradients of each example in a backward pass (Opacus) see those of Exact alone.

    Args:
        model: an ``nn.Sequential`` on any device, of any floating type, with batched inputs.
        LossFun: called as ``LossFun(output, Y)``; returns a scalar tensor. If it has parameters,
            they get their gradient too. With a sum over the batch, Strict's update is the sum of its
            examples' own updates. With a mean it is not their mean: the loss then weighs 1/batch
            against the errors of the layers, which are summed. Exact and FixedPred are linear in it.
        X: the input batch, ``(batch, *features)``; integers for a model that starts with an
            embedding. If it requires grad, ``epsilon[0] = J_1^T epsilon_1`` is returned, and put into
            ``X.grad`` where X is a leaf; otherwise ``X.backward(epsilon[0])`` carries on.
        Y: the targets, handed to ``LossFun`` as they are.
        ErrType: ``"Exact"``, ``"FixedPred"`` or ``"Strict"``.
        eta: the step size of the beliefs, a number or a tensor without dimensions. Not used by Exact.
        n: the number of iterations, at least 1; None for L. Not used by Exact.
        vinit: initial beliefs for Strict, L+1 entries, of which the first (the input) and the last
            are not used. Not used by Exact and FixedPred, whose beliefs start at ``vhat``.
        accumulate: add to ``.grad`` in place instead of replacing it, for micro-batches; parameters
            that the call does not reach keep theirs.
        compile: run Strict as a compiled call, from the feed-forward pass to the updates, through
            ``torch.compile``, which takes 10 to 60 s at the first call for a model. That call runs
            plainly itself; the ones after it are faster the smaller the layers are. Other weights,
            batches, ``eta``, ``n`` and ``vinit`` compile nothing anew; another mode of a module or
            ``update_at`` does, and so does the second batch size, for all sizes but 1, which is
            compiled by itself. Where it cannot be done (a layer whose operations cannot be
            followed, a module with a hook or a ``displacement_rule``, a loss that is random,
            changes buffers, or holds a Python number with a third value: hold it in a tensor) a
            warning says so once. The other two algorithms take one forward and one backward pass,
            and are not compiled.
        update_at: where Strict's updates are taken, ``"v"`` or ``"vhat"``. At v they descend the
            energy. At vhat, ``(df_l(vhat_{l-1})/dtheta_l)^T epsilon_l``, they are taken as when the paper
            appeared, and as by FixedPred. It matters for a unit that a ReLU holds at 0: it has
            ``vhat = 0``, but ``v = -epsilon``, and what the weights that leave it get at v grows with
            them, until training blows up; at vhat they get nothing. A warning says so, once for a
            model, where an item ends in ReLU or its like. To cut the items before the activation,
            ``Linear | ReLU, Linear | ReLU, Linear``, helps as well, though less surely: it may need a
            smaller ``eta`` at large learning rates. Not used by Exact and FixedPred.

    Returns:
        ``PCResult(vhat, Loss, dLdy, v, epsilon)``.

    Warns:
        UserWarning: once for each model, if the errors hardly reach some layers, a layer is another
            function when it is evaluated again, or ``compile`` cannot be honoured.

    Raises:
        TypeError: ``model`` is no ``nn.Sequential`` or overrides its ``forward``; a module of it is
            sharded or wrapped in DistributedDataParallel; ``LossFun`` is not callable; ``X`` or an
            entry of ``vinit`` is no tensor; ``eta`` is no number; ``n`` is neither an int
            nor None; a layer returns something other than one floating-point tensor.
        ValueError: ``model`` is empty; ``ErrType`` is unknown; ``eta`` is not finite; ``n`` < 1;
            ``vinit`` does not fit the layers' outputs; ``update_at`` is unknown; ``X`` was made under
            ``torch.inference_mode()``; the loss is no scalar or does not depend on the output.
        RuntimeError: a layer wrote into its input without an ``inplace`` attribute that says so; the
            call is inside a transform of ``torch.func``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch2pc import PCInfer
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> X, Y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> vhat, Loss, dLdy, v, epsilon = PCInfer(
        ...     model, nn.CrossEntropyLoss(), X, Y, "FixedPred", eta=0.1, n=20)
        >>> optimizer.step()
        >>> [tuple(e.shape) for e in epsilon[1:]]
        [(16, 8), (16, 3)]

    Source: R. Rosenbaum, On the relationship between predictive coding and backpropagation,
    PLOS ONE 17(3): e0266102 (2022). Strict is the algorithm of Whittington and Bogacz, Neural
    Computation 29(5) (2017); FixedPred that of Millidge, Tschantz and Buckley, arXiv:2006.04182
    (2020).
    """
    check_model(model)
    check_LossFun(LossFun)
    check_tensor("X", X)
    if not isinstance(ErrType, str) or ErrType not in ALGORITHMS:
        accepted = ", ".join(f'"{name}"' for name in ALGORITHMS)
        raise ValueError(f"ErrType must be one of {accepted}, got {ErrType!r}")
    if ErrType == "Strict":
        check_vinit_length(vinit, len(model) + 1)
        check_update_at(update_at)
    if ErrType != "Exact":
        eta = check_eta(eta)
        n = len(model) if n is None else check_n(n)
        if ErrType == "FixedPred" or vinit is None:
            warn_of_short_inference(model, eta, n)

    algorithm = partial(
        ALGORITHMS[ErrType], eta=eta, n=n, vinit=vinit, compile=compile, update_at=update_at
    )
    return infer(algorithm, model, LossFun, X, Y, accumulate)


def infer(
    algorithm: Callable[[Network], Inference],
    model: nn.Sequential,
    LossFun: Callable[[Tensor, Any], Tensor],
    X: Tensor,
    Y: Any,
    accumulate: bool,
    prior: object = None,
) -> PCResult:
    """Run a checked call: all of its effects, or an exception and none of them."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        with torch.inference_mode(False), torch.enable_grad():
            return infer(algorithm, model, LossFun, X, Y, accumulate, prior)
    check_no_transform()
    functions = [LossFun, prior]
    own = modules_in(model, *[f for f in functions if isinstance(f, nn.Module)])
    check_modules(own)
    # A loss that is no module may hold some, say of a trainer, whose gradients are none of ours.
    held = modules_in(*[f for f in functions if not isinstance(f, nn.Module)])
    modules = list(dict.fromkeys([*own, *held])) if held else own
    network = Network(model, LossFun, X, Y, modules)
    before = Snapshot(modules, network.devices)
    try:
        inference = algorithm(network)
        vhat, Loss, dLdy, v, epsilon, updates = inference
        if X.is_leaf and epsilon[0] is not None:
            updates.append((X, epsilon[0].clone()))
        write_gradients(updates, accumulate, own)
    except BaseException as error:
        before.restore(error)
        raise
    return PCResult(vhat, Loss, dLdy, v, epsilon)
