"""A model with a linear mechanism over its state computes what it computes of whole sequences.

The truth is the same model in float64 without a cache. Lengths and tokens are drawn anew in each run.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fastattn.models import KVCache, StateCache, TorchCache, Transformer, TransformerConfig, generate
from fastattn.nn import GLA, Delta, Linear, Mechanism, Performer

VOCABULARY = 29
MECHANISMS: list[Mechanism | str] = [
    Performer(12), Performer(8, features="hyperbolic"), "linear", Linear(normalize=False), "retention", GLA(4),
    "delta", Delta(gated=False),
]  # fmt: skip


def build(mechanism: Mechanism | str, dtype: torch.dtype = torch.float64, **config: int) -> Transformer:
    """Weights scaled up, so that a wrong state shows and greedy text does not repeat itself at once."""
    sizes = {"vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 4, "embed_dim": 32, "max_seq_len": 150}
    model = Transformer(TransformerConfig(**(sizes | {"num_kv_heads": 2} | config), mechanism=mechanism))
    for name, parameter in model.requires_grad_(False).named_parameters():
        if parameter.ndim == 2 and "mixer" not in name:
            parameter.mul_(6)
    return model.to(dtype)


def draw(*lengths: int) -> list[list[int]]:
    return [[random.randrange(VOCABULARY) for _ in range(n)] for n in lengths]


@torch.no_grad()
def feed(model: Transformer, cache: StateCache, rows: list[list[int]]) -> list[Tensor]:
    """Logits (S, V) of the new tokens of each sequence."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    logits = model.logits(model.hidden(tokens, cache, [len(row) for row in rows]))
    return [found[: len(row)] for found, row in zip(logits, rows, strict=True)]


def assert_same(model: Transformer, found: list[Tensor], rows: list[list[int]]) -> None:
    """Fails if these are not the logits of the last tokens of the rows."""
    with torch.no_grad():
        for logits, row in zip(found, rows, strict=True):
            expected = model(torch.tensor([row]))[0, len(row) - len(logits) :]
            assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_ragged_prompts_then_steps(mechanism: Mechanism | str) -> None:
    """Fails if padding enters a state or lets it decay, a position is off, one sequence's state becomes another's, or a
    state grows."""
    model = build(mechanism)
    cache = StateCache(model)
    lengths = [1, random.randint(2, 20), random.randint(60, 90)]
    random.shuffle(lengths)
    rows = draw(*lengths)
    assert_same(model, feed(model, cache, rows), rows)
    assert cache.lengths == lengths
    size = cache.nbytes
    assert size > 0

    def say(count: int) -> None:
        nonlocal rows
        new = draw(*[count] * len(rows))
        rows = [row + more for row, more in zip(rows, new, strict=True)]
        assert_same(model, feed(model, cache, new), rows)

    for count in (1, 4, 1):
        say(count)
    assert cache.nbytes == size
    cache.reorder([2, 0, 0])
    rows = [rows[2], rows[0], rows[0]]
    say(2)
    cache.reorder([1])
    rows = [rows[1]]
    say(1)
    cache.clear()
    assert (cache.lengths, cache.nbytes) == ([], 0)
    rows = draw(5)
    assert_same(model, feed(model, cache, rows), rows)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_generation(mechanism: Mechanism | str) -> None:
    """Fails if text continued from a state is not that computed anew for each token, also where sequences end."""
    model, prompts = build(mechanism), draw(3, 17, 1)
    stop = random.sample(range(VOCABULARY), 2)
    options = {"temperature": 0.8, "stop": stop}
    with_state, anew, own = (
        generate(model, prompts, 12, cache=cache, generator=torch.Generator().manual_seed(5), **options)
        for cache in ("static", None, StateCache(model))
    )
    for a, b, c in zip(with_state, anew, own, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert len({token for row in anew for token in row.tolist()}) > 3


def test_a_failed_call_leaves_the_state() -> None:
    """Fails if a call that ends in an error in a later layer has already changed an earlier layer's state."""
    model = build("gla")
    cache, (row, more) = StateCache(model), draw(6, 1)
    feed(model, cache, [row])
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, cache, [more])
    hook.remove()
    assert_same(model, feed(model, cache, [more]), [row + more])


def test_errors() -> None:
    """Fails if a cache is made for a model that cannot use it, or misused, without a clear error."""
    flash, linear = build("flash"), build("linear")
    encoder = Transformer(TransformerConfig(causal=False))
    for model in (flash, encoder):
        with pytest.raises(ValueError, match="model must be causal with a linear mechanism"):
            StateCache(model)
    for model in (linear, encoder):
        with pytest.raises(ValueError, match="model must be causal with mechanism 'flash' to have keys and values"):
            KVCache.static(model, 1)
    with pytest.raises(ValueError, match="model must have attention 'sdpa' or 'naive' for a TorchCache"):
        TorchCache.static(linear, 1)
    for kind in ("paged", "rolling"):
        with pytest.raises(ValueError, match="model must"):
            generate(linear, [[1]], 2, cache=kind)
    with pytest.raises(ValueError, match="model must be causal to generate, got causal=False"):
        generate(encoder, [[1]], 2)
    cache = StateCache(linear)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        linear(torch.tensor([[1]]), cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match="cache must be made for this model"):
            build("gla")(torch.tensor([[1]]), cache=cache)
        linear(torch.tensor([[1], [2]]), cache=cache)
        with pytest.raises(ValueError, match="a row for each of the cache's 2 sequences, got 1"):
            linear(torch.tensor([[1]]), cache=cache)
        with pytest.raises(ValueError, match="sequence 0 must have at most 150 tokens"):
            linear(torch.zeros(2, 150, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match=r"index must name sequences 0 to 1, got \[2\]"):
        cache.reorder([2])
    with pytest.raises(ValueError, match="cache must have no sequences yet"):
        generate(linear, [[1]], 2, cache=cache)
