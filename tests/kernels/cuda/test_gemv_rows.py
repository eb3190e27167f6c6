"""8-bit weights that lie row by row, and products of 8 bits by 8 bits, on the host shim, against float64."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from millrace.kernels import cuda_rounded, ops
from millrace.kernels import reference_cuda_gemv as reference
from millrace.kernels.cuda_backend import CudaBackend
from millrace.kernels.cuda_gemv_common import GemvWorkspace, splits, workspace_size
from millrace.kernels.cuda_gemv_rows import (
    RowsWeight,
    gemv,
    kernels,
    lacks,
    pack_float8,
    pack_integers,
    weight_kernels,
    widen,
)
from millrace.kernels.cuda_linear import GEMV_ROWS
from millrace.kernels.quantized import Float8Weight, QuantizedWeight
from millrace.kernels.torch_backend import TorchBackend
from shim.fence import fenced, nan_filled
from shim.launcher import ShimLauncher

pytestmark = (
    pytest.mark.slow
)  # tests/runtime/cuda drives the same kernels within models, and `make test-fast` runs that

BF16, F16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def float8(n: int, k: int, group: int | None = None, is_w8a8: bool = False) -> Float8Weight:
    """Any codes but NaN, subnormals among them."""
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    codes = torch.where(codes & 127 == 127, codes - 1, codes)
    size = k if group is None else group
    return Float8Weight(codes.view(FP8), torch.rand(n, -(-k // size)) * 0.01 + 0.002, size, is_w8a8)


def integers(n: int, k: int, is_w8a8: bool = False) -> QuantizedWeight:
    return reference.random_weight(n, k, 8, k, "centre")._replace(is_w8a8=is_w8a8)


class Shape(NamedTuple):
    m: int
    n: int
    k: int
    group: int | None = None
    is_integer: bool = False

    def weight(self, is_w8a8: bool = False) -> Float8Weight | QuantizedWeight:
        if self.is_integer:
            return integers(self.n, self.k, is_w8a8)
        return float8(self.n, self.k, self.group, is_w8a8)


SHAPES = {
    "fp8": Shape(1, 48, 1024),
    "fp8, less than a tile": Shape(8, 5, 40),
    "fp8, a long row": Shape(3, 17, 2104),
    "fp8, whole matrix": Shape(2, 16, 64, 200),
    "fp8, blocks": Shape(5, 33, 1024, 128),
    "fp8, blocks, the last one short": Shape(8, 20, 456, 128),
    "fp8, blocks of 192": Shape(2, 16, 2496, 192),
    "int8": Shape(4, 40, 352, None, True),
    "int8, a long row": Shape(8, 20, 2056, None, True),
}


def make(shape: Shape, dtype: torch.dtype, bias: bool = True) -> tuple[RowsWeight, Tensor]:
    """The packed weight, fenced, and the same as float64 [n, k]."""
    weight, added = shape.weight(), torch.randn(shape.n) * 5 if bias else None
    if isinstance(weight, Float8Weight):
        packed = pack_float8(weight, added, dtype)
    else:
        packed = pack_integers(weight, added, dtype)
    bytes_of = packed.codes.view(torch.uint8)
    held = {
        name: fenced(value) for name, value in vars(packed).items() if isinstance(value, Tensor) and name != "codes"
    }
    codes = fenced(bytes_of).view(packed.codes.dtype)
    return RowsWeight(**{**vars(packed), **held, "codes": codes}), weight.widen().double()


def gemv_case(launcher: ShimLauncher, shape: Shape, dtype: torch.dtype = BF16) -> None:
    packed, weight = make(shape, dtype)
    # Rows apart, with NaN between them.
    held = torch.full((shape.m, shape.k + 24), torch.nan, dtype=dtype)
    held[:, : shape.k] = torch.randn(shape.m, shape.k) / 64
    x = fenced(held)[:, : shape.k]
    room = nan_filled(shape.m, shape.n + 3, dtype=dtype)
    workspace = GemvWorkspace.allocate(workspace_size(launcher, packed), torch.device("cpu"))
    workspace = GemvWorkspace(nan_filled(*workspace.partial.shape, dtype=torch.float32), fenced(workspace.arrivals))
    y = gemv(launcher, x, packed, out=room[:, : shape.n], workspace=workspace, stream=0)
    wanted = reference.gemv(x, weight, packed.bias)
    size = float(wanted.abs().mean())
    torch.testing.assert_close(y.double(), wanted, rtol=2e-3 if dtype == F16 else 8e-3, atol=size * 1e-3)
    assert bool(room[:, shape.n :].isnan().all()), "columns behind y were written"
    assert not bool(workspace.arrivals.any()), "the counters were not put back"
    assert torch.equal(gemv(launcher, x, packed, stream=0), y), "a second run has other bits"


def widen_case(launcher: ShimLauncher, shape: Shape, dtype: torch.dtype = BF16) -> None:
    """Each weight is the float64 one, rounded once."""
    packed, weight = make(shape, dtype)
    step = 2.0 ** (-8 if dtype == BF16 else -11)
    tokens = fenced(torch.randint(0, shape.n, (5,)))
    for rows, wanted in ((range(shape.n), weight), (range(3, shape.n), weight[3:]), (tokens, weight[tokens])):
        out = nan_filled(*wanted.shape, dtype=dtype)
        widen(launcher, packed, rows, out=out, stream=0)
        torch.testing.assert_close(out.double(), wanted, rtol=1.01 * step, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_products_and_widened_rows(four_ways: Callable[[Any], None], name: str) -> None:
    for dtype in (BF16, F16):
        four_ways(partial(gemv_case, shape=SHAPES[name], dtype=dtype))
        four_ways(partial(widen_case, shape=SHAPES[name], dtype=dtype))


def test_the_shapes_are_all_variants() -> None:
    of_shapes = {kernel for shape in SHAPES.values() for kernel in weight_kernels(make(shape, BF16)[0])}
    assert of_shapes == {kernel for kernel in kernels() if ("MR_T", "bf16") in kernel.defines}


def test_every_code_is_exact(shim_cache: Path) -> None:
    launcher, x = ShimLauncher(cache_dir=shim_cache), torch.zeros(8, 16).fill_diagonal_(1.0)
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    of_floats = codes.view(-1, 1).repeat(1, 16).view(FP8)
    of_integers = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 16)
    for dtype in (BF16, F16):
        for packed, wanted in (
            (pack_float8(Float8Weight(of_floats, torch.ones(254, 1), 16), None, dtype), of_floats.float()),
            (
                pack_integers(
                    QuantizedWeight(of_integers, torch.ones(256, 1).half(), torch.full((256, 1), 128.0).half(), 8),
                    None, dtype,
                ),
                of_integers.float() - 128,
            ),
        ):  # fmt: skip
            assert torch.equal(gemv(launcher, x.to(dtype), packed, stream=0).float(), wanted[:, :8].T)
            assert torch.equal(widen(launcher, packed, range(packed.n), stream=0).float(), wanted)


def test_rows_do_not_depend_on_the_batch(shim_cache: Path) -> None:
    launcher = ShimLauncher(cache_dir=shim_cache)
    packed, _ = make(SHAPES["fp8, a long row"], BF16)
    assert splits(launcher, packed) > 1
    x = torch.randn(8, packed.k).bfloat16()
    whole = gemv(launcher, x, packed, stream=0)
    for rows in (slice(0, 1), slice(7, 8), slice(2, 5)):
        assert torch.equal(gemv(launcher, x[rows].contiguous(), packed, stream=0), whole[rows])


# ---- rounded activations ----------------------------------------------------------------------------------------


def rounding_case(launcher: ShimLauncher, codes: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.randn(5, 2 * 2048 + 8).to(dtype)
    x[1] *= 1e-3
    x[2] = 0
    x[3, 77] = 60.0
    found, scales = cuda_rounded.round_rows(launcher, fenced(x), codes, stream=0)
    limit = 448 if codes == FP8 else 127
    torch.testing.assert_close(scales, x.float().abs().amax(1) / limit)
    scaled = torch.where(scales[:, None] > 0, x.float() / scales[:, None], 0.0)
    wanted = scaled.to(FP8).float() if codes == FP8 else scaled.round()
    # A quotient on the border between two codes may come out as either.
    steps = (found.float() - wanted).abs()
    assert bool((steps <= (wanted.abs() / 8 if codes == FP8 else torch.ones(()))).all())
    assert int((steps > 0).sum()) <= steps.numel() // 500


@pytest.mark.parametrize("codes", [FP8, torch.int8])
def test_rows_are_rounded(four_ways: Callable[[Any], None], codes: torch.dtype) -> None:
    for dtype in (BF16, F16):
        four_ways(partial(rounding_case, codes=codes, dtype=dtype))


@pytest.mark.parametrize("codes", [FP8, torch.int8])
def test_what_is_not_finite_spoils_its_row_alone(codes: torch.dtype, shim_cache: Path) -> None:
    x = torch.ones(3, 16).bfloat16()
    x[0, 3], x[2, 9] = torch.nan, torch.inf
    _, scales = cuda_rounded.round_rows(ShimLauncher(cache_dir=shim_cache), x, codes, stream=0)
    assert scales.isfinite().tolist() == [False, True, False]


def scaling_case(launcher: ShimLauncher, dtype: torch.dtype) -> None:
    """Any sums, in slices of the columns."""
    packed = pack_integers(integers(48, 32), torch.randn(48), dtype)
    sums = torch.randint(-(1 << 30), 1 << 30, (3, 48), dtype=torch.int32)
    scales, room = torch.rand(3) * 1e-8, nan_filled(3, 48, dtype=dtype)
    for start, stop in ((0, 32), (32, 48)):
        part = fenced(sums[:, start:stop])
        cuda_rounded.scale_sums(launcher, part, fenced(scales), packed, slice(start, stop), room, stream=0)
    assert packed.bias is not None
    wanted = sums.double() * scales[:, None].double() * packed.scales.double() + packed.bias.double()
    torch.testing.assert_close(room.double(), wanted, rtol=1e-2, atol=1e-2)


def test_sums_are_scaled(four_ways: Callable[[Any], None]) -> None:
    for dtype in (BF16, F16):
        four_ways(partial(scaling_case, dtype=dtype))


# ---- the backend ------------------------------------------------------------------------------------------------


def packed_by(backend: CudaBackend, weight: Float8Weight | QuantizedWeight, bias: Tensor | None = None) -> Any:
    pack: Any = ops.pack_float8 if isinstance(weight, Float8Weight) else ops.pack_quantized
    return pack(weight, bias, activation=BF16, backends=(backend,))


def rounded(x: Tensor, weight: Float8Weight | QuantizedWeight) -> Tensor:
    """x as products of 8 bits see it, float64."""
    limit = 448.0 if isinstance(weight, Float8Weight) else 127.0
    scales = x.float().abs().amax(1, keepdim=True) / limit
    scaled = x.float() / scales
    return (scaled.to(FP8).double() if isinstance(weight, Float8Weight) else scaled.round().double()) * scales.double()


CASES = {"fp8": (float8, "mr_round_rows"), "int8": (integers, "mr_scale_sums")}


@pytest.mark.parametrize("kind", CASES)
def test_many_rows_are_rounded_where_the_weight_says_so(
    kind: str, shim_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own products of 8 bits, which there are on a CPU too."""
    monkeypatch.setattr("millrace.kernels.cuda_rounded.SUMS_BYTES", 1)  # sixteen columns at a time
    launcher = ShimLauncher(cache_dir=shim_cache)
    backend = CudaBackend(launcher, lambda: 0, max_seqs=1)
    weight, bias, last = CASES[kind][0](48, 96, is_w8a8=True), torch.randn(48), CASES[kind][1]
    wide = weight.widen().double()
    for added in (None, bias):
        packed = packed_by(backend, weight, added)
        for rows in (0, 1, 9, 16, 17, 40):
            x = torch.randn(rows, 96).bfloat16()
            launcher.launches.clear()
            y = packed(x)
            names = {kernel.name for kernel in launcher.launches}
            assert names == (set() if not rows else {"mr_gemv_rows"} if rows <= 16 else {"mr_round_rows", last})
            wanted = reference.gemv((rounded(x, weight) if rows > 16 else x.double()).double(), wide)
            wanted = wanted if added is None else wanted + added.bfloat16().double()
            assert (y.double() - wanted).norm() <= 5e-3 * wanted.norm()
    tokens = torch.tensor([47, 0, 17, 0])
    torch.testing.assert_close(packed.row_lookup(tokens).double(), wide[tokens], rtol=4e-3, atol=1e-6)
    assert {kernel.name for kernel in backend.quantized_kernels} == {
        "mr_gemv_rows", "mr_widen_rows", "mr_round_rows", last,
    }  # fmt: skip
    assert packed.weight_bytes == 48 * 96 + 48 * 4 + 48 * 2


