"""What the tests of the drop-in layer share: a record of the fused calls, pairs of equal layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastattn.dense.problem import Problem
from fastattn.nn import MultiheadAttention, multihead_attention


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Every problem that fastattn's layers hand to the fused op from here on."""
    problems: list[Problem] = []
    attention_op = multihead_attention.attention_op

    def record(problem: Problem, lse_grad: bool = True) -> tuple[Tensor, Tensor]:
        problems.append(problem)
        return attention_op(problem, lse_grad)

    monkeypatch.setattr(multihead_attention, "attention_op", record)
    return problems


def _randomise(module: nn.Module) -> None:
    # torch starts biases at zero, where a forgotten one would not show.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)


@pytest.fixture
def twins() -> Callable[..., tuple[nn.MultiheadAttention, MultiheadAttention]]:
    """Make torch's layer and fastattn's with the same constructor arguments and the same random parameters."""

    def make(*args: int, dtype: torch.dtype = torch.float64, **options: object):
        theirs = nn.MultiheadAttention(*args, dtype=dtype, **options)
        _randomise(theirs)
        ours = MultiheadAttention(*args, dtype=dtype, **options)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        return theirs, ours

    return make
