"""`replace_attention` and `restore_attention` on torch's own transformers, against the unreplaced model.

Models are in float64 and must agree to rounding, gradients of all parameters and inputs included. The encoder tests
fail if torch's inference path bypasses the replaced layers (they count fused calls), if nested tensors crash them or
leave other values in the padding than torch does, or if masks that torch turned into floats are read wrongly.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastattn
from fastattn.nn import (
    GLA,
    Linformer,
    LinformerProjection,
    Mechanism,
    MultiheadAttention,
    Nystrom,
    Performer,
    replace_attention,
    restore_attention,
)

EXACT = {"rtol": 1e-9, "atol": 1e-11}
BATCH, LENGTH, EMBED, HEADS = 3, 6, 8, 2
LEFT_ALIGNED = torch.arange(LENGTH) >= torch.tensor([[6], [4], [1]])
NOT_ALIGNED = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0]], dtype=torch.bool)
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]


def _encoder(norm_first: bool = False, nested: bool = True, layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64, "norm_first": norm_first} | options
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested).requires_grad_()


def _as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


def _assert_same_training(theirs: nn.Module, ours: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> None:
    results = []
    for model in (theirs, ours):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(model.train(), *leaves)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad(out, [*leaves, *model.parameters()], weight)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("padding", ["none", "left_aligned", "not_aligned", "float"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder(norm_first: bool, nested: bool, padding: str, mask: str, fused_calls) -> None:
    """The three traps: torch's inference path, nested tensors, masks as floats; in training and at inference."""
    theirs = _encoder(norm_first, nested)
    ours = copy.deepcopy(theirs)
    assert len(replace_attention(ours).names("replaced")) == 2
    options = {
        "src_key_padding_mask": {
            "none": None,
            "left_aligned": LEFT_ALIGNED,
            "not_aligned": NOT_ALIGNED,
            "float": _as_float(LEFT_ALIGNED),
        }[padding],
        "mask": {"none": None, "bool": CAUSAL, "float": _as_float(CAUSAL)}[mask],
    }
    if mask != "none" and padding == "not_aligned":
        options["src_key_padding_mask"] = NOT_ALIGNED.flip(1) & (torch.arange(LENGTH) > 0)  # no row without keys
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)

    _assert_same_training(theirs, ours, lambda model, src: model(src, **options), x)
    assert len(fused_calls) == 2
    fused_calls.clear()
    with torch.no_grad():
        expected, found = (model.eval()(x, **options) for model in (theirs, ours))
    assert_close(found, expected, **EXACT)
    assert len(fused_calls) == 2


@pytest.mark.parametrize("nested", [True, False])
def test_encoder_with_a_fully_padded_sequence(nested: bool) -> None:
    """torch gives NaN for one; fails if the replaced encoder does, or if it disturbs the other sequences."""
    ours = _encoder(nested=nested).eval()
    replace_attention(ours)
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    padding = LEFT_ALIGNED.clone()
    padding[2] = True
    with torch.no_grad():
        found = ours(x, src_key_padding_mask=padding)
        assert_close(found[:2], ours(x[:2], src_key_padding_mask=padding[:2]), **EXACT)
    assert found.isfinite().all()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("as_float", [True, False], ids=["float", "bool"])
@pytest.mark.parametrize("hint", [True, False])
def test_encoder_decoder(hint: bool, as_float: bool, batch_first: bool, fused_calls) -> None:
    """nn.Transformer with causal and padding masks; fails if self- or cross-attention of either side differs, or is
    not fused."""
    options = {"dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    theirs = nn.Transformer(EMBED, HEADS, 2, 2, 16, **options)
    ours = copy.deepcopy(theirs)
    report = replace_attention(ours)
    assert len(report) == len(report.names("replaced")) == 6
    masks = {
        "src_key_padding_mask": LEFT_ALIGNED,
        "memory_key_padding_mask": LEFT_ALIGNED,
        "tgt_key_padding_mask": LEFT_ALIGNED[:, 1:] & (torch.arange(LENGTH - 1) > 0),
        "tgt_mask": CAUSAL[1:, 1:],
    }
    if as_float:
        masks = {name: _as_float(mask) for name, mask in masks.items()}

    def call(model: nn.Module, src: Tensor, tgt: Tensor) -> Tensor:
        return model(src, tgt, **masks, tgt_is_causal=True if hint else None)

    inputs = [torch.randn(BATCH, n, EMBED, dtype=torch.float64) for n in (LENGTH, LENGTH - 1)]
    if not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    _assert_same_training(theirs, ours, call, *inputs)
    assert len(fused_calls) == 6
    fused_calls.clear()
    with torch.no_grad():
        assert_close(call(ours.eval(), *inputs), call(theirs.eval(), *inputs), **EXACT)
    assert len(fused_calls) == 6


def test_replaced_encoder_compiles_in_one_graph() -> None:
    """Fails on a graph break inside a replaced encoder, or a result that differs from the eager one."""
    model = _encoder(nested=False)
    replace_attention(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    options = {"src_key_padding_mask": LEFT_ALIGNED}
    assert_close(compiled(x, **options), model(x, **options), **EXACT)


def test_training_across_replace_and_restore() -> None:
    """Three optimizer steps, the middle one replaced, equal three plain ones; fails if the optimizer or the state dict
    loses a parameter, or a restored layer is not torch's again in all it does."""
    theirs = _encoder()
    ours = copy.deepcopy(theirs)
    before = dict(ours.named_parameters())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (theirs, ours)]
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    for step in range(3):
        if step == 1:
            replace_attention(ours)
        if step == 2:
            report = restore_attention(ours)
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert all(before[name] is parameter for name, parameter in ours.named_parameters())
    assert [tuple(layer)[:2] for layer in report] == [
        ("layers.0.self_attn", "restored"),
        ("layers.1.self_attn", "restored"),
    ]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-8)  # AdamW's first steps divide rounding by rounding
    for mine, torchs in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(mine) is type(torchs)
        assert set(vars(mine)) == set(vars(torchs))
    assert all(layer.self_attn._qkv_same_embed_dim for layer in ours.layers)


