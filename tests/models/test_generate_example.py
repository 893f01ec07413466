"""examples/generate.py: trains where there is no model, writes text, and its verdict can fail."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = [
    "--device=cpu",
    "--steps=2",
    "--tokens=12",
    "--batch-size=2",
    "--prompt-len=20",
    "--new-tokens=4",
    "--repeats=1",
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "train_lm", raising=False)
    spec = importlib.util.spec_from_file_location("generate_example", EXAMPLES / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_whole_program(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the program crashes, does not train and save where there is no model or does so again where there is
    one, forgets the prompt, repeats nothing with the same seed, or a way of generating is missing from the table."""
    text = tmp_path / "text"
    text.write_bytes((EXAMPLES / "train_lm.py").read_bytes())
    arguments = [*TINY, f"--text={text}", f"--out={tmp_path}", "--prompt=def größe("]
    assert example.main(arguments) == 0
    first = capsys.readouterr().out
    assert "training one on" in first
    saved = (tmp_path / "model.pt").stat().st_mtime_ns
    assert example.main(arguments) == 0
    second = capsys.readouterr().out
    assert "training" not in second
    assert (tmp_path / "model.pt").stat().st_mtime_ns == saved
    written = [output[output.index("def größe(") : output.rindex("prompts of 20 bytes")] for output in (first, second)]
    assert written[0] == written[1]
    assert len(written[0]) > 22
    assert "they do" in second
    for way in ("static", "paged", "sdpa", "none"):
        assert way in second


def test_different_tokens_fail(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the program succeeds though one way of generating produces another token than the others."""
    text = tmp_path / "text"
    text.write_bytes(b"some text " * 200)
    generate = example.generate

    def wrong(model: torch.nn.Module, *args: object, **options: object) -> list[torch.Tensor]:
        results = generate(model, *args, **options)
        if model.config.attention == "sdpa":
            results[-1][-1] += 1
        return results

    monkeypatch.setattr(example, "generate", wrong)
    assert example.main([*TINY, f"--text={text}", f"--out={tmp_path}"]) == 1


def test_unusable_input(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a text too short, an empty prompt or an impossible number is noticed only after training."""
    text = tmp_path / "text"
    for size, option, message in (
        (300, "--top-k=1", "300 bytes of text are too few"),
        (900, "--prompt=", "--prompt must not be empty"),
        (900, "--top-p=1.5", "must be above 0 and at most 1, got 1.5"),
        (900, "--temperature=-1", "must be a number from 0 on, got -1"),
    ):
        text.write_bytes(b"x" * size)
        with pytest.raises(SystemExit) as error:
            example.main([*TINY, f"--text={text}", f"--out={tmp_path}", option])
        assert message in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "model.pt").exists()
