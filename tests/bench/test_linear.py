"""Fails if a case of linear attention is drawn, counted or judged wrongly, or compared with something not named."""

import csv
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fastattn
from fastattn import backends
from fastattn.bench import builtin
from fastattn.bench.case import DATA, Implementation
from fastattn.bench.crossover import crossings, overtaking
from fastattn.bench.families import FAMILIES
from fastattn.bench.fit import fit_growth
from fastattn.bench.linear.accuracy import LinearJudge
from fastattn.bench.linear.baselines import FLA, _batched, bind_fla, bind_naive, has_naive_form, loop
from fastattn.bench.linear.problem import MECHANISMS, LinearProblem
from fastattn.bench.linear.suites import implementation, softmax
from fastattn.bench.memory import AllocationMeter
from fastattn.bench.peaks import Peak
from fastattn.bench.plots import _panels, plot_results
from fastattn.bench.presets import PRESETS
from fastattn.bench.results import Results, Row, csv_columns
from fastattn.bench.run import Settings, make_step, run
from fastattn.bench.subject import Shape, Subject
from fastattn.bench.suites import Problem
from fastattn.bench.suites import implementation as dense_implementation
from fastattn.bench.targets import Target, judge_target, time_at
from fastattn.cli import app

CPU = torch.device("cpu")
RECURRENT = [name for name, kind in MECHANISMS.items() if True in kind.masks and name != "mean"]
SMALL = {"seqlen": 70, "head_dim": 4, "heads": 2, "kv_heads": 2, "batch": 2, "dtype": "float64"}


@pytest.fixture(autouse=True)
def _no_peaks(monkeypatch):
    monkeypatch.setattr("fastattn.bench.run.measure_peaks", lambda dtypes, device: dict.fromkeys(dtypes, Peak(100.0)))


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """What the CPU kernels lack goes to PyTorch, as for users, and not to Triton's interpreter, which takes minutes."""
    known = backends._modules
    monkeypatch.setattr(
        backends,
        "_modules",
        lambda family: {n: m for n, m in known(family).items() if (family, n) != ("linear", "triton")},
    )
    backends.select.cache_clear()
    yield
    backends.select.cache_clear()


def of(mechanism, mode="fwdbwd", **fields):
    shape = SMALL | {"mechanism": mechanism, "mode": mode, "causal": True in MECHANISMS[mechanism].masks} | fields
    return LinearProblem(**shape)


def recurrence(problem, query, key, value, *extras):
    """One head as the papers write it, a step at a time: the definitions that the judge's truth must agree with."""
    extras = dict(zip(problem.kind.extras, extras, strict=True))
    scale = problem.head_dim**-0.5
    if problem.mechanism == "performer":
        w = problem.projection(CPU).double()
        query, key = (
            torch.exp(x @ w.mT - x.square().sum(-1, keepdim=True) / 2) for x in (query * scale**0.5, key * scale**0.5)
        )
    state, normalizer, outs = torch.zeros(key.shape[1], value.shape[1]).double(), torch.zeros(key.shape[1]).double(), []
    for t in range(len(query)):
        q, k, v = query[t], key[t], value[t]
        if problem.mechanism == "retention":
            state = (1 - 2.0 ** (-5 - (problem.heads - 1))) * state
        if "decay" in extras:
            decay = extras["decay"][t].exp()
            state = (decay[:, None] if decay.dim() else decay) * state
        if "beta" in extras:
            v = extras["beta"][t] * (v - state.mT @ k)
        state, normalizer = state + k[:, None] * v, normalizer + k
        normalized = problem.mechanism in ("linear", "performer")
        outs.append(state.mT @ q / (q @ normalizer) if normalized else scale * state.mT @ q)
    return torch.stack(outs)


