"""What a profile measures, as data: which subject, in which implementation, at which length, within which limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Long enough for every library to load and every thread to start, too short to matter.
WARM_UP_LENGTH = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of the built-in subjects; a user's factory brings its own."""

    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    layers: int = 4  # of the language model
    dtype: str = "float32"
    causal: bool = True


@dataclass(frozen=True)
class Subject:
    """`what`: "op" (the bare call), "layer", "lm" (the reference model), or a user's factory, "module:function"."""

    what: str
    implementation: str
    seqlen: int
    shape: Shape = Shape()
    mode: str = "fwdbwd"  # a training step, or "fwd": inference
    device: str = "cpu"
    warm_up: int = WARM_UP_LENGTH  # a length at which the subject runs once before it is measured
    memory_limit: int | None = None  # bytes above what the process holds at the start; CPU only
    time_limit: float | None = None  # seconds for the process that measures, its building of the subject included


@dataclass(frozen=True)
class Effect:
    """What an implementation did to a model: how many layers or calls it took over, and its report in words."""

    changed: int
    report: str


@dataclass
class Step:
    """A subject ready to run: `forward` gives the output, `backward` all gradients from it; None for inference.

    It runs within `scope`, which yields a function that says afterwards what the implementation did, or None.
    """

    name: str
    parameters: Sequence[Tensor]
    inputs: Sequence[Tensor]
    forward: Callable[[], Any]
    backward: Callable[[Any], object] | None
    scope: AbstractContextManager[Callable[[], Effect] | None] = field(default_factory=nullcontext)

    def run(self) -> object:
        out = self.forward()
        return self.backward(out) if self.backward else out


@dataclass(frozen=True)
class Kind:
    """A kind of subject: its implementations, those measured by default, baseline first, and how to build a step."""

    implementations: tuple[str, ...]
    default: tuple[str, ...]
    build: Callable[[Subject, int], Step]
    title: Callable[[Subject], str]
    warm_up: int | None = WARM_UP_LENGTH  # None: the shortest length that is measured
