"""Swap the `torch.nn.MultiheadAttention` layers of a model for fastattn's, in place, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

import torch
from torch import nn

from fastattn.nn.mixers import Mechanism
from fastattn.nn.multihead_attention import MultiheadAttention, checked_mechanism
from fastattn.nn.sparse_mixers import MaskMixer

Status = Literal["replaced", "restored", "skipped"]


class LayerReport(NamedTuple):
    """What happened to one attention layer; `name` is its qualified name, empty for the model itself."""

    name: str
    status: Status
    reason: str


class Report(tuple[LayerReport, ...]):
    """One `LayerReport` for each attention layer found, in the order of `model.named_modules()`."""

    __slots__ = ()

    def names(self, status: Status) -> list[str]:
        """The names of the layers with this status."""
        return [layer.name for layer in self if layer.status == status]

    def __str__(self) -> str:
        if not self:
            return "no torch.nn.MultiheadAttention in this model"
        width = max(len(layer.name or "(root)") for layer in self)
        counts = [f"{len(self.names(s))} {s}" for s in ("replaced", "restored", "skipped") if self.names(s)]
        lines = [f"{layer.name or '(root)':<{width}}  {layer.status}: {layer.reason}" for layer in self]
        return "\n".join([f"attention layers: {', '.join(counts)}", *lines])

    __repr__ = __str__


def _attention_layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Every attention layer once, under its first name, TorchScript ones included (they are no instances)."""
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.MultiheadAttention)
            or getattr(module, "original_name", None) == nn.MultiheadAttention.__name__
        ):
            yield name, module


def _why_unknown(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript: replace before scripting or tracing"
    cls = type(module)
    return (
        f"{cls.__module__}.{cls.__qualname__} is a subclass, whose own behaviour a replacement could lose "
        "(parametrizations and FSDP make subclasses too: replace before applying them)"
    )


def replace_attention(model: nn.Module, *, backend: str | None = None, mechanism: str | Mechanism = "flash") -> Report:
    """Turn every `torch.nn.MultiheadAttention` of `model` into a `fastattn.nn.MultiheadAttention`, in place.

    The model itself may be one. Each layer stays the same object and takes another class, so parameters (optimizers,
    tied weights), state-dict names, hooks, mode, device and dtype are untouched. A layer shared by several parents is
    replaced once. A compiled model compiles anew at its next call. `restore_attention` undoes it.

    With another mechanism than "flash" the model computes something else. Parameters that the mechanism adds are new:
    give them to the optimizer, and train. Where a mechanism has no attention weights to drop, a call in training mode
    raises until the layer's `dropout` is 0.0. Sparse mechanisms are for self-attention: cross-attention between other
    lengths raises in the call.

    Args:
        model: any module; changed in place.
        backend: the backend that every replaced layer asks for; None selects by call.
        mechanism: of every replaced layer, as in `fastattn.nn.MultiheadAttention`.

    Returns:
        A `Report`: one (name, status, reason) for each attention layer found. Subclasses of
        `torch.nn.MultiheadAttention` are skipped, because they may compute something else; so are layers with
        add_bias_kv or add_zero_attn where the mechanism is not "flash".

    Raises:
        TypeError, ValueError: unknown backend or mechanism; nothing was changed.
    """
    options = checked_mechanism(mechanism, backend)
    layers = []
    for name, module in _attention_layers(model):
        if type(module) is MultiheadAttention:
            layers.append(LayerReport(name, "skipped", f"already fastattn's, {_setting(module)}"))
        elif type(module) is not nn.MultiheadAttention:
            layers.append(LayerReport(name, "skipped", _why_unknown(module)))
        elif options is not None and (module.bias_k is not None or module.add_zero_attn):
            reason = f"add_bias_kv and add_zero_attn have no meaning with {options.mixer.name}"
            layers.append(LayerReport(name, "skipped", reason))
        else:
            module.__class__ = MultiheadAttention
            layer = cast(MultiheadAttention, module)
            layer._set_mechanism(options, backend)
            layer._qkv_same_embed_dim = False
            softmax = layer.mixer is None or isinstance(layer.mixer, MaskMixer)
            dropout = "" if softmax or not layer.dropout else "; set its dropout to 0.0 to train"
            layers.append(LayerReport(name, "replaced", _setting(layer) + dropout))
    return Report(layers)


def _setting(layer: MultiheadAttention) -> str:
    mechanism = "" if layer.mixer is None else f"mechanism={layer.mixer.options}, "
    return f"{mechanism}backend={layer.backend!r}"


def restore_attention(model: nn.Module) -> Report:
    """Turn every `fastattn.nn.MultiheadAttention` of `model` into a `torch.nn.MultiheadAttention`, in place.

    The inverse of `replace_attention`, parameters untouched; only those that another mechanism added go. Layers that
    were constructed as fastattn's become torch's too. torch's own layers are skipped, and so are subclasses.
    """
    layers = []
    for name, module in _attention_layers(model):
        if type(module) is MultiheadAttention:
            del module.backend, module.mixer
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
            module._qkv_same_embed_dim = module.in_proj_weight is not None
            layers.append(LayerReport(name, "restored", "torch.nn.MultiheadAttention again"))
        elif type(module) is nn.MultiheadAttention:
            layers.append(LayerReport(name, "skipped", "already torch's"))
        else:
            layers.append(LayerReport(name, "skipped", _why_unknown(module)))
    return Report(layers)
