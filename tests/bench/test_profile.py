"""Fails if a profile loses or invents a point, hides what went wrong, or shows something else than was measured."""

import contextlib
import json
import re
import signal
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fastattn.bench import example, memory, point, profile
from fastattn.bench.environment import environment
from fastattn.bench.point import Figures, Inspection, Measurer, PointError
from fastattn.bench.profile import file_stem, profile_model, run_profile
from fastattn.bench.profile_report import command_of, summary, write_files
from fastattn.bench.subject import Shape, Subject

MIB = memory.MIB

MODELS = '''
import os, sys, time
import torch
from torch import nn


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """With dropout, for which torch builds the matrix of scores on the CPU."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Acting(nn.Module):
    """Does something at lengths past 32."""

    def __init__(self, act):
        super().__init__()
        self.linear, self.act = nn.Linear(32, 32), act

    def forward(self, x):
        print("a line that is no answer")
        if x.shape[1] > 32:
            self.act()
        return self.linear(x)


def x(seqlen):
    return torch.randn(1, seqlen, 32)


def by_hand(seqlen):
    return ByHand(), x(seqlen)


def layer(seqlen):
    return Layer(), x(seqlen)


def crashes(seqlen):
    return Acting(lambda: os.kill(os.getpid(), 11)), x(seqlen)


def leaves(seqlen):
    return Acting(lambda: os._exit(0)), x(seqlen)


def exits(seqlen):
    return Acting(lambda: sys.exit(0)), x(seqlen)


def sleeps(seqlen):
    return Acting(lambda: time.sleep(60)), x(seqlen)


def fails(seqlen):
    return Acting(lambda: {}["missing"]), x(seqlen)


def reads(seqlen):
    return Acting(lambda: sys.stdin.readline()), x(seqlen)
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A user's file."""
    path = tmp_path_factory.mktemp("models") / "their_models.py"
    path.write_text(MODELS)
    return path


@pytest.fixture(scope="module")
def measurer():
    with Measurer() as server:
        yield server


@pytest.fixture
def one_server(measurer, monkeypatch):
    """Profiles measure with the module's server, so that not each starts its own."""
    monkeypatch.setattr(profile, "Measurer", lambda: contextlib.nullcontext(measurer))


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("crashes", "failed", "signal 11 .Segmentation fault"),
        ("leaves", "failed", "exit code 0"),
        ("exits", "failed", r"SystemExit: 0 \(their_models.py, line"),
        ("sleeps", "timeout", "time limit of 0.7 s"),
        ("fails", "failed", r"KeyError: 'missing' \(their_models.py, line"),
    ],
)
def test_a_point_that_goes_wrong_costs_that_point_alone(measurer, models, name, status, reason):
    """Fails if the server dies or waits for ever, or if the next answer is the last one's."""
    subject = Subject(f"{models}:{name}", "original", 64, time_limit=0.7 if status == "timeout" else 60.0)
    started = time.monotonic()
    with pytest.raises(PointError, match=reason) as error:
        measurer.measure(subject)
    assert error.value.status == status
    assert time.monotonic() - started < 20
    assert measurer.measure(replace(subject, seqlen=32, time_limit=60.0)).inputs == 32 * 32 * 4


def test_what_a_model_prints_and_reads_is_not_the_protocol(measurer, models):
    assert measurer.measure(Subject(f"{models}:reads", "original", 64)).total > 0


@pytest.mark.parametrize(
    ("start", "imports"),
    [("", 2), ("import threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", 4)],
)
def test_a_file_is_imported_once_where_that_is_safe(measurer, tmp_path, start, imports):
    """Fails if each point imports the file anew, or if one that starts threads is imported before the fork."""
    log, path = tmp_path / "log", tmp_path / "counted.py"
    path.write_text(
        f"import torch\nopen({str(log)!r}, 'a').write('i')\n{start}\n"
        "def f(n): return torch.nn.Linear(4, 4), torch.randn(n, 4)\n"
    )
    subject = Subject(f"{path}:f", "original", 8)
    assert measurer.inspect(subject).changed is None
    for _ in range(3):
        measurer.measure(subject)
    assert len(log.read_text()) == imports


def test_a_model_before_and_after(one_server, models, tmp_path):
    """torch builds the matrix of scores in this model: fails if the fits, the ratios or the counts do not show that, or
    if a file differs from what is returned."""
    seen = []
    found = profile_model(
        f"{models}:layer",
        [128, 256, 512, 1024],
        implementations=("original", "replaced"),
        device="cpu",
        out=tmp_path,
        progress=lambda done, total, label: seen.append((done, total, label)),
    )
    assert [g.dominant for g in found.growth] == ["quadratic", "linear"]
    assert found.growth[0].longest < found.growth[1].longest
    longest = [p for p in found.points if p.subject.seqlen == 1024]
    assert [p.figures.samples >= 3 for p in longest] == [True, True]
    ratio = found.ratio(longest[1])
    assert ratio.memory == longest[0].figures.total / longest[1].figures.total > 3
    assert ratio.time == longest[0].figures.median_ms / longest[1].figures.median_ms
    assert found.ratio(longest[0]) == profile.Ratio(1.0, 1.0)
    assert {n: i.changed for n, i in found.inspections.items()} == {"original": None, "replaced": 1}
    assert found.inspections["original"].inputs == ["(1, 128, 32) float32"]
    # The implementations take turns in going first.
    assert [label for _, _, label in seen[2:6]] == [
        "original at 128",
        "replaced at 128",
        "replaced at 256",
        "original at 256",
    ]
    assert seen[-1] == (10, 10, "done")

    stem = "profile_their_models_layer"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{stem}.html", f"{stem}.json", f"{stem}.png"]
    document = json.loads((tmp_path / f"{stem}.json").read_text())
    assert document["schema"] == profile.SCHEMA
    assert [p["figures"]["forward_peak"] for p in document["points"]] == [p.figures.forward_peak for p in found.points]
    text = str(found)
    for words in ("replaced at 1k: ", "attention  replaced: backend=None", "quadratic", "speed-up", "memory ratio"):
        assert words in text
    page = Page(tmp_path / f"{stem}.html")
    for words in (
        "attention  replaced",
        "fastattn profile --model",
        "128,256,512,1024",
        torch.__version__,
        "quadratic",
    ):
        assert words in page.text


def test_a_model_that_nothing_changes_says_so_and_is_measured_once(one_server, models):
    """A hand-written attention. Fails if a variant that did nothing looks like a success, or is measured in vain."""
    pytest.importorskip("fastattn.integrations.sdpa")
    found = profile_model(f"{models}:by_hand", [64, 128, 256, 512], mode="fwd", device="cpu")
    assert found.implementations == ["original", "replaced", "activated"]
    assert {n: i.changed for n, i in found.inspections.items()} == {"original": None, "replaced": 0, "activated": 0}
    assert [p.status for p in found.points] == ["ok", "skipped", "skipped"] * 4
    assert [g.implementation for g in found.growth] == ["original"]
    assert found.growth[0].dominant == "quadratic"
    assert summary(found) == [f"{name}: changes nothing in this model" for name in ("replaced", "activated")]
    text = str(found)
    assert text.count("CHANGES NOTHING in this model") == 2
    assert "no torch.nn.MultiheadAttention in this model" in text
    assert "replaced at 64, 128, 256, 512 skipped: it changes nothing in this model" in text
    assert not re.search(r"^ *(replaced|activated) +skipped", text, re.MULTILINE)


def test_memory_that_runs_out_is_a_row(one_server, models):
    """By a real limit; fails if the run ends there, or the longer length is tried."""
    found = profile_model(
        f"{models}:by_hand", [64, 4096, 8192], implementations=["original"], device="cpu", memory_limit=100 * MIB
    )
    assert [p.status for p in found.points] == ["ok", "oom", "skipped"]
    assert "original at 4k oom: out of memory" in str(found)


def test_a_broken_factory_ends_before_anything_is_measured(one_server, tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text("def f(n): return 3\n")
    with pytest.raises(ValueError, match=r"f\(64\) must return \(model, inputs\)"):
        profile_model(f"{path}:f", [64, 128], device="cpu", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_the_point_and_keeps_the_others(models, tmp_path, monkeypatch):
    """A real SIGINT while a point sleeps, received by another thread than the one that waits. Fails if that wait goes
    on, finished points are lost or a process is left behind; or if the measuring process finds no module in the current
    directory, or none in what this one has added to sys.path."""
    (tmp_path / "wrapped.py").write_text("from their_models import sleeps\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(models.parent)
    servers = []

    class Watched(Measurer):
        def __enter__(self):
            servers.append(super().__enter__())
            return servers[0]

    def progress(done, total, label):
        if label == "original at 64":
            threading.Timer(0.5, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)).start()

    # A shell starts what runs in its background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(profile, "Measurer", Watched)
            started = time.monotonic()
            found = profile_model(
                "wrapped:sleeps",
                [16, 32, 64],
                implementations=["original"],
                device="cpu",
                out=tmp_path,
                progress=progress,
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 30
    assert found.interrupted
    assert [(p.status, p.reason) for p in found.points] == [("ok", ""), ("ok", ""), ("skipped", "not reached")]
    document = json.loads((tmp_path / "profile_wrapped_sleeps.json").read_text())
    assert document["interrupted"]
    assert "interrupted" in str(found)
    deadline = time.monotonic() + 10
    while alive(servers[0]._server.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(servers[0]._server.pid)


def alive(group):
    """The processes of a group, but for those that only wait to be reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = path.read_text().rpartition(") ")[2].split()[:3]
            found += [path.parent.name] if int(of) == group and state != "Z" else []
    return found


def test_profiling_does_not_start_itself_for_ever(monkeypatch):
    """What a script without its guard does when a measuring process imports it."""
    monkeypatch.setattr(point, "_serving", True)
    with pytest.raises(RuntimeError, match="if __name__ == '__main__'"):
        profile_model("made:it", [64])


FIGURES = Figures(
    parameters=MIB,
    inputs=MIB,
    forward_peak=4 * MIB,
    kept=3 * MIB,
    backward_peak=6 * MIB,
    gradients=MIB,
    resident_peak=None,
)
TIMED = replace(FIGURES, median_ms=2.0, p20_ms=1.0, p80_ms=3.0, samples=5)


class FakeMeasurer:
    """Gives what `plan` says, by (name, length), (name, "inspect") or (name, "snapshot"): an answer or an error."""

    def __init__(self, plan):
        self.plan, self.asked = plan, []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def _give(self, key, default):
        self.asked.append(key)
        given = self.plan.get(key, default)
        if isinstance(given, BaseException):
            raise given
        return given

    def inspect(self, subject):
        return self._give((subject.implementation, "inspect"), Inspection("Net", 7, ["float32"], ["(1,)"], None, ""))

    def measure(self, subject):
        return self._give((subject.implementation, subject.seqlen), TIMED)

    def snapshot(self, subject, path):
        self._give((subject.implementation, "snapshot"), None)
        path.write_text(str(subject.seqlen))


@pytest.fixture
def fake(monkeypatch):
    """A function from a plan, as `FakeMeasurer` has it, to the profile of two implementations at three lengths."""

    def run(plan, names=("naive", "fastattn"), what="op", out=None, **settings):
        server = FakeMeasurer(plan)
        run.asked = server.asked
        monkeypatch.setattr(profile, "Measurer", lambda: server)
        return run_profile(Subject(what, names[0], 1, **settings), [512, 1024, 2048], names, out=out)

    return run


@pytest.mark.parametrize(
    ("status", "words"), [("oom", "ran out of memory"), ("timeout", "exceeded the time limit"), ("failed", None)]
)
def test_what_ran_out_is_not_tried_at_longer_lengths(fake, status, words):
    """A failure that is neither may be the length's own: the next one is tried."""
    found = fake({("naive", 1024): PointError(status, "why")})
    naive = [(p.status, p.reason) for p in found.points if p.subject.implementation == "naive"]
    last = ("skipped", f"{words} at a shorter length") if words else ("ok", "")
    assert naive == [("ok", ""), (status, "why"), last]
    assert (("naive", 2048) in fake.asked) == (words is None)
    assert all(p.figures for p in found.points if p.subject.implementation == "fastattn")
    assert found.ratio(found.points[-1]).time == (None if words else 1.0)
    text = str(found)
    assert f"naive at 1k {status}: why" in text


def test_one_that_never_runs_is_reported_and_the_others_measured(fake):
    found = fake({("fastattn", "inspect"): PointError("failed", "no such kernel")})
    assert [p.reason for p in found.points if p.subject.implementation == "fastattn"] == ["no such kernel"] * 3
    assert summary(found) == ["fastattn: no length at which both it and naive ran"]
    assert ("fastattn", 512) not in fake.asked
    with pytest.raises(ValueError, match="op at length 512: no such kernel"):
        fake({(name, "inspect"): PointError("failed", "no such kernel") for name in ("naive", "fastattn")})


def test_an_interrupt_before_anything_is_measured_is_an_interrupt(fake):
    with pytest.raises(KeyboardInterrupt):
        fake({("naive", 512): KeyboardInterrupt()})
    found = fake({("fastattn", 512): KeyboardInterrupt()})
    assert found.interrupted
    assert [p.reason for p in found.points] == ["", *["not reached"] * 5]


@pytest.mark.parametrize(("baseline", "status"), [(None, "skipped"), (0, "skipped"), (2, "ok")])
def test_what_changes_nothing_is_measured_beside_a_baseline_that_is_changed(fake, baseline, status):
    """Fails if the untouched model is taken for what was made of it."""
    plan = {
        (name, "inspect"): Inspection("Net", 7, ["float32"], ["(1,)"], changed, "")
        for name, changed in (("replaced", baseline), ("activated", 0))
    }
    found = fake(plan, names=("replaced", "activated"), what="m:f")
    assert [p.status for p in found.points] == ["ok", status] * 3


def test_finished_points_are_on_disk_whatever_happens_then(fake, tmp_path):
    with pytest.raises(ZeroDivisionError):
        fake({("naive", 2048): ZeroDivisionError()}, out=tmp_path)
    points = json.loads((tmp_path / "profile_op.json").read_text())["points"]
    assert [p["status"] for p in points] == ["ok"] * 4 + ["skipped"] * 2


def test_warm_up_is_at_a_length_that_the_model_takes(fake):
    assert fake({}).points[-1].subject.warm_up == 16
    assert fake({}, names=("original",), what="m:f").points[-1].subject.warm_up == 512


def test_ratios_and_inference_in_the_tables(fake):
    """Fails if a ratio is upside down, the baseline is compared with itself or a column without a figure is shown."""
    half = replace(
        FIGURES, forward_peak=MIB, backward_peak=None, gradients=None, median_ms=0.5, p20_ms=0.4, p80_ms=0.6, samples=9
    )
    whole = replace(half, forward_peak=4 * MIB, median_ms=2.0)
    plan = {(n, length): f for n, f in (("naive", whole), ("fastattn", half)) for length in (512, 1024, 2048)}
    text = str(fake(plan, mode="fwd"))
    rows = [line.split() for line in text.splitlines()[2:] if line.split()[:1] == ["fastattn"]]
    assert rows[0] == ["fastattn", "1.00", "1.00", "1.00", "3.00", "1.00"]
    assert ["fastattn", "0.50", "0.40-0.60", "9", "3.00", "4.00x", "2.00x"] in rows
    assert not re.search(r"\bnaive\b.*x$", text, re.MULTILINE)
    assert "fastattn at 2k: 50% of the memory of naive and 4.00x as fast" in text
    assert "attention call, forward, float32, causal" in text
    header = next(line for line in text.splitlines() if "parameters" in line and "length" in line)
    assert "backward" not in header
    assert "resident" not in header


def test_the_command_measures_the_same_again(fake):
    shape = Shape(batch=2, dtype="bfloat16", causal=False)
    found = fake({}, shape=shape, mode="fwd", time_limit=30.0)
    assert command_of(found) == (
        "fastattn profile --model op --seqlen 512,1024,2048 --impl naive,fastattn --mode fwd --device cpu "
        "--batch 2 --dtype bfloat16 --full --time-limit 30"
    )


class Page(HTMLParser):
    """A page that is well formed: every tag closed in its turn; fails on anything that would be fetched or run."""

    VOID = ("meta", "img", "br")

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "a"), tag
        for name, value in attributes:
            assert name in ("class", "lang", "charset", "alt", "src"), name
            if name == "src":
                self.images.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        else:
            self.text += data


def test_the_page_stands_alone_and_shows_text_as_text(fake, tmp_path):
    reason = '<script>alert(1)</script> & "quotes"'
    found = fake({("naive", 2048): PointError("failed", reason)})
    paths = write_files(found, tmp_path)
    assert [p.name for p in paths] == ["profile_op.json", "profile_op.png", "profile_op.html"]
    page = Page(paths[2])
    assert reason in page.text
    (image,) = page.images
    assert image.startswith("data:image/png;base64,iVBOR")
    assert re.findall(r"https?://", paths[2].read_text()) == []
    assert command_of(found) in page.text


def test_a_profile_without_any_time_or_memory_is_drawn(fake, tmp_path):
    """Every point of the baseline out of memory, the others without a time."""
    plan = {("naive", length): PointError("oom", "out of memory") for length in (512, 1024, 2048)}
    plan |= {("fastattn", length): FIGURES for length in (512, 1024, 2048)}
    found = fake(plan)
    write_files(found, tmp_path)
    assert "fastattn: no length at which both it and naive ran" in str(found)


def test_snapshots_are_of_the_longest_step_that_ran(fake, tmp_path, monkeypatch):
    """By a stand-in for the GPU. Fails if a snapshot is taken where memory ran out, or its failure ends the run."""
    monkeypatch.setattr(profile, "environment", lambda device: environment(torch.device("cpu")))
    monkeypatch.setattr(profile, "available_memory", lambda device: 1 << 40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": 1 << 36}))
    plan = {
        ("naive", 2048): PointError("oom", "out of memory"),
        ("fastattn", "snapshot"): PointError("failed", "disk full"),
    }
    found = fake(plan, device="cuda", out=tmp_path)
    path = tmp_path / "profile_op_naive.pickle"
    assert path.read_text() == "1024"
    assert found.snapshots == {"naive": str(path), "fastattn": "none: disk full"}
    assert "allocations of fastattn: none: disk full" in str(found)
    assert json.loads((tmp_path / "profile_op.json").read_text())["snapshots"] == found.snapshots
    assert fake({}, device="cuda").snapshots == {}


def test_a_snapshot_records_the_step_and_stops_recording(monkeypatch, tmp_path):
    """By stand-ins for torch's functions. Fails if the step is outside of the record, or a failure leaves it on."""
    calls = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda enabled="all", **options: calls.append(("record", enabled))
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(("dump", path)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    memory.record_snapshot(lambda: calls.append("step"), tmp_path / "s.pickle")
    record, dump = ("record", "all"), ("dump", str(tmp_path / "s.pickle"))
    assert calls == [record, "step", "synchronize", dump, ("record", None)]
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        memory.record_snapshot(lambda: 1 / 0, tmp_path / "s.pickle")
    assert calls == [record, ("record", None)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seqlens": []}, "seqlens must be positive"),
        ({"seqlens": [0]}, "seqlens must be positive"),
        ({"implementations": ("original", "magic")}, "implementations must be some of original, replaced"),
        ({"implementations": "original"}, "implementations must be"),
        ({"implementations": ()}, "implementations must be"),
        ({"mode": "bwd"}, "mode must be one of"),
        ({"time_limit": 0}, "time_limit must be positive"),
        ({"memory_limit": -1}, "memory_limit must be positive"),
        ({"device": "meta"}, "device must be cpu or cuda"),
    ],
)
def test_wrong_arguments_are_refused_before_any_process_starts(monkeypatch, wrong, message):
    monkeypatch.setattr(profile, "Measurer", None)
    with pytest.raises(ValueError, match=f"fastattn: {message}"):
        profile_model("m:f", **{"seqlens": [64], "device": "cpu", **wrong})


def test_the_guide_shows_the_example_that_comes_with_the_package():
    """Fails if a reader who copies it and one who runs the package's measure different models."""
    guide = (Path(__file__).parents[2] / "docs" / "profiling.md").read_text()
    block = re.search(r"```python\n(.*?)```", guide, re.DOTALL).group(1)
    assert Path(example.__file__).read_text().endswith(block)


def test_files_are_named_after_their_subject():
    assert file_stem("layer") == "profile_layer"
    assert file_stem("/some/where/my-model.py:make") == "profile_my_model_make"
    assert file_stem("pkg.module:A.make") == "profile_pkg_module_A_make"
