"""Quantised products and widened weights on the host shim, against float64."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from millrace.kernels import ops
from millrace.kernels import reference_cuda_gemv as reference
from millrace.kernels.cuda_backend import CudaBackend
from millrace.kernels.cuda_compile import read_source
from millrace.kernels.cuda_gemv import PackedWeight, dequantise, gemv, kernels, lacks, pack, weight_kernels
from millrace.kernels.cuda_gemv_common import GemvWorkspace, splits, workspace_size
from millrace.kernels.cuda_linear import GEMV_ROWS
from millrace.kernels.quantized import QuantizedWeight
from millrace.kernels.torch_backend import TorchBackend
from shim.fence import fenced, nan_filled
from shim.launcher import ShimLauncher

pytestmark = (
    pytest.mark.slow
)  # tests/runtime/cuda drives the same kernels within models, and `make test-fast` runs that


class Shape(NamedTuple):
    bits: int
    group: int
    zeros: str
    m: int
    n: int
    k: int
    codebook: bool = False

    def weight(self) -> QuantizedWeight:
        _, group, zeros, _, n, k, codebook = self
        return reference.random_weight(n, k, self.bits, group, zeros, codebook)


# By the variant: bits, scales per tile, zero points or codebook.
SHAPES = {
    "8": Shape(8, 1024, "centre", 1, 48, 1024),
    "8, less than a tile": Shape(8, 40, "centre", 8, 5, 40),
    "8, a long row": Shape(8, 2080, "centre", 3, 17, 2080),
    "8-1": Shape(8, 32, "centre", 2, 33, 352),
    "8-1, half a tile": Shape(8, 128, "centre", 5, 16, 1152 - 128),
    "8-1, zeros": Shape(8, 64, "fractions", 8, 20, 576),
    "8-2": Shape(8, 16, "centre", 3, 40, 336),
    "8-2, zeros": Shape(8, 48, "fractions", 8, 23, 336),
    "4-1": Shape(4, 128, "centre", 6, 65, 1024),
    "4-1, half a tile": Shape(4, 96, "centre", 4, 16, 96 * 3),
    "4-1, zeros": Shape(4, 64, "fractions", 7, 31, 2944),
    "4-1, zeros of a row": Shape(4, 4160, "integers", 1, 20, 4160),
    "4-2": Shape(4, 32, "centre", 2, 40, 1056),
    "4-2, zeros": Shape(4, 32, "fractions", 8, 23, 352),
    "4-4": Shape(4, 16, "centre", 5, 17, 208),
    "4-4, zeros": Shape(4, 16, "fractions", 8, 33, 336),
    "codes": Shape(4, 64, "centre", 3, 33, 704, True),
    "codes, 2": Shape(4, 32, "centre", 8, 16, 352, True),
}


def make(shape: Shape, dtype: torch.dtype, bias: bool = True) -> tuple[PackedWeight, Tensor]:
    """The packed weight, fenced, and the same as float64 [n, k]."""
    weight = shape.weight()
    packed = pack(weight, torch.randn(shape.n) * 50 if bias else None, dtype)
    held = {name: fenced(value) for name, value in vars(packed).items() if isinstance(value, Tensor)}
    return PackedWeight(**{**vars(packed), **held}), reference.widened(weight)


def gemv_case(launcher: ShimLauncher, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
    packed, weight = make(shape, dtype)
    # Rows apart, with NaN between them; x is scaled so that float16 holds the sums.
    held = torch.full((shape.m, shape.k + 24), torch.nan, dtype=dtype)
    held[:, : shape.k] = torch.randn(shape.m, shape.k) / 64
    x = fenced(held)[:, : shape.k]
    room = nan_filled(shape.m, shape.n + 3, dtype=dtype)
    workspace = GemvWorkspace.allocate(workspace_size(launcher, packed), torch.device("cpu"))
    workspace = GemvWorkspace(nan_filled(*workspace.partial.shape, dtype=torch.float32), fenced(workspace.arrivals))
    y = gemv(launcher, x, packed, out=room[:, : shape.n], workspace=workspace, stream=0)
    wanted = reference.gemv(x, weight, packed.bias)
    size = wanted.abs().mean()
    torch.testing.assert_close(
        y.double(), wanted, rtol=2e-3 if dtype == torch.float16 else 8e-3, atol=float(size) * 1e-3
    )
    assert bool(room[:, shape.n :].isnan().all()), "columns behind y were written"
    assert not bool(workspace.arrivals.any()), "the counters were not put back"
    again = gemv(launcher, x, packed, stream=0)
    assert torch.equal(again, y), "a second run has other bits"


def dequantise_case(launcher: ShimLauncher, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
    """Each weight is the float64 one, rounded once."""
    packed, weight = make(shape, dtype)
    step = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    tokens = fenced(torch.randint(0, shape.n, (5,)))
    for rows, wanted in ((range(shape.n), weight), (range(16, shape.n), weight[16:]), (tokens, weight[tokens])):
        if not len(wanted):
            continue
        out = nan_filled(*wanted.shape, dtype=dtype)
        dequantise(launcher, packed, rows, out=out, stream=0)
        torch.testing.assert_close(out.double(), wanted, rtol=1.01 * step, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_products_and_widened_rows(launcher: ShimLauncher, name: str) -> None:
    gemv_case(launcher, SHAPES[name])
    dequantise_case(launcher, SHAPES[name])


@pytest.mark.parametrize("name", ["8, a long row", "8-1", "8-2, zeros", "4-1, zeros", "4-2", "codes"])
def test_float16(launcher: ShimLauncher, name: str) -> None:
    gemv_case(launcher, SHAPES[name], torch.float16)
    dequantise_case(launcher, SHAPES[name], torch.float16)


def test_the_shapes_are_all_variants() -> None:
    of_shapes = {weight_kernels(pack(shape.weight(), None, torch.bfloat16)) for shape in SHAPES.values()}
    assert {kernel for pair in of_shapes for kernel in pair} == {
        kernel for kernel in kernels() if ("MR_T", "bf16") in kernel.defines
    }


def test_every_integer(launcher: ShimLauncher) -> None:
    """All weights, codes and whole zero points are exact in both types: one column at a time."""
    x = torch.zeros(8, 16).fill_diagonal_(1.0)
    eight = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 16)
    four = torch.arange(16, dtype=torch.uint8).repeat(16).view(256, 1).repeat(1, 16)
    ones = torch.ones(256, 1).half()
    zeros = torch.arange(16.0).repeat_interleave(16).view(256, 1).half()
    codes = torch.tensor([-128, -127, -101, -64, -33, -7, -1, 0, 1, 2, 14, 31, 63, 90, 126, 127], dtype=torch.int8)
    weights = [
        QuantizedWeight(eight, ones, torch.full_like(ones, 128), 8),
        QuantizedWeight(eight, ones, zeros * 16 + 15, 8),
        QuantizedWeight(four, ones, torch.full_like(ones, 8), 4),
        QuantizedWeight(four, ones, zeros, 4),
        QuantizedWeight(four.repeat(1, 4), ones, torch.zeros_like(ones), 4, codes),
    ]
    for dtype in (torch.bfloat16, torch.float16):
        for weight in weights:
            packed = pack(weight, None, dtype)
            inputs = torch.nn.functional.pad(x, (0, packed.k - 16)).to(dtype)
            wanted = weight.widen()
            assert torch.equal(gemv(launcher, inputs, packed, stream=0).float(), wanted[:, :8].T.to(dtype).float())
            assert torch.equal(dequantise(launcher, packed, range(256), stream=0), wanted.to(dtype))


def test_rows_do_not_depend_on_the_batch(launcher: ShimLauncher) -> None:
    for name in ("8, a long row", "4-1, zeros of a row"):
        packed, _ = make(SHAPES[name], torch.bfloat16)
        assert splits(launcher, packed) > 1
        x = torch.randn(8, packed.k).bfloat16()
        whole = gemv(launcher, x, packed, stream=0)
        for rows in (slice(0, 1), slice(7, 8), slice(2, 5)):
            assert torch.equal(gemv(launcher, x[rows].contiguous(), packed, stream=0), whole[rows])


def test_integers_of_fewer_bits_need_no_zero_points(shim_cache: Path) -> None:
    """What 5 or 6 bits in 8, or 3 in 4, have as their one zero point is shifted away."""
    for bits, stored, zero in ((6, 8, 32), (5, 8, 16), (3, 4, 4)):
        weight = reference.random_weight(16, 64, stored, 16, "centre")
        weight = weight._replace(q=weight.q % (1 << bits), zeros=torch.full_like(weight.zeros, zero))
        packed = pack(weight, None, torch.bfloat16)
        assert not packed.has_zeros
        wide = dequantise(ShimLauncher(cache_dir=shim_cache), packed, range(16), stream=0)
        torch.testing.assert_close(wide.double(), reference.widened(weight), rtol=4e-3, atol=0)
    full = reference.random_weight(16, 64, 4, 16, "centre")
    assert pack(full._replace(zeros=full.zeros - 1), None, torch.bfloat16).has_zeros  # 15 has no room above


# ---- the backend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["8", "4-1, zeros", "4-2", "codes"])
def test_the_backend_multiplies_any_batch(name: str, shim_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the integers for few rows, by widened slices for many, with the inputs in the order of the columns."""
    monkeypatch.setattr("millrace.kernels.cuda_linear.SLICE_BYTES", 1)  # sixteen rows a slice
    launcher = ShimLauncher(cache_dir=shim_cache)
    weight = SHAPES[name]._replace(n=40).weight()
    order, bias = torch.randperm(weight.q.shape[1]), torch.randn(40)
    weight = weight._replace(order=order)
    backend = CudaBackend(launcher, lambda: 0, max_seqs=1)
    packed = ops.pack_quantized(weight, bias, activation=torch.bfloat16, backends=(backend,))
    assert backend.quantized_kernels
    wide = torch.empty(40, len(order), dtype=torch.float64)
    wide[:, order] = reference.widened(weight)
    most = GEMV_ROWS[weight.bits]
    for rows in (0, 1, 9, most, most + 1):
        x = (torch.randn(rows, len(order)) / 16).bfloat16()
        launcher.launches.clear()
        y = packed(x)
        assert {kernel.name for kernel in launcher.launches} == (
            set() if not rows else {"mr_gemv"} if rows <= most else {"mr_dequantise"}
        )
        wanted = reference.gemv(x, wide, bias)
        assert (y.double() - wanted).norm() <= 5e-3 * wanted.norm()
    tokens = torch.tensor([39, 0, 17, 0])
    torch.testing.assert_close(packed.row_lookup(tokens).double(), wide[tokens], rtol=4e-3, atol=1e-6)


