"""Sparse attention as something to measure: softmax attention over a block mask of some pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastattn import sparse
from fastattn.bench.case import default_device
from fastattn.bench.suites import Problem
from fastattn.blockmask import BlockMask, lists

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WINDOW = 1 / 16  # of the sequence, on either side


@dataclass(frozen=True)
class Pattern:
    """`make` gives the mask. `rule`, the same as flex_attention wants to hear it: (batch, head, query, key) -> bool."""

    words: str
    make: Callable[[SparseProblem], BlockMask]
    rule: Callable[[SparseProblem, BlockMask], Rule]


@dataclass(frozen=True)
class SparseProblem(Problem):
    """One call of softmax attention over the pairs of a pattern, in square blocks of `block`.

    `density` is the share of blocks that "random" keeps.
    """

    family: ClassVar[str] = "sparse"

    pattern: str = "window"
    density: float | None = None
    block: int = 64

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern: no {self.pattern!r}; there are {', '.join(PATTERNS)}")
        if (self.density is not None) != (self.pattern == "random"):
            raise ValueError("density: of random blocks, and only of those")
        if self.q_len or self.bias or self.dropout or self.layer or self.window is not None:
            raise ValueError("pattern: of plain attention only")

    @property
    def mask(self) -> BlockMask:
        return _mask(self.pattern, self.density, self.block, self.seqlen, self.causal, default_device())

    @property
    def rule(self) -> Rule:
        return PATTERNS[self.pattern].rule(self, self.mask)

    @property
    def flops(self) -> float:
        """Those of the pairs that are kept."""
        kept = lists.kept_share(self.mask.lists, self.seqlen, self.seqlen)
        return replace(dense(self), causal=False).flops * kept

    @property
    def feature(self) -> str:
        density = "" if self.density is None else f", {self.density:.0%} of them"
        return f"{PATTERNS[self.pattern].words}{density}, blocks of {self.block}"

    @property
    def lines_up(self) -> bool:
        return self.pattern != "random"

    def keeps(self, rows: Tensor) -> Tensor:
        first, last = int(rows[0]), int(rows[-1]) + 1
        return lists.to_dense(self.mask.lists, (first, last), self.seqlen)[-1, -1, rows - first]


@lru_cache(maxsize=32)
def _mask(
    pattern: str, density: float | None, block: int, seqlen: int, causal: bool, device: torch.device
) -> BlockMask:
    problem = SparseProblem(seqlen, causal=causal, pattern=pattern, density=density, block=block)
    return PATTERNS[pattern].make(problem).to(device)


def _random(p: SparseProblem) -> BlockMask:
    """Blocks drawn at random, and those on the diagonal, so that every query sees a key."""
    blocks = -(-p.seqlen // p.block)
    kept = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < (p.density or 0)
    kept |= torch.eye(blocks, dtype=torch.bool)
    wide = kept.repeat_interleave(p.block, 0).repeat_interleave(p.block, 1)[: p.seqlen, : p.seqlen]
    mask = BlockMask.from_dense(wide, block_size=p.block)
    return mask & sparse.causal(p.seqlen, block_size=p.block) if p.causal else mask


def _window(p: SparseProblem) -> int:
    return int(p.seqlen * WINDOW)


def _lengths(p: SparseProblem) -> list[int]:
    """Documents of lengths 1 : 2 : 3 : ... : 8."""
    ends = [p.seqlen * n * (n + 1) // 72 for n in range(9)]
    return [b - a for a, b in pairwise(ends)]


def _same_document(p: SparseProblem, mask: BlockMask) -> Rule:
    document = torch.repeat_interleave(torch.arange(8), torch.tensor(_lengths(p))).to(mask.device)
    return lambda b, h, i, j: (document[i] == document[j]) & ((i >= j) | (not p.causal))


def _listed(p: SparseProblem, mask: BlockMask) -> Rule:
    """Of patterns that keep whole blocks."""
    first = mask.to_dense()[0, 0, :: p.block, :: p.block].contiguous()
    return lambda b, h, i, j: first[i // p.block, j // p.block] & ((i >= j) | (not p.causal))


PATTERNS: dict[str, Pattern] = {
    "window": Pattern(
        "window of 1/16",
        lambda p: sparse.sliding_window(p.seqlen, window=_window(p), causal=p.causal, block_size=p.block),
        lambda p, mask: _distance(_window(p), p.causal),
    ),
    "documents": Pattern(
        "8 documents",
        lambda p: sparse.documents(_lengths(p), causal=p.causal, block_size=p.block),
        _same_document,
    ),
    "bigbird": Pattern(
        "BigBird (3 + 2 + 3 blocks)",
        lambda p: sparse.bigbird(p.seqlen, causal=p.causal, block_size=p.block),
        _listed,
    ),
    "random": Pattern("random blocks", _random, _listed),
}


def _distance(window: int, causal: bool) -> Rule:
    return lambda b, h, i, j: (i - j <= window) & (i - j >= (0 if causal else -window))


def dense(problem: Any) -> Problem:
    """Softmax attention of the same shape over all pairs."""
    return Problem(**problem.shape())
