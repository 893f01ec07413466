"""examples/compare_mechanisms.py: models see what they should, learn, and are reported. (test_transformer.py trains
each mechanism; here is one of each task.)"""

import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXT = b"".join(bytes([a, 32, b, a, b, 32, 10]) for a in range(97, 123) for b in range(97, 123)) * 16
ARGUMENTS = ["--steps", "16", "--seq-len", "32", "--batch-size", "8", "--lengths", "16", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("compare_mechanisms", EXAMPLES / "compare_mechanisms.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def test_batches(example: ModuleType) -> None:
    """Fails if next bytes are not the next, hidden ones are not hidden or not the targets, too many or too few are, or
    two runs see other batches."""
    tokens = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    for inputs, targets in example.batches(tokens, "next", 4, 20, 1, 2):
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    first, second = (list(example.batches(tokens, "masked", 50, 100, 1, 2)) for _ in range(2))
    for (inputs, targets), (again, _) in zip(first, second, strict=True):
        hidden = inputs == example.MASK
        assert torch.equal(targets == example.IGNORED, ~hidden)
        assert TEXT.find(bytes(torch.where(hidden, targets, inputs)[7].tolist())) >= 0
        assert 0.12 < hidden.double().mean() < 0.18
        assert torch.equal(inputs, again)


def test_whole_program(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a mechanism's loss does not fall well below that of a guess, losses start apart, or a table, the picture
    or the figures are missing."""
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    arguments = [*ARGUMENTS, "--text", str(text), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(example.train_lm, "LEARNING_RATE", 8e-3)
    monkeypatch.setattr(example, "HELD_OUT_SEQUENCES", 4)
    monkeypatch.setattr(example, "TASKS", {"next": ("delta",), "masked": ("linformer",)})

    def train_here(task: str, mechanism: str, argv: Sequence[str]) -> dict[str, Any]:
        assert list(argv) == arguments
        return json.loads(json.dumps(example.train(TEXT, task, mechanism, example.parse_arguments(argv))))

    monkeypatch.setattr(example, "train_in_fresh_process", train_here)
    assert example.main(arguments) == 0
    report = json.loads((tmp_path / "out" / "mechanisms.json").read_text())
    assert [(run["task"], run["mechanism"]) for run in report["runs"]] == [
        (task, mechanism) for task, mechanisms in example.TASKS.items() for mechanism in mechanisms
    ]
    for run in report["runs"]:
        assert run["losses"][0] == pytest.approx(math.log(257), abs=0.3), run["mechanism"]
        assert statistics.fmean(run["losses"][-4:]) < 0.7 * run["losses"][0], (run["mechanism"], run["losses"])
        assert run["held_out_loss"] < 0.7 * run["losses"][0]
        assert set(run["seconds_by_length"]) == {"16", "32"}
    assert (tmp_path / "out" / "mechanisms.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "next byte (causal): " in printed
    assert "hidden bytes (encoder): " in printed
    assert "bigram entropy" in printed


def test_a_run_in_a_process_of_its_own(example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if the program cannot start itself, or the run's result does not come back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    arguments = ["--text", str(text), "--steps", "1", "--seq-len", "16", "--lengths", "16", "--device", "cpu"]
    run = example.train_in_fresh_process("masked", "linformer", arguments)
    assert (run["task"], run["mechanism"], len(run["losses"])) == ("masked", "linformer", 1)


def test_short_text_is_refused(example: ModuleType, tmp_path: Path) -> None:
    """Fails if a text too short to hold some of it out is trained on, or ends in a traceback."""
    text = tmp_path / "text"
    text.write_bytes(TEXT[: example.HELD_OUT_BYTES])
    with pytest.raises(SystemExit, match="65536 bytes of text are too few"):
        example.main(["--text", str(text)])
