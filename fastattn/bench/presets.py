"""Named sets of problems for `fastattn bench --preset`, and the figures that the CPU kernels are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastattn.bench.results import OK, Results, Row
from fastattn.bench.suites import PEERS, Problem, grid


@dataclass(frozen=True)
class Preset:
    """Problems, the time they get, whether a memory profile follows, and what is measured instead of the default."""

    problems: Callable[[], list[Problem]]
    time_limit_s: float
    what: str
    profile_seqlens: tuple[int, ...] = ()
    implementations: tuple[str, ...] = ()


def _quickstart() -> list[Problem]:
    """Every kind of call at short and middle lengths; the longest only where they say most (causal, as in training)."""
    dtypes, both = ("float32", "bfloat16"), (False, True)
    short = (512, 1024, 2048)
    return [
        *_merge(grid((*short, 4096), dtypes=dtypes, causal=both), grid((8192,), dtypes=dtypes, causal=(True,))),
        *grid((*short,), head_dims=(128,), dtypes=dtypes, causal=both),
        *_merge(
            grid((*short, 4096), dtypes=dtypes, causal=(True,), modes=("fwdbwd",)),
            grid((8192,), causal=(True,), modes=("fwdbwd",)),
        ),
        *grid(short, dtypes=dtypes, causal=(False,), modes=("fwdbwd",)),
    ]


def _merge(*groups: Sequence[Problem]) -> list[Problem]:
    """One list in which problems that belong to one table stand together, by length."""
    tables: dict[tuple, list[Problem]] = {}
    for problem in (p for group in groups for p in group):
        tables.setdefault((problem.mode, problem.dtype, problem.causal, problem.head_dim), []).append(problem)
    return [problem for table in tables.values() for problem in table]


def _figures() -> list[Problem]:
    lengths = (512, 1024, 2048, 4096, 8192)
    dtypes = ("float32", "bfloat16")
    return [
        *grid(lengths, head_dims=(64, 128), dtypes=dtypes, causal=(False, True)),
        *grid(lengths, head_dims=(64, 128), dtypes=dtypes, causal=(True,), modes=("fwdbwd",)),
    ]


def _cpu() -> list[Problem]:
    """What sets CPUs apart: long and short calls, float16, windows, dropout, and decoding over a long cache."""
    long, short = (4096, 8192), (512, 1024)
    queries = Problem(16384, head_dim=128, heads=32, kv_heads=32, q_len=1)
    return [
        *grid(long, dtypes=("float32", "bfloat16", "float16"), causal=(False,)),
        *grid(short, dtypes=("float32", "bfloat16")),
        *grid((2048,), dtypes=("bfloat16", "float16"), modes=("fwdbwd",)),
        *(replace(p, window=511) for p in grid(long)),
        *(replace(p, dropout=0.1) for p in grid((2048, 4096), modes=("fwdbwd",))),
        *(replace(queries, dtype=dtype, kv_heads=n) for dtype in ("float32", "bfloat16") for n in (32, 8)),
    ]


def _gpu(seqlens: Sequence[int], window: int, decode: Sequence[int], width: int = 2048) -> list[Problem]:
    """Plain attention over `seqlens`, then the features that few libraries have, then decoding over `decode` keys.

    Every call has as many tokens as the longest sequence, and heads that together are `width` wide.
    """
    base = Problem(0, dtype="bfloat16")

    def cases(lengths: Sequence[int], dims: Sequence[int], masks: Sequence[bool], **feature: Any) -> list[Problem]:
        shapes = grid(
            lengths,
            head_dims=dims,
            dtypes=(base.dtype,),
            causal=masks,
            modes=("fwdbwd",) if "dropout" in feature else ("fwd", "fwdbwd"),
        )
        heads = {dim: max(1, width // dim) for dim in dims}
        return [
            replace(p, batch=longest // p.seqlen, heads=heads[p.head_dim], kv_heads=heads[p.head_dim], **feature)
            for p in shapes
        ]

    longest, long = seqlens[-1], seqlens[-2:]
    queries = replace(base, heads=32, kv_heads=8, head_dim=128, q_len=1)
    return [
        *cases(seqlens, (64, 128, 256), (False, True)),
        *cases(long, (512,), (False, True)),
        # A bias is as large as the scores of a sequence: at middle lengths.
        *cases([n for n in seqlens if longest / 8 <= n < longest / 2], (128,), (False,), bias=True),
        *cases(long, (128,), (True,), window=window),
        *cases(seqlens[-1:], (128,), (True,), dropout=0.1),
        *(replace(queries, seqlen=n, batch=decode[-1] // n) for n in decode),
    ]


GPU_IMPLEMENTATIONS = (
    "naive",
    *("sdpa", "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "sdpa:math"),
    *("flex", *PEERS, "fastattn"),
)

PRESETS = {
    "quickstart": Preset(
        _quickstart,
        115.0,
        "forward and forward + backward, float32 and bfloat16, 512 to 8192, then a memory profile",
        (512, 1024, 2048, 4096, 8192),
    ),
    "quick": Preset(lambda: grid((256, 512, 1024), modes=("fwd", "fwdbwd")), 10.0, "a first look in seconds"),
    "cpu": Preset(_cpu, 240.0, "on a CPU: long and short calls, float16, windows, dropout and decoding"),
    "gpu": Preset(
        lambda: _gpu((512, 1024, 2048, 4096, 8192, 16384), 1023, (4096, 8192, 16384, 32768, 65536, 131072)),
        420.0,
        "on a GPU: plain attention and its features in bfloat16, 16k tokens, then decoding, beside every peer",
        implementations=GPU_IMPLEMENTATIONS,
    ),
    "gpu-dry": Preset(
        lambda: _gpu((32, 256), 15, (32, 64), width=128),
        20.0,
        "the same kinds of call in a few seconds on a CPU, to try the code that measures them",
        # flex_attention compiles for ten seconds on a CPU, and has no backward there.
        implementations=tuple(name for name in GPU_IMPLEMENTATIONS if name != "flex"),
    ),
    "figures": Preset(_figures, 900.0, "the cases that the CPU kernels' speed targets name"),
}


@dataclass(frozen=True)
class Target:
    """A ratio to SDPA that fastattn is to reach on the cases of one (mode, dtype, mask).

    It is met when the geometric mean over the cases reaches `ratio` and every case reaches `SINGLE_CASE` of it.
    """

    mode: str
    dtype: str
    causal: bool
    ratio: float

    def cases(self, results: Results) -> list[Row]:
        wanted = (self.mode, self.dtype, self.causal)
        return [
            row
            for row in results.rows
            if row.implementation == "fastattn" and (row.problem.mode, row.problem.dtype, row.problem.causal) == wanted
        ]


SINGLE_CASE = 0.85

# On 2 threads of an AVX-512 AMD CPU, lengths 512 to 8192, head sizes 64 and 128, batch x heads 4.
CPU_TARGETS = (
    Target("fwd", "float32", False, 2.2),
    Target("fwd", "float32", True, 2.5),
    Target("fwd", "bfloat16", False, 4.0),
    Target("fwd", "bfloat16", True, 4.5),
    Target("fwdbwd", "float32", True, 2.6),
    Target("fwdbwd", "bfloat16", True, 3.4),
)


@dataclass(frozen=True)
class Outcome:
    """A target against a run; `mean` and `lowest` are None where no case was measured."""

    target: Target
    cases: int
    unmeasured: int
    mean: float | None
    lowest: float | None

    @property
    def met(self) -> bool:
        if self.mean is None or self.lowest is None or self.unmeasured:
            return False
        return self.mean >= self.target.ratio and self.lowest >= SINGLE_CASE * self.target.ratio


def judge_target(target: Target, results: Results) -> Outcome:
    rows = target.cases(results)
    ratios = [row.speedup["sdpa"] for row in rows if row.status == OK and "sdpa" in row.speedup]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
    return Outcome(target, len(ratios), len(rows) - len(ratios), mean, min(ratios, default=None))
