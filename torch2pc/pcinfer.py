"""The public function: check, feed forward, infer the errors, write them into ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch2pc.checks import (
    check_alpha,
    check_callback,
    check_energies,
    check_eta,
    check_from_above,
    check_has_energy,
    check_has_values,
    check_LossFun,
    check_model,
    check_modules,
    check_n,
    check_no_transform,
    check_nudge,
    check_precise,
    check_precision,
    check_rule,
    check_tensor,
    check_update_at,
    check_vinit_length,
)
from torch2pc.compiled import Relaxing, compiled_or_plain, run_plainly
from torch2pc.energy.factors import USUAL, Terms
from torch2pc.graph.apart import until_guarded
from torch2pc.graph.network import Inference, Network
from torch2pc.graph.nodes import PCGraph, depth
from torch2pc.graph.state import Snapshot, modules_in, write_gradients
from torch2pc.inference import RELAXATIONS
from torch2pc.inference.exact import exact_factors, weighted_backpropagation
from torch2pc.inference.fixed_pred import (
    AUTO_ETA,
    by_lengths_of_paths,
    fixed_pred_factors,
    warn_of_short_inference,
)
from torch2pc.inference.nudge import nudged
from torch2pc.inference.relax import Callback, Relaxation, infer_by, warn_of_flat_items
from torch2pc.inference.steps import Rule, rule_of

ErrTypes = ("Exact", "FixedPred", *RELAXATIONS)


class PCResult(NamedTuple):
    """What ``PCInfer`` returns, in the order in which Torch2PC returns it; nothing requires grad.

    The lists have L+1 entries, one for the input and one for each layer's output.
    """

    vhat: list[Tensor]
    """Feed-forward values, ``vhat[0] = X`` and ``vhat[l] = model[l-1](vhat[l-1])``."""
    Loss: Tensor
    """``LossFun(vhat[L], Y)``, a scalar."""
    dLdy: Tensor
    """dLoss/dvhat_L, with the shape of the output."""
    v: list[Tensor]
    """Beliefs; ``v[0]`` is the input."""
    epsilon: list[Tensor | None]
    """Prediction errors; ``epsilon[0]`` is None unless ``X.requires_grad``."""

    @property
    def energy(self) -> Tensor:
        """``||epsilon_l||^2 / 2`` of the hidden layers l = 1..L-1, ``(L-1,)``, computed when read.

        What the output adds to the energy is the loss. Precisions, and other energies that layers were
        given, are not in it; and Multipliers' errors are no differences of prediction and belief alone.

        >>> from torch import nn
        >>> from torch2pc import PCInfer
        >>> model, X = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), torch.ones(2, 4)
        >>> PCInfer(model, nn.MSELoss(), X, torch.zeros(2, 1), "Strict").energy.shape
        torch.Size([2])
        """
        errors = [epsilon_l for epsilon_l in self.epsilon[1:-1] if epsilon_l is not None]
        like = self.epsilon[-1] if self.epsilon[-1] is not None else self.Loss
        energies = [0.5 * torch.linalg.vector_norm(e).square().to(like) for e in errors]
        return torch.stack(energies) if energies else like.new_zeros(0)


class EquilibriumResult(PCResult):
    """What ``PCInfer`` returns for ``"Equilibrium"``: the same five values, and how far it came.

    >>> import torch
    >>> from torch import nn
    >>> from torch2pc import PCInfer
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 3)))
    >>> X, Y = torch.randn(16, 4), torch.randint(3, (16,))
    >>> result = PCInfer(model, nn.CrossEntropyLoss(), X, Y, "Equilibrium")
    >>> bool((result.distance < 1e-3).all()), result.evaluations <= 20
    (True, True)
    """

    distance: Tensor
    """The length of dF/depsilon at the last evaluation, in units of the errors' (1 at the start from
    0): for each example, ``(batch,)``, or ``(1,)`` where a layer or the loss mixes the examples."""
    evaluations: int
    """How often the energy and its gradient were evaluated, at most ``n``."""


# So that torch.load reads a saved result with weights_only=True, its default.
torch.serialization.add_safe_globals([PCResult, EquilibriumResult])


def PCInfer(
    model: nn.Sequential | PCGraph,
    LossFun: Callable[[Tensor, Any], Tensor],
    X: Tensor,
    Y: Any,
    ErrType: str,
    eta: float | Tensor | str | Rule = 0.1,
    n: int | None = 20,
    vinit: Sequence[Any] | None = None,
    *,
    accumulate: bool = False,
    compile: bool = False,
    update_at: str = "v",
    callback: Callback | None = None,
    precision: float | Sequence[float] | Mapping[str, float] | None = None,
    nudge: float | None = None,
    alpha: float | None = None,
    energies: Mapping[int | str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    precise: bool = True,
) -> PCResult:
    r"""Compute predictive coding updates for a batch and write them into ``.grad``.

    A drop-in replacement for ``loss.backward()``: call it, then ``optimizer.step()``. Each of the
    L items of ``model`` is one layer ``f_l`` (nest an ``nn.Sequential`` to make several modules one
    layer), with belief ``v_l``, and ``vhat_l`` is its output in a feed-forward pass. (In a ``PCGraph``
    read "its parents" for "l-1", and sum over the children for "l+1".) The update of
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
    - ``"Multipliers"``: Strict with a Lagrange multiplier for each hidden layer (an augmented
      Lagrangian). In each of n sweeps from the top down
      ``v_l += eta (e_l + lambda_l - J_{l+1}(v_l)^T epsilon_{l+1})`` with ``e_l = f_l(v_{l-1}) - v_l``,
      taken anew once v_l has moved, and ``epsilon_l = e_l + lambda_l``, which goes down and makes the
      updates; between the sweeps ``lambda_l += alpha e_l``. It comes to rest where every e_l is 0, v is
      ``vhat`` and ``epsilon_l`` is Exact's, however small ``eta`` is. Each step is local, but a sweep has an
      order, from the top. ``eta=0.5``, ``n=10`` serve deep networks with a mean loss.
    - ``"ErrorBased"``: the errors relax instead of the beliefs, which follow from them by
      ``v_l = f_l(v_{l-1}) - epsilon_l``. From 0 (or the errors of ``vinit``), n times
      ``epsilon_l += eta ((J_L ... J_{l+1})^T e_L - epsilon_l)`` with ``e_L`` the loss's gradient at the
      output of this perturbed pass: gradient descent on the same F, in the errors. It reaches all
      layers at once, so that depth costs it nothing, but it is not local as Strict's is. After a few
      small steps its errors are about ``1 - (1-eta)^n`` times backpropagation's. It is stable for
      ``eta`` below 2 over the largest eigenvalue of F's Hessian in the errors, which grows in training.
    - ``"Equilibrium"``: where Strict and ErrorBased go as n grows, the minimum of F near the feed-forward
      pass, by a quasi-Newton method in the errors, with steps of its own for each example (where the
      layers or the loss mix the examples, one for all). It takes at most n evaluations of F and its
      gradient (one pass up and one down each, and a few evaluations of the loss), and stops where every
      example's gradient is below ``sqrt(eps)`` of its errors (1.5e-8 in float64, 3e-4 in float32); F
      never rises. The result says how far it came: ``result.distance`` and ``result.evaluations``.

    The updates of the last three are those of Strict, at the returned ``v``, with errors that belong to it.

    The errors climb down one layer an iteration, so that with ``n < L`` nothing arrives at layer 1, and
    with eta .1 and n 20 a share of 2e-3 of the gradient at 8 layers and 7e-11 at 15. FixedPred brings
    at least half of it everywhere from ``n = 1 + (L-1)/eta`` on; Strict takes somewhat longer. A warning
    says so, once for each model, where less than 1e-6 arrives at a layer that could learn. To train deep
    networks, take Multipliers, which stays local, ErrorBased or Equilibrium.

    Incremental predictive coding (a step of the beliefs and one of the weights at a time) is Strict with
    ``n=1`` that goes on from the last beliefs: from ``v = None``, for each of T steps on a batch,
    ``v = PCInfer(model, LossFun, X, Y, "Strict", n=1, vinit=v, update_at="before").v``, then
    ``optimizer.step()``.

    The call has the side effects of one forward pass: dropout masks are drawn once and kept, running
    statistics move once, hooks of modules fire as in one pass (with the relaxations also when a layer is
    evaluated for its update), and if it raises, everything is as it was. ``.grad`` is replaced, and None
    afterwards for a parameter of the model, or of a ``LossFun`` that is a module, that the call does not
    reach. Two things to know of Strict, ErrorBased and Equilibrium: a layer that draws random numbers must
    draw them from PyTorch's generators, or a warning names it; and a layer whose operations cannot be
    followed (it branches on values, leaves PyTorch, has backward hooks) is evaluated in each iteration, and
    its errors are differences, unless ``displacement_rule`` teaches it.

    Beliefs and errors are float32 where outputs are of half precision; with a ``GradScaler`` let ``LossFun``
    return the scaled loss for Exact and FixedPred only, as it changes the energy that the others descend.
    ``Loss`` requires no grad, so that trainers must not call ``backward()`` (Lightning:
    ``automatic_optimization = False``). Between processes nothing is synchronised here;
    ``torch2pc.distributed.PCInfer`` trains on several, and threads whose models draw random numbers
    disturb each other. The documentation's page "Supported layers and semantics" has all of this in detail
    (``docs/semantics.md``), and "Troubleshooting" what to do about divergence and slow learning.

    Args:
        model: an ``nn.Sequential``, or a ``PCGraph`` of layers with any number of parents each, on any
            device, of any floating type, with batched inputs.
        LossFun: called as ``LossFun(output, Y)``; returns a scalar tensor. If it has parameters,
            they get their gradient too. With a sum over the batch, Strict's update is the sum of its
            examples' own updates. With a mean it is not their mean: the loss then weighs 1/batch
            against the errors of the layers, which are summed. Exact and FixedPred are linear in it.
        X: the input batch, ``(batch, *features)``; integers for a model that starts with an
            embedding. If it requires grad, ``epsilon[0] = J_1^T epsilon_1`` is returned, and put into
            ``X.grad`` where X is a leaf; otherwise ``X.backward(epsilon[0])`` carries on.
        Y: the targets, handed to ``LossFun`` as they are.
        ErrType: ``"Exact"``, ``"FixedPred"``, ``"Strict"``, ``"Multipliers"``, ``"ErrorBased"`` or
            ``"Equilibrium"``.
        eta: the step size of the beliefs, or of ErrorBased's errors: a number, a tensor without
            dimensions, ``"auto"``, or for Strict, Multipliers and ErrorBased a rule of ``torch2pc.steps``
            (momentum, a step that shrinks, any optimizer, noise; sweeps from the top down, not for
            ErrorBased), which a call uses as it is and leaves as it is. A number for Multipliers is that of
            sweeps from the top. Not used by Exact and Equilibrium. With ``"auto"`` Strict and
            ErrorBased take 1/lambda, where lambda is the largest eigenvalue of the energy's Hessian (in
            the beliefs, or in the errors), estimated anew in each call from 4 products with it at the
            start (Gauss-Newton, Lanczos), and a quarter of that, and so on, if the energy is
            higher after n iterations than before: it ends no higher than it started. Multipliers takes
            1.5/lambda, 1 at most, of the curvature of single beliefs, which costs twice as much to find,
            and a quarter of that if F ends twice as high, as it comes to rest where it began. The
            result depends on the arguments alone, and is that of the number that was found. It costs
            as much as 4 to 5 iterations of all layers, and waits twice for the device. For
            FixedPred it is 1, which brings the whole gradient everywhere from ``n = L`` on (any eta
            from 0 to 1 is stable there).
        n: the number of iterations, or Equilibrium's largest number of evaluations, at least 1; None
            for L (in a graph, for the length of the longest way). Not used by Exact.
        vinit: initial beliefs, L+1 entries, of which the first (the input) and the last are not used.
            Not used by Exact and FixedPred, whose beliefs start at ``vhat``.
        accumulate: add to ``.grad`` in place instead of replacing it, for micro-batches; parameters
            that the call does not reach keep theirs.
        compile: run a relaxation as compiled graphs, from the feed-forward pass to the updates, through
            ``torch.compile``, which takes 10 to 60 s at the first call for a model. Other
            weights, batches, ``eta``, ``n``, ``vinit``, precisions and nudges compile nothing anew; another
            mode of a module, ``update_at``, kind of rule or of ``energies`` does, and so does the second
            batch size. Where it cannot be done (a layer whose operations cannot be followed, hooks,
            ``steps.Optim`` or a rule that branches on values, Equilibrium and what the page on semantics
            lists) a warning says so once; also with Exact and FixedPred, a single backward pass, which
            gained on narrow layers alone.
        update_at: where the updates of the relaxations are taken, ``"v"``, ``"vhat"`` or ``"before"``. At
            v they descend the energy. At vhat, ``(df_l(vhat_{l-1})/dtheta_l)^T epsilon_l``, they are taken
            as when the paper appeared, and as by FixedPred. Where an item ends in ReLU or its like,
            updates at v of units that it holds at 0 feed themselves, until training blows up (a warning
            says so once for a model): cut the items before the activation,
            ``Linear | ReLU, Linear | ReLU, Linear``, or take ``"vhat"``. Before Strict's last step, at the
            beliefs that its epsilon was taken at, they are the energy's gradient, for the incremental
            scheme (ErrorBased's and Equilibrium's are that at v). Not used by Exact and FixedPred.
        callback: called after each iteration k = 1, 2, ... with ``(k, v, epsilon)``, for a measure of your
            own; later iterations may change the tensors, so copy what you keep. None for Exact and
            FixedPred, which have no iterations, and with ``compile``. ``follow`` has measures ready.
        precise: False: displacements are differences ``f(v) - f(vhat)`` of the layers' outputs, not made by
            rules, so that in float32 the errors of lower layers, and in deep networks most of them, are
            round-off. Takes three quarters of the time in small transformers, whose layer norms, GELUs and
            softmaxes cost more by their rules, and up to twice the time where layers are products of
            matrices. Must be True with ``compile``; not used by Exact and FixedPred.
        precision: pi_l = 1/sigma_l^2 of the relaxations' energy,
            ``F = LossFun + 1/2 sum_l pi_l ||epsilon_l||^2``: one number for all hidden layers, a sequence of
            L-1, or for a ``PCGraph`` a dict by the layers' names; 1 where not given. ``epsilon_l`` is still
            prediction minus belief; what layer l hands down, and what its update is made of, is
            ``pi_l epsilon_l``. (A number for all leads to where the loss divided by it would.) None for Exact
            and FixedPred, whose updates are the loss's gradients, or shares of them, whatever the
            precisions are.
        nudge: None, or a number beta > 0 for the relaxations: they feel beta times the loss, once as it is
            and once turned around, and ``.grad`` is the slope of the update in beta,
            ``(update(beta) - update(-beta)) / (2 beta)``, as are ``epsilon[0]`` and ``X.grad``. At
            equilibrium it goes to backpropagation's gradient as beta goes to 0, off by a multiple of
            beta^2, in float32 too. ``v`` and the other errors are those at beta (so that epsilon_L is beta
            times the loss's gradient), which is what a ``callback`` sees; ``Loss`` and ``dLdy`` are as
            always, and side effects those of one forward pass. Twice the work. The steps of rules that are
            not proportional to the gradient (Adam) do not shrink with beta. None for Exact and FixedPred,
            which are linear in the loss.
        alpha: for Multipliers, how fast they grow, a number of at least 0; None for 1, the rate of the method
            of multipliers. With less they lag behind the errors and swing about them; with 0 it is Strict in
            sweeps from the top. None for the others.
        energies: for Strict, a dict from places of hidden layers (1..L-1 as in ``v``, or names in a
            ``PCGraph``) to other energies between prediction and belief than half the squared difference:
            those of ``torch2pc.energies`` (Huber, Laplace, a divergence of categorical beliefs), one of your
            own that derives from ``energies.LayerEnergy``, or a function of prediction and belief that
            returns a scalar. Such a layer's ``epsilon_l`` is the energy's derivative in the prediction; its
            precision multiplies the energy. None for the others.

    Returns:
        ``PCResult(vhat, Loss, dLdy, v, epsilon)``; for Equilibrium an ``EquilibriumResult``, the same
        with the attributes ``distance`` and ``evaluations``.

    Warns:
        UserWarning: once for each model, if the errors hardly reach some layers, an inference ends at a
            higher energy than it began or at none that is finite (looked for in calls 1, 8, 64, ...), a
            layer is another function when it is evaluated again, ``compile`` cannot be honoured, or
            Equilibrium stopped far from equilibrium while the energy still fell.

    Raises:
        TypeError: ``model`` is neither an ``nn.Sequential`` nor a ``PCGraph``, or overrides its
            ``forward``; a module of it is sharded or wrapped in DistributedDataParallel; ``LossFun`` is
            not callable; ``X`` or an entry of ``vinit`` is no tensor; ``eta`` is neither a number, a
            string nor a rule; ``n`` is neither an int nor None; ``callback`` is not callable; a layer
            returns something other than one floating-point tensor.
        ValueError: ``model`` is empty; ``ErrType`` is unknown; ``eta`` is not finite, a string other than
            ``"auto"``, or a rule that the algorithm cannot follow; ``n`` < 1; ``vinit`` does not fit the
            layers' outputs; ``update_at`` is unknown; ``callback`` is given where there are no iterations, or
            with ``compile``; ``X`` was made under ``torch.inference_mode()``; the loss is no scalar or does
            not depend on the output.
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
    (2020); Multipliers that of J. Seely and J. Gould, arXiv:2605.31022 (2026), in sweeps from the top;
    ErrorBased that of Goemaere, Oliviers, Bogacz and Demeester, arXiv:2505.20137 (2025);
    the incremental scheme that of Salvatori et al., arXiv:2212.00720 (2022); centred nudging that of
    A. Laborieux et al., Frontiers in Neuroscience 15 (2021), on predictive coding of Pinchetti et al.,
    arXiv:2407.01163 (2024).
    """
    asked = check_arguments(
        model,
        LossFun,
        X,
        ErrType,
        eta,
        n,
        vinit,
        update_at,
        compile,
        callback,
        precision,
        nudge,
        alpha,
        energies,
    )
    check_precise(precise, compile)
    asked = asked._replace(precise=precise)
    asked.warn(model)
    return infer(asked.algorithm, model, LossFun, X, Y, accumulate)


class Asked(NamedTuple):
    """What a call asks for, checked."""

    ErrType: str
    eta: float | str | Rule
    n: int
    vinit: Sequence[Any] | None = None
    update_at: str = "v"
    compile: bool = False
    callback: Callback | None = None
    terms: Terms = USUAL
    nudge: float | None = None
    precise: bool = True

    def warn(self, model: nn.Module) -> None:
        """Say if the errors will hardly reach some layers."""
        # With n=1 Strict is the first step of an incremental scheme, which goes on from vinit.
        is_long = self.vinit is None and self.n > 1
        is_local = self.ErrType in ("Strict", "Multipliers")
        if self.ErrType == "FixedPred" or (is_local and is_long):
            warn_of_short_inference(model, self.eta, self.n)

    def algorithm(self, network: Network) -> Inference:
        """Infer, by compiled graphs if that is asked for and can be done."""
        ErrType, eta, n, vinit, update_at, compile, callback, terms, nudge, precise = self
        if ErrType in ("Exact", "FixedPred"):
            assert not isinstance(eta, Rule)
            eta = AUTO_ETA if isinstance(eta, str) else eta
            is_exact = ErrType == "Exact"
            factors = exact_factors(network) if is_exact else fixed_pred_factors(network, eta, n)
            if compile:
                run_plainly(network.model, f"{ErrType} is one forward and one backward pass")
            if factors is None:
                return by_lengths_of_paths(network, eta, n)
            return weighted_backpropagation(network, factors)

        for layer in [*network.layers, *[part.layer for part in network.from_above]]:
            layer.is_precise = precise

        def relaxation_of(terms: Terms) -> Relaxation:
            relaxation = RELAXATIONS[ErrType](network, eta, vinit, update_at, terms)
            warn_of_flat_items(network, ErrType, update_at)
            return relaxation

        def relax() -> Inference:
            if nudge is not None:
                return nudged(relaxation_of, terms, nudge, n, callback)
            return infer_by(relaxation_of(terms), n, callback, ErrType)

        if not compile:
            return relax()
        call = Relaxing(network, ErrType, eta, n, vinit, update_at, terms=terms, nudge=nudge)
        return compiled_or_plain(call, relax)


def check_arguments(
    model: nn.Sequential | PCGraph,
    LossFun: Callable[[Tensor, Any], Tensor],
    X: Tensor,
    ErrType: str,
    eta: float | Tensor | str | Rule,
    n: int | None,
    vinit: Sequence[Any] | None,
    update_at: str,
    compile: bool = False,
    callback: Callback | None = None,
    precision: float | Sequence[float] | Mapping[str, float] | None = None,
    nudge: float | None = None,
    alpha: float | None = None,
    energies: Mapping[int | str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> Asked:
    """Check what describes an inference; eta and n are 1 for Exact, which uses neither."""
    check_model(model)
    check_LossFun(LossFun)
    check_tensor("X", X)
    if not isinstance(ErrType, str) or ErrType not in ErrTypes:
        accepted = ", ".join(f'"{name}"' for name in ErrTypes)
        raise ValueError(f"ErrType must be one of {accepted}, got {ErrType!r}")
    check_from_above(model, ErrType, nudge)
    has_iterations = ErrType in RELAXATIONS
    size: float | str | Rule = 1.0
    if has_iterations:
        check_has_values("X", X)
        check_vinit_length(vinit, len(model) + 1)
        check_update_at(update_at)
    if ErrType == "Exact":
        n = 1
    else:
        size, n = check_eta(eta), depth(model) if n is None else check_n(n)
        if ErrType == "Multipliers":  # where a number is that of sweeps from the top
            size = eta if isinstance(eta, Rule) else rule_of(size, "down")
        check_rule(size, ErrType)
    check_callback(callback, compile, has_iterations)
    terms = USUAL
    if precision is not None:
        check_has_energy("precision", _NO_PRECISION, ErrType, has_iterations)
        terms = terms._replace(precision=check_precision(precision, model))
    if nudge is not None:
        check_has_energy("nudge", _NO_NUDGE, ErrType, has_iterations)
        nudge = check_nudge(nudge, size, vinit)
    terms = terms._replace(alpha=check_alpha(alpha, ErrType))
    if energies is not None:
        check_has_energy("energies", _NO_ENERGIES, ErrType, ErrType == "Strict")
        terms = terms._replace(between=check_energies(energies, model))
    return Asked(ErrType, size, n, vinit, update_at, compile, callback, terms, nudge)


_NO_ENERGIES = (
    "whose variables are differences of predictions and beliefs, or which descends no energy: that is for "
    "Strict, and PCInferLatent"
)
_NO_NUDGE = "whose updates are linear in the loss, so that their slope in beta is what they are"
_NO_PRECISION = (
    "whose updates are gradients of the loss whatever the precisions are: Exact's errors would be "
    "g_l / pi_l, and FixedPred would take steps of eta pi_l in layer l on its way to these"
)


def infer(
    algorithm: Callable[[Network], Inference],
    model: nn.Sequential | PCGraph,
    LossFun: Callable[[Tensor, Any], Tensor],
    X: Tensor,
    Y: Any,
    accumulate: bool,
    *,
    free_input: bool = False,
    prior: Callable[[list[Tensor]], Tensor] | None = None,
) -> PCResult:
    """Run a checked call: all of its effects, or an exception and none of them."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        with torch.inference_mode(False), torch.enable_grad():
            return infer(
                algorithm, model, LossFun, X, Y, accumulate, free_input=free_input, prior=prior
            )
    check_no_transform()
    functions = [LossFun, prior]
    own = modules_in(model, *[f for f in functions if isinstance(f, nn.Module)])
    check_modules(own)
    # A loss that is no module may hold some, say of a trainer, whose gradients are none of ours.
    held = modules_in(*[f for f in functions if not isinstance(f, nn.Module)])
    modules = list(dict.fromkeys([*own, *held])) if held else own

    def attempt() -> Inference:
        network = Network(model, LossFun, X, Y, modules, free_input=free_input, prior=prior)
        with Snapshot(modules, network.devices):
            found = algorithm(network)
            if X.is_leaf and found.epsilon[0] is not None:
                found.updates.append((X, found.epsilon[0].clone()))
            write_gradients(found.updates, accumulate, own)
            return found

    vhat, Loss, dLdy, v, epsilon, _, distance, evaluations = until_guarded(attempt)
    if distance is None or evaluations is None:
        return PCResult(vhat, Loss, dLdy, v, epsilon)
    result = EquilibriumResult(vhat, Loss, dLdy, v, epsilon)
    result.distance, result.evaluations = distance, evaluations
    return result
