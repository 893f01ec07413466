"""`fastattn.nn.MultiheadAttention` against `torch.nn.MultiheadAttention` with the same weights.

In float64 both must agree to rounding: outputs, weights and the gradients of all inputs and parameters. A test here
fails if a projection, mask convention, layout, default or gradient differs from torch's, beyond the differences that
the class documents, which have tests of their own.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastattn.nn import MultiheadAttention

EMBED, HEADS, BATCH, LENGTH_Q, LENGTH_K = 12, 3, 4, 5, 7
EXACT = {"rtol": 1e-10, "atol": 1e-12}
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # torch's own, on some masks

CONSTRUCTORS = {
    "packed": {},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 5, "vdim": 9},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "learned_and_zero": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 4},
}
LAYOUTS = ("batch_first", "seq_first", "unbatched")
MASKS = ("none", "padding_bool", "padding_float", "mask_bool", "mask_float", "per_head_float", "bool_bool",
         "float_float", "bool_float", "float_bool", "per_head_bool_float")  # fmt: skip
RESULTS = ({"need_weights": False}, {}, {"average_attn_weights": False})


def _inputs(layout: str, dtype: torch.dtype = torch.float64, **constructor: Any) -> list[Tensor]:
    widths = (EMBED, constructor.get("kdim", EMBED), constructor.get("vdim", EMBED))
    inputs = []
    for length, width in zip((LENGTH_Q, LENGTH_K, LENGTH_K), widths, strict=True):
        shape = {"batch_first": (BATCH, length), "seq_first": (length, BATCH), "unbatched": (length,)}[layout]
        inputs.append(torch.randn(*shape, width, dtype=dtype).requires_grad_())
    return inputs


def _masks(kind: str, layout: str) -> dict[str, Tensor]:
    """Masks named by the types of attn_mask and key_padding_mask; key 0 stays visible, so no row is without keys."""
    batch = 1 if layout == "unbatched" else BATCH
    hides_key = torch.rand(batch, LENGTH_K) < 0.4
    hides_key[:, 0] = False
    hides = torch.rand(batch * HEADS, LENGTH_Q, LENGTH_K) < 0.4
    hides[:, :, 0] = False
    if not kind.startswith("per_head"):
        hides = hides[0]
    padding = hides_key[0] if layout == "unbatched" else hides_key
    padding_float = torch.randn(padding.shape, dtype=torch.float64).masked_fill(padding, -math.inf)
    mask_float = torch.randn(hides.shape, dtype=torch.float64).requires_grad_()
    return {
        "none": {},
        "padding_bool": {"key_padding_mask": padding},
        "padding_float": {"key_padding_mask": padding_float},
        "mask_bool": {"attn_mask": hides},
        "mask_float": {"attn_mask": mask_float},
        "per_head_float": {"attn_mask": mask_float},
        "bool_bool": {"attn_mask": hides, "key_padding_mask": padding},
        "float_float": {"attn_mask": mask_float, "key_padding_mask": padding_float},
        "bool_float": {"attn_mask": hides, "key_padding_mask": padding_float},
        "float_bool": {"attn_mask": mask_float, "key_padding_mask": padding},
        "per_head_bool_float": {"attn_mask": hides, "key_padding_mask": padding_float},
    }[kind]


def _differentiable(layer: nn.Module, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Distinct inputs and masks that want a gradient, and all parameters."""
    tensors = {id(t): t for t in [*inputs, *options.values()] if isinstance(t, Tensor) and t.requires_grad}
    return [*tensors.values(), *layer.parameters()]


def _results(layer: nn.Module, inputs: list[Tensor], options: dict[str, Any], cotangents: list[Tensor]) -> list[Any]:
    """[output, weights or None, *gradients]; draws the cotangents into the list if it is empty."""
    out, weights = layer(*inputs, **options)
    returned = [out] if weights is None else [out, weights]
    if not cotangents:
        cotangents.extend(torch.randn_like(t) for t in returned)
    # add_zero_attn and key biases leave some gradients at zero or unused.
    grads = torch.autograd.grad(
        returned, _differentiable(layer, inputs, options), cotangents, allow_unused=True, materialize_grads=True
    )
    return [out, weights, *grads]


