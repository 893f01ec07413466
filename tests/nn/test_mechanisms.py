"""Layers with another mechanism than softmax attention, against formulas written out here, in float64.

The formulas take each mechanism's definition literally: all weights of all pairs, or one step after the other. They
share nothing with the package but the parameters. Outputs and the gradients of all inputs and parameters must agree.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fastattn.nn
from fastattn.nn import (
    GLA,
    Delta,
    Linear,
    Linformer,
    LinformerProjection,
    Mechanism,
    MultiheadAttention,
    Nystrom,
    Performer,
    Retention,
)
from fastattn.nn.mechanisms import NAMES, resolve
from fastattn.nn.mixers import Heads

EMBED, HEADS, BATCH, LENGTH = 12, 3, 3, 9
EXACT = {"rtol": 1e-9, "atol": 1e-11}
PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [5], [1]])

OPTIONS: dict[str, Mechanism] = {
    "performer": Performer(7),
    "performer-hyperbolic": Performer(5, features="hyperbolic", orthogonal=False),
    "performer-relu": Performer(6, features="relu"),
    "linear": Linear(),
    "linear-plain": Linear("relu", normalize=False),
    "retention": Retention(),
    "gla": GLA(gate_rank=3, temperature=4.0),
    "delta": Delta(),
    "delta-ungated": Delta(gated=False),
    "linformer": Linformer(LENGTH + 2, 4),
    "linformer-heads": Linformer(LENGTH, 3, share="none"),
    "nystrom": Nystrom(3, iterations=3),
    "nystrom-conv": Nystrom(2, conv_kernel=3),
}
RECURRENT = ("retention", "gla", "delta")
BOTH_WAYS = ("performer", "linear")
CASES = [
    (name, causal)
    for name in OPTIONS
    for causal in (True, False)
    if name.startswith(BOTH_WAYS) or causal == name.startswith(RECURRENT)
]


def build(options: Mechanism, dtype: torch.dtype = torch.float64, **layer: Any) -> MultiheadAttention:
    made = MultiheadAttention(EMBED, HEADS, mechanism=options, dtype=dtype, **({"batch_first": True} | layer))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # torch starts biases at zero, norms at one
    return made


def attend(layer: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """Self-attention's output."""
    return layer(x, x, x, need_weights=False, **options)[0]


def normalised(weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return torch.where(total == 0, 0, weights / total.masked_fill(total == 0, 1))


def gated_norm(mixer: Any, out: Tensor, x: Tensor) -> Tensor:
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-5) * mixer.output.weight
    if mixer.output.gate is not None:
        z = x @ mixer.output.gate.weight.T
        out = out * (z * torch.sigmoid(z)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return out


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, scale: float) -> Tensor:
    """S <- diag(decay) S + k (v - [S^T k])^T, out = scale S^T q; decay (B, H, N, D or 1), the rest (B, H, N, D)."""
    state, outs = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[2]):
        if decay is not None:
            state = decay[:, :, t, :, None] * state
        write = v[:, :, t]
        if beta is not None:
            write = beta[:, :, t, None] * (write - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, :, t], write)
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outs, 2)


