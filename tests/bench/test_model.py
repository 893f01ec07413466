"""Fails if a factory that breaks its contract is measured, or one that keeps it is refused or run in another way."""

import sys
import types
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastattn.bench import model as bench_model
from fastattn.bench.model import VARIANTS, FactoryError, build_model, describe, load_factory, loss_of, reference_of
from fastattn.bench.subject import Subject


class Doubled(nn.Module):
    """Returns what `wrap` makes of two tensors, an integer one first."""

    def __init__(self, wrap=lambda ints, out: out):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.wrap = wrap

    def forward(self, x, factor=1.0):
        return self.wrap(torch.arange(3), self.linear(x) * self.scale[0] * factor)


@pytest.fixture
def factory(monkeypatch):
    """A function that makes its argument the factory "made:it" and returns the subject of that name."""

    def make(function, mode="fwdbwd", implementation="original"):
        monkeypatch.setitem(sys.modules, "made", types.SimpleNamespace(it=function))
        load_factory.cache_clear()
        return Subject("made:it", implementation, 8, mode=mode)

    yield make
    load_factory.cache_clear()


def run(subject):
    step = build_model(subject, subject.seqlen)
    with step.scope:
        out = step.forward()
        return step, out, step.backward(out) if step.backward else None


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, 3.0],
        lambda x: {"x": x, "factor": 2.0},
        lambda x: {"factor": torch.tensor(2.0), "x": x},
    ],
)
def test_inputs_of_every_form_reach_the_model(factory, inputs):
    """Fails if an argument is lost or takes another's place: the gradients are those of plain PyTorch."""
    torch.manual_seed(0)
    model, x = Doubled(), torch.randn(1, 8, 4)
    given = inputs(x)
    step, loss, gradients = run(factory(lambda seqlen: (model, given)))
    kwargs = given if isinstance(given, dict) else {}
    args = () if kwargs else (given if isinstance(given, tuple | list) else (given,))
    expected = model(*args, **kwargs).sum()
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(gradients, wanted)
    assert all(p.grad is None for p in model.parameters())
    assert len(step.parameters) == 3
    assert sum(t.nbytes for t in step.inputs) == x.nbytes + (4 if "factor" in kwargs and len(step.inputs) == 2 else 0)


Named = namedtuple("Named", "count hidden")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda ints, out: out,
        lambda ints, out: (ints, out, out * 7),
        lambda ints, out: {"ints": ints, "deep": [None, out]},
        Named,
        lambda ints, out: SimpleNamespace(loss=out.sum()),
        lambda ints, out: SimpleNamespace(loss=out),
    ],
)
def test_the_loss_is_found_in_outputs_of_every_form(factory, wrap):
    """Fails if an integer tensor, a later one or none is taken."""
    model, x = Doubled(wrap), torch.randn(1, 8, 4)
    _, loss, gradients = run(factory(lambda seqlen: (model, x)))
    expected = (model.linear(x) * 2).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(model.parameters())))


@pytest.mark.parametrize("kind", [dict, OrderedDict, SimpleNamespace, type("Sub", (dict,), {})])
def test_a_loss_comes_before_other_outputs(kind):
    """Fails if logits that come first, or a loss of None, are taken for the loss; in any kind of output."""
    logits = torch.ones(2, requires_grad=True)
    assert loss_of(kind(logits=logits, loss=None)) == 2
    assert loss_of(kind(logits=logits, loss=(3 * logits).sum())) == 6


def test_gradients_reach_inputs_that_ask_for_them_and_training_is_training(factory):
    x = torch.randn(1, 8, 4, requires_grad=True)
    model = Doubled().eval()
    step, _, gradients = run(factory(lambda seqlen: (model, x)))
    assert [g.shape for g in gradients] == [(4, 4), (4,), (1, 8, 4)]
    assert model.training
    step, out, gradients = run(factory(lambda seqlen: (model, x), mode="fwd"))
    assert not model.training
    assert step.backward is None
    assert gradients is None
    torch.testing.assert_close(out, model(x))


def test_checkpointing_that_autograd_grad_refuses_works(factory):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Doubled):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    x = torch.randn(1, 8, 4, requires_grad=True)
    assert len(run(factory(lambda seqlen: (Checkpointed(), x)))[2]) == 3


def test_every_build_has_the_same_weights_and_inputs(factory):
    """Fails if implementations are compared on different numbers."""
    subject = factory(lambda seqlen: (Doubled(), torch.randn(1, seqlen, 4)))
    first, second = (run(subject)[1] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda n: None, r"must return \(model, inputs\).*got NoneType"),
        (lambda n: nn.Linear(4, 4), r"must return \(model, inputs\).*got Linear"),
        (lambda n: (torch.randn(1, n, 4), nn.Linear(4, 4)), r"got tuple of \(Tensor, Linear\)"),
        (lambda n: (nn.Linear(4, 4), torch.randn(1), 3), r"got tuple of \(Linear, Tensor, int\)"),
        (lambda n: (nn.Linear(4, 4), None), "inputs as a tensor.*got NoneType"),
        (lambda n: (nn.Linear(4, 4), ()), r"inputs as a tensor.*got tuple of \(\)"),
        (lambda n: (nn.Linear(4, 4), {"x": 3}), "inputs as a tensor.*got dict"),
        (lambda n: {}["weights"], "raised KeyError: 'weights' .test_model.py, line"),
        (lambda: None, "raised TypeError.*positional argument"),
        (lambda n: (Doubled(lambda ints, out: ints), torch.randn(1, n, 4)), "floating-point tensor.*got Tensor"),
        (lambda n: (Doubled(lambda ints, out: None), torch.randn(1, n, 4)), "got NoneType"),
        (lambda n: (nn.Identity(), torch.randn(1, n, 4)), "requires a gradient, or mode be 'fwd'"),
    ],
)
def test_a_broken_contract_is_named(factory, function, message):
    with pytest.raises(FactoryError, match=message) as error:
        run(factory(function))
    assert str(error.value).startswith("fastattn: ")


