"""What the device can do at best: bytes per second of a large copy, operations per second of a large product."""

import torch

from gpu.context import Context
from gpu.plan import Row
from gpu.report import smi
from gpu.timing import CudaTimer, Timer, free_bytes

COPY_BYTES = 4 << 30  # far larger than any L2; read once and written once
GEMM_SIZES = (8192, 16384)


def copy_rate(timer: Timer, num_bytes: int, device: str = "cuda") -> float:
    """Bytes read and written per second."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / timer.seconds([lambda: target.copy_(source)], 15)


def gemm_rate(timer: Timer, size: int, device: str = "cuda") -> float:
    """Operations per second of a square bf16 product; on random data, since zeros run faster than a model would."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / timer.seconds([lambda: torch.mm(a, b, out=out)], 15)


def run(context: Context) -> None:
    timer = CudaTimer()
    num_bytes = min(COPY_BYTES, free_bytes() // 4)
    copy = copy_rate(timer, num_bytes)
    context.row(Row(context.part.name, "copy", copy / 1e9, "GB/s", note=f"{num_bytes >> 20} MiB, read plus written"))
    rates = {size: gemm_rate(timer, size) for size in GEMM_SIZES if 6 * size**2 < free_bytes()}
    size = max(rates, key=lambda size: rates[size])
    context.row(Row(context.part.name, "gemm", rates[size] / 1e12, "TFLOP/s", note=f"bf16 {size}x{size}x{size}"))
    context.note("gemm_tflops", {str(size): rate / 1e12 for size, rate in rates.items()})
    context.note("clocks", smi(("clocks.sm", "clocks.mem", "power.draw")))  # just behind the products
