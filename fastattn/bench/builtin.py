"""The subjects that need no model of the user's: an attention call, a layer, and the reference language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.bench.case import DTYPES
from fastattn.bench.subject import Kind, Step, Subject
from fastattn.bench.suites import Problem, implementation

# Softmax attention, and what `mechanism=` of fastattn's layer puts in its place; only what is linear is a call as well.
LINEAR = ("performer", "linformer", "nystrom", "linear", "retention", "gla", "delta")
SPARSE = ("window", "longformer", "bigbird", "strided", "fixed", "lsh", "topk", "nsa")
STAND_INS = (*LINEAR, *SPARSE)
SOFTMAX = ("naive", "sdpa", "fastattn")
LINFORMER_KEYS = 256
DEFAULT = ("naive", "fastattn")


def build_op(subject: Subject, seqlen: int) -> Step:
    shape = subject.shape
    problem = Problem(
        seqlen,
        head_dim=shape.head_dim,
        heads=shape.heads,
        kv_heads=shape.heads,
        batch=shape.batch,
        dtype=shape.dtype,
        causal=shape.causal,
        mode=subject.mode,
    )
    chosen = implementation(subject.implementation)
    case = chosen.solves(problem)
    *leaves, grad_out = case.inputs(torch.device(subject.device))
    _, attend = chosen.bind(case)
    if subject.mode == "fwd":
        return Step("attention", [], leaves, lambda: attend(*leaves), None)
    for leaf in leaves:
        leaf.requires_grad_()
    return Step(
        "attention",
        [],
        [*leaves, grad_out],
        lambda: attend(*leaves),
        lambda out: torch.autograd.grad(out, leaves, grad_out),
    )


def build_layer(subject: Subject, seqlen: int) -> Step:
    """A multi-head attention layer on (batch, seqlen, embed_dim). naive and sdpa are torch.nn.MultiheadAttention.

    A stand-in is fastattn's layer with that mechanism.

    torch's layer wants the causal mask as a tensor; the boolean one, the smallest, is built within the forward.
    """
    from fastattn.bench.layer import options
    from fastattn.nn import MultiheadAttention

    shape, name, device = subject.shape, subject.implementation, subject.device
    embed_dim = shape.heads * shape.head_dim
    ours = name not in ("naive", "sdpa")
    kind = MultiheadAttention if ours else torch.nn.MultiheadAttention
    chosen: dict[str, Any] = {"mechanism": _mechanism(name, seqlen)} if name in STAND_INS else {}
    layer = kind(embed_dim, shape.heads, batch_first=True, device=device, dtype=DTYPES[shape.dtype], **chosen)
    x = torch.randn(shape.batch, seqlen, embed_dim, device=device).to(DTYPES[shape.dtype])

    def forward() -> Tensor:
        mask = None
        if shape.causal and not ours:
            mask = torch.ones(seqlen, seqlen, dtype=torch.bool, device=device).triu_(1)
        return layer(x, x, x, **options(layer, shape.causal, name == "naive", mask))[0]

    parameters = list(layer.parameters())
    title = f"{kind.__module__.partition('.')[0]}.nn.MultiheadAttention"
    if subject.mode == "fwd":
        layer.eval()
        return Step(title, parameters, [x], forward, None)
    grad_out = torch.randn_like(x)
    x.requires_grad_()
    return Step(
        title,
        parameters,
        [x, grad_out],
        forward,
        lambda out: torch.autograd.grad(out, [x, *parameters], grad_out),
    )


def _mechanism(name: str, seqlen: int) -> Any:
    """What `mechanism=` takes for an implementation."""
    from fastattn.nn.mechanisms import Linformer

    if name == "linformer":
        return Linformer(seqlen, min(LINFORMER_KEYS, seqlen))
    return name if name in STAND_INS else "flash"


def build_lm(subject: Subject, seqlen: int) -> Step:
    """The reference language model on bytes: its loss and the gradients of its parameters, or its logits."""
    from fastattn.models.transformer import Transformer, TransformerConfig

    shape = subject.shape
    name = subject.implementation
    config = TransformerConfig(
        num_layers=shape.layers,
        num_heads=shape.heads,
        embed_dim=shape.heads * shape.head_dim,
        max_seq_len=seqlen,
        attention="fastattn" if name in STAND_INS else name,
        mechanism=_mechanism(name, seqlen),
    )
    model = Transformer(config).to(subject.device, DTYPES[shape.dtype])
    tokens = torch.randint(config.vocab_size, (shape.batch, seqlen), device=subject.device)
    parameters = list(model.parameters())
    if subject.mode == "fwd":
        model.eval()
        return Step("Transformer", parameters, [tokens], lambda: model(tokens), None)
    return Step(
        "Transformer",
        parameters,
        [tokens],
        lambda: model(tokens, tokens),
        lambda loss: torch.autograd.grad(loss, parameters),
    )


def _title(subject: Subject, what: str, causal: bool, detail: str = "") -> str:
    shape = subject.shape
    step = "forward" if subject.mode == "fwd" else "forward + backward"
    size = f"batch {shape.batch}, {shape.heads} heads, head size {shape.head_dim}{detail}"
    return f"{what}, {step}, {shape.dtype}, {'causal' if causal else 'full'}, {size}"


KINDS = {
    "op": Kind((*SOFTMAX, *LINEAR), DEFAULT, build_op, lambda s: _title(s, "attention call", s.shape.causal)),
    "layer": Kind(
        (*SOFTMAX, *STAND_INS), DEFAULT, build_layer, lambda s: _title(s, "multi-head attention layer", s.shape.causal)
    ),
    "lm": Kind(
        (*SOFTMAX, *STAND_INS),
        DEFAULT,
        build_lm,
        lambda s: _title(s, "language model", True, f", {s.shape.layers} layers"),
    ),
}
