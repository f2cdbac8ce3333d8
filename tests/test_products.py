"""The ways to multiply matrices on a CPU, and that compiled steps take the fastest one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.cases import Case, needs_compiler
from tests.test_compiled import infer_compiled

pytest.importorskip("torch._inductor.custom_graph_pass", reason="this PyTorch has no compiler")
from torch._inductor.decomposition import select_decomp_table

from torch2pc.compiled import products, rewrites

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
    for multiply in (products.by_mkl, products.by_onednn, torch.ops.torch2pc.by_onednn.default):
        torch.testing.assert_close(multiply(a, b, bias), expected.float())


aten = torch.ops.aten


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [None, (3,), (1, 3), ()])
@pytest.mark.parametrize("inner", [0, 1, 5])
def test_small_products_are_sums(
    rows: int, transposed: bool, bias: tuple[int, ...] | None, inner: int
) -> None:
    """One after the other, too."""
    torch.manual_seed(0)
    b = torch.randn(3, inner).double().t() if transposed else torch.randn(inner, 3).double()
    given = [torch.randn(rows, inner).double(), b, torch.randn(3, 3).double()]
    if bias is not None:
        given.append(torch.randn(bias).double())

    def function(a: Tensor, b: Tensor, c: Tensor, *added: Tensor) -> Tensor:
        first = torch.addmm(*added, a, b) if added else torch.mm(a, b)
        return torch.mm(first, c)

    graph, expected = make_fx(function)(*given), function(*given)
    rewrites.sum_small_products(graph.graph)
    graph.recompile()
    assert products_in(graph) == 0
    torch.testing.assert_close(graph(*given), expected)


def products_in(graph: fx.GraphModule) -> int:
    return sum([node.target in (aten.mm.default, aten.addmm.default) for node in graph.graph.nodes])


@pytest.mark.parametrize(
    ("sizes", "dtype", "device", "options"),
    [
        ((16, 32, 33), torch.float32, "cpu", {}),
        ((2, 2, 2), torch.bfloat16, "cpu", {}),
        ((2, 2, 2), torch.float32, "meta", {}),
        ((2, 2, 2), torch.float32, "cpu", dict(alpha=2)),
    ],
    ids=["many", "half precision", "elsewhere", "scaled"],
)
def test_other_products_are_left_to_the_libraries(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: str, options: dict[str, Any]
) -> None:
    m, k, n = sizes
    kind: Any = dict(dtype=dtype, device=device)
    given = [torch.ones(n, **kind), torch.ones(m, k, **kind), torch.ones(k, n, **kind)]
    graph = make_fx(lambda c, a, b: torch.addmm(c, a, b, **options))(*given)
    rewrites.sum_small_products(graph.graph)
    assert products_in(graph) == 1


@pytest.mark.parametrize("kind", ["fake", "symbolic"])
def test_products_of_zeros_are_zeros(kind: str) -> None:
    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        zeros, ones = torch.zeros_like(a), torch.ones_like(b)
        return [zeros @ b, a @ torch.zeros_like(b.t()).t() - 1, a @ ones, zeros.t() @ a, a @ b]

    given = [torch.randn(2, 3), torch.randn(3, 4)]
    graph = make_fx(function, select_decomp_table(), tracing_mode=kind)(*given)
    rewrites.drop_products_of_zeros(graph.graph)
    graph.recompile()
    assert products_in(graph) == (2 if kind == "fake" else 5)
    torch.testing.assert_close(graph(*given), function(*given))


def test_a_product_of_any_number_of_rows_is_left_to_the_libraries() -> None:
    given = [torch.ones(3, 2), torch.ones(2, 2)]
    graph = make_fx(torch.mm, tracing_mode="symbolic")(*given)
    rewrites.sum_small_products(graph.graph)
    assert products_in(graph) == 1


LIKE = ((2, 3), (3, 4), (4, 1), 0, 1)


def test_the_faster_one_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is oneDNN only if it takes clearly less."""
    asked: list[torch.Size] = []
    now = 0.0

    def taking(seconds: float) -> Callable[..., Tensor]:
        def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
            nonlocal now
            asked.append(a.shape)
            # Some runs are disturbed.
            now += seconds * (1 + len(asked) % 3)
            return a @ b

        return multiply

    monkeypatch.setattr(products, "time", SimpleNamespace(perf_counter=lambda: now))
    cases = [(3.0, 1.0, True), (1.0, 3.0, False), (2.0, 2.0, False)]
    cases += [(2.0, 2.0 * products.MARGIN + d, d < 0) for d in (-0.01, 0.01)]
    for by_mkl, by_onednn, expected in cases:
        monkeypatch.setattr(products, "by_mkl", taking(by_mkl))
        monkeypatch.setattr(products, "by_onednn", taking(by_onednn))
        products.is_onednn_faster.cache_clear()
        assert products.is_onednn_faster(*LIKE) is expected
        before = len(asked)
        assert products.is_onednn_faster(*LIKE) is expected
        assert len(asked) == before
    products.is_onednn_faster.cache_clear()


@needs_both
def test_the_defaults_for_new_tensors_do_not_matter() -> None:
    products.is_onednn_faster.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert products.is_onednn_faster(*LIKE) in (True, False)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[int, ...]]]:
    """The shapes of b that were asked about, for all of which oneDNN is chosen."""
    found: set[tuple[int, ...]] = set()

    def is_onednn_faster(a: tuple[int, ...], b: tuple[int, ...], *others: object) -> bool:
        found.add(b)
        return True

    monkeypatch.setattr(products, "is_onednn_faster", is_onednn_faster)
    yield found


@needs_compiler
@needs_both
def test_compiled_steps_use_it_for_large_matrices(
    shapes: set[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch2pc.compiled.program.most_steps", lambda L: 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 160), nn.Sequential(nn.Tanh(), nn.Linear(160, 140)))
    case = Case(model, nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 140))
    plain = case.infer("Strict")
    gradients = case.gradients()
    assert not shapes
    found = infer_compiled(case)
    torch.testing.assert_close(found.v, plain.v)
    torch.testing.assert_close(case.gradients(), gradients, rtol=1e-4, atol=1e-6)
    assert shapes == {(160, 140), (140, 160)}


@needs_both
def test_what_is_added_is_part_of_the_product(shapes: set[tuple[int, ...]]) -> None:
    """A row or a matrix; but a number that is spread, and small matrices, are left as they are."""
    a, b = torch.randn(6, 160), torch.randn(160, 140)
    for c, is_whole in (
        (torch.randn(6, 140), True),
        (torch.randn(140), True),
        (torch.ones(()), False),
    ):
        traced = make_fx(torch.addmm, tracing_mode="fake")(c, a, b)
        products.ReplaceProducts()(traced.graph)
        called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert (torch.ops.torch2pc.by_onednn.default in called) is is_whole
        traced.recompile()
        torch.testing.assert_close(traced(c, a, b), torch.addmm(c, a, b))
    assert shapes == {(160, 140)}


@needs_both
def test_no_choice_where_results_must_repeat() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert products.fast_products() == {}
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings("error:compile=True")
def test_steps_compile_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch2pc.compiled.products", None)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    case = Case(model, nn.MSELoss(), torch.ones(4, 3), torch.ones(4, 2))
    torch.testing.assert_close(infer_compiled(case).v, case.infer("Strict").v)