@pytest.mark.parametrize("why", ["unmarked", "blocks", "no such product", "sizes"])
def test_other_weights_of_8_bits_are_widened(why: str, shim_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.kernels.cuda_linear.SLICE_BYTES", 1)  # sixteen rows a slice
    if why == "no such product":
        monkeypatch.setattr(cuda_rounded, "_torch_multiplies", lambda *_: False)
    launcher = ShimLauncher(cache_dir=shim_cache)
    backend = CudaBackend(launcher, lambda: 0, max_seqs=1)
    n = 40 if why == "sizes" else 48
    weight, bias = float8(n, 200, 64 if why == "blocks" else None, why != "unmarked"), torch.randn(n)
    packed = packed_by(backend, weight, bias)
    wide = weight.widen().double()
    for rows in (16, GEMV_ROWS[8] + 1):
        x = torch.randn(rows, 200).bfloat16()
        launcher.launches.clear()
        y = packed(x)
        assert {kernel.name for kernel in launcher.launches} == {"mr_gemv_rows" if rows == 16 else "mr_widen_rows"}
        wanted = reference.gemv(x, wide, bias)
        assert (y.double() - wanted).norm() <= 5e-3 * wanted.norm()
    assert {kernel.name for kernel in backend.quantized_kernels} == {"mr_gemv_rows", "mr_widen_rows"}


def test_a_product_that_torch_lacks_or_computes_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    probe: Any = cuda_rounded._torch_multiplies.__wrapped__
    where = torch.device("cpu")
    assert probe(where, FP8, BF16, True) and probe(where, FP8, F16, False) and probe(where, torch.int8, BF16, True)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    real: Any = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert not probe(where, FP8, BF16, True)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **options: real(*args, **options).mul_(2))
    assert not probe(where, FP8, BF16, True)


