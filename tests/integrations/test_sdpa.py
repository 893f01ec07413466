"""`activate` and `override_sdpa`: torch's scaled_dot_product_attention on fastattn's kernels, and back.

Each test compares with torch's own function, and looks in the report that the kernels really ran (or did not).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import _extension, backends
from fastattn.dense import delegate
from fastattn.integrations import flash_plugin
from fastattn.integrations.calls import CallReport

pytestmark = pytest.mark.skipif(_extension.unavailable() is not None, reason="the C++ extension is missing")

ROUTES = [fastattn.activated, fastattn.override_sdpa]
Route = Callable[[], AbstractContextManager[CallReport]]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def outcome(leaves: list[Tensor], options: dict[str, Any], grad_out: Tensor | None = None) -> list[Tensor]:
    """The output and the gradients of query, key, value and what else is a leaf."""
    out = F.scaled_dot_product_attention(*leaves[:3], **options)
    grad_out = torch.ones_like(out) if grad_out is None else grad_out
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def masks() -> dict[str, dict[str, Any]]:
    return {
        "full": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "bool mask": {"attn_mask": torch.rand(2, 1, 11, 13) < 0.6},
        "empty row": {"attn_mask": torch.arange(11)[:, None] > torch.zeros(13)},
        "float mask": {"attn_mask": torch.randn(11, 13, dtype=torch.float64)},
        "minus infinity": {"attn_mask": torch.full((11, 13), -torch.inf, dtype=torch.float64).triu(2)},
    }


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", list(masks()))
def test_results_are_torchs(route: Route, name: str) -> None:
    """Fails where causal is aligned bottom-right, a mask or the scale is dropped, or a gradient is another's."""
    leaves, options = [leaf(2, 4, 11, 8), leaf(2, 4, 13, 8), leaf(2, 4, 13, 8)], masks()[name]
    expected = outcome(leaves, options)
    with route() as report:
        found = outcome(leaves, options)
    assert report.items() == [(("fastattn", "cpu"), 1)]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Fails where the result comes in another dtype or is far off."""
    leaves = [leaf(1, 2, 40, 16, dtype=dtype) for _ in range(3)]
    expected = outcome(leaves, {"is_causal": True})
    with fastattn.activated() as report:
        found = outcome(leaves, {"is_causal": True})
    assert report.count("fastattn") == 1
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=8 * eps, atol=32 * eps)


def test_layouts_are_torchs() -> None:
    """Output and gradients have torch's strides, whatever the query's: compiled code is generated for those."""
    dense, packed = torch.randn(2, 11, 4, 8), torch.randn(2, 11, 3, 4, 8)
    for query, key, value in (
        (dense.transpose(1, 2), dense.transpose(1, 2), dense.transpose(1, 2)),
        (dense.transpose(1, 2).contiguous(), dense.transpose(1, 2), dense.transpose(1, 2)),
        tuple(t.transpose(1, 2) for t in packed.unbind(2)),
    ):
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        expected = outcome(leaves, {})
        with fastattn.activated():
            found = outcome(leaves, {})
        assert [t.stride() for t in found] == [t.stride() for t in expected]


def test_what_the_selector_sends_elsewhere_is_counted() -> None:
    """Fails if a call past flash attention computes something else, or is missing from the report."""
    q, k, v = leaf(2, 4, 5, 8), leaf(2, 4, 5, 8), leaf(2, 4, 5, 8)
    bias = leaf(5, 5)
    calls: list[tuple[list[Tensor], dict[str, Any], str]] = [
        ([q, k, leaf(2, 4, 5, 3)], {}, "value head_dim 3"),
        ([q, k, v, bias], {"attn_mask": bias}, "attn_mask that requires a gradient"),
    ]
    for leaves, options, what in calls:
        expected = outcome(leaves, options)
        with fastattn.activated() as report:
            found = outcome(leaves, options)
        ((place, why), count), *others = report.items()
        assert (place, count, others) == ("torch", 1, [])
        assert what in why
        assert "math" in why
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    three = [leaf(4, 5, 8), leaf(4, 5, 8), leaf(4, 5, 8)]
    expected = outcome(three, {})
    with fastattn.activated() as report:
        found = outcome(three, {})
    # torch 2.15 gives them a fourth axis and its flash attention.
    assert report.count("fastattn") == 1 or "3 axes" in str(report)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.manual_seed(3)
    expected = [F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)]
    with fastattn.activated() as report:
        torch.manual_seed(3)
        found = [F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)]
    assert "dropout_p" in str(report)
    torch.testing.assert_close(found, expected)


def test_override_takes_what_the_selector_sends_elsewhere() -> None:
    """Fails if a bias's gradient, another value width, grouped heads or missing axes go to torch or come out wrong."""
    q, k, v, bias = leaf(2, 4, 5, 8), leaf(2, 4, 6, 8), leaf(2, 4, 6, 8), leaf(5, 6)
    calls: list[tuple[list[Tensor], dict[str, Any]]] = [
        ([q, k, leaf(2, 4, 6, 3)], {}),
        ([q, k, v, bias], {"attn_mask": bias}),
        ([q, leaf(2, 2, 6, 8), leaf(2, 2, 6, 8)], {"enable_gqa": True}),
        ([leaf(4, 5, 8), leaf(4, 6, 8), leaf(4, 6, 8)], {"is_causal": True}),
    ]
    for leaves, options in calls:
        expected = outcome(leaves, options)
        with fastattn.override_sdpa() as report:
            found = outcome(leaves, options)
        assert report.items() == [(("fastattn", "cpu"), 1)]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_override_applies_dropout() -> None:
    """Fails if dropout is ignored: with probability 0.5 some output differs, and the mean over many heads does not."""
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8), torch.rand(1, 1, 6, 8)
    many = [t.expand(1, 4096, -1, -1) for t in (q, k, v)]
    with fastattn.override_sdpa() as report:
        out = F.scaled_dot_product_attention(*many, dropout_p=0.5)
    assert report.count("fastattn") == 1
    assert out.std(dim=1).min() > 0.01
    torch.testing.assert_close(out.mean(dim=1), F.scaled_dot_product_attention(q, k, v)[:, 0], rtol=0.15, atol=0)


