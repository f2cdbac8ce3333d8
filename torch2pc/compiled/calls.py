"""Compiled calls, kept for as long as their model lives.

``torch.compile`` captures the layers and the loss and says, by its guards, when what was captured holds
no more: the mode of a module, a hook, an attribute, a number, a shape have changed. ``program.py`` makes the
graphs of the call from that. Here they are run: the feed-forward pass, ``n`` steps, the updates.

The call that compiles runs plainly itself, so that layers are held against their rules as always. So
does, with a warning, a call that cannot be compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache
from platform import machine
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from torch2pc.energy.divergences import LayerEnergy
from torch2pc.energy.factors import USUAL, Terms
from torch2pc.graph.autograd import in_belief_dtype, outside_autocast, own
from torch2pc.graph.layer import GLOBAL_HOOKS, HOOKS
from torch2pc.graph.network import Inference, Network, detached
from torch2pc.graph.warn import warn_caller
from torch2pc.inference.nudge import slope
from torch2pc.inference.start import check_vinit_entries
from torch2pc.inference.steps import Rule, rule_of

if TYPE_CHECKING:
    from torch2pc.compiled.program import Asked, Program

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
        from torch2pc.compiled.parts import capture

        if asked not in self.captures:
            # Its own code object: what is compiled for a model is kept with the code, so it goes
            # when the model does, and one model's shapes do not count against another's
            # recompilations.
            code: CodeType = capture.__code__.replace(co_name=f"capture_{id(self)}")
            own_code = FunctionType(code, capture.__globals__, closure=capture.__closure__)
            self.captures[asked] = torch.compile(own_code, fullgraph=True, backend=_Captured)
        return self.captures[asked](*arguments)


_models: WeakKeyDictionary[nn.Module, _Model] = WeakKeyDictionary()


class _OfThread(threading.local):
    """What belongs to one thread."""

    call: Any = None
    """The call that is being captured, or run."""

    @cached_property
    def settings(self) -> AbstractContextManager[Any]:
        """Those of the compiler, made once: that takes as long as some steps of a small network.

        A number is compiled in: what is captured for another one is another program.
        """
        found: AbstractContextManager[Any] = torch._dynamo.config.patch(
            specialize_float=True, recompile_limit=MOST_CAPTURES
        )
        return found


_local = _OfThread()


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


class Relaxing:
    """A call that relaxes beliefs (``"Strict"``, ``"Latent"``) or errors (``"ErrorBased"``)."""

    KINDS = {  # noqa: RUF012
        "Strict": "beliefs",
        "Multipliers": "beliefs",
        "Latent": "beliefs",
        "ErrorBased": "errors",
    }

    def __init__(
        self,
        network: Network,
        ErrType: str,
        eta: float | str | Rule,
        n: int,
        vinit: Sequence[Any] | None = None,
        update_at: str = "v",
        *,
        terms: Terms = USUAL,
        nudge: float | None = None,
    ) -> None:
        self.network = network
        self.captured: _Captured | None = None
        self.inference: Inference | None = None
        self.reason: object = None
        self.has_begun = False
        self.ErrType, self.eta, self.n, self.vinit = ErrType, eta, n, vinit
        # Errors belong to the beliefs that they have made.
        before_of_errors = update_at == "before" and ErrType == "ErrorBased"
        self.update_at, self.terms = "v" if before_of_errors else update_at, terms
        self.nudge = nudge
        if ErrType not in self.KINDS:
            self.reason = f"{ErrType} is not compiled"
        elif network.from_above:
            self.reason = "beliefs are predicted from above"

    def infer(self) -> Inference | None:
        """The result; None if the call is to be run plainly, and nothing has happened yet."""
        network, model = self.network, self.network.model
        if not network.free:
            return None  # where nothing moves there is nothing to compile
        self.reason = self.reason or _hooked(network)
        if self.reason is not None:
            return None
        try:
            self.asked = self._asked()
        except ImportError as error:  # another PyTorch may lack what is imported there
            self.reason = error
            return None
        kept = _models.get(model)
        if kept is None:
            kept = _models[model] = _Model()
        self.reason = self.reason or kept.error
        if self.reason is not None:
            return None
        before, _local.call = _local.call, self
        try:
            with _local.settings if before is None else nullcontext():
                kept.capture(
                    self.asked,
                    tuple([layer.function for layer in network.layers]),
                    self.asked.parents,
                    tuple([layer.copies_input for layer in network.layers]),
                    *(
                        network.loss.function,
                        None if network.prior is None else network.prior.function,
                    ),
                    *(
                        tuple(zip(self.asked.energies, self._energies.values(), strict=True)),
                        network.X,
                        network.Y,
                    ),
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

    @property
    def _energies(self) -> dict[int, LayerEnergy]:
        """The layers' own energies, by their places, in order."""
        return dict(sorted(self.terms.between.items()))

    def _asked(self) -> Asked:
        from torch2pc.compiled.parts import own_energy
        from torch2pc.compiled.program import Asked, RuleOf

        network = self.network
        # (A rule that draws a seed does so when the call is run.)
        rule = RuleOf.of(self.eta if isinstance(self.eta, Rule) else rule_of(self.eta))
        if not rule.is_constant:
            self.reason = f"eta is a rule that holds more than numbers, {self.eta}"
        return Asked(
            kind=self.KINDS[self.ErrType],
            parents=tuple([node.parents for node in network.nodes]),
            names=tuple([node.where for node in network.nodes]),
            free=tuple(sorted(network.free)),
            rule=rule,
            update_at=self.update_at,
            is_weighted=self.terms.precision is not None,
            is_nudged=self.nudge is not None,
            is_multiplied=self.terms.alpha is not None,
            energies=tuple([own_energy(*of_layer) for of_layer in self._energies.items()]),
            has_prior=network.prior is not None,
            takes_errors=self.ErrType == "Latent",
        )

    def run(self, program: Program, inputs: Sequence[Any]) -> list[Tensor]:
        """Feed forward, ``n`` steps, and the updates; returns what was to be captured."""
        from torch2pc.compiled.parts import find

        _begin(self.network.X.device)
        held = [*inputs, *program.feed_forward(inputs)]
        known, vhat = program.known(held), [find(held, place) for place in program.vhat]
        check_vinit_entries(self.vinit, vhat)
        if self.nudge is None:
            v, epsilon, of_input, updates = self._relaxed(program, known, vhat)
        else:
            beta = self.nudge
            _, _, below, updates_below = self._relaxed(program, known, vhat, -beta)
            v, epsilon, of_input, updates = self._relaxed(program, known, vhat, beta)
            if of_input is not None:
                of_input = slope(of_input, below, beta)
            updates = [slope(*sides, beta) for sides in zip(updates, updates_below, strict=True)]
        return self.end(program, inputs, held, v, of_input, [*epsilon, *updates])

    def _relaxed(
        self, program: Program, known: list[Any], vhat: list[Tensor], beta: float | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[Tensor]]:
        """The beliefs, the errors, that of the input, and the updates after ``n`` steps."""
        network, asked, n = self.network, program.asked, self.n
        rule, like = rule_of(self.eta), in_belief_dtype(vhat[-1])
        reached = _reached_layers(asked, like.device)
        numbers = _numbers(rule, self.terms, beta, like)

        def given(k: int = -1) -> list[Any]:
            return [*known, *numbers, *reached[k]]

        def noise(places: list[int], times: int = 1) -> list[Tensor]:
            return [rule.noise(x[k]) for _ in range(times) for k in places]

        x = [torch.zeros_like(in_belief_dtype(vhat[i])) for i in asked.free]
        if self.vinit is not None:
            for i, x_i in zip(asked.free, x, strict=True):
                torch.sub(self.vinit[i].detach(), vhat[i], out=x_i)
            if asked.kind == "errors":
                x = list(program.start([*given(), *x]))
        before, start = x, [like] * program.size
        program.begin.put(
            start, program.begin.graph([*given(), *x, *noise(program.noise_of_begin)])
        )
        program.tell(rule, start)
        rule.choose()
        first = len(program.reach) - 1 if self.vinit is not None else program.first
        ends_alone = self.update_at == "before"
        while True:
            numbers = _numbers(rule, self.terms, beta, like)
            state, of_k = list(start), {}
            for k, step in program.schedule(first, n, ends_alone):
                if k not in of_k:
                    of_k = {k: given(k)}
                before = state[: len(x)]
                drawn = noise(program.noise_of_step, step.steps)
                step.put(state, step.graph([*of_k[k], *state, *drawn]))
            judge = program.judge
            if rule.accepts(None if judge is None else judge([*given(), *state])[0]):
                break
        found = list(program.updates([*given(), *state, *(before if ends_alone else [])]))
        v: list[Tensor] = [found.pop(0) for _ in range(len(asked.free) + 1)]
        if 0 not in network.free:
            v.insert(0, detached(network.X))
        epsilon: list[Tensor] = [
            found.pop(0) if program.retakes else state[k] for k in program.errors
        ]
        of_input = found.pop(0) if program.asks_input else None
        return v, epsilon, of_input, found

    def end(
        self,
        program: Program,
        inputs: Sequence[Any],
        held: Sequence[Any],
        v: list[Tensor],
        input_error: Tensor | None,
        found: list[Tensor],
    ) -> list[Tensor]:
        """Set ``inference``; ``found`` are the layers' errors, and then the updates."""
        from torch2pc.compiled.parts import find

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


