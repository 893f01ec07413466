"""Linear attention as something to measure: its mechanisms, a case of one of them, and fastattn's own call of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn.linear
from fastattn import backends
from fastattn.bench.case import Attend, Case, Implementation, Judge, default_device
from fastattn.linear.linformer import linformer_attention
from fastattn.linear.nystrom import nystrom_attention
from fastattn.linear.random_features import random_projection

# Each step's gate is the sigmoid of a normal number, to this power, as gated linear attention models have it.
GATE_POWER = 1 / 16


@dataclass(frozen=True)
class Mechanism:
    """A kind of linear attention; `ranks` names what its width counts, and `rank` is how many there are by default."""

    words: str
    extras: tuple[str, ...] = ()  # inputs besides query, key and value
    masks: tuple[bool, ...] = (True,)  # causal, or not, or both
    ranks: str = ""
    rank: int = 0
    approximates: bool = False  # softmax attention: its distance from that is stated


MECHANISMS = {
    "linear": Mechanism("normalised linear attention", masks=(True, False)),
    "linear-sum": Mechanism("linear attention, not normalised"),
    "retention": Mechanism("retention"),
    "simple-gla": Mechanism("simple GLA", ("decay",)),
    "gla": Mechanism("GLA", ("decay",)),
    "delta": Mechanism("delta rule", ("beta",)),
    "gated-delta": Mechanism("gated delta rule", ("beta", "decay")),
    "performer": Mechanism("Performer", (), (True, False), "features", 256, True),
    "linformer": Mechanism("Linformer", ("key_projection", "value_projection"), (False,), "keys", 256, True),
    "nystrom": Mechanism("Nystrom", (), (False,), "landmarks", 64, True),
    "mean": Mechanism("the mean of the values", (), (True, False), approximates=True),
}


@dataclass(frozen=True)
class LinearProblem(Case):
    """One call of linear attention, or with `step` one step of it after `seqlen` others.

    Queries and keys of "linear" and "linear-sum" are features, as a feature map before the call would have made them.
    """

    family: ClassVar[str] = "linear"

    mechanism: str = "linear"
    width: int | None = None  # features, keys or landmarks: as many as the mechanism has by default
    value_dim: int | None = None  # head_dim
    step: bool = False

    def __post_init__(self) -> None:
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism: no {self.mechanism!r}; there are {', '.join(MECHANISMS)}")
        if self.causal not in self.kind.masks:
            raise ValueError(f"mechanism: {self.mechanism} is {'not' if self.causal else 'only'} causal")
        if self.width is not None and not self.kind.ranks:
            raise ValueError(f"width: {self.mechanism} has none but the head size")
        if self.mechanism == "mean" and self.mode != "fwd":
            raise ValueError("mechanism: the mean of the values is forward only")
        if self.step and (self.mechanism != "linear" or self.mode != "fwd" or not self.causal):
            raise ValueError("step: only of causal normalised linear attention, and forward only")

    @property
    def kind(self) -> Mechanism:
        return MECHANISMS[self.mechanism]

    @property
    def rank(self) -> int:
        """How many features, keys or landmarks; the head size where the mechanism has none of its own."""
        return self.width or self.kind.rank or self.head_dim

    @property
    def values(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def flops(self) -> float:
        """Multiplications and additions of the recurrence, which are fewer than those of any chunkwise algorithm.

        For each step and head, 2 M Dv for the state and 2 M Dv for the output; features and projections on top. The
        backward is 2.5 x the forward: the states again, and four products.
        """
        tokens = 1 if self.step else self.seqlen
        product = 2.0 * self.rank * self.values
        each = {
            "delta": 3 * product,
            "gated-delta": 3 * product,
            "performer": 2 * product + 4.0 * self.rank * self.head_dim,
            "linformer": 4.0 * self.rank * (self.head_dim + self.values),
            "nystrom": 4.0 * self.rank * (self.head_dim + self.values),
            "mean": 2.0 * self.values,
        }.get(self.mechanism, 2 * product)
        return self.batch * self.heads * tokens * each * (3.5 if self.mode == "fwdbwd" else 1.0)

    @property
    def feature(self) -> str:
        words = (
            self.kind.words,
            f"{self.rank} {self.kind.ranks}" if self.kind.ranks else "",
            "" if self.values == self.head_dim else f"value size {self.values}",
            "one step" if self.step else "",
            "" if self.data == "normal" else f"{self.data} data",
        )
        return ", ".join(filter(None, words))

    @property
    def lines_up(self) -> bool:
        return True

    @property
    def approximates_softmax(self) -> bool:
        return self.kind.approximates

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        draw = self.drawing(device, seed)
        query, key, value = self.draw_qkv(draw, self.seqlen, self.values)
        grad_out = draw(self.batch, self.heads, self.seqlen, self.values)
        if self.mechanism.startswith("linear"):
            query, key = (F.elu(x) + 1 for x in (query, key))
        if self.mechanism.endswith("delta"):
            query, key = (F.normalize(x, dim=-1) for x in (query, key))
        if self.step:
            before, features = value.float(), key.float()
            state = features.mT @ before, features.sum(2)
            return *(x[:, :, -1:].contiguous() for x in (query, key, value)), *state, grad_out[:, :, -1:]
        shape = (self.batch, self.heads, self.seqlen)
        accumulate = torch.promote_types(self.torch_dtype, torch.float32)  # which models compute gates in
        gate = (*shape, self.head_dim) if self.mechanism == "gla" else shape
        extras = {
            "beta": lambda: torch.sigmoid(draw(*shape)),
            "decay": lambda: GATE_POWER * F.logsigmoid(draw(*gate).to(accumulate)),
            "key_projection": lambda: self._pooling(device),
            "value_projection": lambda: self._pooling(device),
        }
        return query, key, value, *(extras[name]() for name in self.kind.extras), grad_out

    def _pooling(self, device: torch.device) -> Tensor:
        """(rank, seqlen): means over equal parts of the sequence, in place of a learned projection."""
        part = torch.arange(self.seqlen, device=device) * self.rank // self.seqlen
        pooling = F.one_hot(part, self.rank).mT.to(torch.float32)
        return (pooling / pooling.sum(1, keepdim=True).clamp(min=1)).to(self.torch_dtype)

    def judge(self, inputs: tuple[Tensor, ...]) -> Judge:
        from fastattn.bench.linear.accuracy import LinearJudge

        return LinearJudge(self, inputs)

    def projection(self, device: torch.device) -> Tensor:
        """(rank, head_dim): a Performer's random features, the same for every implementation."""
        return _projection(self.rank, self.head_dim, device)

    def options(self, device: torch.device, *, last_head: bool = False) -> dict[str, Any]:
        """What `fastattn.linear.explain` takes besides the inputs; with `last_head`, for those of the last head."""
        return _options(self, device, last_head)

    def named(self, extras: tuple[Tensor, ...]) -> dict[str, Any]:
        """Inputs after query, key and value, by the name of the argument that they are."""
        return dict(zip(self.kind.extras, extras, strict=True))

    def call(self, *, last_head: bool = False, backend: str | None = None) -> Attend:
        """fastattn's function of the inputs."""
        if self.step:
            return lambda q, k, v, kv, z: _step(q, k, v, kv, z, backend)
        if self.mechanism == "nystrom":
            return lambda q, k, v: nystrom_attention(q, k, v, num_landmarks=self.rank, backend=backend)
        if self.mechanism == "linformer":
            return lambda q, k, v, e, f: linformer_attention(
                q, k, v, key_projection=e, value_projection=f, backend=backend
            )
        # Without return_state they return the output alone.
        function: Any = fastattn.linear.delta_rule if "beta" in self.kind.extras else fastattn.linear.linear_attention

        def attend(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
            options = {} if "beta" in self.kind.extras else self.options(q.device, last_head=last_head)
            return function(q, k, v, **options, **self.named(extras), backend=backend)

        return attend


@cache
def _projection(rank: int, head_dim: int, device: torch.device) -> Tensor:
    return random_projection(rank, head_dim, generator=torch.Generator().manual_seed(0)).to(device)


@cache
def _options(problem: LinearProblem, device: torch.device, last_head: bool) -> dict[str, Any]:
    feature_map: Any = "identity"
    if problem.mechanism == "performer":
        feature_map = fastattn.linear.softmax_features(problem.projection(device))
    elif problem.mechanism == "mean":
        feature_map = _ones
    options = {
        "causal": problem.causal,
        "feature_map": feature_map,
        "normalize": problem.mechanism in ("linear", "performer", "mean"),
    }
    if problem.mechanism == "retention":  # log(1 - 2^(-5 - h))
        decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(problem.heads, device=device)))
        options["decay"] = decay[-1:] if last_head else decay
    return options


