"""Attention over the paged pool: the sweep of decode in percent of the copy bandwidth, and prefill in percent of the
matrix products' rate, beside torch's attention on contiguous keys and FlashInfer where it is installed."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from gpu.case_list import Place
from gpu.cases import device_place
from gpu.context import Context
from gpu.floors import GOAL_ATTENTION, GOAL_PREFILL, attention_bytes, causal_flops
from gpu.plan import rated, timed
from gpu.timing import CudaTimer, Timer, free_bytes, l2_bytes, num_rotated
from millrace.kernels import cuda_attention

HEADS, HEAD_DIM, BLOCK = 32, 128, 16
BATCHES, CONTEXTS, GROUPS = (1, 8, 64, 256), (1024, 4096, 16384), (4, 1, 8)
LARGE = 100e6  # bytes of keys and values from which on the goal counts
SMALL_GOAL_US = 11.0  # one sequence at 1k, group 4: where the best published kernels lie
POOL_SHARE = 0.6  # of free memory
PREFILLS = ((1, 2048, 0), (4, 2048, 0), (1, 8192, 0), (1, 512, 8192))  # sequences, new tokens, cached tokens


class Load(NamedTuple):
    batch: int
    context: int
    group: int

    @property
    def kv_heads(self) -> int:
        return HEADS // self.group

    @property
    def blocks(self) -> int:
        return self.batch * -(-self.context // BLOCK)

    @property
    def kv_bytes(self) -> int:
        return self.batch * self.context * 2 * self.kv_heads * HEAD_DIM * 2

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.context // 1024}k, group {self.group}"


def loads() -> list[Load]:
    """Group by group, since a pool is made for each; the groups that models have most come first."""
    return [Load(batch, context, group) for group, context, batch in itertools.product(GROUPS, CONTEXTS, BATCHES)]


def make_pool(place: Place, kv_heads: int, num_blocks: int) -> cuda_attention.KvPool:
    shape = (num_blocks, kv_heads, BLOCK, HEAD_DIM)
    keys, values = (torch.empty(shape, dtype=torch.bfloat16, device=place.device).normal_() for _ in range(2))
    return cuda_attention.KvPool(keys, values)


def decode_works(place: Place, pool: cuda_attention.KvPool, load: Load, sets: int) -> list[Any]:
    """One attention launch each, over blocks, in random order, that no other set has."""
    device, pages = place.device, load.blocks // load.batch
    order = torch.randperm(pool.keys.shape[0] - 1, device=device)[: sets * load.blocks] + 1
    tables = order.int().view(sets, load.batch, pages)
    lens = torch.full((load.batch,), load.context, dtype=torch.int32, device=device)
    shape = cuda_attention.DecodeShape(load.batch, HEADS, load.kv_heads, HEAD_DIM, pages * BLOCK)
    workspace = cuda_attention.decode_workspace(shape, place.launcher, device)
    cuda_attention.plan_decode(place.launcher, lens, workspace, stream=place.stream)  # once a step, not once a layer
    q = torch.randn(load.batch, HEADS, HEAD_DIM, device=device).bfloat16()
    out, options = torch.empty_like(q), cuda_attention.AttentionOptions(HEAD_DIM**-0.5)

    def work(index: int) -> None:
        cuda_attention.decode_attention(
            place.launcher, q, pool, tables[index], lens, workspace, options, out=out, stream=place.stream
        )

    return [lambda index=index: work(index) for index in range(sets)]


def sdpa_works(load: Load, sets: int, device: str) -> list[Any]:
    """Torch's attention on keys and values that lie contiguously, which a paged cache does not have."""
    q = torch.randn(load.batch, HEADS, 1, HEAD_DIM, device=device).bfloat16()
    shape = (load.batch, load.kv_heads, load.context, HEAD_DIM)
    pairs = [tuple(torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
             for _ in range(sets)]  # fmt: skip

    def work(pair: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, *pair, enable_gqa=load.group > 1)

    return [lambda pair=pair: work(pair) for pair in pairs]


def flashinfer_works(pool: cuda_attention.KvPool, load: Load, sets: int, device: str) -> list[Any]:
    """FlashInfer's paged decode over the same pool. Raises ImportError where it is not installed."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    pages = load.blocks // load.batch
    order = (torch.randperm(pool.keys.shape[0] - 1, device=device)[: sets * load.blocks] + 1).int().view(sets, -1)
    starts = torch.arange(0, load.blocks + 1, pages, dtype=torch.int32, device=device)
    last = torch.full((load.batch,), (load.context - 1) % BLOCK + 1, dtype=torch.int32, device=device)
    q = torch.randn(load.batch, HEADS, HEAD_DIM, device=device).bfloat16()
    works = []
    for index in range(sets):
        scratch = torch.empty(128 << 20, dtype=torch.uint8, device=device)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(scratch, "HND", use_tensor_cores=load.group >= 4)
        wrapper.plan(starts, order[index], last, HEADS, load.kv_heads, HEAD_DIM, BLOCK, q_data_type=q.dtype)
        works.append(lambda wrapper=wrapper: wrapper.run(q, (pool.keys, pool.values)))
    return works


def decode_sweep(context: Context, place: Place, timer: Timer, chosen: list[Load], l2: int, free: int) -> None:
    name, roof = context.part.name, context.roof()
    pool: cuda_attention.KvPool | None = None
    flashinfer = True
    for load in chosen:
        if context.left < 12:
            context.say("   the rest of the sweep: no time left")
            return
        sets = num_rotated(load.kv_bytes, l2, int(POOL_SHARE * free))
        if load.kv_bytes > POOL_SHARE * free:
            context.say(f"   {load}: {load.kv_bytes / 1e9:.0f} GB of keys and values do not fit")
            continue
        needed = sets * load.blocks + 1
        if pool is None or pool.keys.shape[1] != load.kv_heads or pool.keys.shape[0] < needed:
            pool = None  # before the next is made
            pool = make_pool(place, load.kv_heads, needed)
        floor = roof.seconds(attention_bytes(load.batch, load.context, load.kv_heads, HEAD_DIM, HEADS)) * 1e6
        value = timer.seconds(decode_works(place, pool, load, sets)) * 1e6
        goal: dict[str, Any] = {"goal": GOAL_ATTENTION} if load.kv_bytes >= LARGE else {}
        if load == Load(1, 1024, 4):
            goal = {"goal": SMALL_GOAL_US, "goal_kind": "at most"}
        note = f"{load.kv_bytes / 1e6:.0f} MB, {sets} sets in turn"
        context.row(timed(name, f"decode, {load}", value, "us", floor, note=note, **goal))
        if flashinfer and load.kv_bytes <= 8e9:
            try:
                value = timer.seconds(flashinfer_works(pool, load, min(sets, 8), place.device)) * 1e6
                context.row(timed(name, f"FlashInfer, {load}", value, "us", floor))
            except Exception as error:
                flashinfer = False
                context.note("flashinfer", f"left out: {type(error).__name__}: {error}"[:200])
        if load.kv_bytes <= 4e9:
            try:
                value = timer.seconds(sdpa_works(load, min(sets, 16), place.device), 10) * 1e6
            except torch.OutOfMemoryError:
                continue  # without a fused kernel it makes copies of the keys for each head of a group
            context.row(timed(name, f"torch SDPA, {load}", value, "us", floor, note="contiguous keys"))


def prefill_rows(context: Context, place: Place, timer: Timer, shapes: tuple[tuple[int, int, int], ...]) -> None:
    """Both routes, so that the table of where to use which can be filled."""
    name, roof, kv_heads = context.part.name, context.roof(), HEADS // 4
    for seqs, new, cached in shapes:
        length = new + cached
        pages = -(-length // BLOCK)
        pool = make_pool(place, kv_heads, seqs * pages + 1)
        tables = (torch.randperm(seqs * pages, device=place.device) + 1).int().view(seqs, pages)
        q = torch.randn(seqs * new, HEADS, HEAD_DIM, device=place.device).bfloat16()
        plan = cuda_attention.plan_prefill(
            place.launcher, [new] * seqs, [length] * seqs, num_heads=HEADS, num_kv_heads=kv_heads, head_dim=HEAD_DIM,
            device=place.device,
        )  # fmt: skip
        options, out = cuda_attention.AttentionOptions(HEAD_DIM**-0.5), torch.empty_like(q)
        flops = seqs * causal_flops(new, length, HEADS, HEAD_DIM)
        for route in _routes():

            def work(route: Any = route, q: Any = q, pool: Any = pool, tables: Any = tables, plan: Any = plan,
                     options: Any = options, out: Any = out) -> None:  # fmt: skip
                cuda_attention.prefill_attention(
                    place.launcher, q, pool, tables, plan, options, out=out, route=route, stream=place.stream
                )

            rate = flops / timer.seconds([work], 10) / 1e12
            label = f"prefill {seqs} x {new} behind {cached}, {route}"
            goal = {"goal": GOAL_PREFILL} if route == "kernel" and new >= 2048 else {}
            context.row(rated(name, label, rate, "TFLOP/s", roof.gemm / 1e12, note="causal operations", **goal))


def _routes() -> Iterator[str]:
    yield from ("kernel", "gather")


def run(context: Context) -> None:
    place, timer = device_place(), CudaTimer()
    prefill_rows(context, place, timer, PREFILLS)
    decode_sweep(context, place, timer, loads(), l2_bytes(), free_bytes())
