"""The forward pass at its edges, and the storage that it owns."""

import msgspec
import pytest
import torch
from checkpoints import PagedSequences, random_tokens

from millrace.kernels import ops
from millrace.runtime.models.base import ForwardBatch
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.types import BLOCK_SIZE
from millrace.runtime.weights.loader import random_model

torch.set_num_threads(1)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


KV = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def model(kv: torch.dtype | None = None) -> DecoderModel:
    return random_model(CONFIG, seed=1, kv=kv)


def test_storage_has_the_documented_layout() -> None:
    kv = model().allocate_kv(5)
    assert kv.storage.shape == (2, 2, 5, 2, BLOCK_SIZE, 8)
    assert kv.storage.dtype == torch.float32
    assert model().kv_bytes_per_token == kv.storage.nbytes // (5 * BLOCK_SIZE)
    for layer, (keys, values) in enumerate(kv.layers):
        assert keys.data_ptr() == kv.storage[layer, 0].data_ptr()
        assert values.data_ptr() == kv.storage[layer, 1].data_ptr()


@pytest.mark.parametrize(("kv", "head"), [("bfloat16", 2 * 8), ("int8", 8 + 4), ("fp8", 8 + 4)])
def test_narrow_storage_has_the_documented_layout(kv: str, head: int) -> None:
    made = model(KV[kv])
    stored = made.allocate_kv(5)
    assert (stored.storage.shape, stored.storage.dtype) == ((2, 2, 5, 2, BLOCK_SIZE, 8), KV[kv])
    assert made.kv_bytes_per_token == 2 * 2 * 2 * head
    if kv == "bfloat16":
        assert stored.scales is None
    else:
        assert stored.scales is not None
        assert (stored.scales.shape, stored.scales.dtype) == ((2, 2, 5, 2, BLOCK_SIZE), torch.float32)