def test_integers_of_other_kinds_keep_their_layout() -> None:
    """Only symmetric integers with one scale for each output have products of 8 bits."""
    backend = CudaBackend(ShimLauncher(), lambda: 0, max_seqs=1)
    good = integers(32, 64, is_w8a8=True)
    cases = [
        good._replace(is_w8a8=False),
        good._replace(zeros=good.zeros + 1),
        good._replace(order=torch.randperm(64)),
        reference.random_weight(32, 64, 8, 32, "centre")._replace(is_w8a8=True),
        reference.random_weight(32, 64, 4, 64, "centre")._replace(is_w8a8=True),
    ]
    assert packed_by(backend, good).dtype == torch.int8
    for weight in cases:
        assert packed_by(backend, weight).dtype == torch.uint8


def test_what_the_kernels_lack_is_left_to_torch() -> None:
    backend = CudaBackend(ShimLauncher(), lambda: 0, max_seqs=1)
    for weight, reason in ((float8(16, 96, 32), "groups of 32 of 96 inputs"), (float8(16, 20), "20 inputs are no")):
        assert reason in lacks(weight, BF16)
        with pytest.raises(ops.UnservedError, match=reason):
            packed_by(backend, weight)
        served = ops.pack_float8(weight, activation=BF16, backends=(backend, TorchBackend()))
        x = torch.randn(2, weight.codes.shape[1]).bfloat16()
        wanted = reference.gemv(x, weight.widen().double())
        torch.testing.assert_close(served(x).double(), wanted, rtol=2e-2, atol=float(wanted.abs().mean()) * 0.05)
    with pytest.raises(ops.UnservedError, match=r"not of torch\.float32"):
        ops.pack_float8(float8(16, 64), backends=(backend,))