def _assert_same(theirs: nn.Module, ours: nn.Module, inputs: list[Tensor], options: dict[str, Any]) -> None:
    cotangents: list[Tensor] = []
    expected = _results(theirs, inputs, options, cotangents)
    found = _results(ours, inputs, options, cotangents)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert_close(a, b, **EXACT, msg=lambda m, index=index: f"{options.keys()}, result {index}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_same_as_torch(constructor: str, layout: str, twins, fused_calls) -> None:
    """Every mask, result form, layout and constructor. Fails as the module says, or if a call is not fused."""
    options = CONSTRUCTORS[constructor]
    theirs, ours = twins(EMBED, HEADS, batch_first=layout == "batch_first", **options)
    inputs = _inputs(layout, **options)
    for mask in MASKS:
        masks = _masks(mask, layout)
        for result in RESULTS:
            _assert_same(theirs, ours, inputs, masks | result)
    assert len(fused_calls) == len(MASKS) * len(RESULTS)


@pytest.mark.parametrize("constructor", ["packed", "no_bias", "bias_kv"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_inputs(layout: str, constructor: str, twins) -> None:
    """Self-attention and shared key/value project several at once: fails if a slice of the packed weights is wrong."""
    theirs, ours = twins(EMBED, HEADS, batch_first=layout == "batch_first", **CONSTRUCTORS[constructor])
    query, key, _ = _inputs(layout)
    for inputs in ([query, query, query], [query, key, key], [query, query, query.detach().clone()]):
        _assert_same(theirs, ours, inputs, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_in_lower_precision(dtype: torch.dtype) -> None:
    """Output, weights and gradients no further from float64 than twice (gradients: three times) torch's own error."""
    theirs, ours = (cls(32, 4, dtype=dtype, batch_first=True) for cls in (nn.MultiheadAttention, MultiheadAttention))
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(3, 24, 32, dtype=dtype)
    options = {"key_padding_mask": torch.arange(24) >= torch.tensor([[24], [11], [3]])}
    cotangents = [torch.randn(3, 24, 32, dtype=dtype), torch.randn(3, 24, 24, dtype=dtype)]
    results = []
    for layer in (exact, theirs, ours):
        wide = layer is exact
        inputs = [(x.double() if wide else x.clone()).requires_grad_()] * 3
        results.append(_results(layer, inputs, options, [c.double() if wide else c for c in cotangents]))
    for index, (truth, torchs, found) in enumerate(zip(*results, strict=True)):
        assert found.dtype == dtype
        bound = (torchs.double() - truth).norm() * (2 if index < 2 else 3) + torch.finfo(dtype).eps * truth.norm()
        assert (found.double() - truth).norm() <= bound, f"result {index}"


@pytest.mark.parametrize("average", [True, False])
def test_dropped_weights_are_those_of_the_output(average: bool, twins) -> None:
    """Fails if the weights come from before dropout, if other elements were dropped than in the output, or if the
    share or the scale of what is kept is off (5 standard deviations)."""
    p = 0.3
    _, layer = twins(EMBED, HEADS, batch_first=True, dropout=p, kdim=4, add_zero_attn=True)
    query, key, value = torch.randn(8, 40, EMBED), torch.randn(8, 60, 4), torch.randn(8, 60, EMBED)
    inputs = [t.double() for t in (query, key, value)]
    out, weights = layer(*inputs, average_attn_weights=average)
    if average:
        assert weights.shape == (8, 40, 61)
        return
    value_heads = nn.functional.linear(inputs[2], layer.v_proj_weight, layer.in_proj_bias[2 * EMBED :])
    value_heads = value_heads.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    merged = (weights[..., :-1] @ value_heads).transpose(1, 2).flatten(2)  # the last key's value is zero
    assert_close(out, layer.out_proj(merged), **EXACT)
    count = weights.numel()
    assert abs((weights == 0).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / count)
    undropped = layer.eval()(*inputs, average_attn_weights=False)[1]
    assert (undropped > 0).all()
    kept = weights > 0
    assert_close(weights[kept], undropped[kept] / (1 - p), **EXACT)


def test_dropout_follows_the_mode_and_the_generator(twins) -> None:
    """Fails if dropout acts in eval, does not act in training, or ignores torch's generator."""
    _, layer = twins(EMBED, HEADS, dropout=0.5)
    x = torch.randn(LENGTH_Q, BATCH, EMBED, dtype=torch.float64)
    plain = layer.eval()(x, x, x)[0]
    assert torch.equal(plain, layer(x, x, x)[0])
    layer.train()
    torch.manual_seed(3)
    first = layer(x, x, x)[0]
    second = layer(x, x, x)[0]
    torch.manual_seed(3)
    assert torch.equal(first, layer(x, x, x)[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_rows_without_keys_are_zero(kind: str, need_weights: bool, twins) -> None:
    """A fully padded sequence: fails on NaN anywhere, gradients included, or if its attention is not zero."""
    theirs, ours = twins(EMBED, HEADS, batch_first=True)
    inputs = _inputs("batch_first")
    padding = torch.zeros(BATCH, LENGTH_K, dtype=torch.bool)
    padding[1] = True
    mask = padding if kind == "bool" else torch.zeros(padding.shape).masked_fill(padding, -math.inf)
    out, weights = ours(*inputs, key_padding_mask=mask, need_weights=need_weights)
    assert_close(out[1], ours.out_proj.bias.expand(LENGTH_Q, -1), **EXACT)
    expected = theirs(*inputs, need_weights=need_weights)
    others = [0, 2, 3]
    assert_close(out[others], expected[0][others], **EXACT)
    total = out.sum()
    if weights is not None:
        assert (weights[1] == 0).all()
        assert_close(weights[others], expected[1][others], **EXACT)
        total = total + weights.square().sum()
    total.backward()
    for tensor in [*inputs, *ours.parameters()]:
        assert tensor.grad.isfinite().all()
    assert (inputs[1].grad[1] == 0).all()


@pytest.mark.parametrize("constructor", ["packed", "learned_and_zero"])
@pytest.mark.parametrize("padding", ["none", "padding_bool", "padding_float"])
@pytest.mark.parametrize("result", RESULTS, ids=str)
def test_is_causal_alone(result: dict[str, bool], padding: str, constructor: str, twins, fused_calls) -> None:
    """is_causal without a mask equals torch with the top-left causal mask, Lq != Lk; fails if aligned otherwise, if
    learned keys are hidden, or if the call is not handed to the kernel as causal."""
    options = CONSTRUCTORS[constructor]
    theirs, ours = twins(EMBED, HEADS, batch_first=True, **options)
    inputs = _inputs("batch_first", **options)
    masks = _masks(padding, "batch_first") | result
    future = torch.ones(LENGTH_Q, LENGTH_K, dtype=torch.bool).triu(1)
    cotangents: list[Tensor] = []
    expected = _results(theirs, inputs, masks | {"attn_mask": future}, cotangents)
    found = _results(ours, inputs, masks | {"is_causal": True}, cotangents)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or (assert_close(a, b, **EXACT) is None)
    assert fused_calls[0].window_right == 0


@pytest.mark.parametrize("need_weights", [True, False])
def test_is_causal_with_a_mask_is_torchs_hint(need_weights: bool, twins) -> None:
    """A false hint shows who is read: fails unless, as in torch, the flag decides without weights and the mask with."""
    theirs, ours = twins(EMBED, HEADS, batch_first=True)
    inputs = _inputs("batch_first")
    _assert_same(
        theirs, ours, inputs, _masks("mask_bool", "batch_first") | {"is_causal": True, "need_weights": need_weights}
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_padding_stays_one_row_per_sequence(dtype: torch.dtype, twins, fused_calls) -> None:
    """Fails if a key_padding_mask, alone or with a causal hint, reaches the kernel expanded to (..., L, S)."""
    _, layer = twins(EMBED, HEADS, batch_first=True, dtype=torch.float32)
    x = torch.randn(BATCH, LENGTH_Q, EMBED)
    padding = torch.zeros(BATCH, LENGTH_Q, dtype=dtype)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH_Q)
    layer(x, x, x, key_padding_mask=padding, need_weights=False)
    layer(x, x, x, key_padding_mask=padding, need_weights=False, attn_mask=causal, is_causal=True)
    for problem in fused_calls:
        assert problem.attn_mask.shape == (BATCH, 1, 1, LENGTH_Q)
        assert problem.attn_mask.dtype == dtype
    assert fused_calls[1].window_right == 0


def test_same_signature_as_torch() -> None:
    """Fails if an argument, its order or its default differs; what fastattn adds is keyword-only."""
    theirs = inspect.signature(nn.MultiheadAttention).parameters
    ours = inspect.signature(MultiheadAttention).parameters
    added = [p for name, p in ours.items() if name not in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in added)
    for mine, torchs in (
        (ours, theirs),
        *([inspect.signature(cls.forward).parameters for cls in (MultiheadAttention, nn.MultiheadAttention)],),
    ):
        common = [(name, p.default, p.kind) for name, p in mine.items() if p not in added]
        assert common == [(name, p.default, p.kind) for name, p in torchs.items()]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_same_initialisation_and_state_dict(constructor: str) -> None:
    """Fails if names, shapes, order or the numbers drawn differ, or a checkpoint of either does not load strictly."""
    layers = []
    for cls in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(11)
        layer = cls(EMBED, HEADS, **CONSTRUCTORS[constructor])
        layer._reset_parameters()
        layers.append(layer)
    theirs, ours = layers
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_are_whole(copier, twins, fused_calls) -> None:
    """Fails if a copy loses its backend or result, or falls back to torch's inference path inside an encoder layer."""
    theirs, ours = twins(EMBED, 2, batch_first=True)
    ours.backend = "reference"
    duplicate = copier(ours)
    inputs = _inputs("batch_first")
    assert_close(duplicate(*inputs)[0], theirs(*inputs)[0], **EXACT)
    encoder = nn.TransformerEncoderLayer(EMBED, 2, 8, batch_first=True, dtype=torch.float64).eval()
    encoder.self_attn = duplicate
    fused_calls.clear()
    with torch.no_grad():
        encoder(inputs[0])
    assert [problem.backend for problem in fused_calls] == ["reference"]


@pytest.mark.parametrize(
    "options",
    [
        {"need_weights": False, "is_causal": True},
        {"key_padding_mask": torch.arange(LENGTH_Q) >= torch.tensor([[5], [3], [1], [5]])},
    ],
    ids=["causal", "padding"],
)
def test_compiles_in_one_graph(options: dict[str, Any], twins) -> None:
    """Fails on a graph break, such as a look at a mask's values, or if compiled results differ from eager ones."""
    _, ours = twins(EMBED, HEADS, batch_first=True, dtype=torch.float32, add_bias_kv=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, LENGTH_Q, EMBED, requires_grad=True)
    cotangents: list[Tensor] = []
    expected = _results(ours, [x, x, x], options, cotangents)
    found = _results(compiled, [x, x, x], options, cotangents)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or (assert_close(a, b) is None)


def test_compiles_with_lengths_and_masks_that_vary(twins) -> None:
    """Fails if code compiled for any length takes a mask's sizes, equal to the inputs', for others."""
    torch._dynamo.reset()
    _, ours = twins(EMBED, HEADS, batch_first=True, dtype=torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for length, masked in ((4, False), (5, False), (6, True), (7, True)):
        x = torch.randn(length - 2, length, EMBED)
        options = {"key_padding_mask": torch.arange(length).expand(length - 2, -1) > 2} if masked else {}
        found, expected = (layer(x, x, x, need_weights=False, **options)[0] for layer in (compiled, ours))
        assert_close(found, expected)


def test_autocast(twins) -> None:
    """Fails if results are not in autocast's dtype, if a float32 mask or a learned key breaks them, if their error is
    more than twice torch's under autocast, or if the weights' scores are rounded to bfloat16."""
    theirs, ours = twins(EMBED, HEADS, batch_first=True, dtype=torch.float32, add_bias_kv=True)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(BATCH, 32, EMBED)
    mask = torch.randn(32, 32)
    truth = exact(x.double(), x.double(), x.double(), attn_mask=mask.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (layer(x, x, x, attn_mask=mask) for layer in (theirs, ours))
    for a, b, exact_result in zip(found, expected, truth, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - exact_result).norm() <= 2 * (b.double() - exact_result).norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        per_head = ours(x, x, x, attn_mask=mask, average_attn_weights=False)[1]
    # Rounding each weight to bfloat16 moves a row's sum by at most 2^-9; scores rounded to it would move it further.
    assert (per_head.double().sum(dim=-1) - 1).abs().max() < 2**-8
    (found[0].float().sum() + found[1].float().square().sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


def _call(layer: MultiheadAttention, *shapes: tuple[int, ...], **options: Any) -> None:
    layer(*(torch.zeros(shape) for shape in shapes), **options)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((2, 3, 12), (2, 4, 12), (4, 12)), {}, ValueError, "must all be 3-D"),
        (((1, 2, 3, 12),) * 3, {}, ValueError, "must all be 3-D"),
        (((2, 3, 8), (2, 4, 12), (2, 4, 12)), {}, ValueError, "query's last dimension must be 12"),
        (((2, 3, 12), (2, 4, 8), (2, 4, 12)), {}, ValueError, "key's last dimension must be 12"),
        (((2, 3, 12), (2, 4, 12), (2, 4, 8)), {}, ValueError, "value's last dimension must be 12"),
        (((2, 3, 12), (2, 4, 12), (2, 5, 12)), {}, ValueError, "key and value must agree"),
        (((2, 3, 12), (1, 4, 12), (1, 4, 12)), {}, ValueError, "same batch size"),
        (
            ((2, 3, 12),) * 3,
            {"key_padding_mask": torch.zeros(3, 3)},
            ValueError,
            r"key_padding_mask must have shape \(2, 3\)",
        ),
        (((2, 3, 12),) * 3, {"attn_mask": torch.zeros(3, 4)}, ValueError, r"\(3, 3\) or \(6, 3, 3\), got \(3, 4\)"),
        (((2, 3, 12),) * 3, {"attn_mask": torch.zeros(2, 3, 3)}, ValueError, "attn_mask must have shape"),
        (((2, 3, 12),) * 3, {"attn_mask": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "bool or floating point"),
        (((2, 3, 12),) * 3, {"key_padding_mask": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "bool or floating"),
    ],
)
def test_bad_inputs(shapes, options, error, message: str) -> None:
    """Fails if a wrong shape or dtype is computed with, or the message does not name the argument."""
    with pytest.raises(error, match=message):
        _call(MultiheadAttention(EMBED, HEADS, batch_first=True), *shapes, **options)


def test_backend_argument(fused_calls) -> None:
    """Fails if an unknown backend is accepted, a known one is not asked for, or repr hides it."""
    with pytest.raises(ValueError, match="backend"):
        MultiheadAttention(EMBED, HEADS, backend="nonesuch")
    layer = MultiheadAttention(EMBED, HEADS, backend="reference")
    x = torch.zeros(2, EMBED)
    layer(x, x, x)
    assert fused_calls[0].backend == "reference"
    assert "backend='reference'" in repr(layer)
