"""All layers of a decoder as one call on torch's tensors; the call itself stands in `cpu_transformer`.

Results have the same bits as the ops one by one.
"""

import ctypes

import torch
from torch import Tensor

from millrace.kernels.arguments import (
    AttentionBatch,
    DecoderArgs,
    DecoderLayerArgs,
    NormWeights,
    PackedDecoder,
    PackedLinear,
    describe,
)
from millrace.kernels.cpu_linear import CpuLinear, array_of
from millrace.kernels.cpu_matrix import MatrixState
from millrace.kernels.cpu_transformer import (
    KV_KINDS,
    BatchC,
    CpuDecoder,
    DecoderState,
    LayerState,
    NormState,
    fault_of,
)

KV_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}


class KvPoolC(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p), ("kind", ctypes.c_int),
    ]  # fmt: skip

    @classmethod
    def of(cls, k_cache: Tensor, v_cache: Tensor, kv_scales: Tensor | None) -> "KvPoolC":
        """The pool of one layer, whose tensors the fronts have checked."""
        keys, values = (None, None) if kv_scales is None else (kv_scales[0].data_ptr(), kv_scales[1].data_ptr())
        return cls(k_cache.data_ptr(), v_cache.data_ptr(), keys, values, KV_KINDS[KV_NAMES[k_cache.dtype]][0])


class CpuStack(PackedDecoder):
    """Layers whose matrices were packed by the same library. Raises ValueError as `CpuDecoder`."""

    def __init__(self, library: ctypes.CDLL, args: DecoderArgs) -> None:
        self._library = library
        self.decoder = CpuDecoder(library, _state(args))

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
        shape = self.decoder.kv_shape(kv_storage.shape[2])
        kv_dtype = kv_storage.dtype
        is_scaled = kv_dtype.itemsize == 1
        if kv_dtype not in KV_NAMES or is_scaled != (kv_scales is not None):
            given = "without kv_scales" if kv_scales is None else "with kv_scales"
            raise ValueError(
                f"decoder: kv_storage is {describe(kv_storage)} {given}, but it must be float32 or bfloat16 without, or"
                " int8 or float8_e4m3fn with them"
            )
        for name, tensor, wanted, dtype in (
            ("residual", residual, (batch.num_tokens, self.decoder.hidden), torch.float32),
            ("kv_storage", kv_storage, shape, kv_dtype),
            *([] if kv_scales is None else [("kv_scales", kv_scales, shape[:-1], torch.float32)]),
            ("positions", positions, (batch.num_tokens,), torch.int64),
            ("slot_mapping", slot_mapping, (batch.num_tokens,), torch.int64),
            ("logits_indices", logits_indices, (logits_indices.numel(),), torch.int64),
        ):
            if tensor.shape != wanted or tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
                must = f"contiguous {dtype} {list(wanted)} on the CPU"
                raise ValueError(f"decoder: {name} is {describe(tensor)}, but it must be {must}")
        out = torch.empty(logits_indices.numel(), self.decoder.hidden)
        call = BatchC(
            positions.data_ptr(), slot_mapping.data_ptr(), logits_indices.data_ptr(), batch.query_starts.data_ptr(),
            batch.context_lens.data_ptr(), batch.block_tables.data_ptr(), kv_storage.data_ptr(),
            None if kv_scales is None else kv_scales.data_ptr(), KV_KINDS[KV_NAMES[kv_dtype]][0], kv_dtype.itemsize,
            batch.num_tokens, len(out), batch.num_seqs, batch.block_tables.shape[1], kv_storage.shape[2],
            torch.get_num_threads(),
        )  # fmt: skip
        code = self._library.mr_decoder(
            ctypes.byref(self.decoder.c), ctypes.byref(call), residual.data_ptr(), out.data_ptr()
        )
        if code:
            raise fault_of(code, call)
        return out


def _state(args: DecoderArgs) -> DecoderState:
    return DecoderState(
        layers=tuple(_layer(layer) for layer in args.layers),
        final_norm=_norm(args.final_norm),
        cos_sin=None if args.cos_sin is None else array_of(args.cos_sin),
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        head_dim=args.head_dim,
        is_gated=args.is_gated,
    )


def _layer(layer: DecoderLayerArgs) -> LayerState:
    return LayerState(
        input_norm=_norm(layer.input_norm),
        qkv=_matrix(layer.qkv),
        q_norm=None if layer.q_norm is None else _norm(layer.q_norm),
        k_norm=None if layer.k_norm is None else _norm(layer.k_norm),
        output=_matrix(layer.output),
        post_attention_norm=_norm(layer.post_attention_norm),
        up=_matrix(layer.up),
        down=_matrix(layer.down),
        scale=layer.scale,
        window=layer.window,
    )


def _norm(norm: NormWeights) -> NormState:
    return NormState(array_of(norm.weight), None if norm.bias is None else array_of(norm.bias), norm.eps)


def _matrix(linear: PackedLinear) -> MatrixState:
    assert isinstance(linear, CpuLinear), linear  # the backend has looked
    return linear.matrix.state
