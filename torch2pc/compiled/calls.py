"""Compiled calls, kept for as long as their model lives.

``torch.compile`` captures the layers and the loss and says, by its guards, when what was captured holds
no more: the mode of a module, a hook, an attribute, a number, a shape have changed. ``program.py`` makes the
graphs of the call from that. Here they are run: the feed-forward pass, ``n`` steps, the updates; for
Exact and FixedPred one graph that does it all.

The call that compiles runs plainly itself, so that layers are held against their rules as always. So
does, with a warning, a call that cannot be compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from platform import machine
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from torch2pc.graph.autograd import in_belief_dtype, outside_autocast, own
from torch2pc.graph.layer import GLOBAL_HOOKS, HOOKS
from torch2pc.graph.network import Inference, Network, detached
from torch2pc.graph.warn import warn_caller
from torch2pc.inference.exact import Factors
from torch2pc.inference.start import check_vinit_entries
from torch2pc.inference.steps import Rule

_warned: WeakSet[nn.Module] = WeakSet()
# How often a model's call is captured anew before what changes is taken to change on.
MOST_CAPTURES = 6


class _Model:
    """What is kept for one model: its captures, by what was asked, and why there can be none."""

    def __init__(self) -> None:
        self.captures: dict[Any, Any] = {}
        self.error: object = None
        self.has_reason = False

    def capture(self, asked: Any, *arguments: Any) -> Any:
        """Run a call that is captured, or was before."""
        from torch2pc.compiled.program import capture

        if asked not in self.captures:
            # Its own code object: what is compiled for a model is kept with the code, so it goes
            # when the model does, and one model's shapes do not count against another's
            # recompilations.
            code: CodeType = capture.__code__.replace(co_name=f"capture_{id(self)}")
            own_code = FunctionType(code, capture.__globals__, closure=capture.__closure__)
            self.captures[asked] = torch.compile(own_code, fullgraph=True, backend=_Captured)
        return self.captures[asked](*arguments)


_models: WeakKeyDictionary[nn.Module, _Model] = WeakKeyDictionary()
_local = threading.local()


class _PlainlyError(Exception):
    """Raised in a captured call that is to be run plainly, before it has done anything."""


class _Captured:
    """What is run in the place of the captured graph: the whole of a call."""

    def __init__(self, graph: Any, inputs: Sequence[Any]) -> None:
        from torch2pc.compiled.program import Program

        self.reason: object = None
        self.is_new = True
        try:
            call = _local.call
            self.program = Program(graph, call.asked, _options(call.network.X.device))
        except torch._dynamo.exc.RestartAnalysis:
            raise
        except Exception as error:
            self.reason = error

    def __call__(self, *inputs: Any) -> list[Tensor]:
        call = _local.call
        call.captured = self
        if self.reason is not None or self.is_new:
            self.is_new = False
            raise _PlainlyError
        if any([inputs[k]._backward_hooks or not inputs[k].is_leaf for k in self.program.leaves]):
            call.reason = "a parameter has a hook, or a graph of its own"
            raise _PlainlyError
        call.has_begun = True
        with torch.no_grad(), outside_autocast(call.network.X.device):
            return call.run(self.program, inputs)


class Call:
    """One call, to be run by compiled graphs."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.captured: _Captured | None = None
        self.inference: Inference | None = None
        self.reason: object = None
        self.has_begun = False

    def asks(self) -> dict[str, Any]:
        """What is asked of ``program.Asked``, besides the network's."""
        raise NotImplementedError

    def run(self, program: Any, inputs: Sequence[Any]) -> list[Tensor]:
        """The call itself; returns what was to be captured."""
        raise NotImplementedError

    def infer(self) -> Inference | None:
        """The result; None if the call is to be run plainly, and nothing has happened yet."""
        network, model = self.network, self.network.model
        self.reason = self.reason or _hooked(network)
        if self.reason is not None:
            return None
        try:
            from torch2pc.compiled.program import Asked
        except ImportError as error:  # another PyTorch may lack what is imported there
            self.reason = error
            return None
        kept = _models.get(model)
        if kept is None:
            kept = _models[model] = _Model()
        if kept.error is not None:
            self.reason = kept.error
            return None
        parents = tuple([node.parents for node in network.nodes])
        prior = network.prior
        self.asked = Asked(
            parents=parents,
            names=tuple([node.where for node in network.nodes]),
            free=tuple(sorted(network.free)),
            has_prior=prior is not None,
            **self.asks(),
        )
        before, _local.call = getattr(_local, "call", None), self
        try:
            with torch._dynamo.config.patch(
                # A number is compiled in: what is captured for another one is another program.
                specialize_float=True,
                recompile_limit=MOST_CAPTURES,
            ):
                kept.capture(
                    self.asked,
                    tuple([layer.function for layer in network.layers]),
                    parents,
                    (*[layer.copies_input for layer in network.layers], True),
                    *(network.loss.function, None if prior is None else prior.function),
                    *(network.X, network.Y),
                )
        except _PlainlyError:
            assert self.captured is not None
            self.reason = self.reason or self.captured.reason
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            # What was captured before goes on being used.
            self.reason = (
                f"it was captured {MOST_CAPTURES} times and would have to be again (PyTorch's log names "
                "what changes): hold a number that changes from call to call in a tensor"
            )
        except Exception as error:
            if self.has_begun:
                raise
            self.reason = kept.error = error
        finally:
            _local.call = before
        return self.inference

    def explain(self) -> None:
        """After a plain run: warn if it was none of the call's own choice, and learn from it."""
        model, uncovered = self.network.model, self.uncovered()
        kept = _models.get(model)
        if uncovered and self.captured is not None:
            self.captured.reason = uncovered[0]
        if kept is not None and kept.error is not None:
            if kept.has_reason and not uncovered:
                kept.error = None  # what was in the way is gone
            kept.has_reason = bool(uncovered)
        reason = next(iter(uncovered), self.reason)
        if reason is not None:
            run_plainly(model, reason)

    def uncovered(self) -> list[str]:
        """What the plain run has found to stand in the way of compiling a call like this one."""
        return []

    def end(
        self,
        program: Any,
        inputs: Sequence[Any],
        held: Sequence[Any],
        v: list[Tensor],
        input_error: Tensor | None,
        found: list[Tensor],
    ) -> list[Tensor]:
        """Set ``inference``; ``found`` are the layers' errors, and then the updates."""
        from torch2pc.compiled.program import find

        L, found = program.asked.L, own(found)
        vhat = [find(held, place) for place in program.vhat]
        Loss, dLdy = find(held, program.Loss), find(held, program.dLdy)
        results = [find(held, place) for place in program.results]
        vhat[0] = vhat[0].clone()
        if _is_graphed(self.network.X.device):
            # The next call's graphs write where these are.
            vhat, v, found = _copies(vhat), [v[0], *_copies(v[1:])], _copies(found)
            Loss, dLdy = _copies([Loss, dLdy])
            results = [x if any(x is y for y in inputs) else x.clone() for x in results]
            input_error = None if input_error is None else input_error.clone()
        leaves = [inputs[k] for k in program.leaves]
        errors: list[Tensor | None] = [input_error, *found[:L]]
        updates = list(zip(leaves, found[L:], strict=True))
        self.inference = Inference(vhat, Loss, dLdy, v, errors, updates)
        return results


