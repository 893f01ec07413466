"""Hugging Face transformers models with attn_implementation="fastattn" against the same model with "eager".

Tiny models with random weights, constructed from configurations; nothing is downloaded. They are in float64, to agree
to rounding. Padding rows, which nobody reads, may differ.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.17")
masking_utils = importlib.import_module("transformers.masking_utils")
integration = importlib.import_module("fastattn.integrations.transformers")

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
LENGTH, VOCABULARY = 13, 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0}
WINDOW = {"sliding_window": 5}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
BERT = TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Case(NamedTuple):
    """A model class, its configuration class and options, and how many attention calls one forward makes."""

    model: str
    config: str
    options: dict[str, Any]
    calls: int = 2


CASES = {
    "llama": Case("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": Case("MistralForCausalLM", "MistralConfig", GROUPED | WINDOW),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    # Half of the layers have a window, softcap, head size 256 (the default).
    "gemma2": Case("Gemma2ForCausalLM", "Gemma2Config", GROUPED | WINDOW | {"head_dim": 256}),
    "gemma3": Case("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | WINDOW | {"sliding_window_pattern": 2}),
    "gpt_oss": Case(
        "GptOssForCausalLM",
        "GptOssConfig",
        GROUPED
        | WINDOW
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": Case("BertForMaskedLM", "BertConfig", BERT),
    "modernbert": Case(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        TEXT | {"local_attention": 6, "cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 4},
        calls=4,
    ),
    "t5": Case("T5ForConditionalGeneration", "T5Config", T5, calls=6),
    "whisper": Case("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, calls=5),
    "vit": Case(
        "ViTForImageClassification",
        "ViTConfig",
        VISION | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "clip": Case(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT | {"vocab_size": VOCABULARY + 1}, "vision_config": VISION, "projection_dim": 16},
        calls=4,
    ),
}
DECODERS = ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    integration.register()
    yield
    integration.unregister()


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention rounds its softmax to float32 in float64 models, too; here these are the truth."""
    softmax = nn.functional.softmax

    def wide(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim, dtype=torch.float64 if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(nn.functional, "softmax", wide)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fastattn functions that were called, one for each layer's call."""
    seen: list[str] = []
    for function in (integration.attention, integration.attention_varlen):

        def spy(*args: Any, _function: Callable[..., Any] = function, **options: Any) -> Any:
            seen.append(_function.__name__)
            return _function(*args, **options)

        monkeypatch.setattr(integration, function.__name__, spy)
    return seen


def build(name: str, **changes: Any) -> nn.Module:
    case = CASES[name]
    config = getattr(transformers, case.config)(**case.options | changes)
    model = getattr(transformers, case.model)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # attention that matters: transformers starts near zero
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.5))
    return model.double()


def set_implementation(model: nn.Module, name: str) -> None:
    """On older transformers, T5's encoder and decoder have to be told themselves: it passes over parts whose
    configuration is of the model's own class."""
    apart = VERSION < (5, 20) and isinstance(model, transformers.T5PreTrainedModel)
    for part in (model, model.encoder, model.decoder) if apart else (model,):
        part.set_attn_implementation(name)


