"""Fails if FLOPs are miscounted, a wrong result gets a speed-up, or a failure is lost instead of being a row."""

import importlib.util
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fastattn.bench.accuracy import DenseJudge, one_head
from fastattn.bench.case import Implementation, grid
from fastattn.bench.families import family_of
from fastattn.bench.layer import LayerJudge
from fastattn.bench.peaks import Peak
from fastattn.bench.peers import PEERS
from fastattn.bench.presets import PRESETS
from fastattn.bench.results import Results, Row
from fastattn.bench.run import Settings, compare_rows, make_step, run
from fastattn.bench.suites import Problem, implementation
from fastattn.bench.targets import Target, gradient_error_beside_sdpa, judge_target
from fastattn.dense.naive import naive_attention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_peaks(monkeypatch):
    monkeypatch.setattr("fastattn.bench.run.measure_peaks", lambda dtypes, device: dict.fromkeys(dtypes, Peak(100.0)))


def test_flops():
    problem = Problem(1024, head_dim=64, heads=4, batch=2)
    forward = 4 * 2 * 4 * 1024**2 * 64
    assert problem.flops == forward
    assert Problem(1024, heads=4, batch=2, causal=True).flops == forward / 2
    assert Problem(1024, heads=4, batch=2, mode="fwdbwd").flops == 3.5 * forward


def test_flops_agree_with_torchs_own_counter():
    from torch.utils.flop_counter import FlopCounterMode

    problem = Problem(128, head_dim=32, mode="fwdbwd")
    q, k, v, grad_out = problem.inputs(CPU)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(naive_attention(*leaves), leaves, grad_out)
    # Naive keeps its matrix; the 2.5 of the convention counts the one product that a fused backward repeats.
    assert counter.get_total_flops() == problem.flops * 3.0 / 3.5


def test_flops_of_windows_and_bytes_of_decoding():
    """A window's pairs are counted one by one; decoding reads every key and value once."""
    problem = Problem(50, head_dim=8, heads=1, kv_heads=1, causal=True, window=7)
    assert problem.flops == 4 * 8 * int(problem.band(CPU).sum())
    assert replace(problem, window=50).flops == replace(problem, window=None).flops
    decode = Problem(4096, head_dim=128, heads=32, kv_heads=8, batch=2, dtype="bfloat16", q_len=1)
    assert decode.flops == 4 * 2 * 32 * 4096 * 128
    assert decode.bytes_read == 2 * 2 * 128 * (2 * 8 * 4096 + 2 * 32)


def broken(name, change, **kwargs):
    """Naive attention with its result changed."""
    return Implementation(
        name, lambda problem: (name, lambda q, k, v: change(naive_attention(q, k, v, causal=problem.causal))), **kwargs
    )


FEATURES = (
    Problem(96, head_dim=16, batch=2, mode="fwdbwd", bias=True),
    Problem(96, head_dim=16, causal=True, mode="fwdbwd", window=7),
    Problem(256, head_dim=16, causal=True, mode="fwdbwd", dropout=0.1),
    Problem(128, head_dim=16, heads=4, kv_heads=2, q_len=1),
)