def test_state_dicts_load_both_ways() -> None:
    """Fails if a replaced model's checkpoint does not load strictly into torch's, or the reverse."""
    theirs, ours = _encoder(), _encoder()
    replace_attention(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    assert_close(ours(x), theirs(x), **EXACT)
    _encoder().load_state_dict(ours.state_dict(), strict=True)


class _Shared(nn.Module):
    """One layer under two names, one with weights tied to it, and layers that must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(EMBED, HEADS)
        self.again = self.first
        self.tied = nn.MultiheadAttention(EMBED, HEADS)
        self.tied.in_proj_weight = self.first.in_proj_weight
        self.ours = MultiheadAttention(EMBED, HEADS, backend="reference")
        self.other = _Custom(EMBED, HEADS)
        self.linear = nn.Linear(EMBED, EMBED)


class _Custom(nn.MultiheadAttention):
    pass


def test_report() -> None:
    """Fails if a layer is missed, visited twice, replaced against the rules, or listed without its reason."""
    model = _Shared()
    report = replace_attention(model, backend="reference")
    assert [(layer.name, layer.status) for layer in report] == [
        ("first", "replaced"),
        ("tied", "replaced"),
        ("ours", "skipped"),
        ("other", "skipped"),
    ]
    assert report.names("skipped") == ["ours", "other"]
    assert "already" in report[2].reason
    assert "_Custom is a subclass" in report[3].reason
    assert str(report).splitlines()[0] == "attention layers: 2 replaced, 2 skipped"
    assert len(str(report).splitlines()) == 5
    assert type(model.first) is MultiheadAttention
    assert model.again is model.first
    assert model.first.backend == "reference"
    assert model.tied.in_proj_weight is model.first.in_proj_weight
    assert type(model.other) is _Custom

    report = restore_attention(model)
    assert report.names("restored") == ["first", "tied", "ours"]
    assert report.names("skipped") == ["other"]
    assert type(model.ours) is nn.MultiheadAttention
    assert restore_attention(model).names("skipped") == ["first", "tied", "ours", "other"]
    assert str(replace_attention(nn.Linear(2, 2))) == "no torch.nn.MultiheadAttention in this model"


def test_scripted_layers_are_reported() -> None:
    """A TorchScript layer is no instance of torch's class; fails if it is passed over in silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.MultiheadAttention(EMBED, HEADS))
    (layer,) = replace_attention(nn.Sequential(scripted))
    assert (layer.name, layer.status) == ("0", "skipped")
    assert "TorchScript" in layer.reason


@pytest.mark.parametrize("constructor", [{}, {"kdim": 5, "vdim": 3}, {"bias": False, "add_bias_kv": True}], ids=str)
def test_the_model_itself_may_be_a_layer(constructor: dict[str, Any]) -> None:
    """Fails if a root layer is not replaced in place, in its mode and with its hooks, or not restored as it was."""
    layer = nn.MultiheadAttention(EMBED, HEADS, dropout=0.5, dtype=torch.float64, **constructor).eval()
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(type(module).__module__))
    state = dict(vars(layer))
    inputs = [torch.randn(LENGTH, width, dtype=torch.float64) for width in (EMBED, layer.kdim, layer.vdim)]
    expected = layer(*inputs)
    (entry,) = fastattn.replace_attention(layer)
    assert (entry.name, entry.status) == ("", "replaced")
    assert "(root)" in str(fastattn.replace_attention(layer))
    assert not layer.training
    for a, b in zip(layer(*inputs), expected, strict=True):
        assert_close(a, b, **EXACT)
    fastattn.restore_attention(layer)
    assert vars(layer) == state
    layer(*inputs)
    assert seen == ["torch.nn.modules.activation", "fastattn.nn.multihead_attention", "torch.nn.modules.activation"]