def padding_mask(kind: str) -> Tensor:
    """(2, LENGTH) ones, with zeros where the kind says."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, {"none": [], "left": [0, 1, 2, 3], "right": [-1, -2, -3, -4], "holes": [0, 4, 5, 9]}[kind]] = 0
    return mask


def inputs(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """What a model is called with, and which of its logits somebody reads (None: all)."""
    tokens, mask = torch.randint(3, VOCABULARY, (2, LENGTH)), padding_mask(padding)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12, dtype=torch.float64)}, None
    if name == "clip":
        tokens[:, 6] = VOCABULARY  # the largest: CLIP reads this one's row, which is no padding
        return {
            "input_ids": tokens,
            "pixel_values": torch.randn(2, 3, 12, 12, dtype=torch.float64),
            "attention_mask": mask,
        }, None
    if name == "whisper":
        audio = torch.randn(2, 8, 20, dtype=torch.float64)
        return {"input_features": audio, "decoder_input_ids": tokens, "decoder_attention_mask": mask}, mask.bool()
    if name == "t5":
        target = torch.randint(3, VOCABULARY, (2, 7))
        return {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": target}, None
    return {"input_ids": tokens, "attention_mask": mask}, mask.bool()


def logits_of(name: str, model: nn.Module, given: dict[str, Any]) -> Tensor:
    out = model(**given)
    return torch.cat([out.text_embeds, out.image_embeds]) if name == "clip" else out.logits


def step(name: str, model: nn.Module, given: dict[str, Any], read: Tensor | None) -> list[Tensor]:
    """The logits that somebody reads, and the gradients of a loss on them for all parameters that have one."""
    logits = logits_of(name, model, given)
    logits = logits if read is None else logits[read]
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((logits * weight).sum(), parameters, allow_unused=True)
    return [logits.detach(), *(g for g in gradients if g is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    """Each tensor to within tolerance of its largest element; what should be 0 (keys' biases) of the largest of all."""
    assert len(found) == len(expected)
    floor = 1e-2 * max(theirs.abs().max().item() for theirs in expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(floor)


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", list(CASES))
def test_model_is_the_same(name: str, padding: str, calls: list[str]) -> None:
    """Fails if logits or the gradient of any parameter differ from eager attention's (a mask, scale, bias, softcap or
    sink lost or misread), or if a layer did not go through fastattn."""
    model = build(name).train()
    given, read = inputs(name, padding)
    expected = step(name, model, given, read)
    assert not calls
    set_implementation(model, "fastattn")
    assert_same(step(name, model, given, read), expected)
    assert calls == ["attention"] * CASES[name].calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*DECODERS, "t5", "whisper"])
