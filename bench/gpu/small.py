"""The kernels beside attention in percent of their floors, and what a launch costs the host."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu.case_list import Place
from gpu.cases import device_place
from gpu.context import Context
from gpu.plan import Row, rated, timed
from gpu.timing import CudaTimer, Timer, free_bytes, l2_bytes, num_rotated
from millrace.kernels import cuda_copy, cuda_elementwise, cuda_gemv, cuda_sampling, ops
from millrace.kernels.cuda_backend import CudaBackend
from millrace.kernels.cuda_gemv_common import GemvWorkspace, workspace_size
from millrace.kernels.quantized import Float8Weight, QuantizedWeight

Work = Callable[[], object]
BF16 = torch.bfloat16


def _random(place: Place, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16, device=place.device).normal_()


def elementwise(
    context: Context, place: Place, timer: Timer, tokens: int, hidden: int, inner: int, l2: int, free: int
) -> None:
    """Each over sets of buffers in turn; bytes are what is read and written once."""
    part, roof, heads, kv_heads, dim = context.part.name, context.roof(), hidden // 128, max(1, hidden // 512), 128

    def show(name: str, num_bytes: int, make: Callable[[], Work]) -> None:
        works = [make() for _ in range(num_rotated(num_bytes, l2, free))]
        value = timer.seconds(works) * 1e6
        context.row(timed(part, name, value, "us", roof.seconds(num_bytes) * 1e6, note=f"{num_bytes / 1e6:.2f} MB"))

    weight = _random(place, hidden)

    def norm() -> Work:
        x, residual, out = (_random(place, tokens, hidden) for _ in range(3))
        return lambda: cuda_elementwise.rms_norm(x, weight, 1e-5, residual=residual, out=out, **place.way)

    show(f"add + RMSNorm, {tokens} x {hidden}", 4 * tokens * hidden * 2, norm)

    def silu() -> Work:
        x, out = _random(place, tokens, 2 * inner), _random(place, tokens, inner)
        return lambda: cuda_elementwise.activation(x, "silu", gated=True, out=out, **place.way)

    show(f"SiLU-mul, {tokens} x {inner}", 3 * tokens * inner * 2, silu)
    width, num_blocks = (heads + 2 * kv_heads) * dim, -(-tokens // 16) + 1
    cos_sin = torch.rand(4096, dim, device=place.device)
    positions = torch.arange(tokens, device=place.device)

    def rope() -> Work:
        qkv = _random(place, tokens, width)
        pool = torch.empty(2, num_blocks, kv_heads, 16, dim, dtype=BF16, device=place.device)
        return lambda: cuda_elementwise.rope_write_kv(
            qkv, positions + 16, pool, num_heads=heads, cos_sin=cos_sin, positions=positions, **place.way
        )

    show(f"RoPE + KV write, {tokens} tokens", 2 * tokens * width * 2, rope)


def sampling(context: Context, place: Place, timer: Timer, rows: int, vocab: int, l2: int, free: int) -> None:
    """From logits to tokens; the floor reads the logits once, and a greedy draw needs no more."""
    settings = {
        "greedy": cuda_sampling.RowSettings(1, temperature=0.0),
        "top-k 40, top-p 0.9": cuda_sampling.RowSettings(1, top_k=40, top_p=0.9),
        "top-p 0.95": cuda_sampling.RowSettings(1, top_p=0.95),
        "unfiltered": cuda_sampling.RowSettings(1),
    }
    num_bytes = rows * vocab * 2
    for name, one in settings.items():
        tables = cuda_sampling.SamplerTables(rows, vocab, place.device)
        for row in range(rows):
            tables.join(row, one._replace(seed=row))
        buffers = cuda_sampling.SampleBuffers.allocate(rows, tables)
        chosen = torch.arange(rows, dtype=torch.int32, device=place.device)
        sets = [_random(place, rows, vocab) * 3 for _ in range(num_rotated(num_bytes, l2, free, 16))]

        def work(logits: Any, tables: Any = tables, buffers: Any = buffers, chosen: Any = chosen) -> None:
            cuda_sampling.sample(place.launcher, tables, buffers, logits, chosen, stream=place.stream)

        value = timer.seconds([lambda logits=logits, work=work: work(logits) for logits in sets]) * 1e6
        floor = context.roof().seconds(num_bytes) * 1e6
        context.row(timed(context.part.name, f"sampling {name}, {rows} x {vocab}", value, "us", floor))


def products(context: Context, place: Place, timer: Timer, n: int, k: int, l2: int, free: int) -> None:
    """Dequantising products and cuBLAS at the same shape; each against its own bytes."""
    kinds = {
        "int4 group 128": (4, 128, 0), "int4 group 64, zeros": (4, 64, 0.5), "int8": (8, k, 0),
    }  # fmt: skip
    for kind, (bits, group, off) in kinds.items():
        held = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=place.device)
        scales = torch.rand((n, k // group), device=place.device).half()
        zeros = torch.full_like(scales, (1 << bits - 1) + off)
        weight = QuantizedWeight(held, scales, zeros, bits)
        first = cuda_gemv.pack(weight, None, BF16)
        count = num_rotated(first.nbytes, l2, free, 24)
        weights = [first, *(cuda_gemv.pack(weight, None, BF16) for _ in range(count - 1))]
        size = workspace_size(place.launcher, first)
        workspace = GemvWorkspace.allocate(size, first.weight.device)
        for m in (1, 8):
            x, out = _random(place, m, k), _random(place, m, n)

            def work(weight: Any, x: Any = x, out: Any = out, workspace: Any = workspace) -> None:
                cuda_gemv.gemv(place.launcher, x, weight, out=out, workspace=workspace, stream=place.stream)

            value = timer.seconds([lambda weight=weight, work=work: work(weight) for weight in weights])
            rate = first.nbytes / value / 1e9
            label = f"{kind} product, {m} x {k} x {n}"
            context.row(rated(context.part.name, label, rate, "GB/s", context.roof().copy / 1e9))
    matrices = [_random(place, n, k) for _ in range(num_rotated(2 * n * k, l2, free, 16))]
    x = _random(place, 1, k)
    value = timer.seconds([lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in matrices])
    label = f"bf16 product (torch), 1 x {k} x {n}"
    context.row(rated(context.part.name, label, 2 * n * k / value / 1e9, "GB/s", context.roof().copy / 1e9))


def products_of_8_bits(
    context: Context, place: Place, timer: Timer, n: int, k: int, m: int, l2: int, free: int
) -> None:
    """FP8 and W8A8 beside 16 bits at the same shape: few rows against their bytes, `m` rows, whose activations are
    rounded, against the rate of 16 bits; where torch has no such product the weights are widened, and the note says
    so."""
    part, roof = context.part.name, context.roof()
    backend = CudaBackend(place.launcher, lambda: place.stream, max_seqs=1)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, device=place.device)
    scales = torch.full((n, 1), 2.0**-8, device=place.device)
    floats = Float8Weight((codes & 0xBF).view(torch.float8_e4m3fn), scales, k, is_w8a8=True)
    integers = QuantizedWeight(codes, scales.half(), torch.full_like(scales, 128).half(), 8, is_w8a8=True)

    def pack(kind: str) -> ops.PackedLinear:
        if kind == "bf16":
            return ops.pack_linear(_random(place, n, k), activation=BF16, backends=(backend,))
        if kind == "fp8":
            fresh = floats._replace(codes=floats.codes.clone())  # else all would share the codes, and find them in L2
            return ops.pack_float8(fresh, activation=BF16, backends=(backend,))
        return ops.pack_quantized(integers, activation=BF16, backends=(backend,))

    for kind in ("bf16", "fp8", "int8"):
        first = pack(kind)
        packed = [first, *(pack(kind) for _ in range(num_rotated(first.weight_bytes, l2, free, 16) - 1))]
        for rows in (1, 8, m):
            x, out = _random(place, rows, k), _random(place, rows, n)
            seconds = timer.seconds([lambda one=one, x=x, out=out: one(x, out) for one in packed])
            label = f"{kind} by rows, {rows} x {k} x {n}"
            if rows < m:
                context.row(rated(part, label, first.weight_bytes / seconds / 1e9, "GB/s", roof.copy / 1e9))
                continue
            code = ("MR_CODE", kind)
            is_rounded = any(
                kernel.name == "mr_round_rows" and code in kernel.defines for kernel in backend.quantized_kernels
            )
            note = "" if kind == "bf16" else "8 bits by 8 bits" if is_rounded else "widened: torch has no such product"
            rate = 2 * m * n * k / seconds / 1e12
            context.row(rated(part, label, rate, "TFLOP/s", roof.gemm / 1e12, note=note))


def copies(context: Context, place: Place, timer: Timer, layers: int, num_blocks: int) -> None:
    """Copy-on-write of 8 blocks in all layers, each read and written once."""
    pool = _random(place, layers, 2, num_blocks, 8, 16, 128)
    half = list(range(1, num_blocks // 2, 8))
    works = [
        lambda start=start: cuda_copy.copy_blocks(
            place.launcher, pool, list(range(start, start + 8)),
            list(range(num_blocks // 2 + start, num_blocks // 2 + start + 8)), stream=place.stream,
        )
        for start in half if num_blocks // 2 + start + 8 <= num_blocks
    ]  # fmt: skip
    num_bytes = 2 * 8 * pool[:, :, 0].numel() * 2
    floor = context.roof().seconds(num_bytes) * 1e6
    context.row(timed(context.part.name, f"block copy, 8 x {layers} layers", timer.seconds(works) * 1e6, "us", floor))


def launch_overhead(
    context: Context,
    place: Place,
    settle: Callable[[], None],
    repeats: int = 2000,
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Host time of a front with its checks, and of the launcher alone. A graph pays neither."""
    x, weight, out = _random(place, 1, 512), _random(place, 512), _random(place, 1, 512)

    def front() -> None:
        cuda_elementwise.rms_norm(x, weight, 1e-5, out=out, **place.way)

    recorded: list[tuple[Any, ...]] = []

    class Recorder:
        device_type, sm_count = place.launcher.device_type, place.launcher.sm_count
        shared_bytes_per_sm = place.launcher.shared_bytes_per_sm

        def launch(self, *args: Any, **more: Any) -> None:
            recorded.append((args, more))

    cuda_elementwise.rms_norm(x, weight, 1e-5, out=out, launcher=Recorder(), stream=place.stream)
    args, more = recorded[0]
    for name, work in (("front and launch", front), ("launch", lambda: place.launcher.launch(*args, **more))):
        times = []
        for _ in range(5):
            settle()
            begin = now()
            for _ in range(repeats // 5):
                work()
            times.append((now() - begin) / (repeats // 5))
        settle()
        context.row(Row(context.part.name, f"host time of a {name}", statistics.median(times) * 1e6, "us"))


def run(context: Context) -> None:
    place, timer = device_place(), CudaTimer()
    l2, free = l2_bytes(), free_bytes()
    empty = timer.seconds([lambda: None]) * 1e6
    context.row(Row(context.part.name, "nothing, between two events", empty, "us", note="in every time below"))
    for tokens in (1, 64, 2048):
        elementwise(context, place, timer, tokens, 4096, 14336, l2, free)
    for rows in (1, 64):
        sampling(context, place, timer, rows, 128_256, l2, free)
    products(context, place, timer, 4096, 4096, l2, free)
    products(context, place, timer, 14336, 4096, l2, free)
    products_of_8_bits(context, place, timer, 14336, 4096, 2048, l2, free)
    copies(context, place, timer, 32, 256)
    launch_overhead(context, place, torch.cuda.synchronize)
