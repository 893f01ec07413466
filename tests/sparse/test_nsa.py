"""`native_sparse_attention` against its definition, query by query in float64; each test says what makes it fail."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.sparse import native_sparse_attention

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
DIM, VALUE_DIM = 6, 3
SIZES = {"compress_block": 8, "compress_stride": 4, "select_block": 16, "selected": 4, "window": 10}
Compress = Callable[[Tensor], Tensor]


def random_inputs(
    length: int, heads: int = 4, key_heads: int = 2, batch: int = 2, dtype: torch.dtype = F64
) -> list[Tensor]:
    """query, key, value and gates, views of (B, S, H, D) memory, that require gradients."""
    shapes = ((heads, DIM), (key_heads, DIM), (key_heads, VALUE_DIM), (heads, 3))
    return [torch.randn(batch, length, *s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


def softmax_over(scores: Tensor, allowed: Tensor) -> Tensor:
    """Rows that allow nothing are 0."""
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.where(allowed.any(-1, keepdim=True), weights, 0.0)


def overlap(first: int, size: int, other: int, other_size: int) -> int:
    return max(0, min(first + size, other + other_size) - max(first, other))


def expected_attention(
    inputs: list[Tensor],
    *,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    selected: int,
    window: int,
    scale: float = DIM**-0.5,
    compress: tuple[Compress, Compress] = (lambda x: x.mean(-2),) * 2,
) -> tuple[Tensor, list[list[list[set[int]]]]]:
    """The result, and the selected blocks of each sequence, key head and query."""
    query, key, value, gates = inputs
    batch, heads, length = query.shape[:3]
    shared = heads // key.shape[1]
    position = torch.arange(length)
    starts = list(range(0, length - compress_block + 1, compress_stride))
    ends = torch.tensor([first + compress_block - 1 for first in starts], dtype=torch.int64)
    finished = ends <= position[:, None]
    near = (position <= position[:, None]) & (position > position[:, None] - window)
    columns = -(-length // select_block)
    outs, chosen = [], []
    for b in range(batch):
        outs.append([])
        chosen.append([])
        for g in range(key.shape[1]):
            k, v = key[b, g], value[b, g]
            short = [
                torch.stack([phi(x[s : s + compress_block]) for s in starts]) if starts else x[:0]
                for phi, x in zip(compress, (k, v), strict=True)
            ]
            members = range(g * shared, (g + 1) * shared)
            weights = [softmax_over(scale * query[b, h] @ short[0].mT, finished) for h in members]
            total = torch.stack(weights).sum(0).tolist()
            blocks = []
            for i in range(length):
                own = i // select_block
                rank = [
                    sum(
                        total[i][c] * overlap(first, compress_block, j * select_block, select_block)
                        for c, first in enumerate(starts)
                    )
                    for j in range(columns)
                ]
                always = {0, own, max(own - 1, 0)}
                others = sorted((j for j in range(own) if j not in always), key=lambda j: -rank[j])
                # Where block 0 and the previous one coincide with the own one, others take their places.
                blocks.append(always | set(others[: selected - len(always)]))
            chosen[b].append(blocks)
            allowed = torch.tensor(
                [[j <= i and j // select_block in blocks[i] for j in range(length)] for i in range(length)]
            ).reshape(length, length)
            for h, weight in zip(members, weights, strict=True):
                scores, gate = scale * query[b, h] @ k.mT, gates[b, h]
                parts = weight @ short[1], softmax_over(scores, allowed) @ v, softmax_over(scores, near) @ v
                outs[b].append(sum(gate[:, n, None] * part for n, part in enumerate(parts)))
    return torch.stack([torch.stack(out) for out in outs]), chosen


def assert_equal_with_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    assert_close(found, expected, **EXACT)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, inputs, weight) for out in (found, expected))
    assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1), (2, 2)])
def test_definition(heads: tuple[int, int]) -> None:
    """Output and all gradients, lengths that no block divides, the first queries; fails where a compressed key is seen
    before its end, other blocks are selected than of most weight summed over a group's heads, a query sees a later key,
    a gate weighs another part, or a gradient passes through the choice."""
    for _ in range(3):
        stride = random.choice([1, 2, 4])
        block, select = stride * random.randint(1, 4), random.choice([16, 32])
        sizes = {
            "compress_block": block,
            "compress_stride": stride,
            "select_block": select,
            "selected": random.randint(3, 5),
            "window": random.randint(1, 20),
        }
        inputs = random_inputs(random.randint(70, 110), *heads, batch=1)
        scale = random.choice([DIM**-0.5, 1.5])
        found = native_sparse_attention(*inputs, **sizes, scale=scale)
        expected, _ = expected_attention(inputs, **sizes, scale=scale)
        assert_equal_with_gradients(found, expected, inputs)


def test_two_sequences_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights looked at for 64 queries at a time; fails where pieces are put together wrongly, or sequences mixed."""
    monkeypatch.setattr("fastattn.sparse.nsa.PIECE", 1)
    inputs = random_inputs(150, 3, 1)
    found = native_sparse_attention(*inputs, **SIZES)
    expected, chosen = expected_attention(inputs, **SIZES)
    assert_equal_with_gradients(found, expected, inputs)
    assert any(len(blocks) == 4 for blocks in chosen[0][0])