@pytest.mark.parametrize("mechanism", RECURRENT)
def test_the_truth_is_the_recurrence(mechanism):
    """Fails if a mechanism's call computes another function than its definition, or its gradients."""
    problem = of(mechanism)
    *tensors, grad_out = problem.inputs(CPU)
    head = [t[-1, -1].clone().requires_grad_() for t in tensors]
    out = recurrence(problem, *head)
    expected = (out, *torch.autograd.grad(out, head, grad_out[-1, -1]))
    judge = LinearJudge(problem, (*tensors, grad_out))
    assert list(judge._reference) == ["out", *(f"grad_{n}" for n in ("query", "key", "value", *problem.kind.extras))]
    for found, right in zip(judge._reference.values(), expected, strict=True):
        # retention's constant decay is given in float32
        tolerance = 1e-6 if mechanism == "retention" else 1e-11
        torch.testing.assert_close(found[0, 0], right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("mechanism", "causal"),
    [(name, mask) for name, kind in MECHANISMS.items() if name != "mean" for mask in kind.masks],
)
def test_every_form_of_pytorch_is_the_same_function(mechanism, causal):
    """Fails if a baseline computes something else or loses a gradient, or padding to whole chunks reaches a result."""
    problem = of(mechanism, causal=causal)
    inputs = problem.inputs(CPU)
    judge = problem.judge(inputs)
    forms = [implementation("fastattn:reference").bind(problem)[1]]
    if has_naive_form(problem):
        forms.append(bind_naive(problem)[1])
        forms += [lambda *x, c=c: loop(c, problem, *x) for c in (16, 128)]
    if has_naive_form(problem) and "beta" not in problem.kind.extras:
        forms += [lambda *x, c=c: _batched(c, problem, *x) for c in (16, 128)]
    for form in forms:
        check = judge.check(make_step(problem, form, inputs)())
        assert check.passed, check


@pytest.mark.parametrize("mechanism", ["linear", "gla", "delta", "performer"])
def test_wrong_results_are_found(mechanism):
    """Fails if the judge lets pass a result that is off by 1e-4, sees the future, or has one wrong gradient."""
    problem = of(mechanism, dtype="float32")
    inputs = problem.inputs(CPU)
    judge = problem.judge(inputs)
    results = make_step(problem, implementation("fastattn:reference").bind(problem)[1], inputs)()
    assert judge.check(results).passed
    assert len(results) == len(judge._names)
    for i, result in enumerate(results):
        assert not judge.check((*results[:i], result * 1.0001, *results[i + 1 :])).passed
    assert not judge.check((results[0].roll(-1, 2), *results[1:])).passed
    result = results[0].clone()
    result[-1, -1, 3, 0] = math.nan
    assert not judge.check((result, *results[1:])).passed


def test_rows_compare_with_what_they_solve():
    """Fails if softmax attention is held to linear attention's result, or a speed-up is lost or invented."""
    problem = LinearProblem(64, head_dim=16, causal=True)
    names = ("naive", "torch", "sdpa", "flash", "fastattn:reference")
    wrong = Implementation("fastattn", lambda p: ("wrong", lambda q, k, v: v))
    results = run([problem], [*map(implementation, names), wrong], Settings(CPU, max_samples=3))
    rows = {row.implementation: row for row in results.rows}
    assert [rows[n].status for n in names] == ["ok"] * len(names), [rows[n].reason for n in names]
    assert rows["fastattn"].status == "wrong"
    assert rows["fastattn"].speedup == {}
    assert set(rows["fastattn:reference"].speedup) == {"naive", "torch", "sdpa", "flash"}
    assert rows["sdpa"].gflops == pytest.approx(softmax(problem).flops / rows["sdpa"].median_ms / 1e6)
    assert rows["naive"].gflops == pytest.approx(problem.flops / rows["naive"].median_ms / 1e6)


