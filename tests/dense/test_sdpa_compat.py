"""`fastattn.scaled_dot_product_attention` is torch's function: same signature, same results, same acceptance of shapes.

Fails where swapping one for the other changes a result by more than float64 rounding, a gradient, a shape or a default.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import scaled_dot_product_attention


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def compare(q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Output, shape and every gradient against torch's function."""
    leaves = [q, k, v]
    mask = options.get("attn_mask")
    if mask is not None and mask.requires_grad:
        leaves.append(mask)
    found = scaled_dot_product_attention(q, k, v, **options)
    # The math backend is the one that takes every input and defines the semantics.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(q, k, v, **options)
    assert found.shape == exact.shape
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)
    seed = torch.randn(exact.shape, dtype=exact.dtype)
    grads = torch.autograd.grad(found, leaves, seed, allow_unused=True, materialize_grads=True)
    truth = torch.autograd.grad(exact, leaves, seed, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(grads, truth, rtol=1e-11, atol=1e-12)


def test_signature() -> None:
    """The eight names, in torch's order, with torch's defaults, all of them positional or keyword."""
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    assert list(parameters) == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
    ]  # fmt: skip
    assert [p.default for p in parameters.values()][3:] == [None, 0.0, False, None, False]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize(("q_len", "k_len"), [(6, 6), (3, 9), (9, 3), (1, 5), (5, 1)])
def test_is_causal_is_top_left(q_len: int, k_len: int) -> None:
    """For L != S both ways, where `attention(causal=True)` aligns the other corner."""
    q, k, v = normal(2, 3, q_len, 8), normal(2, 3, k_len, 8), normal(2, 3, k_len, 4)
    compare(q, k, v, is_causal=True)
    if q_len != k_len:
        ours = fastattn.attention(q, k, v, causal=True)
        assert not torch.allclose(ours, scaled_dot_product_attention(q, k, v, is_causal=True))


MASKS = {
    "bool": torch.rand(2, 3, 5, 7) < 0.7,
    "bool_2d": torch.rand(5, 7) < 0.7,
    "bool_keys": torch.rand(2, 1, 1, 7) < 0.7,
    "bool_1d": torch.tensor([True, False, True, True, True, False, True]),
    "bool_empty_rows": (torch.arange(5) != 2)[:, None].expand(5, 7),
    "float": torch.randn(2, 3, 5, 7, dtype=torch.float64),
    "float_2d": torch.randn(5, 7, dtype=torch.float64),
    "float_heads": torch.randn(3, 1, 7, dtype=torch.float64),
    "float_batch": torch.randn(2, 1, 5, 1, dtype=torch.float64),
    "float_neg_inf": torch.randn(5, 7, dtype=torch.float64).masked_fill(torch.rand(5, 7) < 0.3, -math.inf),
    "float_empty_row": torch.zeros(5, 7, dtype=torch.float64).masked_fill((torch.arange(5) == 3)[:, None], -math.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(mask: Tensor) -> None:
    """Bool and float, each broadcast, rows that keep no key (zeros), with the gradient of a float mask."""
    mask = mask.clone().requires_grad_(mask.is_floating_point())
    compare(normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 8), attn_mask=mask)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 3, 4), (1, 2, 3, 2)], ids=lambda lead: f"{len(lead) + 2}d")
@pytest.mark.parametrize("causal", [False, True])
def test_axes(lead: tuple[int, ...], causal: bool) -> None:
    """Two to six axes."""
    compare(normal(*lead, 5, 8), normal(*lead, 7, 8), normal(*lead, 7, 4), is_causal=causal)