def run_one(problem, *implementations, **settings):
    rows = run([problem], implementations, Settings(CPU, **settings)).rows
    return {row.implementation: row for row in rows}


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_results_pass_and_are_compared(mode, dtype):
    problem = Problem(96, head_dim=16, dtype=dtype, causal=True, mode=mode)
    rows = run_one(problem, *(implementation(name) for name in ("naive", "sdpa", "fastattn")), max_samples=3)
    assert [row.status for row in rows.values()] == ["ok"] * 3, [row.reason for row in rows.values()]
    assert rows["fastattn"].kernel in ("cpu", "reference")
    assert set(rows["fastattn"].speedup) == {"naive", "sdpa"}
    fast, naive = rows["fastattn"], rows["naive"]
    assert fast.speedup["naive"] == pytest.approx(naive.median_ms / fast.median_ms)
    assert fast.gflops == pytest.approx(problem.flops / fast.median_ms / 1e6)
    assert fast.peak_fraction == pytest.approx(fast.gflops / 100.0)
    assert 0 < naive.max_error <= naive.error_bar
    assert naive.extra_mib * 2**20 >= 4 * 96 * 96 * problem.torch_dtype.itemsize


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda out: out * 1.0001, id="scaled by 1e-4"),
        pytest.param(lambda out: torch.cat([out[:, :, 1:], out[:, :, :1]], 2), id="shifted by a row"),
        pytest.param(lambda out: out.masked_fill(torch.ones_like(out).tril(-95).bool(), torch.nan), id="one NaN"),
    ],
)
def test_wrong_results_get_no_speedup(change):
    rows = run_one(Problem(96, head_dim=16), implementation("naive"), broken("fastattn", change), max_samples=3)
    assert rows["fastattn"].status == "wrong"
    assert "over its bar" in rows["fastattn"].reason
    assert rows["fastattn"].speedup == {}
    assert rows["fastattn"].median_ms > 0


@pytest.mark.parametrize("problem", FEATURES, ids=lambda p: p.feature)
def test_features_are_computed_by_all_and_wrong_ones_found(problem, monkeypatch):
    """Fails if a binding drops its feature, or if the judge lets a result pass that lacks it."""
    monkeypatch.setattr("fastattn.bench.run.read_bandwidth", lambda device: 50.0)
    # The reference backend takes seconds to draw a dropout mask of enough rows to judge.
    names = ("naive", "sdpa") if problem.dropout else ("naive", "sdpa", "fastattn")
    plain = (
        naive_attention if problem.q_len is None else lambda q, k, v, **_: naive_attention(q, k[:, :, 1:], v[:, :, 1:])
    )

    def bind_without(p):
        return "naive", lambda q, k, v, bias=0.0: plain(q, k, v, causal=p.causal) + 0.0 * bias_sum(bias)

    def bias_sum(bias):
        return bias.sum() if isinstance(bias, torch.Tensor) else bias

    rows = run_one(
        problem,
        *(implementation(name) for name in names),
        Implementation("without", bind_without),
        max_samples=3,
    )
    expected = [*["ok"] * len(names), "wrong"]
    assert [row.status for row in rows.values()] == expected, [row.reason for row in rows.values()]
    fast = rows[names[-1]]
    if problem.q_len:
        assert fast.gbs == pytest.approx(problem.bytes_read / fast.median_ms / 1e6)
        assert fast.peak_fraction == pytest.approx(fast.gbs / 50.0)
    else:
        assert fast.gbs is None


def test_a_wrong_gradient_is_wrong():
    class HalfGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 0.999 * grad

    problem = Problem(64, head_dim=16, mode="fwdbwd")
    assert run_one(problem, broken("fastattn", HalfGradient.apply), max_samples=3)["fastattn"].status == "wrong"


def test_a_wrong_baseline_is_not_a_baseline():
    rows = run_one(
        Problem(96, head_dim=16), broken("naive", torch.zeros_like), implementation("fastattn"), max_samples=3
    )
    assert rows["naive"].status == "wrong"
    assert rows["fastattn"].status == "ok"
    assert rows["fastattn"].speedup == {}


def test_failures_are_rows_with_a_reason():
    def no_memory(out):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    def no_kernel(out):
        raise NotImplementedError("no kernel for this\nsecond line")

    rows = run_one(
        Problem(64, head_dim=16),
        broken("oom", no_memory),
        broken("missing", no_kernel),
        broken("huge", lambda out: out, estimate=lambda problem: 1 << 60),
        implementation("naive"),
        max_samples=3,
    )
    assert (rows["oom"].status, rows["oom"].reason) == ("oom", "out of memory")
    assert rows["missing"].status == "failed"
    assert rows["missing"].reason == "NotImplementedError: no kernel for this"
    assert rows["huge"].status == "skipped"
    assert "MiB" in rows["huge"].reason
    assert rows["naive"].status == "ok"
    assert all(rows[name].median_ms is None for name in ("oom", "missing", "huge"))


