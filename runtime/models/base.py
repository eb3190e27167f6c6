"""What a lane asks of a model: one forward pass over a ragged batch, against paged KV storage.

A model is arithmetic only. It does not know requests, rows, or who owns a block; it reads the block tables that the
batch names, and writes keys and values into the slots that the batch names.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec

# Arrays are numpy's on the host, so that serving there needs no torch; torch's tensors on a device.
ArrayT = TypeVar("ArrayT")
OtherT = TypeVar("OtherT")


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes that planning needs.

    Attributes:
        max_model_len: positions that the checkpoint was made for.
        sliding_window: keys older than this many positions are not attended to, per layer (None: all are).
        eos_token_ids: ids that end a text, from generation_config.json, else config.json.
        bos_token_id: the id that the checkpoint names as the beginning of a text.
        weights: how the matrices were stored and what became of them, for people.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    num_parameters: int = 0
    weights: str = ""


class ForwardBatch(msgspec.Struct, Generic[ArrayT], kw_only=True):
    """A ragged batch: the new tokens of all sequences, one after the other. All arrays lie where the model does.

    Decode steps have one token a sequence; prefill chunks have many, behind a context that is cached already. A lane
    may give the same batch again with other values in its arrays.
    """

    tokens: ArrayT  # [num_tokens] int64
    positions: ArrayT  # [num_tokens] int64, position of each token in its sequence
    slot_mapping: ArrayT  # [num_tokens] int64, block * types.BLOCK_SIZE + offset where its key and value go
    query_starts: ArrayT  # [num_seqs + 1] int32, bounds of each sequence's tokens in the flat batch
    context_lens: ArrayT  # [num_seqs] int32, positions in the cache once this batch is written
    block_tables: ArrayT  # [num_seqs, max_blocks] int32; entries beyond a context are stale: not to be read
    logits_indices: ArrayT  # [num_logits] int64, tokens of the flat batch whose logits are wanted
    max_query_len: int
    max_context_len: int
    # Values of query_starts and context_lens where those lie on a device: reading them back would wait for it. None
    # where they lie on the host, and in a step captured as a graph, whose lengths the device alone knows.
    host: tuple[Sequence[int], Sequence[int]] | None = None
    is_decode: bool = False  # one token per sequence, and the logits of all of them are wanted, in order
    # [at least num_logits, vocab_size] float32 where the model may put the logits: a caller that keeps one for its lane
    # spares the fresh pages of tens of megabytes in every step.
    logits_out: ArrayT | None = None

    def converted(self, convert: Callable[[ArrayT], OtherT]) -> "ForwardBatch[OtherT]":
        """The same with arrays of another library."""
        return ForwardBatch(
            tokens=convert(self.tokens),
            positions=convert(self.positions),
            slot_mapping=convert(self.slot_mapping),
            query_starts=convert(self.query_starts),
            context_lens=convert(self.context_lens),
            block_tables=convert(self.block_tables),
            logits_indices=convert(self.logits_indices),
            max_query_len=self.max_query_len,
            max_context_len=self.max_context_len,
            host=self.host,
            is_decode=self.is_decode,
            logits_out=None if self.logits_out is None else convert(self.logits_out),
        )


class Model(Protocol[ArrayT]):
    """One checkpoint, loaded. `kv` is the model's own storage, made by `allocate_kv`; nobody else looks inside."""

    spec: ModelSpec

    @property
    def weight_bytes(self) -> int: ...

    @property
    def kv_bytes_per_token(self) -> int: ...

    def allocate_kv(self, num_blocks: int) -> Any:
        """Storage for `num_blocks` blocks; block 0 is the null block. The pages may be committed on first write."""

    def forward(self, batch: ForwardBatch[ArrayT], kv: Any) -> ArrayT:
        """Writes keys and values of all tokens, and returns logits [num_logits, vocab_size] in the type that the model
        computes in: float32 on the CPU. They may lie in `logits_out`, and be overwritten by the next pass."""

    def copy_blocks(self, kv: Any, source: ArrayT, target: ArrayT) -> None:
        """Copies whole blocks in every layer (copy-on-write); source and target are [num_copies] int64."""
