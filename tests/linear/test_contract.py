"""The feature grid on every backend: right where its capability table says yes, a clear refusal where it says no.

A case fails where the output, the returned state or any gradient is further from the float64 truth than twice
(gradients: three times) plain PyTorch math of the same dtype, where NaN in a masked key or in a fresh buffer gets into
a result, where a row without keys or the gradient of a masked key is not exactly zero, and where a backend runs or
refuses against its table.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from fastattn import verify
from fastattn.backends import FEATURES, capabilities
from fastattn.verify import check
from fastattn.verify.linear import GRID
from fastattn.verify.linear.cases import Case

OTHER_DTYPES = (torch.bfloat16, torch.float16, torch.float64)
RUN = int(os.environ["FASTATTN_TEST_SEED"])  # fresh for each run; not each test's own, so that tests share truths
TABLES = {c.backend: c for c in capabilities("linear")}

Target = tuple[str, str, str]  # device, backend, instruction set
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# Triton's interpreter takes seconds for a case: one of each mechanism, of one head and just past a chunk.
INTERPRETED = [
    replace(verify.find_case(name, "linear"), **{"batch": 1, "heads": 1, **changes})
    for name, changes in {
        "relu_projected": {},
        "softmax_bias": {},
        "full_softmax_state": {},
        "decay_step_odd": {},
        "vector_decay": {},
        "delta_state": {},
        "gqa_softmax": {"heads": 2, "kv_heads": 1, "q_len": 17},
        "packed_state": {"packed": (3, 0, 18), "tail": 2, "key_mask": "random"},
    }.items()
]


def _targets() -> list[Target]:
    on_devices = [(device, name) for device in DEVICES for name in verify.backends_on(device, family="linear")]
    return [(device, backend, isa) for device, backend in on_devices for isa in verify.instruction_sets(backend)]


def _spread() -> list[tuple[Case, torch.dtype, Target]]:
    """float32 on each backend's best instruction set: every case. Each other combination: a quarter, by the run's seed.

    In the order of the cases, so that all targets share the truth of one.
    """
    chosen = []
    best: set[tuple[str, str]] = set()
    for target in _targets():  # the best instruction set first
        cases = INTERPRETED if target[:2] == ("cpu", "triton") else GRID
        for turn, dtype in enumerate((torch.float32, *OTHER_DTYPES), RUN):
            everything = dtype == torch.float32 and target[:2] not in best
            chosen += [(case, dtype, target) for case in (cases if everything else cases[turn % 4 :: 4])]
        best.add(target[:2])
    return sorted(chosen, key=lambda parameters: (parameters[0].name, str(parameters[1])))


def _name(parameters: tuple[Case, torch.dtype, Target]) -> str:
    case, dtype, (device, backend, isa) = parameters
    where = "" if device == "cpu" else device
    return "-".join(filter(None, (where, backend, isa, str(dtype).removeprefix("torch."), case.name)))


@pytest.mark.parametrize("parameters", _spread(), ids=_name)
def test_case(parameters: tuple[Case, torch.dtype, Target]) -> None:
    case, dtype, (device, backend, isa) = parameters
    with verify.forced_isa(isa):
        result = verify.run_case(case, dtype, backend, device, RUN)
    assert result.passed, result.message


@pytest.mark.parametrize("backend", TABLES)
def test_every_feature_of_the_table_has_a_case(backend: str) -> None:
    """Fails where a table declares a feature that no case of the grid needs ("transforms" is tested in test_ops)."""
    covered = frozenset[str]().union(*(case.features for case in GRID))
    assert TABLES[backend].features - covered <= {"transforms"}
    assert covered <= set(FEATURES["linear"])


def test_case_names_are_unique() -> None:
    """Fails where two cases share a name, which would merge their rows in the ledger."""
    assert len({case.name for case in GRID}) == len(GRID)


def test_all_combinations_are_walked() -> None:
    """Fails where a backend and instruction set of this machine gets no case in some dtype."""
    walked = {(target, dtype) for _, dtype, target in _spread()}
    assert walked == set(product(_targets(), (torch.float32, *OTHER_DTYPES)))


# What is planted into a result -> (the result, the change)
DEFECTS = {
    "unwritten": ("out", lambda t: t.index_put((torch.tensor(-1),), torch.tensor(torch.nan, dtype=t.dtype))),
    "scaled gradient": ("grad_key", lambda t: t * 1.05),
    "gradient of a masked key": ("grad_value", lambda t: t + 1e-6),
    "state of the step before": ("kv", lambda t: t.roll(1, 1)),
    "decay of the next step": ("grad_decay", lambda t: t.roll(1, 2)),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bar_catches(defect: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the grid would pass a backend that skips elements, is 5 % off, leaks into a masked key or is off by
    a head or a step."""
    honest = check.run_backend
    name, change = DEFECTS[defect]

    def dishonest(*args: Any) -> dict[str, torch.Tensor]:
        found = honest(*args)
        return found | {name: change(found[name])}

    monkeypatch.setattr(check, "run_backend", dishonest)
    case = verify.find_case("key_mask_decay", "linear")
    assert not verify.run_case(case, dtype, "reference", "cpu", 5).passed


def test_a_refusal_must_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the grid would pass a backend that runs against its table, or refuses without saying why."""
    case, table = verify.find_case("delta", "linear"), TABLES["reference"]
    lacking = replace(table, features=table.features - {"delta"})
    monkeypatch.setattr(check, "capabilities", lambda family: (lacking,))
    result = verify.run_case(case, torch.float32, "reference", "cpu", 5)
    assert not result.passed
    assert "ran although the table says no delta rule" in result.message