@pytest.mark.parametrize("length", [0, 1, 7, 8, 17])
def test_short_sequences(length: int) -> None:
    """Fewer tokens than a stretch, one stretch, less than two blocks; fails on an error or NaN, or where the compressed
    attention of a query that sees nothing is not 0."""
    inputs = random_inputs(length)
    found = native_sparse_attention(*inputs, **SIZES)
    if length == 0:
        assert found.shape == (2, 4, 0, VALUE_DIM)
        return
    expected, _ = expected_attention(inputs, **SIZES)
    assert_equal_with_gradients(found, expected, inputs)
    only_compressed = inputs[3].detach() * torch.tensor([1.0, 0.0, 0.0])
    assert not native_sparse_attention(*inputs[:3], only_compressed, **SIZES)[:, :, :7].any()


def test_enough_blocks_are_causal_attention() -> None:
    """Fails where with all blocks selected, or a window of all tokens, that part is not causal attention."""
    query, key, value, gates = random_inputs(90)
    expected = fastattn.attention(query, key, value, causal=True)
    for part, option in ((1, {"selected": 6}), (2, {"window": 90})):
        one = torch.zeros_like(gates)
        one[..., part] = 1
        assert_close(native_sparse_attention(query, key, value, one, **{**SIZES, **option}), expected, **EXACT)


def test_learned_compression() -> None:
    """A function for keys and one for values, and one for both; fails where they are swapped, or without gradient."""
    inputs = random_inputs(61)
    matrices = [torch.randn(SIZES["compress_block"], requires_grad=True, dtype=F64) for _ in range(2)]
    functions = tuple((lambda x, w=w: torch.tanh(w) @ x) for w in matrices)
    both = [*inputs, *matrices]
    found = native_sparse_attention(*inputs, **SIZES, compress=functions)
    expected, _ = expected_attention(inputs, **SIZES, compress=functions)
    assert_equal_with_gradients(found, expected, both)
    found = native_sparse_attention(*inputs, **SIZES, compress=functions[0])
    expected, _ = expected_attention(inputs, **SIZES, compress=functions[:1] * 2)
    assert_equal_with_gradients(found, expected, both[:5])