@pytest.mark.parametrize("causal", [False, True])
def test_reference_head_agrees_with_autograd(causal):
    """The judge's chunked formulas against autograd in float64."""
    problem = Problem(100, head_dim=8, heads=1, kv_heads=1, dtype="float64", causal=causal, mode="fwdbwd")
    q, k, v, grad_out = problem.inputs(CPU)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = naive_attention(*leaves, causal=causal)
    expected = dict(
        zip(("grad_query", "grad_key", "grad_value"), torch.autograd.grad(out, leaves, grad_out), strict=True)
    )
    expected["out"] = out.detach()
    head = [t.detach()[0, 0] for t in (q, k, v, grad_out)]
    got = one_head(*head, causal, None, chunk=32)
    rows = torch.tensor([0, 17, 99])
    spots = one_head(*head, causal, rows, chunk=2)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor[0, 0], rtol=1e-12, atol=1e-12)
        if name in ("out", "grad_query"):
            torch.testing.assert_close(spots[name], tensor[0, 0][rows], rtol=1e-12, atol=1e-12)


def test_long_problems_are_checked_on_spots(monkeypatch):
    monkeypatch.setattr("fastattn.bench.accuracy.LONGEST_WHOLE_HEAD", 128)
    problem = Problem(200, head_dim=8, mode="fwdbwd", causal=True)
    inputs = problem.inputs(CPU)
    judge = DenseJudge(problem, inputs)
    assert judge.checked.startswith("out, grad_query: 128 rows")
    leaves = [t.requires_grad_() for t in inputs[:3]]
    out = naive_attention(*leaves, causal=True)
    results = (out, *torch.autograd.grad(out, leaves, inputs[3]))
    assert judge.check(results).passed
    assert not judge.check((out * 1.001, *results[1:])).passed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
@pytest.mark.parametrize("kind", ["without weights", "with weights"])
def test_layers_are_judged_by_output_and_all_gradients(kind, mode, causal):
    """Fails if the two layers get different weights or masks, or if a wrong gradient of a parameter passes."""
    problem = Problem(64, head_dim=16, heads=2, kv_heads=2, batch=2, causal=causal, mode=mode, layer=kind)
    rows = run_one(problem, *(implementation(name) for name in ("naive", "sdpa", "fastattn")), max_samples=3)
    assert {name: (row.status, row.kernel) for name, row in rows.items()} == {
        "sdpa": ("ok", "torch.nn"),
        "fastattn": ("ok", "fastattn.nn"),
    }, [row.reason for row in rows.values()]
    assert len(rows["fastattn"].errors) == (1 if mode == "fwd" else 6)
    inputs = problem.inputs(CPU)
    judge = LayerJudge(problem, inputs)
    results = make_step(problem, implementation("fastattn").bind(problem)[1], inputs)()
    for i in range(len(results)):
        assert not judge.check((*results[:i], results[i] * 1.0001, *results[i + 1 :])).passed


def test_grid_and_presets_keep_tables_together():
    problems = grid(Problem(0), (512, 1024), dtypes=("float32", "bfloat16"), causal=(False, True), modes=("fwd",))
    assert len(problems) == 8
    assert [p.seqlen for p in problems[:2]] == [512, 1024]
    for preset in PRESETS.values():
        problems = preset.problems()
        assert len(set(problems)) == len(problems)
        tables = [(p.mode, p.dtype, p.causal, p.head_dim, p.feature) for p in problems]
        assert len(set(tables)) == 1 + sum(a != b for a, b in pairwise(tables))


