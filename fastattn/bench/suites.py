"""What is measured: problems, the implementations set beside each other, and named sets of both."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MODES = ("fwd", "fwdbwd")
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

Attend = Callable[..., Tensor]  # query, key, value and, where the problem has one, its bias


@dataclass(frozen=True)
class Problem:
    """One attention call over query (batch, heads, seqlen, head_dim) and as many keys, `kv_heads` of them.

    With `q_len` only that many queries face the `seqlen` keys, as in decoding, which is judged by bytes read.
    """

    seqlen: int
    head_dim: int = 64
    heads: int = 4
    kv_heads: int = 4
    batch: int = 1
    dtype: str = "float32"
    causal: bool = False
    mode: str = "fwd"  # "fwd", or "fwdbwd" for the forward and all gradients
    q_len: int | None = None
    bias: bool = False  # added to the scores, (1, heads, seqlen, seqlen); its gradient is one of all gradients
    window: int | None = None  # a causal query sees itself and this many keys before it
    dropout: float = 0.0
    # Not attention alone but a torch.nn.MultiheadAttention: "without weights" or "with weights" (need_weights=True).
    layer: str | None = None

    def __post_init__(self) -> None:
        if self.q_len and (self.causal or self.mode != "fwd"):
            raise ValueError("q_len: decoding is forward only, and its queries see every key")
        if self.window is not None and not self.causal:
            raise ValueError("window: only with causal")
        if self.layer and (self.q_len or self.bias or self.dropout or self.window is not None):
            raise ValueError("layer: plain attention only")

    @property
    def queries(self) -> int:
        return self.q_len or self.seqlen

    @property
    def flops(self) -> float:
        """Multiplications and additions of the matrix products: 4 B H S^2 D, half if causal, backward 2.5 x more.

        A layer's four projections come on top.
        """
        pairs = self.queries * self.seqlen * (0.5 if self.causal else 1.0)
        if self.window is not None and self.window < self.seqlen:
            band = self.window + 1
            pairs = float(self.seqlen * band - band * self.window // 2)
        attention = 4.0 * self.batch * self.heads * pairs * self.head_dim * (3.5 if self.mode == "fwdbwd" else 1.0)
        if not self.layer:
            return attention
        projections = 8.0 * self.batch * self.seqlen * (self.heads * self.head_dim) ** 2
        return attention + projections * (3.0 if self.mode == "fwdbwd" else 1.0)

    @property
    def bytes_moved(self) -> int:
        """What must be read and written at least: query, key, value and output once."""
        rows = 2 * self.heads * self.queries + 2 * self.kv_heads * self.seqlen
        return self.batch * rows * self.head_dim * self.torch_dtype.itemsize

    @property
    def feature(self) -> str:
        """What sets the problem apart from plain attention, in words; empty where nothing does."""
        words = (
            f"layer {self.layer}" if self.layer else "",
            f"query length {self.q_len}" if self.q_len else "",
            "bias" if self.bias else "",
            "" if self.window is None else f"window {self.window}",
            f"dropout {self.dropout:g}" if self.dropout else "",
        )
        return ", ".join(filter(None, words))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def label(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        shape = f"{self.mode} {self.dtype} {mask} B{self.batch} H{heads} D{self.head_dim} L{self.seqlen}"
        return f"{shape}, {self.feature}" if self.feature else shape

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """query, key, value, the bias if there is one, and the output's gradient, standard normal; a layer's own."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.torch_dtype)

        if self.layer:
            from fastattn.bench import layer

            return layer.draw(self, draw)
        query = draw(self.batch, self.heads, self.queries, self.head_dim)
        key, value = (draw(self.batch, self.kv_heads, self.seqlen, self.head_dim) for _ in range(2))
        grad_out = draw(*query.shape)
        bias = [draw(1, self.heads, self.queries, self.seqlen)] if self.bias else []
        return query, key, value, *bias, grad_out

    def band(self, device: torch.device) -> Tensor:
        """The causal window as a bool mask (seqlen, seqlen), for implementations that have no other way to say it."""
        assert self.window is not None
        seen = torch.ones(self.seqlen, self.seqlen, dtype=torch.bool, device=device)
        return seen.tril_().triu_(-self.window)


def bind_naive(problem: Problem) -> tuple[str, Attend]:
    from fastattn.dense.naive import naive_attention

    band = None if problem.window is None else problem.band(default_device())

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        mask = bias if band is None else band
        return naive_attention(q, k, v, attn_mask=mask, causal=problem.causal, dropout_p=problem.dropout)

    return "matmul, softmax, matmul", attend