def test_a_chunk_that_wants_no_logits_still_fills_the_cache() -> None:
    made = model()
    tokens = random_tokens(20, seed=1, vocab_size=97)
    whole = PagedSequences(made, 1, 32)
    want = whole.step({0: tokens})[0][-1]
    chunked = PagedSequences(made, 1, 32)
    table = torch.tensor([chunked.tables[0]], dtype=torch.int32)
    batch = ForwardBatch(
        tokens=torch.tensor(tokens[:19]),
        positions=torch.arange(19),
        slot_mapping=torch.tensor(
            [chunked.tables[0][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(19)]
        ),
        query_starts=torch.tensor([0, 19], dtype=torch.int32),
        context_lens=torch.tensor([19], dtype=torch.int32),
        block_tables=table,
        logits_indices=torch.tensor([], dtype=torch.int64),
        max_query_len=19,
        max_context_len=19,
    )
    assert made.forward(batch, chunked.kv).shape == (0, 97)
    chunked.lengths[0] = 19
    got = chunked.step({0: tokens[19:]})[0][-1]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kv", KV)
def test_copied_blocks_serve_another_sequence(kv: str) -> None:
    made = model(KV[kv])
    tokens = random_tokens(33, seed=2, vocab_size=97)
    sequences = PagedSequences(made, 2, 48)
    sequences.step({0: tokens[:32]})
    source, target = (torch.tensor(sequences.tables[seq][:2]) for seq in (0, 1))
    made.copy_blocks(sequences.kv, source, target)
    sequences.lengths[1] = 32
    original = sequences.step({0: tokens[32:]})[0]
    copy = sequences.step({1: tokens[32:]})[1]
    assert torch.equal(original, copy)


def test_repeated_passes_leave_weights_alone() -> None:
    made = model()
    tokens = random_tokens(12, seed=3, vocab_size=97)
    first = PagedSequences(made, 1, 16).step({0: tokens})[0]
    second = PagedSequences(made, 1, 16).step({0: tokens})[0]
    assert torch.equal(first, second)


GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 256,
}
WIDE = {**CONFIG, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 256}
STACKS = {
    "llama": {**WIDE, "attention_bias": True},
    "qwen3": {**WIDE, "architectures": ["Qwen3ForCausalLM"]},
    "mistral": {**WIDE, "architectures": ["MistralForCausalLM"], "sliding_window": 20},
    "gpt2": GPT2,
}


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", STACKS)
def test_all_layers_in_one_call_have_the_bits_of_the_ops_one_by_one(
    name: str, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = random_model(STACKS[name], seed=3, kv=KV[kv])
    with monkeypatch.context() as patch:
        patch.setattr(ops, "pack_decoder", lambda args, backends: None)
        by_ops = random_model(STACKS[name], seed=3, kv=KV[kv])
    if default_backend_is_torch():
        pytest.skip("NO C++ KERNELS HERE, SO ALL LAYERS IN ONE CALL ARE NOT TESTED: install g++")
    assert stacked.stack is not None and by_ops.stack is None
    pairs = [PagedSequences(model, 3, 200) for model in (stacked, by_ops)]
    prompts = {seq: random_tokens(size, seed=seq, vocab_size=97) for seq, size in enumerate((1, 33, 150))}
    for tokens in (prompts, {0: [5], 2: [7, 8, 9]}, {0: [1], 1: [2], 2: [3]}):
        got, want = (pair.step(tokens) for pair in pairs)
        for seq in tokens:
            assert torch.equal(got[seq], want[seq])


def test_all_layers_in_one_call_refuse_what_lies_outside() -> None:
    made = random_model(WIDE, seed=3)
    if default_backend_is_torch():
        pytest.skip("NO C++ KERNELS HERE, SO ALL LAYERS IN ONE CALL ARE NOT TESTED: install g++")
    kv = made.allocate_kv(4)
    fine = {
        "tokens": torch.tensor([3, 4]),
        "positions": torch.tensor([0, 1]),
        "slot_mapping": torch.tensor([16, 17]),
        "query_starts": torch.tensor([0, 2], dtype=torch.int32),
        "context_lens": torch.tensor([2], dtype=torch.int32),
        "block_tables": torch.tensor([[1]], dtype=torch.int32),
        "logits_indices": torch.tensor([1]),
    }
    made.forward(ForwardBatch(**fine, max_query_len=2, max_context_len=2), kv)
    for field, value, complaint in (
        ("positions", torch.tensor([0, 256]), "position of token 1"),
        ("slot_mapping", torch.tensor([64, 17]), "slot of token 0 is outside the pool of 4 blocks"),
        ("logits_indices", torch.tensor([2]), "entry 0 of logits_indices"),
        ("block_tables", torch.tensor([[4]], dtype=torch.int32), "block table of sequence 0"),
    ):
        with pytest.raises(IndexError, match=complaint):
            made.forward(ForwardBatch(**{**fine, field: value}, max_query_len=2, max_context_len=2), kv)
    unscaled = msgspec.structs.replace(kv, storage=kv.storage.to(torch.int8))
    with pytest.raises(ValueError, match=r"kv_storage is int8 .* without kv_scales, but it must be"):
        made.forward(ForwardBatch(**fine, max_query_len=2, max_context_len=2), unscaled)
    misfit = msgspec.structs.replace(unscaled, scales=torch.zeros(2, 2, 4, 2, 8))
    with pytest.raises(ValueError, match=r"kv_scales is float32 \[2, 2, 4, 2, 8\]"):
        made.forward(ForwardBatch(**fine, max_query_len=2, max_context_len=2), misfit)
    with pytest.raises(ValueError, match=r"slot_mapping is int32 \[2\]"):
        made.forward(
            ForwardBatch(**{**fine, "slot_mapping": fine["slot_mapping"].int()}, max_query_len=2, max_context_len=2), kv
        )


def default_backend_is_torch() -> bool:
    return ops.default_backends()[0].name == "torch"
