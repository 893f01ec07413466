"""One memory measurement in a fresh process.

`Measurer` starts a server that imports torch and computes nothing; each point runs in a child forked from it. So every
point has a process whose heap, thread pools and caches nothing has grown yet, without importing torch anew, and a point
that the system kills for its memory costs that child only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

import fastattn.backends
from fastattn.bench.memory import AllocationMeter, ResidentMeter, is_out_of_memory
from fastattn.bench.suites import DTYPES, Problem, implementation

SUBJECTS = ("op", "layer", "lm")
IMPLEMENTATIONS = ("naive", "sdpa", "fastattn")

# What children would otherwise import one by one, and meter; torch.autograd.grad imports the first.
PRELOADED = (
    "torch.fx.experimental.symbolic_shapes",
    "fastattn.dense.naive",
    "fastattn.models.transformer",
    "fastattn.nn",
)

# Long enough for every library to load and every thread to start, too short to matter.
WARM_UP_LENGTH = 16


@dataclass(frozen=True)
class Subject:
    """What is profiled. `what`: the bare call ("op"), an attention layer ("layer") or the reference model ("lm")."""

    what: str
    implementation: str
    seqlen: int
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    layers: int = 4
    dtype: str = "float32"
    causal: bool = True
    device: str = "cpu"
    memory_limit: int | None = None  # bytes above what the process holds at the start


@dataclass(frozen=True)
class Phases:
    """Bytes. Peaks and what is kept are above parameters and inputs; `resident_peak` is None where not measurable."""

    parameters: int
    inputs: int
    forward_peak: int
    kept_for_backward: int  # alive after the forward: the output and what the backward needs
    backward_peak: int  # with what was kept
    gradients: int  # alive after the backward, above what was kept
    resident_peak: int | None

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak)

    @property
    def total(self) -> int:
        return self.parameters + self.inputs + self.peak


@dataclass
class Step:
    """A subject ready to run: `forward` gives a tensor, `backward` all gradients from it."""

    parameters: Sequence[Tensor]
    inputs: Sequence[Tensor]
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object]


def build_op(subject: Subject, seqlen: int) -> Step:
    problem = Problem(
        seqlen,
        head_dim=subject.head_dim,
        heads=subject.heads,
        kv_heads=subject.heads,
        batch=subject.batch,
        dtype=subject.dtype,
        causal=subject.causal,
        mode="fwdbwd",
    )
    *leaves, grad_out = problem.inputs(torch.device(subject.device))
    for leaf in leaves:
        leaf.requires_grad_()
    _, attend = implementation(subject.implementation).bind(problem)
    return Step(
        [],
        [*leaves, grad_out],
        lambda: attend(*leaves),
        lambda out: torch.autograd.grad(out, leaves, grad_out),
    )


def build_layer(subject: Subject, seqlen: int) -> Step:
    """A multi-head attention layer on (batch, seqlen, embed_dim). naive and sdpa are torch.nn.MultiheadAttention.

    torch's layer wants the causal mask as a tensor; the boolean one, the smallest, is built within the forward.
    """
    from fastattn.bench.layer import options
    from fastattn.nn import MultiheadAttention

    embed_dim = subject.heads * subject.head_dim
    kind = MultiheadAttention if subject.implementation == "fastattn" else torch.nn.MultiheadAttention
    layer = kind(embed_dim, subject.heads, batch_first=True, device=subject.device, dtype=DTYPES[subject.dtype])
    x = torch.randn(subject.batch, seqlen, embed_dim, device=subject.device).to(DTYPES[subject.dtype]).requires_grad_()
    grad_out = torch.randn_like(x)

    def forward() -> Tensor:
        mask = None
        if subject.causal and subject.implementation != "fastattn":
            mask = torch.ones(seqlen, seqlen, dtype=torch.bool, device=subject.device).triu_(1)
        return layer(x, x, x, **options(layer, subject.causal, subject.implementation == "naive", mask))[0]

    parameters = list(layer.parameters())
    return Step(
        parameters,
        [x, grad_out],
        forward,
        lambda out: torch.autograd.grad(out, [x, *parameters], grad_out),
    )


def build_lm(subject: Subject, seqlen: int) -> Step:
    """The reference language model on bytes: its loss, and the gradients of its parameters."""
    from fastattn.models.transformer import Transformer, TransformerConfig

    config = TransformerConfig(
        num_layers=subject.layers,
        num_heads=subject.heads,
        embed_dim=subject.heads * subject.head_dim,
        max_seq_len=seqlen,
        attention=subject.implementation,
    )
    model = Transformer(config).to(subject.device, DTYPES[subject.dtype])
    tokens = torch.randint(config.vocab_size, (subject.batch, seqlen), device=subject.device)
    parameters = list(model.parameters())
    return Step(
        parameters,
        [tokens],
        lambda: model(tokens, tokens),
        lambda loss: torch.autograd.grad(loss, parameters),
    )


BUILDERS = {"op": build_op, "layer": build_layer, "lm": build_lm}


def measure(subject: Subject) -> Phases:
    """Forward and backward of the subject, by both meters. Call it in a process that does nothing else."""
    build, device = BUILDERS[subject.what], torch.device(subject.device)
    warm_up = build(subject, WARM_UP_LENGTH)
    warm_up.backward(warm_up.forward())
    del warm_up
    step = build(subject, subject.seqlen)
    gc.collect()
    resident = None
    if device.type == "cpu":
        with ResidentMeter() as process:
            gradients = step.backward(step.forward())
        resident = process.peak
        del gradients
        gc.collect()
    with AllocationMeter(device) as forward:
        out = step.forward()
    with AllocationMeter(device) as backward:
        gradients = step.backward(out)
    return Phases(
        parameters=sum(t.nbytes for t in step.parameters),
        inputs=sum(t.nbytes for t in step.inputs),
        forward_peak=forward.peak,
        kept_for_backward=forward.live,
        backward_peak=forward.live + backward.peak,
        gradients=sum(g.nbytes for g in gradients) if isinstance(gradients, tuple) else 0,
        resident_peak=resident,
    )


class PointError(Exception):
    """A point without figures; `status` is "oom" or "failed"."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Measurer:
    """Context manager around the server process; `measure` runs one subject in a fresh child."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "fastattn.bench.point"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
                # Asking the driver for GPUs would start CUDA in the server, and its forks could not use it.
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            },
        )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._requests, self._answers = self._server.stdin, self._server.stdout
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._requests.close()
        self._answers.close()
        self._server.wait()

    def measure(self, subject: Subject) -> Phases:
        """Measure in a fresh process.

        Raises:
            PointError: it ran out of memory, or failed.
        """
        self._requests.write(json.dumps(asdict(subject)) + "\n")
        self._requests.flush()
        line = self._answers.readline()
        if not line:
            raise PointError("failed", f"the measuring process ended with status {self._server.wait()}")
        answer = json.loads(line)
        if answer["status"] != "ok":
            raise PointError(answer["status"], answer["reason"])
        return Phases(**answer["phases"])


def _limit_memory(extra: int) -> None:
    """Let allocations fail, rather than the machine, once the process's data has grown by `extra` bytes."""
    import resource

    status = Path("/proc/self/status").read_text()
    data = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + extra, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _child(subject: Subject, answer_fd: int) -> None:
    """Measure, write one line of JSON, and leave without running the parent's exit handlers."""
    try:
        # If memory does run out, the system should end this process and no other.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        if subject.memory_limit is not None and subject.device == "cpu":
            with contextlib.suppress(OSError, ValueError, StopIteration):
                _limit_memory(subject.memory_limit)
        with fastattn.backends.own_backends():
            answer = {"status": "ok", "phases": asdict(measure(subject))}
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        lines = str(error).strip().splitlines()
        reason = "out of memory" if out_of_memory else f"{type(error).__name__}: {lines[0] if lines else ''}"
        answer = {"status": "oom" if out_of_memory else "failed", "reason": reason}
    os.write(answer_fd, (json.dumps(answer) + "\n").encode())
    os._exit(0)


def serve() -> None:
    """Fork a child for every subject that arrives on stdin, one JSON object a line."""
    for module in PRELOADED:
        importlib.import_module(module)
    fastattn.backends.capabilities("dense")
    gc.freeze()
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        subject = Subject(**json.loads(line))
        child = os.fork()
        if child == 0:
            _child(subject, answer_fd)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            killed = number == 9
            reason = "out of memory (killed by the system)" if killed else f"ended by signal {number}"
            answer = {"status": "oom" if killed else "failed", "reason": reason}
            os.write(answer_fd, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    serve()