def test_unknown_backend_changes_nothing() -> None:
    """Fails if a bad name is noticed only after some layers have been replaced, or not at all."""
    model = _encoder()
    with pytest.raises(ValueError, match="nonesuch"):
        replace_attention(model, backend="nonesuch")
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)
    with pytest.raises(ValueError, match=r"mechanism must be one of flash.*got 'nonesuch'"):
        replace_attention(model, mechanism="nonesuch")
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)


@pytest.mark.parametrize(
    "mechanism", ["linear", Performer(16), Nystrom(2), Linformer(LENGTH, 3), GLA(gate_rank=2)], ids=str
)
def test_other_mechanisms_in_an_encoder(mechanism: str | Mechanism) -> None:
    """In training, and at inference where torch nests padded sequences. Fails if a layer computes something else than
    one constructed with that mechanism and those weights, padding changes a sequence, or restoring leaves a trace."""
    model = _encoder()
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    expected, names = model(x), list(model.state_dict())
    report = replace_attention(model, mechanism=mechanism)
    assert len(report.names("replaced")) == 2
    causal = isinstance(mechanism, GLA)
    options = {"mask": CAUSAL if causal else None, "src_key_padding_mask": LEFT_ALIGNED}
    for layer in (encoder_layer.self_attn for encoder_layer in model.layers):
        alike = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, mechanism=mechanism)
        alike.load_state_dict(layer.state_dict())
        a, b = (m(x, x, x, need_weights=False, is_causal=causal)[0] for m in (layer, alike))
        assert torch.equal(a, b)

    trained = model.train()(x, **options)
    trained.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or "in_proj_bias" in name, name
    with torch.no_grad():
        found = model.eval()(x, **options)
        alone = model(x[1:2, :4], mask=None if options["mask"] is None else CAUSAL[:4, :4])
    assert_close(found[~LEFT_ALIGNED], trained[~LEFT_ALIGNED], **EXACT)
    assert_close(found[1, :4], alone[0], **EXACT)

    restore_attention(model)
    assert list(model.state_dict()) == names
    assert_close(model.train()(x), expected, **EXACT)


def test_report_and_dropout_with_another_mechanism() -> None:
    """Fails if a layer that the mechanism cannot be put in is replaced, the report does not say what it did, or a model
    with dropout trains without a word."""
    model = nn.ModuleList(
        [nn.MultiheadAttention(EMBED, HEADS, 0.1), nn.MultiheadAttention(EMBED, HEADS, add_zero_attn=True)]
    )
    first, second = replace_attention(model, mechanism=Performer(8, seed=1))
    assert (first.status, second.status) == ("replaced", "skipped")
    assert first.reason.startswith("mechanism=Performer(num_features=8, ")
    assert first.reason.endswith("seed=1), backend=None; set its dropout to 0.0 to train")
    assert "add_zero_attn have no meaning with performer" in second.reason
    x = torch.randn(LENGTH, BATCH, EMBED)
    with pytest.raises(ValueError, match=r"dropout must be off with performer.*got 0\.1 in training"):
        model[0](x, x, x, need_weights=False)
    model[0].dropout = 0.0
    model[0](x, x, x, need_weights=False)
    assert "already fastattn's, mechanism=Performer" in replace_attention(model, mechanism="gla")[0].reason


def test_one_projection_for_all_layers() -> None:
    """Layer-wise sharing. Fails if replaced layers hold copies of the projection."""
    model = _encoder()
    projection = LinformerProjection(LENGTH, 3, dtype=torch.float64)
    replace_attention(model, mechanism=Linformer(projection=projection))
    assert all(layer.self_attn.mixer.projection is projection for layer in model.layers)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_mechanism_takes_the_layers_device_and_dtype(device: str) -> None:
    """Fails if what a mechanism adds is on another device, of another dtype or in another mode than its layer."""
    layer = nn.MultiheadAttention(EMBED, HEADS, device=device, dtype=torch.bfloat16).eval()
    for mechanism in ("performer", "gla", "delta"):
        replace_attention(layer, mechanism=mechanism)
        tensors = [*layer.mixer.parameters(), *layer.mixer.buffers()]
        assert {(t.device.type, t.dtype) for t in tensors} == {(device, torch.bfloat16)}
        assert not layer.mixer.training
        restore_attention(layer)
