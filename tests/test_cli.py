"""Fails if a command breaks, exits with the wrong code, shows a traceback for a user's mistake, or loses its help."""

import contextlib
import json
import os
import sys

import pytest
from typer.testing import CliRunner

from fastattn.bench.results import Results
from fastattn.cli import app, bench

runner = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "120", "TERM": "dumb"})
TINY = ("--seqlen", "32,64", "--head-dim", "16", "--time-limit", "60", "--device", "cpu")


def invoke(*arguments, code=0):
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ("info", "explain", "verify", "bench", "profile")),
        (("bench",), ("--seqlen", "--preset", "--time-limit", "compare")),
        (("bench", "compare"), ("--fail-on", "A.json")),
        (("profile",), ("--model", "--seqlen", "--time-limit", "def factory(seqlen):", "my_model.py:factory")),
        (("explain",), ("--window", "--dropout")),
        (("verify",), ("--record", "--backend")),
        (("info",), ()),
    ],
)
def test_help(command, words):
    text = invoke(*command, "--help")
    for word in words:
        assert word in text


def test_info_names_every_backend_and_the_ledger():
    text = invoke("info")
    for word in ("fastattn", "torch", "CPU", "reference", "cpu", "Hardware ledger"):
        assert word in text


def test_explain_gives_reasons():
    text = invoke("explain", "--dtype", "bf16", "--dropout", "0.1", "--device", "cpu")
    line = next(line for line in text.splitlines() if line.strip().startswith("sdpa"))
    assert "does not support dropout" in line
    assert "reference" in text


def test_explain_exits_with_1_where_nothing_runs():
    assert "head_dim" in invoke("explain", "--head-dim", "300", "--backend", "cpu", "--device", "cpu", code=1)


def test_bench_writes_what_it_shows_and_compare_reads_it(tmp_path):
    out = tmp_path / "out"
    text = invoke("bench", *TINY, "--mode", "fwd", "--out", out)
    assert "forward, float32, causal" in text
    assert "Geometric means" in text
    assert {path.name for path in out.iterdir()} == {
        "bench.json",
        "bench.csv",
        "latency.png",
        "memory.png",
        "throughput.png",
    }
    document = json.loads((out / "bench.json").read_text())
    rows = document["rows"]
    assert [row["implementation"] for row in rows] == ["naive", "sdpa", "fastattn"] * 2
    assert all(row["status"] == "ok" for row in rows), rows

    assert "0 of 2 rows" in invoke("bench", "compare", out / "bench.json", out / "bench.json")
    for row in rows:
        if row["implementation"] == "fastattn":
            row["median_ms"] *= 1.2
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(document))
    assert "slower" in invoke("bench", "compare", out / "bench.json", slower, code=1)
    invoke("bench", "compare", out / "bench.json", slower, "--fail-on", "25%")


def test_bench_keeps_going_past_an_implementation_that_cannot_run(tmp_path):
    path = tmp_path / "r.json"
    text = invoke("bench", *TINY, "--mode", "fwd", "--impl", "fastattn:nonsense,sdpa:cudnn,fastattn", "--json", path)
    assert "failed" in text
    assert [row.status for row in Results.read_json(path).rows] == ["failed", "failed", "ok"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--seqlen", "many"), "not a length"),
        (("bench", "--dtype", "int8"), "int8"),
        (("bench", "--impl", "magic"), "no implementation 'magic'"),
        (("bench", "--preset", "magic"), "quickstart"),
        (("bench", "--heads", "3", "--kv-heads", "2"), "multiple"),
        (("bench", "compare", "missing-a.json", "missing-b.json"), "missing-a.json"),
        (("profile", "--model", "magic"), "op, layer, lm"),
        (("profile", "--device", "abacus"), "abacus"),
        (("profile", "--mode", "bwd"), "fwd, fwdbwd"),
        (("profile", "--dtype", "fp32,bf16"), "one at a time"),
        (("profile", "--impl", "original"), "naive, sdpa, fastattn"),
        (("profile", "--model", "m:f", "--impl", "naive"), "original, replaced, activated"),
        (("profile", "--model", "m:f", "--heads", "2", "--full"), "heads, causal: the factory"),
        (("explain", "--window", "7"), "LEFT,RIGHT"),
        (("verify", "--backend", "magic"), "magic"),
    ],
)
def test_mistakes_are_one_readable_line(arguments, message):
    text = invoke(*arguments, code=2)
    assert text.startswith("error: ")
    assert message in text


