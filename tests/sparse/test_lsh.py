"""`lsh_attention` against its definition, query by query in float64; each test says what makes it fail."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastattn
from fastattn.sparse import hash_rotations, lsh_attention

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
BATCH, HEADS, DIM, VALUE_DIM = 2, 2, 6, 3


def random_inputs(length: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """query_key and value, views of (B, S, H, D) memory, that require gradients."""
    shapes = ((BATCH, length, HEADS, width) for width in (DIM, VALUE_DIM))
    query_key, value = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes)
    return query_key, value


def seen_keys(x: Tensor, rotations: Tensor, size: int, causal: bool, present: list[bool]) -> list[set[int]]:
    """The keys that each token of one head sees, from x (S, D) and rotations (rounds, D, buckets / 2)."""
    seen: list[set[int]] = [set() for _ in x]
    for one in rotations:
        scores = [torch.cat([one.mT @ row, -(one.mT @ row)]).tolist() for row in x]
        bucket = [row.index(max(row)) for row in scores]
        tokens = sorted((token for token in range(len(x)) if present[token]), key=lambda token: (bucket[token], token))
        for place, token in enumerate(tokens):
            first = max(place // size - 1, 0) * size
            for other in tokens[first : (place // size + 1) * size]:
                if bucket[other] == bucket[token] and other != token and not (causal and other > token):
                    seen[token].add(other)
    for token, keys in enumerate(seen):
        if present[token] and not keys:
            keys.add(token)
    return seen


def expected_attention(
    query_key: Tensor,
    value: Tensor,
    rotations: Tensor,
    size: int,
    causal: bool,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One softmax of each query over the set of keys that it sees in any round."""
    length = query_key.shape[2]
    key = query_key / query_key.square().sum(-1, keepdim=True).sqrt()
    out = torch.zeros(*query_key.shape[:3], value.shape[-1], dtype=query_key.dtype)
    for b in range(query_key.shape[0]):
        for h in range(query_key.shape[1]):
            present = [True] * length if mask is None else mask[b].tolist()
            seen = seen_keys(query_key[b, h].detach(), rotations[:, h], size, causal, present)
            allowed = torch.zeros(length, length, dtype=torch.bool)
            for token, keys in enumerate(seen):
                allowed[token, list(keys)] = True
            scores = query_key[b, h] @ key[b, h].mT * (DIM**-0.5 if scale is None else scale)
            weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
            weights = torch.where(allowed.any(-1, keepdim=True), weights, 0.0)
            out = out.index_put((torch.tensor(b), torch.tensor(h)), weights @ value[b, h])
    return out


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_definition(causal: bool, rounds: int) -> None:
    """Output and gradients, of lengths that chunks do not divide; fails where a chunk sees other tokens than its own
    bucket's in it and the chunk before, a key of several rounds counts more than once, a token with another key sees
    itself or one without does not, or a gradient is lost on the way to sorted order and back."""
    for size in (1, 4, random.randint(5, 16), 100):
        length, buckets = random.randint(1, 60), 2 * random.randint(1, 4)
        inputs = random_inputs(length)
        rotations = hash_rotations(rounds, HEADS, DIM, buckets, dtype=F64)
        scale = random.choice([None, 2.5])
        found = lsh_attention(*inputs, rotations=rotations, bucket_size=size, causal=causal, scale=scale)
        expected = expected_attention(*inputs, rotations, size, causal, scale=scale)
        assert_close(found, expected, **EXACT)
        weight = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad(out, inputs, weight) for out in (found, expected))
        assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_one_bucket_is_full_attention(causal: bool) -> None:
    """All tokens in one bucket and one chunk; fails where the result is not that of full attention without self, or
    three rounds that find the same keys give another."""
    query_key, value = (x.detach() for x in random_inputs(37))
    query_key[..., 0] = query_key[..., 0].abs() + 0.1
    rotations = torch.zeros(3, HEADS, DIM, 1, dtype=F64)
    rotations[:, :, 0] = 1
    key = query_key / query_key.norm(dim=-1, keepdim=True)
    others = ~torch.eye(37, dtype=torch.bool)
    others[0, 0] = causal  # the first token sees no other
    expected = fastattn.attention(query_key, key, value, causal=causal, attn_mask=others)
    for rounds in (1, 3):
        for size in (37, 64):
            found = lsh_attention(query_key, value, rotations=rotations[:rounds], bucket_size=size, causal=causal)
            assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_lone_tokens_keep_their_own_value(causal: bool) -> None:
    """A bucket for each of the tokens, in float32; fails where the value that a lone token gives or its gradient is off
    by more than roundings, as with a finite penalty on seeing oneself."""
    length = 8
    query_key = torch.cat([torch.eye(4), -torch.eye(4)])[None, None].requires_grad_()
    value = torch.randn(1, 1, length, 5, requires_grad=True)
    rotations = torch.eye(4).expand(4, 1, 4, 4)
    found = lsh_attention(query_key, value, rotations=rotations, bucket_size=4, causal=causal)
    assert_close(found, value, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(found)
    grads = torch.autograd.grad(found, (query_key, value), weight)
    assert_close(grads[1], weight, rtol=1e-6, atol=1e-6)
    assert grads[0].abs().max() < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal: bool) -> None:
    """Fails where an absent token takes a place in a chunk, its NaN is seen, or its result is not 0."""
    length = 41
    inputs = random_inputs(length)
    mask = torch.rand(BATCH, length) < 0.7
    mask[0, -1], mask[1] = False, torch.arange(length) < 12
    rotations = hash_rotations(3, HEADS, DIM, 4, dtype=F64)
    padded = [x.detach().masked_fill(~mask[:, None, :, None], math.nan).requires_grad_() for x in inputs]
    found = lsh_attention(*padded, rotations=rotations, bucket_size=5, causal=causal, key_mask=mask)
    expected = expected_attention(*inputs, rotations, 5, causal, mask)
    assert_close(found, expected, **EXACT)
    found.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(padded, inputs, strict=True):
        assert_close(ours.grad, theirs.grad, **EXACT)
    for b in range(BATCH):
        alone = [x[b : b + 1, :, mask[b]].detach() for x in inputs]
        assert_close(
            lsh_attention(*alone, rotations=rotations, bucket_size=5, causal=causal),
            found[b : b + 1, :, mask[b]].detach(),
            **EXACT,
        )
    assert not lsh_attention(*padded, rotations=rotations, key_mask=torch.zeros_like(mask)).any()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.2e-3)])