@pytest.mark.parametrize(
    ("ratios", "met"), [((2.2, 2.2), True), ((1.9, 2.6), True), ((1.8, 9.0), False), ((2.1, 2.2), False), ((), False)]
)
def test_targets_need_the_mean_and_every_case(ratios, met):
    rows = tuple(
        Row(Problem(512 * (i + 1)), "fastattn", median_ms=1.0, speedup={"sdpa": ratio})
        for i, ratio in enumerate(ratios)
    )
    target = Target("forward", 2.2, lambda p: p.mode == "fwd")
    others = (Row(Problem(512, mode="fwdbwd"), "fastattn", median_ms=9.0),)
    assert judge_target(target, Results({}, {}, {}, rows + others)).met is met


def test_a_target_with_a_case_that_was_not_measured_is_not_met():
    measured = Row(Problem(512), "fastattn", median_ms=1.0, speedup={"sdpa": 9.0})
    alone = Row(Problem(1024), "fastattn", median_ms=1.0)
    outcome = judge_target(Target("forward", 2.0, lambda p: True), Results({}, {}, {}, (measured, alone)))
    assert (outcome.cases, outcome.unmeasured, outcome.met) == (1, 1, False)


def test_gradients_are_compared_with_sdpas_one_by_one():
    """Fails if the best gradient speaks for all, or if the output's error counts."""
    ours = Row(Problem(64), "fastattn", errors={"out": 9.0, "grad_query": 1.0, "grad_key": 2.0})
    theirs = Row(Problem(64), "sdpa", errors={"out": 1.0, "grad_query": 8.0, "grad_key": 3.0})
    assert gradient_error_beside_sdpa.of(ours, {ours.problem: {"sdpa": theirs}}) == 1.5
    assert gradient_error_beside_sdpa.of(ours, {}) is None


def test_every_target_has_cases_in_its_preset():
    for preset in PRESETS.values():
        for target in preset.targets:
            cases = [p for p in preset.problems() if target.picks(p)]
            assert cases, target.what
            base = target.measure.name.removeprefix("x ")
            if base in preset.implementations:
                reaches = preset.subjects.get(base, family_of(cases[0]).implementation(base).subject)
                assert all(reaches(p) for p in cases), target.what


def test_unknown_implementations_are_named():
    with pytest.raises(ValueError, match="no implementation 'magic'"):
        implementation("magic")
    with pytest.raises(ValueError, match="no SDPA backend 'magic'"):
        implementation("sdpa:magic")


def test_the_gpu_preset_has_every_kind_of_call_and_its_dry_run_the_same():
    """Fails if a feature is dropped from the suite, or tried on a GPU first."""

    def kinds(name):
        return {
            (p.mode, p.causal, p.head_dim, p.bias, p.window is None, p.dropout, p.q_len, p.heads == p.kv_heads)
            for p in PRESETS[name].problems()
        }

    assert kinds("gpu") == kinds("gpu-dry")
    assert set(PRESETS["gpu"].implementations) - set(PRESETS["gpu-dry"].implementations) == {"flex"}
    problems = PRESETS["gpu"].problems()
    assert {p.batch * p.seqlen for p in problems if not p.q_len} == {16384}
    assert {p.heads * p.head_dim for p in problems if not p.q_len} == {2048}
    for name in PRESETS["gpu"].implementations:
        assert implementation(name).name == name


def test_an_absent_peer_says_why():
    assert implementation("naive").absent() is None
    for name, peer in PEERS.items():
        if importlib.util.find_spec(peer.module.partition(".")[0]) is None:
            assert "ModuleNotFoundError" in implementation(name).absent()


@pytest.mark.parametrize(
    "wrong",
    [
        {"q_len": 1, "causal": True},
        {"q_len": 1, "mode": "fwdbwd"},
        {"window": 3},
        {"layer": "with weights", "dropout": 0.1},
    ],
)
def test_problems_that_nothing_measures_are_refused(wrong):
    with pytest.raises(ValueError, match="only"):
        Problem(64, **wrong)


def test_no_row_is_compared_with_itself():
    row = Row(Problem(64), "sdpa", median_ms=2.0)
    assert compare_rows([row], None)[0].speedup == {}
