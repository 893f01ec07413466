"""Philox4x32-10 against Random123's published vectors, and the dropout mask against a scalar Philox written here.

Fails where a round, a constant or the byte order is off, where an element takes a word that is not its own, or where
the keep threshold is off by one.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastattn
from fastattn import verify
from fastattn.dense import philox
from fastattn.dense.philox import dropout_keep, philox4x32

# counter, key, result: kat_vectors of Random123 (Salmon et al., SC 2011)
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 0x123456789ABCDEF, -1, -(2**63), 2**63 - 1]


def scalar_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The ten rounds as the paper writes them, on Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def word_of(seed: int, offset: int, b: int, h: int, heads: int, i: int, j: int) -> int:
    """The random word of one attention weight, by the contract's element-to-counter mapping."""
    seed, offset = seed % 2**64, offset % 2**32
    return scalar_philox((j // 4, i, b * heads + h, offset), (seed % 2**32, seed >> 32))[j % 4]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]) -> None:
    assert scalar_philox(counter, key) == result
    found = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in found) == result


@pytest.mark.parametrize("seed_value", SEEDS)
def test_element_to_counter_mapping(seed_value: int) -> None:
    offset, heads, p = seed_value ^ 0x5DEECE66D, 3, 0.4
    keep = dropout_keep(torch.tensor([seed_value, offset]), p, (2, heads, 3, 10))
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in keep.shape)).tolist():
        expected = word_of(seed_value, offset, b, h, heads, i, j) >= math.floor(p * 2**32)
        assert bool(keep[b, h, i, j]) == expected, (b, h, i, j)


def test_threshold_is_inclusive() -> None:
    """The very word floor(p * 2**32) is kept; one above, it is not."""
    word = word_of(7, 9, 0, 0, 1, 0, 0)
    rng = torch.tensor([7, 9])
    assert dropout_keep(rng, word / 2**32, (1, 1, 1, 1)).item()
    assert not dropout_keep(rng, (word + 1) / 2**32, (1, 1, 1, 1)).item()


def test_first_sequence_shifts_the_batch_index() -> None:
    """A packed sequence draws what the same sequence draws in a batch."""
    rng = torch.tensor([3, 4])
    batched = dropout_keep(rng, 0.5, (3, 2, 5, 9))
    for b in range(3):
        assert torch.equal(dropout_keep(rng, 0.5, (1, 2, 5, 9), b)[0], batched[b])


def _weights(p: float, shape: tuple[int, int, int, int], backend: str, packed: bool = False) -> torch.Tensor:
    """The dropped attention weights, read off with identity values."""
    batch, heads, q_len, k_len = shape
    q, k = torch.zeros(batch, heads, q_len, 4), torch.zeros(batch, heads, k_len, 4)
    v = torch.eye(k_len).expand(batch, heads, k_len, k_len)
    if not packed:
        return fastattn.attention(q, k, v, dropout_p=p, backend=backend) * k_len
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    cu_q, cu_k = (torch.arange(batch + 1, dtype=torch.int32) * n for n in (q_len, k_len))
    out = fastattn.attention_varlen(*rows, cu_q, cu_k, q_len, k_len, dropout_p=p, backend=backend)
    return out.view(batch, q_len, heads, k_len).transpose(1, 2) * k_len


BACKENDS = [
    c.backend
    for c in fastattn.backends.capabilities("dense")
    if "dropout" in c.features and c.backend in verify.backends_on("cpu")
]


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_drops_the_words_of_the_contract(backend: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight of `attention` is 0 or 1 / (1 - p) as its own word says, in batches and packed alike."""
    p, shape = 0.3, (2, 2, 3, 6)
    rng = torch.tensor([0x0123456789ABCDEF, 42])
    monkeypatch.setattr("fastattn.dense.api.draw_rng", lambda device: rng)
    weights = _weights(p, shape, backend, packed)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        kept = word_of(int(rng[0]), 42, b, h, shape[1], i, j) >= math.floor(p * 2**32)
        expected = 1 / (1 - p) if kept else 0.0
        assert weights[b, h, i, j].item() == pytest.approx(expected, rel=1e-5), (b, h, i, j)


def test_draws_follow_torch_generator() -> None:
    """Fails where dropout ignores torch.manual_seed, or repeats itself without it."""
    torch.manual_seed(3)
    first, second = (_weights(0.5, (1, 2, 40, 40), "reference") for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, _weights(0.5, (1, 2, 40, 40), "reference"))
    assert not torch.equal(first, second)
    kept = (first != 0).float().mean().item()
    assert abs(kept - 0.5) < 6 * 0.5 / math.sqrt(first.numel())


def test_a_rejected_call_leaves_the_generator_alone() -> None:
    """Fails where a call that raises has already drawn its seed."""
    before = torch.get_rng_state()
    q = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    for bad in ({"window": (-1, 0)}, {"backend": "no such"}, {"softcap": -1.0}, {"return_lse": 1}):
        with pytest.raises((TypeError, ValueError)):
            fastattn.attention(q, q, q, dropout_p=0.5, **bad)
    assert torch.equal(before, torch.get_rng_state())


def test_whole_probability_range() -> None:
    """p = 0 keeps everything, p = 1 drops everything (and gives zeros, not NaN)."""
    rng = torch.tensor([1, 2])
    assert dropout_keep(rng, 0.0, (1, 1, 8, 8)).all()
    assert not dropout_keep(rng, 1.0, (1, 1, 64, 64)).any()
    assert torch.equal(_weights(1.0, (1, 1, 5, 7), "reference"), torch.zeros(1, 1, 5, 7))
    assert philox.draw_rng(torch.device("cpu")).dtype == torch.int64
