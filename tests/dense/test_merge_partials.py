"""Splitting the keys and merging the partial results is exact, differentiable, and safe where a part saw no key.

Fails where a merged output, LSE or gradient differs from that of all keys at once by more than float64 rounding, or
where -inf turns into NaN.
"""

from __future__ import annotations

import math
from functools import reduce

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import merge_partials


def random_qkv(q_len: int = 7, k_len: int = 20) -> list[Tensor]:
    return [torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (q_len, k_len, k_len)]


def part(q: Tensor, k: Tensor, v: Tensor, first: int, end: int, **options) -> tuple[Tensor, Tensor]:
    """Attention to the keys first <= j < end, with the positions they have among all."""
    start = k.shape[2] - q.shape[2] - first
    return fastattn.attention(q, k[:, :, first:end], v[:, :, first:end], query_start=start, return_lse=True, **options)


def assert_same(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 2)}, {"causal": True, "scale": 5.0}], ids=str)
@pytest.mark.parametrize("split", [0, 1, 13, 19, 20])
def test_split_and_merge(options: dict, split: int) -> None:
    """Also where a part is empty, or holds no key of some rows."""
    leaves = random_qkv()
    whole = fastattn.attention(*leaves, return_lse=True, **options)
    merged = merge_partials(*part(*leaves, 0, split, **options), *part(*leaves, split, 20, **options))
    assert_same(merged, whole)
    seeds = [torch.randn_like(t) for t in whole]
    assert_same(torch.autograd.grad(merged, leaves, seeds), torch.autograd.grad(whole, leaves, seeds))


def test_any_order_of_merging() -> None:
    """Associative and commutative: four parts, from the left, from the right and shuffled."""
    leaves = random_qkv()
    bounds = [(0, 4), (4, 5), (5, 16), (16, 20)]
    parts = [part(*leaves, *b, causal=True) for b in bounds]
    whole = fastattn.attention(*leaves, causal=True, return_lse=True)
    join = lambda a, b: merge_partials(*a, *b)  # noqa: E731
    assert_same(reduce(join, parts), whole)
    assert_same(reduce(lambda a, b: join(b, a), reversed(parts)), whole)
    assert_same(join(join(parts[3], parts[0]), join(parts[2], parts[1])), whole)


def test_minus_infinity() -> None:
    """A part without keys changes nothing; two give nothing: output 0, LSE -inf, zero gradients."""
    out = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(2, 5, 4, dtype=torch.float64), torch.full((2, 5), -math.inf, dtype=torch.float64)
    for merged in (merge_partials(out, lse, *none), merge_partials(*none, out, lse)):
        assert_same(merged, (out, lse))
        grads = torch.autograd.grad(merged, (out, lse), (torch.ones_like(out), torch.ones_like(lse)))
        assert_same(grads, (torch.ones_like(out), torch.ones_like(lse)))
    leaves = [t.clone().requires_grad_() for t in (*none, *none)]
    merged = merge_partials(*leaves)
    assert torch.equal(merged[0], none[0])
    assert torch.equal(merged[1], none[1])
    for grad in torch.autograd.grad(merged, leaves, (torch.ones_like(out), torch.ones_like(lse))):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_rows_that_see_one_part_only() -> None:
    """-inf in some rows of either side, mixed with rows that both saw."""
    out_a, out_b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    lse_a = torch.tensor([0.0, -math.inf, 1.0, -math.inf], dtype=torch.float64)
    lse_b = torch.tensor([0.0, 2.0, -math.inf, -math.inf], dtype=torch.float64)
    out, lse = merge_partials(out_a, lse_a, out_b, lse_b)
    assert_same((out[0], lse[0]), ((out_a[0] + out_b[0]) / 2, torch.tensor(math.log(2.0), dtype=torch.float64)))
    assert_same((out[1], lse[1]), (out_b[1], lse_b[1]))
    assert_same((out[2], lse[2]), (out_a[2], lse_a[2]))
    assert_same((out[3], lse[3]), (torch.zeros(3).double(), lse_a[3]))


@pytest.mark.parametrize("shift", [-1e5, 700.0, 1e5])
def test_large_lse(shift: float) -> None:
    """Fails where exp overflows or underflows: only the difference of the two LSE may matter."""
    out_a, out_b = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    lse_a, lse_b = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    out, lse = merge_partials(out_a, lse_a, out_b, lse_b)
    moved, moved_lse = merge_partials(out_a, lse_a + shift, out_b, lse_b + shift)
    torch.testing.assert_close(moved, out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved_lse - shift, lse, rtol=1e-9, atol=1e-9)


def test_sink_counts_once() -> None:
    """With the sink in one part only, however the keys are split."""
    leaves = random_qkv()
    sinks = torch.randn(3, dtype=torch.float64, requires_grad=True)
    whole = fastattn.attention(*leaves, sinks=sinks, return_lse=True)
    merged = merge_partials(*part(*leaves, 0, 9, sinks=sinks), *part(*leaves, 9, 20))
    assert_same(merged, whole)
    seeds = [torch.randn_like(t) for t in whole]
    assert_same(
        torch.autograd.grad(merged, [*leaves, sinks], seeds), torch.autograd.grad(whole, [*leaves, sinks], seeds)
    )


def test_gradcheck() -> None:
    """First and second derivatives in all four arguments, against finite differences."""
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (3,), (3, 2), (3,))]
    assert torch.autograd.gradcheck(merge_partials, leaves)
    assert torch.autograd.gradgradcheck(merge_partials, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Low-precision outputs with float32 LSE: the result keeps both dtypes and is rounded once."""
    q, k, v = (t.detach().to(dtype) for t in random_qkv())
    merged, lse = merge_partials(*part(q, k, v, 0, 8), *part(q, k, v, 8, 20))
    assert (merged.dtype, lse.dtype) == (dtype, torch.float32)
    whole, lse_whole = fastattn.attention(q.double(), k.double(), v.double(), return_lse=True)
    plain = torch.softmax(q @ k.mT / math.sqrt(8), -1) @ v
    allowed = 2 * (plain.double() - whole).abs().max().item()
    # Beside that, each partial output is rounded once and the merged one again.
    allowed += 2 * torch.finfo(dtype).eps * whole.abs().max().item()
    torch.testing.assert_close(merged.double(), whole, rtol=0.0, atol=allowed)
    torch.testing.assert_close(lse.double(), lse_whole, rtol=1e-5, atol=1e-5)
