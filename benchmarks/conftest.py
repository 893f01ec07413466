"""Options of the benchmark suites, and the shapes that they share.

pytest benchmarks                                quick
pytest benchmarks --lengths 512..8k              what the speed targets name
pytest benchmarks --benchmark-autosave           keep the run; compare with --benchmark-compare
"""

import pytest
import torch

from fastattn.bench.options import parse_lengths
from fastattn.bench.suites import default_device


def pytest_addoption(parser):
    parser.addoption("--lengths", default="256,1k", help="sequence lengths: 512,1k or doublings 512..8k")


def pytest_generate_tests(metafunc):
    if "seqlen" in metafunc.fixturenames:
        metafunc.parametrize("seqlen", parse_lengths(metafunc.config.getoption("lengths")))


@pytest.fixture(scope="session")
def lengths(request):
    return parse_lengths(request.config.getoption("lengths"))


@pytest.fixture(scope="session")
def device():
    return default_device()


@pytest.fixture
def finished(device):
    """Wrap a step so that a benchmark's timer sees its end on a GPU too."""

    def wrap(step):
        if device.type == "cpu":
            return step

        def run():
            step()
            torch.cuda.synchronize()

        return run

    return wrap


@pytest.fixture
def show(capsys):
    """Print past pytest's capture: these suites are read."""

    def show_past_capture(function, *arguments):
        with capsys.disabled():
            print()
            function(*arguments)

    return show_past_capture