def mixed(mixer: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, keep: Tensor, causal: bool) -> Tensor:
    """The mechanism's definition on heads (B, H, N, D), masked keys and values 0."""
    options, length, head_dim = mixer.options, q.shape[2], q.shape[3]
    scale = head_dim**-0.5
    seen = keep[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    if isinstance(options, Performer):
        w = torch.cat([mixer.projection, -mixer.projection]) if options.features == "hyperbolic" else mixer.projection
        if options.features == "relu":
            phi, psi = (torch.relu(t @ w.T) + 1e-3 for t in (q, k))
        else:
            phi, psi = (torch.exp(t @ w.T * scale**0.5 - scale * t.square().sum(-1, keepdim=True) / 2) for t in (q, k))
        return normalised(phi @ psi.mT * seen) @ v
    if isinstance(options, Linear):
        phi, psi = (F.elu(t) + 1 if options.feature_map == "elu" else torch.relu(t) for t in (q, k))
        weights = phi @ psi.mT * seen
        return (normalised(weights) if options.normalize else scale * weights) @ v
    if isinstance(options, Retention):
        rate = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=q.dtype))
        steps = keep.cumsum(1)  # padding takes no time
        distance = (steps[:, :, None] - steps[:, None, :]).clamp(min=0)[:, None]
        weights = scale * q @ k.mT * rate[:, None, None] ** distance * seen
        return gated_norm(mixer, weights @ v, x)
    present = keep[:, None, :, None]
    if isinstance(options, GLA):
        logits = F.linear(x @ mixer.decay[0].weight.T, mixer.decay[1].weight, mixer.decay[1].bias)
        decay = torch.sigmoid(logits).pow(1 / options.temperature).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return gated_norm(mixer, recurrence(q, k, v, torch.where(present, decay, 1), None, scale), x)
    if isinstance(options, Delta):
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        beta = torch.sigmoid(x @ mixer.beta.weight.T).mT * keep[:, None]
        decay = None
        if options.gated:
            steps = torch.log1p(torch.exp(F.linear(x, mixer.step.weight, mixer.step.bias)))
            decay = torch.where(present, torch.exp(-mixer.log_rate.exp() * steps).mT[..., None], 1)
        return gated_norm(mixer, recurrence(q, k, v, decay, beta, 1.0), x)
    if isinstance(options, Linformer):
        e, f = (w[..., :length] for w in (mixer.projection.key_weight, mixer.projection.value_weight))
        return torch.softmax(scale * q @ (e @ k).mT, -1) @ (f @ v)
    assert isinstance(options, Nystrom)
    rows = []
    for b in range(len(q)):  # without its padding each sequence is plain
        n = int(keep[b].sum())
        m = min(options.num_landmarks, n)
        segment = F.one_hot(torch.arange(n) * m // n, m).to(q.dtype)
        means = segment.T / segment.sum(0)[:, None]
        q_n, k_n, v_n = (t[b, :, keep[b]] for t in (q, k, v))
        a, c, d = (
            torch.softmax(scale * y @ z.mT, -1)
            for y, z in ((q_n, means @ k_n), (means @ q_n, means @ k_n), (means @ q_n, k_n))
        )
        inverse, eye = c.mT / (c.sum(-1).amax(-1) * c.sum(-2).amax(-1))[:, None, None], torch.eye(m, dtype=q.dtype)
        for _ in range(options.iterations):
            p = c @ inverse
            inverse = inverse @ (13 * eye - p @ (15 * eye - p @ (7 * eye - p))) / 4
        rows.append(F.pad((a @ inverse @ (d @ v_n)), (0, 0, 0, length - n)))
    out = torch.stack(rows)
    if mixer.conv is not None:
        kernel = mixer.conv.weight[:, 0, :, 0]  # (H, width)
        width = kernel.shape[1]
        padded = F.pad(v, (0, 0, (width - 1) // 2, width // 2))
        out = out + sum(kernel[:, i, None, None] * padded[:, :, i : i + length] for i in range(width))
    return out


def formula(layer: MultiheadAttention, x: Tensor, keep: Tensor, causal: bool) -> Tensor:
    """(B, N, E) to (B, N, E)."""
    q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).unflatten(-1, (3, HEADS, -1)).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t * keep[:, None, :, None] for t in (k, v))
    return layer.out_proj(mixed(layer.mixer, q, k, v, x, keep, causal).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("name", "causal"), CASES)
def test_layer_equals_its_formula(name: str, causal: bool, padded: bool) -> None:
    """Fails if a mechanism computes something else than its definition, a gate, norm, scale or mask is off, or a
    gradient of the input or of any parameter is."""
    layer = build(OPTIONS[name])
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64, requires_grad=True)
    keep = ~PADDING if padded else torch.ones(BATCH, LENGTH, dtype=torch.bool)
    options = {"key_padding_mask": PADDING} if padded else {}
    found = attend(layer, x, is_causal=causal, **options)
    expected = formula(layer, x, keep, causal)
    rows = keep[..., None] if name.startswith("nystrom") else torch.ones(1, dtype=torch.bool)
    cotangent = torch.randn_like(found) * rows
    assert_close(found * rows, expected * rows, **EXACT)
    wanted = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(out, wanted, cotangent) for out in (found, expected)), strict=True):
        assert_close(a, b, **EXACT)


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_layouts_and_float_masks(name: str, causal: bool) -> None:
    """Fails if a layout's axes are confused, anywhere a gate reads the input too, or a float mask of 0 and -inf (what
    torch's encoders hand on) is read otherwise than the bool one."""
    layer = build(OPTIONS[name])
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    expected = attend(layer, x, key_padding_mask=PADDING, is_causal=causal)
    as_float = torch.zeros(PADDING.shape).masked_fill(PADDING, -math.inf)
    assert torch.equal(attend(layer, x, key_padding_mask=as_float, is_causal=causal), expected)
    if causal:
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        assert torch.equal(attend(layer, x, key_padding_mask=PADDING, attn_mask=mask, is_causal=True), expected)
    layer.batch_first = False
    found = attend(layer, x.transpose(0, 1), key_padding_mask=PADDING, is_causal=causal)
    assert_close(found.transpose(0, 1), expected, **EXACT)
    assert_close(attend(layer, x[1], key_padding_mask=PADDING[1], is_causal=causal), expected[1], **EXACT)


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_padding_changes_nothing(name: str, causal: bool) -> None:
    """Fails if what stands in padding, NaN included, reaches a result, or a sequence gives with padding what it does
    not give alone."""
    layer = build(OPTIONS[name]).requires_grad_(False)
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    poisoned = x.masked_fill(PADDING[..., None], math.nan)
    found = attend(layer, poisoned, key_padding_mask=PADDING, is_causal=causal)
    for row, length in enumerate((~PADDING).sum(1).tolist()):
        alone = attend(layer, x[row : row + 1, :length], is_causal=causal)
        assert_close(found[row, :length], alone[0], **EXACT)


