"""`linformer_attention` and `LinformerProjection` against the formula, position by position, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastattn
from fastattn.linear import lowrank
from fastattn.linear.linformer import linformer_attention
from fastattn.nn.linformer import LinformerProjection

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 3, 4, 2, 5, 11, 6, 3
KINDS = ["linear", "mean", "max", "conv"]


def random_inputs(keys: int = KEYS, heads: int = HEADS, key_heads: int = KEY_HEADS) -> list[Tensor]:
    """Query, key and value as views of (B, S, H, D) memory, that require gradients."""
    shapes = ((QUERIES, heads, DIM), (keys, key_heads, DIM), (keys, key_heads, VALUE_DIM))
    return [torch.randn(BATCH, *shape, dtype=F64).transpose(1, 2).requires_grad_() for shape in shapes]


def random_mask(keys: int = KEYS) -> Tensor:
    """One sequence with scattered keys, one with the first three only, one with none."""
    mask = torch.rand(BATCH, keys) < 0.6
    mask[0, 1], mask[1], mask[2] = True, torch.arange(keys) < 3, False
    return mask


def softmax_rows(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One head: (Nq, D), (K, D) and (K, Dv) to (Nq, Dv)."""
    return torch.softmax(scale * query @ key.mT, -1) @ value if len(key) else query.new_zeros(len(query), VALUE_DIM)


