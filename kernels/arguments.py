"""What passes between the fronts in `ops` and the backends: argument records, packed weights, refusals."""

import abc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from millrace.kernels.quantized import Float8Weight, QuantizedWeight

T = TypeVar("T")


class Refusal(NamedTuple):
    """A backend's answer when it cannot serve an op: why not, in words that name the shape or the missing thing."""

    reason: str


class PackedLinear(abc.ABC):
    """A weight matrix in the layout that its backend multiplies fastest, with the bias; made by `ops.pack_linear`.

    Attributes:
        in_features: columns of the weight [out_features, in_features].
        out_features: rows of the weight.
        weight_bytes: bytes held, padding and bias included.
        dtype: of the stored weight; sums are float32 whatever it is.
        activation: dtype of what goes in and comes out.
    """

    in_features: int
    out_features: int
    weight_bytes: int
    dtype: torch.dtype
    activation: torch.dtype = torch.float32

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias: x [num_tokens, in_features] -> [num_tokens, out_features], both of `activation`.

        The result lies in the first rows of `out`, [at least num_tokens, out_features], where that is given.

        Raises:
            ValueError: x or out has another shape or dtype, or is not contiguous.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype != self.activation or not x.is_contiguous():
            raise ValueError(
                f"linear: x is {describe(x)}, but it must be contiguous {_name(self.activation)}"
                f" [num_tokens, {self.in_features}]"
            )
        rows = x.shape[0]
        if out is None:
            y = torch.empty(rows, self.out_features, dtype=self.activation, device=x.device)
        elif (
            out.dim() == 2
            and out.shape[0] >= rows
            and out.shape[1] == self.out_features
            and out.dtype == self.activation
            and out.is_contiguous()
        ):
            y = out[:rows]
        else:
            raise ValueError(
                f"linear: out is {describe(out)}, but it must be contiguous {_name(self.activation)} of at least {rows}"
                f" rows of {self.out_features}"
            )
        self.apply(x, y)
        return y

    @abc.abstractmethod
    def apply(self, x: Tensor, y: Tensor) -> None:
        """`__call__` after its checks: fills y [num_tokens, out_features]."""

    @abc.abstractmethod
    def row_lookup(self, tokens: Tensor) -> Tensor:
        """Rows of the weight, for a tied embedding: tokens [num_tokens] int64 -> [num_tokens, in_features]."""


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Where each sequence's queries and keys lie. Made once per forward pass, shared by all layers.

    Attributes:
        query_starts: [num_seqs + 1] int32, bounds of each sequence's tokens in the flat batch.
        context_lens: [num_seqs] int32, keys of each sequence, this batch's included.
        block_tables: [num_seqs, max_blocks] int32.
        max_query_len, max_context_len: maxima over the sequences.
        num_tokens: query tokens of the batch.
        bounds, contexts: query_starts and context_lens on the host; None in a captured step, whose lengths are known
            to the device alone and which has one query token per sequence.
        is_decode: a step of the decode lane, one query token per sequence: no two of them run at once, so that they may
            share memory that a backend keeps.
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_context_len: int
    num_tokens: int
    bounds: Sequence[int] | None
    contexts: Sequence[int] | None
    is_decode: bool = False
    _plans: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def num_seqs(self) -> int:
        return self.context_lens.shape[0]

    def plan(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a backend works out once for all layers (gather indices, masks); `key` names backend and options."""
        if key not in self._plans:
            self._plans[key] = make()
        plan: T = self._plans[key]
        return plan


class PackArgs(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    activation: torch.dtype = torch.float32  # of what is multiplied, and of the product


class QuantizedArgs(NamedTuple):
    weight: QuantizedWeight
    bias: Tensor | None  # [out]
    activation: torch.dtype = torch.float32  # of what is multiplied, and of the product


class Float8Args(NamedTuple):
    weight: Float8Weight
    bias: Tensor | None  # [out]
    activation: torch.dtype = torch.float32  # of what is multiplied, and of the product


class EmbeddingArgs(NamedTuple):
    tokens: Tensor  # [num_tokens] int64
    weight: Tensor  # [vocab, hidden]
    dtype: torch.dtype = torch.float32  # of the result


class NormArgs(NamedTuple):
    """For the four norms. Layer norms have a bias, the `add_` forms a residual that takes the sum in place."""

    x: Tensor  # [..., hidden]
    weight: Tensor  # [hidden]
    eps: float
    bias: Tensor | None = None  # [hidden]
    residual: Tensor | None = None  # as x, replaced by x + residual


class ActivationArgs(NamedTuple):
    x: Tensor  # silu_mul: [num_tokens, 2 * width], gelu_tanh: any shape


class RopeArgs(NamedTuple):
    q: Tensor  # [num_tokens, num_heads, head_dim], changed in place
    k: Tensor  # [num_tokens, num_kv_heads, head_dim], changed in place
    cos_sin: Tensor  # [max_positions, rotary_dim] float32, cosines in the first half
    positions: Tensor  # [num_tokens] int64


class WriteKvArgs(NamedTuple):
    k: Tensor  # [num_tokens, num_kv_heads, head_dim]
    v: Tensor  # as k
    k_cache: Tensor  # [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]
    v_cache: Tensor  # as k_cache
    slot_mapping: Tensor  # [num_tokens] int64, block * BLOCK_SIZE + offset
    kv_scales: Tensor | None = None  # as RopeKvArgs.kv_scales


class RopeKvArgs(NamedTuple):
    """What stands between the product that gives queries, keys and values, and the attention."""

    qkv: Tensor  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: queries, then keys, then values; may change
    num_heads: int
    kv_cache: Tensor  # [2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim], keys first
    positions: Tensor  # [num_tokens] int64
    slot_mapping: Tensor  # [num_tokens] int64, block * BLOCK_SIZE + offset
    cos_sin: Tensor | None  # [max_positions, rotary_dim] float32; None turns nothing
    q_norm: Tensor | None  # [head_dim], scale of an RMS norm of each query before the rotation; None for no norm
    k_norm: Tensor | None  # [head_dim], the same for keys
    eps: float
    kv_scales: Tensor | None = None  # [2, num_blocks, num_kv_heads, BLOCK_SIZE] float32, of a pool of 8 bits

    @property
    def num_kv_heads(self) -> int:
        return self.kv_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.kv_cache.shape[4]


class AttentionArgs(NamedTuple):
    q: Tensor  # [num_tokens, num_heads, head_dim]
    k_cache: Tensor  # [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]
    v_cache: Tensor  # as k_cache
    batch: AttentionBatch
    scale: float
    window: int | None
    kv_scales: Tensor | None = None  # as RopeKvArgs.kv_scales


class NormWeights(NamedTuple):
    """An RMS norm, or with a bias a layer norm."""

    weight: Tensor  # [width]
    bias: Tensor | None
    eps: float


class DecoderLayerArgs(NamedTuple):
    """One pre-norm layer, in the order in which it computes."""

    input_norm: NormWeights
    qkv: PackedLinear  # -> [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    q_norm: NormWeights | None  # over head_dim, before the rotation
    k_norm: NormWeights | None
    output: PackedLinear
    post_attention_norm: NormWeights
    up: PackedLinear  # gate and up side by side where the MLP is gated
    down: PackedLinear
    scale: float
    window: int | None


class DecoderArgs(NamedTuple):
    layers: tuple[DecoderLayerArgs, ...]
    final_norm: NormWeights
    cos_sin: Tensor | None  # [max_positions, rotary_dim] float32; None: positions are in the embedding
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_gated: bool  # silu(gate) * up; otherwise the tanh form of GELU


class PackedDecoder(abc.ABC):
    """All layers of a decoder as one call; made by `ops.pack_decoder`."""

    @abc.abstractmethod
    def __call__(
        self,
        residual: Tensor,
        kv_storage: Tensor,
        batch: AttentionBatch,
        positions: Tensor,
        slot_mapping: Tensor,
        logits_indices: Tensor,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """Writes keys and values of all tokens; returns what the output matrix multiplies, [num_logits, hidden].

        Args:
            residual: embeddings [num_tokens, hidden] float32; used up.
            kv_storage: [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim] float32, bfloat16, or of 8 bits.
            kv_scales: [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE] float32, of a pool of 8 bits.
            positions, slot_mapping: [num_tokens] int64.
            logits_indices: [num_logits] int64, tokens whose output is wanted.

        Raises:
            ValueError: an argument has another shape or dtype.
            IndexError: a position, slot, block or token is outside of what there is.
        """


class CopyBlocksArgs(NamedTuple):
    kv_storage: Tensor  # [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]
    source: Tensor  # [num_copies] int64, on the host
    target: Tensor  # [num_copies] int64, on the host
    kv_scales: Tensor | None = (
        None  # [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE] float32, of a pool of 8 bits
    )


class Backend:
    """One way to compute the ops. An op that a backend does not override, or cannot serve for the arguments given,
    is refused with a reason, and the next backend of the list is asked."""

    name: str = "none"

    def _lacks(self, op: str) -> Refusal:
        return Refusal(f"it has no {op}")

    def pack_linear(self, args: PackArgs) -> PackedLinear | Refusal:
        return self._lacks("pack_linear")

    def pack_quantized(self, args: QuantizedArgs) -> PackedLinear | Refusal:
        return self._lacks("pack_quantized")

    def pack_float8(self, args: Float8Args) -> PackedLinear | Refusal:
        return self._lacks("pack_float8")

    def pack_decoder(self, args: DecoderArgs) -> PackedDecoder | Refusal:
        return self._lacks("pack_decoder")

    def embedding(self, args: EmbeddingArgs) -> Tensor | Refusal:
        return self._lacks("embedding")

    def rms_norm(self, args: NormArgs) -> Tensor | Refusal:
        return self._lacks("rms_norm")

    def layer_norm(self, args: NormArgs) -> Tensor | Refusal:
        return self._lacks("layer_norm")

    def silu_mul(self, args: ActivationArgs) -> Tensor | Refusal:
        return self._lacks("silu_mul")

    def gelu_tanh(self, args: ActivationArgs) -> Tensor | Refusal:
        return self._lacks("gelu_tanh")

    def rope(self, args: RopeArgs) -> Refusal | None:
        return self._lacks("rope")

    def write_kv(self, args: WriteKvArgs) -> Refusal | None:
        return self._lacks("write_kv")

    def rope_kv(self, args: RopeKvArgs) -> Tensor | Refusal:
        return self._lacks("rope_kv")

    def paged_attention(self, args: AttentionArgs) -> Tensor | Refusal:
        return self._lacks("paged_attention")

    def copy_blocks(self, args: CopyBlocksArgs) -> Refusal | None:
        return self._lacks("copy_blocks")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(tensor: Tensor) -> str:
    """Shape, dtype and layout of a tensor, for an error message."""
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}{layout}"