def test_each_stream_has_its_own_scratch() -> None:
    backend = CudaBackend(ShimLauncher(sm_count=16), lambda: 1, max_seqs=1)
    packed: Any = ops.pack_quantized(SHAPES["8, a long row"].weight(), activation=torch.bfloat16, backends=(backend,))
    products = packed._products
    first = products.workspace(1, torch.device("cpu"))
    assert products.workspace(1, torch.device("cpu")) is first
    assert products.workspace(2, torch.device("cpu")).partial.data_ptr() != first.partial.data_ptr()
    long = Shape(8, 8192, "centre", 1, 17, 8192).weight()
    ops.pack_quantized(long, activation=torch.bfloat16, backends=(backend,))
    larger = products.workspace(1, torch.device("cpu"))
    assert larger.partial.numel() > first.partial.numel()
    assert first in products._workspaces[1]  # a graph may know its address


def test_what_the_kernels_lack_is_left_to_torch() -> None:
    backend = CudaBackend(ShimLauncher(), lambda: 0, max_seqs=1)
    good = reference.random_weight(16, 96, 4, 32, codebook=True)
    cases = [
        (reference.random_weight(16, 96, 8, 24), "groups of 24 of 96 inputs"),
        (reference.random_weight(16, 20, 8, 20, "centre"), "groups of 20 of 20 inputs"),
        (good, "no codebook with zero points"),
        (reference.random_weight(16, 96, 4, 48, "centre", True), "nor with groups of 48"),
    ]
    for weight, reason in cases:
        assert reason in lacks(weight, torch.bfloat16)
        with pytest.raises(ops.UnservedError, match=reason):
            ops.pack_quantized(weight, activation=torch.bfloat16, backends=(backend,))
        served = ops.pack_quantized(weight, activation=torch.bfloat16, backends=(backend, TorchBackend()))
        x = torch.randn(2, weight.q.shape[1]).bfloat16()
        wanted = reference.gemv(x, reference.widened(weight))
        torch.testing.assert_close(served(x).double(), wanted, rtol=2e-2, atol=float(wanted.abs().mean()) * 0.05)
    with pytest.raises(ops.UnservedError, match=r"not of torch\.float32"):
        ops.pack_quantized(SHAPES["8"].weight(), backends=(backend,))


