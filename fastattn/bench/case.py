"""What every family's benchmarks are made of: a case (one call to measure) and the implementations that compute it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MODES = ("fwd", "fwdbwd")

# What queries and keys are drawn as: standard normal; with a quarter of that variance, so that softmax weights differ
# little; or standard normal and alike at neighbouring positions, as in signals.
DATA = ("normal", "mild", "smooth")
SMOOTH_OVER = 64

C = TypeVar("C", bound="Case")
Attend = Callable[..., Tensor]
Draw = Callable[..., Tensor]  # of a shape: standard normal, in the case's dtype


@dataclass(frozen=True)
class Check:
    """The outcome for one implementation: errors by tensor name, relative to the largest reference value."""

    errors: dict[str, float]
    bars: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(self.errors[name] <= self.bars[name] for name in self.bars)

    @property
    def worst(self) -> tuple[float, float]:
        """(error, bar) of the tensor that is closest to its bar or furthest above it."""
        name = max(self.bars, key=lambda n: self.errors[n] / self.bars[n])
        return self.errors[name], self.bars[name]


class Judge(Protocol):
    """The float64 truth of one case; `checked` says in words which part of a result it looks at."""

    checked: str

    def check(self, results: tuple[Tensor, ...]) -> Check:
        """Judge (out,) or (out, the gradient of every input)."""
        ...

    def distance(self, out: Tensor) -> float:
        """How far the output of another kind of attention is from this one's: the norm of the difference, relative."""
        ...


@dataclass(frozen=True)
class Case:
    """One call over query (batch, heads, seqlen, head_dim) and as many keys, `kv_heads` of them."""

    family: ClassVar[str]

    seqlen: int
    head_dim: int = 64
    heads: int = 4
    kv_heads: int = 4
    batch: int = 1
    dtype: str = "float32"
    causal: bool = False
    mode: str = "fwd"  # "fwd", or "fwdbwd" for the forward and all gradients
    data: str = "normal"  # of `DATA`: how queries and keys are drawn

    @property
    def flops(self) -> float:
        """Multiplications and additions of the matrix products."""
        raise NotImplementedError

    @property
    def feature(self) -> str:
        """What sets the case apart from its family's plainest, in words; empty where nothing does."""
        raise NotImplementedError

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """query, key, value, whatever else has a gradient, and the output's gradient."""
        raise NotImplementedError

    def judge(self, inputs: tuple[Tensor, ...]) -> Judge:
        raise NotImplementedError

    @property
    def bytes_read(self) -> int | None:
        """What must be read and written at least, for cases that are judged by it."""
        return None

    @property
    def lines_up(self) -> bool:
        """Whether pictures draw such cases as lines over the length."""
        return not self.feature

    @property
    def approximates_softmax(self) -> bool:
        return False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def label(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        shape = f"{self.mode} {self.dtype} {mask} B{self.batch} H{heads} D{self.head_dim} L{self.seqlen}"
        return f"{shape}, {self.feature}" if self.feature else shape

    def shape(self) -> dict[str, Any]:
        """The fields that a case of any family has."""
        return {f.name: getattr(self, f.name) for f in fields(Case)}

    def drawing(self, device: torch.device, seed: int) -> Draw:
        generator = torch.Generator(device).manual_seed(seed)
        return lambda *shape: torch.randn(shape, generator=generator, device=device).to(self.torch_dtype)

    def draw_qkv(self, draw: Draw, queries: int, value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """query (batch, heads, queries, head_dim), key (batch, kv_heads, seqlen, head_dim) and value, by `DATA`."""

        def vectors(heads: int, length: int) -> Tensor:
            if self.data != "smooth":
                return draw(self.batch, heads, length, self.head_dim) * (0.5 if self.data == "mild" else 1.0)
            steps = draw(self.batch, heads, length + SMOOTH_OVER - 1, self.head_dim)
            return steps.unfold(2, SMOOTH_OVER, 1).sum(-1) / SMOOTH_OVER**0.5

        query, key = vectors(self.heads, queries), vectors(self.kv_heads, self.seqlen)
        return query, key, draw(self.batch, self.kv_heads, self.seqlen, value_dim)


def no_bytes(case: Any) -> int:
    return 0


def anything(case: Any) -> bool:
    return True


def _flops(case: Case) -> float:
    return case.flops


def _itself(case: Any) -> Case:
    return case


@dataclass(frozen=True)
class Implementation:
    """A way to compute a case. `bind` returns (kernel name, function of the inputs) or raises to say why it cannot.

    `solves` gives the case that it computes where that is another one of the same shape (softmax attention beside
    linear attention, say): it is drawn, judged and counted by that. `estimate` is a low estimate in bytes of the memory
    it needs; an implementation that would not fit is not run. `work` is what its time grows with. What `compiles` at
    its first call is called once more than others, and after them, so as not to use up their time. What a case is no
    `subject` of is left out of its table. A peer is measured where its `module` can be imported.
    """

    name: str
    bind: Callable[[Any], tuple[str, Attend]]
    estimate: Callable[[Any], int] = no_bytes
    compiles: bool = False
    subject: Callable[[Any], bool] = anything
    solves: Callable[[Any], Case] = _itself
    work: Callable[[Any], float] = _flops
    module: str | None = None

    def absent(self) -> str | None:
        """Why the peer cannot be measured here; None where it can be, or where it is no peer."""
        if self.module is None:
            return None
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a library built for another torch can fail in any way
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[0] if lines else ''}"
        return None


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def grid(
    base: C,
    seqlens: Iterable[int],
    *,
    head_dims: Iterable[int] = (64,),
    dtypes: Iterable[str] = ("float32",),
    causal: Iterable[bool] = (True,),
    modes: Iterable[str] = ("fwd",),
) -> list[C]:
    """The product of the given values, lengths innermost so that one table's rows stay together."""
    return [
        replace(base, mode=mode, dtype=dtype, head_dim=head_dim, causal=mask, seqlen=seqlen)
        for mode, head_dim, dtype, mask, seqlen in product(modes, head_dims, dtypes, causal, seqlens)
    ]