def test_dtypes(dtype: torch.dtype, error: float) -> None:
    """Within a few roundings of float64 on the same inputs; fails where hashes or the merge are computed in 16 bits."""
    query_key, value = (x.detach() for x in random_inputs(50, dtype))
    rotations = hash_rotations(4, HEADS, DIM, 6)
    # No token so near to the border of two buckets that float32 and float64 could differ.
    scores = torch.einsum("bhsd,rhdn->rbhsn", query_key.double(), rotations.double())
    best = torch.cat([scores, -scores], -1).topk(2).values
    query_key[((best[..., 0] - best[..., 1]) < 1e-4).any(0)] = 1.0
    found = lsh_attention(query_key, value, rotations=rotations, bucket_size=8)
    expected = expected_attention(query_key.double(), value.double(), rotations.double(), 8, True)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() < error * expected.norm()
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            assert torch.equal(
                lsh_attention(query_key.float(), value.float(), rotations=rotations, bucket_size=8), found
            )


def test_memory_order_and_empty_sequences() -> None:
    """Fails where the result is not over (B, S, H, Dv) memory, or no token at all is an error."""
    for length in (0, 1, 33):
        inputs = random_inputs(length)
        out = lsh_attention(*inputs, rotations=hash_rotations(2, HEADS, DIM, 2, dtype=F64), bucket_size=8)
        assert out.shape == (BATCH, HEADS, length, VALUE_DIM)
        assert out.transpose(1, 2).is_contiguous()


def test_compiles_in_one_graph() -> None:
    """Fails on a graph break, or a result that differs from the eager one."""
    inputs = random_inputs(40)
    options = {"rotations": hash_rotations(2, HEADS, DIM, 4, dtype=F64), "bucket_size": 8}
    compiled = torch.compile(lsh_attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs, **options), lsh_attention(*inputs, **options), **EXACT)


