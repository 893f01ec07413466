"""The subjects that need no model of the user's: an attention call, a layer, and the reference language model."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.bench.subject import Kind, Step, Subject
from fastattn.bench.suites import DTYPES, Problem, implementation

IMPLEMENTATIONS = ("naive", "sdpa", "fastattn")
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
    *leaves, grad_out = problem.inputs(torch.device(subject.device))
    _, attend = implementation(subject.implementation).bind(problem)
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

    torch's layer wants the causal mask as a tensor; the boolean one, the smallest, is built within the forward.
    """
    from fastattn.bench.layer import options
    from fastattn.nn import MultiheadAttention

    shape, name, device = subject.shape, subject.implementation, subject.device
    embed_dim = shape.heads * shape.head_dim
    kind = MultiheadAttention if name == "fastattn" else torch.nn.MultiheadAttention
    layer = kind(embed_dim, shape.heads, batch_first=True, device=device, dtype=DTYPES[shape.dtype])
    x = torch.randn(shape.batch, seqlen, embed_dim, device=device).to(DTYPES[shape.dtype])

    def forward() -> Tensor:
        mask = None
        if shape.causal and name != "fastattn":
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


def build_lm(subject: Subject, seqlen: int) -> Step:
    """The reference language model on bytes: its loss and the gradients of its parameters, or its logits."""
    from fastattn.models.transformer import Transformer, TransformerConfig

    shape = subject.shape
    config = TransformerConfig(
        num_layers=shape.layers,
        num_heads=shape.heads,
        embed_dim=shape.heads * shape.head_dim,
        max_seq_len=seqlen,
        attention=subject.implementation,
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
    "op": Kind(IMPLEMENTATIONS, DEFAULT, build_op, lambda s: _title(s, "attention call", s.shape.causal)),
    "layer": Kind(
        IMPLEMENTATIONS, DEFAULT, build_layer, lambda s: _title(s, "multi-head attention layer", s.shape.causal)
    ),
    "lm": Kind(
        IMPLEMENTATIONS,
        DEFAULT,
        build_lm,
        lambda s: _title(s, "language model", True, f", {s.shape.layers} layers"),
    ),
}