def test_generation_is_the_same(name: str, cache: str, calls: list[str]) -> None:
    """Greedy decoding past the window, of a left-padded batch; fails if a token or its logits differ from eager
    attention's: a cache's offset, its unfilled rows, or the padding misread. A static cache counts in place what it
    holds, so a mask that shares its counter is off by a step."""
    model = build(name).eval()
    given, _ = inputs(name, "none" if name == "whisper" else "left")
    given = {key: value for key, value in given.items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    expected = transformers.GenerationMixin.generate(model, **given, **options)
    set_implementation(model, "fastattn")
    found = transformers.GenerationMixin.generate(model, **given, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert_same(list(found.logits), list(expected.logits))
    assert len(calls) > 8


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_prefill_in_pieces_is_the_same(name: str, static: bool, calls: list[str]) -> None:
    """Several queries at a time on a filled cache; fails if the causal diagonal is not at the cache's end."""
    model = build(name).eval()
    given, read = inputs(name, "left")
    pieces = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        cache = transformers.StaticCache(model.config, 20) if static else transformers.DynamicCache(config=model.config)
        logits, seen = [], 0
        for length in (6, 3, 1, 3):
            piece, seen = slice(seen, seen + length), seen + length
            mask = given["attention_mask"][:, :seen]
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, piece]
            out = model(
                given["input_ids"][:, piece], attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            logits.append(out.logits[read[:, piece]].detach())
        pieces.append(logits)
    assert_same(pieces[1], pieces[0])
    assert len(calls) == 2 * 4


PACKED = [4, 1, 6, 2]  # lengths, of LENGTH tokens


@pytest.mark.parametrize("boundaries", ["positions", "lengths", "both"])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_sequences_are_independent(name: str, boundaries: str, calls: list[str]) -> None:
    """Against each sequence on its own; fails if one sees another, or if they run as anything but packed sequences."""
    if (name, boundaries) == ("gpt_oss", "positions"):
        pytest.skip("transformers does not look for packed sequences in GPT-OSS's position_ids")
    if (name, boundaries) == ("gpt2", "lengths"):
        pytest.skip("GPT-2's positions are absolute: without position_ids its packed sequences are others")
    model = build(name).eval()
    sequences = [torch.randint(3, VOCABULARY, (1, length)) for length in PACKED]
    expected = torch.cat([model(s).logits for s in sequences], 1)
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    given = collator([{"input_ids": s[0]} for s in sequences]) | {"use_cache": False}
    del given["labels"]
    if boundaries == "positions":
        given = {key: given[key] for key in ("input_ids", "position_ids", "use_cache")}
    elif boundaries == "lengths":
        del given["position_ids"]  # rotary positions are relative
    model.set_attn_implementation("fastattn")
    assert_same([model(**given).logits.detach()], [expected.detach()], 1e-6 if boundaries == "lengths" else 1e-9)
    assert calls == ["attention_varlen"] * 2


def test_packed_batch_trains_the_same(calls: list[str]) -> None:
    """Two rows of packed sequences, windowed; fails if boundaries in a row or between rows are lost, backwards too."""
    model = build("mistral").train()
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ([5, 8], [1, 7, 5])]
    given = {
        "input_ids": torch.randint(3, VOCABULARY, (2, LENGTH)),
        "position_ids": torch.stack(positions),
        "use_cache": False,
    }
    expected = step("mistral", model, given, None)
    model.set_attn_implementation("fastattn")
    assert_same(step("mistral", model, given, None), expected)
    assert calls == ["attention_varlen"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5"])
def test_error_in_the_models_dtype(name: str, dtype: torch.dtype, calls: list[str]) -> None:
    """Fails if logits stray from the float64 model's further than eager attention in that dtype, but for rounding."""
    model = build(name).eval()
    given, read = inputs(name, "right")
    logits = []
    with torch.no_grad():
        truth = logits_of(name, model, given)
        model.to(dtype)
        for implementation in ("eager", "fastattn"):
            set_implementation(model, implementation)
            logits.append(logits_of(name, model, given).double())
    read = torch.ones(truth.shape[:2], dtype=torch.bool) if read is None else read
    theirs, mine = ((found - truth)[read].square().mean().sqrt() for found in logits)
    assert mine <= 1.5 * theirs + 1e-7 * truth.abs().max()
    assert calls == ["attention"] * CASES[name].calls


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, calls: list[str]) -> None:
    """Fails if a mask does not survive recomputation."""
    model = build("mistral").train()
    given, read = inputs("mistral", "left")
    expected = step("mistral", model, given, read)
    model.set_attn_implementation("fastattn")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    weight = torch.linspace(-1, 1, expected[0].numel(), dtype=torch.float64).view_as(expected[0])
    (model(**given).logits[read] * weight).sum().backward()
    assert_same([parameter.grad for parameter in model.parameters()], expected[1:])
    assert calls == ["attention"] * 4


def test_dropout_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model's attention dropout is not applied, or is applied in evaluation."""
    given: list[float] = []
    attention = integration.attention
    monkeypatch.setattr(integration, "attention", lambda *a, **o: given.append(o["dropout_p"]) or attention(*a, **o))
    model = build("bert", attention_probs_dropout_prob=0.3)
    model.set_attn_implementation("fastattn")
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH))
    first, second = (model.train()(tokens).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(tokens).logits, model(tokens).logits)
    assert given == [0.3] * 4 + [0.0] * 4


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_in_one_graph(outside: bool) -> None:
    """Fails on a graph break, on a wrong result, or if a second padding mask compiles anew; with the mask made in the
    graph (dense) and with one made outside of it (numbers)."""
    model = build("mistral", num_hidden_layers=1).train()
    model.set_attn_implementation("fastattn")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for padding in ("left", "right"):
        given, read = inputs("mistral", padding)
        expected = step("mistral", model, given, read)
        if outside:
            given["attention_mask"] = masking_utils.create_sliding_window_causal_mask(
                config=model.config,
                inputs_embeds=torch.empty(2, LENGTH, 0),
                attention_mask=given["attention_mask"],
                past_key_values=None,
            )
            assert given["attention_mask"].attn_mask is None
        with torch.compiler.set_stance("fail_on_recompile" if padding == "right" else "default"):
            assert_same(step("mistral", compiled, given | {"use_cache": False}, read), expected)


def test_compiled_decoding_from_a_static_cache() -> None:
    """generate() makes the mask and hands it to a compiled forward; fails if that breaks, or reads a stale position."""
    model = build("llama", num_hidden_layers=1).eval()
    given, _ = inputs("llama", "left")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**given, **options, disable_compile=True)
    model.set_attn_implementation("fastattn")
    config = transformers.CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    config._compile_all_devices = True
    assert torch.equal(model.generate(**given, **options, compile_config=config), expected)


def test_model_that_bypasses_the_interface_is_refused() -> None:
    """CodeGen adds the mask to its own scores; fails if it then attends to what is masked without a word."""
    options = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "rotary_dim": 4}
    config = transformers.CodeGenConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **options)
    model = transformers.CodeGenModel._from_config(config, attn_implementation="fastattn")
    with pytest.raises(NotImplementedError, match="attn_implementation='eager'"):
        model(torch.randint(3, VOCABULARY, (2, LENGTH)))