def test_missing_extra_is_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    text = invoke("bench", *TINY, "--plot", "nowhere", code=2)
    assert "matplotlib" in text
    assert "fastattn[cli]" in text


def test_profile_fits_and_writes(tmp_path):
    text = invoke(
        *("profile", "--model", "op", "--seqlen", "64..512", "--heads", "2", "--head-dim", "16"),
        *("--out", tmp_path, "--device", "cpu"),
    )
    assert "quadratic" in text
    assert "tokens" in text
    assert {path.name for path in tmp_path.iterdir()} == {"profile_op.json", "profile_op.png", "profile_op.html"}
    document = json.loads((tmp_path / "profile_op.json").read_text())
    assert all(point["figures"]["median_ms"] > 0 for point in document["points"])
    growth = {g["implementation"]: g for g in document["growth"]}
    assert growth["naive"]["dominant"] == "quadratic"
    assert growth["naive"]["longest"] < growth["fastattn"]["longest"]
    assert (tmp_path / "profile_op.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("interrupt", [False, True])
def test_profile_of_a_users_model(monkeypatch, tmp_path, interrupt):
    """With a stand-in for the measuring process. Fails if an option is lost on its way there, if Ctrl-C loses what was
    measured, or does not show in the exit code."""
    from fastattn.bench import profile
    from fastattn.bench.point import Figures, Inspection

    class Measurer(contextlib.AbstractContextManager):
        def __exit__(self, *exc_info):
            pass

        def inspect(self, subject):
            return Inspection("Net", 7, ["float32"], ["(1,)"], None, "")

        def measure(self, subject):
            if interrupt and subjects:
                raise KeyboardInterrupt
            subjects.append(subject)
            return Figures(1, 1, 1, 1, None, None, None, 1.0, 1.0, 1.0, 3)

    subjects = []
    monkeypatch.setattr(profile, "Measurer", Measurer)
    options = "--model dir/m.py:A.f --seqlen 64,256 --impl original,overridden --mode fwd --time-limit 9 --device cpu"
    text = invoke("profile", *options.split(), "--out", tmp_path, code=130 if interrupt else 0)
    assert ("interrupted" in text) == interrupt
    first = subjects[0]
    assert (first.what, first.mode, first.time_limit, first.device) == ("dir/m.py:A.f", "fwd", 9.0, "cpu")
    points = [(s.seqlen, s.implementation) for s in subjects]
    everything = [(64, "original"), (64, "overridden"), (256, "overridden"), (256, "original")]
    assert points == everything[: 1 if interrupt else 4]
    for suffix in ("json", "png", "html"):
        assert f"written: {tmp_path / 'profile_m_A_f'}.{suffix}" in text.replace("\n", "")
        assert (tmp_path / f"profile_m_A_f.{suffix}").is_file()


@pytest.mark.parametrize(("passes", "code"), [(True, 0), (False, 1)])
def test_verify_reports(monkeypatch, passes, code):
    """On a few cases of the grid; the second time as if one had failed."""
    import fastattn.verify

    if not passes:
        monkeypatch.setattr(fastattn.verify.Report, "passed", False)
    options = "--backend reference --dtype float64 --device cpu --seed 3 --case mqa"
    text = invoke("verify", *options.split(), code=code)
    assert ("all cases pass" if passes else "FAILED") in text
    assert "3 of 3 cases" in text
    assert "seed 3" in text


def test_a_preset_starts_the_command_anew_in_its_environment(monkeypatch):
    """Fails if libraries that read a variable as they are loaded could have been loaded without it; or for ever."""

    class Started(Exception):
        pass

    def execve(program, arguments, environment):
        raise Started(program, arguments, environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["fastattn", "bench", "--preset", "cpu-avx2"])
    monkeypatch.delenv("FASTATTN_CPU_ISA", raising=False)
    with pytest.raises(Started) as started:
        bench._start_with({"FASTATTN_CPU_ISA": "v3"})
    program, arguments, environment = started.value.args
    assert (program, arguments[-3:]) == (sys.executable, ["bench", "--preset", "cpu-avx2"])
    assert environment == {**os.environ, "FASTATTN_CPU_ISA": "v3"}
    monkeypatch.setenv("FASTATTN_CPU_ISA", "v3")
    bench._start_with({"FASTATTN_CPU_ISA": "v3"})
