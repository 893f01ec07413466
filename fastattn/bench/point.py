"""One point of a profile, measured in a fresh process: its memory by phase and the time of a step.

`Measurer` starts a server that imports torch and computes nothing; each point runs in a child forked from it. So every
point has a process whose heap, thread pools and caches nothing has grown yet, without importing torch anew, and a point
that crashes, takes too long, or is killed by the system for its memory costs that child only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

import fastattn.backends
from fastattn.bench import builtin
from fastattn.bench.memory import (
    AllocationMeter,
    ResidentMeter,
    is_out_of_memory,
    record_snapshot,
    return_free_memory,
)
from fastattn.bench.model import MODEL, FactoryError, describe, load_factory
from fastattn.bench.subject import Kind, Shape, Step, Subject
from fastattn.bench.timing import Timing, clock_for, interleave

# What children would otherwise import one by one, and meter; torch.autograd.grad imports the first.
PRELOADED = (
    "torch.fx.experimental.symbolic_shapes",
    "fastattn.dense.naive",
    "fastattn.models.transformer",
    "fastattn.nn",
)

# A step is timed for about this long, at least MIN_SAMPLES times.
TIMING_S = 0.5
MIN_SAMPLES, MAX_SAMPLES = 3, 15

# How a child leaves that has written its answer.
ANSWERED = 87

_serving = False


def kind_of(what: str) -> Kind:
    """The kind of subject that `what` names.

    Raises:
        ValueError: neither a built-in subject nor the form of a factory's name.
    """
    if what in builtin.KINDS:
        return builtin.KINDS[what]
    if all(what.rpartition(":")[::2]):
        return MODEL
    known = ", ".join(builtin.KINDS)
    raise ValueError(f"model: no {what!r}; there are {known}, or your own as module:function or file.py:function")


@dataclass(frozen=True)
class Figures:
    """What a point measured: bytes by phase, and milliseconds per step (the forward alone in mode "fwd").

    Peaks and what is kept are above parameters and inputs. What was not measurable is None: the backward in mode
    "fwd", `resident_peak` off Linux and on GPUs, times where the step ran out of memory when it was repeated.
    """

    parameters: int  # buffers included
    inputs: int
    forward_peak: int
    kept: int  # alive after the forward: the output and what the backward needs
    backward_peak: int | None  # with what was kept
    gradients: int | None  # alive after the backward, above what was kept
    resident_peak: int | None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak or 0)

    @property
    def total(self) -> int:
        return self.parameters + self.inputs + self.peak


@dataclass(frozen=True)
class Inspection:
    """What a subject is, from one step of it; `changed` and `report` are those of the implementation's `Effect`."""

    name: str
    parameters: int  # how many numbers, buffers included
    dtypes: list[str]
    inputs: list[str]
    changed: int | None
    report: str


def _build(subject: Subject, seqlen: int) -> Step:
    return kind_of(subject.what).build(subject, seqlen)


def inspect(subject: Subject) -> Inspection:
    """Run one step of the subject, and say what it is and what the implementation changed."""
    step = _build(subject, subject.seqlen)
    with step.scope as effect_of:
        step.run()
        effect = effect_of() if effect_of else None
    return Inspection(
        step.name,
        sum(t.numel() for t in step.parameters),
        list(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in step.parameters)),
        [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in step.inputs],
        effect.changed if effect else None,
        effect.report if effect else "",
    )


def _warmed_up(subject: Subject) -> Step:
    """The subject's step, after one at another length was run and forgotten."""
    step = _build(subject, subject.warm_up)
    with step.scope:
        step.run()
    del step
    step = _build(subject, subject.seqlen)
    gc.collect()
    return_free_memory()
    return step


def measure(subject: Subject) -> Figures:
    """A step of the subject, by both meters and by the clock. Call it in a process that does nothing else."""
    device, step = torch.device(subject.device), _warmed_up(subject)
    with step.scope:
        resident, seconds = None, None
        if device.type == "cpu":
            started = time.perf_counter()
            with ResidentMeter() as process:
                result = step.run()
            resident, seconds = process.peak, time.perf_counter() - started
            del result
            gc.collect()
        with AllocationMeter(device) as forward:
            out = step.forward()
        backward, gradients = None, None
        if step.backward:
            with AllocationMeter(device) as backward:
                gradients = step.backward(out)
        del out
        figures = Figures(
            parameters=sum(t.nbytes for t in step.parameters),
            inputs=sum(t.nbytes for t in step.inputs),
            forward_peak=forward.peak,
            kept=forward.live,
            backward_peak=forward.live + backward.peak if backward else None,
            gradients=sum(g.nbytes for g in gradients) if isinstance(gradients, tuple) else None,
            resident_peak=resident,
        )
        del gradients
        return replace(figures, **_times(step, device, seconds))


def _times(step: Step, device: torch.device, seconds: float | None) -> dict[str, Any]:
    """The times of a step that has run, on the CPU in so many seconds; none where its repetition ran out of memory."""
    timing: Timing | Exception
    try:
        timing = interleave(
            {"step": step.run},
            clock_for(device),
            budget_s=TIMING_S,
            warm_s=None if seconds is None else {"step": seconds},
            min_samples=MIN_SAMPLES,
            max_samples=MAX_SAMPLES,
        )["step"]
    except torch.OutOfMemoryError as error:  # the clock's own buffer
        timing = error
    if isinstance(timing, Timing):
        p20, median, p80 = (1e3 * timing.quantile(q) for q in (0.2, 0.5, 0.8))
        return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(timing.samples)}
    if is_out_of_memory(timing):
        return {}
    raise timing


