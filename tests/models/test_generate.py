"""`generate` and `sample`: the right tokens from the right distribution, whatever the cache and the company.

Models are in float64, where no two tokens are as good as equal, so that tokens can be compared one by one. Sizes and
tokens are drawn anew in each run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.models import KVCache, Transformer, TransformerConfig, generate, sample

VOCABULARY = 29
VARIANTS = {"gqa": {"num_kv_heads": 2}, "window": {"window": 6, "num_kv_heads": 1}, "wide": {"window": 70}}
WAYS = [
    (attention, kind, variant)
    for variant in VARIANTS
    for attention, kind in [
        *(("fastattn", k) for k in ("static", "paged", "rolling", None)),
        ("sdpa", "static"),
        ("sdpa", None),
        ("naive", "static"),
    ]
    if kind != "rolling" or "window" in VARIANTS[variant]
]


def build(attention: str = "fastattn", dtype: torch.dtype = torch.float64, **config: Any) -> Transformer:
    """The same sharp weights for every attention, scaled up so that greedy text does not repeat itself at once."""
    sizes = {"vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 4, "embed_dim": 32, "max_seq_len": 160}
    torch.manual_seed(11)
    model = Transformer(TransformerConfig(**(sizes | config), attention=attention))
    for name, parameter in model.requires_grad_(False).named_parameters():
        if parameter.ndim == 2:
            parameter.mul_(12 if "qkv" in name else 5)
    torch.manual_seed(random.randrange(2**31))
    return model.to(dtype)


def draw_prompts() -> list[list[int]]:
    lengths = [1, random.randint(2, 12), random.randint(70, 90), random.randint(2, 40)]
    random.shuffle(lengths)
    return [[random.randrange(VOCABULARY) for _ in range(n)] for n in lengths]


@torch.no_grad()
def greedy(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """The most likely tokens, one whole forward pass of one sequence for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def listed(results: Sequence[Tensor]) -> list[list[int]]:
    assert all(result.dtype == torch.int64 and result.dim() == 1 for result in results)
    return [result.tolist() for result in results]


def source(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("attention", "kind", "variant"), WAYS)
def test_greedy_batch_equals_one_by_one(attention: str, kind: Any, variant: str) -> None:
    """Fails if a cache, an attention, padding or the other prompts change a greedy token."""
    prompts, count = draw_prompts(), random.randint(6, 12)
    exact = build("naive", **VARIANTS[variant])
    expected = [greedy(exact, prompt, count) for prompt in prompts]
    mixed = [torch.tensor(prompt, dtype=torch.int32) if i % 2 else prompt for i, prompt in enumerate(prompts)]
    model = build(attention, **VARIANTS[variant])
    assert listed(generate(model, mixed, count, temperature=0, cache=kind)) == expected


@pytest.mark.parametrize(("attention", "kind", "variant"), WAYS)
def test_sampled_tokens_do_not_depend_on_the_cache(attention: str, kind: Any, variant: str) -> None:
    """Fails if a cached logit differs, or the generator is asked for other numbers."""
    prompts, options = draw_prompts(), {"temperature": 0.8, "top_k": 20, "top_p": 0.95}
    expected = generate(build("naive", **VARIANTS[variant]), prompts, 12, generator=source(), cache=None, **options)
    model = build(attention, **VARIANTS[variant])
    found = generate(model, prompts, 12, generator=source(), cache=kind, **options)
    assert listed(found) == listed(expected)
    assert len({token for tokens in listed(found) for token in tokens}) > 8


@pytest.mark.parametrize("kind", ["static", "paged", "rolling"])
def test_float32_tokens_equal_uncached_ones_but_for_ties(kind: Any) -> None:
    """Fails if float32 tokens with and without a cache part where rounding cannot be the reason."""
    model = build(dtype=torch.float32, window=20, num_kv_heads=2)
    prompts = draw_prompts()
    found, expected = (listed(generate(model, prompts, 20, temperature=0, cache=k)) for k in (kind, None))
    for prompt, a, b in zip(prompts, found, expected, strict=True):
        parted = next((i for i in range(20) if a[i] != b[i]), None)
        if parted is not None:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + b[:parted]]))[0, -1]
            assert (logits[a[parted]] - logits[b[parted]]).abs() < 1e-4 * logits.abs().max()


