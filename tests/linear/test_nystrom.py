"""`nystrom_attention` against the paper's formula in float64, one head of one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.linear.nystrom import nystrom_attention

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 4, 4, 2, 13, 17, 6, 3


def random_inputs(queries: int = QUERIES, keys: int = KEYS, heads: int = HEADS, key_heads: int = KEY_HEADS) -> list:
    """Query, key and value as views of (B, S, H, D) memory, that require gradients."""
    shapes = ((queries, heads, DIM), (keys, key_heads, DIM), (keys, key_heads, VALUE_DIM))
    return [torch.randn(BATCH, *shape, dtype=F64).transpose(1, 2).requires_grad_() for shape in shapes]


def smooth_inputs(length: int) -> list[Tensor]:
    """Query, key and value (1, 2, N, 8) that vary slowly along the sequence, as neighbouring tokens' do."""
    t = torch.linspace(0, 1, length, dtype=F64)[:, None]
    phases, speeds = 6 * torch.rand(3, 1, 2, 1, 8, dtype=F64), 4 + 8 * torch.rand(3, 1, 2, 1, 8, dtype=F64)
    return list(torch.sin(speeds * t + phases))


def random_masks() -> tuple[Tensor, Tensor]:
    """(query_mask, key_mask): scattered; few positions, fewer than landmarks; no query; no key."""
    masks = []
    for length, absent in ((QUERIES, 2), (KEYS, 3)):
        mask = torch.rand(BATCH, length) < 0.7
        mask[:, :6], mask[1], mask[absent] = True, torch.arange(length) % 5 == 3, False
        masks.append(mask)
    return masks[0], masks[1]


