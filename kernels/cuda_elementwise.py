"""Fronts of the elementwise CUDA kernels: norms, activations, embedding, and what lies between qkv and attention.

Activations, weights and results are bfloat16 or float16 (all of one call the same), arithmetic is float32. Every front
checks dtype, shape, device, contiguity and the alignment of 16 bytes, raises ValueError with what is wrong, enqueues
one kernel on `stream` (a raw cudaStream_t) and returns its output, which is `out` where that is given. Nothing is read
back, so a front can run while a CUDA graph is captured. No result of a token depends on the other tokens of the batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_launch import Launcher, pack_params
from millrace.kernels.memory import BLOCK_SIZE

MODEL_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
# Position of a pool's dtype is the kernel's MR_KV; None: the dtype of the activations.
KV_DTYPES = (None, torch.float8_e4m3fn, torch.int8)
VECTOR = 8  # 16-bit elements in 16 bytes: what a thread reads at once
MAX_NORM_WIDTH = 1024 * 4 * VECTOR

_NORM = np.dtype(
    [("x", "u8"), ("residual", "u8"), ("weight", "u8"), ("bias", "u8"), ("out", "u8"), ("hidden", "i4"), ("eps", "f4")],
    align=True,
)
_ACTIVATION = np.dtype([("x", "u8"), ("out", "u8"), ("width", "i4")], align=True)
_EMBEDDING = np.dtype(
    [
        *((name, "u8") for name in ("tokens", "weight", "positions", "position_weight", "out")),
        *((name, "i8") for name in ("vocab", "max_positions")),
        ("hidden", "i4"),
    ],
    align=True,
)
_ROPE_KV = np.dtype(
    [
        *((name, "u8") for name in ("qkv", "queries", "bias", "q_norm", "k_norm")),
        *((name, "u8") for name in ("cos_sin", "positions", "slot_mapping")),
        *((name, "u8") for name in ("k_cache", "v_cache", "k_scale", "v_scale")),
        *((name, "i8") for name in ("max_positions", "num_slots", "query_stride")),
        *((name, "i4") for name in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")),
        ("norm_eps", "f4"),
    ],
    align=True,
)

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu_erf": 2}
_NORM_KERNELS = {
    (name, dtype, vectors): Kernel("norm.cu", name, (("MR_T", MODEL_DTYPES[dtype]), ("MR_VECS", str(vectors))), 64)
    for name in ("mr_rms_norm", "mr_layer_norm")
    for dtype in MODEL_DTYPES
    for vectors in (1, 2, 4)
}
_ACTIVATION_KERNELS = {
    (name, gated, dtype): Kernel(
        "activation.cu",
        "mr_activation",
        (("MR_T", MODEL_DTYPES[dtype]), ("MR_ACT", str(_ACTIVATIONS[name])), ("MR_GATED", str(int(gated)))),
        40,
    )
    for name in _ACTIVATIONS
    for gated in (False, True)
    for dtype in MODEL_DTYPES
}
_EMBEDDING_KERNELS = {
    dtype: Kernel("embedding.cu", "mr_embedding", (("MR_T", name),), 40) for dtype, name in MODEL_DTYPES.items()
}
_ROPE_KV_KERNELS = {
    (dtype, lanes, kv): Kernel(
        "rope_kv.cu",
        "mr_rope_kv",
        (("MR_T", MODEL_DTYPES[dtype]), ("MR_LANES", str(lanes)), ("MR_KV", str(kv))),
        64,
    )
    for dtype in MODEL_DTYPES
    for lanes in (8, 16, 32)
    for kv in range(len(KV_DTYPES))
}


def kernels() -> Iterator[Kernel]:
    """Every variant that these fronts launch."""
    for table in (_NORM_KERNELS, _ACTIVATION_KERNELS, _EMBEDDING_KERNELS, _ROPE_KV_KERNELS):
        yield from table.values()


def _check(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    launcher: Launcher,
    *,
    align: int = 16,
) -> None:
    """A string in `shape` names a size that may be anything."""
    given = tensor.shape
    if (
        tensor.dtype not in dtypes
        or len(given) != len(shape)
        or not tensor.is_contiguous()
        or not all(isinstance(want, str) or size == want for size, want in zip(given, shape, strict=True))
    ):
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        wanted = f"contiguous {kinds} [{', '.join(map(str, shape))}]"
        raise ValueError(f"{op}: {name} is {describe(tensor)}, but it must be {wanted}")
    if tensor.device.type != launcher.device_type:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but it must be on a {launcher.device_type} device")
    if tensor.data_ptr() % align:
        raise ValueError(f"{op}: {name} begins at {tensor.data_ptr():#x}, but it must begin at a multiple of {align}")


def _check_width(op: str, name: str, width: int, limit: int | None = None) -> None:
    if width % VECTOR or width == 0 or (limit is not None and width > limit):
        upper = "" if limit is None else f" up to {limit}"
        raise ValueError(f"{op}: {name} is {width}, but it must be a multiple of {VECTOR} above 0{upper}")


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _blocks(width: int) -> tuple[int, int]:
    """Threads of a block and blocks of a row, one vector per thread."""
    vectors = width // VECTOR
    block = min(256, -(-vectors // 32) * 32)
    return block, -(-vectors // block)


def _output(op: str, out: Tensor | None, like: Tensor, width: int, launcher: Launcher) -> Tensor:
    shape = (like.shape[0], width)
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    _check(op, "out", out, shape, (like.dtype,), launcher)
    begin, end = like.data_ptr(), like.data_ptr() + like.numel() * like.element_size()
    if out.data_ptr() < end and begin < out.data_ptr() + out.numel() * out.element_size():
        raise ValueError(f"{op}: out shares memory with the input, which the kernel reads through a read-only path")
    return out


def _norm(
    kernel: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor | None,
    launcher: Launcher,
    stream: int,
) -> Tensor:
    op = kernel.removeprefix("mr_")
    _check(op, "x", x, ("num_tokens", "hidden"), tuple(MODEL_DTYPES), launcher)
    num_tokens, hidden = x.shape
    _check_width(op, "hidden", hidden, MAX_NORM_WIDTH)
    _check(op, "weight", weight, (hidden,), (x.dtype,), launcher)
    if bias is not None:
        _check(op, "bias", bias, (hidden,), (x.dtype,), launcher)
    if residual is not None:
        _check(op, "residual", residual, (num_tokens, hidden), (x.dtype,), launcher)
    out = _output(op, out, x, hidden, launcher)
    if num_tokens:
        vectors = next(count for count in (1, 2, 4) if hidden <= 512 * count * VECTOR or count == 4)
        block = -(-hidden // (VECTOR * vectors * 32)) * 32
        pointers = (x.data_ptr(), _pointer(residual), weight.data_ptr(), _pointer(bias), out.data_ptr())
        params = pack_params(_NORM, (*pointers, hidden, eps))
        launcher.launch(_NORM_KERNELS[kernel, x.dtype, vectors], (num_tokens, 1, 1), block, params, stream=stream)
    return out


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    launcher: Launcher,
    stream: int,
) -> Tensor:
    """y / sqrt(mean(y^2) + eps) * weight with y = x + residual (Zhang & Sennrich 2019); x [num_tokens, hidden].

    `residual` becomes y, rounded to its dtype, and what is normalised is the rounded sum.
    """
    return _norm("mr_rms_norm", x, residual, weight, None, eps, out, launcher, stream)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    launcher: Launcher,
    stream: int,
) -> Tensor:
    """(y - mean) / sqrt(variance + eps) * weight + bias with y = x + residual (Ba et al. 2016); as `rms_norm`."""
    return _norm("mr_layer_norm", x, residual, weight, bias, eps, out, launcher, stream)


def activation(
    x: Tensor, name: str, *, gated: bool = False, out: Tensor | None = None, launcher: Launcher, stream: int
) -> Tensor:
    """act(x), or gated act(gate) * up of x = [gate, up] (Shazeer 2020); x [num_tokens, width or 2 * width].

    Args:
        name: "silu", "gelu_tanh" or "gelu_erf" (Hendrycks & Gimpel 2016).
    """
    op = f"{name}_mul" if gated else name
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is none of {', '.join(_ACTIVATIONS)}")
    _check(op, "x", x, ("num_tokens", "2 * width" if gated else "width"), tuple(MODEL_DTYPES), launcher)
    if gated and x.shape[1] % 2:
        raise ValueError(f"{op}: x is {x.shape[1]} wide, but it must be even: gate, then up")
    num_tokens, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    _check_width(op, "width", width)
    out = _output(op, out, x, width, launcher)
    if num_tokens:
        block, blocks = _blocks(width)
        params = pack_params(_ACTIVATION, (x.data_ptr(), out.data_ptr(), width))
        kernel = _ACTIVATION_KERNELS[name, gated, x.dtype]
        launcher.launch(kernel, (num_tokens, blocks, 1), block, params, stream=stream)
    return out


def embedding(
    tokens: Tensor,
    weight: Tensor,
    *,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
    out: Tensor | None = None,
    launcher: Launcher,
    stream: int,
) -> Tensor:
    """Rows of a table: tokens [num_tokens] int64, weight [vocab, hidden] -> [num_tokens, hidden].

    With `positions` [num_tokens] int64 and `position_weight` [max_positions, hidden], learned positions are added. An
    id or position outside of its table gives a row of NaN.
    """
    op = "embedding"
    _check(op, "tokens", tokens, ("num_tokens",), (torch.int64,), launcher, align=8)
    _check(op, "weight", weight, ("vocab", "hidden"), tuple(MODEL_DTYPES), launcher)
    vocab, hidden = weight.shape
    _check_width(op, "hidden", hidden)
    max_positions = 0
    if (positions is None) != (position_weight is None):
        raise ValueError(f"{op}: positions and position_weight must be given together")
    if positions is not None and position_weight is not None:
        _check(op, "positions", positions, tuple(tokens.shape), (torch.int64,), launcher, align=8)
        _check(op, "position_weight", position_weight, ("max_positions", hidden), (weight.dtype,), launcher)
        max_positions = position_weight.shape[0]
    if out is None:
        out = torch.empty(tokens.shape[0], hidden, dtype=weight.dtype, device=weight.device)
    _check(op, "out", out, (tokens.shape[0], hidden), (weight.dtype,), launcher)
    if tokens.shape[0]:
        block, blocks = _blocks(hidden)
        pointers = (tokens, weight, positions, position_weight, out)
        params = pack_params(_EMBEDDING, (*map(_pointer, pointers), vocab, max_positions, hidden))
        kernel = _EMBEDDING_KERNELS[weight.dtype]
        launcher.launch(kernel, (tokens.shape[0], blocks, 1), block, params, stream=stream)
    return out


def rope_write_kv(
    qkv: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    num_heads: int,
    bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos_sin: Tensor | None = None,
    positions: Tensor | None = None,
    kv_scales: Tensor | None = None,
    out: Tensor | None = None,
    launcher: Launcher,
    stream: int,
) -> Tensor:
    """Bias, q/k-norm, rotary embedding, and keys and values into the pool; returns the queries.

    Queries are changed in place in `qkv`, or go to `out`; the keys and values of `qkv` stay as they came.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], queries, then keys, then values.
        slot_mapping: [num_tokens] int64, block * BLOCK_SIZE + offset. A slot outside of the pool, such as -1, is
            written nowhere; a slot must not occur twice.
        kv_cache: [2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim], keys first; of qkv's dtype,
            float8_e4m3fn or int8.
        bias: [(num_heads + 2 * num_kv_heads) * head_dim].
        q_norm, k_norm: [head_dim], weights of an RMSNorm over each head, before the rotation.
        cos_sin: [max_positions, rotary_dim] float32, the cosines in the first half of the columns; halves are paired as
            in NeoX (Su et al. 2021). A position outside of it makes the token's queries and keys NaN.
        positions: [num_tokens] int64, with cos_sin.
        kv_scales: [2, num_blocks, num_kv_heads, BLOCK_SIZE] float32, with a float8_e4m3fn or int8 pool: element times
            scale is the value. The scale maps the largest magnitude of a head to 448 or 127.
        out: [num_tokens, num_heads * head_dim], for queries that shall be contiguous.

    Returns:
        [num_tokens, num_heads * head_dim]: `out`, else a view of `qkv` with its row stride.
    """
    op = "rope_write_kv"
    _check(op, "qkv", qkv, ("num_tokens", "(num_heads + 2 * num_kv_heads) * head_dim"), tuple(MODEL_DTYPES), launcher)
    pool_dtypes = (qkv.dtype, *KV_DTYPES[1:])
    pool_shape = (2, "num_blocks", "num_kv_heads", BLOCK_SIZE, "head_dim")
    _check(op, "kv_cache", kv_cache, pool_shape, [dtype for dtype in pool_dtypes if dtype is not None], launcher)
    _, num_blocks, num_kv_heads, _, head_dim = kv_cache.shape
    _check_width(op, "head_dim", head_dim, 256)
    num_tokens, width = qkv.shape
    if num_heads < 1 or num_kv_heads < 1 or width != (num_heads + 2 * num_kv_heads) * head_dim:
        raise ValueError(
            f"{op}: qkv is {width} wide, but {num_heads} query heads and 2 * {num_kv_heads} of the pool of {head_dim}"
            f" each make {(num_heads + 2 * num_kv_heads) * head_dim}"
        )
    _check(op, "slot_mapping", slot_mapping, (num_tokens,), (torch.int64,), launcher, align=8)
    for name, tensor, size in (("bias", bias, width), ("q_norm", q_norm, head_dim), ("k_norm", k_norm, head_dim)):
        if tensor is not None:
            _check(op, name, tensor, (size,), (qkv.dtype,), launcher)
    max_positions = rotary_dim = 0
    if (cos_sin is None) != (positions is None):
        raise ValueError(f"{op}: cos_sin and positions must be given together")
    if cos_sin is not None and positions is not None:
        _check(op, "cos_sin", cos_sin, ("max_positions", "rotary_dim"), (torch.float32,), launcher)
        _check(op, "positions", positions, (num_tokens,), (torch.int64,), launcher, align=8)
        max_positions, rotary_dim = cos_sin.shape
        _check_width(op, "rotary_dim", rotary_dim, head_dim)
    kv = pool_dtypes.index(kv_cache.dtype)
    scales: list[Tensor | None] = [None, None]
    if (kv_scales is not None) != (kv > 0):
        state = "given" if kv_scales is not None else "missing"
        raise ValueError(f"{op}: kv_scales are {state} with a pool of {kv_cache.dtype}: 8-bit pools alone have them")
    if kv_scales is not None:
        _check(op, "kv_scales", kv_scales, tuple(kv_cache.shape[:-1]), (torch.float32,), launcher)
        scales = list(kv_scales)
    queries = qkv[:, : num_heads * head_dim] if out is None else _output(op, out, qkv, num_heads * head_dim, launcher)
    if num_tokens:
        lanes = next(lanes for lanes in (8, 16, 32) if head_dim <= VECTOR * lanes)
        pointers = (qkv, queries, bias, q_norm, k_norm, cos_sin, positions, slot_mapping, *kv_cache, *scales)
        strides = (max_positions, num_blocks * BLOCK_SIZE, queries.stride(0))
        sizes = (num_heads, num_kv_heads, head_dim, rotary_dim)
        params = pack_params(_ROPE_KV, (*map(_pointer, pointers), *strides, *sizes, norm_eps))
        grid = (num_tokens, -(-(num_heads + 2 * num_kv_heads) * lanes // 128), 1)
        launcher.launch(_ROPE_KV_KERNELS[qkv.dtype, lanes, kv], grid, 128, params, stream=stream)
    return queries
