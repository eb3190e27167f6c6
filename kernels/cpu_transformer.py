"""A whole transformer as one call into the C++ library (cpu/decoder.cpp), without Python between the kernels.

The structures have the layout of those in decoder.cpp. Nothing here wants torch: weights come packed, see `cpu_matrix`.
"""

import ctypes
from typing import Any

import msgspec
import numpy as np

from millrace.kernels.cpu_matrix import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    KIND_BYTES,
    Array,
    CpuMatrix,
    MatrixC,
    MatrixState,
)
from millrace.kernels.memory import BLOCK_SIZE

# What a KV pool may be of, numbered as in cpu/kv.h: name -> (number, what numpy holds it in).
KV_KINDS: dict[str, tuple[int, np.dtype[Any]]] = {
    "float32": (0, np.dtype(np.float32)),
    "bfloat16": (1, np.dtype(np.uint16)),
    "int8": (2, np.dtype(np.int8)),
    "fp8": (3, np.dtype(np.uint8)),  # float8_e4m3fn
}
SCALED_KV = ("int8", "fp8")  # with a scale for each slot and head
TABLE_KINDS = (FLOAT32, BFLOAT16, FLOAT16)

_P, _L, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class NormState(msgspec.Struct, frozen=True):
    """An RMS norm, or with a bias a layer norm."""

    weight: Array  # [width] float32
    bias: Array | None
    eps: float


class LayerState(msgspec.Struct, frozen=True, kw_only=True):
    """One pre-norm layer, in the order in which it computes.

    Attributes:
        q_norm, k_norm: over head_dim, before the rotation.
        up: gate and up side by side where the MLP is gated.
        scale: factor on the products of queries and keys.
        window: keys older than this many positions are not attended to; None: all are.
    """

    input_norm: NormState
    qkv: MatrixState
    q_norm: NormState | None
    k_norm: NormState | None
    output: MatrixState
    post_attention_norm: NormState
    up: MatrixState
    down: MatrixState
    scale: float
    window: int | None


class DecoderState(msgspec.Struct, frozen=True, kw_only=True):
    """All layers, and the norm behind them.

    Attributes:
        cos_sin: [max_positions, rotary_dim] float32, cosines in the first half; None: positions are in the embedding.
        is_gated: the MLP is silu(gate) * up; otherwise it is the tanh form of GELU.
    """

    layers: tuple[LayerState, ...]
    final_norm: NormState
    cos_sin: Array | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_gated: bool


class TransformerState(msgspec.Struct, frozen=True, kw_only=True):
    """From tokens to logits.

    Attributes:
        head: the output matrix [vocab_size, hidden_size].
        table: bytes of the embedding [vocab_size, hidden_size] of `table_kind`; None: it is the head.
        learned: embedding of positions [max_positions, hidden_size] float32, if they have one.
    """

    decoder: DecoderState
    head: MatrixState
    table: Array | None = None
    table_kind: int = FLOAT32
    learned: Array | None = None


class NormC(ctypes.Structure):
    _fields_ = [("weight", _P), ("bias", _P), ("eps", _D)]


class LayerC(ctypes.Structure):
    _fields_ = [
        ("input_norm", NormC), ("qkv", MatrixC), ("q_norm", NormC), ("k_norm", NormC), ("output", MatrixC),
        ("post_attention_norm", NormC), ("up", MatrixC), ("down", MatrixC), ("scale", _D), ("window", _L),
    ]  # fmt: skip


class DecoderC(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(LayerC)), ("final_norm", NormC), ("cos_sin", _P), ("num_layers", _L), ("hidden", _L),
        ("num_heads", _L), ("num_kv_heads", _L), ("head_dim", _L), ("rotary_dim", _L), ("max_positions", _L),
        ("is_rms", _L), ("is_gated", _L),
    ]  # fmt: skip


class EndsC(ctypes.Structure):
    _fields_ = [("head", ctypes.POINTER(MatrixC)), ("table", _P), ("table_kind", _L), ("learned", _P)]


class BatchC(ctypes.Structure):
    _fields_ = [
        ("positions", _P), ("slots", _P), ("logits_indices", _P), ("query_starts", _P), ("context_lens", _P),
        ("block_tables", _P), ("kv", _P), ("kv_scales", _P), ("kv_kind", _L), ("kv_bytes", _L), ("num_tokens", _L),
        ("num_logits", _L), ("num_seqs", _L), ("max_blocks", _L), ("num_blocks", _L), ("threads", _L),
    ]  # fmt: skip