def naive_bytes(problem: Problem) -> int:
    """A low estimate of what naive attention needs: the score matrix and its copies (3 forward, 4 with gradients)."""
    matrix = problem.batch * problem.heads * problem.queries * problem.seqlen * problem.torch_dtype.itemsize
    return matrix * (4 if problem.mode == "fwdbwd" else 3)


def bind_sdpa(problem: Problem, backend: SDPBackend | None = None) -> tuple[str, Attend]:
    if problem.layer:
        from fastattn.bench import layer

        return layer.bind(problem, torch.nn.MultiheadAttention)
    gqa = problem.heads != problem.kv_heads
    band = None if problem.window is None else problem.band(default_device())
    causal = problem.causal and band is None

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        mask = bias if band is None else band
        return F.scaled_dot_product_attention(q, k, v, mask, problem.dropout, is_causal=causal, enable_gqa=gqa)

    if backend is None:
        return "torch's choice", attend

    def attend_with(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(*tensors)

    return backend.name.lower(), attend_with


def bind_fastattn(problem: Problem, backend: str | None = None) -> tuple[str, Attend]:
    """fastattn's own kernels. A problem that selection would hand to SDPA runs on the next backend of our own."""
    import fastattn
    from fastattn.backends import own_backends

    if problem.layer:
        from fastattn.bench import layer

        return layer.bind(problem, fastattn.nn.MultiheadAttention)
    window = None if problem.window is None else (problem.window, 0)
    options: dict[str, Any] = {"causal": problem.causal, "window": window, "dropout_p": problem.dropout}
    if backend is None:
        grad = problem.mode == "fwdbwd"

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=problem.torch_dtype, device=default_device())

        query = empty(1, problem.heads, 1, problem.head_dim).requires_grad_(grad)
        key = empty(1, problem.kv_heads, 1, problem.head_dim)
        bias = empty(1, problem.heads, 1, 1).requires_grad_(grad) if problem.bias else None
        with own_backends():
            verdicts = fastattn.explain(query, key, key, attn_mask=bias, **options)
        own = [v.backend for v in verdicts if v.selected]
        if not own:
            raise fastattn.UnsupportedError("no backend of fastattn runs this: see fastattn explain")
        backend = own[0]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return fastattn.attention(q, k, v, attn_mask=bias, backend=backend, **options)

    return backend, attend


