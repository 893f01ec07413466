"""Fails if a case of sparse attention is drawn, counted or judged wrongly, or compared with something not named."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from fastattn import backends
from fastattn.bench.peaks import Peak
from fastattn.bench.plots import plot_results
from fastattn.bench.presets import PRESETS
from fastattn.bench.results import Results
from fastattn.bench.run import Settings, make_step, run
from fastattn.bench.sparse.plots import _crossing, density_rows
from fastattn.bench.sparse.presets import rate, thrift
from fastattn.bench.sparse.problem import PATTERNS, SparseProblem, dense
from fastattn.bench.sparse.suites import implementation
from fastattn.cli import app

CPU = torch.device("cpu")
SMALL = {"seqlen": 300, "head_dim": 8, "heads": 2, "kv_heads": 2, "batch": 2, "dtype": "float64", "block": 32}


@pytest.fixture(autouse=True)
def _no_peaks(monkeypatch):
    monkeypatch.setattr("fastattn.bench.run.measure_peaks", lambda dtypes, device: dict.fromkeys(dtypes, Peak(100.0)))


def of(pattern, **fields):
    return SparseProblem(**{**SMALL, "pattern": pattern, "density": 0.3 if pattern == "random" else None, **fields})


def pairs(problem):
    """(seqlen, seqlen) bool by the rule that flex_attention is given, one number at a time."""
    i, j = torch.arange(problem.seqlen)[:, None], torch.arange(problem.seqlen)
    return problem.rule(torch.tensor(0), torch.tensor(0), i, j).expand(problem.seqlen, problem.seqlen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_rule_is_the_mask(pattern, causal):
    """Fails if flex_attention is timed on other pairs than fastattn, or the kept pairs are counted wrongly."""
    problem = of(pattern, causal=causal)
    kept = problem.mask.to_dense()[0, 0]
    assert torch.equal(kept, pairs(problem))
    assert problem.flops == pytest.approx(4 * 2 * 2 * 8 * int(kept.sum()))
    assert replace(problem, mode="fwdbwd").flops == pytest.approx(3.5 * problem.flops)
    assert torch.equal(problem.keeps(torch.arange(5, 290, 7)), kept[5:290:7])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["naive", "sdpa", "fastattn", "fastattn:reference"])
def test_implementations_are_right(pattern, name):
    """Fails if an implementation computes other attention than the judge expects, forward or backward."""
    problem = of(pattern, causal=pattern != "random", mode="fwdbwd")
    inputs = problem.inputs(CPU)
    _, attend = implementation(name).bind(problem)
    results = make_step(problem, attend, inputs)()
    assert problem.judge(inputs).check(results).passed
    wrong = [results[0].clone(), *results[1:]]
    wrong[0][-1, -1, 7] *= 1.001
    assert not problem.judge(inputs).check(tuple(wrong)).passed


def test_the_dense_kernel_solves_another_case():
    """Fails if the dense kernel is judged by the sparse truth, or counted with the sparse operations."""
    problem = of("window", dtype="float32")
    assert dense(problem).flops == 4 * 2 * 2 * 300**2 * 8
    results = run([problem], [implementation(name) for name in ("dense", "fastattn")], Settings(CPU, max_samples=2))
    by_name = {row.implementation: row for row in results.rows}
    assert all(row.status == "ok" for row in results.rows)
    run_of = {problem: by_name}
    ratio = by_name["fastattn"].gflops / by_name["dense"].gflops
    assert rate.of(by_name["fastattn"], run_of) == pytest.approx(ratio)
    less = by_name["dense"].extra_mib / by_name["fastattn"].extra_mib
    assert thrift.of(by_name["fastattn"], run_of) == pytest.approx(less)


def test_pictures(tmp_path):
    """Fails if a run at several densities is not drawn, or cannot be read back."""
    pytest.importorskip("matplotlib")
    problems = [of("random", dtype="float32", density=d) for d in (0.1, 0.3, 0.6)]
    results = run(problems, [implementation(n) for n in ("dense", "fastattn")], Settings(CPU, max_samples=2))
    results.write_json(tmp_path / "bench.json")
    again = Results.read_json(tmp_path / "bench.json")
    assert density_rows(again.rows) == list(again.rows)
    assert {path.name for path in plot_results(again, tmp_path)} >= {"density.png", "speedups.png"}


def test_crossing():
    """Fails if the density from which the dense kernel is faster is taken from the wrong side."""
    assert _crossing([(10.0, 1.0), (50.0, 4.0), (100.0, 12.0)], {10.0: 10.0, 50.0: 8.0, 100.0: 10.0}) == pytest.approx(
        50 + 50 * 1 / (2 - 10 / 12)
    )
    assert _crossing([(10.0, 1.0), (50.0, 4.0)], {10.0: 10.0, 50.0: 10.0}) is None


def test_impossible_cases():
    """Fails if a case that means nothing is measured."""
    for fields in ({"pattern": "none"}, {"pattern": "random"}, {"density": 0.5}, {"bias": True}, {"window": 3}):
        with pytest.raises(ValueError, match=r"pattern|density"):
            SparseProblem(64, **{"causal": True, **fields})


def test_command_line(monkeypatch):
    """Fails if the options of one family are taken silently for another, or the presets name what there is not."""
    monkeypatch.setattr(backends, "_delegating", False)
    command = ["bench", "--family", "sparse", "--seqlen", "64", "--mode", "fwd", "--device", "cpu"]
    shown = CliRunner().invoke(app, [*command, "--pattern", "window,random", "--density", "0.5"])
    assert shown.exit_code == 0, shown.output
    assert "random blocks, 50% of them" in shown.output
    for wrong in (["--mechanism", "linear"], ["--pattern", "no"], ["--pattern", "random"]):
        assert CliRunner().invoke(app, [*command, *wrong]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "--pattern", "window", "--seqlen", "64"]).exit_code == 2
    for name in ("sparse", "sparse-gpu", "sparse-gpu-dry"):
        assert all(implementation(i) for i in PRESETS[name].implementations)
        assert PRESETS[name].problems()
