"""Dense attention as something to measure: its problems, and the implementations set beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn.bench.case import (
    DTYPES,
    MODES,
    Attend,
    Case,
    Implementation,
    Judge,
    anything,
    default_device,
    no_bytes,
)
from fastattn.bench.linear.problem import MECHANISMS, mechanism
from fastattn.bench.peers import PEERS, bind_flex

__all__ = ["DTYPES", "MODES", "Problem", "default_device", "default_implementations", "implementation"]

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Problem(Case):
    """One call of softmax attention.

    With `q_len` only that many queries face the `seqlen` keys, as in decoding, which is judged by bytes read.
    """

    family: ClassVar[str] = "dense"

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
    def bytes_read(self) -> int | None:
        """In decoding query, key, value and output once."""
        if not self.q_len:
            return None
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
            "" if self.data == "normal" else f"{self.data} data",
        )
        return ", ".join(filter(None, words))

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """query, key, value, the bias if there is one, and the output's gradient, standard normal; a layer's own."""
        draw = self.drawing(device, seed)
        if self.layer:
            from fastattn.bench import layer

            return layer.draw(self, draw)
        query, key, value = self.draw_qkv(draw, self.queries, self.head_dim)
        grad_out = draw(*query.shape)
        bias = [draw(1, self.heads, self.queries, self.seqlen)] if self.bias else []
        return query, key, value, *bias, grad_out

    def keeps(self, rows: Tensor) -> Tensor | None:
        """Which keys the rows see, (rows, seqlen) bool, where causal and window do not say it all."""
        return None

    def judge(self, inputs: tuple[Tensor, ...]) -> Judge:
        from fastattn.bench.accuracy import DenseJudge
        from fastattn.bench.layer import LayerJudge

        return (LayerJudge if self.layer else DenseJudge)(self, inputs)

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


def _is_attention(problem: Problem) -> bool:
    return problem.layer is None


def implementation(name: str) -> Implementation:
    """Look up `naive`, `sdpa`, `sdpa:<torch backend>`, `fastattn`, `fastattn:<backend>`, `flex`, a peer or a mechanism.

    Raises:
        ValueError: no such implementation.
    """
    kind, _, backend = name.partition(":")
    if name == "naive":
        return Implementation(name, bind_naive, naive_bytes, subject=_is_attention)
    if name == "flex":
        return Implementation(name, bind_flex, compiles=True, subject=_is_attention)
    if name in PEERS:
        return Implementation(name, PEERS[name].bind, subject=_is_attention, module=PEERS[name].module)
    if kind == "sdpa":
        if not backend:
            return Implementation(name, bind_sdpa)
        if backend in SDPA_BACKENDS:
            return Implementation(
                name,
                lambda p: bind_sdpa(p, SDPA_BACKENDS[backend]),
                naive_bytes if backend == "math" else no_bytes,
                subject=_is_attention,
            )
        raise ValueError(f"no SDPA backend {backend!r}; torch has {', '.join(SDPA_BACKENDS)}")
    if name == "fastattn:sdpa":
        raise ValueError("fastattn:sdpa is PyTorch's attention, not ours; there is sdpa")
    if kind == "fastattn":
        return Implementation(
            name,
            lambda p: bind_fastattn(p, backend or None),
            naive_bytes if backend == "reference" else no_bytes,
            subject=_is_attention if backend else anything,
        )
    if kind in MECHANISMS:
        return mechanism(kind, backend)
    raise ValueError(
        f"no implementation {name!r}; there are naive, sdpa, sdpa:<torch backend>, fastattn, fastattn:<backend>, flex, "
        f"{', '.join((*PEERS, *MECHANISMS))}"
    )


def default_implementations(device: torch.device) -> tuple[str, ...]:
    """Naive attention, fastattn and whatever of SDPA runs on the device."""
    if device.type == "cuda":
        return ("naive", "sdpa", "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "flex", "fastattn")
    return ("naive", "sdpa", "fastattn")