def test_what_stands_in_for_softmax_attention_is_held_to_itself_and_its_distance_stated():
    """Fails if an approximation counts as wrong, or its distance is not that from softmax attention of its inputs."""
    problem = Problem(96, head_dim=16)
    names = ("sdpa", "mean", "linformer:96", "performer:32", "nystrom:8", "linear")
    rows = run([problem], [dense_implementation(n) for n in names], Settings(CPU, max_samples=3)).rows
    assert [row.status for row in rows] == ["ok"] * len(names), [row.reason for row in rows]
    off = {row.implementation: row.off_softmax for row in rows}
    assert (off["sdpa"], off["linear"]) == (None, None)
    assert off["linformer:96"] < 1e-5  # as many keys as there are: nothing is lost
    q, k, v, _ = problem.inputs(CPU)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)[-1, -1]
    distance = (v[-1, -1].mean(0) - exact).norm() / exact.norm()
    assert off["mean"] == pytest.approx(distance.item(), rel=1e-3)
    assert 0.05 < off["performer:32"] != off["nystrom:8"]


def test_a_mechanism_is_measured_where_it_exists():
    """Fails if Linformer is tried on a causal problem or with more keys than there are."""
    causal, full = Problem(128, causal=True), Problem(128)
    for name in ("linformer", "nystrom"):
        assert not dense_implementation(name).subject(causal)
    assert dense_implementation("linformer:128").subject(full)
    assert not dense_implementation("linformer:129").subject(full)
    assert not dense_implementation("gla").subject(full)
    assert not dense_implementation("performer").subject(Problem(128, causal=True, window=3))
    for name in ("performer:0", "gla:16", "performer:many"):
        with pytest.raises(ValueError, match=f"no implementation {name}"):
            dense_implementation(name)


def test_a_step_stands_beside_decoding():
    """Fails if a step's state is not that of the steps before it, or it is not compared with decoding from a cache."""
    problem = LinearProblem(50, head_dim=16, causal=True, step=True)
    whole = fastattn.linear.linear_attention
    q, k, v, kv, z, _ = problem.inputs(CPU)
    query, key, value, _ = replace(problem, step=False).inputs(CPU)
    out = whole(
        *(torch.cat([x, y], 2) for x, y in ((query, q), (key, k), (value, v))), causal=True, feature_map="identity"
    )
    for name in ("torch", "fastattn:reference"):
        step = implementation(name).bind(problem)[1](q, k, v, kv, z)
        torch.testing.assert_close(step, out[:, :, -1:], rtol=1e-5, atol=1e-5)
        assert problem.judge(problem.inputs(CPU)).check((step,)).passed
    assert not problem.judge(problem.inputs(CPU)).check((v,)).passed
    assert softmax(problem) == Problem(50, head_dim=16, q_len=1)
    assert not implementation("naive").subject(problem)


def test_flops():
    """torch counts the same products; the 2.5 of the backward has the states once more, which autograd keeps."""
    from torch.utils.flop_counter import FlopCounterMode

    problem = of("linear", causal=False, value_dim=6)
    *leaves, grad_out = problem.inputs(CPU)
    q, k, v = (t.requires_grad_() for t in leaves)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(q @ (k.mT @ v), (q, k, v), grad_out)
    assert counter.get_total_flops() == problem.flops * 3.0 / 3.5
    assert of("delta", "fwd").flops == 1.5 * of("linear", "fwd").flops
    assert of("performer", "fwd", width=8).flops == 4 * of("linear", "fwd").flops  # the features, too, are two products


def test_data_is_as_named():
    """Fails if a kind of data is not drawn, or not with the variance and the correlation that it is said to have."""
    for data in DATA:
        query = Problem(4096, head_dim=8, data=data).inputs(CPU)[0]
        neighbours = (query[:, :, 1:] * query[:, :, :-1]).mean() / query.square().mean()
        assert query.square().mean().item() == pytest.approx(0.25 if data == "mild" else 1.0, rel=0.15)
        assert neighbours.item() == pytest.approx(63 / 64 if data == "smooth" else 0.0, abs=0.05)


