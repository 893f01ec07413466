"""The random directions of a layer with mechanism="performer": which they are, when they change, what is saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fastattn.nn import MultiheadAttention, Performer

EMBED, HEADS = 12, 3
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def performer(seed: int | None = None, interval: int | None = None, **options: Any) -> MultiheadAttention:
    mechanism = Performer(8, seed=seed, redraw_interval=interval, **options)
    return MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, mechanism=mechanism)


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def projection(layer: MultiheadAttention) -> Tensor:
    assert layer.mixer is not None
    return layer.mixer.projection.clone()


def test_directions_are_fixed_by_a_seed() -> None:
    """Fails if equal seeds draw unequal directions, layers without a seed equal ones, torch's seed does not fix those,
    or a redraw repeats."""
    assert torch.equal(projection(performer(5)), projection(performer(5)))
    assert not torch.equal(projection(performer(5)), projection(performer(6)))
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append([projection(performer()), projection(performer())])
    assert not torch.equal(*drawn[0])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    layer = performer(5)
    seen = [projection(layer)]
    for _ in range(3):
        layer.mixer.redraw()
        seen.append(projection(layer))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    layer.mixer.reset_parameters()
    assert torch.equal(projection(layer), seen[0])


def test_directions_are_redrawn_on_schedule() -> None:
    """Fails if a redraw comes early or late, in eval mode or within a carried state, or is not the seed's next draw."""
    x = torch.randn(2, 5, EMBED, dtype=torch.float64)
    layer, twin = performer(7, interval=3), performer(7)
    for step in range(8):
        attend(layer, x)
        attend(layer.eval(), x)
        layer.train()
        if step in (3, 6):
            twin.mixer.redraw()
        assert torch.equal(projection(layer), projection(twin)), step
    q, k, v = torch.randn(3, 1, HEADS, 5, 4, dtype=torch.float64)
    for _ in range(7):
        _, state = layer.mixer(q, k, v, None, causal=True, return_state=True)
        layer.mixer(q, k, v, None, causal=True, initial_state=state)
    assert torch.equal(projection(layer), projection(twin))


def test_state_dict_continues_the_schedule() -> None:
    """Fails if a layer loaded in the middle of a schedule has other directions then or at the next redraws."""
    x = torch.randn(2, 5, EMBED, dtype=torch.float64)
    layer = performer(interval=2)
    for _ in range(4):
        attend(layer, x)
    other = performer(interval=2)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    for _ in range(5):
        assert torch.equal(attend(layer, x), attend(other, x))
    assert torch.equal(projection(layer), projection(copy.deepcopy(layer)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_redraws_and_checkpointing(reentrant: bool) -> None:
    """Fails if the forward that a checkpoint repeats in the backward counts as a step, or sees other directions."""
    layer, plain = performer(1, interval=1), performer(1, interval=1)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, EMBED, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        checkpoint(attend, layer, x, use_reentrant=reentrant).square().sum().backward()
        assert_close(x.grad, torch.autograd.grad(attend(plain, x).square().sum(), x)[0], **EXACT)
        x.grad = None


def test_redraw_between_forward_and_backward() -> None:
    """Fails if a redraw changes the gradient of a call that came before it."""
    layer = performer(1, features="relu")
    x = torch.randn(2, 5, EMBED, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(attend(layer, x).sum(), x)[0]
    out = attend(layer, x)
    layer.mixer.redraw()
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)


def test_redraws_in_compiled_code() -> None:
    """Fails if a compiled layer misses a redraw, or compiles anew at every step."""
    torch._dynamo.reset()
    layer, plain = performer(2, interval=2), performer(2, interval=2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, EMBED, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4, fail_on_recompile_limit_hit=True):
        for _ in range(9):
            assert torch.equal(attend(compiled, x), attend(plain, x))
