"""Fails if a result does not survive its file, columns change, or a comparison misses or invents a regression."""

import csv
from dataclasses import replace

import pytest

from fastattn.bench.compare import compare
from fastattn.bench.families import FAMILIES
from fastattn.bench.plots import plot_results
from fastattn.bench.results import Results, Row, csv_columns, geometric_means
from fastattn.bench.suites import Problem

ENVIRONMENT = {"device": "cpu", "cpu": "a CPU", "threads": 2, "isa": "v4", "torch": "2.13.0", "time": "2026-01-01"}


def rows_of(problem, fast_ms=10.0, sdpa_ms=20.0, **changes):
    return (
        Row(problem, "naive", median_ms=100.0, extra_mib=50.0, gflops=1.0),
        Row(problem, "sdpa", median_ms=sdpa_ms, extra_mib=2.0, gflops=5.0),
        replace(
            Row(problem, "fastattn", kernel="cpu", median_ms=fast_ms, extra_mib=1.0, gflops=10.0),
            speedup={"naive": 100.0 / fast_ms, "sdpa": sdpa_ms / fast_ms},
            **changes,
        ),
    )


def results_of(*rows, **environment):
    return Results({**ENVIRONMENT, **environment}, {}, {"float32": {"matmul": 100.0, "registers": None}}, tuple(rows))


BASE = results_of(*rows_of(Problem(512)), *rows_of(Problem(1024)))


def test_json_round_trip(tmp_path):
    path = tmp_path / "deep" / "results.json"
    failed = Row(Problem(2048), "naive", status="oom", reason="out of memory")
    decode = Row(Problem(2048, q_len=1), "naive", median_ms=1.0, gbs=2.0)
    window = Row(Problem(2048, causal=True, window=3, dropout=0.1), "naive", median_ms=1.0)
    results = replace(BASE, rows=(*BASE.rows, failed, decode, window), read_gbs=3.0)
    results.write_json(path)
    assert Results.read_json(path) == results


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": "fastattn.bench/999"}', "\x00"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        Results.read_json(path)


def test_csv_collects_runs(tmp_path):
    path = tmp_path / "all.csv"
    BASE.append_csv(path)
    BASE.append_csv(path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(BASE.rows)
    assert tuple(lines[0]) == csv_columns(FAMILIES["dense"])
    fast = next(line for line in lines if line["implementation"] == "fastattn")
    assert (fast["hardware"], fast["seqlen"], fast["median_ms"], fast["vs_sdpa"]) == (
        "a CPU, 2 threads, v4",
        "512",
        "10.0",
        "2.0",
    )
    path.write_text("some,other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        BASE.append_csv(path)


def test_geometric_means_leave_out_what_has_no_speedup():
    rows = (*rows_of(Problem(512), fast_ms=5.0), *rows_of(Problem(1024), fast_ms=20.0))
    wrong = replace(rows[2], problem=Problem(2048), status="wrong", speedup={})
    means = {mean.against: mean for mean in geometric_means((*rows, wrong))}
    assert means["sdpa"].mean == pytest.approx(2.0)
    assert (means["sdpa"].lowest, means["sdpa"].cases) == (1.0, 2)


@pytest.mark.parametrize(
    ("new", "regressed"),
    [
        pytest.param(rows_of(Problem(512)), False, id="the same"),
        pytest.param(rows_of(Problem(512), fast_ms=10.4), False, id="within the tolerance"),
        pytest.param(rows_of(Problem(512), fast_ms=11.0), True, id="slower"),
        pytest.param(rows_of(Problem(512), fast_ms=11.0, sdpa_ms=22.0), False, id="the whole machine is slower"),
        pytest.param(rows_of(Problem(512), sdpa_ms=15.0), False, id="only SDPA got faster"),
        pytest.param(rows_of(Problem(512), extra_mib=2.0), True, id="more memory"),
        pytest.param(rows_of(Problem(512), status="wrong", reason="error"), True, id="became wrong"),
        pytest.param(rows_of(Problem(512), status="oom", median_ms=None), True, id="out of memory"),
    ],
)
def test_regressions(new, regressed):
    comparison = compare(BASE, results_of(*new), 0.05)
    assert len(comparison.changes) == 1
    assert comparison.unmatched == 1
    assert bool(comparison.regressions) is regressed
    assert comparison.warnings == ()


def test_rows_without_a_time_in_both_runs_are_not_compared():
    skipped = replace(BASE, rows=(Row(Problem(512), "fastattn", status="skipped"),))
    comparison = compare(skipped, skipped, 0.05)
    assert (comparison.changes, comparison.unmatched) == ((), 0)


def test_without_sdpa_the_absolute_time_decides():
    old, new = (results_of(rows_of(Problem(512), fast_ms=ms)[2]) for ms in (10.0, 11.0))
    assert compare(old, new, 0.05).regressions
    assert not compare(old, new, 0.2).regressions


def test_on_other_hardware_only_the_ratio_counts():
    slower_machine = results_of(*rows_of(Problem(512), fast_ms=30.0, sdpa_ms=60.0), cpu="another CPU")
    comparison = compare(BASE, slower_machine, 0.05)
    assert "different hardware" in comparison.warnings[0]
    assert not comparison.regressions
    worse = results_of(*rows_of(Problem(512), fast_ms=5.0, sdpa_ms=8.0), cpu="another CPU")
    assert compare(BASE, worse, 0.05).regressions


@pytest.mark.filterwarnings("error")
def test_plots_are_written(tmp_path):
    problems = (Problem(512), Problem(1024), Problem(512, causal=True), Problem(512, head_dim=128))
    rows = [row for problem in problems for row in rows_of(problem)]
    oom = Row(Problem(2048), "naive", status="oom", reason="out of memory")
    paths = plot_results(results_of(*rows, oom), tmp_path)
    assert sorted(path.name for path in paths) == [
        f"{kind}_d{dim}.png" for kind in ("latency", "memory", "throughput") for dim in (128, 64)
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)
    window = rows_of(Problem(512, causal=True, window=9))
    assert [path.name for path in plot_results(results_of(*window), tmp_path)] == ["speedups.png"]