@pytest.mark.parametrize("mechanism", sorted(FLA))
def test_flash_linear_attention_is_called_as_it_expects(monkeypatch, mechanism):
    """With a stand-in for it. Fails if a tensor keeps our layout, or an argument has another name than FLA's."""
    problem = of(mechanism)
    module, name, _, options = FLA[mechanism]
    seen = {}

    def kernel(q, k, v, g=None, beta=None, **named):
        seen.update(named)
        assert q.shape == (problem.batch, problem.seqlen, problem.heads, problem.head_dim)
        theirs = {"decay": g, "beta": beta}
        extras = [theirs[extra].transpose(1, 2) for extra in problem.kind.extras]
        out = problem.call(backend="reference")(*(x.transpose(1, 2) for x in (q, k, v)), *extras)
        return out.transpose(1, 2), None

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: kernel}))
    inputs = problem.inputs(CPU)
    kernel_name, attend = bind_fla(problem)
    assert kernel_name == f"{module}.{name}"
    assert problem.judge(inputs).check(make_step(problem, attend, inputs)()).passed
    assert seen == options
    with pytest.raises(NotImplementedError, match="no such kernel"):
        bind_fla(replace(problem, heads=4))


@pytest.mark.parametrize(
    ("fast", "crossing"),
    [
        (lambda n: 1e-3 * n, 1000.0),  # against 1e-6 n^2
        (lambda n: 1e-9 * n, 256.0),
        (lambda n: 1.0 * n, None),
        (lambda n: 1e-9 if n < 2048 else 1e-3 * n * 3, None),
    ],
    ids=["crosses", "always faster", "never", "faster only in between"],
)
def test_the_length_where_times_cross(fast, crossing):
    """Fails if a crossing is not where two power laws meet, or one is named that a longer length takes back."""
    lengths = (256, 512, 1024, 2048)
    found = overtaking({n: fast(n) for n in lengths}, {n: 1e-6 * n * n for n in lengths})
    assert found == (crossing if crossing is None else pytest.approx(crossing))


def test_crossings_are_told_of_stand_ins_alone():
    """Fails if SDPA counts as a stand-in, a wrong result crosses, or a missing crossing is not said."""
    times = {
        "sdpa": (1.0, 1.0),
        "fastattn": (2.0, 8.0),
        "performer:64": (4.0, 4.0),
        "gla": (9.0, 9.0),
        "delta": (1.0, 1.0),
    }
    rows = [
        Row(Problem(n), name, status="wrong" if name == "delta" else "ok", median_ms=ms[i])
        for name, ms in times.items()
        for i, n in enumerate((1024, 4096))
    ]
    found = {crossing.faster: crossing for crossing in crossings(rows)}
    assert set(found) == {"performer:64", "gla"}
    assert found["performer:64"].length == pytest.approx(2048)
    assert str(found["gla"]) == "gla is not faster than fastattn up to 4,096"


def test_flat_times_are_a_target():
    """Fails if growth within the allowance misses the target, or growth beyond it meets it."""
    rows = {n: Row(LinearProblem(n, causal=True), "fastattn", median_ms=ms) for n, ms in ((8192, 10.0), (32768, 44.0))}
    target = Target("flat", 1 / 1.15, lambda p: p.seqlen == 32768, time_at(8192, each_token=True))

    def outcome(*rows):
        return judge_target(target, Results({}, {}, {}, rows))

    assert outcome(*rows.values()).mean == pytest.approx(10 * 4 / 44)
    assert outcome(*rows.values()).met
    assert not outcome(rows[8192], replace(rows[32768], median_ms=47.0)).met
    assert not outcome(rows[32768]).met


