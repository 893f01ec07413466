"""Named sets of cases of sparse attention, with the figures to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastattn.bench.case import grid
from fastattn.bench.preset import Preset
from fastattn.bench.results import Row
from fastattn.bench.sparse.problem import SparseProblem
from fastattn.bench.targets import Measure, Run, Target, speedup

BOTH = ("fwd", "fwdbwd")
DENSITIES = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)


def _beside_dense(value: Callable[[Row], float | None]) -> Callable[[Row, Run], float | None]:
    def of(row: Row, run: Run) -> float | None:
        dense = run.get(row.problem, {}).get("dense")
        mine, its = value(row), None if dense is None else value(dense)
        return mine / its if mine and its else None

    return of


# How fast the kept pairs are computed, beside the dense kernel's speed; the dense kernel's memory, beside ours.
rate = Measure("of the dense rate", _beside_dense(lambda row: row.gflops))
thrift = Measure("x less memory than dense", _beside_dense(lambda row: 1 / row.extra_mib if row.extra_mib else None))


def _by_density(base: SparseProblem, seqlen: int, densities: Sequence[float], dtype: str, mode: str) -> list[Any]:
    """Random blocks."""
    plain = replace(base, seqlen=seqlen, pattern="random", density=1.0, dtype=dtype, mode=mode)
    return [replace(plain, density=density) for density in densities]


def _by_pattern(base: SparseProblem, seqlens: Sequence[int], patterns: Sequence[str]) -> list[Any]:
    return [
        p
        for pattern in patterns
        for p in grid(
            replace(base, pattern=pattern), seqlens, head_dims=(base.head_dim,), dtypes=(base.dtype,), causal=(True,),
            modes=BOTH,
        )
    ]  # fmt: skip


def _picks(density: float, mode: str = "fwd", dtype: str = "float32") -> Callable[[SparseProblem], bool]:
    return lambda p: (p.density, p.mode, p.dtype) == (density, mode, dtype)


def _by_flex(p: SparseProblem) -> bool:
    """What flex_attention is measured on: it compiles for ten seconds, every time, and has no backward on a CPU."""
    return p.mode == "fwd" and p.seqlen == 8192 and p.density in (None, 0.03, 0.25)


# On 2 threads of a CPU, head size 64, 4 heads, 8k tokens, blocks of 64.
TARGETS = (
    Target("random blocks, 25 %", 0.85, _picks(0.25), rate),
    Target("random blocks, 3 %", 0.75, _picks(0.03), rate),
    Target("float32, forward", 2.4, lambda p: _by_flex(p) and p.dtype == "float32", speedup("flex")),
    Target("bfloat16, forward", 6.0, lambda p: _by_flex(p) and p.dtype == "bfloat16", speedup("flex")),
    Target("forward + backward, 3 %", 80.0, _picks(0.03, "fwdbwd"), speedup("sdpa")),
    Target("memory, forward", 1 / 1.2, lambda p: p.pattern == "random" and p.mode == "fwd", thrift),
    Target("memory, forward + backward", 1 / 1.2, lambda p: p.pattern == "random" and p.mode == "fwdbwd", thrift),
)
GPU_TARGETS = (
    Target("from 5 % of blocks on", 1 / 1.2, lambda p: (p.density or 0) >= 0.05 and p.mode == "fwd", rate),
    Target("window, documents, BigBird", 1.2, lambda p: p.pattern != "random", speedup("flex")),
)

PLAIN = SparseProblem(0)
WIDE = replace(PLAIN, heads=16, kv_heads=16, head_dim=128, dtype="bfloat16", block=128)
NAMED = ("window", "documents", "bigbird")

SPARSE_PRESETS = {
    "sparse": Preset(
        lambda: [
            *_by_density(PLAIN, 8192, DENSITIES, "float32", "fwd"),
            *_by_density(PLAIN, 8192, (0.03, 0.25, 1.0), "bfloat16", "fwd"),
            *_by_density(PLAIN, 8192, (0.03, 0.12, 0.25), "float32", "fwdbwd"),
            *_by_pattern(PLAIN, (2048, 8192), NAMED),
        ],
        600.0,
        "sparse attention on a CPU: random blocks by density, then patterns by length, beside the dense kernel",
        implementations=("sdpa", "flex", "dense", "fastattn"),
        subjects={
            "flex": _by_flex,
            "sdpa": lambda p: p.seqlen <= 8192 and (p.density is None or p.density == 0.03),
        },
        targets=TARGETS,
    ),
    "sparse-gpu": Preset(
        lambda: [
            *(p for mode in BOTH for p in _by_density(WIDE, 16384, (0.05, *DENSITIES[2:]), "bfloat16", mode)),
            *_by_pattern(WIDE, (16384,), NAMED),
        ],
        240.0,
        "sparse attention on a GPU in bfloat16: random blocks by density, then patterns, beside flex_attention",
        implementations=("sdpa", "flex", "dense", "fastattn"),
        targets=GPU_TARGETS,
    ),
    "sparse-gpu-dry": Preset(
        lambda: [
            *_by_density(replace(PLAIN, block=32), 256, (0.25,), "float32", "fwd"),
            *_by_pattern(PLAIN, (256,), NAMED),
        ],
        20.0,
        "the same kinds of call in a few seconds on a CPU, to try the code that measures them",
        implementations=("naive", "sdpa", "dense", "fastattn"),
    ),
}
