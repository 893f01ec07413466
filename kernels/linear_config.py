"""Tile sizes of the linear kernels: one table a kernel, by the head of query and key (padded) and the operands.

Chosen from what the compiler reports (registers, spills, shared memory; tests/check_triton.py), not yet from timings.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """A tile is block_m features by block_v columns of the values, either by the steps of a chunk."""

    block_m: int
    block_v: int
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """By what multiplies matrices."""

    bfloat16: Config
    projected: Config  # bfloat16 too, where features are projections, computed beside the tile
    tf32: Config
    float32: Config  # without tensor cores


SUB = 16  # steps of a block; vector decay takes matrix products only between these, and they take 16

_C = Config
STATE = {
    64: Choice(_C(64, 64, 4, 3), _C(64, 64, 4, 2), _C(64, 64, 4, 2), _C(32, 32, 4, 1)),
    128: Choice(_C(64, 64, 4, 2), _C(64, 64, 4, 2), _C(64, 64, 4, 2), _C(32, 32, 4, 1)),
    256: Choice(_C(64, 64, 4, 2), _C(32, 64, 4, 2), _C(64, 64, 4, 2), _C(32, 32, 8, 1)),
}
OUTPUT = {
    64: Choice(_C(64, 64, 4, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 1)),
    128: Choice(_C(64, 64, 4, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 1)),
    256: Choice(_C(64, 64, 4, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 1)),
}
GRADIENT = {
    64: Choice(_C(64, 64, 8, 2), _C(32, 64, 8, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 1)),
    128: Choice(_C(64, 64, 8, 2), _C(32, 64, 8, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 1)),
    256: Choice(_C(64, 64, 8, 2), _C(32, 64, 8, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 1)),
}
DELTA = {  # the systems of the delta rule
    64: Choice(_C(32, 32, 8, 2), _C(32, 32, 8, 2), _C(16, 16, 8, 1), _C(32, 32, 8, 1)),
    128: Choice(_C(32, 32, 8, 2), _C(32, 32, 8, 2), _C(16, 16, 8, 1), _C(32, 32, 8, 1)),
    256: Choice(_C(32, 32, 8, 2), _C(32, 32, 8, 2), _C(16, 16, 8, 1), _C(32, 32, 8, 1)),
}
SCAN = {  # its states: all features at once
    64: Choice(_C(64, 32, 4, 2), _C(64, 32, 4, 2), _C(64, 32, 4, 1), _C(32, 32, 8, 1)),
    128: Choice(_C(64, 32, 8, 2), _C(64, 32, 8, 2), _C(64, 32, 8, 1), _C(32, 16, 16, 1)),
    256: Choice(_C(64, 16, 8, 1), _C(64, 16, 8, 1), _C(64, 16, 8, 1), _C(32, 16, 16, 1)),
}
VECTOR = {  # within chunks, where each feature decays on its own
    64: Choice(_C(32, 64, 4, 2), _C(32, 64, 4, 2), _C(32, 64, 4, 1), _C(16, 32, 4, 1)),
    128: Choice(_C(32, 64, 4, 2), _C(32, 64, 4, 2), _C(32, 64, 4, 1), _C(16, 32, 4, 1)),
    256: Choice(_C(32, 64, 4, 2), _C(32, 64, 4, 2), _C(32, 64, 4, 1), _C(16, 32, 4, 1)),
}


def chunk(operand: str) -> int:
    """Steps of a chunk; products are taken in `operand`."""
    return 32 if operand == "float32" else 64


def config(table: dict[int, Choice], width: int, operand: str, projected: bool) -> Config:
    """The tile for heads padded to width."""
    choice = table[min(max(width, min(table)), max(table))]
    return getattr(choice, "projected" if projected and operand == "bfloat16" else operand)
