"""Whole models on the device, without the engine: loading, one prompt, and a decode step as a graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu.case_list import Place
from millrace.kernels.cuda_backend import CudaBackend
from millrace.kernels.torch_backend import TorchBackend
from millrace.runtime.cuda.decode import DecodeState
from millrace.runtime.cuda.driver import CudaDriver
from millrace.runtime.cuda.graphs import DecodeGraphs
from millrace.runtime.cuda.rows import DeviceRows
from millrace.runtime.gpu import wanted_kernels
from millrace.runtime.models.base import ForwardBatch, Model
from millrace.runtime.models.declaration import Placement
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.types import BLOCK_SIZE


def placement(
    place: Place,
    driver: CudaDriver,
    max_seqs: int,
    dtype: torch.dtype = torch.bfloat16,
    quantize: Quantization | None = None,
) -> Placement:
    backend = CudaBackend(place.launcher, driver.current, max_seqs=max_seqs)
    device = driver.device
    return Placement(
        device=device, activation=dtype, scales=dtype, backends=(backend, TorchBackend()), quantize=quantize
    )


def prepare(place: Place, model: Any) -> None:
    """Compiles and loads what the model launches, where the launcher has such a step."""
    ready = getattr(place.launcher, "prepare", None)
    if ready is not None:
        ready(wanted_kernels(model))


def prompt_batch(tokens: Sequence[int], device: torch.device | str, *, all_logits: bool) -> ForwardBatch:
    """One prompt in blocks 1, 2, ...; logits of all its tokens or of the last."""
    count = len(tokens)
    pages = -(-count // BLOCK_SIZE)
    positions = torch.arange(count)
    columns: dict[str, Tensor] = {
        "tokens": torch.tensor(tokens),
        "positions": positions,
        "slot_mapping": positions + BLOCK_SIZE,
        "query_starts": torch.tensor([0, count], dtype=torch.int32),
        "context_lens": torch.tensor([count], dtype=torch.int32),
        "block_tables": torch.arange(1, pages + 1, dtype=torch.int32)[None],
        "logits_indices": positions if all_logits else positions[-1:],
    }
    there = {name: tensor.to(device) for name, tensor in columns.items()}
    return ForwardBatch(**there, max_query_len=count, max_context_len=count, host=([0, count], [count]))


def decode_graph(
    driver: CudaDriver, model: Model, kv: Any, num_blocks: int, batch: int, context: int, max_len: int
) -> tuple[DecodeGraphs, DecodeState]:
    """A captured step of `batch` sequences whose contexts stay at `context` tokens however often it is replayed.

    Sequences have blocks of their own, in random order.
    """
    pages, width = -(-context // BLOCK_SIZE), -(-max_len // BLOCK_SIZE)
    if batch * pages + 1 > num_blocks or context > max_len:
        raise ValueError(f"{batch} x {context} tokens need {batch * pages + 1} blocks of {num_blocks}, and {max_len=}")
    device = driver.device
    rows = DeviceRows(batch, torch.zeros(batch + 1, dtype=torch.int64, device=device))
    state = DecodeState(rows, width, device)
    blocks = torch.randperm(num_blocks - 1, device=device)[: batch * pages] + 1
    state.tables[:batch, :pages] = blocks.int().view(batch, pages)
    state.positions[:batch] = context - 1  # of the token that comes in: it is the last of its context
    state.advance.zero_()
    state.batch.copy_(torch.arange(batch, device=device))
    graphs = DecodeGraphs(driver, [batch], lambda size: state.step(model, kv, 0, size))
    driver.settle()
    graphs.capture()
    return graphs, state