def by_head(
    project: Callable[[Tensor, str, int, Tensor], Tensor], inputs: list[Tensor], mask: Tensor, scale: float
) -> Tensor:
    """Attention one head at a time; project(x, "key" or "value", key head, positions) to the positions attended to."""
    query, key, value = inputs
    group = query.shape[1] // key.shape[1]
    heads = []
    for b in range(query.shape[0]):
        present = mask[b].nonzero().flatten()
        for h in range(query.shape[1]):
            k, v = (project(x[b, h // group], n, h // group, present) for x, n in ((key, "key"), (value, "value")))
            heads.append(softmax_rows(query[b, h], k, v, scale))
    return torch.stack(heads).view(*query.shape[:3], -1)


def by_matrices(e: Tensor, f: Tensor, inputs: list[Tensor], mask: Tensor, scale: float) -> Tensor:
    def project(x: Tensor, name: str, head: int, present: Tensor) -> Tensor:
        matrix = e if name == "key" else f
        matrix = matrix[head] if matrix.dim() == 3 else matrix
        return matrix[:, present] @ x[present]

    return by_head(project, inputs, mask, scale)


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Equal, with equal gradients of a random weighting."""
    assert_close(found, expected, **EXACT)
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, weight), torch.autograd.grad(expected, leaves, weight), strict=True
    ):
        assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("longer", [0, 4])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_formula(scale: float | None, per_head: bool, longer: int, masked: bool) -> None:
    """Output and gradients, of E and F too; fails if heads share wrongly, columns beyond the keys are used, a masked
    key is projected, or the default scale is another."""
    inputs = random_inputs()
    heads = (KEY_HEADS,) if per_head else ()
    e, f = (torch.randn(*heads, 4, KEYS + longer, dtype=F64, requires_grad=True) for _ in range(2))
    mask = random_mask() if masked else torch.ones(BATCH, KEYS, dtype=torch.bool)
    found = linformer_attention(
        *inputs, key_projection=e, value_projection=f, key_mask=mask if masked else None, scale=scale
    )
    expected = by_matrices(e, f, inputs, mask, DIM**-0.5 if scale is None else scale)
    assert_same(found, expected, [*inputs, e, f])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_keys_may_hold_anything(kind: str, poison: float) -> None:
    """Fails if what a masked key or value holds reaches an output or a gradient."""
    layer = LinformerProjection(KEYS, 4, kind=kind, dtype=F64)
    inputs, mask = random_inputs(), random_mask()
    hidden = ~mask[:, None, :, None]
    poisoned = [inputs[0], *(x.detach().masked_fill(hidden, poison).requires_grad_() for x in inputs[1:])]
    results = []
    for leaves in (inputs, poisoned):
        out = layer(*leaves, key_mask=mask)
        gradients = torch.autograd.grad(out.square().sum(), [*leaves, *layer.parameters()])
        results.append([out, *gradients])
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected, **EXACT)
    assert not results[1][0][2].any()  # the sequence without keys


def test_identity_is_softmax_attention() -> None:
    """With E = F = I, and with windows of one key each, it is full attention; fails if a position is lost."""
    inputs = random_inputs()
    expected = fastattn.attention(*inputs)
    identity = torch.eye(KEYS, dtype=F64)
    assert_close(linformer_attention(*inputs, key_projection=identity, value_projection=identity), expected, **EXACT)
    for kind in KINDS[1:]:
        assert_close(LinformerProjection(KEYS, KEYS, kind=kind, dtype=F64)(*inputs), expected, **EXACT)


def test_error_falls_with_the_number_of_keys() -> None:
    """Means of smooth keys and values: twice the keys, at most 0.6 of the error; fails if windows are out of place."""
    length = 256
    t = torch.linspace(0, 1, length, dtype=F64)[:, None]
    phases, speeds = 6 * torch.rand(3, 1, 2, 1, 8, dtype=F64), 4 + 4 * torch.rand(3, 1, 2, 1, 8, dtype=F64)
    inputs = list(torch.sin(speeds * t + phases))
    exact = fastattn.attention(*inputs)
    errors = [(LinformerProjection(length, k, kind="mean")(*inputs) - exact).norm() for k in (8, 16, 32, 64, 128)]
    assert all(after < 0.6 * before for before, after in pairwise(errors))


def windows(seq_len: int, num_keys: int) -> list[list[int]]:
    """Positions 0 ... seq_len - 1 dealt to windows in order, the first ones getting one more."""
    sizes = [seq_len // num_keys + (j < seq_len % num_keys) for j in range(num_keys)]
    return [list(range(sum(sizes[:j]), sum(sizes[: j + 1]))) for j in range(num_keys)]


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("share", ["none", "heads", "key_value"])
@pytest.mark.parametrize(("seq_len", "keys"), [(12, 12), (14, 14), (14, 11), (14, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_windows(kind: str, share: str, seq_len: int, keys: int, masked: bool) -> None:
    """Pooling window by window, ragged ones too, output and gradients of parameters; fails if a mean counts masked
    keys, a maximum sees the zeros that fill windows up, an empty window draws attention, or heads swap kernels."""
    layer = LinformerProjection(seq_len, 4, num_heads=KEY_HEADS, kind=kind, share=share, dtype=F64)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    inputs = random_inputs(keys)
    inputs[1].data -= 5  # all below zero, in most windows
    mask = random_mask(keys) if masked else torch.ones(BATCH, keys, dtype=torch.bool)

    def project(x: Tensor, name: str, head: int, present: Tensor) -> Tensor:
        weight = layer.value_weight if name == "value" and share != "key_value" else layer.key_weight
        kernel = weight[head] if share == "none" and weight is not None else weight
        pooled = []
        for window in windows(seq_len, 4):
            seen = [i for i in window if i in present]
            if not seen:
                continue
            if kind == "mean":
                pooled.append(x[seen].mean(0))
            elif kind == "max":
                pooled.append(x[seen].max(0).values)
            else:
                assert kernel is not None
                pooled.append(sum(kernel[i - window[0]] * x[i] for i in seen))
        return torch.stack(pooled) if pooled else x[:0]

    expected = by_head(project, inputs, mask, DIM**-0.5)
    assert_same(layer(*inputs, key_mask=mask if masked else None), expected, [*inputs, *layer.parameters()])


@pytest.mark.parametrize("share", ["none", "heads", "key_value"])
def test_linear_layer_is_the_function(share: str) -> None:
    """Fails if a layer's key and value matrices are swapped, or sharing is not what its name says."""
    layer = LinformerProjection(KEYS + 2, 4, num_heads=KEY_HEADS, share=share, dtype=F64)
    inputs, mask = random_inputs(), random_mask()
    e = layer.key_weight
    f = e if share == "key_value" else layer.value_weight
    assert e is not None
    assert f is not None
    assert e.shape == f.shape == ((KEY_HEADS, 4, KEYS + 2) if share == "none" else (4, KEYS + 2))
    assert len(list(layer.parameters())) == (1 if share == "key_value" else 2)
    expected = linformer_attention(*inputs, key_projection=e, value_projection=f, key_mask=mask)
    assert_same(layer(*inputs, key_mask=mask), expected, [*inputs, *layer.parameters()])
    key, value, exists = layer.project(*inputs[1:], mask)
    assert exists is None
    assert_close(fastattn.attention(inputs[0], key, value), expected, **EXACT)


def test_project_says_which_keys_there_are() -> None:
    """Fails if an empty window is not reported in its place, or a mask is made where all windows are full."""
    layer = LinformerProjection(7, 4, kind="mean", dtype=F64)
    _, key, value = random_inputs(7)
    assert layer.project(key, value)[2] is None
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0], [0] * 7], dtype=torch.bool)
    exists = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0] * 4], dtype=torch.bool)
    assert torch.equal(layer.project(key, value, mask)[2], exists)
    assert layer.project(key[:, :, :3], value[:, :, :3])[2].tolist() == [[True, True, False, False]]


