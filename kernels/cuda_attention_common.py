"""What the attention fronts share: the pool's record, the options, checks and argument records."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_launch import Launcher
from millrace.kernels.memory import BLOCK_SIZE

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
MAX_QUERY_ROWS = 16  # num_queries * group of decode; group of prefill
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
KV_TYPES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
POINTERS = ("q", "keys", "values", "key_scales", "value_scales", "block_tables")  # of decode and prefill
_LOG2_E = math.log2(math.e)


class KvPool(NamedTuple):
    """A layer's keys and values.

    Attributes:
        keys, values: [num_blocks, num_kv_heads, 16, head_dim] of the query's dtype, float8_e4m3fn or int8.
        key_scales, value_scales: [num_blocks, num_kv_heads, 16] float32, positive, for the 8-bit dtypes.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class AttentionOptions(NamedTuple):
    """How products become weights: softmax of cap(scale q.k) + slope (key position - query position).

    Attributes:
        scale: of the products.
        window: keys that a query sees, its own included; None: all.
        soft_cap: cap(x) is soft_cap tanh(x / soft_cap) (Gemma 2); None: x.
        alibi_slopes: [num_heads] float32 (Press et al. 2022); None: no such term.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    alibi_slopes: Tensor | None = None


class Variant(NamedTuple):
    """A kernel and how it is launched."""

    kernel: Kernel
    threads: int
    shared_bytes: int

    def ctas_per_sm(self, launcher: Launcher) -> int:
        """Thread blocks that an SM holds at once. Registers are dealt out to warps by eight for each thread, shared
        memory with 1 KiB more for each block (CUDA C++ Programming Guide, "Compute Capabilities")."""
        by_registers = 65536 // (-(-self.kernel.max_registers // 8) * 8 * self.threads)
        return max(1, min(by_registers, launcher.shared_bytes_per_sm // (self.shared_bytes + 1024)))


def padded_row(num_bytes: int) -> int:
    """Bytes of a row in shared memory, as in attention.cuh."""
    return (num_bytes // 16 | 1) * 16


def macros(defines: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in defines.items())


def type_names(op: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> tuple[str, str]:
    """MR_T and MR_KV."""
    if dtype not in TYPES or (kv_dtype != dtype and kv_dtype not in KV_TYPES):
        raise ValueError(
            f"{op}: queries are {dtype} and the pool is {kv_dtype}, but the kernels have queries of bfloat16 or float16"
            " over a pool of the same dtype, float8_e4m3fn or int8"
        )
    return TYPES[dtype], TYPES[dtype] if kv_dtype == dtype else KV_TYPES[kv_dtype]


def check_heads(op: str, num_heads: int, num_kv_heads: int, head_dim: int, num_queries: int) -> None:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: {num_heads} query heads are not a multiple of {num_kv_heads} kv heads")
    rows = num_heads // num_kv_heads * num_queries
    if rows > MAX_QUERY_ROWS or num_queries < 1:
        raise ValueError(
            f"{op}: {num_heads} query heads over {num_kv_heads} kv heads at {num_queries} query tokens a sequence give"
            f" {rows} rows, but the kernel has 1 to {MAX_QUERY_ROWS}"
        )
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{op}: head_dim is {head_dim}, but the kernels have {', '.join(map(str, HEAD_DIMS))}")


def check(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    launcher: Launcher,
    align: int = 16,
) -> None:
    """Contiguous, of one of the dtypes and of the shape, where a string stands for any size, on the device, aligned."""
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    sizes_fit = len(shape) == tensor.dim() and all(
        isinstance(want, str) or size == want for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not sizes_fit or tensor.dtype not in dtypes or not tensor.is_contiguous():
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{op}: {name} is {describe(tensor)}, but it must be contiguous {kinds} [{sizes}]")
    if tensor.device.type != launcher.device_type:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but the kernels run on {launcher.device_type}")
    if tensor.data_ptr() % align:
        raise ValueError(f"{op}: {name} starts at {tensor.data_ptr():#x}, which is not a multiple of {align} bytes")


def check_window(op: str, window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}, but a query sees at least its own key; None is for all keys")


def check_pool(op: str, pool: KvPool, num_kv_heads: int, head_dim: int, dtype: torch.dtype, launcher: Launcher) -> None:
    shape = ("num_blocks", num_kv_heads, BLOCK_SIZE, head_dim)
    check(op, "keys", pool.keys, shape, (dtype, *KV_TYPES), launcher)
    check(op, "values", pool.values, tuple(pool.keys.shape), (pool.keys.dtype,), launcher)
    for name, scales in (("key_scales", pool.key_scales), ("value_scales", pool.value_scales)):
        if (scales is not None) != (pool.keys.dtype in KV_TYPES):
            raise ValueError(
                f"{op}: {name} is {'None' if scales is None else describe(scales)} for a pool of {pool.keys.dtype};"
                " float8_e4m3fn and int8 have scales, the query's dtype has none"
            )
        if scales is not None:
            check(op, name, scales, tuple(pool.keys.shape[:3]), (torch.float32,), launcher)


def check_rest(
    op: str, q: Tensor, options: AttentionOptions, out: Tensor | None, lse: Tensor | None, launcher: Launcher
) -> tuple[Tensor, dict[str, Any]]:
    """The output, and the options as the kernels take them."""
    num_tokens, num_heads, _ = q.shape
    out = torch.empty_like(q) if out is None else out
    check(op, "out", out, tuple(q.shape), (q.dtype,), launcher)
    if lse is not None:
        check(op, "lse", lse, (num_tokens, num_heads), (torch.float32,), launcher, align=4)
    if options.alibi_slopes is not None:
        check(op, "alibi_slopes", options.alibi_slopes, (num_heads,), (torch.float32,), launcher, align=4)
    check_window(op, options.window)
    cap = options.soft_cap
    if not math.isfinite(options.scale) or (cap is not None and not (math.isfinite(cap) and cap > 0)):
        raise ValueError(
            f"{op}: scale is {options.scale} and soft_cap {cap}; they must be finite, and the cap positive"
        )
    factor = options.scale * _LOG2_E if cap is None else 2 * _LOG2_E * options.scale / cap
    return out, {
        "alibi_slopes": pointer(options.alibi_slopes),
        "window": options.window or 0,
        "score_factor": factor,
        "soft_cap": 0.0 if cap is None else cap * _LOG2_E,
    }


def pool_pointers(pool: KvPool) -> dict[str, int]:
    return {name: pointer(tensor) for name, tensor in pool._asdict().items()}


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pack(dtype: np.dtype[Any], **values: float) -> np.void:
    """An argument record; every field is given."""
    record = np.zeros((), dtype)
    for name in dtype.names or ():
        record[name] = values.pop(name)
    if values:
        raise TypeError(f"no fields {sorted(values)}")
    return record[()]  # type: ignore[return-value]