@pytest.mark.parametrize("name", ["performer", "linear", "linformer", "nystrom"])
def test_cross_attention(name: str) -> None:
    """Queries and keys of two inputs: fails where lengths are confused, or an own width of keys or values is not
    taken."""
    layer = build(OPTIONS[name], kdim=5, vdim=7)
    query, key, value = (torch.randn(BATCH, n, w).double() for n, w in ((4, EMBED), (LENGTH, 5), (LENGTH, 7)))
    found = layer(query, key, value, need_weights=False, key_padding_mask=PADDING)[0]
    assert found.shape == query.shape
    row = layer(query[1:2], key[1:2, :5], value[1:2, :5], need_weights=False)[0]
    assert_close(found[1:2], row, **EXACT)
    changed = layer(query, key, value + 1, need_weights=False, key_padding_mask=PADDING)[0]
    assert (changed - found).abs().amin() > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("name", "causal"), CASES)
def test_nested_inputs(name: str, causal: bool) -> None:
    """Fails if nested sequences do not give what each gives alone, or gradients do not reach them."""
    layer = build(OPTIONS[name])
    rows = [torch.randn(n, EMBED, dtype=torch.float64, requires_grad=True) for n in (5, 9, 1)]
    nested = torch.nested.as_nested_tensor(rows)
    out, weights = layer(nested, nested, nested, need_weights=False, is_causal=causal)
    assert weights is None
    out.to_padded_tensor(0.0).square().sum().backward()
    for row, found in zip(rows, out.unbind(), strict=True):
        leaf = row.detach().requires_grad_()
        alone = attend(layer, leaf, is_causal=causal)
        assert_close(found, alone, **EXACT)
        assert_close(row.grad, torch.autograd.grad(alone.square().sum(), leaf)[0], **EXACT)


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_grouped_query_heads(name: str, causal: bool) -> None:
    """A mixer with fewer key heads equals one with each of them repeated; fails if groups come in another order."""
    sizes = Heads(EMBED, 4, 2, 6)
    grouped = OPTIONS[name].build(sizes, dtype=torch.float64)
    full = OPTIONS[name].build(sizes._replace(kv_heads=4), dtype=torch.float64)
    state = grouped.state_dict()
    for key, tensor in full.state_dict().items():
        if state[key].shape != tensor.shape:  # for each key head
            state[key] = state[key].repeat_interleave(2, 0)
    full.load_state_dict(state)
    query, x = torch.randn(2, 4, LENGTH, 6).double(), torch.randn(2, LENGTH, EMBED).double()
    key, value = torch.randn(2, 2, 2, LENGTH, 6).double()
    repeated = [t.repeat_interleave(2, 1) for t in (key, value)]
    assert_close(grouped(query, key, value, x, causal=causal), full(query, *repeated, x, causal=causal), **EXACT)


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_low_precision_and_autocast(name: str, causal: bool) -> None:
    """Fails if a layer in bfloat16, or under autocast, has another dtype or is far from float64.

    By the median over tokens: where an output is normalised, a rounding turns round one that was nearly zero before.
    """
    layer = build(OPTIONS[name], torch.bfloat16)
    x = torch.randn(BATCH, LENGTH, EMBED).bfloat16()
    truth = attend(copy.deepcopy(layer).double(), x.double(), is_causal=causal)
    found = attend(layer, x, is_causal=causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attend(copy.deepcopy(layer).float(), x.float(), is_causal=causal)
    cast.sum().backward()
    for out in (found, cast):
        assert out.dtype == torch.bfloat16
        assert (out.double() - truth).norm(dim=-1).median() <= 0.03 * truth.norm(dim=-1).median()


def test_learned_feature_map_belongs_to_the_layer() -> None:
    """Fails if a module given as feature map is not trained, saved and moved with the layer."""
    layer = build(Linear(nn.Sequential(nn.Linear(4, 6, dtype=torch.float64), nn.Softplus())))
    assert "mixer.feature_map.0.weight" in layer.state_dict()
    attend(layer, torch.randn(2, 5, EMBED, dtype=torch.float64)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.mixer.parameters())


def test_linformer_projection_shared_between_layers() -> None:
    """Fails if layers given one projection hold copies of it, or one given sizes shares its own."""
    shared = LinformerProjection(LENGTH, 4, share="key_value", dtype=torch.float64)
    layers = nn.ModuleList(build(Linformer(projection=shared)) for _ in range(2))
    assert [p for p in layers.parameters() if p.shape == (4, LENGTH)] == [shared.key_weight]
    own = [build(Linformer(LENGTH, 4)).mixer.projection.key_weight for _ in range(2)]
    assert not torch.equal(*own)


def test_decays_at_the_start() -> None:
    """Fails if gates start where the papers' do not: GLA's memory of some 23 steps, Gated DeltaNet's rates up to 16
    and steps of 0.001 to 0.1."""
    gla = GLA().build(Heads(64, 4, 4, 16))
    log_decay = F.logsigmoid(gla.decay(torch.zeros(1, 64))) / gla.options.temperature
    assert log_decay.mean().item() == pytest.approx(-math.log(2) / 16, abs=0.01)
    delta = Delta().build(Heads(8, 2048, 2048, 4))
    rates, steps = delta.log_rate.exp(), F.softplus(delta.step.bias)
    assert 0 < rates.min() < 0.5 < 15.5 < rates.max() <= 16
    assert 0.99e-3 < steps.min() < 2e-3 < 0.08 < steps.max() < 0.101


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_state_dicts(name: str, causal: bool) -> None:
    """torch's state dict gives the projections and leaves the rest; the layer's own gives all. Fails otherwise, or if
    a mechanism changes how the projections start."""
    torch.manual_seed(4)
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    torch.manual_seed(4)
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, mechanism=OPTIONS[name])
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor)
    source = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    missing, unexpected = ours.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(ours.in_proj_weight, source.in_proj_weight)
    assert not unexpected
    assert all(key.startswith("mixer.") for key in missing)
    other = build(OPTIONS[name])
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, EMBED, dtype=torch.float64)
    assert torch.equal(attend(other, x, is_causal=causal), attend(ours, x, is_causal=causal))


