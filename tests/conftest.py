"""Settings for all tests: the hypothesis profile and a fixed seed."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, settings

# Hypothesis tries constants of the modules that happen to be loaded: what a test is given would
# depend on which tests ran before it. (Older versions do not, and have no such module.)
with suppress(ImportError):
    from hypothesis.internal.conjecture import providers

    if hasattr(providers, "_local_constants"):
        providers._get_local_constants = lambda: providers._local_constants

settings.register_profile(
    "torch2pc",
    derandomize=True,
    deadline=None,
    # More for a closer look: TORCH2PC_TEST_EXAMPLES=200 python -m pytest
    max_examples=int(os.environ.get("TORCH2PC_TEST_EXAMPLES", "15")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("torch2pc")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    # Many tests make few iterations, to be quick.
    config.addinivalue_line("filterwarnings", "ignore:The error hardly reaches:UserWarning")
    # Or too large ones.
    config.addinivalue_line("filterwarnings", "ignore:The energy that .* descends went:UserWarning")
    # Nor do they wait for the equilibrium.
    config.addinivalue_line("filterwarnings", "ignore:Equilibrium stopped after:UserWarning")
    # Many small operations: a second thread costs more than it brings.
    torch.set_num_threads(1)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiled call has traced runs as it is."""
    from tests.cases import run_as_traced

    run_as_traced(monkeypatch)
