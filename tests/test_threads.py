"""Threads: what one of them does with a model or the generator, another one's call leaves alone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.cases import ERR_TYPES
from torch2pc import PCInfer

err_types = pytest.mark.parametrize("ErrType", ERR_TYPES)
CALLS = 60


@contextmanager
def meanwhile(body: Callable[[], None]) -> Iterator[Callable[[], Iterator[int]]]:
    """Repeats ``body`` in another thread while the block runs, and raises what it raised.

    The block is given what it can iterate over until both it and the thread have gone round often.
    """
    done, rounds, raised = threading.Event(), [], []

    def run() -> None:
        try:
            while not done.is_set():
                body()
                rounds.append(None)
        except BaseException as error:
            raised.append(error)

    def turns() -> Iterator[int]:
        start = len(rounds)
        for k in itertools.count():
            if raised or (k >= CALLS and len(rounds) >= start + CALLS):
                return
            yield k

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield turns
    finally:
        done.set()
        thread.join()
    if raised:
        raise raised[0]


def make_model(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


@err_types
def test_nobody_else_draws_the_same_numbers_twice(ErrType: str) -> None:
    """A model that draws nothing leaves the global generator to the threads that do."""
    model, X, Y = make_model(nn.BatchNorm1d(6)), torch.randn(8, 4), torch.randn(8, 3)
    drawn: list[Tensor] = []
    with meanwhile(lambda: drawn.append(torch.rand(4))) as turns:
        for _ in turns():
            PCInfer(model, nn.MSELoss(), X, Y, ErrType, n=5)
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn)


class Counts(nn.Module):
    """Writes and replaces buffers in each evaluation, and does not depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.replaced = self.replaced + 1
        return x


@err_types
@pytest.mark.parametrize("hooked", [False, True])
def test_a_model_can_be_called_while_another_thread_infers_with_it(
    ErrType: str, hooked: bool
) -> None:
    model = make_model(Counts())
    X, Y, other = torch.randn(8, 4), torch.randn(8, 3), torch.randn(5, 4)
    seen: list[nn.Module] = []
    if hooked:
        model.register_forward_hook(lambda module, inputs, output: seen.append(module))
    with torch.no_grad():
        expected = model(other)

    def call() -> None:
        with torch.no_grad():
            assert torch.equal(model(other), expected)

    with meanwhile(call) as turns:
        for _ in turns():
            PCInfer(model, nn.MSELoss(), X, Y, ErrType, n=5)
    assert all(module is model for module in seen)


@err_types
def test_a_model_being_trained_answers_with_old_or_new_weights(ErrType: str) -> None:
    """A model with one weight: what it answers is what that is, or was."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity())
    X, Y = torch.ones(8, 1), torch.zeros(8, 1)
    weights = {model[0].weight.item()}
    answers: list[float] = []

    def call() -> None:
        with torch.no_grad():
            answers.append(model(torch.ones(1, 1)).item())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with meanwhile(call) as turns:
        for _ in turns():
            PCInfer(model, nn.MSELoss(), X, Y, ErrType, n=5)
            optimizer.step()
            weights.add(model[0].weight.item())
    assert set(answers) <= weights and len(set(answers)) > 1


@err_types
def test_threads_that_train_models_of_their_own_do_as_one_after_the_other(ErrType: str) -> None:
    def train(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        model = make_model(nn.BatchNorm1d(6))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(20):
            X, Y = (torch.randn(8, k, generator=generator) for k in (4, 3))
            PCInfer(model, nn.MSELoss(), X, Y, ErrType, n=5)
            optimizer.step()
        return [*model.state_dict().values()]

    expected = [train(seed) for seed in range(3)]
    found: dict[int, list[Tensor]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: train(seed)}))
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, tensors in enumerate(expected):
        assert all(torch.equal(*pair) for pair in zip(found[seed], tensors, strict=True))