@pytest.mark.parametrize("route", ROUTES)
def test_unsupported_calls_are_torchs(route: Route) -> None:
    """Fails if a call that no kernel takes raises, or runs on the reference, and if the report has no reason."""
    leaves = [leaf(1, 2, 5, 300) for _ in range(3)]
    expected = outcome(leaves, {})
    with route() as report:
        found = outcome(leaves, {})
    ((place, why), _), *_ = report.items()
    assert place == "torch"
    assert "head_dim must be at most 256, got 300" in why
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_bad_calls_get_torchs_own_error() -> None:
    """Fails if the mode computes something for a call that torch refuses, or refuses it in words about fastattn."""
    q = torch.randn(1, 2, 5, 8)
    with fastattn.override_sdpa() as report, pytest.raises(RuntimeError, match="Expected size"):
        F.scaled_dot_product_attention(q, torch.randn(1, 2, 5, 4), q)
    assert report.count("torch") == 1
    assert "head_dim" in str(report)


def test_activation_is_reversible_and_repeatable() -> None:
    """Fails if a kernel, a warning or the selection stays behind, or a second activation or deactivation does harm."""
    q = torch.randn(1, 2, 5, 8)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    operator = getattr(torch.ops.aten, name)
    before, dump = operator(q, q, q), torch._C._dispatch_dump(f"aten::{name}")
    for _ in range(3):
        report = fastattn.activate()
        assert fastattn.activate() is report
        assert torch_attention.current_flash_attention_impl() == "fastattn"
        F.scaled_dot_product_attention(q, q, q)
        assert fastattn.deactivate() is report
        assert report.count("fastattn") == 1
        assert fastattn.deactivate().items() == []
        F.scaled_dot_product_attention(q, q, q)
        assert report.count("fastattn") == 1
    assert torch_attention.current_flash_attention_impl() is None
    assert torch._C._dispatch_dump(f"aten::{name}") == dump
    torch.testing.assert_close(operator(q, q, q), before, rtol=0, atol=0)


def test_context_restores_what_was_active() -> None:
    """Fails if leaving an inner block deactivates an outer one, or another provider is not activated again."""
    with fastattn.activated() as outer:
        with fastattn.activated() as inner:
            assert inner is outer
        assert torch_attention.current_flash_attention_impl() == "fastattn"

    class Handle:
        def remove(self) -> None:
            pass

    torch_attention.register_flash_attention_impl("other", register_fn=Handle)
    torch_attention.activate_flash_attention_impl("other")
    try:
        with fastattn.activated():
            assert torch_attention.current_flash_attention_impl() == "fastattn"
        assert torch_attention.current_flash_attention_impl() == "other"
        assert fastattn.deactivate().items() == []
        assert torch_attention.current_flash_attention_impl() == "other"
    finally:
        torch_attention.restore_flash_attention_impl()
        del torch_attention._registry._FLASH_ATTENTION_IMPLS["other"]


