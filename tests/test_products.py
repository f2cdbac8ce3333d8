"""The two ways to multiply matrices on a CPU, and that compiled steps take the faster one."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.cases import Case
from tests.test_compiled import infer_compiled, needs_compiler

products = pytest.importorskip("torch2pc.products", reason="this PyTorch has no compiler")

# PyTorch's compiler uses deprecated parts of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
needs_both = pytest.mark.skipif(
    not products.fast_products(), reason="this PyTorch comes with one of the libraries only"
)


@needs_both
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias_dim", [0, 1, 2])
def test_all_products_are_the_same(rows: int, transposed: bool, bias_dim: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(rows, 5), torch.randn(3, 5).t() if transposed else torch.randn(5, 3)
    bias = [None, torch.randn(3), torch.randn(rows, 3)][bias_dim]
    expected = a.double() @ b.double() + (0 if bias is None else bias.double())
    ways = (
        products.by_mkl,
        products.by_onednn,
        products.product,
        torch.ops.torch2pc.product.default,
    )
    for multiply in ways:
        torch.testing.assert_close(multiply(a, b, bias), expected.float())


def test_the_faster_one_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        for _ in range(100):
            a = a + 0
        return quick(a, b, bias)

    def quick(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        asked.append(a.shape)
        return a @ b

    asked: list[torch.Size] = []
    products.faster.cache_clear()
    for by_mkl, by_onednn in ((slow, quick), (quick, slow)):
        monkeypatch.setattr(products, "by_mkl", by_mkl)
        monkeypatch.setattr(products, "by_onednn", by_onednn)
        products.faster.cache_clear()
        products.product(torch.ones(2, 3), torch.ones(3, 4))
        before = len(asked)
        products.product(torch.ones(2, 3), torch.ones(3, 4))
        assert len(asked) == before + 1
        assert products.faster(torch.Size([2, 3]), torch.Size([3, 4]), (4, 1), 0, 1) is quick
    products.faster.cache_clear()


@needs_both
def test_the_defaults_for_new_tensors_do_not_matter() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    products.faster.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = products.product(a, b)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, torch.full((2, 4), 3.0))


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[int, ...]]]:
    """The shapes of b that ``product`` was asked for."""
    found: set[tuple[int, ...]] = set()

    def faster(a: torch.Size, b: torch.Size, *others: object) -> object:
        found.add(tuple(b))
        return products.by_onednn

    monkeypatch.setattr(products, "faster", faster)
    yield found


@needs_compiler
@needs_both
def test_compiled_steps_use_it_for_large_matrices(shapes: set[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 160), nn.Tanh()),
        nn.Sequential(nn.Linear(160, 140), nn.Tanh()),
        nn.Linear(140, 2),
    )
    case = Case(model, nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 2))
    plain = case.infer("Strict")
    gradients = case.gradients()
    assert not shapes
    found = infer_compiled(case)
    torch.testing.assert_close(found.v, plain.v)
    torch.testing.assert_close(case.gradients(), gradients, rtol=1e-4, atol=1e-6)
    assert shapes == {(160, 140), (140, 160)}


@needs_compiler
@needs_both
def test_a_matrix_that_is_added_is_part_of_the_product(shapes: set[tuple[int, ...]]) -> None:
    a, b, c = torch.randn(6, 160), torch.randn(160, 140), torch.randn(6, 140)
    run = torch.compile(lambda a, b, c: c + a @ b, options=products.fast_products())
    torch.testing.assert_close(run(a, b, c), c + a @ b)
    assert shapes == {(160, 140)}


@needs_both
def test_no_choice_where_results_must_repeat() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert products.fast_products() == {}
    finally:
        torch.use_deterministic_algorithms(False)


@needs_compiler
@pytest.mark.filterwarnings("error:compile=True")
def test_steps_compile_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch2pc.products", None)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    case = Case(model, nn.MSELoss(), torch.ones(4, 3), torch.ones(4, 2))
    torch.testing.assert_close(infer_compiled(case).v, case.infer("Strict").v)
