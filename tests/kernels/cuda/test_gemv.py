"""Quantised products on the host shim, against float64."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from millrace.kernels import reference_cuda_gemv as reference
from millrace.kernels.cuda_gemv import GemvWorkspace, PackedWeight, _splits, gemv, pack
from shim.fence import fenced, nan_filled
from shim.launcher import ShimLauncher


class Shape(NamedTuple):
    bits: int
    group: int  # 0: one scale per row
    zeros: bool
    m: int
    n: int
    k: int


SHAPES = [
    Shape(8, 0, False, 1, 48, 1024),
    Shape(8, 0, False, 8, 5, 40),  # less than a tile in both directions
    Shape(8, 0, False, 3, 17, 2080),
    Shape(8, 32, False, 2, 33, 328),
    Shape(8, 128, False, 5, 16, 1100 // 8 * 8),
    Shape(4, 32, False, 1, 40, 1024),
    Shape(4, 32, True, 8, 23, 328),
    Shape(4, 64, False, 4, 16, 64),
    Shape(4, 64, True, 7, 31, 2944),
    Shape(4, 128, True, 1, 20, 4104),
    Shape(4, 128, False, 6, 65, 1000),
]


def make(shape: Shape, dtype: torch.dtype, bias: bool = True) -> tuple[PackedWeight, Tensor]:
    """The packed weight, fenced, and the same as float64 [n, k]."""
    _, group, zeros, _, n, k = shape
    low, high = (0, 16) if shape.bits == 4 else (-128, 128)
    quantised = torch.randint(low, high, (n, k), dtype=torch.int8)
    scales = torch.rand(n, -(-k // group)) + 0.5 if group else torch.rand(n) + 0.5
    zero = torch.randint(0, 16, scales.shape, dtype=torch.int8) if zeros else None
    added = torch.randn(n) * 50 if bias else None
    packed = pack(quantised, scales, dtype, bits=shape.bits, zeros=zero, bias=added)
    whole = reference.dequantised(quantised, scales, dtype, shape.bits, zero)
    held = {
        name: fenced(value)
        for name, value in vars(packed).items()
        if isinstance(value, Tensor)
    }  # fmt: skip
    return PackedWeight(**{**vars(packed), **held}), torch.cat((whole, whole[:, :0]), 1)


def gemv_case(launcher: ShimLauncher, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
    packed, weight = make(shape, dtype)
    # Rows apart, with NaN between them; x is scaled so that float16 holds the sums.
    held = torch.full((shape.m, shape.k + 24), torch.nan, dtype=dtype)
    held[:, : shape.k] = torch.randn(shape.m, shape.k) / 16
    x = fenced(held)[:, : shape.k]
    room = nan_filled(shape.m, shape.n + 3, dtype=dtype)
    workspace = GemvWorkspace.allocate(launcher, [packed])
    assert workspace is not None
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


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(str(int(part)) for part in shape))
def test_gemv(launcher: ShimLauncher, shape: Shape) -> None:
    gemv_case(launcher, shape)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], SHAPES[6], SHAPES[10]], ids=lambda shape: str(shape[:2]))
def test_float16(launcher: ShimLauncher, shape: Shape) -> None:
    gemv_case(launcher, shape, torch.float16)


def test_every_integer(launcher: ShimLauncher) -> None:
    """All weights and all zero points are exact in both types: one column at a time."""
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-128, 128, dtype=torch.int8).view(256, 1).repeat(1, 8)
        packed = pack(values, torch.ones(256), dtype, bits=8)
        x = torch.zeros(8, 8, dtype=dtype).fill_diagonal_(1.0)
        assert torch.equal(gemv(launcher, x, packed, stream=0).double(), values.T.double())
        quantised = torch.arange(16, dtype=torch.int8).repeat(16).view(256, 1).repeat(1, 8)
        zeros = torch.arange(16, dtype=torch.int8).repeat_interleave(16).view(256, 1)
        for group_zeros in (zeros, None):
            packed = pack(quantised, torch.ones(256, 1), dtype, bits=4, zeros=group_zeros)
            wanted = quantised.double() - (8 if group_zeros is None else group_zeros)
            assert torch.equal(gemv(launcher, x, packed, stream=0).double(), wanted.T)


def test_rows_do_not_depend_on_the_batch(launcher: ShimLauncher) -> None:
    for shape in (SHAPES[2], SHAPES[9]):
        packed, _ = make(shape, torch.bfloat16)
        assert _splits(launcher, packed) > 1
        x = torch.randn(8, shape.k).bfloat16()
        whole = gemv(launcher, x, packed, stream=0)
        for rows in (slice(0, 1), slice(7, 8), slice(2, 5)):
            assert torch.equal(gemv(launcher, x[rows].contiguous(), packed, stream=0), whole[rows])


def test_no_bias_and_large_indices(launcher: ShimLauncher) -> None:
    packed, weight = make(Shape(8, 0, False, 2, 16, 64), torch.bfloat16, bias=False)
    assert packed.nbytes == 16 * 64 + 16 * 4
    x = torch.randn(2, 64).bfloat16()
    torch.testing.assert_close(
        gemv(launcher, x, packed, stream=0).double(), reference.gemv(x, weight), rtol=8e-3, atol=1.0
    )


def test_refusals() -> None:
    launcher = ShimLauncher()
    good = torch.zeros(16, 64, dtype=torch.int8)

    def refuses_pack(match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            pack(*arguments, **options)

    refuses_pack("5 bits", good, torch.ones(16), torch.bfloat16, bits=5)
    refuses_pack("float32", good, torch.ones(16), torch.float32, bits=8)
    refuses_pack(r"int8 \[16, 60\]", good[:, :60], torch.ones(16), torch.bfloat16, bits=8)
    refuses_pack(
        "from 0 to 16", good + torch.eye(16, 64).to(torch.int8) * 16, torch.ones(16, 1), torch.bfloat16, bits=4
    )
    refuses_pack(r"scales are float32 \[16\]", good, torch.ones(16), torch.bfloat16, bits=4)
    refuses_pack(r"scales are float32 \[16, 3\]", good, torch.ones(16, 3), torch.bfloat16, bits=8)
    refuses_pack("zeros are", good, torch.ones(16), torch.bfloat16, bits=8, zeros=torch.zeros(16))
    refuses_pack("bias is", good, torch.ones(16), torch.bfloat16, bits=8, bias=torch.zeros(15))
    packed = pack(good, torch.ones(16), torch.bfloat16, bits=8)

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
    refuses("x is on meta", x.to("meta"))
    long = pack(torch.zeros(16, 4096, dtype=torch.int8), torch.ones(16), torch.bfloat16, bits=8)
    small = GemvWorkspace(torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    refuses("workspace has 1 floats", torch.zeros(1, 4096).bfloat16(), packed=long, workspace=small)


BUGS = {
    "the zero point of the other row": ("(zeros >> 8 & 0xffu) * 0x00010001u", "(zeros & 0xffu) * 0x00010001u"),
    "the scale of the other group": (
        "scale_into(sums, part, tile.scales[half]);",
        "scale_into(sums, part, tile.scales[0]);",
    ),
    "a group's sum goes on": ("part[0] = part[1] = part[2] = part[3] = 0.0f;", ""),
    "x is read behind its end": ("if (column < columns) v = load16", "if (columns > 0) v = load16"),
    "nibbles are not shifted": ("word >> 4 * i & 0x000f000fu", "word >> 8 * (i / 2) & 0x000f000fu"),
    "the splits are not waited for": ("== gridDim.y - 1;", "== gridDim.y - 2;"),
    "the counters are not put back": ("if (is_last) p.arrivals[blockIdx.x] = 0u;", ""),
    "no barrier before the warps are added up": ("= sums[3];\n    __syncthreads();", "= sums[3];"),
}


def planted_case(launcher: ShimLauncher) -> None:
    gemv_case(launcher, SHAPES[6])
    gemv_case(launcher, SHAPES[9])


def test_planted_case_without_a_bug(four_ways: Any) -> None:
    four_ways(planted_case)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(planted: Any, name: str) -> None:
    planted({"gemv.cu": [BUGS[name]]}, planted_case)