def test_memory_that_runs_out_while_building_is_no_broken_contract(factory):
    def huge(seqlen):
        return nn.Linear(1 << 25, 1 << 25), torch.randn(1)

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run(factory(huge))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def f(n): return n", "g", "has no function 'g'"),
        ("f = 3", "f", "has no function 'f'"),
        ("def f(n) return n", "f", "SyntaxError"),
        ("import no_such_module_at_all", "f", "no_such_module_at_all.*file.py, line 1"),
        ("raise SystemExit(2)", "f", "SystemExit: 2 .file.py, line 1"),
        (None, "f", "no file"),
    ],
)
def test_files_that_do_not_give_a_factory(tmp_path, text, name, message):
    path = tmp_path / "file.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FactoryError, match=message):
        load_factory(f"{path}:{name}")


def test_files_find_their_neighbours_and_shadow_nothing(tmp_path, monkeypatch):
    """Fails if a file named as an installed module takes that module's place, or cannot import from its folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "torch.py").write_text("from neighbour_of_torch import size\nclass A:\n  def f(n): return size")
    (tmp_path / "neighbour_of_torch.py").write_text("size = 17")
    assert load_factory(f"{tmp_path / 'torch.py'}:A.f")(0) == 17
    assert sys.modules["torch"] is torch


def outer():
    def inner(seqlen):
        pass

    return inner


def test_references_name_what_a_fresh_process_finds(monkeypatch, tmp_path):
    assert reference_of("pkg.module:f") == "pkg.module:f"
    assert reference_of(describe) == "fastattn.bench.model:describe"
    main = types.ModuleType("__main__")
    exec("def f(n): pass", main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ValueError, match="typed into a session"):
        reference_of(main.f)
    main.__file__ = str(tmp_path / "script.py")
    assert reference_of(main.f) == f"{tmp_path / 'script.py'}:f"
    main.__spec__ = SimpleNamespace(name="pkg.__main__")
    assert reference_of(main.f) == "pkg.__main__:f"


@pytest.mark.parametrize("factory", [outer(), lambda n: None, SimpleNamespace.__init__, nn.Linear(2, 2).forward])
def test_functions_that_no_other_process_finds_are_refused(factory):
    with pytest.raises(ValueError, match="must be importable by a fresh process"):
        reference_of(factory)


@pytest.mark.parametrize(("given", "error"), [("no_colon", ValueError), (":f", ValueError), (3, TypeError)])
def test_what_is_no_factory_is_refused(given, error):
    with pytest.raises(error, match="fastattn: factory must be"):
        reference_of(given)


class Direct(nn.Module):
    """Self-attention on (batch, seqlen, 16), 2 heads, by torch's scaled_dot_product_attention or by hand."""

    def __init__(self, by_hand=False):
        super().__init__()
        self.qkv, self.by_hand = nn.Linear(16, 48), by_hand

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            return ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (encoder, {"original": None, "replaced": 2, "activated": 2, "overridden": 2}),
        (Direct, {"original": None, "replaced": 0, "activated": 1, "overridden": 1}),
        (lambda: Direct(by_hand=True), {"original": None, "replaced": 0, "activated": 0, "overridden": 0}),
    ],
)
@pytest.mark.parametrize("name", ["original", "replaced", "activated", "overridden"])
def test_implementations_say_how_much_they_change_and_compute_the_same(factory, make, changed, name):
    """Against the untouched model: fails if a variant leaves the model as it was and says otherwise, or is wrong."""
    if name in ("activated", "overridden"):
        pytest.importorskip("fastattn.integrations.sdpa")
    wanted = run(factory(lambda n: (make(), torch.randn(2, n, 16))))[1:]
    step = build_model(factory(lambda n: (make(), torch.randn(2, n, 16)), implementation=name), 8)
    with step.scope as effect_of:
        out = step.forward()
        found = out, step.backward(out)
        effect = effect_of() if effect_of else None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (effect.changed if effect else None) == changed[name]
    if effect:
        assert effect.report


def test_transformers_models_take_the_registered_implementation(factory, monkeypatch):
    """By stand-ins; fails if the model is told before the name is registered, or a model without the call passes."""
    calls = []
    integration = types.SimpleNamespace(register=lambda: calls.append("register"))
    monkeypatch.setitem(sys.modules, "fastattn.integrations.transformers", integration)

    class Pretrained(Doubled):
        def set_attn_implementation(self, name):
            calls.append(name)

    run(factory(lambda n: (Pretrained(), torch.randn(1, n, 4)), implementation="transformers"))
    assert calls == ["register", "fastattn"]
    with pytest.raises(TypeError, match=r"transformers.PreTrainedModel, got Doubled"):
        run(factory(lambda n: (Doubled(), torch.randn(1, n, 4)), implementation="transformers"))


def test_every_variant_is_offered():
    assert tuple(VARIANTS) == bench_model.MODEL.implementations
    assert set(bench_model.MODEL.default) <= set(VARIANTS)
