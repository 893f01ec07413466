"""examples/train_lm.py: its measures are right, its verdict can fail, and the whole program runs."""

import importlib.util
import itertools
import json
import math
import random
import sysconfig
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastattn.models import Transformer

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_lm.py"


@pytest.fixture(scope="module")
def train_lm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_lm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("alphabet", [2, 7, 256])
def test_bigram_entropy_equals_brute_force(train_lm: ModuleType, alphabet: int) -> None:
    """Fails if the entropy has another base, conditions on the following byte, or confuses byte pairs."""
    text = bytes(min(random.randrange(alphabet), random.randrange(alphabet)) for _ in range(2000))
    pairs, previous = Counter(itertools.pairwise(text)), Counter(text[:-1])
    expected = -sum(n / (len(text) - 1) * math.log(n / previous[a]) for (a, _), n in pairs.items())
    assert train_lm.bigram_entropy(text) == pytest.approx(expected, rel=1e-12)


def test_bigram_entropy_of_known_texts(train_lm: ModuleType) -> None:
    """Fails if a text whose next byte is certain has entropy, or the direction of prediction is reversed."""
    assert train_lm.bigram_entropy(b"ab" * 50) == pytest.approx(0, abs=1e-12)
    # After 'a' comes 'x' or 'y', half each; after the others 'a' is certain. Backwards nothing is open.
    assert train_lm.bigram_entropy(b"axay" * 100 + b"a") == pytest.approx(math.log(2) / 2)


def test_default_text(train_lm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if files come in another order than by name, tests or packages count, or cap and size are not kept."""
    assert b"class JSONDecoder" in train_lm.read_text(None)[0]
    for name in ("b.py", "a/z.py", "c.txt", "a/tests/q.py", "site-packages/p.py", "a.py", "tests.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    text, description = train_lm.read_text(None)
    assert text == b"<a.py><a/z.py><b.py><tests.py>"
    assert "4 files" in description
    assert "30 bytes" in description
    monkeypatch.setattr(train_lm, "MAX_TEXT_BYTES", 10)
    assert train_lm.read_text(None)[0] == text[:10]


def test_largest_difference_fails_on_nan(train_lm: ModuleType) -> None:
    """Fails if a loss that is not a number passes as agreement, or steps after the compared ones count."""
    assert not train_lm.largest_difference([1.0, math.nan], [1.0, 2.0]) <= 1e9
    assert not train_lm.largest_difference([math.nan, 1.0], [1.0, 1.0]) <= 1e9
    assert train_lm.largest_difference([1.0] * 200 + [9.0], [1.25] + [1.0] * 200) == 0.25


@pytest.mark.parametrize(("step", "error", "code"), [(199, 2e-3, 1), (0, math.inf, 1), (199, 5e-4, 0), (200, 1.0, 0)])
def test_exit_code(
    train_lm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int, error: float, code: int
) -> None:
    """Fails if the program succeeds though losses differ within the first 200 steps, or fails for what is allowed."""

    def run(attention: str, _argv: object) -> dict[str, Any]:
        losses = [3.0] * 210
        losses[step] += error if attention == "fastattn" else 0
        return {
            "attention": attention, "backend": None, "parameters": 1, "final_loss": 3.0, "tokens_per_second": 1.0,
            "peak_bytes": None, "losses": losses, "step_seconds": [1.0] * 210,
        }  # fmt: skip

    monkeypatch.setattr(train_lm, "train_in_fresh_process", run)
    monkeypatch.setattr(train_lm, "draw", lambda report, path: None)
    text = tmp_path / "text"
    text.write_bytes(b"some text " * 200)
    assert train_lm.main(["--text", str(text), "--out", str(tmp_path)]) == code


def test_gpu_is_used_where_there_is_one(train_lm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a GPU has to be asked for, or `--device cpu` is ignored."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train_lm.parse_arguments([]).device == "cuda"
    assert train_lm.parse_arguments(["--device", "cpu"]).device == "cpu"


def test_whole_program(
    train_lm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the program crashes, its runs see other batches or weights, or the picture, JSON or model is missing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--device", "cpu", "--text", str(SCRIPT), "--out", str(tmp_path / "out")]
    assert train_lm.main([*arguments, "--steps", "7", "--seq-len", "48"]) == 0
    report = json.loads((tmp_path / "out" / "train_lm.json").read_text())
    naive, fast = report["runs"]
    assert (naive["attention"], fast["attention"]) == ("naive", "fastattn")
    assert fast["backend"] in ("cpu", "reference")
    assert len(naive["losses"]) == len(fast["losses"]) == 7
    assert naive["losses"][0] == pytest.approx(math.log(256), abs=0.3)
    assert naive["losses"] != [naive["losses"][0]] * 7
    assert fast["largest_difference"] <= 1e-3
    assert naive["tokens_per_second"] > 0
    assert fast["tokens_per_second"] > 0
    picture = (tmp_path / "out" / "train_lm.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    model = train_lm.load(tmp_path / "out" / "model.pt", torch.device("cpu"), max_seq_len=9)
    assert (model.config.attention, model.config.num_kv_heads, model.config.max_seq_len) == ("fastattn", 2, 9)
    untrained = Transformer(model.config)
    untrained.load_state_dict(model.state_dict())
    tokens = torch.arange(9)[None]
    assert torch.equal(model(tokens), untrained(tokens))
    assert "bigram entropy" in capsys.readouterr().out


def test_other_mechanisms(train_lm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a model is not trained with the mechanism that was asked for, or is compared with naive attention."""
    arguments = train_lm.parse_arguments(
        ["--mechanism", "retention", "--steps", "2", "--seq-len", "9", "--device", "cpu", "--out", str(tmp_path)]
    )
    assert arguments.attention == "fastattn"
    run = train_lm.train(SCRIPT.read_bytes(), arguments.attention, arguments)
    assert (len(run["losses"]), run["backend"]) == (2, None)
    assert train_lm.load(tmp_path / "model.pt", torch.device("cpu")).config.mechanism == "retention"
    with pytest.raises(SystemExit):
        train_lm.parse_arguments(["--mechanism", "gla", "--attention", "naive"])
    assert "--mechanism gla needs --attention fastattn, got naive" in capsys.readouterr().err


def test_short_text_is_refused(train_lm: ModuleType, tmp_path: Path) -> None:
    """Fails if a text shorter than one sequence is trained on, or ends in a traceback."""
    text = tmp_path / "text"
    text.write_bytes(b"short")
    with pytest.raises(SystemExit, match="5 bytes of text are too few"):
        train_lm.main(["--text", str(text), "--out", str(tmp_path)])