def test_backend_by_name() -> None:
    """Fails if the name does not reach the dense kernels, or a backend that cannot run the call is replaced."""
    inputs = random_inputs(40)
    rotations = hash_rotations(2, HEADS, DIM, 4)
    found = lsh_attention(*inputs, rotations=rotations, bucket_size=8, backend="reference")
    assert_close(found, lsh_attention(*inputs, rotations=rotations, bucket_size=8), **EXACT)
    with pytest.raises(fastattn.UnsupportedError, match="sdpa"):
        lsh_attention(*inputs, rotations=rotations, bucket_size=8, backend="sdpa")


def test_rotations() -> None:
    """Fails where a generator does not repeat, rounds or heads share directions, or device and dtype are lost."""
    make = (4, 3, 5, 8)
    first, second, third = (
        hash_rotations(*make, generator=torch.Generator().manual_seed(s), dtype=F64) for s in (1, 1, 2)
    )
    assert first.shape == (4, 3, 5, 4)
    assert first.dtype == F64
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert len(first.flatten().unique()) == first.numel()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bucket_size": 0}, ValueError, "bucket_size must be at least 1, got 0"),
        ({"bucket_size": 8.0}, TypeError, "bucket_size must be an int, got float"),
        ({"causal": None}, TypeError, "causal must be a bool, got NoneType"),
        ({"query_key": torch.randn(20, DIM)}, ValueError, r"query_key must have shape .*, got \(20, 6\)"),
        ({"value": torch.randn(BATCH, HEADS, 19, 3)}, ValueError, "value must agree in all but head_dim"),
        ({"value": torch.randn(BATCH, HEADS, 20, 3).half()}, TypeError, "value must have query's dtype torch.float32"),
        ({"rotations": None}, TypeError, "rotations must be a torch.Tensor of shape .* got NoneType"),
        ({"rotations": torch.randn(HEADS, DIM, 4)}, ValueError, r"rotations must have shape .* got \(2, 6, 4\)"),
        ({"rotations": torch.randn(3, HEADS, 5, 4)}, ValueError, r"\(rounds, 2, 6, buckets / 2\), got \(3, 2, 5, 4\)"),
        ({"rotations": torch.randn(3, HEADS, DIM, 0)}, ValueError, r"got \(3, 2, 6, 0\)"),
        ({"rotations": torch.ones(3, HEADS, DIM, 4).long()}, TypeError, "floating-point tensor, got torch.int64"),
        ({"rotations": torch.randn(3, HEADS, DIM, 4, device="meta")}, ValueError, "device cpu, got meta"),
        ({"rotations": torch.randn(3, HEADS, DIM, 4, requires_grad=True)}, ValueError, "have no gradient"),
        ({"key_mask": torch.ones(BATCH, 20)}, TypeError, "key_mask must be bool .* got torch.float32"),
        ({"key_mask": torch.ones(BATCH, 19).bool()}, ValueError, r"key_mask must have shape \(2, 20\), got \(2, 19\)"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of .* got 'fast'"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Fails where a bad argument is accepted, or the message does not say what it was."""
    given = {
        "query_key": torch.randn(BATCH, HEADS, 20, DIM),
        "value": torch.randn(BATCH, HEADS, 20, 3),
        "rotations": torch.randn(3, HEADS, DIM, 4),
        **options,
    }
    with pytest.raises(error, match=message):
        lsh_attention(**given)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 1, 4, 8), ValueError, "rounds must be at least 1, got 0"),
        ((1, 1, 4, 7), ValueError, "buckets must be even, got 7"),
        ((1, True, 4, 8), TypeError, "heads must be an int, got bool"),
    ],
)
def test_rotations_errors(sizes: tuple[Any, ...], error: type[Exception], message: str) -> None:
    """Fails where a bad size is accepted, or the message does not say what it was."""
    with pytest.raises(error, match=message):
        hash_rotations(*sizes)
    with pytest.raises(TypeError, match="dtype must be floating point"):
        hash_rotations(1, 1, 4, 8, dtype=torch.int64)