def address(name: str, array: Array, dtype: np.dtype[Any] | type, shape: tuple[int, ...]) -> int:
    """Where the elements lie; ValueError unless they are contiguous, of the type and of the shape."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} is {array.dtype} {list(array.shape)}, but it must be contiguous {np.dtype(dtype)} {list(shape)}"
        )
    return int(array.ctypes.data)


def fault_of(code: int, batch: BatchC) -> IndexError:
    """What decoder.cpp says to be wrong with a batch; the complaints stand in the order of its `Fault`."""
    complaints = (
        "the position of token {index} is outside the table",
        "the slot of token {index} is outside the pool of {batch.num_blocks} blocks",
        "entry {index} of logits_indices is not one of the {batch.num_tokens} tokens",
        "the block table of sequence {index} names a block outside the pool of {batch.num_blocks} blocks",
        "token {index} is outside the vocabulary",
        "query_starts and context_lens of sequence {index} do not fit {batch.num_tokens} tokens and block tables of"
        " {batch.max_blocks} blocks",
    )
    index, what = divmod(code - 1, len(complaints))
    return IndexError("decoder: " + complaints[what].format(index=index, batch=batch))


def refuse_head_dim(library: ctypes.CDLL, head_dim: int) -> str:
    """Why the library has no attention for heads of this size; empty where it has."""
    step, most = library.mr_attention_dim_step(), library.mr_attention_max_dim()
    return f"head_dim {head_dim} is not a multiple of {step} up to {most}" if head_dim % step or head_dim > most else ""


class CpuDecoder:
    """The layers as the library reads them; `c` must not outlive this object.

    Raises ValueError for a state whose arrays do not fit each other, or a head size that the kernels do not have.
    """

    def __init__(self, library: ctypes.CDLL, state: DecoderState) -> None:
        refusal = refuse_head_dim(library, state.head_dim)
        if refusal:
            raise ValueError(refusal)
        self.library, self.state = library, state
        self._matrices: list[CpuMatrix] = []
        self.hidden = state.final_norm.weight.size
        self._is_rms = state.final_norm.bias is None
        heads, kv_heads, dim = state.num_heads, state.num_kv_heads, state.head_dim
        if kv_heads < 1 or heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads} heads cannot share {kv_heads} of keys and values")
        if not state.layers or any(layer.window is not None and layer.window < 1 for layer in state.layers):
            raise ValueError("there must be layers, with windows of at least 1")
        layers = (LayerC * len(state.layers))(
            *(
                LayerC(
                    input_norm=self._norm(layer.input_norm, self.hidden),
                    qkv=self._matrix(layer.qkv, (heads + 2 * kv_heads) * dim, self.hidden),
                    q_norm=self._head_norm(layer.q_norm),
                    k_norm=self._head_norm(layer.k_norm),
                    output=self._matrix(layer.output, self.hidden, heads * dim),
                    post_attention_norm=self._norm(layer.post_attention_norm, self.hidden),
                    up=self._matrix(layer.up, layer.down.in_features * (2 if state.is_gated else 1), self.hidden),
                    down=self._matrix(layer.down, self.hidden, layer.down.in_features),
                    scale=layer.scale,
                    window=layer.window or 0,
                )
                for layer in state.layers
            )
        )
        cos_sin = state.cos_sin
        if cos_sin is not None and (cos_sin.ndim != 2 or cos_sin.shape[1] % 2 or cos_sin.shape[1] > dim):
            raise ValueError(f"cos_sin is {list(cos_sin.shape)}, but head_dim is {dim}")
        self.c = DecoderC(
            layers=layers,
            final_norm=self._norm(state.final_norm, self.hidden),
            cos_sin=None if cos_sin is None else address("cos_sin", cos_sin, np.float32, cos_sin.shape),
            num_layers=len(state.layers),
            hidden=self.hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            rotary_dim=0 if cos_sin is None else cos_sin.shape[1],
            max_positions=0 if cos_sin is None else cos_sin.shape[0],
            is_rms=self._is_rms,
            is_gated=state.is_gated,
        )

    def kv_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Of the storage of keys and values: [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]."""
        state = self.state
        return (len(state.layers), 2, num_blocks, state.num_kv_heads, BLOCK_SIZE, state.head_dim)

    @property
    def num_bytes(self) -> int:
        """Of the matrices, padding included."""
        return sum(matrix.num_bytes for matrix in self._matrices)

    def _norm(self, norm: NormState, width: int) -> NormC:
        weight = address("a norm's weight", norm.weight, np.float32, (width,))
        if (norm.bias is None) != self._is_rms:
            raise ValueError("norms must have a bias all or none")
        bias = None if norm.bias is None else address("a norm's bias", norm.bias, np.float32, (width,))
        return NormC(weight, bias, norm.eps)

    def _head_norm(self, norm: NormState | None) -> NormC:
        if norm is None:
            return NormC()
        return NormC(address("a norm's weight", norm.weight, np.float32, (self.state.head_dim,)), None, norm.eps)

    def _matrix(self, state: MatrixState, out_features: int, in_features: int) -> MatrixC:
        given = (state.out_features, state.in_features)
        if given != (out_features, in_features):
            raise ValueError(f"a matrix is {given[0]} x {given[1]}, but it must be {out_features} x {in_features}")
        matrix = CpuMatrix(self.library, state)
        self._matrices.append(matrix)
        return matrix.c


