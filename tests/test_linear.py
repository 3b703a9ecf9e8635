"""Linear layers by oneDNN have the numbers and gradients of torch's own, whatever the layout in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from appo.lm import linear
from appo.lm.attention import Branches
from appo.lm.linear import FEW, OneDNNLinear
from appo.lm.model import CausalLM
from tests.conftest import byte_tokenizer, llama

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    monkeypatch.setattr(linear, "native_dtypes", lambda: {torch.float32, torch.bfloat16})


def layers(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    """torch's own layer, and its oneDNN twin."""
    torch.manual_seed(0)
    plain, ours = (nn.Linear(24, 40, bias=bias, dtype=dtype) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    linear.install(ours)
    assert type(ours) is OneDNNLinear
    return plain, ours


def same(found: Tensor | None, expected: Tensor | None) -> None:
    """Equality, except for the rounding of sums of hundreds of products."""
    assert found is not None and expected is not None
    assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


INPUTS = {
    "rows": lambda: torch.randn(FEW + 3, 24),
    "batch": lambda: torch.randn(5, FEW, 24),
    "transposed": lambda: torch.randn(24, FEW).t(),
    "every other": lambda: torch.randn(2 * FEW, 48)[::2, ::2],
    "expanded": lambda: torch.randn(1, 24).expand(FEW, 24),
}


@pytest.mark.parametrize("many", [linear.MANY, 0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", INPUTS)
def test_numbers_and_gradients_are_those_of_torch(
    layout: str, bias: bool, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "MANY", many)
    plain, ours = layers(bias)
    x = INPUTS[layout]()
    theirs, mine = x.detach().requires_grad_(), x.detach().requires_grad_()
    expected, found = plain(theirs), ours(mine)
    assert type(found.grad_fn).__name__ == "_ProductBackward"  # else this tests nothing
    same(found, expected)
    weight = torch.randn(expected.shape)
    for loss in (lambda y: (y * weight).sum(), Tensor.sum, lambda y: y.transpose(0, -1)[::3].pow(2).sum()):
        for layer, leaf, output in ((plain, theirs, expected), (ours, mine, found)):
            leaf.grad = None
            layer.zero_grad()
            loss(output).backward(retain_graph=True)
        same(mine.grad, theirs.grad)
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            same(a.grad, b.grad)


def test_no_gradient_is_computed_for_inputs_that_need_none() -> None:
    _, ours = layers(bias=True)
    ours.requires_grad_(False)
    x = torch.randn(FEW, 24, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in ours.parameters())
    ours.requires_grad_(True)
    ours(torch.randn(FEW, 24)).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize(("rows", "dtype"), [(FEW - 1, torch.float32), (FEW, torch.float64), (FEW, torch.bfloat16)])
def test_all_else_is_torchs_own_to_the_bit(rows: int, dtype: torch.dtype) -> None:
    plain, ours = layers(bias=True, dtype=dtype)
    x = torch.randn(rows, 24, dtype=dtype)
    assert torch.equal(ours(x), plain(x))


def test_layers_that_compute_something_of_their_own_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "doubled": Doubled(4, 4)})
    names = [name for name, _ in model.named_parameters()]
    linear.install(model)
    assert [type(layer) for layer in model.values()] == [OneDNNLinear, Doubled]
    assert [name for name, _ in model.named_parameters()] == names
    linear.uninstall(model)
    assert [type(layer) for layer in model.values()] == [nn.Linear, Doubled]


def linear_layers(lm: CausalLM) -> list[nn.Linear]:
    return [module for module in lm.model.modules() if isinstance(module, nn.Linear)]


def test_a_model_without_onednn_is_torchs_own_to_the_bit() -> None:
    tokenizer, batch = byte_tokenizer(), Branches([[]], [list(range(3, 3 + 2 * FEW))], [0])
    with_it, without = (CausalLM(llama(len(tokenizer)), tokenizer, onednn=onednn) for onednn in (True, False))
    assert {type(layer) for layer in linear_layers(with_it)} == {OneDNNLinear}
    assert {type(layer) for layer in linear_layers(without)} == {nn.Linear}
    for layer in linear_layers(without):
        x = torch.randn(2 * FEW, layer.in_features)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    linear.uninstall(with_it.model)
    assert torch.equal(without.run(batch).logits, with_it.run(batch).logits)


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_f": False, "cpu_name": "AMD EPYC"}, False),
        ({"avx512_f": True, "cpu_name": "Intel(R) Xeon(R)"}, False),
        ({"architecture": "arm64"}, False),
    ],
)
def test_onednn_is_used_where_it_is_faster(
    cpu: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    linear.is_faster.cache_clear()
    found = linear.is_faster()
    linear.is_faster.cache_clear()
    assert found == (expected and torch.backends.mkl.is_available())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_laid_out_give_the_same_for_few_rows(bias: bool, dtype: torch.dtype) -> None:
    plain, ours = layers(bias, dtype)
    with torch.no_grad(), linear.laid_out(ours):
        weight = ours.weight.clone()
        ours.weight.zero_()  # so that the copy must be what is multiplied
        for x in (torch.randn(1, 24), torch.randn(6, 24), torch.randn(3, 1, 24), torch.randn(FEW - 1, 48)[:, ::2]):
            found, expected = ours(x.to(dtype)), plain(x.to(dtype))
            assert found.shape == expected.shape
            assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
        ours.weight.copy_(weight)
        many = torch.randn(FEW, 24, dtype=dtype)
        assert_close(ours(many), plain(many), rtol=1e-5, atol=1e-5)
    assert ours.laid_out is None
    assert torch.equal(ours(many[:3]), plain(many[:3]))


def test_weights_that_take_much_memory_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = layers(bias=True)
    monkeypatch.setattr(linear, "MOST", 24 * 40 * 4 - 1)
    with linear.laid_out(ours):
        assert ours.laid_out is None
    monkeypatch.setattr(linear, "MOST", 24 * 40 * 4)
    with linear.laid_out(ours):
        assert ours.laid_out is not None


def test_a_copy_that_fails_leaves_no_layout_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lay_out = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)), torch.ops.mkldnn._reorder_linear_weight

    def starving(weight: Tensor) -> Tensor:
        if len(weight) == 5:
            raise RuntimeError("can't allocate memory")
        return lay_out(weight)

    linear.install(model)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", starving)
    with linear.laid_out(model):
        assert all(layer.laid_out is None for layer in model)
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), linear.laid_out(model):
        raise ZeroDivisionError
    assert all(layer.laid_out is None for layer in model)


