"""Sparse mechanisms in the layer, in replaced encoders and in the reference model, in float64.

A pattern in the layer is softmax attention under a mask, so it must equal the layer without it that is given that mask
pair by pair; the masks are written out here. What content chooses must equal the function of `fastattn.sparse` on the
layer's own projections.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from fastattn import sparse
from fastattn.models import KVCache, StateCache, Transformer, TransformerConfig, generate
from fastattn.nn import (
    LSH,
    NSA,
    BigBird,
    Fixed,
    Longformer,
    Mechanism,
    MultiheadAttention,
    Strided,
    TopK,
    Window,
    replace_attention,
    restore_attention,
    sparse_mixers,
)
from fastattn.nn.mixers import Heads

EMBED, HEADS, BATCH, LENGTH = 12, 3, 3, 70
EXACT = {"rtol": 1e-9, "atol": 1e-11}
PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [41], [1]])
I, J = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)  # noqa: E741

PATTERNS: dict[str, Mechanism] = {
    "window": Window(5),
    "window-sides": Window((7, 2)),
    "longformer": Longformer(4, global_tokens=2),
    "longformer-dilated": Longformer((3, 1), global_tokens=[0, 37, 99], dilation=3),
    "bigbird": BigBird(window_blocks=1, global_blocks=1, random_blocks=1, block_size=16, seed=3),
    "strided": Strided(6),
    "fixed": Fixed(8, summary=2),
}
BY_CONTENT: dict[str, Mechanism] = {
    "topk": TopK(2, block_size=16),
    "lsh": LSH(rounds=2, bucket_size=8, buckets=16),
    "nsa": NSA(compress_block=8, compress_stride=4, select_block=16, selected=3, window=6),
}
ALL = PATTERNS | BY_CONTENT
CASES = [(name, causal) for name in ALL for causal in (True, False) if causal or name != "nsa"]


def dense(name: str, causal: bool) -> Tensor:
    """The pairs (H or 1, L, L) that a pattern keeps, by its definition."""
    options: Any = PATTERNS[name]
    distance = I - J
    if name.startswith(("window", "longformer")):
        left, right = options.window if isinstance(options.window, tuple) else (options.window,) * 2
        step = getattr(options, "dilation", 1)
        keep = (distance % step == 0) & (distance <= left * step) & (distance >= -right * step)
        if name.startswith("longformer"):
            tokens = options.global_tokens
            tokens = range(tokens) if isinstance(tokens, int) else tokens
            for token in tokens:
                keep = keep | (token == I) | (token == J)
    elif name == "strided":
        keep = (distance.abs() < options.stride) | (distance % options.stride == 0)
    elif name == "fixed":
        last = options.stride - options.summary
        keep = (options.stride * (I // options.stride) <= J) & (options.stride * (I // options.stride + 1) > J)
        keep = keep | (J % options.stride >= last)
    else:
        numbers = {"window_blocks": 1, "global_blocks": 1, "random_blocks": 1, "block_size": 16, "seed": 3}
        return sparse.bigbird(LENGTH, heads=HEADS, causal=causal, **numbers).to_dense()[0]
    return (keep & (distance >= 0) if causal else keep)[None]


def build(options: Mechanism | str, *args: Any, **layer: Any) -> MultiheadAttention:
    made = MultiheadAttention(
        EMBED, HEADS, *args, mechanism=options, **({"batch_first": True, "dtype": torch.float64} | layer)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2).add_(torch.randn_like(parameter) * 0.3)
    return made


def twins(name: str, **layer: Any) -> tuple[MultiheadAttention, MultiheadAttention]:
    """A layer with the mechanism, and one of plain attention with its parameters."""
    made = build(ALL[name], **layer)
    plain = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **layer)
    plain.load_state_dict(made.state_dict())
    return made, plain


def attend(layer: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return layer(x, x, x, need_weights=False, **options)[0]


def draw(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, EMBED, dtype=torch.float64)


def hidden(keep: Tensor) -> Tensor:
    """An attn_mask for torch's layer, (N * H, L, L), of pairs kept (H or 1, L, L) or (N, H, L, L)."""
    return ~keep.expand(BATCH, HEADS, -1, -1).flatten(0, 1)