def test_refusals() -> None:
    launcher = ShimLauncher()
    weight = SHAPES["8"].weight()
    with pytest.raises(ValueError, match=r"products with integers are of bfloat16"):
        pack(weight, None, torch.float32)
    with pytest.raises(ValueError, match="bias is"):
        pack(weight, torch.zeros(15), torch.bfloat16)
    packed = pack(Shape(8, 64, "centre", 1, 16, 64).weight(), None, torch.bfloat16)
    assert packed.nbytes == 16 * 64 + 16 * 4

    def refuses(match: str, x: Tensor, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            gemv(launcher, x, options.pop("packed", packed), stream=0, **options)

    x = torch.zeros(2, 64).bfloat16()
    refuses(r"\[9, 64\]", torch.zeros(9, 64).bfloat16())
    refuses("float32", x.float())
    refuses(r"\[2, 56\]", x[:, :56])
    refuses("strides", torch.zeros(2, 65).bfloat16()[:, 1:])
    refuses("strides", torch.zeros(64, 2).bfloat16().t())
    refuses("out is", x, out=torch.zeros(2, 15).bfloat16())
    refuses("on meta", x.to("meta"))
    long = pack(Shape(8, 4096, "centre", 1, 16, 4096).weight(), None, torch.bfloat16)
    small = GemvWorkspace(torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    refuses("workspace has 1 floats", torch.zeros(1, 4096).bfloat16(), packed=long, workspace=small)
    for rows, match in ((range(8, 16), "multiple of 16"), (range(17), "at most 16"), (torch.zeros(2), "int64")):
        with pytest.raises(ValueError, match=match):
            dequantise(launcher, packed, rows, stream=0)
    with pytest.raises(ValueError, match="out is"):
        dequantise(launcher, packed, range(16), out=torch.zeros(16, 32).bfloat16(), stream=0)
    for tokens in ([], [-1, 16]):  # rows that are not there are left alone
        left = torch.full((len(tokens), 64), 7.0).bfloat16()
        dequantise(launcher, packed, torch.tensor(tokens, dtype=torch.int64), out=left, stream=0)
        assert bool((left == 7).all())


# What is changed, and the shape that shows it.
BUGS = {
    "the zero point of the other row": (
        "of_weights[i] - by.zero[i / 2] * of_ones[i % 2]",
        "of_weights[i] - by.zero[0] * of_ones[i % 2]",
        "4-2, zeros",
    ),
    "the sum of the other row of x": (
        "of_weights[i] - by.zero[i / 2] * of_ones[i % 2]",
        "of_weights[i] - by.zero[i / 2] * of_ones[0]",
        "4-2, zeros",
    ),
    "the zero point is not moved with the integers": ("zero[1] -= CENTER;", "", "8-1, zeros"),
    "the scale of the other group": (
        "part.scale_into(sums, tile, half);",
        "part.scale_into(sums, tile, 0);",
        "4-2",
    ),
    "a group's sum goes on": (
        "part.scale_into(sums, tile, half);\n            part = Part();",
        "part.scale_into(sums, tile, half);",
        "4-2",
    ),
    "x is read behind its end": ("if (column < columns) v = load16", "if (columns > 0) v = load16", "4-2"),
    "x of narrow groups is read behind its end": ("if (column + 16 * i < columns)", "if (column < columns)", "4-4"),
    "nibbles are not shifted": ("words[2 * half + i] >> 4 * j &", "words[2 * half + i] >> 8 * (j / 2) &", "4-2"),
    "the upper half of the codebook": ("(nibbles & 0x8888u) >> 1", "(nibbles & 0x8880u) >> 1", "codes"),
    "the splits are not waited for": ("== gridDim.y - 1;", "== gridDim.y - 2;", "4-1, zeros of a row"),
    "the counters are not put back": ("if (is_last) arrivals[blockIdx.x] = 0u;", "", "4-1, zeros of a row"),
    "no barrier before the warps are added up": ("= sums[3];\n    __syncthreads();", "= sums[3];", "8-1"),
    "a token's row in the upper half": ("place / 8 != upper", "place / 8 != 0", "4-2"),
    "columns behind the last are written": (
        "if (column < p.w.k) store16(to",
        "if (column < p.w.k_tiles * TILE_K) store16(to",
        "4-2, zeros",
    ),
}


def planted_case(name: str, launcher: ShimLauncher) -> None:
    gemv_case(launcher, SHAPES[name])
    dequantise_case(launcher, SHAPES[name])


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(planted: Any, name: str) -> None:
    before, after, shape = BUGS[name]
    file = "gemv.cuh" if before in read_source("gemv.cuh") else "gemv.cu"
    planted({file: [(before, after)]}, partial(planted_case, shape))