@pytest.mark.parametrize(
    ("architecture", "supported", "expected"),
    [("x86_64", True, {torch.float32, torch.bfloat16}), ("x86_64", False, {torch.float32}), ("arm64", True, set())],
)
def test_weights_are_laid_out_in_dtypes_that_the_cpu_multiplies(
    architecture: str, supported: bool, expected: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": architecture})
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    linear.native_dtypes.cache_clear()
    found = linear.native_dtypes()
    linear.native_dtypes.cache_clear()
    assert found == expected


def test_under_autocast_torch_computes_as_before() -> None:
    plain, ours = layers(bias=True)
    x = torch.randn(6, 24)
    with torch.no_grad(), linear.laid_out(ours), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("biased", [(), (0,), (0, 1)])
def test_products_of_several_layers_lie_side_by_side(biased: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    some = nn.ModuleList(nn.Linear(24, width, bias=i in biased) for i, width in enumerate((40, 13)))
    x = torch.randn(6, 24)
    expected = torch.cat([layer(x) for layer in some], dim=-1)
    assert linear.product_of([some[0]]) is some[0]
    same(linear.product_of(list(some))(x), expected)
    linear.install(some)
    with torch.no_grad(), linear.laid_out(some):
        same(linear.product_of(list(some))(x), expected)
