"""timm imports torchvision, and transformers too wherever it is installed.

Its wheel may be built for another variant of torch (CUDA) than is installed. It then lacks its operators, which no test
needs, but whose schemas its import looks up.
"""

import contextlib

import torch

with contextlib.suppress(ImportError):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        schemas = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
