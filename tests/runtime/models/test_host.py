"""Models of numpy's arrays: the same logits as from tensors, and what is refused."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, random_tokens

from millrace.kernels import cpu_library
from millrace.runtime.models.base import ForwardBatch
from millrace.runtime.models.cpu_model import CpuModel
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.models.host import TorchHost, cpu_model, host_model, tensor_model
from millrace.runtime.types import BLOCK_SIZE
from millrace.runtime.weights.loader import load_model

KV = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(folder: Path) -> DecoderModel:
    return load_model(folder)


def compiled(model: DecoderModel) -> CpuModel:
    if cpu_library.default_library() is None:
        pytest.skip("the C++ kernels are not built")
    found = cpu_model(model)
    assert found is not None
    return found


def prompt(count: int, seed: int = 1) -> ForwardBatch[Any]:
    """One sequence in blocks 1, 2, ..., logits of its last token."""
    at = np.arange(count, dtype=np.int64)
    return ForwardBatch(
        tokens=np.array(random_tokens(count, seed), dtype=np.int64),
        positions=at,
        slot_mapping=at + BLOCK_SIZE,
        query_starts=np.array([0, count], dtype=np.int32),
        context_lens=np.array([count], dtype=np.int32),
        block_tables=np.arange(1, 5, dtype=np.int32)[None],
        logits_indices=np.array([count - 1], dtype=np.int64),
        max_query_len=count,
        max_context_len=count,
    )


def step(at: int, out: Any = None) -> ForwardBatch[Any]:
    """The token at this position of the same sequence."""
    here = np.array([at], dtype=np.int64)
    return ForwardBatch(
        tokens=np.array([7], dtype=np.int64),
        positions=here,
        slot_mapping=here + BLOCK_SIZE,
        query_starts=np.array([0, 1], dtype=np.int32),
        context_lens=np.array([at + 1], dtype=np.int32),
        block_tables=np.arange(1, 5, dtype=np.int32)[None],
        logits_indices=np.zeros(1, dtype=np.int64),
        max_query_len=1,
        max_context_len=at + 1,
        is_decode=True,
        logits_out=out,
    )


@pytest.mark.parametrize("kv", KV)
def test_the_same_bits_as_from_tensors(folder: Path, kv: str) -> None:
    model = load_model(folder, kv=KV[kv])
    faces = [compiled(model), TorchHost(model)]
    found = []
    for face in faces:
        storage = face.allocate_kv(5)
        found.append([face.forward(prompt(20), storage), face.forward(step(20), storage)])
        assert face.kv_bytes_per_token == model.kv_bytes_per_token
        assert face.weight_bytes == model.weight_bytes
    np.testing.assert_array_equal(found[0], found[1])


def test_a_batch_is_moved_on_in_place(made: DecoderModel) -> None:
    model = compiled(made)
    kept, anew = model.allocate_kv(5), model.allocate_kv(5)
    out = np.empty((3, model.spec.vocab_size), dtype=np.float32)
    for storage in (kept, anew):
        model.forward(prompt(20), storage)
    batch = step(20, out)
    for at in range(20, 30):
        logits = model.forward(batch, kept)
        assert np.shares_memory(logits, out)
        np.testing.assert_array_equal(logits, model.forward(step(at), anew))
        batch.positions += 1
        batch.slot_mapping += 1
        batch.context_lens += 1
        batch.tokens[:] = 7
    np.testing.assert_array_equal(model.forward(step(30, out), kept), model.forward(step(30), anew))


def check_copies(model: Any) -> None:
    storage = model.allocate_kv(9)
    model.forward(prompt(20), storage)
    expected = model.forward(step(20), storage)
    model.copy_blocks(storage, np.array([1, 2]), np.array([7, 5]))
    moved = msgspec.structs.replace(
        step(20), block_tables=np.array([[7, 5]], dtype=np.int32), slot_mapping=np.array([5 * BLOCK_SIZE + 4])
    )
    np.testing.assert_array_equal(model.forward(moved, storage), expected)


def test_blocks_are_copied_with_their_scales(folder: Path) -> None:
    check_copies(compiled(load_model(folder, kv=torch.int8)))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tokens", [199] * 3, "token 0 is outside the vocabulary"),
        ("tokens", [0, 0, -1], "token 2 is outside the vocabulary"),
        ("positions", [0, 1, 1 << 20], "the position of token 2"),
        ("slot_mapping", [16, 17, 5 * BLOCK_SIZE], "the slot of token 2 is outside the pool of 5 blocks"),
        ("logits_indices", [3], "entry 0 of logits_indices is not one of the 3 tokens"),
        ("block_tables", [[5]], "the block table of sequence 0 names a block outside the pool of 5 blocks"),
        ("query_starts", [0, 4], "query_starts and context_lens of sequence 0 do not fit 3 tokens"),
        ("query_starts", [1, 3], "query_starts and context_lens of sequence 0 do not fit 3 tokens"),
        ("context_lens", [2], "query_starts and context_lens of sequence 0 do not fit 3 tokens"),
        ("context_lens", [65], "and block tables of 4 blocks"),
    ],
)
def test_what_there_is_not_is_named(made: DecoderModel, field: str, value: Any, said: str) -> None:
    model = compiled(made)
    storage, batch = model.allocate_kv(5), prompt(3)
    bad = np.array(value, dtype=getattr(batch, field).dtype)
    with pytest.raises(IndexError, match=said):
        model.forward(msgspec.structs.replace(batch, **{field: bad}), storage)


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("tokens", lambda array: array.astype(np.int32), r"tokens is int32 \[3\], but it must be contiguous int64"),
        ("positions", lambda array: array[:2], r"positions is int64 \[2\], but it must be contiguous int64 \[3\]"),
        ("slot_mapping", lambda array: np.repeat(array, 2)[::2], "slot_mapping is int64"),
        ("query_starts", lambda array: array[:1], r"query_starts is int32 \[1\]"),
        ("logits_indices", lambda array: array[None], "logits_indices is int64"),
    ],
)
def test_other_arrays_are_refused(made: DecoderModel, field: str, change: Any, said: str) -> None:
    model, batch = compiled(made), prompt(3)
    with pytest.raises(ValueError, match=said):
        model.forward(msgspec.structs.replace(batch, **{field: change(getattr(batch, field))}), model.allocate_kv(5))


def test_torch_serves_what_the_library_does_not(tmp_path: Path) -> None:
    made = load_model(make_checkpoint("llama-biases", tmp_path))  # heads of 24
    model = host_model(made)
    assert isinstance(model, TorchHost)
    assert tensor_model(model) is made
    check_copies(model)
