"""Copies of whole KV blocks on the GPU: for copy-on-write, and for swap through a contiguous staging buffer.

A pool is [num_layers, 2, num_blocks, ...]: what follows is one block, and every layer's keys and values are a plane.
The scales of a quantised pool are a second tensor of that form and move with it, in the same launch.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_launch import Launcher

MAX_MOVES = 256  # blocks per launch: the list travels in the argument record
_THREADS = 256
_CHUNK_BYTES = 16 * _THREADS * 4

REGION_DTYPE = np.dtype(
    [("source", "u8"), ("target", "u8")]
    + [(f"{side}_{what}_stride", "i8") for side in ("source", "target") for what in ("plane", "block")]
    + [("num_planes", "i4"), ("block_vectors", "i4")],
    align=True,
)
MOVE_DTYPE = np.dtype(
    [("regions", REGION_DTYPE, (2,)), ("from", "i4", (MAX_MOVES,)), ("to", "i4", (MAX_MOVES,))], align=True
)

MOVE_KERNEL = Kernel("copy.cu", "mr_move_blocks", max_registers=40)


def kernels() -> Iterable[Kernel]:
    """Every variant that can be launched."""
    yield MOVE_KERNEL


def copy_blocks(
    launcher: Launcher,
    pool: Tensor,
    source: Sequence[int],
    target: Sequence[int],
    *,
    scales: Tensor | None = None,
    stream: int,
) -> None:
    """Copies blocks inside of a pool, in all layers, keys and values: pool[:, :, target] = pool[:, :, source].

    Args:
        pool: [num_layers, 2, num_blocks, ...] of any dtype; the three leading dimensions may be strided.
        source, target: block numbers; targets are distinct, not block 0, and none is a source too.
        scales: [num_layers, 2, num_blocks, ...] of a quantised pool.

    Raises:
        ValueError: a layout that cannot be copied in 16-byte vectors, or a list that names a block wrongly.
    """
    regions = _regions("copy_blocks", launcher, pool, scales, pool, scales)
    _check_list("copy_blocks source", source, pool.shape[2], first=0)
    _check_list("copy_blocks target", target, pool.shape[2], first=1, distinct=True)
    if len(source) != len(target):
        raise ValueError(f"copy_blocks: {len(source)} sources, but {len(target)} targets")
    both = sorted(set(source) & set(target))
    if both:
        raise ValueError(f"copy_blocks: blocks {both} are source and target; copies of one call have no order")
    _move(launcher, regions, source, target, stream)


def gather_blocks(
    launcher: Launcher,
    pool: Tensor,
    blocks: Sequence[int],
    staging: Tensor,
    *,
    scales: Tensor | None = None,
    scales_staging: Tensor | None = None,
    stream: int,
) -> None:
    """Collects blocks for a copy to the host: staging[i] = pool[:, :, blocks[i]].

    Args:
        pool, scales: as for `copy_blocks`.
        blocks: n block numbers.
        staging: [n or more, num_layers, 2, ...] contiguous, of the pool's dtype: one block of all layers is one run of
            bytes.
        scales_staging: the same for the scales, with as many places; given if and only if there are scales.

    Raises:
        ValueError: as `copy_blocks`.
    """
    planes = _staging_planes("gather_blocks", pool, staging, len(blocks))
    scale_planes = _scale_planes("gather_blocks", scales, scales_staging, len(blocks))
    regions = _regions("gather_blocks", launcher, pool, scales, planes, scale_planes)
    _check_list("gather_blocks", blocks, pool.shape[2], first=0)
    _move(launcher, regions, blocks, range(len(blocks)), stream)


def scatter_blocks(
    launcher: Launcher,
    staging: Tensor,
    pool: Tensor,
    blocks: Sequence[int],
    *,
    scales: Tensor | None = None,
    scales_staging: Tensor | None = None,
    stream: int,
) -> None:
    """The way back: pool[:, :, blocks[i]] = staging[i]. Blocks are distinct and not block 0; the rest as
    `gather_blocks`."""
    planes = _staging_planes("scatter_blocks", pool, staging, len(blocks))
    scale_planes = _scale_planes("scatter_blocks", scales, scales_staging, len(blocks))
    regions = _regions("scatter_blocks", launcher, planes, scale_planes, pool, scales)
    _check_list("scatter_blocks", blocks, pool.shape[2], first=1, distinct=True)
    _move(launcher, regions, range(len(blocks)), blocks, stream)


def _move(
    launcher: Launcher, regions: list[dict[str, int]], source: Sequence[int], target: Sequence[int], stream: int
) -> None:
    planes = sum(region["num_planes"] for region in regions)
    vectors = max((region["block_vectors"] for region in regions), default=0)
    chunks = -(-16 * vectors // _CHUNK_BYTES)
    for start in range(0, len(source), MAX_MOVES):
        part = slice(start, start + MAX_MOVES)
        count = len(source[part])
        params: Any = np.zeros((), MOVE_DTYPE)
        for i, region in enumerate(regions):
            for name, value in region.items():
                params["regions"][name][i] = value
        params["from"][:count] = source[part]
        params["to"][:count] = target[part]
        launcher.launch(MOVE_KERNEL, (chunks, planes, count), _THREADS, params[()], stream=stream)


def _regions(
    op: str, launcher: Launcher, source: Tensor, source_scales: Tensor | None, target: Tensor, target_scales: Any
) -> list[dict[str, int]]:
    pairs = [("pool", source, target)]
    if source_scales is not None:
        pairs.append(("scales", source_scales, target_scales))
        for a, b in ((source, source_scales), (target, target_scales)):
            if a.shape[:3] != b.shape[:3]:
                raise ValueError(f"{op}: scales are {describe(b)}, but what they belong to is {describe(a)}")
    regions = []
    for name, a, b in pairs:
        region = {"num_planes": a.shape[0] * a.shape[1] if a.dim() > 2 else 0}
        for side, tensor in (("source", a), ("target", b)):
            if tensor.device.type != launcher.device_type:
                raise ValueError(f"{op}: {name} is on {tensor.device}, not on {launcher.device_type}")
            size = tensor.element_size()
            # One stride for layers and for keys and values: then both are planes of one dimension.
            even = tensor.dim() >= 4 and tensor.shape[1] == 2 and tensor.stride(0) == 2 * tensor.stride(1)
            whole = tensor.dim() >= 4 and tensor[0, 0, 0].is_contiguous()
            block_bytes = tensor[0, 0, 0].numel() * size if even else 0
            strides = (tensor.stride(1) * size, tensor.stride(2) * size) if even else (1, 1)
            if not even or not whole or block_bytes % 16 or tensor.data_ptr() % 16 or any(s % 16 for s in strides):
                raise ValueError(
                    f"{op}: {name} is {describe(tensor)} with strides {tuple(tensor.stride())}, but [num_layers, 2, "
                    "num_blocks, ...] with contiguous blocks, evenly spaced planes and 16-byte alignment is needed"
                )
            region[f"{side}_plane_stride"], region[f"{side}_block_stride"] = strides
            region["block_vectors"] = block_bytes // 16
        if a.dtype != b.dtype or a.shape[:2] != b.shape[:2] or a.shape[3:] != b.shape[3:]:
            raise ValueError(f"{op}: {name} is {describe(a)} and {describe(b)}: blocks of different kinds")
        regions.append(region | {"source": a.data_ptr(), "target": b.data_ptr()})
    return regions


def _staging_planes(op: str, pool: Tensor, staging: Tensor, count: int) -> Tensor:
    """The staging buffer in the form of a pool."""
    wanted = tuple(pool.shape[:2] + pool.shape[3:])
    if staging.dim() < 2 or tuple(staging.shape[1:]) != wanted or staging.shape[0] < count:
        raise ValueError(f"{op}: staging is {describe(staging)}, but [{count} or more, {', '.join(map(str, wanted))}]")
    if not staging.is_contiguous():
        raise ValueError(f"{op}: staging is {describe(staging)}, but it must be contiguous")
    return staging.permute(1, 2, 0, *range(3, staging.dim()))


def _scale_planes(op: str, scales: Tensor | None, staging: Tensor | None, count: int) -> Tensor | None:
    if (scales is None) != (staging is None):
        raise ValueError(f"{op}: scales and scales_staging belong together, and only one of them is given")
    return None if scales is None or staging is None else _staging_planes(f"{op} scales", scales, staging, count)


def _check_list(what: str, blocks: Sequence[int], num_blocks: int, *, first: int, distinct: bool = False) -> None:
    strange = [block for block in blocks if not first <= block < num_blocks]
    if strange:
        raise ValueError(f"{what}: blocks {strange[:8]} are outside of {first} to {num_blocks - 1}")
    if distinct and len(set(blocks)) != len(blocks):
        twice = sorted({block for block in blocks if list(blocks).count(block) > 1})
        raise ValueError(f"{what}: blocks {twice[:8]} are named twice")
