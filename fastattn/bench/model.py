"""A user's own model as a subject: the factory that builds it, and what fastattn does to it before and after.

The contract is `factory(seqlen) -> (model, inputs)`: a `torch.nn.Module`, and a tensor, a tuple or list of positional
arguments, or a dict of keyword arguments. A step is the forward, then the backward from the output's loss (attribute or
key) where it has one, else from the sum of its first floating-point tensor.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastattn.bench.memory import is_out_of_memory
from fastattn.bench.subject import Effect, Kind, Step, Subject

Scope = AbstractContextManager[Callable[[], Effect] | None]
LIBRARIES = tuple(str(Path(module.__file__ or "").parent) for module in (torch, sys.modules["fastattn"]))


class FactoryError(ValueError):
    """The factory does not keep its contract."""


def describe(error: BaseException) -> str:
    """Type, first line, and the last place outside of torch and fastattn that it came through."""
    lines = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((*LIBRARIES, "<")) and "importlib" not in f.filename]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {lines[0] if lines else ''}{place}"


def reference_of(factory: str | Callable[[int], Any]) -> str:
    """The name by which a fresh process finds the factory: "module:function" or "file.py:function".

    Raises:
        TypeError, ValueError: it is no function, or one that cannot be imported, such as a lambda.
    """
    if isinstance(factory, str):
        if not all(factory.rpartition(":")[::2]):
            raise ValueError(f"fastattn: factory must be 'module:function' or 'file.py:function', got {factory!r}")
        return factory
    if not callable(factory):
        raise TypeError(f"fastattn: factory must be a function or its name, got {type(factory).__name__}")
    name = getattr(factory, "__qualname__", "")
    module = sys.modules.get(getattr(factory, "__module__", ""))
    where = getattr(module, "__name__", None)
    if module is not None and where == "__main__":
        spec = getattr(module, "__spec__", None)
        where = spec.name if spec else getattr(module, "__file__", None)
    if where is None or _attribute(module, name) is not factory:
        raise ValueError(
            "fastattn: factory must be importable by a fresh process (a function of a module or a script, no lambda, "
            f"inner function or one typed into a session), got {name or factory!r}"
        )
    return f"{where}:{name}"


def _attribute(module: ModuleType | None, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


@cache
def load_factory(reference: str) -> Callable[[int], Any]:
    """Import what a reference names.

    Raises:
        FactoryError: there is no such file, module or function, or importing it fails.
    """
    where, _, name = reference.rpartition(":")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise FactoryError(f"fastattn: model must be importable, got {reference!r}: {describe(error)}") from error
    factory = _attribute(module, name)
    if not callable(factory):
        raise FactoryError(f"fastattn: model must name a function, but {where} has no function {name!r}")
    return factory


def _load_file(path: Path) -> ModuleType:
    """Run a file as a module that finds its neighbours; its name is one that no installed module has."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"profiled_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(path.parent.resolve()))
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def _build(reference: str, seqlen: int) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """(model, positional arguments, keyword arguments) as the factory returns them, checked."""
    factory, call = load_factory(reference), f"{reference}({seqlen})"
    torch.manual_seed(0)
    try:
        built = factory(seqlen)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise FactoryError(f"fastattn: {call} must return (model, inputs), but raised {describe(error)}") from error
    if not isinstance(built, tuple) or len(built) != 2 or not isinstance(built[0], nn.Module):
        raise FactoryError(f"fastattn: {call} must return (model, inputs), a torch.nn.Module first, got {_type(built)}")
    model, inputs = built
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, tuple | list | dict) or not any(isinstance(t, Tensor) for t in tree_leaves(inputs)):
        raise FactoryError(
            f"fastattn: {call} must return inputs as a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"got {_type(inputs)}"
        )
    return (model, (), inputs) if isinstance(inputs, dict) else (model, tuple(inputs), {})


def _type(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of ({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


def loss_of(output: Any) -> Tensor:
    """The scalar that a training step starts its backward from.

    Raises:
        FactoryError: there is none, or nothing in it requires a gradient.
    """
    named = dict(output) if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    if isinstance(output, Tensor | tuple | list):
        named = {}
    loss = named.get("loss", getattr(output, "loss", None))
    found = [loss] if isinstance(loss, Tensor) else tree_leaves(named or output)
    found = [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise FactoryError(f"fastattn: model must return a floating-point tensor or a loss, got {_type(output)}")
    if not found[0].requires_grad:
        raise FactoryError("fastattn: model must have a parameter that requires a gradient, or mode be 'fwd'; got none")
    return found[0] if found[0].dim() == 0 else found[0].sum()


@contextmanager
def original(model: nn.Module) -> Iterator[None]:
    yield None


@contextmanager
def replaced(model: nn.Module) -> Iterator[Callable[[], Effect]]:
    from fastattn.nn import replace_attention

    report = replace_attention(model)
    yield lambda: Effect(len(report.names("replaced")), str(report))


@contextmanager
def activated(model: nn.Module) -> Iterator[Callable[[], Effect]]:
    from fastattn.integrations import sdpa

    with sdpa.activated() as report:
        yield lambda: Effect(report.count("fastattn"), str(report))


@contextmanager
def overridden(model: nn.Module) -> Iterator[Callable[[], Effect]]:
    from fastattn.integrations import sdpa

    with sdpa.override_sdpa() as report:
        yield lambda: Effect(report.count("fastattn"), str(report))


@contextmanager
def transformers(model: nn.Module) -> Iterator[Callable[[], Effect]]:
    from fastattn.integrations.transformers import register

    set_implementation = getattr(model, "set_attn_implementation", None)
    if set_implementation is None:
        raise TypeError(f"fastattn: model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    register()
    set_implementation("fastattn")
    yield lambda: Effect(1, 'attn_implementation="fastattn"')


#: What is done to a model before it runs, by name; each yields what says afterwards how much that changed.
VARIANTS: dict[str, Callable[[nn.Module], Scope]] = {
    "original": original,
    "replaced": replaced,
    "activated": activated,
    "overridden": overridden,
    "transformers": transformers,
}


def build_model(subject: Subject, seqlen: int) -> Step:
    """One step of the user's model, in training mode, or in evaluation mode for mode "fwd"."""
    device, training = torch.device(subject.device), subject.mode == "fwdbwd"
    model, args, kwargs = _build(subject.what, seqlen)
    model = model.to(device).train(training)

    def placed(t: Tensor) -> Tensor:
        return t.detach().to(device).requires_grad_(t.requires_grad)

    args, kwargs = tree_map_only(Tensor, placed, (args, kwargs))
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    parameters = list(model.parameters())
    leaves = [t for t in (*parameters, *inputs) if t.requires_grad]

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        # Not torch.autograd.grad, which hooks and reentrant checkpointing do not support.
        loss.backward()
        gradients = tuple(t.grad for t in leaves if t.grad is not None)
        for leaf in leaves:
            leaf.grad = None
        return gradients

    def forward() -> Any:
        return model(*args, **kwargs)

    return Step(
        type(model).__name__,
        [*parameters, *model.buffers()],
        inputs,
        (lambda: loss_of(forward())) if training else forward,
        backward if training else None,
        VARIANTS[subject.implementation](model),
    )


MODEL = Kind(
    tuple(VARIANTS),
    ("original", "replaced", "activated"),
    build_model,
    lambda s: f"{s.what}, {'forward' if s.mode == 'fwd' else 'forward + backward'}",
    warm_up=None,  # which lengths a user's model takes is the user's to say
)
