"""Continue prompts with a `Transformer`: greedy or sampled, batched, over any kind of cache or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastattn.models.cache import PAGE_SIZE, Cache, KVCache, TorchCache
from fastattn.models.state_cache import StateCache
from fastattn.models.transformer import Transformer

Kind = Literal["static", "rolling", "paged"]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Sequence[int] = (),
    generator: torch.Generator | None = None,
    cache: Kind | Cache | None = "static",
    stream: Callable[[int, int], object] | None = None,
) -> list[Tensor]:
    """Continue every prompt by up to `max_new_tokens` tokens.

    Which tokens does not depend on the cache, nor, when greedy, on the other prompts of the batch (only between two
    tokens as good as equal may rounding decide). A sequence that has ended leaves the batch and costs nothing more.

    Args:
        prompts: token ids, a sequence of ints or a 1-D integer tensor each, of any lengths from 1 on.
        temperature, top_k, top_p: as in `sample`; a temperature of 0 always takes the most likely token.
        stop: the token or tokens that end a sequence; the result includes the one that did.
        generator: source of randomness, on the CPU whatever the model's device; default torch's own. Each step draws
            one number for every prompt, ended or not, so no sequence depends on when another ends; greedy ones draw
            none.
        cache: "static" (with a linear mechanism its state), "rolling" (for models with a window) or "paged"; None
            computes everything anew for each token. Or a cache of this model without sequences, which is left without
            sequences again.
        stream: called with (index of the prompt, token) as soon as there is one.

    Returns:
        the new tokens of each prompt, int64 (up to max_new_tokens,) on the model's device.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or range, or a prompt and its new tokens do not fit into
            the model's max_seq_len or into the cache; nothing has been computed then.
    """
    config = model.config
    if not config.causal:
        raise ValueError("fastattn: model must be causal to generate, got causal=False")
    _check_sampling(temperature, top_k, top_p)
    _check_integer("max_new_tokens", max_new_tokens, 0)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"fastattn: generator must be on the CPU, got one on {generator.device}")
    ends = frozenset(_tokens("stop", [stop] if isinstance(stop, int) else stop, config.vocab_size))
    rows = [_tokens(f"prompts[{i}]", prompt, config.vocab_size) for i, prompt in enumerate(prompts)]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"fastattn: prompts[{i}] must have at least one token, got none")
        if len(row) + max_new_tokens > config.max_seq_len:
            raise ValueError(
                f"fastattn: prompts[{i}] and max_new_tokens must add up to at most the model's max_seq_len "
                f"{config.max_seq_len}, got {len(row)} + {max_new_tokens}"
            )
    held = _cache(model, cache, [len(row) + max_new_tokens for row in rows]) if rows else None

    results: list[list[int]] = [[] for _ in rows]
    active = list(range(len(rows)))
    try:
        for _ in range(max_new_tokens):
            if not active:
                break
            logits_BV = _next_logits(model, rows, held)
            if temperature:
                uniform_B = torch.rand(len(results), dtype=torch.float64, generator=generator)[active]
                chosen = sample(logits_BV, uniform_B, temperature=temperature, top_k=top_k, top_p=top_p)
            else:
                chosen = logits_BV.argmax(dim=-1)
            tokens = chosen.tolist()
            for b, token in zip(active, tokens, strict=True):
                results[b].append(token)
                if stream is not None:
                    stream(b, token)
            going = [i for i, token in enumerate(tokens) if token not in ends]
            if len(going) < len(active):
                active = [active[i] for i in going]
                if held is not None:
                    held.reorder(going)
            rows = [[tokens[i]] if held is not None else [*rows[i], tokens[i]] for i in going]
    finally:
        if held is not None:
            held.clear()
    return [torch.tensor(tokens, dtype=torch.int64, device=model.embedding.weight.device) for tokens in results]


def sample(
    logits_BV: Tensor,
    uniform_B: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw one token of each row, by inverting the distribution function: the same numbers give the same tokens.

    The distribution is softmax(logits / temperature), then only its `top_k` most likely tokens, then of these only the
    fewest most likely that together have probability `top_p` (the nucleus, Holtzman et al., arXiv:1904.09751); among
    equals the smaller token counts as the more likely. All in float64.

    Args:
        logits_BV: (B, V), floating-point.
        uniform_B: (B,) float64 numbers in [0, 1).
        temperature: above 0.
        top_k: at least 1; None keeps all.
        top_p: above 0, at most 1; None keeps all.

    Returns:
        (B,) int64.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or range.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("fastattn: temperature must be above 0 to sample, got 0; take the argmax instead")
    logits = logits_BV.double()
    # The difference first: a tiny temperature then gives 0 and -inf, and no inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    order = None
    if top_k is not None or top_p is not None:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        scaled, order = scaled[:, :top_k], order[:, :top_k]
    probability = scaled.softmax(dim=-1)
    cumulative = probability.cumsum(dim=-1)
    mass = cumulative[:, -1:]
    if top_p is not None:
        nucleus = cumulative - probability < top_p
        mass = cumulative.masked_fill(~nucleus, 0.0).amax(dim=-1, keepdim=True)
    target = uniform_B.to(logits.device)[:, None] * mass
    rank = torch.searchsorted(cumulative, target, right=True)
    return (rank if order is None else order.gather(1, rank))[:, 0]


def _next_logits(model: Transformer, rows: list[list[int]], cache: Cache | None) -> Tensor:
    """Logits (B, V) of what follows the last token of each row; with a cache, the rows are only what is new to it."""
    device = model.embedding.weight.device
    counts = [len(row) for row in rows]
    longest = max(counts)
    tokens_BS = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    # Padding comes after a row's own tokens, which do not see it.
    hidden_BSE = model.hidden(tokens_BS) if cache is None else model.hidden(tokens_BS, cache, counts)
    last_B = torch.tensor(counts, device=device) - 1
    return model.logits(hidden_BSE[torch.arange(len(rows), device=device), last_B])


def _cache(model: Transformer, kind: Kind | Cache | None, lengths: list[int]) -> Cache | None:
    """The cache to use, checked to have room for sequences of these lengths."""
    if kind is None:
        return None
    if isinstance(kind, Cache):
        if kind.lengths:
            raise ValueError(f"fastattn: cache must have no sequences yet, got lengths {kind.lengths}")
        kind.check_room(lengths)
        return kind
    options = model.config.options
    if kind == "static" and options is not None and options.mixer.family == "linear":
        return StateCache(model)
    cls = KVCache if model.config.attention in KVCache.attentions else TorchCache
    if kind == "static":
        return cls.static(model, len(lengths), max(lengths))
    if kind == "rolling":
        return cls.rolling(model, len(lengths))
    if kind == "paged":
        return cls.paged(model, sum(-(-length // PAGE_SIZE) for length in lengths))
    raise ValueError(f"fastattn: cache must be 'static', 'rolling', 'paged', a KVCache or None, got {kind!r}")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"fastattn: temperature must be a number from 0 on, got {temperature!r}")
    if top_k is not None:
        _check_integer("top_k", top_k, 1)
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"fastattn: top_p must be above 0 and at most 1, got {top_p!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"fastattn: {name} must be an integer from {least} on, got {value!r}")


def _tokens(name: str, tokens: Any, vocab_size: int) -> list[int]:
    """The token ids as ints, checked."""
    if isinstance(tokens, Tensor):
        if tokens.dim() != 1 or tokens.is_floating_point() or tokens.is_complex():
            raise TypeError(
                f"fastattn: {name} must be a 1-D tensor of integers, got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        tokens = tokens.tolist()
    if not isinstance(tokens, Sequence) or not all(isinstance(t, int) for t in tokens):
        raise TypeError(f"fastattn: {name} must be integers or a 1-D tensor of them, got {type(tokens).__name__}")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"fastattn: {name} must hold tokens from 0 to {vocab_size - 1}, got {token}")
    return list(tokens)
