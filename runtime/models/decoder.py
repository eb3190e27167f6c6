"""The forward pass that all our architectures share: a pre-norm decoder over paged KV storage."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Protocol

import msgspec
import torch
from torch import Tensor

from millrace.kernels import ops
from millrace.kernels.memory import ask_for_huge_pages
from millrace.runtime.models.base import ForwardBatch, ModelSpec
from millrace.runtime.models.declaration import (
    EmbeddingDecl,
    LayerNorm,
    LayerNormDecl,
    LinearDecl,
    Placement,
    RMSNorm,
    RMSNormDecl,
    TensorDecl,
    WeightSource,
)
from millrace.runtime.types import BLOCK_SIZE

Progress = Callable[[int, int], None]  # (modules loaded, modules in all)


class PagedKV(msgspec.Struct, frozen=True):
    """Keys and values of all layers; block 0 is the null block.

    Slots that were never written hold whatever the memory held, NaN included: kernels read written slots only.
    """

    storage: Tensor  # [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]
    layers: tuple[tuple[Tensor, Tensor], ...]  # the same as (keys, values) of each layer, so that a step makes no views
    pools: tuple[Tensor, ...]  # the same as one tensor for each layer
    scales: Tensor | None = None  # [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE] float32, of a pool of 8 bits

    def scales_of(self, layer: int) -> Tensor | None:
        return None if self.scales is None else self.scales[layer]


class DecoderLayer(Protocol):
    """One layer's weights and arithmetic around the attention.

    Attributes:
        window: keys older than this many positions are not attended to (None: all are).
        scale: factor on the products of queries and keys.
    """

    @property
    def input_norm(self) -> RMSNorm | LayerNorm: ...
    @property
    def post_attention_norm(self) -> RMSNorm | LayerNorm: ...
    @property
    def output(self) -> ops.PackedLinear: ...
    @property
    def window(self) -> int | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def weight_bytes(self) -> int: ...

    def describe(self) -> ops.DecoderLayerArgs:
        """The same layer for a backend that computes whole layers."""

    def write_kv(
        self, x: Tensor, positions: Tensor, kv_cache: Tensor, kv_scales: Tensor | None, slots: Tensor
    ) -> Tensor:
        """Puts keys and values of [num_tokens, hidden] into their slots of this layer's pool, and returns the queries
        [num_tokens, num_heads, head_dim]."""

    def mlp(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden] -> the same."""