def bind_flex(problem: Problem) -> tuple[str, Attend]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if problem.dropout:
        raise NotImplementedError("flex_attention has no dropout")
    # torch compiles one function for a few shapes only, then runs it uncompiled: every problem starts afresh.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = problem.heads != problem.kv_heads
    reach = problem.seqlen if problem.window is None else problem.window
    mask = None
    if problem.causal:
        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j <= reach),
            *(None, None, problem.seqlen, problem.seqlen),
            device=default_device().type,
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        add = None if bias is None else lambda score, b, h, i, j: score + bias[0, h, i, j]
        out = compiled(q, k, v, score_mod=add, block_mask=mask, enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    return "compiled", attend


def _bind_flash_attn_4(problem: Problem) -> tuple[str, Attend]:
    flash_attn_func = importlib.import_module("flash_attn.cute").flash_attn_func
    if problem.bias or problem.dropout:
        raise NotImplementedError("flash-attn 4 has neither a bias with a gradient nor dropout")
    window = (None, None) if problem.window is None else (problem.window, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flash_attn_func(q, k, v, causal=problem.causal, window_size=window)[0].transpose(1, 2)

    return "flash_attn.cute", attend


def _bind_xformers(problem: Problem) -> tuple[str, Attend]:
    ops = importlib.import_module("xformers.ops")
    mask = ops.LowerTriangularMask() if problem.causal else None
    if problem.window is not None:
        biases = importlib.import_module("xformers.ops.fmha.attn_bias")
        mask = biases.LowerTriangularFromBottomRightMask().make_local_attention(problem.window + 1)
    groups = problem.heads // problem.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if groups > 1:  # (B, S, Hkv, groups, D): grouped heads are an axis of their own
            q = q.unflatten(2, (problem.kv_heads, groups))
            k, v = (t.unsqueeze(3).expand(-1, -1, -1, groups, -1) for t in (k, v))
        added = mask if bias is None else bias.expand(problem.batch, -1, -1, -1)
        out = ops.memory_efficient_attention(q, k, v, attn_bias=added, p=problem.dropout)
        return (out.flatten(2, 3) if groups > 1 else out).transpose(1, 2)

    return "memory_efficient_attention", attend


def _bind_flash_linear_attention(problem: Problem) -> tuple[str, Attend]:
    parallel_attn = importlib.import_module("fla.ops.attn").parallel_attn
    if not problem.causal or problem.bias or problem.dropout or problem.q_len:
        raise NotImplementedError("flash-linear-attention's softmax attention is causal, with equal lengths, and plain")
    width = None if problem.window is None else problem.window + 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return parallel_attn(q, k, v, window_size=width).transpose(1, 2)

    return "fla.ops.attn.parallel_attn", attend


@dataclass(frozen=True)
class Peer:
    """A library that is measured where it is installed: the module that must be importable, and how it is bound."""

    module: str
    bind: Callable[[Problem], tuple[str, Attend]]


PEERS = {
    "flash-attn-4": Peer("flash_attn.cute", _bind_flash_attn_4),
    "flash-linear-attention": Peer("fla.ops.attn", _bind_flash_linear_attention),
    "xformers": Peer("xformers.ops", _bind_xformers),
}


def absent_peer(name: str) -> str | None:
    """Why the peer of that name cannot be measured here; None where it can be, or where it is no peer."""
    if name not in PEERS:
        return None
    try:
        importlib.import_module(PEERS[name].module)
    except Exception as error:  # a library built for another torch can fail in any way
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None


def _no_bytes(problem: Problem) -> int:
    return 0


def _is_attention(problem: Problem) -> bool:
    return problem.layer is None


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention. `bind` returns (kernel name, function) or raises to say why it cannot.

    `estimate` is a low estimate in bytes of the memory it needs; an implementation that would not fit is not run. What
    `compiles` at its first call is called once more than others, and after them, so as not to use up their time. What a
    problem is no `subject` of is left out of its table.
    """

    name: str
    bind: Callable[[Problem], tuple[str, Attend]]
    estimate: Callable[[Problem], int] = _no_bytes
    compiles: bool = False
    subject: Callable[[Problem], bool] = _is_attention


def _any(problem: Problem) -> bool:
    return True


def implementation(name: str) -> Implementation:
    """Look up `naive`, `sdpa`, `sdpa:<torch backend>`, `fastattn`, `fastattn:<backend>`, `flex` or a peer.

    Raises:
        ValueError: no such implementation.
    """
    family, _, backend = name.partition(":")
    if name == "naive":
        return Implementation(name, bind_naive, naive_bytes)
    if name == "flex":
        return Implementation(name, bind_flex, compiles=True)
    if name in PEERS:
        return Implementation(name, PEERS[name].bind)
    if family == "sdpa":
        if not backend:
            return Implementation(name, bind_sdpa, subject=_any)
        if backend in SDPA_BACKENDS:
            return Implementation(
                name, lambda p: bind_sdpa(p, SDPA_BACKENDS[backend]), naive_bytes if backend == "math" else _no_bytes
            )
        raise ValueError(f"no SDPA backend {backend!r}; torch has {', '.join(SDPA_BACKENDS)}")
    if name == "fastattn:sdpa":
        raise ValueError("fastattn:sdpa is PyTorch's attention, not ours; there is sdpa")
    if family == "fastattn":
        return Implementation(
            name,
            lambda p: bind_fastattn(p, backend or None),
            naive_bytes if backend == "reference" else _no_bytes,
            subject=_is_attention if backend else _any,
        )
    raise ValueError(
        f"no implementation {name!r}; there are naive, sdpa, sdpa:<torch backend>, fastattn, fastattn:<backend>, flex, "
        f"{', '.join(PEERS)}"
    )


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_implementations(device: torch.device) -> tuple[str, ...]:
    """Naive attention, fastattn and whatever of SDPA runs on the device."""
    if device.type == "cuda":
        return ("naive", "sdpa", "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "flex", "fastattn")
    return ("naive", "sdpa", "fastattn")


def grid(
    seqlens: Iterable[int],
    *,
    head_dims: Iterable[int] = (64,),
    dtypes: Iterable[str] = ("float32",),
    causal: Iterable[bool] = (True,),
    modes: Iterable[str] = ("fwd",),
    base: Problem | None = None,
) -> list[Problem]:
    """The product of the given values, lengths innermost so that one table's rows stay together."""
    base = base or Problem(seqlen=0)
    return [
        replace(base, mode=mode, dtype=dtype, head_dim=head_dim, causal=mask, seqlen=seqlen)
        for mode, head_dim, dtype, mask, seqlen in product(modes, head_dims, dtypes, causal, seqlens)
    ]
