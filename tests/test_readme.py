"""The README and the guides tell the truth: their Python runs, and the support matrix is what the capability tables say.

Fails when an example raises or computes nonsense, or when a table changed and the README did not.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def run_examples(document: Path) -> dict[str, Any]:
    """The names that a document's Python leaves behind, its blocks run one after another."""
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"__name__": document.stem}
    for block in blocks:
        exec(compile(block, str(document), "exec"), names)
    return names


def test_readme_examples_run() -> None:
    names = run_examples(ROOT / "README.md")
    assert names["out"].shape == (2, 1024, 512)
    assert torch.isfinite(names["out"]).all()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_guide_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples(ROOT / "docs" / name)


def test_support_matrix_is_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "support_matrix.py"), "--check"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
