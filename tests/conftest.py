"""For every test: a fresh random seed that a failure prints, and uninitialised memory that is NaN.

Without a GPU, Triton's interpreter runs the `triton` backend on CPU tensors.

Seeds: `FASTATTN_TEST_SEED=<number> pytest ...` repeats a run. Each test seeds torch, Python's random and its own `seed`
fixture from that number and its name, so that it repeats alone and in any order.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastattn declares the backend, so before it is imported

from fastattn import _extension, verify
from fastattn.verify.poison import poisoned_allocations

settings.register_profile("fastattn", database=None, deadline=None, print_blob=True, max_examples=25)
settings.load_profile("fastattn")


def pytest_configure(config: pytest.Config) -> None:
    # Set before xdist starts its workers, which inherit it: one seed for the whole run.
    os.environ.setdefault("FASTATTN_TEST_SEED", str(random.SystemRandom().randrange(2**31)))


def pytest_report_header() -> str:
    return f"FASTATTN_TEST_SEED={os.environ['FASTATTN_TEST_SEED']}"


def _seed_of(name: str) -> int:
    return zlib.crc32(f"{os.environ['FASTATTN_TEST_SEED']} {name}".encode()) % 2**31


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        run = os.environ["FASTATTN_TEST_SEED"]
        report.sections.append(
            ("seed", f"FASTATTN_TEST_SEED={run} repeats this; the test's own is {_seed_of(item.nodeid)}")
        )
    return report


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN for the whole run, so a kernel that skips an element shows."""
    with poisoned_allocations():
        yield


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed; torch's and Python's generators start from it."""
    value = _seed_of(request.node.nodeid)
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(params=[isa for isa in verify.instruction_sets("cpu") if isa] or [""])
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the cpu backend that runs here, forced for the test."""
    if reason := _extension.unavailable():
        pytest.skip(reason)
    with verify.forced_isa(request.param):
        yield request.param