def test_later_tokens_change_nothing() -> None:
    """Fails where anything of a token reaches a query before it."""
    inputs = [x.detach() for x in random_inputs(100)]
    first = native_sparse_attention(*inputs, **SIZES)[:, :, :70]
    changed = [torch.cat([x[:, :, :70], 3 * torch.randn_like(x[:, :, 70:])], 2) for x in inputs]
    assert_close(native_sparse_attention(*changed, **SIZES)[:, :, :70], first, **EXACT)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_nothing_of_length_times_length_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; fails where the weights of compressed keys are held for all queries at once."""
    monkeypatch.setattr("fastattn.sparse.nsa.PIECE", 1 << 16)
    length = 2048
    query, key, value = (torch.randn(1, h, length, 8, requires_grad=True) for h in (2, 1, 1))
    gates = torch.rand(1, 2, length, 3)
    with _Largest() as largest:
        native_sparse_attention(query, key, value, gates, compress_stride=1, compress_block=2).sum().backward()
    # Of blocks of 64 rows and 64 keys there is at most a tile of 512 bytes each.
    assert largest.elements <= 512 * (2 * length // 64) * (length // 64)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
def test_dtypes(dtype: torch.dtype, error: float) -> None:
    """Within a few roundings of float64 where all blocks are selected; autocast on float32 gives what 16-bit inputs
    give; fails where a part is computed in another dtype, or autocast reaches the choice."""
    inputs = [x.detach() for x in random_inputs(90, dtype=dtype)]
    sizes = {**SIZES, "selected": 6}
    found = native_sparse_attention(*inputs, **sizes)
    expected, _ = expected_attention([x.double() for x in inputs], **sizes)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() < error * expected.norm()
    if dtype != torch.float32:
        plain = native_sparse_attention(*inputs, **SIZES)
        with torch.autocast("cpu", dtype):
            assert torch.equal(native_sparse_attention(*(x.float() for x in inputs), **SIZES), plain)


def test_memory_order_and_backend() -> None:
    """Fails where the result is not over (B, S, Hq, Dv) memory, or the name does not reach the dense kernels."""
    inputs = random_inputs(50)
    found = native_sparse_attention(*inputs, **SIZES)
    assert found.transpose(1, 2).is_contiguous()
    assert_close(native_sparse_attention(*inputs, **SIZES, backend="reference"), found, **EXACT)
    with pytest.raises(fastattn.UnsupportedError, match="sdpa"):
        native_sparse_attention(*inputs, **SIZES, backend="sdpa")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": torch.randn(1, 2, 30, DIM)}, ValueError, "key and value must agree in all but head_dim"),
        ({"query": torch.randn(1, 4, 21, DIM)}, ValueError, "query and key must be of one length, got 21 and 20"),
        ({"query": torch.randn(1, 3, 20, DIM)}, ValueError, "query's heads must be a multiple of key's heads"),
        ({"gates": torch.rand(1, 4, 20)}, ValueError, r"gates must have shape .* = \(1, 4, 20, 3\), got \(1, 4, 20\)"),
        ({"gates": torch.rand(1, 4, 20, 2)}, ValueError, r"gates must have shape .*, got \(1, 4, 20, 2\)"),
        ({"gates": torch.ones(1, 4, 20, 3).int()}, TypeError, "gates must be a floating-point tensor, got torch.int32"),
        ({"gates": torch.rand(1, 4, 20, 3, device="meta")}, ValueError, "query's device cpu, got meta"),
        ({"gates": None}, TypeError, "gates must be a torch.Tensor of shape .* got NoneType"),
        ({"compress_stride": 0}, ValueError, "compress_stride must be at least 1, got 0"),
        ({"compress_block": 10}, ValueError, "compress_block must be a multiple of compress_stride = 4, got 10"),
        ({"compress_stride": 8.0}, TypeError, "compress_stride must be an int, got float"),
        ({"compress_block": 9, "compress_stride": 3}, ValueError, "select_block must be a multiple of compress_stride"),
        ({"compress_block": 32}, ValueError, "compress_block must be at most select_block = 16, got 32"),
        ({"select_block": 48}, ValueError, "select_block must be of 16, 32, 64, 128, 256, got 48"),
        ({"selected": 2}, ValueError, "selected must be at least 3, got 2"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": (9, 0)}, TypeError, "window must be an int, got tuple"),
        ({"compress": 3}, TypeError, "compress must be None, a callable or a pair of callables, got 3"),
        ({"compress": lambda x: x}, ValueError, r"shape \(1, 2, 4, 6\), torch.float32, got \(1, 2, 4, 8, 6\)"),
        ({"compress": lambda x: x.mean(3).double()}, ValueError, "torch.float32, got .* torch.float64"),
        ({"compress": (None, lambda x: 1)}, ValueError, "compress must return a tensor of shape .* got int"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of .* got 'fast'"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Fails where a bad argument is accepted, or the message does not say what it was."""
    names = ("query", "key", "value", "gates")
    given = dict(zip(names, (x.detach() for x in random_inputs(20, batch=1, dtype=torch.float32)), strict=True))
    with pytest.raises(error, match=message):
        native_sparse_attention(**{**given, **SIZES, **options})