@pytest.mark.parametrize("kind", ["static", "paged", None])
def test_stop(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a sequence goes on after a stop token, loses it, changes how others go on, or is still computed."""
    model, prompts = build(), draw_prompts()
    whole = listed(generate(model, prompts, 15, cache=None, generator=source()))
    ends = random.sample(sorted({token for tokens in whole for token in tokens}), 3)
    expected = [row[: next((i + 1 for i, token in enumerate(row) if token in ends), 15)] for row in whole]
    batches: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: batches.append(len(tokens)) or hidden(tokens, *rest))
    assert listed(generate(model, prompts, 15, cache=kind, generator=source(), stop=ends)) == expected
    assert batches == [sum(len(row) > step for row in expected) for step in range(max(map(len, expected)))]
    first = whole[0][0]
    assert generate(model, prompts[:1], 15, cache=kind, generator=source(), stop=first)[0].tolist() == [first]


def test_stream() -> None:
    """Fails if tokens come in another order, under another prompt's number, or not at once."""
    model, prompts = build(), draw_prompts()
    events: list[tuple[int, int]] = []
    stop = random.sample(range(VOCABULARY), 4)
    results = listed(generate(model, prompts, 9, stop=stop, stream=lambda *event: events.append(event)))
    expected = [(b, results[b][step]) for step in range(9) for b in range(len(prompts)) if step < len(results[b])]
    assert events == expected

    class Enough(Exception):
        pass

    def give_up(_: int, token: int) -> None:
        raise Enough

    cache = KVCache.paged(model, pages=20)
    with pytest.raises(Enough):
        generate(model, prompts, 9, cache=cache, stream=give_up)
    assert cache.free_pages == 20


def test_own_cache_is_used_and_left_empty() -> None:
    """Fails if pages are not given back, those of a sequence that ended only at the end, or results differ then."""
    model, prompts = build(), [[1, 2, 3], [4] * 30]
    cache = KVCache.paged(model, pages=7, page_size=8)
    expected = listed(generate(model, prompts, 10, temperature=0, cache=None))
    free: list[int] = []
    for _ in range(2):
        assert listed(generate(model, prompts, 10, temperature=0, cache=cache)) == expected
        assert (cache.free_pages, cache.lengths) == (7, [])
    stop = expected[1][0]
    assert stop not in expected[0]
    generate(model, prompts, 10, temperature=0, cache=cache, stop=stop, stream=lambda *_: free.append(cache.free_pages))
    assert free[-1] == 7 - math.ceil((3 + 9) / 8)
    with pytest.raises(ValueError, match="must have 9 free pages of 8 tokens for this, got 7 of 7"):
        generate(model, prompts, 15, cache=cache)
    with torch.no_grad():
        model(torch.tensor([[1]]), cache=cache)
    with pytest.raises(ValueError, match=r"must have no sequences yet, got lengths \[1\]"):
        generate(model, prompts, 10, cache=cache)


def test_rolling_cache_goes_on_as_long_as_positions_last() -> None:
    """Fails if a sequence many times the window long is not what the model computes without a cache."""
    model, (prompt,) = build(window=9, max_seq_len=300), [draw_prompts()[0]]
    cache = KVCache.rolling(model, 1)
    found = generate(model, [prompt], 150, generator=source(), cache=cache)[0]
    assert cache.page_size == 64
    tokens = torch.tensor([prompt + found.tolist()])
    numbers = torch.rand(150, 1, dtype=torch.float64, generator=source())[:, 0]
    with torch.no_grad():
        logits = model(tokens)[0, len(prompt) - 1 : -1]
    assert torch.equal(sample(logits, numbers), found)


def nucleus(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """Probabilities after temperature, top-k and top-p, in plain Python."""
    weights = [math.exp(x / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[:top_k]
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weights[i] / total
        if top_p is not None and mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.5, None, None),
        (2.0, 3, None),
        (1.0, None, 0.7),
        (0.7, 4, 0.8),
        (1.0, 1, None),
        (1, 50, 1.0),
    ],
)
def test_sampling_distribution(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Fails if frequencies are not those of an independent computation: chi-squared of 7 degrees of freedom exceeds 60
    once in 10^10 runs."""
    count, logits = 40_000, [2.0, -1.0, 0.5, 2.5, -3.0, 1.0, 0.0, 1.5]
    expected = nucleus(logits, temperature, top_k, top_p)
    drawn = sample(
        torch.tensor(logits).expand(count, -1),
        torch.rand(count, dtype=torch.float64),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    counts = torch.bincount(drawn, minlength=len(logits)).tolist()
    assert all(n == 0 for n, p in zip(counts, expected, strict=True) if p == 0)
    chi_squared = sum((n - count * p) ** 2 / (count * p) for n, p in zip(counts, expected, strict=True) if p)
    assert chi_squared < 60


def test_sampling_at_the_edges() -> None:
    """Fails if the least or greatest number gives a token without probability, a tiny temperature NaN, equals more than
    top_k, or rows share numbers."""
    impossible = -math.inf
    logits = torch.tensor([[impossible, 1.0, impossible, 1.0, impossible]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for options in ({}, {"top_k": 4}, {"top_p": 1.0}, {"temperature": 1e-300}):
        assert sample(logits, ends, **options).tolist() == [1, 3]
    assert sample(torch.zeros(2, 5000), ends, top_k=3).tolist() == [0, 2]
    assert sample(torch.zeros(2, 9), ends, top_p=0.5).tolist() == [0, 4]
    assert sample(torch.zeros(2, 9), ends, top_p=1e-9).tolist() == [0, 0]
    assert sample(torch.tensor([[1e30, -1e30, 0.0]] * 2), ends, temperature=1e-300).tolist() == [0, 0]


def test_same_numbers_same_tokens() -> None:
    """Fails if a seed does not repeat a run, torch's own generator is not the default, or greedy tokens use it up."""
    model, prompts = build(), draw_prompts()
    runs = [listed(generate(model, prompts, 12, generator=source(seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    torch.manual_seed(1)
    assert listed(generate(model, prompts, 12)) == runs[0]
    before = torch.get_rng_state()
    generate(model, prompts, 3, temperature=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["static", "paged", "rolling"])
def test_low_precision(kind: Any) -> None:
    """Fails if a bfloat16 model, or autocast, meets a cache of another dtype."""
    model, prompts = build(dtype=torch.float32, window=30), draw_prompts()
    with torch.autocast("cpu", torch.bfloat16):
        results = generate(model, prompts, 4, cache=kind, temperature=0)
    results += generate(model.bfloat16(), prompts, 4, cache=kind, temperature=0)
    assert [len(result) for result in results] == [4] * 8


def test_nothing_to_do() -> None:
    """Fails if no prompts or no tokens are an error."""
    assert generate(build(), [], 5) == []
    assert listed(generate(build(), [[1], [2, 3]], 0)) == [[], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer from 0 on, got -1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer from 0 on, got 2.0"),
        ({"max_new_tokens": 158}, r"prompts\[0\] and max_new_tokens must add up to .* 160, got 3 \+ 158"),
        ({"prompts": [[1], []]}, r"prompts\[1\] must have at least one token"),
        ({"prompts": [[1, 29]]}, r"prompts\[0\] must hold tokens from 0 to 28, got 29"),
        ({"prompts": [torch.zeros(1, 3).long()]}, r"prompts\[0\] must be a 1-D tensor of integers, .* shape \(1, 3\)"),
        ({"prompts": ["text"]}, r"prompts\[0\] must be integers or a 1-D tensor of them, got str"),
        ({"stop": [1, -2]}, "stop must hold tokens from 0 to 28, got -2"),
        ({"temperature": -1}, "temperature must be a number from 0 on, got -1"),
        ({"temperature": math.nan}, "temperature must be a number from 0 on, got nan"),
        ({"top_k": 0}, "top_k must be an integer from 1 on, got 0"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, got 0\.0"),
        ({"cache": "ring"}, "cache must be 'static', 'rolling', 'paged', a KVCache or None, got 'ring'"),
        ({"cache": "rolling"}, "model must have a window for a rolling cache"),
        ({"model": build("sdpa"), "cache": "paged"}, "cache must be static for attention 'sdpa'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    """Fails if a wrong argument is not refused before any work, by its name."""
    arguments = {"model": build(), "prompts": [[1, 2, 3]], "max_new_tokens": 4} | options
    streamed: list[Any] = []
    with pytest.raises((TypeError, ValueError), match=message):
        generate(**arguments, stream=lambda *event: streamed.append(event))
    assert not streamed


def test_sample_refuses_a_temperature_of_zero() -> None:
    """Fails if a division by zero is let through."""
    with pytest.raises(ValueError, match="temperature must be above 0 to sample"):
        sample(torch.zeros(1, 3), torch.zeros(1).double(), temperature=0)
