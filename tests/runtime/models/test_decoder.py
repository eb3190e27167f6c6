"""The forward pass at its edges, and the storage that it owns."""

import torch
from checkpoints import PagedSequences, random_tokens

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


def model() -> DecoderModel:
    return random_model(CONFIG, seed=1)


def test_storage_has_the_documented_layout() -> None:
    kv = model().allocate_kv(5)
    assert kv.storage.shape == (2, 2, 5, 2, BLOCK_SIZE, 8)
    assert kv.storage.dtype == torch.float32
    assert model().kv_bytes_per_token == kv.storage.nbytes // (5 * BLOCK_SIZE)
    for layer, (keys, values) in enumerate(kv.layers):
        assert keys.data_ptr() == kv.storage[layer, 0].data_ptr()
        assert values.data_ptr() == kv.storage[layer, 1].data_ptr()


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


def test_copied_blocks_serve_another_sequence() -> None:
    made = model()
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
