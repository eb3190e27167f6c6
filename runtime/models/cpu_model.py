"""A model that the C++ library computes from tokens to logits. It needs no torch, whose import alone takes longer than
to read a small model's weights."""

import ctypes
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from millrace.kernels.cpu_transformer import (
    KV_KINDS,
    SCALED_KV,
    CpuTransformer,
    TransformerCall,
    TransformerState,
)
from millrace.kernels.memory import ask_for_huge_pages
from millrace.runtime.models.base import ForwardBatch, ModelSpec

Array = npt.NDArray[Any]


class HostKV(msgspec.Struct, frozen=True):
    """Keys and values of all layers; block 0 is the null block. Slots that were never written hold anything."""

    storage: Array  # [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]
    scales: Array | None  # the same without head_dim, float32, of a pool of 8 bits


class CpuModel:
    """Implements millrace.runtime.models.base.Model of numpy's arrays, for one thread.

    Args:
        state: the packed weights; their arrays are kept.
        kv_dtype: what keys and values are stored in, one of KV_KINDS.

    Raises ValueError where arrays do not fit each other or the specification.
    """

    def __init__(self, library: ctypes.CDLL, state: TransformerState, spec: ModelSpec, kv_dtype: str) -> None:
        self.spec = spec
        self.kv_dtype = kv_dtype
        self.transformer = CpuTransformer(library, state)
        decoder, positions = state.decoder, self.transformer.max_positions
        held = (state.head.out_features, len(decoder.layers), decoder.num_heads, decoder.num_kv_heads, decoder.head_dim)
        if held != (spec.vocab_size, spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim):
            raise ValueError(f"the weights are of another model than the {spec.architecture} that is specified")
        if positions < spec.max_model_len:
            raise ValueError(f"there are {positions} positions, and max_model_len is {spec.max_model_len}")
        # A decode lane gives the same batch as long as its rows and blocks stay; its arguments are then ready.
        self._batch: ForwardBatch[Array] | None = None
        self._kv: HostKV | None = None
        self._call: TransformerCall | None = None
        self._logits: Array = np.zeros((0, spec.vocab_size), dtype=np.float32)

    @property
    def weight_bytes(self) -> int:
        return self.transformer.num_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        scale = np.dtype(np.float32).itemsize if self.kv_dtype in SCALED_KV else 0
        head = self.spec.head_dim * KV_KINDS[self.kv_dtype][1].itemsize + scale
        return self.spec.num_layers * 2 * self.spec.num_kv_heads * head

    def allocate_kv(self, num_blocks: int) -> HostKV:
        """Storage for `num_blocks` blocks of BLOCK_SIZE tokens; pages are committed when they are first written."""
        shape = self.transformer.decoder.kv_shape(num_blocks)
        storage = np.empty(shape, dtype=KV_KINDS[self.kv_dtype][1])
        ask_for_huge_pages(storage.ctypes.data, storage.nbytes, 2 * self.spec.num_layers)
        return HostKV(storage, np.empty(shape[:-1], dtype=np.float32) if self.kv_dtype in SCALED_KV else None)

    def forward(self, batch: ForwardBatch[Array], kv: HostKV) -> Array:
        """Writes keys and values of all tokens; returns logits [num_logits, vocab_size] float32.

        Raises ValueError for arrays of another shape or type, IndexError where they name what there is not.
        """
        if batch.logits_out is None:
            logits = np.empty((len(batch.logits_indices), self.spec.vocab_size), dtype=np.float32)
            self.transformer.run(self._arguments(batch, kv, logits))
            return logits
        if self._call is None or batch is not self._batch or kv is not self._kv:
            logits = batch.logits_out[: len(batch.logits_indices)]
            self._call = self._arguments(batch, kv, logits)
            self._batch, self._kv, self._logits = batch, kv, logits
        self.transformer.run(self._call)
        return self._logits

    def _arguments(self, batch: ForwardBatch[Array], kv: HostKV, logits: Array) -> TransformerCall:
        return TransformerCall(
            self.transformer,
            tokens=batch.tokens,
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            query_starts=batch.query_starts,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
            logits_indices=batch.logits_indices,
            logits=logits,
            kv=kv.storage,
            kv_scales=kv.scales,
            kv_dtype=self.kv_dtype,
        )

    def copy_blocks(self, kv: HostKV, source: Array, target: Array) -> None:
        """Copies whole blocks in every layer; source and target are [num_copies] int64."""
        for blocks in (kv.storage, kv.scales):
            if blocks is not None:
                blocks[:, :, target] = blocks[:, :, source]
