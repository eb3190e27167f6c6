"""Reading config.json: both dialects mean the same, and what is not supported is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PagedSequences, load_reference, make_checkpoint, random_tokens, reference_logits

from millrace.runtime.errors import CheckpointError
from millrace.runtime.models.registry import ARCHITECTURES, declare
from millrace.runtime.models.rotary import RotaryDecl
from millrace.runtime.weights.loader import load_model

torch.set_num_threads(1)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 100,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
SCALINGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_type": "default"},
    "llama-rope-llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama-rope-yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama-rope-linear": {"type": "linear", "factor": 2.0},
}


def windows(config: dict[str, Any]) -> list[int | None]:
    decl = declare(config)
    assert isinstance(decl, RotaryDecl)
    return [layer.window for layer in decl.layers]


@pytest.mark.parametrize("kind", SCALINGS)
def test_both_dialects_give_equal_logits(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(kind, tmp_path)
    tokens = random_tokens(100, seed=1)
    want = reference_logits(load_reference(folder), tokens)
    common = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "rope_scaling", "rope_theta", "dtype", "torch_dtype", "head_dim"):
        common.pop(key, None)
    scaling = SCALINGS[kind]
    plain = scaling == {"rope_type": "default"}
    fourth = common | {"rope_theta": 10000.0, "rope_scaling": None if plain else scaling, "torch_dtype": "float32"}
    fifth = common | {"rope_parameters": scaling | {"rope_theta": 10000.0}, "dtype": "float32", "head_dim": 16}
    logits = []
    for config in (fourth, fifth):
        (folder / "config.json").write_text(json.dumps(config))
        logits.append(PagedSequences(load_model(folder), 1, 112).step({0: tokens})[0])
        assert (logits[-1] - want).abs().max() < 2e-4
    assert torch.equal(logits[0], logits[1])


def test_theta_is_read_in_both_places() -> None:
    def frequencies(**settings: Any) -> torch.Tensor:
        decl = declare(LLAMA | settings)
        assert isinstance(decl, RotaryDecl)
        return decl.rope.inverse_frequencies

    fourth = frequencies(rope_theta=500000.0)
    fifth = frequencies(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert torch.equal(fourth, fifth)
    assert not torch.equal(fourth, frequencies())


def test_yarn_lengthens_the_context() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert declare(LLAMA | {"rope_scaling": yarn}).spec.max_model_len == 512
    assert declare(LLAMA | {"max_position_embeddings": 1024, "rope_scaling": yarn}).spec.max_model_len == 1024


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LLAMA | {"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM.*LlamaForCausalLM"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}, "evil"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'.*silu"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'.*llama3"),
        (LLAMA | {"rope_scaling": {"type": "mrope"}}, "type is 'mrope'"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA | {"attention_bias": "yes"}, "attention_bias is 'yes'.*true or false"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads is 3.*divisor of num_attention_heads .4."),
        (LLAMA | {"hidden_size": 63}, "num_attention_heads is 4"),
        (LLAMA | {"hidden_size": True}, "hidden_size is True"),
        (LLAMA | {"head_dim": 15}, "head_dim is 15.*even"),
        (LLAMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({key: value for key, value in LLAMA.items() if key != "vocab_size"}, "vocab_size is missing"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window is 0"),
        (MISTRAL | {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        (QWEN2 | {"layer_types": ["full_attention"] * 2}, r"layer_types .*\(3\)"),
        (QWEN2 | {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        (GPT2 | {"activation_function": "relu"}, "activation_function is 'relu'.*gelu_new"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention is True"),
        (GPT2 | {"n_head": 5}, "n_head is 5"),
    ],
)
def test_surprises_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        declare(config)


def test_code_that_a_checkpoint_brings_is_ignored() -> None:
    assert declare(LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}).spec.num_layers == 3


def test_the_model_type_names_the_architecture_where_the_list_is_missing() -> None:
    for model_type, name in (("llama", "LlamaForCausalLM"), ("qwen3", "Qwen3ForCausalLM")):
        config = {key: value for key, value in LLAMA.items() if key != "architectures"} | {"model_type": model_type}
        assert declare(config).spec.architecture == name
    assert all(name.endswith(("ForCausalLM", "LMHeadModel")) for name in ARCHITECTURES)


def test_windows_of_mistral() -> None:
    assert windows(MISTRAL) == [4096] * 3  # the default of the configuration class
    assert windows(MISTRAL | {"sliding_window": None}) == [None] * 3
    assert windows(MISTRAL | {"sliding_window": 32}) == [32] * 3
    assert declare(MISTRAL | {"sliding_window": 32}).spec.sliding_window == 32


def test_windows_of_qwen() -> None:
    on = QWEN2 | {"use_sliding_window": True, "sliding_window": 32}
    assert windows(QWEN2 | {"sliding_window": 32, "max_window_layers": 0}) == [None] * 3
    assert windows(on | {"max_window_layers": 1}) == [None, 32, 32]
    assert windows(on | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}) == [32, None, None]
    # Planning must keep all keys while one layer looks at all of them.
    assert declare(on | {"max_window_layers": 1}).spec.sliding_window is None
    assert declare(on | {"max_window_layers": 0}).spec.sliding_window == 32


def test_end_of_text_ids() -> None:
    assert declare(LLAMA).spec.eos_token_ids == ()
    assert declare(LLAMA | {"eos_token_id": 7}).spec.eos_token_ids == (7,)
    assert declare(LLAMA | {"eos_token_id": [7, 9]}).spec.eos_token_ids == (7, 9)
    with pytest.raises(CheckpointError, match="eos_token_id is 'x'"):
        declare(LLAMA | {"eos_token_id": "x"})
