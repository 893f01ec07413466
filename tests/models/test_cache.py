"""A model over its cache computes what it computes without one, whatever is cropped, reordered, freed or full.

Sizes, lengths and tokens are drawn anew in each run. The truth is the same model in float64 with naive attention and
without a cache. Uninitialised memory is NaN, so a key that was never stored shows.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.models import KVCache, TorchCache, Transformer, TransformerConfig

VOCABULARY = 29
VARIANTS = {"mha": {}, "gqa": {"num_kv_heads": 2}, "window": {"window": 5, "num_kv_heads": 1}, "wide": {"window": 70}}
WAYS = [
    (attention, kind, variant)
    for variant in VARIANTS
    for attention, kind in [*(("fastattn", k) for k in ("static", "paged", "rolling")), ("sdpa", ""), ("naive", "")]
    if kind != "rolling" or "window" in VARIANTS[variant]
]
APPEND = 4  # tokens at once


def build(attention: str = "fastattn", dtype: torch.dtype = torch.float64, **config: Any) -> Transformer:
    """The same sharp weights for every attention: initial ones attend so evenly that a wrong key would not show."""
    sizes = {"vocab_size": VOCABULARY, "num_layers": 2, "num_heads": 4, "embed_dim": 32, "max_seq_len": 200}
    torch.manual_seed(7)
    model = Transformer(TransformerConfig(**(sizes | config), attention=attention))
    for name, parameter in model.requires_grad_(False).named_parameters():
        if parameter.ndim == 2:
            parameter.mul_(12 if "qkv" in name else 4)
    torch.manual_seed(random.randrange(2**31))
    return model.to(dtype)


def make_cache(model: Transformer, kind: str, batch: int = 3) -> KVCache:
    if not kind:
        return TorchCache.static(model, batch)
    if kind == "paged":
        return KVCache.paged(model, pages=batch * 40 + 2, page_size=random.choice([5, 16]))
    return KVCache.static(model, batch) if kind == "static" else KVCache.rolling(model, batch, append=APPEND)


def draw(*lengths: int) -> list[list[int]]:
    return [[random.randrange(VOCABULARY) for _ in range(n)] for n in lengths]


@torch.no_grad()
def feed(model: Transformer, cache: KVCache, rows: list[list[int]]) -> list[Tensor]:
    """Logits (S, V) of the new tokens of each sequence."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    logits = model.logits(model.hidden(tokens, cache, [len(row) for row in rows]))
    return [found[: len(row)] for found, row in zip(logits, rows, strict=True)]