def test_refusals() -> None:
    launcher = ShimLauncher()
    with pytest.raises(ValueError, match="no multiple of 8"):
        pack_float8(float8(16, 20), None, BF16)
    with pytest.raises(ValueError, match="bias is"):
        pack_float8(float8(16, 64), torch.zeros(15), BF16)
    with pytest.raises(ValueError, match="symmetric integers"):
        pack_integers(reference.random_weight(16, 64, 8, 32, "centre"), None, BF16)
    packed = pack_float8(float8(16, 64), None, BF16)
    x = torch.zeros(2, 64).bfloat16()
    for wrong, match in ((x.float(), "float32"), (torch.zeros(9, 64).bfloat16(), r"\[9, 64\]"), (x.to("meta"), "meta")):
        with pytest.raises(ValueError, match=match):
            gemv(launcher, wrong, packed, stream=0)
    for rows, match in ((range(17), "some of 0 to 16"), (range(0, 4, 2), "step 1"), (torch.zeros(2), "int64")):
        with pytest.raises(ValueError, match=match):
            widen(launcher, packed, rows, stream=0)
    with pytest.raises(ValueError, match="out is"):
        widen(launcher, packed, range(16), out=torch.zeros(16, 32).bfloat16(), stream=0)
    with pytest.raises(ValueError, match="a multiple of 8"):
        cuda_rounded.round_rows(launcher, torch.zeros(2, 20).bfloat16(), FP8, stream=0)
    with pytest.raises(ValueError, match="on meta"):
        cuda_rounded.round_rows(launcher, x.to("meta"), FP8, stream=0)
    for tokens in ([], [-1, 16]):  # rows that are not there are left alone
        left = torch.full((len(tokens), 64), 7.0).bfloat16()
        widen(launcher, packed, torch.tensor(tokens, dtype=torch.int64), out=left, stream=0)
        assert bool((left == 7).all())