def snapshot(subject: Subject, path: str) -> None:
    """Write the CUDA allocations of one step."""
    step = _warmed_up(subject)
    with step.scope:
        record_snapshot(step.run, Path(path))


class PointError(Exception):
    """A point without figures; `status` is "oom", "timeout", "failed" or, for a factory's own mistake, "refused"."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Measurer:
    """Context manager around the server process; each method runs one subject in a fresh child.

    All raise `PointError`: it ran out of memory or time, crashed, or failed. Where an exception, such as Ctrl-C's,
    leaves the context, the child that is running ends.
    """

    def __enter__(self) -> Self:
        if _serving:
            raise RuntimeError(
                "fastattn: a process that measures was asked to profile; the file of the factory must not do so when "
                "it is imported: put the call under if __name__ == '__main__'"
            )
        self._preload: set[str] = set()
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from fastattn.bench.point import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that Ctrl-C reaches this process alone
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the current directory comes before it
                # Asking the driver for GPUs would start CUDA in the server, and its forks could not use it.
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            },
        )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._requests, self._answers = self._server.stdin, self._server.stdout
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        self._server.wait()

    def inspect(self, subject: Subject) -> Inspection:
        answer = self._ask("inspect", subject)
        if answer.pop("forkable"):
            self._preload.add(subject.what)
        return Inspection(**answer)

    def measure(self, subject: Subject) -> Figures:
        return Figures(**self._ask("measure", subject))

    def snapshot(self, subject: Subject, path: Path) -> None:
        """Write the CUDA allocations of one step to `path`."""
        self._ask("snapshot", subject, str(path.resolve()))

    def _ask(self, action: str, subject: Subject, *arguments: str) -> dict[str, Any]:
        request = {
            "action": action,
            "subject": asdict(subject),
            "arguments": arguments,
            "preload": subject.what if subject.what in self._preload else None,
        }
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            # Not one long wait: where another thread receives Ctrl-C, this one sees it between two short ones.
            while not select.select([self._answers], [], [], 0.2)[0]:
                pass
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PointError("failed", f"the measuring process ended with status {self._server.wait()}")
        answer = json.loads(line)
        if answer["status"] != "ok":
            raise PointError(answer["status"], answer["reason"])
        return answer["result"]


def _limit_memory(extra: int) -> None:
    """Let allocations fail, rather than the machine, once the process's data has grown by `extra` bytes."""
    import resource

    status = Path("/proc/self/status").read_text()
    data = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + extra, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _threads() -> int:
    """Threads of this process, those that Python did not start included; 0 where unknown."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 0


def _import_factory(what: str) -> bool:
    """Import the factory of a user's model; whether children may be forked from a process that has done so.

    They may where importing it has started neither threads, which a fork loses, nor CUDA.
    """
    before = _threads()
    if kind_of(what) is MODEL:
        load_factory(what)
    return _threads() == before and not torch.cuda.is_initialized()


def _perform(action: str, subject: Subject, arguments: list[str]) -> Any:
    forkable = _import_factory(subject.what)
    with fastattn.backends.own_backends(), torch.set_grad_enabled(subject.mode == "fwdbwd"):
        if action == "inspect":
            return {**asdict(inspect(subject)), "forkable": forkable}
        return asdict(measure(subject)) if action == "measure" else snapshot(subject, *arguments)


def _child(request: dict[str, Any], answer_fd: int) -> None:
    """Measure, write one line of JSON, and leave without running the parent's exit handlers."""
    subject = _subject(request)
    try:
        # If memory does run out, the system should end this process and no other.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        if subject.time_limit is not None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, subject.time_limit)
        if subject.memory_limit is not None and subject.device == "cpu":
            with contextlib.suppress(OSError, ValueError, StopIteration):
                _limit_memory(subject.memory_limit)
        answer = {"status": "ok", "result": _perform(request["action"], subject, request["arguments"])}
    except FactoryError as error:
        answer = {"status": "refused", "reason": str(error)}
    except BaseException as error:
        oom = is_out_of_memory(error)
        answer = {"status": "oom" if oom else "failed", "reason": "out of memory" if oom else describe(error)}
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(answer_fd, (json.dumps(answer) + "\n").encode())
    os._exit(ANSWERED)


def _subject(request: dict[str, Any]) -> Subject:
    fields = request["subject"]
    return Subject(**{**fields, "shape": Shape(**fields["shape"])})


def _why_ended(status: int, subject: Subject) -> tuple[str, str]:
    """(status, reason) of a child that ended without an answer."""
    if not os.WIFSIGNALED(status):
        return "failed", f"the process left with exit code {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL:
        return "oom", "out of memory (killed by the system)"
    if number == signal.SIGALRM:
        return "timeout", f"longer than the time limit of {subject.time_limit:g} s"
    return "failed", f"ended by signal {number} ({signal.strsignal(number)})"


def serve() -> None:
    """Fork a child for every request that arrives on stdin, one JSON object a line."""
    global _serving
    _serving = True
    for module in PRELOADED:
        importlib.import_module(module)
    for family in fastattn.backends.FAMILIES:
        fastattn.backends.capabilities(family)
    gc.freeze()
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    # What a subject prints, or reads, must not be taken for an answer, or from the requests.
    requests = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in requests:
        request = json.loads(line)
        if request["preload"]:
            with contextlib.suppress(FactoryError):  # which the child will raise as well
                load_factory(request["preload"])
            gc.freeze()
        child = os.fork()
        if child == 0:
            _child(request, answer_fd)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) != ANSWERED:
            ended, reason = _why_ended(status, _subject(request))
            os.write(answer_fd, (json.dumps({"status": ended, "reason": reason}) + "\n").encode())