@pytest.mark.parametrize("activated_first", [True, False])
@pytest.mark.parametrize("name", ["causal", "empty row"])
def test_either_backward_follows_either_forward(activated_first: bool, name: str) -> None:
    """Fails if (de)activating between forward and backward gives wrong gradients: LSE, its layout and empty rows."""
    leaves, options = [leaf(2, 4, 11, 8), leaf(2, 4, 13, 8), leaf(2, 4, 13, 8)], masks()[name]
    grad_out = torch.randn(2, 4, 11, 8, dtype=torch.float64)
    expected = outcome(leaves, options, grad_out)[1:]
    if activated_first:
        with fastattn.activated():
            out = F.scaled_dot_product_attention(*leaves, **options)
        found = torch.autograd.grad(out, leaves, grad_out)
    else:
        out = F.scaled_dot_product_attention(*leaves, **options)
        with fastattn.activated():
            found = torch.autograd.grad(out, leaves, grad_out)
    torch.testing.assert_close(list(found), expected, rtol=1e-11, atol=1e-11)


def test_the_selector_is_obeyed() -> None:
    """Fails if a user's sdpa_kernel(MATH) is overruled by the plug-in."""
    q = torch.randn(1, 2, 5, 8)
    with fastattn.activated() as report, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, q)
    assert report.count("fastattn") == 0
    assert report.count("torch") == 1


def test_named_sdpa_backend_is_torchs_own() -> None:
    """Fails if backend='sdpa' comes back to fastattn's kernels while they are active (or calls itself for ever)."""
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with fastattn.activated() as report:
        fastattn.attention(q, q, q, backend="sdpa").sum().backward()
    assert report.items() == [(("torch", "asked for by name: backend='sdpa'"), 1)]
    assert not delegate.calling()


def test_delegation_ends_at_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if, where the ledger has torch's own as faster, activation loops or runs the slower one."""
    monkeypatch.setattr(backends, "delegated", lambda family, needs: 2.0)
    backends.select.cache_clear()
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    expected = outcome([q, q, q], {})
    try:
        for route in ROUTES:
            with route() as report:
                found = outcome([q, q, q], {})
            assert report.count("fastattn") == 0
            assert report.count("torch") == 1
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    finally:
        backends.select.cache_clear()


def encoder() -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, dtype=torch.float64)
    padding = torch.tensor([[False] * 9, [False] * 6 + [True] * 3])
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), leaf(2, 9, 32), padding