# What is changed in which file, and the case that shows it.
BUGS: dict[str, tuple[str, str, str, Callable[[ShimLauncher], None]]] = {
    "x keeps its order": ("gemv_rows.cu", "0x5410u)", "0x3210u)", partial(gemv_case, shape=SHAPES["fp8"])),
    "x is read behind its end": (
        "gemv_rows.cu", "if (column < columns) v = load16", "if (columns > 0) v = load16",
        partial(gemv_case, shape=SHAPES["fp8, less than a tile"]),
    ),
    "codes are read behind their end": (
        "gemv_rows.cu", "if (k_tile * TILE_K < from.columns)", "if (true)",
        partial(gemv_case, shape=SHAPES["fp8, less than a tile"]),
    ),
    "rows are read behind the last": (
        "gemv_rows.cu", "lane / 4 + 8 * i, w.n - 1)", "lane / 4 + 8 * i, w.n + 15)",
        partial(gemv_case, shape=SHAPES["fp8, less than a tile"]),
    ),
    "the scale of the other row": (
        "gemv_rows.cu", "tile.scales[i / 2]", "tile.scales[0]", partial(gemv_case, shape=SHAPES["fp8, blocks"]),
    ),
    "the scale of the first group": (
        "gemv_rows.cu", "static_cast<i64>(k_tile >> w.group_shift) * w.n]", "0]",
        partial(gemv_case, shape=SHAPES["fp8, blocks"]),
    ),
    "widened by the first group's scale": (
        "gemv_rows.cu", "static_cast<i64>(column / TILE_K >> p.w.group_shift)", "0",
        partial(widen_case, shape=SHAPES["fp8, blocks"]),
    ),
    "columns behind the last are widened": (
        "gemv_rows.cu", "if (column + 8 < p.w.k) store16", "store16",
        partial(widen_case, shape=SHAPES["fp8, a long row"]),
    ),
    "the largest of the first warp": (
        "round_rows.cu", "bits = max(bits, of_warp[warp]);", "bits = of_warp[0];",
        partial(rounding_case, codes=torch.int8, dtype=BF16),
    ),
    "no barrier before the warps' largest": (
        "round_rows.cu", "= bits;\n    __syncthreads();", "= bits;", partial(rounding_case, codes=FP8, dtype=BF16),
    ),
    "the bias is left out": (
        "round_rows.cu", "if (p.bias != nullptr) load_vec(bias", "if (false) load_vec(bias",
        partial(scaling_case, dtype=BF16),
    ),
    "the scale of the first row": ("round_rows.cu", "p.rows[row]", "p.rows[0]", partial(scaling_case, dtype=BF16)),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(planted: Any, name: str) -> None:
    file, before, after, case = BUGS[name]
    planted({file: [(before, after)]}, case)