class Relaxing(Call):
    """A call that relaxes beliefs (``"Strict"``, ``"Latent"``) or errors (``"ErrorBased"``)."""

    KINDS = {"Strict": "beliefs", "Latent": "beliefs", "ErrorBased": "errors"}  # noqa: RUF012

    def __init__(
        self,
        network: Network,
        ErrType: str,
        eta: float | Tensor | str | Rule,
        n: int,
        vinit: Sequence[Any] | None = None,
        update_at: str = "v",
        *,
        precision: Sequence[float] | None = None,
    ) -> None:
        super().__init__(network)
        self.ErrType, self.eta, self.n, self.vinit = ErrType, eta, n, vinit
        # Errors belong to the beliefs that they have made.
        before_of_errors = update_at == "before" and ErrType == "ErrorBased"
        self.update_at, self.precision = "v" if before_of_errors else update_at, precision
        if ErrType not in self.KINDS:
            self.reason = f"{ErrType}'s search is not compiled"
        elif isinstance(eta, str):
            self.reason = f'eta="{eta}" finds its step size as it runs'
        elif isinstance(eta, Rule):
            self.reason = f"eta is another rule than plain descent, {eta}"

    def asks(self) -> dict[str, Any]:
        return dict(
            kind=self.KINDS[self.ErrType],
            update_at=self.update_at,
            is_weighted=self.precision is not None,
            takes_errors=self.ErrType == "Latent",
        )

    def infer(self) -> Inference | None:
        """The result; None if the call is to be run plainly, and nothing has happened yet."""
        # Where nothing moves there is nothing to compile.
        return super().infer() if self.network.free else None

    def run(self, program: Any, inputs: Sequence[Any]) -> list[Tensor]:
        """Feed forward, ``n`` steps, and the updates; returns what was to be captured."""
        from torch2pc.compiled.program import find

        network, asked, L = self.network, program.asked, program.asked.L
        _begin(network.X.device)
        held = [*inputs, *program.feed_forward(inputs)]
        vhat = [find(held, place) for place in program.vhat]
        dLdy = find(held, program.dLdy)
        x = {i: torch.zeros_like(in_belief_dtype(vhat[i])) for i in asked.free}
        epsilon = [torch.zeros_like(in_belief_dtype(vhat_l)) for vhat_l in vhat[1:-1]]
        epsilon.append(in_belief_dtype(dLdy).clone())
        check_vinit_entries(self.vinit, vhat)
        if self.vinit is not None:
            for i in asked.free:
                torch.sub(self.vinit[i].detach(), vhat[i], out=x[i])
        like = epsilon[-1]
        assert not isinstance(self.eta, Rule)
        eta = self.eta if isinstance(self.eta, Tensor) else like.new_full((), float(self.eta))
        pi: Sequence[Any] = [None] * (L + 1)
        if self.precision is not None:
            # Filled where they are: to copy numbers to a GPU waits for it.
            pi = [like.new_full((), weight) for weight in (1.0, *self.precision, 1.0)]
        known = [*held, eta.to(like), *pi]
        reached = _reached_layers(asked, like.device)
        relax = self._relax_errors if asked.kind == "errors" else self._relax_beliefs
        state = relax(program, known, reached, x, epsilon)
        found = list(program.updates([*known, *reached[-1], *state]))
        v = found[: len(asked.free) + 1]
        if 0 not in network.free:
            v.insert(0, detached(network.X))
        del found[: len(asked.free) + 1]
        if asked.takes_errors or asked.kind == "errors":
            epsilon = found[:L]
            del found[:L]
        input_error = found.pop(0) if program.asks_input else None
        return self.end(program, inputs, held, v, input_error, [*epsilon, *found])

    def _relax_beliefs(
        self,
        program: Any,
        known: list[Any],
        reached: Sequence[Sequence[Tensor]],
        x: dict[int, Tensor],
        epsilon: list[Tensor],
    ) -> list[Tensor]:
        """The state after ``n`` steps: how far the beliefs have moved, and the errors."""
        last = len(program.reach) - 1
        k = last if self.network.prior is not None or self.vinit is not None else 0
        before: list[Tensor] = []
        for _ in range(self.n):
            before = list(x.values())
            step, moved, taken = program.step_of(k)
            found = step([*known, *reached[min(k, last)], *x.values()])
            x.update(zip(moved, found, strict=False))
            for l, error in zip(taken, found[len(moved) :], strict=True):
                epsilon[l - 1] = error
            k += 1
        return [*x.values(), *epsilon, *(before if self.update_at == "before" else [])]

    def _relax_errors(
        self,
        program: Any,
        known: list[Any],
        reached: Sequence[Sequence[Tensor]],
        x: dict[int, Tensor],
        epsilon: list[Tensor],
    ) -> list[Tensor]:
        """The state after ``n`` steps: the hidden errors."""
        known, hidden = [*known, *reached[-1]], epsilon[:-1]
        if self.vinit is not None:
            hidden = program.start([*known, *x.values()])
        step = program.steps[len(program.reach) - 1]
        for _ in range(self.n):
            hidden = step([*known, *hidden])
        return list(hidden)

    def uncovered(self) -> list[str]:
        """What the plain run has found to stand in the way of compiling a call like this one."""
        if self.ErrType not in self.KINDS:
            return []
        network = self.network
        moving = [layer for l, layer in enumerate(network.layers, start=1) if network.moving(l)]
        why = [(layer.name, layer.uncovered or layer.own_backward) for layer in moving]
        reasons = [f"{name}: {reason}" for name, reason in why if reason]
        for function in (network.loss, network.prior):
            if function is not None and not function.is_pure:
                reasons.append(f"{function.name} draws random numbers or changes its buffers")
        return reasons