@pytest.mark.parametrize(("name", "causal"), [("performer", True), ("delta", True), ("linformer", False)])
def test_compiles_in_one_graph(name: str, causal: bool) -> None:
    """Fails on a graph break in a mixer, or a result that differs from the eager one."""
    torch._dynamo.reset()
    layer = build(OPTIONS[name])
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(attend(compiled, x, is_causal=causal), attend(layer, x, is_causal=causal), **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: resolve("softmax"), "mechanism must be one of flash, performer, linformer, .*got 'softmax'"),
        (lambda: resolve(3), "mechanism must be a name or options such as Performer.*got int"),
        (lambda: resolve(Performer), "must be a name or options such as Performer.*got type"),
        (lambda: MultiheadAttention(8, 2, mechanism="linformer"), r"must be Linformer\(seq_len, num_keys\)"),
        (lambda: Performer(0), "num_features must be at least 1, got 0"),
        (lambda: Performer(features="trig"), "features must be one of positive, hyperbolic, relu, got 'trig'"),
        (lambda: Performer(redraw_interval=0), "redraw_interval must be at least 1, got 0"),
        (lambda: Performer(seed=-1), "seed must be None or an int from 0"),
        (lambda: Performer(orthogonal=1), "orthogonal must be a bool, got int"),
        (lambda: Linear("gelu"), "feature_map must be one of identity, elu, .*got 'gelu'"),
        (lambda: Linear(normalize=None), "normalize must be a bool, got NoneType"),
        (lambda: GLA(gate_rank=0), "gate_rank must be at least 1, got 0"),
        (lambda: GLA(temperature=0), "temperature must be above 0, got 0"),
        (lambda: Delta(gated="yes"), "gated must be a bool, got str"),
        (lambda: Linformer(8), "num_keys must be an int, got NoneType"),
        (lambda: Linformer(8, 9), "num_keys must be at most seq_len = 8, got 9"),
        (lambda: Linformer(projection=nn.Linear(2, 2)), "projection must be a LinformerProjection, got Linear"),
        (lambda: Linformer(8, 2, projection=LinformerProjection(8, 2)), "projection must come alone"),
        (lambda: Nystrom(0), "num_landmarks must be at least 1, got 0"),
        (lambda: Nystrom(conv_kernel=0), "conv_kernel must be at least 1, got 0"),
        (lambda: MultiheadAttention(8, 2, 0.1, mechanism="linear"), "dropout must be off with linear, got 0.1"),
        (lambda: MultiheadAttention(8, 2, add_bias_kv=True, mechanism="gla"), "add_bias_kv must be off with gla"),
        (lambda: MultiheadAttention(8, 2, add_zero_attn=True, mechanism="gla"), "add_zero_attn must be off with gla"),
        (lambda: MultiheadAttention(8, 2, backend="sdpa", mechanism="gla"), "backend must be None or one of"),
    ],
)
def test_option_errors(options: Any, message: str) -> None:
    """Fails if options that cannot work are accepted, or the message does not name the argument and what was given."""
    with pytest.raises((TypeError, ValueError), match=f"fastattn: .*{message}"):
        options()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("performer", {"need_weights": True}, "need_weights must be False with performer"),
        (
            "performer",
            {"attn_mask": torch.zeros(5, 5)},
            "attn_mask must be None with performer, or come with",
        ),
        ("linear", {"key_padding_mask": torch.full((2, 5), -1.0)}, "key_padding_mask must be bool, or hold 0 and -inf"),
        ("linear", {"key_padding_mask": torch.zeros(2, 4)}, r"key_padding_mask must have shape \(2, 5\)"),
        ("retention", {}, "is_causal.* must be True with retention, got False"),
        ("gla", {}, "must be True with gla, got False"),
        ("delta", {}, "must be True with delta, got False"),
        (
            "linformer",
            {"is_causal": True},
            "causal must be False with Linformer attention.*its projected keys",
        ),
        ("nystrom", {"is_causal": True}, "causal must be False with Nystrom attention.*its landmarks"),
    ],
)
def test_call_errors(name: str, options: dict[str, Any], message: str) -> None:
    """Fails if a call that the mechanism cannot run is run, or the message does not say what to do."""
    x = torch.randn(2, 5, EMBED, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"fastattn: .*{message}"):
        build(OPTIONS[name])(x, x, x, **({"need_weights": False} | options))


