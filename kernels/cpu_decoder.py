"""All layers of a decoder as one call into the C++ library (cpu/decoder.cpp), without Python between the kernels.

The structures have the layout of those in decoder.cpp. Results have the same bits as the ops one by one.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from millrace.kernels.arguments import (
    BLOCK_SIZE,
    AttentionBatch,
    DecoderArgs,
    NormWeights,
    PackedDecoder,
    PackedLinear,
    describe,
)
from millrace.kernels.cpu_linear import CpuLinear, MatrixC
from millrace.kernels.cpu_quantized import CpuQuantized

_P, _L, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


# What a pool may be of, numbered as in kv.h.
_KV_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}


class KvPoolC(ctypes.Structure):
    _fields_ = [("keys", _P), ("values", _P), ("key_scales", _P), ("value_scales", _P), ("kind", ctypes.c_int)]

    @classmethod
    def of(cls, k_cache: Tensor, v_cache: Tensor, kv_scales: Tensor | None) -> "KvPoolC":
        """The pool of one layer, whose tensors the fronts have checked."""
        keys, values = (None, None) if kv_scales is None else (kv_scales[0].data_ptr(), kv_scales[1].data_ptr())
        return cls(k_cache.data_ptr(), v_cache.data_ptr(), keys, values, _KV_KINDS[k_cache.dtype])


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _P), ("bias", _P), ("eps", _D)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", _Norm), ("qkv", MatrixC), ("q_norm", _Norm), ("k_norm", _Norm), ("output", MatrixC),
        ("post_attention_norm", _Norm), ("up", MatrixC), ("down", MatrixC), ("scale", _D), ("window", _L),
    ]  # fmt: skip


class _Decoder(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)), ("final_norm", _Norm), ("cos_sin", _P), ("num_layers", _L), ("hidden", _L),
        ("num_heads", _L), ("num_kv_heads", _L), ("head_dim", _L), ("rotary_dim", _L), ("max_positions", _L),
        ("is_rms", _L), ("is_gated", _L),
    ]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [
        ("positions", _P), ("slots", _P), ("logits_indices", _P), ("query_starts", _P), ("context_lens", _P),
        ("block_tables", _P), ("kv", _P), ("kv_scales", _P), ("kv_kind", _L), ("kv_bytes", _L), ("num_tokens", _L),
        ("num_logits", _L), ("num_seqs", _L), ("max_blocks", _L), ("num_blocks", _L), ("threads", _L),
    ]  # fmt: skip


class CpuDecoder(PackedDecoder):
    """Layers whose matrices were packed by the same library."""

    def __init__(self, library: ctypes.CDLL, args: DecoderArgs) -> None:
        self._library = library
        self._hidden = args.final_norm.weight.shape[0]
        self._kv_shape = (len(args.layers), 2, args.num_kv_heads, BLOCK_SIZE, args.head_dim)
        self._cos_sin = args.cos_sin
        self._kept: list[Any] = [args]  # whatever the structures point to
        cos_sin = args.cos_sin
        layers = (_Layer * len(args.layers))(
            *(
                _Layer(
                    input_norm=self._norm(layer.input_norm),
                    qkv=_matrix(layer.qkv),
                    q_norm=self._norm(layer.q_norm),
                    k_norm=self._norm(layer.k_norm),
                    output=_matrix(layer.output),
                    post_attention_norm=self._norm(layer.post_attention_norm),
                    up=_matrix(layer.up),
                    down=_matrix(layer.down),
                    scale=layer.scale,
                    window=layer.window or 0,
                )
                for layer in args.layers
            )
        )
        self._decoder = _Decoder(
            layers=layers,
            final_norm=self._norm(args.final_norm),
            cos_sin=None if cos_sin is None else cos_sin.data_ptr(),
            num_layers=len(args.layers),
            hidden=self._hidden,
            num_heads=args.num_heads,
            num_kv_heads=args.num_kv_heads,
            head_dim=args.head_dim,
            rotary_dim=0 if cos_sin is None else cos_sin.shape[1],
            max_positions=0 if cos_sin is None else cos_sin.shape[0],
            is_rms=args.final_norm.bias is None,
            is_gated=args.is_gated,
        )

    def _norm(self, norm: NormWeights | None) -> _Norm:
        if norm is None:
            return _Norm()
        weight, bias = norm.weight.float(), None if norm.bias is None else norm.bias.float()
        self._kept += (weight, bias)
        return _Norm(weight.data_ptr(), None if bias is None else bias.data_ptr(), norm.eps)

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
        layers, two, kv_heads, block_size, head_dim = self._kv_shape
        num_blocks = kv_storage.shape[2]
        slots = (layers, two, num_blocks, kv_heads, block_size)
        kv_dtype = kv_storage.dtype
        is_scaled = kv_dtype.itemsize == 1
        if kv_dtype not in _KV_KINDS or is_scaled != (kv_scales is not None):
            given = "without kv_scales" if kv_scales is None else "with kv_scales"
            raise ValueError(
                f"decoder: kv_storage is {describe(kv_storage)} {given}, but it must be float32 or bfloat16 without, or"
                " int8 or float8_e4m3fn with them"
            )
        for name, tensor, shape, dtype in (
            ("residual", residual, (batch.num_tokens, self._hidden), torch.float32),
            ("kv_storage", kv_storage, (*slots, head_dim), kv_dtype),
            *([] if kv_scales is None else [("kv_scales", kv_scales, slots, torch.float32)]),
            ("positions", positions, (batch.num_tokens,), torch.int64),
            ("slot_mapping", slot_mapping, (batch.num_tokens,), torch.int64),
            ("logits_indices", logits_indices, (logits_indices.numel(),), torch.int64),
        ):
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
                raise ValueError(
                    f"decoder: {name} is {describe(tensor)}, but it must be contiguous {dtype} {list(shape)} on the CPU"
                )
        num_logits = logits_indices.numel()
        out = torch.empty(num_logits, self._hidden)
        call = _Batch(
            positions.data_ptr(), slot_mapping.data_ptr(), logits_indices.data_ptr(), batch.query_starts.data_ptr(),
            batch.context_lens.data_ptr(), batch.block_tables.data_ptr(), kv_storage.data_ptr(),
            None if kv_scales is None else kv_scales.data_ptr(), _KV_KINDS[kv_dtype], kv_dtype.itemsize,
            batch.num_tokens, num_logits, batch.num_seqs, batch.block_tables.shape[1], num_blocks,
            torch.get_num_threads(),
        )  # fmt: skip
        bad = self._library.mr_decoder(
            ctypes.byref(self._decoder), ctypes.byref(call), residual.data_ptr(), out.data_ptr()
        )
        if bad:
            index, what = divmod(bad - 1, 4)
            complaint = (
                f"the position of token {index} is outside the table",
                f"the slot of token {index} is outside the pool of {num_blocks} blocks",
                f"entry {index} of logits_indices is not one of the {batch.num_tokens} tokens",
                f"the block table of sequence {index} names a block outside the pool of {num_blocks} blocks",
            )[what]
            raise IndexError(f"decoder: {complaint}")
        return out


def _matrix(linear: PackedLinear) -> MatrixC:
    assert isinstance(linear, CpuLinear | CpuQuantized), linear  # the backend has looked
    return linear.matrix_c()