@pytest.mark.parametrize("route", ROUTES)
def test_transformer_encoder_trains_the_same(route: Route) -> None:
    """torch's own layers with padding: output and every parameter's gradient. Fails if the mask is dropped, and, for
    the mode, if it does not reach into multi_head_attention_forward."""
    model, x, padding = encoder()

    def step() -> list[Tensor]:
        out = model(x, src_key_padding_mask=padding)
        return [out.detach(), *torch.autograd.grad(out.pow(2).sum(), [x, *model.parameters()])]

    expected = step()
    with route() as report:
        found = step()
    assert report.items() == [(("fastattn", "cpu"), 2)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("route", ROUTES)
def test_compiled(route: Route) -> None:
    """Fails on a graph break, on a layout that the compiled code did not expect, and on wrong gradients."""
    torch.compiler.reset()
    leaves = [leaf(2, 4, 11, 8, dtype=torch.float32) for _ in range(3)]

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(2 * q, k, v + 1, is_causal=True).sin()

    expected = torch.autograd.grad(model(*leaves).sum(), leaves)
    with route() as report:
        found = torch.autograd.grad(torch.compile(model, fullgraph=True)(*leaves).sum(), leaves)
    assert report.count("fastattn") >= 1
    assert report.count("torch") == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_autocast_and_checkpoint() -> None:
    """Fails if autocast's dtype is lost or recomputation takes another route."""
    q = torch.randn(1, 2, 9, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    with torch.autocast("cpu", torch.bfloat16):
        expected = block(q)
        for route in ROUTES:
            with route() as report:
                out = torch.utils.checkpoint.checkpoint(block, q, use_reentrant=False)
                assert out.dtype == torch.bfloat16
                out.float().sum().backward()
            assert report.count("fastattn") == 2
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("route", ROUTES)
def test_maps_record_the_calls(route: Route) -> None:
    """Fails if `maps.capture` misses calls of torch's function that run on the kernels."""
    q = torch.randn(1, 2, 5, 8)
    with route(), fastattn.maps.capture() as calls:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(calls[0].weights(), fastattn.attention_weights(q, q, causal=True))


def test_mode_is_this_threads_and_activation_everyones() -> None:
    """Fails if the mode leaks into another thread, or activation does not reach one."""
    q = torch.randn(1, 2, 5, 8)

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(q, q, q))
        thread.start()
        thread.join()

    with fastattn.override_sdpa() as report:
        elsewhere()
    assert report.items() == []
    with fastattn.activated() as report:
        elsewhere()
    assert report.count("fastattn") == 1


def test_report_reads_well() -> None:
    """Fails if the summary, the order or the reasons are wrong."""
    report = CallReport()
    for place, why in [("torch", "dropout_p"), ("fastattn", "cpu"), ("fastattn", "cpu")]:
        report.add(place, why)  # type: ignore[arg-type]
    assert str(report).splitlines() == [
        "scaled_dot_product_attention: 2 on fastattn, 1 on torch",
        "      2  fastattn: cpu",
        "      1  torch: dropout_p",
    ]


def test_flash_goes_before_cudnn() -> None:
    """Fails if the order of the selector is changed where flash attention is first, or more than those two move."""
    math, flash, efficient, cudnn, other = range(5)
    assert flash_plugin.flash_before_cudnn([cudnn, flash, efficient, math, other]) == [
        flash, cudnn, efficient, math, other
    ]  # fmt: skip
    assert flash_plugin.flash_before_cudnn([flash, efficient, cudnn, math]) == [flash, efficient, cudnn, math]
    assert (SDPBackend.FLASH_ATTENTION.value, SDPBackend.CUDNN_ATTENTION.value) == (flash, cudnn)


def test_cuda_operators_on_cpu_tensors() -> None:
    """What the plug-in registers for CUDA, called by hand: torch's results in number, kind and order, right gradients;
    what has no kernel goes to torch's own. Fails if the arguments are taken in another order than the schema's."""
    plugin = flash_plugin.Activation()
    plugin.remove()
    operators = flash_plugin._cuda_operators(plugin)
    forward = operators["_scaled_dot_product_flash_attention"]
    backward = operators["_scaled_dot_product_flash_attention_backward"]
    leaves = [leaf(2, 4, 11, 8), leaf(2, 4, 11, 8), leaf(2, 4, 11, 8)]
    grad_out = torch.randn(2, 4, 11, 8, dtype=torch.float64)
    expected = outcome(leaves, {"is_causal": True, "scale": 0.2}, grad_out)
    with torch.no_grad():
        results = forward(None, *leaves, 0.0, True, scale=0.2)
        schema = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
        assert len(results) == len(schema.returns)
        out, lse, cu_q, cu_k, max_q, max_k, seed, offset, debug = results
        assert (cu_q, cu_k, max_q, max_k, debug.numel()) == (None, None, 11, 11, 0)
        assert out.stride() == torch.empty_like(leaves[0]).stride()
        found = backward(
            None, grad_out, *leaves, out, lse, cu_q, cu_k, max_q, max_k, 0.0, True, seed, offset, scale=0.2
        )
    torch.testing.assert_close([out, *found], expected, rtol=1e-11, atol=1e-11)
    sent: list[tuple] = []
    plugin.native = lambda name, keys, *args, **kwargs: sent.append((name, args, kwargs))  # type: ignore[method-assign]
    forward(None, *leaves, 0.5, True)
    forward(None, leaves[0][:, :, :5], *leaves[1:], 0.0, True)
    forward(None, *leaves, 0.0, False, True)
    backward(None, grad_out, *leaves, out, lse, None, None, 11, 11, 0.5, True, seed, offset, scale=0.2)
    assert [name for name, _, _ in sent] == ["_scaled_dot_product_flash_attention"] * 3 + [
        "_scaled_dot_product_flash_attention_backward"
    ]
    assert (
        len(sent[3][1])
        == len(torch.ops.aten._scaled_dot_product_flash_attention_backward.default._schema.arguments) - 1
    )
    assert str(plugin.report).count("torch:") == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}])
def test_on_cuda(options: dict[str, Any]) -> None:
    """Fails if torch's selector does not get to fastattn (cuDNN is asked first on Hopper), if results are off, or if
    the selector's order stays changed."""
    leaves = [torch.randn(2, 4, 200, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)]
    expected = outcome(leaves, options)
    before = torch._C._get_sdp_priority_order()
    with fastattn.activated() as report:
        found = outcome(leaves, options)
    assert report.items() == [(("fastattn", "triton"), 1)]
    assert torch._C._get_sdp_priority_order() == before
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    exact = [t.detach().float().requires_grad_() for t in leaves]
    expected = outcome(exact, options)
    with fastattn.override_sdpa() as report:
        found = outcome(exact, options)
    assert report.items() == [(("fastattn", "triton"), 1)]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