@torch.no_grad()
def truth(model: Transformer, rows: list[list[int]], new: list[list[int]]) -> list[Tensor]:
    """The logits of the `new` last tokens of each row, each sequence on its own and without a cache."""
    return [model(torch.tensor([row]))[0, len(row) - len(n) :] for row, n in zip(rows, new, strict=True)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


class Conversation:
    """A model with its cache, and the tokens that it has been given."""

    def __init__(self, attention: str, kind: str, batch: int = 3, **config: Any) -> None:
        self.model, self.exact = build(attention, **config), build("naive", **config)
        self.cache = make_cache(self.model, kind, batch)
        self.rows: list[list[int]] = [[] for _ in range(batch)]

    def say(self, new: list[list[int]]) -> None:
        """Fails if the logits are not those of the whole sequences."""
        self.rows = [row + n for row, n in zip(self.rows, new, strict=True)]
        assert_close(feed(self.model, self.cache, new), truth(self.exact, self.rows, new))
        assert self.cache.lengths == list(map(len, self.rows))

    def crop(self, lengths: list[int]) -> None:
        self.cache.crop(lengths)
        self.rows = [row[:n] for row, n in zip(self.rows, lengths, strict=True)]

    def reorder(self, index: list[int]) -> None:
        self.cache.reorder(index)
        self.rows = [self.rows[b] for b in index]


def prompt_lengths() -> list[int]:
    lengths = [1, random.randint(2, 20), random.randint(80, 120)]
    random.shuffle(lengths)
    return lengths


@pytest.mark.parametrize(("attention", "kind", "variant"), WAYS)
def test_ragged_prompts_then_steps(attention: str, kind: str, variant: str) -> None:
    """Fails if a prompt's padding is kept, a prompt longer than the window overwrites what it should not, a position,
    window edge or page is off by one, or several tokens at once see each other's future."""
    talk = Conversation(attention, kind, **VARIANTS[variant])
    talk.say(draw(*prompt_lengths()))
    for _ in range(8):
        talk.say(draw(*[random.choice([1, 1, APPEND])] * 3))


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_equal_lengths_with_torch(attention: str) -> None:
    """Fails if several tokens at once see each other's future where steps of one need no mask."""
    talk = Conversation(attention, "", batch=2)
    talk.say(draw(9, 9))
    talk.say(draw(1, 1))
    talk.say(draw(3, 3))


@pytest.mark.parametrize("kind", ["static", "paged", "rolling", ""])
def test_float32_error_is_that_of_naive_attention(kind: str) -> None:
    """Fails if a cached float32 step is less exact than twice the error of plain PyTorch without a cache."""
    config = VARIANTS["wide"]
    model = build("fastattn" if kind else "sdpa", torch.float32, **config)
    naive, exact = build("naive", torch.float32, **config), build("naive", **config)
    rows = draw(*prompt_lengths())
    cache = make_cache(model, kind)
    feed(model, cache, rows)
    for _ in range(5):
        new = draw(1, 1, 1)
        rows = [row + n for row, n in zip(rows, new, strict=True)]
        found = feed(model, cache, new)
        for cached, plain, expected in zip(found, truth(naive, rows, new), truth(exact, rows, new), strict=True):
            # The models' rotary tables are all in float32, so what differs is rounding alone.
            allowed = 2 * (plain - expected).abs().max() + 1e-5 * expected.abs().max()
            assert (cached - expected).abs().max() <= allowed


@pytest.mark.parametrize(("attention", "kind", "variant"), WAYS)
def test_crop_and_reorder(attention: str, kind: str, variant: str) -> None:
    """Fails if cropped tokens are still seen, a crop moves positions, or reordered sequences are not those named,
    repeated ones not independent of each other, or dropped ones come back."""
    talk = Conversation(attention, kind, **VARIANTS[variant])
    talk.say(draw(*prompt_lengths()))
    talk.say(draw(APPEND, APPEND, APPEND))
    talk.crop([len(row) - random.randint(0, APPEND) for row in talk.rows])
    talk.say(draw(1, 1, 1))
    talk.say(draw(2, 2, 2))
    talk.reorder(random.choice([[2, 0, 2], [1, 1, 1], [1, 2, 0]]))
    talk.say(draw(1, 1, 1))
    talk.reorder(random.choice([[2, 0], [1, 2]]))
    talk.say(draw(1, 1))
    talk.crop([0, 0])
    talk.say(draw(6, 90))
    talk.say(draw(1, 1))


def test_rolling_crop_beyond_what_is_left() -> None:
    """Fails if a rolling cache crops to where it has overwritten keys, refuses where it has not, or forgets, after a
    first crop, how far it had been."""
    talk = Conversation("fastattn", "rolling", batch=1, **VARIANTS["wide"])
    rows = talk.cache.page_size
    assert rows == 128  # 70 + 4 - 1, rounded up
    talk.say(draw(150))
    least = 150 - rows + 70 - 1
    with pytest.raises(
        ValueError, match=rf"lengths\[0\] must be 0 or at least {least}, .* first 22 tokens, got {least - 1}"
    ):
        talk.cache.crop([least - 1])
    talk.crop([least + 1])
    talk.say(draw(1))
    with pytest.raises(ValueError, match=f"got {least - 1}"):
        talk.cache.crop([least - 1])
    talk.crop([least])
    talk.say(draw(1))
    talk.crop([0])
    talk.say(draw(60))
    talk.crop([10])
    talk.say(draw(1))


def test_reordered_rolling_cache() -> None:
    """Fails if a page is not in every column of its sequence's new row of the block table."""
    talk = Conversation("fastattn", "rolling", **VARIANTS["window"])
    talk.say(draw(150, 100, 70))
    talk.reorder([2, 0, 1])
    talk.say(draw(1, 1, 1))


def test_rolling_cache_takes_no_more_than_it_can_hold() -> None:
    """Fails if tokens at once overwrite keys that the first of them sees."""
    talk = Conversation("fastattn", "rolling", batch=1, **VARIANTS["wide"])
    talk.say(draw(100))
    most = talk.cache.page_size - 69
    with pytest.raises(ValueError, match=f"at most {most} at once after 100, got {most + 1}"):
        feed(talk.model, talk.cache, draw(most + 1))
    talk.say(draw(most))


def test_speculative_decoding_with_crop() -> None:
    """Greedy tokens from a draft's guesses, checked several at once, are those of one step at a time; fails if a crop
    leaves a rejected token visible."""
    config = VARIANTS["gqa"]
    model, draft = build(**config), build(**config)
    for parameter in draft.parameters():
        parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    (prompt,) = draw(9)
    expected = list(prompt)
    cache = KVCache.paged(model, pages=20, page_size=5)
    new = prompt
    for _ in range(30):
        expected.append(feed(model, cache, [new])[0][-1].argmax().item())
        new = expected[-1:]

    caches = KVCache.static(model, 1), KVCache.static(draft, 1)
    tokens = [*prompt, feed(model, caches[0], [prompt])[0][-1].argmax().item()]
    rounds = 0
    while len(tokens) < len(expected):
        guesses: list[int] = []
        while len(guesses) < APPEND:
            pending = (tokens + guesses)[caches[1].lengths[0] if caches[1].lengths else 0 :]
            guesses.append(feed(draft, caches[1], [pending])[0][-1].argmax().item())
        checked = feed(model, caches[0], [[tokens[-1], *guesses]])[0].argmax(dim=-1).tolist()
        right = next((i for i, (a, b) in enumerate(zip(guesses, checked, strict=False)) if a != b), APPEND)
        tokens += checked[: right + 1]
        caches[0].crop([len(tokens) - 1])
        caches[1].crop([min(len(tokens) - 1, caches[1].lengths[0])])
        rounds += 1
    assert tokens[: len(expected)] == expected
    assert rounds <= 30


def test_pages_are_taken_as_sequences_grow_and_given_back() -> None:
    """Fails if pages are taken before they are needed, not freed by crop, reorder and clear, or freed twice."""
    talk = Conversation("fastattn", "paged", batch=3)
    cache = talk.cache = KVCache.paged(talk.model, pages=9, page_size=5)
    talk.say(draw(5, 6, 1))
    assert cache.free_pages == 9 - 4
    talk.say(draw(1, 1, 1))
    assert cache.free_pages == 9 - 5
    talk.say(draw(4, 4, 4))
    assert cache.free_pages == 9 - (2 + 3 + 2)
    talk.crop([9, 10, 5])
    assert cache.free_pages == 9 - (2 + 2 + 1)
    talk.reorder([1, 1])
    assert cache.free_pages == 9 - (2 + 2)
    talk.say(draw(1, 1))
    assert cache.free_pages == 9 - (3 + 3)
    cache.clear()
    assert cache.free_pages == 9
    assert cache.lengths == []
    talk.rows = [[]]
    talk.say(draw(45))
    assert cache.free_pages == 0


def test_exhausted_pool() -> None:
    """Fails if a pool without pages is written beyond, or a refused step changes lengths, pages or keys."""
    talk = Conversation("fastattn", "paged", batch=2)
    talk.cache = KVCache.paged(talk.model, pages=3, page_size=4)
    talk.say(draw(8, 3))
    before = [t.clone() for t in talk.cache.key]
    with pytest.raises(ValueError, match="must have 2 free pages of 4 tokens for this, got 0 of 3"):
        feed(talk.model, talk.cache, draw(2, 2))
    with pytest.raises(ValueError, match="must have 2 free pages of 4 tokens for this, got 1 of 3"):
        talk.cache.reorder([0, 0])
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(talk.cache.key, before, strict=True))
    talk.crop([7, 3])
    talk.say(draw(1, 1))
    talk.cache.clear()
    with pytest.raises(ValueError, match="must have 4 free pages of 4 tokens for this, got 3 of 3"):
        feed(talk.model, talk.cache, draw(13))