def test_more_call_errors() -> None:
    """Fails if gates are computed from an input that is not the queries' and keys', dropout is ignored in training, or
    a state is carried past a feature map that knows positions."""
    x, y = torch.randn(2, 2, 5, EMBED, dtype=torch.float64)
    for name in RECURRENT:
        with pytest.raises(ValueError, match=f"query and key must be the same tensor with {name}"):
            build(OPTIONS[name])(x, y, y, need_weights=False, is_causal=True)
    with pytest.raises(ValueError, match="conv_kernel must be None where query and key are not the same tensor"):
        build(OPTIONS["nystrom-conv"])(x, y, y, need_weights=False)
    layer = build(Linear())
    layer.dropout = 0.2
    with pytest.raises(ValueError, match=r"dropout must be off with linear.*got 0\.2 in training"):
        attend(layer, x)
    attend(layer.eval(), x)
    mixer = Linear("cosformer").build(Heads(EMBED, HEADS, HEADS, 4))
    with pytest.raises(ValueError, match="feature_map must not be cosformer where a state is carried"):
        mixer(*torch.randn(3, 1, HEADS, 5, 4), None, causal=True, return_state=True)


def test_every_name_has_options() -> None:
    """Fails if a name is not known, or options are not exported."""
    for name in NAMES[1:]:
        options = resolve(name, seq_len=32)
        assert options.mixer.name == name
        assert type(options) is getattr(fastattn.nn, type(options).__name__)
    assert resolve("flash") is None
    assert resolve("linformer", 32) == Linformer(32, 8)