class CpuTransformer:
    """Tokens in, logits out.

    Raises ValueError as `CpuDecoder`.
    """

    def __init__(self, library: ctypes.CDLL, state: TransformerState) -> None:
        self.state = state
        self.decoder = CpuDecoder(library, state.decoder)
        self.head = CpuMatrix(library, state.head)
        hidden, table, learned = self.decoder.hidden, state.table, state.learned
        if self.head.in_features != hidden:
            raise ValueError(f"the output matrix has {self.head.in_features} inputs, but the model is {hidden} wide")
        if state.table_kind not in TABLE_KINDS:
            raise ValueError(f"there is no table of kind {state.table_kind}")
        if learned is not None:
            if state.decoder.cos_sin is not None:
                raise ValueError("positions are either learned or rotated")
            address("learned", learned, np.float32, (len(learned), hidden))
            self.decoder.c.max_positions = len(learned)
        num_bytes = self.head.out_features * hidden * KIND_BYTES[state.table_kind]
        self._ends = EndsC(
            ctypes.pointer(self.head.c),
            None if table is None else address("table", table, np.uint8, (num_bytes,)),
            state.table_kind,
            None if learned is None else learned.ctypes.data,
        )
        self._call, self._num_threads = library.mr_transformer, library.mr_num_threads
        self._arguments = ctypes.byref(self.decoder.c), ctypes.byref(self._ends)

    @property
    def max_positions(self) -> int:
        return int(self.decoder.c.max_positions)

    @property
    def num_bytes(self) -> int:
        """Of matrices and embeddings, padding included."""
        ends = (self.state.table, self.state.learned)
        return self.decoder.num_bytes + self.head.num_bytes + sum(array.nbytes for array in ends if array is not None)

    def run(self, call: "TransformerCall") -> None:
        """Writes keys, values and logits.

        Raises IndexError where a position, slot, block or token is outside of what there is; nothing is written then.
        """
        batch = call.c
        batch.threads = self._num_threads()
        code = self._call(*self._arguments, call.reference, call.tokens, call.logits)
        if code:
            raise fault_of(code, batch)


class TransformerCall:
    """The arguments of a forward pass as the library reads them; the arrays must live as long, and may be filled anew.

    Args:
        tokens, positions, slot_mapping: [num_tokens] int64.
        query_starts: [num_seqs + 1] int32; context_lens: [num_seqs] int32; block_tables: [num_seqs, max_blocks] int32.
        logits_indices: [num_logits] int64.
        logits: [num_logits, vocab_size] float32, where they go.
        kv: of `CpuDecoder.kv_shape`, of the type that KV_KINDS has for `kv_dtype`.
        kv_scales: the same without head_dim, float32, of a pool of 8 bits.
    """

    def __init__(
        self,
        transformer: CpuTransformer,
        *,
        tokens: Array,
        positions: Array,
        slot_mapping: Array,
        query_starts: Array,
        context_lens: Array,
        block_tables: Array,
        logits_indices: Array,
        logits: Array,
        kv: Array,
        kv_scales: Array | None,
        kv_dtype: str,
    ) -> None:
        count, num_seqs, num_logits = len(tokens), len(context_lens), len(logits_indices)
        kind, element = KV_KINDS[kv_dtype]
        shape = transformer.decoder.kv_shape(kv.shape[2])
        if (kv_scales is not None) != (kv_dtype in SCALED_KV):
            raise ValueError(f"a pool of {kv_dtype} is given {'without' if kv_scales is None else 'with'} scales")
        self.tokens = address("tokens", tokens, np.int64, (count,))
        self.logits = address("logits", logits, np.float32, (num_logits, transformer.head.out_features))
        self.c = BatchC(
            positions=address("positions", positions, np.int64, (count,)),
            slots=address("slot_mapping", slot_mapping, np.int64, (count,)),
            logits_indices=address("logits_indices", logits_indices, np.int64, (num_logits,)),
            query_starts=address("query_starts", query_starts, np.int32, (num_seqs + 1,)),
            context_lens=address("context_lens", context_lens, np.int32, (num_seqs,)),
            block_tables=address("block_tables", block_tables, np.int32, (num_seqs, block_tables.shape[1])),
            kv=address("kv", kv, element, shape),
            kv_scales=None if kv_scales is None else address("kv_scales", kv_scales, np.float32, shape[:-1]),
            kv_kind=kind,
            kv_bytes=element.itemsize,
            num_tokens=count,
            num_logits=num_logits,
            num_seqs=num_seqs,
            max_blocks=block_tables.shape[1],
            num_blocks=kv.shape[2],
        )
        self.reference = ctypes.byref(self.c)
