"""The README and the guides tell the truth: their Python runs, block after block. Fails when an example raises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks or name == "docs/architecture.md"
    names: dict[str, Any] = {"__name__": "example"}
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    if name == "README.md":
        assert names["out"].shape == (2, 1024, 512)
        assert torch.isfinite(names["out"]).all()