def _ones(x: Tensor) -> Tensor:
    """A feature map with which every key weighs the same."""
    return torch.ones_like(x[..., :1])


def _step(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor, backend: str | None) -> Tensor:
    """One step, as a sequence of length one; the state after it is dropped."""
    q, k, v = (x[:, :, 0] for x in (q, k, v))
    state = fastattn.linear.LinearState(kv, z)
    return fastattn.linear.linear_attention_step(q, k, v, state, backend=backend)[0][:, :, None]


def bind_fastattn(problem: LinearProblem, backend: str | None = None) -> tuple[str, Attend]:
    """fastattn's call of the mechanism, and the backend that runs it."""
    return backend or _selected(problem, default_device()), problem.call(backend=backend)


def _selected(problem: LinearProblem, device: torch.device) -> str:
    """The backend that would run the problem, asked for a short one."""
    short = replace(problem, seqlen=1, batch=1, step=False)
    inputs = [x.requires_grad_(problem.mode == "fwdbwd") for x in short.inputs(device)[:-1]]
    query, key, value, *extras = inputs
    verdicts: backends.Explanation
    if problem.mechanism in ("linformer", "nystrom"):
        with backends.own_backends():
            verdicts = fastattn.explain(query, key, value)
    else:
        state = {"return_state": True} if problem.step else {}
        verdicts = fastattn.linear.explain(
            query, key, value, **problem.options(device), **problem.named(tuple(extras)), **state
        )
    return next(v.backend for v in verdicts if v.selected)


def mechanism(name: str, width: str) -> Implementation:
    """A mechanism in place of softmax attention: fastattn's, of the same shape as the problem it stands in for.

    Raises:
        ValueError: a width that is none.
    """
    if width and not (width.isdigit() and int(width) and MECHANISMS[name].ranks):
        raise ValueError(f"no implementation {name}:{width}; write {name}" + ":256" * bool(MECHANISMS[name].ranks))

    def solves(problem: Case) -> LinearProblem:
        return LinearProblem(**problem.shape(), mechanism=name, width=int(width) if width else None)

    def subject(problem: Any) -> bool:
        plain = problem.lines_up or problem.data != "normal"
        able = problem.causal in MECHANISMS[name].masks and (name != "mean" or problem.mode == "fwd")
        return plain and able and (name != "linformer" or solves(problem).rank <= problem.seqlen)

    return Implementation(f"{name}:{width}" if width else name, bind_fastattn, subject=subject, solves=solves)
