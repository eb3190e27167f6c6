"""The ops in the C++ library that `cpu_build` makes, called through ctypes, which releases the GIL.

Threads are torch's: as many as `torch.get_num_threads()`, out of the same OpenMP pool.
Batch invariance: a token's result has the same bits whatever else is in the batch, however its prompt was cut into
chunks, and for any number of threads (linear: one chain of multiply-adds over `in_features` per output; attention:
fixed segments of positions, merged in order; the rest works row by row).
"""

import ctypes

import torch
from torch import Tensor

from millrace.kernels.arguments import (
    ActivationArgs,
    AttentionArgs,
    Backend,
    DecoderArgs,
    Float8Args,
    NormArgs,
    PackArgs,
    PackedDecoder,
    PackedLinear,
    QuantizedArgs,
    Refusal,
    RopeArgs,
    WriteKvArgs,
)
from millrace.kernels.cpu_decoder import CpuStack, KvPoolC
from millrace.kernels.cpu_linear import KINDS, CpuLinear, pack_integers, pack_matrix
from millrace.kernels.cpu_transformer import refuse_head_dim


class CpuBackend(Backend):
    name = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def pack_linear(self, args: PackArgs) -> PackedLinear | Refusal:
        if not args.weight.is_cpu:
            return _elsewhere(args.weight)
        if args.activation != torch.float32 or args.weight.dtype not in KINDS:
            return Refusal(f"it has no product of {args.activation} by {args.weight.dtype}")
        return pack_matrix(self._library, args.weight, args.bias)

    def pack_quantized(self, args: QuantizedArgs) -> PackedLinear | Refusal:
        if not args.weight.q.is_cpu:
            return _elsewhere(args.weight.q)
        if args.activation != torch.float32:
            return Refusal(f"it has no product of {args.activation} by integers")
        if args.weight.group_size % 4:
            return Refusal(f"groups of {args.weight.group_size} inputs are not whole fours")
        return pack_integers(self._library, args.weight, args.bias)

    def pack_float8(self, args: Float8Args) -> PackedLinear | Refusal:
        weight = args.weight
        if not weight.codes.is_cpu:
            return _elsewhere(weight.codes)
        if args.activation != torch.float32:
            return Refusal(f"it has no product of {args.activation} by float8")
        if weight.scales.shape[1] > 1 and weight.group_size.bit_count() > 1:
            return Refusal(f"groups of {weight.group_size} inputs are not a power of two")
        return pack_matrix(self._library, weight, args.bias)

    def pack_decoder(self, args: DecoderArgs) -> PackedDecoder | Refusal:
        refusal = refuse_head_dim(self._library, args.head_dim)
        if refusal:
            return Refusal(refusal)
        for layer in args.layers:
            for linear in (layer.qkv, layer.output, layer.up, layer.down):
                if not isinstance(linear, CpuLinear):
                    return Refusal(f"a matrix is packed as {type(linear).__name__}")
        return CpuStack(self._library, args)

    def rms_norm(self, args: NormArgs) -> Tensor | Refusal:
        x, residual = args.x, args.residual
        if not _serves(x):
            return _elsewhere(x)
        weight = args.weight.float()
        width = x.shape[-1]
        y = torch.empty_like(x)
        self._library.mr_rms_norm(
            x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(), y.data_ptr(),
            x.numel() // width if width else 0, width, args.eps, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def layer_norm(self, args: NormArgs) -> Tensor | Refusal:
        x, residual = args.x, args.residual
        if not _serves(x):
            return _elsewhere(x)
        weight, bias = args.weight.float(), None if args.bias is None else args.bias.float()
        width = x.shape[-1]
        y = torch.empty_like(x)
        self._library.mr_layer_norm(
            x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), x.numel() // width if width else 0, width,
            args.eps, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def silu_mul(self, args: ActivationArgs) -> Tensor | Refusal:
        if not _serves(args.x):
            return _elsewhere(args.x)
        rows, width = args.x.shape[0], args.x.shape[1] // 2
        y = torch.empty(rows, width)
        self._library.mr_silu_mul(args.x.data_ptr(), y.data_ptr(), rows, width, torch.get_num_threads())
        return y

    def gelu_tanh(self, args: ActivationArgs) -> Tensor | Refusal:
        if not _serves(args.x):
            return _elsewhere(args.x)
        y = torch.empty_like(args.x)
        self._library.mr_gelu_tanh(args.x.data_ptr(), y.data_ptr(), args.x.numel(), torch.get_num_threads())
        return y

    def rope(self, args: RopeArgs) -> Refusal | None:
        q, k, cos_sin = args.q, args.k, args.cos_sin
        if not _serves(q):
            return _elsewhere(q)
        bad = self._library.mr_rope(
            q.data_ptr(), k.data_ptr(), cos_sin.data_ptr(), args.positions.data_ptr(), q.shape[0], q.shape[1],
            k.shape[1], q.shape[2], cos_sin.shape[1], cos_sin.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        if bad:
            position = int(args.positions[bad - 1])
            raise IndexError(f"rope_: position {position} is outside the table of {cos_sin.shape[0]} positions")
        return None

    def write_kv(self, args: WriteKvArgs) -> Refusal | None:
        k, cache = args.k, args.k_cache
        if not _serves(k):
            return _elsewhere(k)
        pool = KvPoolC.of(cache, args.v_cache, args.kv_scales)
        bad = self._library.mr_write_kv(
            k.data_ptr(), args.v.data_ptr(), ctypes.byref(pool), args.slot_mapping.data_ptr(), k.shape[0], k.shape[1],
            k.shape[2], cache.shape[0],
        )  # fmt: skip
        if bad:
            slot = int(args.slot_mapping[bad - 1])
            raise IndexError(f"write_kv: slot {slot} is outside the pool of {cache.shape[0]} blocks")
        return None

    def paged_attention(self, args: AttentionArgs) -> Tensor | Refusal:
        q, cache, batch = args.q, args.k_cache, args.batch
        if not _serves(q):
            return _elsewhere(q)
        head_dim = q.shape[2]
        refusal = refuse_head_dim(self._library, head_dim)
        if refusal:
            return Refusal(refusal)
        out = torch.empty_like(q)
        pool = KvPoolC.of(cache, args.v_cache, args.kv_scales)
        bad = self._library.mr_attention(
            q.data_ptr(), ctypes.byref(pool), batch.query_starts.data_ptr(), batch.context_lens.data_ptr(),
            batch.block_tables.data_ptr(), out.data_ptr(), batch.num_seqs, batch.block_tables.shape[1], cache.shape[0],
            q.shape[1], cache.shape[1], head_dim, q.stride(0), args.window or 0, args.scale, torch.get_num_threads(),
        )  # fmt: skip
        if bad:
            raise IndexError(
                f"paged_attention: the block table of sequence {bad - 1} names a block outside the pool of"
                f" {cache.shape[0]} blocks"
            )
        return out


def _serves(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32


def _elsewhere(tensor: Tensor) -> Refusal:
    return Refusal(f"the tensors are {tensor.dtype} on {tensor.device}, not float32 on the CPU")