def test_results_of_the_family_survive_their_files(tmp_path):
    """Fails if linear cases come back as others, or their columns are those of dense attention."""
    rows = (Row(LinearProblem(512, causal=True, mechanism="gla"), "fastattn", median_ms=1.0, speedup={"torch": 2.0}),)
    results = Results({"device": "cpu"}, {}, {}, rows)
    results.write_json(tmp_path / "r.json")
    assert Results.read_json(tmp_path / "r.json") == results
    results.append_csv(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert tuple(line) == csv_columns(FAMILIES["linear"])
    assert (line["mechanism"], line["vs_torch"]) == ("gla", "2.0")
    text = (tmp_path / "r.json").read_text()
    (tmp_path / "other.json").write_text(text.replace('"family": "linear"', '"family": "sideways"'))
    with pytest.raises(ValueError, match="sideways"):
        Results.read_json(tmp_path / "other.json")


def test_the_presets_measure_what_they_name():
    """Fails if a mechanism or a pass is dropped from a suite, or tried on a GPU first."""

    def kinds(name):
        return {(p.mechanism, p.mode, p.step) for p in PRESETS[name].problems()}

    assert kinds("linear-gpu") == kinds("linear-gpu-dry")
    trained = {name for preset in ("linear", "recurrent") for name, mode, _ in kinds(preset) if mode == "fwdbwd"}
    assert trained == {"linear", "performer", "retention", "simple-gla", "gla", "delta", "gated-delta"}
    assert any(step for _, _, step in kinds("linear"))
    assert {name for name, mode, _ in kinds("linear-gpu") if mode == "fwdbwd"} == set(RECURRENT)
    names = PRESETS["mechanisms"].implementations
    for problem in PRESETS["mechanisms"].problems():
        beside = [n for n in names if dense_implementation(n).subject(problem)]
        assert {"sdpa", "fastattn", "performer"} <= set(beside)
        assert ("linformer" in beside) == ("nystrom" in beside) == (not problem.causal)
    assert {p.data for p in PRESETS["approximation"].problems()} == set(DATA)
    assert "mean" in PRESETS["approximation"].implementations


@pytest.mark.parametrize(
    "wrong",
    [
        {"mechanism": "magic"},
        {"mechanism": "linformer"},
        {"mechanism": "gla", "causal": False},
        {"mechanism": "gla", "width": 3},
        {"mechanism": "mean", "mode": "fwdbwd"},
        {"step": True, "mode": "fwdbwd"},
        {"step": True, "mechanism": "delta"},
    ],
)
def test_cases_that_nothing_measures_are_refused(wrong):
    """Fails if a case is accepted that would be measured as another."""
    with pytest.raises(ValueError, match=r"mechanism|width|step"):
        LinearProblem(**{"seqlen": 64, "causal": True} | wrong)


@pytest.mark.parametrize(
    ("what", "name"), [(what, name) for what in builtin.KINDS for name in builtin.KINDS[what].implementations[3:]]
)
def test_what_stands_in_for_softmax_attention_is_profiled(what, name):
    """Fails if a mechanism does not reach the layer or model that is profiled, or one that is not causal runs as if."""
    causal = name not in ("linformer", "nystrom")
    length = 300 if name in builtin.SPARSE else 32  # below its window a pattern leaves nothing out
    subject = Subject(what, name, length, Shape(heads=2, head_dim=8, layers=1, causal=causal))
    build = builtin.KINDS[what].build
    if what == "lm" and not causal:
        with pytest.raises(ValueError, match="causal"):
            build(subject, length).run()
        return
    step = build(subject, length)
    gradients = step.run()
    assert len(gradients) == len(step.parameters) + (len(step.inputs) - 1 if what != "lm" else 0)
    assert all(torch.isfinite(g).all() for g in gradients)
    plain = build(replace(subject, implementation="fastattn"), length)
    torch.manual_seed(0)
    outs = [s.forward() for s in (step, plain)]
    assert not torch.equal(*outs)
    if not causal:
        with pytest.raises(ValueError, match="causal"):
            build(replace(subject, shape=replace(subject.shape, causal=True)), length).run()


def test_memory_of_linear_attention_grows_linearly():
    """Fails if something of size length x length is stored, or the fit calls what is not linear so."""
    lengths = (128, 256, 512, 1024)

    def growth(name, mode):
        peaks = []
        for length in lengths:
            step = builtin.build_op(Subject("op", name, length, Shape(heads=1, head_dim=16), mode), length)
            with AllocationMeter(CPU) as meter:
                step.run()
            peaks.append(meter.peak)
        return fit_growth(lengths, peaks)

    for mode in ("fwd", "fwdbwd"):
        assert growth("naive", mode).dominant(1024) == "quadratic"
        for name in ("linear", "gla", "delta", "performer"):
            assert growth(name, mode).quadratic == 0, (name, mode)


def test_the_commands_know_the_family(tmp_path):
    """Fails if the command measures another family or mechanism than it was told, or takes what does not fit."""

    def invoke(*arguments, code=0):
        options = ("bench", "--seqlen", "32,64", "--head-dim", "8", "--heads", "1", "--mode", "fwd", "--device", "cpu")
        result = CliRunner(env={"NO_COLOR": "1"}).invoke(app, [*options, *arguments])
        assert result.exit_code == code, result.output
        return result.output

    path = tmp_path / "r.json"
    names = ("naive", "torch", "fastattn:reference")
    invoke("--family", "linear", "--mechanism", "gla,performer", "--impl", ",".join(names), "--json", str(path))
    rows = Results.read_json(path).rows
    assert [row.problem.mechanism for row in rows] == ["gla"] * 6 + ["performer"] * 6
    assert [row.implementation for row in rows] == [*names] * 4
    invoke("--impl", "sdpa,fastattn,performer:16", "--json", str(path))
    assert [row.implementation for row in Results.read_json(path).rows] == ["sdpa", "fastattn", "performer:16"] * 2
    for wrong, message in (
        (("--mechanism", "gla"), "--family linear"),
        (("--family", "conv"), "dense, linear, sparse"),
        (("--family", "linear", "--mechanism", "softmax"), "there are linear"),
        (("--family", "linear", "--mechanism", "nystrom"), "nystrom is not causal"),
        (("--family", "linear", "--impl", "flex"), "no implementation 'flex'"),
        (("--family", "linear", "--width", "9"), "has none"),
    ):
        assert message in invoke(*wrong, code=2)


def test_panels_and_pictures(tmp_path):
    """Fails if mechanisms share a panel, a picture is missing, or one compares operations that are not the same."""

    def rows_of(problem, *times):
        names = ("torch", "flash", "fastattn")
        speedup = {"fastattn": {"torch": 2.0}}
        return [
            Row(problem, name, median_ms=ms, extra_mib=ms, gflops=1.0, speedup=speedup.get(name, {}))
            for name, ms in zip(names, times, strict=True)
        ]

    cases = [LinearProblem(n, causal=True, mechanism=m) for m in ("linear", "gla") for n in (512, 1024)]
    rows = [row for case in cases for row in rows_of(case, 4.0, case.seqlen / 200, 3.0)]
    assert [len(panel) for line in _panels(rows) for panel in line] == [6, 6]
    linear = plot_results(Results({}, {}, {}, tuple(rows)), tmp_path / "linear")
    assert [path.name for path in linear] == ["speedups.png", "latency.png", "memory.png"]
    widths = [
        Row(Problem(512, data="mild"), f"performer:{n}", median_ms=n / 100, off_softmax=8 / n) for n in (16, 32, 64)
    ]
    levels = [
        Row(widths[0].problem, "mean", median_ms=0.1, off_softmax=0.3),
        Row(widths[0].problem, "fastattn", median_ms=1.0),
    ]
    approximation = plot_results(Results({}, {}, {}, (*widths, *levels)), tmp_path / "widths")
    assert [path.name for path in approximation] == ["approximation.png"]
    for path in (*linear, *approximation):
        assert path.read_bytes().startswith(b"\x89PNG")