def test_one_object_in_several_layers() -> None:
    """Layer-wise sharing: one set of parameters, whose gradient is the sum; fails if a copy is made."""
    shared = LinformerProjection(KEYS, 4, share="key_value", dtype=F64)
    model = torch.nn.ModuleList([shared, shared])
    assert len(list(model.parameters())) == 1
    first, second = random_inputs(), random_inputs()
    both = model[0](*first).sum() + model[1](*second).sum()
    (together,) = torch.autograd.grad(both, list(model.parameters()))
    apart = [torch.autograd.grad(shared(*x).sum(), shared.parameters())[0] for x in (first, second)]
    assert_close(together, sum(apart), **EXACT)


def test_initialisation() -> None:
    """Xavier's uniform bound with gain 1 / sqrt(2) for each head's matrix, a mean for convolutions; fails if the heads
    count into the fan."""
    layer = LinformerProjection(200, 50, num_heads=3, share="none")
    bound = (6 / 250) ** 0.5 / 2**0.5
    for weight in layer.parameters():
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    inputs = random_inputs()
    conv, mean = (LinformerProjection(KEYS + 1, 4, kind=kind, dtype=F64) for kind in ("conv", "mean"))
    filled = [torch.nn.functional.pad(x.detach(), (0, 0, 0, 1)) for x in inputs[1:]]
    assert_close(conv(inputs[0], *filled), mean(inputs[0], *filled), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_and_autocast(kind: str) -> None:
    """bfloat16 within its rounding of float64; under autocast, float32 inputs and parameters give what their bfloat16
    copies give; fails if a step stays in float32 or a parameter's gradient is lost."""
    inputs = [x.detach().bfloat16().double() for x in random_inputs()]
    layer = LinformerProjection(KEYS, 4, kind=kind, dtype=torch.bfloat16)
    found = layer(*(x.bfloat16() for x in inputs))
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        singles = [x.float() for x in inputs]
        under = layer.float()(*singles)
        if kind == "linear":
            e, f = layer.parameters()
            assert torch.equal(linformer_attention(*singles, key_projection=e, value_projection=f), found)
    assert torch.equal(under, found)
    for weight in layer.parameters():
        (gradient,) = torch.autograd.grad(under.float().sum(), weight, retain_graph=True)
        assert gradient.dtype == torch.float32
    assert_close(found.double(), layer.double()(*inputs), rtol=0.03, atol=0.03)


def test_compiles_in_one_graph() -> None:
    """Fails on a graph break, or a result that differs from the eager one."""
    layer = LinformerProjection(KEYS + 1, 5, kind="max", dtype=F64)
    inputs, mask = random_inputs(), random_mask()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs, key_mask=mask), layer(*inputs, key_mask=mask), **EXACT)


def test_backend_by_name() -> None:
    """Fails if the name does not reach the dense kernels, or a backend that cannot run the call is replaced."""
    layer = LinformerProjection(KEYS, 4, kind="mean", dtype=F64)
    inputs = random_inputs()
    assert_close(layer(*inputs, backend="reference"), layer(*inputs), **EXACT)
    e = torch.randn(4, KEYS, dtype=F64)
    with pytest.raises(fastattn.UnsupportedError, match="grouped-query heads"):
        layer(*inputs, backend="sdpa")
    with pytest.raises(fastattn.UnsupportedError, match="grouped-query heads"):
        linformer_attention(*inputs, key_projection=e, value_projection=e, backend="sdpa")