class DecoderModel:
    """A decoder-only transformer: implements millrace.runtime.models.base.Model of tensors.

    Attributes:
        lm_head: the output matrix.
        table: the embedding [vocab_size, hidden_size]; None: its rows are those of the output matrix.
        learned: embedding of positions [max_model_len, hidden_size], where they are learned.
        stack: the layers as one call; None: op by op.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        table: Tensor | None,
        learned: Tensor | None,
        layers: Sequence[DecoderLayer],
        final_norm: RMSNorm | LayerNorm,
        lm_head: ops.PackedLinear,
        stack: ops.PackedDecoder | None,
        weight_bytes: int,
        placement: Placement | None = None,
    ) -> None:
        place = placement or Placement()
        self.spec = spec
        self.device = place.device
        self.dtype = place.activation
        self.kv_dtype = place.kv or place.activation
        self._has_kv_scales = self.kv_dtype.itemsize == 1
        self.weight_bytes = weight_bytes
        self._backends = place.backends
        self.table, self.learned = table, learned
        self.lm_head, self.stack = lm_head, stack
        self._layers = tuple(layers)
        self._final_norm = final_norm

    @property
    def kv_bytes_per_token(self) -> int:
        scale = torch.float32.itemsize if self._has_kv_scales else 0
        head = self.spec.head_dim * self.kv_dtype.itemsize + scale
        return self.spec.num_layers * 2 * self.spec.num_kv_heads * head

    @property
    def backends(self) -> ops.Backends:
        """Who computes the ops; None is the CPU's default list."""
        return self._backends

    def allocate_kv(self, num_blocks: int) -> PagedKV:
        """Storage for `num_blocks` blocks of BLOCK_SIZE tokens; pages are committed when they are first written."""
        spec = self.spec
        shape = (spec.num_layers, 2, num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        storage = torch.empty(shape, dtype=self.kv_dtype, device=self.device)
        scales = torch.empty(shape[:-1], device=self.device) if self._has_kv_scales else None
        if storage.is_cpu:
            ask_for_huge_pages(storage.data_ptr(), storage.nbytes, 2 * spec.num_layers)
        return PagedKV(storage, tuple((layer[0], layer[1]) for layer in storage), tuple(storage), scales)

    def copy_blocks(self, kv: PagedKV, source: Tensor, target: Tensor) -> None:
        """Copies whole blocks in every layer; source and target are [num_copies] int64."""
        ops.copy_blocks(kv.storage, source, target, kv_scales=kv.scales, backends=self._backends)

    def block_storage(self, kv: PagedKV) -> tuple[Tensor, Tensor | None]:
        """Keys and values of all layers, and their scales: what moves with a block."""
        return kv.storage, kv.scales

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch[Tensor], kv: PagedKV) -> Tensor:
        """Writes keys and values of all tokens; returns logits [num_logits, vocab_size]."""
        attention = ops.attention_batch(
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            batch.max_query_len,
            batch.max_context_len,
            batch.host,
            batch.is_decode,
        )
        positions, slots = batch.positions, batch.slot_mapping
        last = self._layers[-1]
        residual = self._embed(batch.tokens, positions)  # [num_tokens, hidden_size]
        if self.stack is not None:
            x = self.stack(residual, kv.storage, attention, positions, slots, batch.logits_indices, kv.scales)
            return self.lm_head(x, batch.logits_out)
        x = self._layers[0].input_norm(residual)
        for index, layer in enumerate(self._layers):
            k_cache, v_cache = kv.layers[index]
            kv_scales = kv.scales_of(index)
            q = layer.write_kv(x, positions, kv.pools[index], kv_scales, slots)
            if layer is last and not batch.logits_indices.numel():
                return torch.empty(0, self.spec.vocab_size, dtype=self.dtype, device=self.device)
            attended = ops.paged_attention(
                q,
                k_cache,
                v_cache,
                attention,
                layer.scale,
                layer.window,
                kv_scales=kv_scales,
                backends=self._backends,
            ).flatten(1)
            if layer is last and not batch.is_decode:
                # Past the last keys and values only the rows that want logits matter.
                attended = attended.index_select(0, batch.logits_indices)
                residual = residual.index_select(0, batch.logits_indices)
            x, residual = layer.post_attention_norm.add(layer.output(attended), residual)
            x = layer.mlp(x)
            next_norm = self._final_norm if layer is last else self._layers[index + 1].input_norm
            x, residual = next_norm.add(x, residual)
        return self.lm_head(x, batch.logits_out)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[num_tokens] each -> fresh [num_tokens, hidden_size]"""
        if self.table is None:
            x = self.lm_head.row_lookup(tokens)
        else:
            x = ops.embedding(tokens, self.table, dtype=self.dtype, backends=self._backends)
        return x if self.learned is None else x.add_(self.learned.index_select(0, positions))


class LayerDecl(Protocol):
    """What one layer needs, before any weight is read."""

    def tensors(self) -> Iterator[TensorDecl]: ...

    def load(self, source: WeightSource, positions: Tensor) -> DecoderLayer:
        """`positions` is the table that `DecoderDecl.load_positions` gave, shared by all layers."""


class DecoderDecl(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint's architecture with its sizes, before any weight is read.

    Attributes:
        base_prefix: checkpoints of the bare base model leave it out of every name; either way is accepted.
        harmless: patterns of stored tensors (named without base_prefix) that the model does not need.
        is_gated: the MLP is silu(gate) * up; otherwise it is the tanh form of GELU.
        lm_head: the output matrix; None where it is tied to the embedding.
    """

    base_prefix: ClassVar[str]
    harmless: ClassVar[Sequence[re.Pattern[str]]]
    is_gated: ClassVar[bool]

    spec: ModelSpec
    embedding: EmbeddingDecl
    layers: Sequence[LayerDecl]
    final_norm: RMSNormDecl | LayerNormDecl
    lm_head: LinearDecl | None

    def position_tensors(self) -> Iterator[TensorDecl]:
        """Tensors of learned positions, if the architecture has them."""
        yield from ()

    def load_positions(self, source: WeightSource, max_model_len: int) -> Tensor:
        """A table with one row for each position below max_model_len."""
        raise NotImplementedError

    def rotation(self, positions: Tensor) -> Tensor | None:
        """Cosines and sines that layers rotate queries and keys by, [max_model_len, rotary_dim]; None where positions
        are learned."""
        raise NotImplementedError

    def tensors(self) -> Iterator[TensorDecl]:
        """Every tensor that the checkpoint must hold."""
        yield from self.embedding.tensors()
        yield from self.position_tensors()
        for layer in self.layers:
            yield from layer.tensors()
        yield from self.final_norm.tensors()
        if self.lm_head is not None:
            yield from self.lm_head.tensors()

    def build(self, source: WeightSource, max_model_len: int, progress: Progress) -> DecoderModel:
        """Reads all weights, one module after the other, and makes the model for positions below max_model_len."""
        total = len(self.layers) + 2
        place = source.placement
        table = None
        if self.lm_head is None:
            lm_head = self.embedding.load_tied(source)
        else:
            table = self.embedding.load(source)
        positions = self.load_positions(source, max_model_len)
        source.release()
        progress(1, total)
        layers: list[DecoderLayer] = []
        for decl in self.layers:
            layers.append(decl.load(source, positions))
            source.release()
            progress(1 + len(layers), total)
        final_norm = self.final_norm.load(source)
        if self.lm_head is not None:
            lm_head = self.lm_head.load(source, is_output=True)
        source.release()
        progress(total, total)
        cos_sin = self.rotation(positions)
        stack = ops.pack_decoder(
            ops.DecoderArgs(
                layers=tuple(layer.describe() for layer in layers),
                final_norm=final_norm.weights(),
                cos_sin=cos_sin,
                num_heads=self.spec.num_heads,
                num_kv_heads=self.spec.num_kv_heads,
                head_dim=self.spec.head_dim,
                is_gated=self.is_gated,
            ),
            backends=place.backends,
        )
        return DecoderModel(
            msgspec.structs.replace(self.spec, max_model_len=max_model_len),
            table=table,
            learned=positions if cos_sin is None else None,
            layers=layers,
            final_norm=final_norm,
            lm_head=lm_head,
            stack=stack,
            weight_bytes=(0 if table is None else table.nbytes)
            + lm_head.weight_bytes
            + sum(layer.weight_bytes for layer in layers),
            placement=place,
        )
