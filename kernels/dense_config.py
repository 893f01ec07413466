"""Tile sizes of the dense kernels: one table a kernel, by the widest head (padded), the element and the architecture.

Chosen from what the compiler reports (registers, spills, shared memory; tests/check_triton.py), not yet from timings.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """A tile is block_m rows by block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """By element and architecture. `wide`: 16-bit elements on sm_90 and newer, with its larger shared memory."""

    wide: Config
    narrow: Config  # 16-bit elements elsewhere
    float32: Config


FORWARD = {
    64: Choice(Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(32, 32, 4, 2)),
    128: Choice(Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(32, 32, 8, 2)),
    256: Choice(Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(16, 32, 8, 1)),
    512: Choice(Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 16, 8, 1)),
}
KEY_VALUE = {  # gradients of key and value
    64: Choice(Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 32, 8, 1)),
    128: Choice(Config(32, 128, 8, 2), Config(32, 64, 8, 2), Config(16, 32, 8, 1)),
    256: Choice(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
    512: Choice(Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}
QUERY = {  # gradient of query
    64: Choice(Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 32, 8, 1)),
    128: Choice(Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(32, 32, 8, 1)),
    256: Choice(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
    512: Choice(Config(16, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1)),
}
BIAS = {  # gradient of a bias
    64: Choice(Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(32, 32, 4, 1)),
    128: Choice(Config(64, 64, 8, 1), Config(64, 64, 8, 1), Config(32, 32, 8, 1)),
    256: Choice(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
    512: Choice(Config(16, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1)),
}


SPLIT = {  # keys split between programs; block_m is the most rows, few rows take a lower tile
    64: Choice(Config(64, 128, 4, 3), Config(64, 64, 4, 3), Config(16, 64, 4, 2)),
    128: Choice(Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(16, 64, 4, 2)),
    256: Choice(Config(64, 32, 8, 3), Config(64, 32, 8, 3), Config(16, 32, 8, 2)),
    512: Choice(Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 1)),
}
SPLIT_ROWS = 64  # rows, over the heads that share keys, up to which keys are split
SPLIT_CHUNK = 512  # keys a program where the split may depend on nothing else; a multiple of every block_n


def config(table: dict[int, Choice], width: int, itemsize: int, capability: int) -> Config:
    """The tile for heads padded to width, elements of itemsize bytes, and a compute capability (90)."""
    choice = table[min(max(width, min(table)), max(table))]
    if itemsize > 2:
        return choice.float32
    return choice.wide if capability >= 90 else choice.narrow
