"""Threads, forks and repeats: the same bits whoever calls, and nobody hangs.

Fails where a result depends on the number of threads or on what another thread does, where repeats of a deterministic
call differ in any bit, where a forked child waits for ever for its parent's thread pool, or where Ctrl-C waits for the
end of a long call.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import verify

BACKENDS = verify.backends_on("cpu", own=True)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
TIMEOUT = 60  # seconds; a call takes milliseconds


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def problem(dtype: torch.dtype = torch.float32, seed: int = 0, lengths: tuple[int, int] = (70, 90)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 2, lengths[0], 32), *[(2, 1, lengths[1], 32)] * 2)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def run(leaves: list[Tensor], backend: str, **options) -> list[Tensor]:
    """Output, LSE and the gradients of their sum; a bias of batch size 1, whose gradient several threads add to."""
    bias = torch.linspace(-1, 1, leaves[1].shape[2], dtype=leaves[0].dtype).requires_grad_()
    out, lse = fastattn.attention(*leaves, attn_mask=bias, causal=True, return_lse=True, backend=backend, **options)
    grads = torch.autograd.grad([out.sin().sum() + lse.sum()], [*leaves, bias])
    return [out.detach(), lse.detach(), *grads]


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for d in (torch.float32, torch.bfloat16, torch.float64) for b in verify.backends_on("cpu", d, own=True)],
    ids=str,
)
@pytest.mark.parametrize("how", ["argument", "torch's switch"])
def test_deterministic_repeats(backend: str, dtype: torch.dtype, how: str, two_threads: None) -> None:
    """Three repeats on two threads, forward and backward, gradient of a broadcast bias included."""
    leaves = problem(dtype)
    if how == "argument":
        results = [run(leaves, backend, deterministic=True) for _ in range(3)]
    else:
        torch.use_deterministic_algorithms(True)
        try:
            results = [run(leaves, backend) for _ in range(3)]
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(70, 90), (3, 5000)], ids=str)
def test_number_of_threads_does_not_change_the_bits(lengths: tuple[int, int], dtype: torch.dtype, cpu_isa: str) -> None:
    """Deterministic cpu kernels give one result on 1, 2 and 3 threads, on each instruction set, decoding too."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(problem(dtype, lengths=lengths), "cpu", deterministic=True))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])  # Triton's interpreter is one thread's
def test_several_python_threads(backend: str, two_threads: None) -> None:
    """Four Python threads call at once, each with its own problem, and each gets its own result."""
    expected = [run(problem(seed=n), backend, deterministic=True) for n in range(4)]
    wrong: list[int] = []

    def work(n: int) -> None:
        wrong.extend(
            n for _ in range(4) if not same_bits(run(problem(seed=n), backend, deterministic=True), expected[n])
        )

    workers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIMEOUT)
        assert not worker.is_alive(), "a thread hangs"
    assert not wrong


def _in_child(work) -> str:
    """Run `work` in a forked child; what it returns, or "hangs"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException as error:
            answer = repr(error)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], TIMEOUT)
        return os.read(reading, 10_000).decode() if ready else "hangs"
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork() -> None:
    """A child forked after its parent used the kernels' threads computes the same, on as many threads."""
    script = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_threads import BACKENDS, _in_child, problem, run, same_bits
torch.set_num_threads(2)
for backend in BACKENDS:
    with torch.no_grad():
        import fastattn
        call = lambda: fastattn.attention(*problem(), causal=True, backend=backend)
        expected = call()
    def work():
        torch.set_num_threads(2 if backend == "cpu" else 1)  # torch's own pool does not survive a fork
        with torch.no_grad():
            return "same" if torch.allclose(call(), expected, atol=1e-6) else "different"
    answer = _in_child(work)
    assert answer == "same", (backend, answer)
"""
    # In a process of its own: forking pytest's would fork its threads, capture and coverage along.
    code = script.format(folder=os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ kernels")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_interrupt(threads: int, pass_: str) -> None:
    """A signal whose handler raises, as Ctrl-C does, ends a call that would take hours, and the next call is right."""
    script = f"""
import signal, torch, fastattn
from fastattn.dense import api, native
torch.set_num_threads({threads})
query = torch.randn(1, 1, 2_000_000, 8)
problem = api.normalise(query, query, query, (1, 1, 2_000_000, 2_000_000))
def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    if "{pass_}" == "forward":
        native.forward(problem)
    else:
        native.backward(problem, query, torch.zeros(query.shape[:3]), query, None, False)
except KeyboardInterrupt:
    small = [torch.eye(4)[None, None]] * 3
    right = fastattn.attention(*small, backend="reference")
    torch.testing.assert_close(fastattn.attention(*small, backend="cpu"), right)
    print("interrupted")
"""
    # Without the feature it would run on: in a process of its own it can be ended.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.stdout == "interrupted\n", done.stderr
