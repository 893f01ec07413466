"""Fails if a meter misses, double-counts or invents memory, or if a point's process is not a fresh one."""

import gc
import os
import platform

import pytest
import torch

from fastattn.bench.memory import (
    MIB,
    AllocationMeter,
    ResidentMeter,
    available_memory,
    is_out_of_memory,
    return_free_memory,
    running_peak,
)
from fastattn.bench.point import Measurer, PointError
from fastattn.bench.subject import Shape, Subject

CPU = torch.device("cpu")


def test_running_peak():
    assert running_peak([4, 8, -4, 2, -10]) == (12, 0)
    assert running_peak([-4, 2]) == (0, -2)
    assert running_peak([]) == (0, 0)


def test_allocation_meter_sees_a_known_allocation():
    with AllocationMeter(CPU) as meter:
        kept = torch.ones(10 * MIB // 4)
        temporary = torch.ones(30 * MIB // 4)
        del temporary
    assert meter.peak == pytest.approx(40 * MIB, rel=0.001)
    assert meter.live == pytest.approx(10 * MIB, rel=0.001)
    del kept


def test_allocation_meter_sees_inside_operations():
    """A softmax of a product holds the product and the result at once."""
    a = torch.randn(512, 512)
    with AllocationMeter(CPU) as meter:
        result = (a @ a).softmax(-1)
    assert meter.peak == pytest.approx(2 * MIB, rel=0.01)
    assert meter.live == pytest.approx(1 * MIB, rel=0.01)
    del result


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident sizes are read from Linux's /proc")
def test_resident_meter_sees_memory_behind_torchs_back():
    gc.collect()
    with ResidentMeter() as meter:
        block = bytearray(os.urandom(MIB)) * 64
        del block
    assert meter.peak == pytest.approx(64 * MIB, rel=0.05)
    with ResidentMeter() as meter:
        pass
    assert meter.peak < 4 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what malloc_trim does is glibc's")
def test_freed_memory_is_seen_when_it_is_taken_again():
    """Fails if what a warm-up has freed stays in the process, where a step could take it unseen."""
    blocks = [bytes(100_000) for _ in range(640)]
    pin = bytes(100_000)  # on top of the heap, so that freeing the blocks does not shrink it
    del blocks
    return_free_memory()
    with ResidentMeter() as meter:
        blocks = [b"x" * 100_000 for _ in range(640)]
    assert meter.peak > 56 * MIB
    del blocks, pin


def test_available_memory_is_positive_and_physical():
    assert 0 < available_memory(CPU) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.fixture(scope="module")
def measurer():
    with Measurer() as server:
        yield server


def test_naive_attention_keeps_the_matrix_and_fastattn_does_not(measurer):
    """Naive keeps softmax's output, S x S for each of the 2 heads; fastattn's kept memory is linear in S."""
    shape = Shape(heads=2, head_dim=16, causal=False)
    matrix = 2 * 512 * 512 * 4
    naive = measurer.measure(Subject("op", "naive", 512, shape))
    assert naive.kept == pytest.approx(matrix + 2 * 512 * 16 * 4, rel=0.01)
    assert naive.peak >= 2 * matrix
    assert naive.inputs == 4 * 2 * 512 * 16 * 4
    assert naive.gradients == 3 * 2 * 512 * 16 * 4
    fast = measurer.measure(Subject("op", "fastattn", 512, shape))
    assert fast.kept < matrix / 4


@pytest.mark.parametrize("what", ["layer", "lm"])
def test_layer_and_model_are_measured_by_phase(measurer, what):
    figures = measurer.measure(Subject(what, "fastattn", 64, Shape(heads=2, head_dim=16, layers=1)))
    assert figures.parameters > 0
    assert 0 < figures.kept <= figures.forward_peak
    assert figures.backward_peak >= figures.gradients > 0
    assert 0 < figures.p20_ms <= figures.median_ms <= figures.p80_ms
    assert figures.samples >= 3


@pytest.mark.parametrize("what", ["op", "layer", "lm"])
def test_inference_keeps_the_output_alone(measurer, what):
    """Fails if mode "fwd" records a graph or runs a backward."""
    shape = Shape(batch=2, heads=2, head_dim=16, layers=2)
    figures = measurer.measure(Subject(what, "sdpa", 64, shape, mode="fwd"))
    width = 256 if what == "lm" else 32  # the model's output is logits of bytes
    assert figures.kept == pytest.approx(2 * 64 * width * 4, rel=0.1)
    assert figures.backward_peak is None
    assert figures.gradients is None
    assert figures.peak == figures.forward_peak
    assert figures.median_ms > 0


def test_a_point_over_its_limit_is_out_of_memory_and_the_next_one_runs(measurer):
    shape = Shape(heads=4, head_dim=16)
    with pytest.raises(PointError) as error:
        measurer.measure(Subject("op", "naive", 4096, shape, memory_limit=100 * MIB))
    assert error.value.status == "oom"
    assert measurer.measure(Subject("op", "naive", 64, shape)).peak > 0


def test_a_point_that_fails_says_why(measurer):
    with pytest.raises(PointError, match="int3"):
        measurer.measure(Subject("op", "naive", 64, Shape(dtype="int3")))
