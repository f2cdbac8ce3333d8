"""No algorithm waits for its device: nothing reads a tensor's values while a call runs.

On a GPU each of these operations would wait for all that was launched before. Here they are looked for on
the CPU, in a call that has met its model before: the first one holds the layers against their rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import Case
from torch2pc import PCInferLatent
from torch2pc.compiled import calls as compiled

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.linalg_lstsq.default,
    aten.lift_fresh.default,  # torch.tensor(numbers), which are copied to the device
}


class NoWaiting(TorchDispatchMode):
    """Raises for what would wait for a GPU; indexing by a mask does, and so does a copy to the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is aten.index.Tensor and any(
            [x is not None and x.dtype == torch.bool for x in args[1]]
        )
        # States of random generators live on the CPU, whatever the device.
        values = [x for x in args if isinstance(x, Tensor) and x.dtype != torch.uint8]
        if func in WAITING or by_mask or (func is aten.equal.default and values):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def convolutional() -> Case:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.LayerNorm(8), nn.GELU()),
        nn.Sequential(nn.Linear(8, 8), nn.Hardtanh(), nn.Dropout(0.2)),
        nn.Linear(8, 4),
    )
    return Case(model, nn.CrossEntropyLoss(), torch.randn(5, 1, 8, 8), torch.randint(4, (5,)))


def attentive() -> Case:
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Softmax(-1)),
        nn.Linear(8, 2),
    )
    return Case(model, nn.MSELoss(), torch.randn(3, 4, 8), torch.randn(3, 4, 2))


@pytest.mark.parametrize("make", [convolutional, attentive])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("ErrType", "options"),
    [
        ("Exact", {}),
        ("Exact", {"accumulate": True}),
        ("FixedPred", {}),
        ("Strict", {}),
        ("Strict", {"update_at": "vhat"}),
    ],
)
def test_nothing_waits(
    make: Callable[[], Case], autocast: bool, ErrType: str, options: dict[str, Any]
) -> None:
    case = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        case.infer(ErrType, **options)
        with NoWaiting():
            case.infer(ErrType, **options)


def test_nothing_waits_for_latents() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    arguments = (model, nn.MSELoss(), torch.randn(5, 3), torch.zeros(5, 2), 0.1, 3)
    prior = {"prior": lambda v: v[0].square().sum(), "precision": 0.5}
    PCInferLatent(*arguments, **prior)
    with NoWaiting():
        PCInferLatent(*arguments, **prior)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error:compile=True")
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("has_precisions", [False, True])
def test_nothing_waits_in_a_compiled_call(
    has_precisions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(
        nn.Linear(2, 4), nn.Sequential(nn.ReLU(), nn.Dropout(0.2)), nn.Linear(4, 3)
    )
    case = Case(model, nn.MSELoss(), torch.randn(5, 2), torch.randn(5, 3))
    watched = []
    run = compiled.Relaxing.run

    def run_watched(*args: Any) -> Any:
        watched.append(1)
        with NoWaiting():
            return run(*args)

    monkeypatch.setattr(compiled.Relaxing, "run", run_watched)
    for _ in range(2):  # the first one compiles, and runs plainly
        if has_precisions:
            PCInferLatent(*case[:2], case.Y, case.X, 0.1, 3, precision=0.5, compile=True)
        else:
            case.infer("Strict", compile=True)
    assert watched == [1]


def test_what_waits_is_seen() -> None:
    x = torch.ones(3)
    for wait in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: bool(x.any()),
        x.nonzero,
        lambda: torch.tensor([1.0, 2.0]),
    ):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            wait()
