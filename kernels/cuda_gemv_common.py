"""What the products of few rows with quantised weights share: scratch, the split of the columns, and checks."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_launch import Launcher

MAX_ROWS = 8
TILE_N = 16
THREADS = 256
WARPS = THREADS // 32
_MIN_TILES_PER_WARP = 2  # a split of less has no loads to overlap


class TiledWeight(Protocol):
    """W [n, k] as a kernel of gemv.cuh reads it: tiles of 16 rows by some columns."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def tiles(self) -> tuple[int, int]: ...


class GemvWorkspace(NamedTuple):
    """Scratch of the products whose columns are split over thread blocks; one stream at a time may use it.

    Attributes:
        partial: [size] float32.
        arrivals: [n_tiles] int32, zero between launches.
    """

    partial: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(cls, size: tuple[int, int], device: torch.device) -> "GemvWorkspace":
        """`size` is the largest `workspace_size` of the weights, part by part."""
        return cls(
            torch.empty(size[0], dtype=torch.float32, device=device),
            torch.zeros(size[1], dtype=torch.int32, device=device),
        )

    def holds(self, size: tuple[int, int]) -> bool:
        return self.partial.numel() >= size[0] and self.arrivals.numel() >= size[1]


def workspace_size(launcher: Launcher, weight: TiledWeight) -> tuple[int, int]:
    """Floats and counters that products with the weight need; (0, 0) if its columns are not split."""
    parts, n_tiles = splits(launcher, weight), weight.tiles[0]
    return (parts * n_tiles * TILE_N * MAX_ROWS, n_tiles) if parts > 1 else (0, 0)


def splits(launcher: Launcher, weight: TiledWeight) -> int:
    """Parts of the columns. From shape and device alone, so that a row's sums do not depend on the batch."""
    n_tiles, k_tiles = weight.tiles
    if n_tiles >= 2 * launcher.sm_count:  # a wave has three thread blocks on each
        return 1
    wanted = -(-2 * launcher.sm_count // n_tiles)
    return max(1, min(wanted, k_tiles // (WARPS * _MIN_TILES_PER_WARP)))


class Call(NamedTuple):
    """Result, scratch and grid of one product."""

    out: Tensor
    partial: Tensor | None
    arrivals: Tensor | None
    grid: tuple[int, int, int]
    split_tiles: int


def prepare(
    op: str,
    launcher: Launcher,
    x: Tensor,
    weight: TiledWeight,
    out: Tensor | None,
    workspace: GemvWorkspace | None,
) -> Call:
    """Checks x and what it is multiplied into, and makes what is missing.

    Raises:
        ValueError: a wrong shape, dtype or layout, or a workspace that is too small.
    """
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_ROWS or x.shape[1] != weight.k or x.dtype != weight.dtype:
        raise ValueError(f"{op}: x is {describe(x)}, but {weight.dtype} [1 to {MAX_ROWS}, {weight.k}] is needed")
    m = x.shape[0]
    if x.stride(1) != 1 or (m > 1 and x.stride(0) % 8) or x.data_ptr() % 16:
        raise ValueError(
            f"{op}: x has strides {x.stride()} at address {x.data_ptr():#x}, but neighbouring columns and rows at "
            "multiples of 16 bytes are needed"
        )
    if out is None:
        out = torch.empty(m, weight.n, dtype=weight.dtype, device=x.device)
    if out.shape != (m, weight.n) or out.dtype != weight.dtype or (weight.n > 1 and out.stride(1) != 1):
        raise ValueError(f"{op}: out is {describe(out)}, but {weight.dtype} [{m}, {weight.n}] is needed")
    needed = workspace_size(launcher, weight)
    if not any(needed):
        workspace = None
    elif workspace is None:
        workspace = GemvWorkspace.allocate(needed, x.device)
    elif not workspace.holds(needed):
        raise ValueError(
            f"{op}: the workspace has {workspace.partial.numel()} floats and {workspace.arrivals.numel()} "
            f"counters, but this weight needs {needed[0]} and {needed[1]}"
        )
    n_tiles, k_tiles = weight.tiles
    split_tiles = -(-k_tiles // splits(launcher, weight))
    grid = (n_tiles, -(-k_tiles // split_tiles), 1)  # no split without a tile
    partial, arrivals = (None, None) if workspace is None else workspace
    return Call(out, partial, arrivals, grid, split_tiles)


def fill(op: str, launcher: Launcher, device: torch.device, record: Any, tensors: Mapping[str, Tensor | None]) -> None:
    """Puts addresses into an argument record.

    Raises:
        ValueError: a tensor is elsewhere.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != launcher.device_type or tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the others on {device}, but all must be on one "
                             f"{launcher.device_type} device")  # fmt: skip
        record[name] = tensor.data_ptr()