class Backpropagation(Call):
    """One call of Exact or FixedPred, to be run by one compiled graph.

    The factors are as in ``exact.weighted_backpropagation``.
    """

    def __init__(self, network: Network, factors: Factors) -> None:
        super().__init__(network)
        self._c = (*factors.epsilon[1:], *factors.v[1:])

    def asks(self) -> dict[str, Any]:
        return dict(kind="nothing")

    def run(self, program: Any, inputs: Sequence[Any]) -> list[Tensor]:
        """Forward and backward; returns what was to be captured."""
        network, L, adds = self.network, program.asked.L, program.adds
        device = network.X.device
        _begin(device)
        factors = _scalar_tensors(self._c, program.factor_dtype, device)
        found = list(program.backpropagate([*inputs, *factors]))
        held, v = [*inputs, *found[:adds]], [detached(network.X), *found[adds : adds + L]]
        del found[: adds + L]
        input_error = found.pop(L) if program.asks_input else None
        return self.end(program, inputs, held, v, input_error, found)


@lru_cache(maxsize=32)
def _scalar_tensors(
    c: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    # What is beyond the type is infinite. Filled where they are, as in a relaxation.
    values = torch.tensor(c, dtype=torch.float64, device="cpu").to(dtype).tolist()
    return tuple([torch.full((), c_l, dtype=dtype, device=device) for c_l in values])


def _is_graphed(device: torch.device) -> bool:
    return device.type == "cuda"


def _begin(device: torch.device) -> None:
    if _is_graphed(device):
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def run_plainly(model: nn.Module, reason: object) -> None:
    """Say, the first time, that a model's calls run without compilation."""
    if model not in _warned:
        _warned.add(model)
        first_line = str(reason).strip().partition("\n")[0]
        warn_caller(
            f"compile=True: {type(model).__name__} runs without compilation, because {first_line}"
        )


@lru_cache(maxsize=32)
def _reached_layers(asked: Any, device: torch.device) -> list[tuple[Tensor, ...]]:
    """After 0, 1, ... steps from the feed-forward pass, which layers 0..L an error has reached."""
    from torch2pc.compiled.program import moves_of, reach

    # Filled where they are: to copy them to a GPU waits for it.
    kind: Any = dict(dtype=torch.bool, device=device)
    taken = [moves_of(asked, moved)[1] for moved in reach(asked)]
    layers = range(asked.L + 1)
    return [tuple([torch.full((), l in of_step, **kind) for l in layers]) for of_step in taken]


def _options(device: torch.device) -> dict[str, Any]:
    # Graphs from the disk may have been compiled with another choice of products.
    options = {"fallback_random": True, "size_asserts": False, "fx_graph_cache": False}
    if device.type == "cuda":
        # Each graph is launched at once, as torch.compile(mode="reduce-overhead") does it.
        return {**options, "triton.cudagraphs": True}
    # With the channels last, what lies between convolutions of few channels took twice as long.
    options["layout_optimization"] = False
    try:
        # Not at the top, as they import parts of the compiler that another PyTorch may lack.
        from torch._inductor.config import cpp

        from torch2pc.compiled.products import fast_products
    except ImportError:
        return options
    if getattr(cpp, "vec_isa_ok", True) is None and machine() in ("x86_64", "AMD64"):
        # Take the processor's word for its vector instructions. To try them takes 3 s of compilation.
        options["cpp.vec_isa_ok"] = True
    return {**options, **fast_products()}


def _hooked(network: Network) -> str | None:
    """Why a model cannot be captured: hooks on it that see more than a feed-forward pass."""
    if any(getattr(network.model, name) for name in HOOKS) or any(GLOBAL_HOOKS):
        return "the model itself has a hook"
    for module in network.modules:
        if module._backward_hooks or module._backward_pre_hooks:
            return "a module has a backward hook"
        # torch.compile has no guards for these, and may lose what they write into lists.
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a forward hook is registered on {type(module).__name__}"
        if hasattr(type(module).forward, "displacement_rule"):
            return f"{type(module).__name__} has a displacement_rule"
    return None


def compiled_or_plain(call: Call, plainly: Callable[[], Inference]) -> Inference:
    """What a compiled call infers; where there is none, or it cannot be, what ``plainly`` does."""
    found = call.infer()
    if found is None:
        found = plainly()
        call.explain()
    return found
