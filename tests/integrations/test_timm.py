"""timm's vision transformers call torch's scaled_dot_product_attention, so `activate` and `override_sdpa` reach them.

Random weights; images of 64 x 64. Fails where outputs or gradients change, or where no kernel ran.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import _extension

pytestmark = pytest.mark.skipif(_extension.unavailable() is not None, reason="the C++ extension is missing")


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    return pytest.importorskip("timm")


MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2},
    "vit_medium_patch16_gap_256": {"depth": 2},  # no class token, pooled
    "deit3_small_patch16_224": {"depth": 2},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 4},  # a learned relative position bias
    "eva02_tiny_patch14_224": {"depth": 2},  # rotary positions, SwiGLU
}


def step(model: nn.Module, image: Tensor) -> list[Tensor]:
    logits = model(image)
    return [logits.detach(), *torch.autograd.grad(logits.sin().sum(), list(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize("name", list(MODELS))
def test_model_is_the_same(timm: ModuleType, name: str) -> None:
    image_size = 56 if "patch14" in name else 64
    model = timm.create_model(name, num_classes=10, img_size=image_size, **MODELS[name]).double()
    for parameter in model.parameters():  # some biases, and the scale of residual branches, start near zero
        nn.init.normal_(parameter, std=0.1)
    image = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    expected = step(model, image)
    with fastattn.override_sdpa() as report:
        found = step(model, image)
    assert report.items() == [(("fastattn", "cpu"), 2)]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with fastattn.activated() as report:
        found = step(model, image)
    # A bias that needs a gradient is not for torch's flash attention.
    assert report.count("torch" if name.startswith("beit") else "fastattn") == 2, report
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