def heads_of(layer: MultiheadAttention, x: Tensor) -> list[Tensor]:
    projected = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    return [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in projected]


def merged(layer: MultiheadAttention, heads: Tensor) -> Tensor:
    return layer.out_proj(heads.transpose(1, 2).flatten(2))


def assert_same(calls: list[Callable[[], Any]], x: Tensor, layers: list[MultiheadAttention]) -> None:
    """Fails if results (tensors or tuples of them) differ, or their gradients by input and projections."""
    found = []
    for call, layer in zip(calls, layers, strict=True):
        result = call()
        outs = result if isinstance(result, tuple) else (result,)
        weight = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) for out in outs]
        total = sum((out * w).sum() for out, w in zip(outs, weight, strict=True))
        found.append([*outs, *torch.autograd.grad(total, [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, **EXACT)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_is_attention_under_its_mask(name: str, causal: bool, padded: bool) -> None:
    """Fails if a pattern keeps other pairs than its definition says, is not causal where it must be or is where it must
    not, forgets padding, or loses a gradient; with weights and without."""
    layer, plain = twins(name)
    x = draw().requires_grad_()
    options = {"key_padding_mask": PADDING} if padded else {}
    mask = hidden(dense(name, causal))
    assert_same(
        [lambda: attend(layer, x, is_causal=causal, **options), lambda: attend(plain, x, attn_mask=mask, **options)],
        x,
        [layer, plain],
    )
    both = [
        layer(x, x, x, is_causal=causal, average_attn_weights=False, **options),
        plain(x, x, x, attn_mask=mask, average_attn_weights=False, **options),
    ]
    for a, b in zip(*both, strict=True):
        assert_close(a, b, **EXACT)
    assert (both[0][1] > 0).any()


@pytest.mark.parametrize("name", ["longformer", "bigbird", "topk"])
def test_masks_of_the_caller_apply_too(name: str) -> None:
    """Fails if a bool attn_mask does not hide what it hides, a float one is not added or not differentiated, or either
    is lost next to padding; shared by the heads or one for each."""
    layer, plain = twins(name)
    x = draw().requires_grad_()
    if name == "topk":
        query, key, _ = heads_of(layer, x)
        keep = sparse.topk_block_mask(query, key, k=2, block_size=16, causal=False).to_dense()
    else:
        keep = dense(name, False)
    for shape in ((LENGTH, LENGTH), (BATCH * HEADS, LENGTH, LENGTH)):
        drop = torch.rand(shape) < 0.3
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        calls = [partial(attend, layer, x, attn_mask=drop), partial(attend, plain, x, attn_mask=drop | hidden(keep))]
        assert_same(calls, x, [layer, plain])
        found = attend(layer, x, attn_mask=bias)
        expected = attend(plain, x, attn_mask=bias.masked_fill(hidden(keep), -math.inf))
        assert_close(found, expected, **EXACT)
        grads = [torch.autograd.grad(out.square().sum(), bias)[0] for out in (found, expected)]
        assert_close(*grads, **EXACT)
    if name != "topk":  # where padding has a part in the choice
        as_float = torch.zeros(PADDING.shape).masked_fill(PADDING, -math.inf)
        for padding in (PADDING, as_float):
            found = attend(layer, x, attn_mask=drop, key_padding_mask=padding)
            assert_close(found, attend(plain, x, attn_mask=drop | hidden(keep), key_padding_mask=PADDING), **EXACT)


@pytest.mark.parametrize("name", ["window", "fixed", "topk"])
def test_dropout(name: str) -> None:
    """Fails if weights are not dropped in training, dropped in evaluation, or others than plain attention drops."""
    layer, plain = build(ALL[name], 0.4), build("flash", 0.4)
    plain.load_state_dict(layer.state_dict())
    x = draw()
    query, key, _ = heads_of(layer, x)
    keep = sparse.topk_block_mask(query, key, k=2, block_size=16).to_dense() if name == "topk" else dense(name, True)
    results = []
    for made, options in ((layer, {"is_causal": True}), (plain, {"attn_mask": hidden(keep)})):
        torch.manual_seed(11)
        results.append(made(x, x, x, **options))
        made.eval()
        assert not torch.equal(results[-1][0], made(x, x, x, **options)[0])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, **EXACT)


@pytest.mark.parametrize("causal", [True, False])
def test_topk_is_attention_to_the_blocks_chosen(causal: bool) -> None:
    """Fails if other blocks are seen than those that the projected queries and keys choose, or a gradient is lost."""
    layer, plain = twins("topk")
    x = draw().requires_grad_()
    query, key, _ = heads_of(layer, x)
    mask = sparse.topk_block_mask(query, key, k=2, block_size=16, causal=causal).to_dense()
    assert 0.2 < mask.float().mean() / (0.5 + 0.5 * (not causal)) < 0.8
    assert_same(
        [lambda: attend(layer, x, is_causal=causal), lambda: attend(plain, x, attn_mask=hidden(mask))],
        x,
        [layer, plain],
    )


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("causal", [True, False])
def test_lsh_is_the_function(causal: bool, padded: bool) -> None:
    """Fails if keys are not the queries, hashes are not the layer's first ones, or padding or a gradient is lost."""
    layer = build(ALL["lsh"])
    x = draw().requires_grad_()

    def expected(part: Tensor, keep: Tensor | None, directions: int) -> Tensor:
        query, _, value = heads_of(layer, part)
        rotations = layer.mixer.rotations[..., :directions]
        out = sparse.lsh_attention(query, value, rotations=rotations, bucket_size=8, causal=causal, key_mask=keep)
        return merged(layer, out)

    for length, buckets in ((LENGTH, 10), (17, 4), (5, 2)):
        part, keep = x[:, :length], ~PADDING[:, :length] if padded else None

        options = {"key_padding_mask": ~keep} if padded else {}
        assert_same(
            [partial(attend, layer, part, is_causal=causal, **options), partial(expected, part, keep, buckets // 2)],
            x,
            [layer, layer],
        )


def test_nsa_is_the_function() -> None:
    """Fails if gates are not those of the layer's input, heads or branches are swapped, or a gradient is lost."""
    layer = build(ALL["nsa"])
    x = draw().requires_grad_()
    options = {"compress_block": 8, "compress_stride": 4, "select_block": 16, "selected": 3, "window": 6}

    def expected() -> Tensor:
        weight, bias = (t.unflatten(0, (HEADS, 3)) for t in (layer.mixer.gate.weight, layer.mixer.gate.bias))
        gates = torch.sigmoid(torch.einsum("bne,hge->bhng", x, weight) + bias[:, None])
        return merged(layer, sparse.native_sparse_attention(*heads_of(layer, x), gates, **options))

    assert_same([lambda: attend(layer, x, is_causal=True), expected], x, [layer, layer])


@pytest.mark.parametrize(("name", "causal"), [case for case in CASES if case[0] != "bigbird"])
def test_padding_changes_nothing(name: str, causal: bool) -> None:
    """Fails if a sequence gives with padding at its end what it does not give alone, or NSA's or LSH's padding may
    stand at the end only. (BigBird's pattern goes by the padded length.)"""
    layer = build(ALL[name]).requires_grad_(False)
    x = draw()
    if name == "lsh":  # which has the more buckets the longer the input
        layer.mixer.rotations = layer.mixer.rotations[..., :1]
    found = attend(layer, x, key_padding_mask=PADDING, is_causal=causal)
    for row, length in enumerate((~PADDING).sum(1).tolist()):
        alone = attend(layer, x[row : row + 1, :length], is_causal=causal)
        assert_close(found[row, :length], alone[0], **EXACT)
    if name in ("nsa", "lsh"):
        spread = torch.rand(BATCH, LENGTH) < 0.4
        found = attend(layer, x, key_padding_mask=spread, is_causal=causal)
        for row, drop in enumerate(spread):
            alone = attend(layer, x[row : row + 1, ~drop], is_causal=causal)
            assert_close(found[row, ~drop], alone[0], **EXACT)


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_layouts(name: str, causal: bool) -> None:
    """Fails if axes are confused with the sequence first, or in an unbatched call."""
    layer = build(ALL[name]).requires_grad_(False)
    x = draw()
    expected = attend(layer, x, key_padding_mask=PADDING, is_causal=causal)
    assert_close(attend(layer, x[1], key_padding_mask=PADDING[1], is_causal=causal), expected[1], **EXACT)
    layer.batch_first = False
    found = attend(layer, x.transpose(0, 1), key_padding_mask=PADDING, is_causal=causal)
    assert_close(found.transpose(0, 1), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["longformer", "topk", "lsh", "nsa"])
def test_nested_inputs(name: str) -> None:
    """Fails if nested sequences do not give what padded ones give, weights included where there are any."""
    layer = build(ALL[name])
    x, lengths = draw(), (~PADDING).sum(1).tolist()
    nested = torch.nested.as_nested_tensor([row[:n] for row, n in zip(x, lengths, strict=True)])
    out = attend(layer, nested, is_causal=True)
    padded = attend(layer, x, key_padding_mask=PADDING, is_causal=True)
    for row, n, found in zip(padded, lengths, out.unbind(), strict=True):
        assert_close(found, row[:n], **EXACT)
    if name in ("longformer", "topk"):
        for average in (True, False):
            weights = layer(nested, nested, nested, average_attn_weights=average, is_causal=True)[1]
            expected = layer(x, x, x, PADDING, average_attn_weights=average, is_causal=True)[1]
            rows = PADDING[..., None] if average else PADDING[:, None, :, None]
            assert_close(weights, expected.masked_fill(rows, 0), **EXACT)


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_state_dicts(name: str, causal: bool) -> None:
    """torch's state dict gives the projections, the layer's own the hashes and gates too; fails otherwise, or if a
    mechanism without any has parameters."""
    ours, other = build(ALL[name]), build(ALL[name])
    x = draw(2)
    assert not torch.equal(attend(other, x, is_causal=causal), attend(ours, x, is_causal=causal))
    other.load_state_dict(ours.state_dict())
    assert torch.equal(attend(other, x, is_causal=causal), attend(ours, x, is_causal=causal))
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    wanted = {"lsh": ["mixer.rotations"], "nsa": ["mixer.gate.weight", "mixer.gate.bias"]}
    assert missing == wanted.get(name, [])


@pytest.mark.parametrize("name", ["bigbird", "topk", "lsh"])
def test_grouped_query_heads(name: str) -> None:
    """A mixer with fewer key heads equals one with each of them repeated; fails if groups come in another order."""
    sizes = Heads(EMBED, 4, 2, 6)
    grouped, full = (ALL[name].build(made, dtype=torch.float64) for made in (sizes, sizes._replace(kv_heads=4)))
    full.load_state_dict(grouped.state_dict())
    query, x = torch.randn(2, 4, LENGTH, 6).double(), draw(2)
    key, value = torch.randn(2, 2, 2, LENGTH, 6).double()
    keys, values = (t.repeat_interleave(2, 1) for t in (key, value))
    assert_close(grouped(query, key, value, x, causal=True), full(query, keys, values, x, causal=True), **EXACT)


@pytest.mark.parametrize("name", ["window", "nsa", "lsh", "topk"])
def test_low_precision_and_autocast(name: str) -> None:
    """Fails if a layer in bfloat16, or under autocast, has another dtype, or results far from those in float32. (What
    content chooses may differ between precisions, so few results may.)"""
    layer, x = build(ALL[name], dtype=torch.bfloat16), draw().bfloat16()
    wide = copy.deepcopy(layer).float()
    truth = attend(wide, x.float(), key_padding_mask=PADDING, is_causal=True)
    found = attend(layer, x, key_padding_mask=PADDING, is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attend(wide, x.float(), key_padding_mask=PADDING, is_causal=True)
    cast.sum().backward()
    for out in (found, cast):
        assert out.dtype == torch.bfloat16
        error = (out.float() - truth)[~PADDING].abs().amax(-1) / truth[~PADDING].abs().amax(-1)
        assert error.median() < 0.05


def test_lsh_seeds() -> None:
    """Fails if layers share hashes without a seed, do not with one, or do not begin anew as they were."""
    own = [build(LSH()).mixer.rotations for _ in range(2)]
    assert not torch.equal(*own)
    mixers = [build(LSH(seed=5)).mixer for _ in range(2)]
    assert torch.equal(mixers[0].rotations, mixers[1].rotations)
    mixers[0].rotations.zero_()
    mixers[0].reset_parameters()
    assert torch.equal(mixers[0].rotations, mixers[1].rotations)


def test_masks_are_made_once() -> None:
    """Fails if two layers or calls that need the same mask make it twice, calls that need another get the same, or the
    masks of ever new lengths are all kept."""
    options = Longformer(3, global_tokens=[0, 4])
    mixers = [build(made).mixer for made in (options, Longformer(3, global_tokens=(0, 4)), Longformer(3))]
    x = torch.empty(1, HEADS, 33, 4)
    masks = [mixer.block_mask(x, x, causal=True) for mixer in (*mixers, mixers[0])]
    assert masks[0] is masks[1] is masks[3]
    assert masks[2] is not masks[0]
    assert mixers[0].block_mask(x, x, causal=False) is not masks[0]
    assert mixers[0].block_mask(x[:, :, :32], x[:, :, :32], causal=True) is not masks[0]
    for length in range(1, 50):
        mixers[0].block_mask(x[:, :, :1].expand(-1, -1, length, -1), x, causal=True)
    cached = sparse_mixers._pattern_mask.cache_info()
    assert cached.currsize <= cached.maxsize < 49


@pytest.mark.parametrize("options", [Window(11), BigBird(1, 1, 2, block_size=128)], ids=str)
def test_a_mask_made_in_inference_mode_serves_training(options: Mechanism) -> None:
    """Fails if the cached mask holds inference tensors, which autograd cannot save."""
    sparse_mixers._pattern_mask.cache_clear()
    layer, x = build(options), draw()
    with torch.inference_mode():
        expected = attend(layer, x, is_causal=True)
    found = attend(layer, x, is_causal=True)
    found.sum().backward()
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_pattern_compiles_in_one_graph(name: str) -> None:
    """Fails on a graph break, or if another length, which makes lengths symbols, gets the mask of the first."""
    torch.compiler.reset()
    layer, x = build(PATTERNS[name]), draw()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for length in (LENGTH, 50):
        part = x[:, :length]
        assert_close(attend(compiled, part, is_causal=True), attend(layer, part, is_causal=True), **EXACT)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Support for mismatched")
@pytest.mark.parametrize(("name", "causal"), CASES)
def test_replaced_encoder(name: str, causal: bool) -> None:
    """Fails if a replaced encoder, in training or at inference, with padding and torch's causal mask, is not one whose
    layers attend under the pattern, or restoring does not undo it."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    theirs = nn.TransformerEncoder(layer, 2)
    ours = copy.deepcopy(theirs)
    report = replace_attention(ours, mechanism=ALL[name])
    assert len(report.names("replaced")) == 2
    x = draw()
    options: dict[str, Any] = {"src_key_padding_mask": PADDING}
    if causal:
        options |= {"mask": nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)}
    for mode in (True, False):
        found = ours.train(mode)(x, **options, is_causal=causal)
        assert found.isfinite().all()
        if name in PATTERNS:
            mask = hidden(dense(name, causal))
            masked = theirs.train(mode)(x, mask=mask, src_key_padding_mask=PADDING)
            assert_close(found.where(~PADDING[..., None], 0), masked.where(~PADDING[..., None], 0), **EXACT)
    ours.train()(x, **options, is_causal=causal).square().sum().backward()
    own = [p for name, p in ours.named_parameters() if "rotations" not in name]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own)
    restore_attention(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_replaced_layers_keep_dropout() -> None:
    """Fails if a report tells to switch dropout off where it works, or does not where it cannot."""
    for options, told in ((Window(3), False), (TopK(2), False), (LSH(), True), (NSA(), True)):
        report = replace_attention(nn.MultiheadAttention(EMBED, HEADS, 0.1), mechanism=options)
        assert ("set its dropout to 0.0" in report[0].reason) == told


SMALL = {"vocab_size": 29, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 150}


def model_of(mechanism: Mechanism | str, **config: Any) -> Transformer:
    model = Transformer(TransformerConfig(**(SMALL | config), mechanism=mechanism)).double()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "mixer" not in name:
            parameter.data.mul_(6)
    return model


@pytest.mark.parametrize("name", ["window", "longformer", "bigbird", "strided", "fixed", "lsh", "topk", "nsa"])
def test_model_trains(name: str) -> None:
    """Fails if a mechanism by its name makes no model of it, or a step down the gradient does not lower the loss."""
    model = Transformer(TransformerConfig(**SMALL, mechanism=name))
    assert model.blocks[0].attention.mixer.name == name
    tokens = torch.randint(29, (2, 100))
    losses = []
    for _ in range(3):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        model.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.3 * parameter.grad
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", [*PATTERNS, "nsa"])
def test_model_does_not_see_the_future(name: str) -> None:
    """Fails if a token changes an earlier logit. (With LSH and top-k it may: it has a part in the choice of keys.)"""
    model = model_of(ALL[name]).requires_grad_(False)
    tokens = torch.randint(29, (1, 90))
    changed = tokens.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 29
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same[:40].all()
    assert not same[40]


def test_model_with_a_window_equals_the_window_of_attention() -> None:
    """Fails if grouped key heads, rotary positions or scale differ from those of plain attention with a window."""
    tokens = torch.randint(29, (2, 80))
    plain = model_of("flash", window=6)
    model = model_of(Window(5))
    model.load_state_dict(plain.state_dict())
    assert_close(model(tokens), plain(tokens), **EXACT)
    encoder = model_of(Window(5), causal=False)
    encoder.load_state_dict(plain.state_dict())
    assert not torch.allclose(encoder(tokens), plain(tokens))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "paged"])
@pytest.mark.parametrize("name", ["window", "longformer", "longformer-dilated", "strided", "fixed"])
def test_cached_generation(name: str, kind: str) -> None:
    """Fails if a token over the cache sees other keys than in the whole sequence: prompts of several lengths, several
    tokens at once, sequences in another order."""
    model = model_of(PATTERNS[name])
    cache = KVCache.static(model, 3) if kind == "static" else KVCache.paged(model, 60, page_size=16)
    rows = [torch.randint(29, (n,)).tolist() for n in (61, 3, 20)]
    tokens = torch.tensor([row + [0] * (61 - len(row)) for row in rows])
    model.hidden(tokens, cache, [len(row) for row in rows])
    for number in (1, 5, 1):
        new = torch.randint(29, (3, number))
        rows = [row + more for row, more in zip(rows, new.tolist(), strict=True)]
        found = model(new, cache=cache)
        for logits, row in zip(found, rows, strict=True):
            assert_close(logits, model(torch.tensor([row]))[0, -number:], **EXACT)
        cache.reorder([2, 0, 1])
        rows = [rows[b] for b in (2, 0, 1)]


@pytest.mark.parametrize("name", ["longformer", "fixed"])
def test_generated_tokens(name: str) -> None:
    """Fails if text drawn with the same numbers is another one with a cache of either kind than without."""
    model = model_of(PATTERNS[name]).requires_grad_(False)
    prompts = [torch.randint(29, (n,)) for n in (5, 30, 1)]
    anew, *others = (
        generate(model, prompts, 40, temperature=3.0, generator=torch.Generator().manual_seed(7), cache=kind)
        for kind in (None, "static", "paged")
    )
    for other in others:
        assert all(map(torch.equal, anew, other))
    assert len({token for row in anew for token in row.tolist()}) > 2


@pytest.mark.parametrize("name", ["bigbird", *BY_CONTENT])
def test_generation_without_a_cache(name: str) -> None:
    """Fails if a mechanism that no cache serves is given one in silence, or cannot generate without."""
    model = model_of(ALL[name]).requires_grad_(False)
    for kind in ("static", "paged"):
        with pytest.raises(ValueError, match="fastattn: model must be causal with mechanism 'flash' to have keys"):
            generate(model, [[1, 2]], 3, cache=kind)
    assert len(generate(model, [[1, 2]], 3, cache=None)[0]) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(-1), "window.* must be at least 0, got -1"),
        (lambda: Window((1, 2, 3)), r"window must be an int or a pair .*got \(1, 2, 3\)"),
        (lambda: Window("wide"), "window must be an int or a pair"),
        (lambda: Longformer(2, -1), "global_tokens must be at least 0, got -1"),
        (lambda: Longformer(2, [1, -2]), r"global_tokens\[1\] must be at least 0, got -2"),
        (lambda: Longformer(2, dilation=0), "dilation must be at least 1, got 0"),
        (lambda: BigBird(2), "window_blocks must be odd, got 2"),
        (lambda: BigBird(block_size=65), "block_size must be of 16, .*got 65"),
        (lambda: BigBird(block_size=(64, 64)), "block_size must be an int"),
        (lambda: BigBird(seed=None), "seed must be an int"),
        (lambda: Strided(0), "stride must be at least 1, got 0"),
        (lambda: Fixed(4, 5), "summary must be at most stride = 4, got 5"),
        (lambda: LSH(0), "rounds must be at least 1, got 0"),
        (lambda: LSH(buckets=3), "buckets must be even, got 3"),
        (lambda: LSH(seed=-1), "seed must be None or an int"),
        (lambda: TopK(0), "k must be at least 1, got 0"),
        (lambda: TopK(block_size=8), "block_size must be of 16, .*got 8"),
        (lambda: NSA(selected=2), "selected must be at least 3, got 2"),
        (lambda: NSA(compress_stride=24), "compress_block must be a multiple of compress_stride = 24, got 32"),
        (lambda: NSA(compress_block=128), "compress_block must be at most select_block = 64, got 128"),
        (lambda: build(Window(), add_bias_kv=True), "add_bias_kv must be off with window"),
        (lambda: build("topk", add_zero_attn=True), "add_zero_attn must be off with topk"),
        (lambda: build("lsh", 0.1), r"dropout must be off with lsh, got 0\.1"),
        (lambda: build("nsa", backend="none"), "backend must be None or one of"),
    ],
)
def test_option_errors(make: Callable[[], Any], message: str) -> None:
    """Fails if options that cannot work are accepted, or the message does not name the argument and what was given."""
    with pytest.raises((TypeError, ValueError), match=f"fastattn: .*{message}"):
        make()


def test_call_errors() -> None:
    """Fails if a call that the mechanism cannot run is run, or the message does not say why."""
    x, y = draw(2, 6), draw(2, 5)
    for name in ("window", "bigbird", "topk"):
        layer = build(ALL[name])
        with pytest.raises(ValueError, match=f"query and key must be of one length with {name}, .* got 6 and 5"):
            layer(x, y, y)
        with pytest.raises(ValueError, match=f"{name}, .* got 6 and 5"):
            layer.mixer(*(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (x, y, y)), None, causal=True)
        with pytest.raises(ValueError, match="initial_state and return_state must be off"):
            layer.mixer(x, x, x, None, causal=True, return_state=True)
    for name in ("lsh", "nsa"):
        layer = build(ALL[name])
        with pytest.raises(ValueError, match=f"query and key must be the same tensor with {name}"):
            layer(x, x.clone(), x, need_weights=False, is_causal=True)
        with pytest.raises(ValueError, match=f"need_weights must be False with {name}"):
            layer(x, x, x, is_causal=True)
        with pytest.raises(ValueError, match=f"attn_mask must be None with {name}"):
            attend(layer, x, attn_mask=torch.zeros(6, 6))
    with pytest.raises(ValueError, match="must be True with nsa, got False"):
        attend(build(ALL["nsa"]), x)
    with pytest.raises(ValueError, match="must be True with nsa, got False"):
        TransformerConfig(causal=False, mechanism="nsa")
    with pytest.raises(ValueError, match="attention must be 'fastattn' with mechanism 'window', got 'sdpa'"):
        TransformerConfig(attention="sdpa", mechanism="window")
    with pytest.raises(ValueError, match=r"with a linear mechanism to have a state, got .*'window'"):
        StateCache(model_of("window"))
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match="initial_state and return_state must be off with window"):
        build(Window(2)).mixer(q, q, q, None, causal=True, return_state=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_lengths_must_agree() -> None:
    """Fails if nested queries and keys of different lengths pass because the longest of each agree."""
    x, y = (torch.nested.as_nested_tensor([draw(1, n)[0] for n in lengths]) for lengths in ((4, 6), (6, 4)))
    with pytest.raises(ValueError, match=r"query and key must be of one length with window, .* \[4, 6\] and \[6, 4\]"):
        build(Window(2))(x, y, y)