def _numbers(rule: Rule, terms: Terms, beta: float | None, like: Tensor) -> list[Tensor]:
    """The rule's, the precisions, the factor of the loss, and how fast multipliers grow."""
    numbers = [getattr(rule, name) for name in rule.numbers]
    numbers += [*(terms.precision or []), *[x for x in (beta, terms.alpha) if x is not None]]
    return [_as_tensor(x, like) for x in numbers]


def _as_tensor(number: Any, like: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(like)
    # Filled where it is: to copy a number to a GPU waits for it. (A rule may still have to find it.)
    return like.new_full((), number if isinstance(number, int | float) else 0.0)


@lru_cache(maxsize=32)
def _reached_layers(asked: Any, device: torch.device) -> list[tuple[Tensor, ...]]:
    """After 0, 1, ... steps from the feed-forward pass, which layers 1..L an error has reached."""
    from torch2pc.compiled.program import reach, reached

    # Filled where they are: to copy them to a GPU waits for it.
    kind: Any = dict(dtype=torch.bool, device=device)
    of_steps = [reached(asked, moved) for moved in reach(asked)]
    return [tuple([torch.full((), is_reached, **kind) for is_reached in of]) for of in of_steps]


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
        from torch._inductor import config

        from torch2pc.compiled.products import fast_products
    except ImportError:
        return options
    if hasattr(config, "use_joint_graph_passes"):
        # What these look for (attention that is written out, products to be padded) takes a second to be
        # set up, and hardly comes up here.
        options["use_joint_graph_passes"] = False
    if getattr(config.cpp, "vec_isa_ok", True) is None and machine() in ("x86_64", "AMD64"):
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


def compiled_or_plain(call: Relaxing, plainly: Callable[[], Inference]) -> Inference:
    """What a compiled call infers; where there is none, or it cannot be, what ``plainly`` does."""
    found = call.infer()
    if found is None:
        found = plainly()
        call.explain()
    return found