def _call(**changes: Any) -> Tensor:
    query, key, value = random_inputs()
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "key_projection": torch.zeros(4, KEYS, dtype=F64),
        "value_projection": torch.zeros(4, KEYS, dtype=F64),
    } | changes
    return linformer_attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key_projection": [[1.0]]}, TypeError, "key_projection must be a torch.Tensor, got list"),
        ({"value_projection": torch.zeros(4, KEYS)}, TypeError, "value_projection must have query's dtype"),
        ({"key_projection": torch.zeros(4, KEYS - 1, dtype=F64)}, ValueError, r"N >= 11, got \(4, 10\)"),
        ({"key_projection": torch.zeros(4, 4, KEYS, dtype=F64)}, ValueError, r"\(2, K, N\) .* got \(4, 4, 11\)"),
        ({"key_projection": torch.zeros(0, KEYS, dtype=F64)}, ValueError, r"key_projection must have shape \(K, N\)"),
        ({"value_projection": torch.zeros(KEYS, dtype=F64)}, ValueError, r"value_projection .* got \(11,\)"),
        ({"value_projection": torch.zeros(5, KEYS, dtype=F64)}, ValueError, "positions as key_projection, 4, got 5"),
        ({"value_projection": torch.zeros(4, KEYS, dtype=F64, device="meta")}, ValueError, "device cpu, got meta"),
        ({"key_mask": torch.ones(BATCH, KEYS)}, TypeError, "key_mask must be bool .* got torch.float32"),
        ({"key_mask": torch.ones(BATCH, 1, dtype=torch.bool)}, ValueError, r"key_mask must have shape \(3, 11\)"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of .* got 'fast'"),
        ({"query": torch.zeros(BATCH, 3, QUERIES, DIM, dtype=F64)}, ValueError, "query's heads must be a multiple"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """Fails where a bad argument is accepted, or the message does not say what it was."""
    with pytest.raises(error, match=message):
        _call(**changes)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4), {}, ValueError, "seq_len must be at least 1, got 0"),
        ((8, True), {}, TypeError, "num_keys must be an int, got bool"),
        ((8, 9), {}, ValueError, "num_keys must be at most seq_len = 8, got 9"),
        ((8, 4), {"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ((8, 4), {"kind": "sum"}, ValueError, "kind must be one of linear, mean, max, conv, got 'sum'"),
        ((8, 4), {"share": "all"}, ValueError, "share must be one of none, heads, key_value, got 'all'"),
    ],
)
def test_constructor_errors(arguments: tuple, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Fails where a bad argument is accepted, or the message does not say what it was."""
    with pytest.raises(error, match=message):
        LinformerProjection(*arguments, **options)


def test_inputs_that_do_not_fit_the_layer() -> None:
    """Fails where a call goes on with too many keys, other heads, or another dtype or device than the layer's."""
    inputs = random_inputs()
    for kind in KINDS:
        with pytest.raises(ValueError, match="key must have at most seq_len = 10 positions, got 11"):
            LinformerProjection(KEYS - 1, 4, kind=kind, dtype=F64)(*inputs)
    with pytest.raises(ValueError, match="key must have this layer's 3 heads, got 2"):
        LinformerProjection(KEYS, 4, num_heads=3, share="none", dtype=F64)(*inputs)
    with pytest.raises(TypeError, match=r"key must have this layer's dtype torch.float32, got torch.float64"):
        LinformerProjection(KEYS, 4)(*inputs)
    with pytest.raises(ValueError, match="key must be on this layer's device meta, got cpu"):
        LinformerProjection(KEYS, 4, device="meta", dtype=F64)(*inputs)


def test_causal_error_names_the_reason() -> None:
    """Fails if the message no longer says what was given, what is wanted and why."""
    error = lowrank.causal_error("Linformer", "projected keys")
    assert isinstance(error, ValueError)
    assert "causal must be False with Linformer attention, got True: its projected keys mix" in str(error)
