"""Copies of KV blocks on the host shim, against indexing in torch. Every byte of the pool is compared."""

from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.kernels.cuda_copy import MAX_MOVES, copy_blocks, gather_blocks, scatter_blocks
from shim.fence import fenced
from shim.launcher import ShimLauncher

# Bytes of a block: 16-byte vectors from one to more than a thread block's chunk.
SHAPES = [
    ((3, 2, 7, 2, 16, 64), torch.bfloat16, None),
    ((1, 2, 5, 1, 16, 1), torch.uint8, None),
    ((2, 2, 6, 5, 16, 80), torch.int8, (2, 2, 6, 5, 16)),
    ((1, 2, 4, 3, 16, 256), torch.float32, None),
]


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return fenced(raw.view(dtype))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def round_trip_case(launcher: ShimLauncher, shape: tuple[int, ...], dtype: torch.dtype, scales_shape: Any) -> None:
    """Copy, gather, scatter: each against torch on a twin."""
    tensors = [random_bytes(shape, dtype)]
    if scales_shape is not None:
        tensors.append(random_bytes(scales_shape, torch.float32))
    twins = [tensor.clone() for tensor in tensors]
    pool, scales = tensors[0], tensors[1] if len(tensors) == 2 else None
    source, target = [0, 2, 2], [3, 1, shape[2] - 1 if shape[2] > 4 else 1]
    source, target = (source, target) if shape[2] > 4 else (source[:2], target[:2])
    copy_blocks(launcher, pool, source, target, scales=scales, stream=0)
    for twin in twins:
        twin[:, :, target] = twin[:, :, source]
    assert all(same(a, b) for a, b in zip(tensors, twins, strict=True))

    blocks = [shape[2] - 1, 0, 2, 2]
    staged = [random_bytes((5, *t.shape[:2], *t.shape[3:]), t.dtype) for t in tensors]
    spare = [one[4].clone() for one in staged]
    more: dict[str, Any] = {} if scales is None else {"scales": scales, "scales_staging": staged[1]}
    gather_blocks(launcher, pool, blocks, staged[0], stream=0, **more)
    for one, twin, left in zip(staged, twins, spare, strict=True):
        assert same(one[:4], twin[:, :, blocks].permute(2, 0, 1, *range(3, twin.dim())))
        assert same(one[4], left)
    assert all(same(a, b) for a, b in zip(tensors, twins, strict=True))

    blocks = [1, shape[2] - 1]
    scatter_blocks(launcher, staged[0], pool, blocks, stream=0, **more)
    for one, twin in zip(staged, twins, strict=True):
        twin[:, :, blocks] = one[:2].permute(1, 2, 0, *range(3, one.dim()))
    assert all(same(a, b) for a, b in zip(tensors, twins, strict=True))


@pytest.mark.parametrize(("shape", "dtype", "scales_shape"), SHAPES)
def test_round_trip(launcher: ShimLauncher, shape: Any, dtype: torch.dtype, scales_shape: Any) -> None:
    round_trip_case(launcher, shape, dtype, scales_shape)


def test_long_lists(launcher: ShimLauncher) -> None:
    """More moves than a launch holds."""
    count = MAX_MOVES + 3
    pool = random_bytes((1, 2, 2 * count + 1, 1, 16, 1), torch.int8)
    twin = pool.clone()
    source, target = list(range(1, count + 1)), list(range(2 * count, count, -1))
    copy_blocks(launcher, pool, source, target, stream=0)
    twin[:, :, target] = twin[:, :, source]
    assert same(pool, twin)
    assert len(launcher.launches) == 2
    copy_blocks(launcher, pool, [], [], stream=0)
    assert len(launcher.launches) == 2


def test_padded_pool(launcher: ShimLauncher) -> None:
    """Planes of a pool that is a part of a larger allocation."""
    whole = random_bytes((2, 2, 9, 1, 16, 8), torch.bfloat16)
    twin = whole.clone()
    copy_blocks(launcher, whole[:, :, 2:8], [0, 5], [1, 2], stream=0)
    twin[:, :, [3, 4]] = twin[:, :, [2, 7]]
    assert same(whole, twin)


def test_refusals() -> None:
    launcher = ShimLauncher()
    pool = torch.zeros(2, 2, 4, 1, 16, 8)

    def refuses(match: str, *arguments: Any, call: Any = copy_blocks, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            call(launcher, *arguments, stream=0, **options)

    refuses("2 sources, but 1 targets", pool, [1, 2], [3])
    refuses("blocks \\[4\\] are outside of 0 to 3", pool, [4], [1])
    refuses("blocks \\[0\\] are outside of 1 to 3", pool, [1], [0])
    refuses("blocks \\[2\\] are named twice", pool, [1, 3], [2, 2])
    refuses("blocks \\[2\\] are source and target", pool, [1, 2], [2, 3])
    refuses("16-byte alignment", torch.zeros(1, 2, 4, 3, dtype=torch.int8), [1], [2])
    refuses("contiguous blocks", pool.transpose(3, 4)[..., :4], [1], [2])
    refuses("evenly spaced planes", pool[:, :1], [1], [2])
    refuses("pool is on meta", pool.to("meta"), [1], [2])
    refuses("scales are", pool, [1], [2], scales=torch.zeros(3, 2, 4, 1, 16))
    staging = torch.zeros(2, 2, 2, 1, 16, 8)
    refuses("\\[3 or more, 2, 2, 1, 16, 8\\]", pool, [1, 2, 3], staging, call=gather_blocks)
    refuses("must be contiguous", pool, [1], staging[:, :, :, :, ::1].transpose(1, 2), call=gather_blocks)
    refuses("blocks of different kinds", pool, [1], staging.int(), call=gather_blocks)
    refuses("belong together", pool, [1], staging, call=gather_blocks, scales=torch.zeros(2, 2, 4, 1, 16))
    refuses("blocks \\[0\\] are outside of 1", staging, pool, [0], call=scatter_blocks)
    refuses("blocks \\[3\\] are named twice", staging, pool, [3, 3], call=scatter_blocks)


BUGS = {
    "the tail of a block is left out": (
        "if (place < region.block_vectors) store16",
        "if (place + 1 < region.block_vectors) store16",
    ),
    "the end of a block is overrun": ("if (place < region.block_vectors) store16", "if (true) store16"),
    "the planes of the scales are counted from the pool's": ("- (second ? num_first : 0)", "- 0"),
    "the scales are forgotten": ("p.regions[second ? 1 : 0]", "p.regions[0]"),
    "strides of source and target are mixed up": (
        "plane * region.target_plane_stride",
        "plane * region.source_plane_stride",
    ),
    "the pairs are turned round": ("p.from[blockIdx.z] *", "p.to[blockIdx.z] *"),
}


def planted_case(launcher: ShimLauncher) -> None:
    for shape, dtype, scales_shape in SHAPES:
        round_trip_case(launcher, shape, dtype, scales_shape)


def test_planted_case_without_a_bug(four_ways: Any) -> None:
    four_ways(planted_case)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(planted: Any, name: str) -> None:
    planted({"copy.cu": [BUGS[name]]}, planted_case)