def segment_means(x: Tensor, count: int) -> Tensor:
    """(N, D) to (M, D); position r of N belongs to segment floor(r M / N)."""
    n, m = len(x), min(count, len(x))
    return torch.stack([x[[r for r in range(n) if r * m // n == s]].mean(0) for s in range(m)])


def inverse_by_iteration(a: Tensor, iterations: int) -> Tensor:
    """The paper's equation 11, from its start."""
    z = a.mT / (a.abs().sum(0).max() * a.abs().sum(1).max())
    eye = torch.eye(len(a), dtype=a.dtype)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def formula(
    inputs: list[Tensor],
    num_landmarks: int,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float = DIM**-0.5,
    inverse: Callable[[Tensor], Tensor] = lambda a: inverse_by_iteration(a, 6),
) -> Tensor:
    query, key, value = inputs
    group = query.shape[1] // key.shape[1]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for b in range(query.shape[0]):
        rows = torch.arange(query.shape[2]) if query_mask is None else query_mask[b].nonzero().flatten()
        keys = torch.arange(key.shape[2]) if key_mask is None else key_mask[b].nonzero().flatten()
        if not len(rows) or not len(keys):
            continue
        for h in range(query.shape[1]):
            q, k, v = query[b, h, rows], key[b, h // group, keys], value[b, h // group, keys]
            q_landmarks, k_landmarks = segment_means(q, num_landmarks), segment_means(k, num_landmarks)
            first, core, last = (
                torch.softmax(scale * x @ y.mT, -1)
                for x, y in ((q, k_landmarks), (q_landmarks, k_landmarks), (q_landmarks, k))
            )
            place = torch.tensor(b), torch.tensor(h), rows
            out = out.index_put(place, first @ (inverse(core) @ (last @ v)))
    return out


@pytest.mark.parametrize("num_landmarks", [1, 4, 5, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_formula(scale: float | None, masked: bool, num_landmarks: int) -> None:
    """Output and gradients, lengths not divisible, fewer positions than landmarks, none at all; fails if segments are
    cut elsewhere, a masked position enters a mean, an absent landmark takes weight, or heads share wrongly."""
    inputs = random_inputs()
    query_mask, key_mask = random_masks() if masked else (None, None)
    found = nystrom_attention(
        *inputs, num_landmarks=num_landmarks, query_mask=query_mask, key_mask=key_mask, scale=scale
    )
    expected = formula(inputs, num_landmarks, query_mask, key_mask, DIM**-0.5 if scale is None else scale)
    assert_close(found, expected, **EXACT)
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        assert_close(ours, theirs, **EXACT)


def distinct_inputs(queries: int, keys: int) -> list[Tensor]:
    """Queries close to the keys of their position and far from others, so that the core matrix has a good inverse."""
    key = 0.8 * torch.randn(2, 2, keys, 32, dtype=F64)
    query = key[:, :, :queries] + 0.1 * torch.randn(2, 2, queries, 32, dtype=F64)
    return [query, key, torch.randn(2, 2, keys, VALUE_DIM, dtype=F64)]


def test_converges_to_the_moore_penrose_inverse() -> None:
    """Fails if more iterations do not approach torch's pinv, rectangular (13 queries, 17 keys) and square."""
    inputs = distinct_inputs(QUERIES, KEYS)
    for num_landmarks in (4, 40):
        expected = formula(inputs, num_landmarks, scale=32**-0.5, inverse=torch.linalg.pinv)
        few, many = (
            (nystrom_attention(*inputs, num_landmarks=num_landmarks, iterations=n) - expected).norm() / expected.norm()
            for n in (2, 25)
        )
        assert many < 1e-8
        assert many < few


def test_as_many_landmarks_as_positions_is_softmax_attention() -> None:
    """Fails if landmarks of single positions are not those positions, or a factor is lost."""
    inputs = distinct_inputs(KEYS, KEYS)
    for num_landmarks in (KEYS, 64):
        found = nystrom_attention(*inputs, num_landmarks=num_landmarks, iterations=25)
        assert_close(found, fastattn.attention(*inputs), rtol=1e-7, atol=1e-8)


def test_error_falls_with_the_number_of_landmarks() -> None:
    """On smooth inputs, below a hundredth of the error of the values' mean; fails if landmarks are out of place."""
    inputs = smooth_inputs(256)
    exact = fastattn.attention(*inputs)
    mean = (inputs[2].mean(2, keepdim=True) - exact).norm()
    eight, sixteen = ((nystrom_attention(*inputs, num_landmarks=m, iterations=12) - exact).norm() for m in (8, 16))
    assert eight < 0.2 * mean
    assert sixteen < 0.4 * eight
    assert sixteen < 0.01 * mean


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padding_changes_nothing(side: str) -> None:
    """A padded batch gives each sequence what it gives alone; fails if sequences share a norm or a segment's length, or
    what padding holds, NaN here, reaches a result or a gradient."""
    lengths = (17, 9, 5, 2)
    batch = random_inputs(KEYS, KEYS)
    places = {
        "left": [torch.arange(KEYS - n, KEYS) for n in lengths],
        "right": [torch.arange(n) for n in lengths],
        "scattered": [torch.randperm(KEYS)[:n].sort().values for n in lengths],
    }[side]
    mask = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    for b, place in enumerate(places):
        mask[b, place] = True
    padded = [x.detach().masked_fill(~mask[:, None, :, None], math.nan).requires_grad_() for x in batch]
    found = nystrom_attention(*padded, num_landmarks=5, key_mask=mask, query_mask=mask)
    found.square().sum().backward()
    for b, place in enumerate(places):
        alone = [x[b : b + 1, :, place].detach().requires_grad_() for x in batch]
        out = nystrom_attention(*alone, num_landmarks=5)
        assert_close(found[b : b + 1, :, place], out, **EXACT)
        out.square().sum().backward()
        for x, y in zip(padded, alone, strict=True):
            assert_close(x.grad[b : b + 1, :, place], y.grad, **EXACT)
    hidden = ~mask[:, None, :, None]
    assert not found.masked_select(hidden).any()
    assert all(not x.grad.masked_select(hidden).any() for x in padded)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_of_length_times_landmarks_is_stored(masked: bool) -> None:
    """Forward and backward; fails if a factor of the product, or which position is in which segment, is a matrix."""
    length, num_landmarks = 512, 32
    inputs = random_inputs(length, length, heads=2, key_heads=2)
    mask = torch.rand(BATCH, length) < 0.8 if masked else None
    with _Largest() as largest:
        nystrom_attention(*inputs, num_landmarks=num_landmarks, key_mask=mask, query_mask=mask).sum().backward()
    assert largest.elements == BATCH * 2 * length * DIM


def test_cross_attention_of_one_query() -> None:
    """One query is its own landmark and the result exact; fails if that is not noticed."""
    inputs = random_inputs(queries=1)
    found = nystrom_attention(*inputs, num_landmarks=4, iterations=12)
    assert_close(found, fastattn.attention(*inputs), **EXACT)


def test_without_keys_or_queries() -> None:
    """Fails on NaN, or another answer than 0, where there is no key; or on an error where there is no query."""
    query, key, value = random_inputs()
    for options in ({}, {"query_mask": torch.ones(BATCH, QUERIES, dtype=torch.bool)}):
        out = nystrom_attention(query, key[:, :, :0], value[:, :, :0], **options)
        assert out.shape == (BATCH, HEADS, QUERIES, VALUE_DIM)
        assert not out.any()
    assert nystrom_attention(query[:, :, :0], key, value).shape == (BATCH, HEADS, 0, VALUE_DIM)


def test_coinciding_landmarks_in_float32() -> None:
    """A constant sequence has a core matrix of rank one; fails if the inverse blows up on it."""
    query, key, value = (x.detach().float() for x in random_inputs(64, 64))
    query, key = (x[:, :, :1].expand(-1, -1, 64, -1) for x in (query, key))
    out = nystrom_attention(query, key, value, num_landmarks=16)
    assert_close(out, fastattn.attention(query, key, value), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 8e-4)])
def test_dtypes_and_autocast(dtype: torch.dtype, error: float) -> None:
    """Within a few roundings of float64; autocast on float32 gives what 16-bit inputs give; fails if autocast
    reaches the inverse, or a factor is rounded that need not be."""
    inputs = [x.to(dtype) for x in smooth_inputs(256)]
    expected = formula([x.double() for x in inputs], 32, scale=8**-0.5)
    found = nystrom_attention(*inputs, num_landmarks=32)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() < error * expected.norm()
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            assert torch.equal(nystrom_attention(*(x.float() for x in inputs), num_landmarks=32), found)


def test_compiles_in_one_graph() -> None:
    """Fails on a graph break, or a result that differs from the eager one."""
    inputs = random_inputs()
    query_mask, key_mask = random_masks()
    options = {"num_landmarks": 4, "query_mask": query_mask, "key_mask": key_mask}
    compiled = torch.compile(nystrom_attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs, **options), nystrom_attention(*inputs, **options), **EXACT)


def test_backend_by_name() -> None:
    """Fails if the name does not reach the dense kernels, or a backend that cannot run the call is replaced."""
    inputs = random_inputs()
    assert_close(nystrom_attention(*inputs, backend="reference"), nystrom_attention(*inputs), **EXACT)
    with pytest.raises(fastattn.UnsupportedError, match="grouped-query heads"):
        nystrom_attention(*inputs, backend="sdpa")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_landmarks": 0}, ValueError, "num_landmarks must be at least 1, got 0"),
        ({"num_landmarks": 8.0}, TypeError, "num_landmarks must be an int, got float"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"iterations": None}, TypeError, "iterations must be an int, got NoneType"),
        ({"key_mask": torch.ones(BATCH, KEYS)}, TypeError, "key_mask must be bool .* got torch.float32"),
        ({"key_mask": [True]}, TypeError, r"key_mask must be a torch.Tensor of shape \(4, 17\), got list"),
        ({"query_mask": torch.ones(BATCH, KEYS, dtype=torch.bool)}, ValueError, r"query_mask must .* shape \(4, 13\)"),
        ({"query_mask": torch.ones(BATCH, QUERIES, dtype=torch.bool, device="meta")}, ValueError, "got meta"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of .* got 'fast'"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Fails where a bad argument is accepted, or the message does not say what it was."""
    with pytest.raises(error, match=message):
        nystrom_attention(*random_inputs(), **options)
