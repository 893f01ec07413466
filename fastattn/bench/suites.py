"""What is measured: problems, the implementations set beside each other, and named sets of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

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

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One attention call over query (batch, heads, seqlen, head_dim) and as many keys, `kv_heads` of them."""

    seqlen: int
    head_dim: int = 64
    heads: int = 4
    kv_heads: int = 4
    batch: int = 1
    dtype: str = "float32"
    causal: bool = False
    mode: str = "fwd"  # "fwd", or "fwdbwd" for the forward and all gradients

    @property
    def flops(self) -> float:
        """Multiplications and additions of the matrix products: 4 B H S^2 D, half if causal, backward 2.5 x more."""
        forward = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        return forward * (0.5 if self.causal else 1.0) * (3.5 if self.mode == "fwdbwd" else 1.0)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def label(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.mode} {self.dtype} {mask} B{self.batch} H{heads} D{self.head_dim} L{self.seqlen}"

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query, key, value and the output's gradient, standard normal."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(heads: int) -> Tensor:
            shape = (self.batch, heads, self.seqlen, self.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(self.torch_dtype)

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads), draw(self.heads)


def bind_naive(problem: Problem) -> tuple[str, Attend]:
    from fastattn.dense.naive import naive_attention

    return "matmul, softmax, matmul", lambda q, k, v: naive_attention(q, k, v, causal=problem.causal)


def naive_bytes(problem: Problem) -> int:
    """A low estimate of what naive attention needs: the score matrix and its copies (3 forward, 4 with gradients)."""
    matrix = problem.batch * problem.heads * problem.seqlen**2 * problem.torch_dtype.itemsize
    return matrix * (4 if problem.mode == "fwdbwd" else 3)


def bind_sdpa(problem: Problem, backend: SDPBackend | None = None) -> tuple[str, Attend]:
    gqa = problem.heads != problem.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=gqa)

    if backend is None:
        return "torch's choice", attend

    def attend_with(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return backend.name.lower(), attend_with


def bind_fastattn(problem: Problem, backend: str | None = None) -> tuple[str, Attend]:
    """fastattn's own kernels. A problem that selection would hand to SDPA runs on the next backend of our own."""
    import fastattn

    if backend is None:
        device = default_device()
        query = torch.empty(1, problem.heads, 1, problem.head_dim, dtype=problem.torch_dtype, device=device)
        key = torch.empty(1, problem.kv_heads, 1, problem.head_dim, dtype=problem.torch_dtype, device=device)
        verdicts = fastattn.explain(query.requires_grad_(problem.mode == "fwdbwd"), key, key, causal=problem.causal)
        own = [v.backend for v in verdicts if v.supported and v.backend != "sdpa"]
        if not own:
            raise fastattn.UnsupportedError("no backend of fastattn runs this: see fastattn explain")
        backend = own[0]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, causal=problem.causal, backend=backend)

    return backend, attend


def bind_flex(problem: Problem) -> tuple[str, Attend]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = problem.heads != problem.kv_heads
    mask = None
    if problem.causal:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, problem.seqlen, problem.seqlen, device=default_device().type
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q, k, v, block_mask=mask, enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    return "compiled", attend


def _no_bytes(problem: Problem) -> int:
    return 0


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention. `bind` returns (kernel name, function) or raises to say why it cannot.

    `estimate` is a low estimate in bytes of the memory it needs; an implementation that would not fit is not run. What
    `compiles` at its first call is called once more than others, and after them, so as not to use up their time.
    """

    name: str
    bind: Callable[[Problem], tuple[str, Attend]]
    estimate: Callable[[Problem], int] = _no_bytes
    compiles: bool = False


def implementation(name: str) -> Implementation:
    """Look up `naive`, `sdpa`, `sdpa:<torch backend>`, `fastattn`, `fastattn:<backend>` or `flex`.

    Raises:
        ValueError: no such implementation.
    """
    family, _, backend = name.partition(":")
    if name == "naive":
        return Implementation(name, bind_naive, naive_bytes)
    if name == "flex":
        return Implementation(name, bind_flex, compiles=True)
    if family == "sdpa":
        if not backend:
            return Implementation(name, bind_sdpa)
        if backend in SDPA_BACKENDS:
            return Implementation(
                name, lambda p: bind_sdpa(p, SDPA_BACKENDS[backend]), naive_bytes if backend == "math" else _no_bytes
            )
        raise ValueError(f"no SDPA backend {backend!r}; torch has {', '.join(SDPA_BACKENDS)}")
    if family == "fastattn":
        return Implementation(
            name,
            lambda p: bind_fastattn(p, backend or None),
            naive_bytes if backend == "reference" else _no_bytes,
        )
    raise ValueError(
        f"no implementation {name!r}; there are naive, sdpa, sdpa:<torch backend>, fastattn, fastattn:<backend>, flex"
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