def test_rolling_memory_is_that_of_the_window() -> None:
    """Fails if a rolling cache grows with the sequence or with the longest one that there may be."""
    short, long = (build(window=30, max_seq_len=n) for n in (100, 5000))
    assert KVCache.rolling(short, 2).nbytes == KVCache.rolling(long, 2).nbytes
    cache = KVCache.rolling(long, 1)
    rows, heads, width, layers = 64, 4, 8, 2
    assert cache.nbytes == 2 * layers * rows * heads * width * 8
    places = [t.data_ptr() for t in (*cache.key, *cache.value)]
    feed(long, cache, draw(3000))
    for _ in range(70):
        feed(long, cache, draw(1))
    assert [t.data_ptr() for t in (*cache.key, *cache.value)] == places
    assert cache.free_pages == 0


def test_static_cache_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a static cache in its first order goes to the kernel in pages, which costs time."""
    tables: list[Any] = []
    from fastattn.models import cache as module

    original = module.attention_with_kvcache

    def spy(*args: Any, **options: Any) -> Any:
        tables.append(options["block_table"])
        return original(*args, **options)

    monkeypatch.setattr(module, "attention_with_kvcache", spy)
    talk = Conversation("fastattn", "static")
    talk.say(draw(3, 4, 5))
    talk.say(draw(1, 1, 1))
    assert tables == [None, None]
    talk.reorder([2, 0])
    talk.say(draw(1, 1))
    assert all(table is not None for table in tables[2:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: KVCache.static(m, 0), "pages must be at least 1, got 0"),
        (lambda m: KVCache.static(m, 1, 201), "capacity must be at most the model's max_seq_len 200, got 201"),
        (lambda m: KVCache.paged(m, 3, 0), "page_size must be at least 1, got 0"),
        (lambda m: KVCache.rolling(m, 1), "must have a window for a rolling cache"),
        (lambda m: TorchCache.static(m, 1), "attention 'sdpa' or 'naive' for a TorchCache, got 'fastattn'"),
        (lambda m: TorchCache.paged(build("sdpa"), 9), "must be static for attention 'sdpa'"),
        (lambda m: KVCache.static(build("sdpa"), 1), "attention 'fastattn' for a KVCache, got 'sdpa'"),
        (lambda m: KVCache.rolling(build(window=3), 1, append=0), "append must be at least 1, got 0"),
    ],
)
def test_constructor_errors(make: Any, message: str) -> None:
    """Fails if a cache that cannot work is made, or the error does not say why."""
    with pytest.raises(ValueError, match=message):
        make(build())


def test_errors_leave_the_cache_as_it_was() -> None:
    """Fails if tokens that do not fit are computed or counted, or an error does not name what is wrong."""
    model = build()
    cache = KVCache.static(model, 2, capacity=10)
    for rows, message in (
        (draw(11, 2), "sequence 0 must have at most 10 tokens, the cache's capacity, got 11"),
        (draw(1, 1, 1), "must have 3 free pages of 64 tokens for this, got 2 of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            feed(model, cache, rows)
        assert cache.lengths == []
    feed(model, cache, draw(9, 4))
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    for call, message in (
        (lambda: feed(model, cache, draw(2, 2)), "sequence 0 must have at most 10 tokens.*got 11"),
        (lambda: feed(model, cache, draw(1)), "a row for each of the cache's 2 sequences, got 1"),
        (lambda: feed(model, cache, draw(1, 0)), r"counts must all be 1 where the cache is not empty, got \[1, 0\]"),
        (lambda: model.hidden(tokens, cache, [3, 1]), r"2 numbers from 0 to 2, got \[3, 1\]"),
        (lambda: model.hidden(tokens, None, [1, 1]), "counts must come with cache"),
        (lambda: feed(build(num_layers=1), cache, draw(1, 1)), "cache must be made for this model"),
        (lambda: cache.crop([10, 4]), r"from 0 to the sequences' own, \[9, 4\], got \[10, 4\]"),
        (lambda: cache.crop([1]), r"own, \[9, 4\], got \[1\]"),
        (lambda: cache.reorder([0, 2]), r"must name sequences 0 to 1, got \[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            call()
        assert cache.lengths == [9, 4]
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        model(tokens, cache=cache)