@pytest.mark.parametrize("lead", [(3,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("mask_lead", ["none", "last", "all"])
def test_masks_of_other_than_four_axes(lead: tuple[int, ...], mask_lead: str) -> None:
    """A mask broadcasts against leading axes that were folded."""
    shape = {"none": (5, 7), "last": (lead[-1], 5, 7), "all": (*lead, 5, 7)}[mask_lead]
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    compare(normal(*lead, 5, 8), normal(*lead, 7, 8), normal(*lead, 7, 4), attn_mask=mask)


@pytest.mark.parametrize("mask_shape", [(1, 3, 5, 7), (2, 1, 5, 7), (2, 1, 1, 1, 7)], ids=str)
def test_broadcast_masks_with_five_axes(mask_shape: tuple[int, ...]) -> None:
    mask = torch.randn(mask_shape, dtype=torch.float64, requires_grad=True)
    lead = (2, 2, 3)
    compare(normal(*lead, 5, 8), normal(*lead, 7, 8), normal(*lead, 7, 4), attn_mask=mask)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_enable_gqa(group: int, causal: bool) -> None:
    compare(
        normal(2, 4, 5, 8), normal(2, 4 // group, 7, 8), normal(2, 4 // group, 7, 8), enable_gqa=True, is_causal=causal
    )


def test_enable_gqa_with_mask() -> None:
    mask = torch.randn(2, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    compare(normal(2, 4, 5, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 8), enable_gqa=True, attn_mask=mask)


def test_enable_gqa_with_five_axes() -> None:
    compare(normal(2, 2, 4, 5, 8), normal(2, 2, 2, 7, 8), normal(2, 2, 2, 7, 8), enable_gqa=True)


@pytest.mark.parametrize(
    ("q_lead", "k_lead"),
    [((2, 3), (1, 3)), ((2, 3), (2, 1)), ((2, 3), (1, 1)), ((1, 3), (2, 3)), ((2, 3), (3,))],
    ids=str,
)
def test_leading_axes_broadcast(q_lead: tuple[int, ...], k_lead: tuple[int, ...]) -> None:
    """Heads or batch of size one on either side, or missing on one."""
    compare(normal(*q_lead, 5, 8), normal(*k_lead, 7, 8), normal(*k_lead, 7, 4))


@pytest.mark.parametrize("scale", [0.0, -0.7, 0.3, 2, None])
def test_scale(scale: float | None) -> None:
    compare(normal(1, 2, 5, 8), normal(1, 2, 7, 8), normal(1, 2, 7, 8), scale=scale)


def test_no_keys() -> None:
    """S = 0 gives zeros."""
    out = scaled_dot_product_attention(normal(1, 2, 5, 8), normal(1, 2, 0, 8), normal(1, 2, 0, 4))
    assert torch.equal(out, torch.zeros(1, 2, 5, 4, dtype=torch.float64))


def test_dropout_is_applied_whenever_positive() -> None:
    """As torch's: no training flag, survivors scaled by 1 / (1 - p), another draw each call."""
    q, v = torch.zeros(1, 2, 30, 4), torch.eye(30).expand(1, 2, 30, 30)
    first, second = (scaled_dot_product_attention(q, q, v, dropout_p=0.4) * 30 for _ in range(2))
    values = first.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.6]))
    assert not torch.equal(first, second)
    kept = (first > 0).float().mean().item()
    assert abs(kept - 0.6) < 6 * math.sqrt(0.24 / first.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Within the error that torch's own result has in that dtype, and one rounding."""
    q, k, v = (torch.randn(2, 3, 40, 16, dtype=dtype) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = (F.scaled_dot_product_attention(q, k, v, is_causal=True).double() - exact).abs().max().item()
    found = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max().item() <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().max().item()


def test_errors_where_torch_raises() -> None:
    """Mask together with is_causal, and unequal heads without enable_gqa."""
    q, k = normal(1, 4, 5, 8), normal(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"attn_mask.*is_causal"):
        scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(5, 5, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="enable_gqa"):
        scaled_dot_product_attention(q, k, k)


def test_in_place_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that calls F.scaled_dot_product_attention runs on it by replacing that one name."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    torch.testing.assert_close(layer(x), expected)
