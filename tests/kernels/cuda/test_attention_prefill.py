"""Prefill attention, executed on the host shim and compared with float64; and its route over torch's attention."""

import math

import pytest
import torch
from attention_cases import BF16, F16, FP8, INT8, Spec, check_prefill, make_sequences

from millrace.kernels import cuda_attention_prefill
from millrace.kernels.cuda_attention import AttentionOptions, plan_prefill, prefill_attention
from shim.launcher import ShimLauncher

pytestmark = (
    pytest.mark.slow
)  # tests/runtime/cuda drives the same kernels within models, and `make test-fast` runs that

# Chunks with and without a prefix: one token, a block's border, rows that end in two key tiles, three query tiles.
QUERY_LENS = [1, 16, 17, 5, 40, 3]
CONTEXT_LENS = [1, 16, 70, 80, 40, 150]
SPECS = {
    "bf16": Spec(),
    "mha": Spec(group=1, num_kv_heads=2),
    "group 3, two kv heads": Spec(group=3, num_kv_heads=2),
    "group 16": Spec(group=16),
    "window": Spec(window=37),
    "window over a tile": Spec(window=70),
    "window of a block": Spec(window=16),
    "window of one": Spec(window=1),
    "soft cap": Spec(soft_cap=1.5),
    "alibi": Spec(slopes=True),
    "all options": Spec(group=2, num_kv_heads=2, window=50, soft_cap=2.0, slopes=True),
    "f16, 128": Spec(head_dim=128, dtype=F16, kv_dtype=F16),
    "256": Spec(head_dim=256, group=2),
    "fp8, 128": Spec(head_dim=128, kv_dtype=FP8),
    "fp8, 128, all options": Spec(head_dim=128, kv_dtype=FP8, window=50, soft_cap=2.0, slopes=True),
    "f16, int8, 80": Spec(head_dim=80, dtype=F16, kv_dtype=INT8),
    "256, fp8": Spec(head_dim=256, group=2, kv_dtype=FP8),
    "32": Spec(head_dim=32, group=2),
    "f16, int8, 32": Spec(head_dim=32, dtype=F16, kv_dtype=INT8),
}


def chunks(launcher: ShimLauncher, spec: Spec = SPECS["bf16"]) -> None:
    launcher.sm_count = 10**6  # never enough tiles for those of 128 rows
    check_prefill(launcher, spec, QUERY_LENS, CONTEXT_LENS)
    assert ("MR_WARPS", "4") in launcher.launches[-1].defines


@pytest.mark.parametrize("name", SPECS)
def test_matches_the_reference(four_ways, name):
    four_ways(lambda launcher: chunks(launcher, SPECS[name]))


def wide_tiles(launcher: ShimLauncher, spec: Spec = SPECS["bf16"]) -> None:
    launcher.sm_count = 1
    check_prefill(launcher, spec, QUERY_LENS, CONTEXT_LENS)
    assert ("MR_WARPS", "8") in launcher.launches[-1].defines


@pytest.mark.parametrize("name", ["all options", "f16, int8, 80"])
def test_tiles_of_128_rows(four_ways, name):
    four_ways(lambda launcher: wide_tiles(launcher, SPECS[name]))


def long_prefix(launcher: ShimLauncher) -> None:
    """More pages for each warp than one load of block ids brings."""
    launcher.sm_count = 10**6
    check_prefill(launcher, Spec(group=2), [2], [2200])


def test_long_prefix(four_ways):
    four_ways(long_prefix)


def rows_alone(launcher: ShimLauncher, window: int | None = 37) -> None:
    """A row's result depends, to the bit, on its keys alone: neither on the batch, nor on how the prompt is cut into
    chunks, nor on the size of the query tiles."""
    spec = Spec(num_kv_heads=2, window=window)
    sequences = make_sequences(spec, [60, 100])
    q = torch.randn(160, spec.num_heads, spec.head_dim).to(spec.dtype)

    def attend(queries: torch.Tensor, rows: list[int], lens: list[int], contexts: list[int]) -> torch.Tensor:
        plan = plan_prefill(launcher, lens, contexts, num_heads=8, num_kv_heads=2, head_dim=64, device="cpu")
        tables = sequences.block_tables[rows]
        return prefill_attention(launcher, queries, sequences.pool, tables, plan, spec.options(), stream=0)

    together = attend(q, [0, 1], [60, 100], [60, 100])
    for launcher.sm_count in (1, 1000):
        assert torch.equal(attend(q[60:], [1], [100], [100]), together[60:])
        assert torch.equal(attend(q[60:133], [1], [73], [73]), together[60:133])
        assert torch.equal(attend(q[133:], [1], [27], [100]), together[133:])


@pytest.mark.parametrize("window", [None, 37])
def test_a_row_depends_on_its_keys_alone(four_ways, window):
    four_ways(lambda launcher: rows_alone(launcher, window))


@pytest.mark.parametrize("name", ["bf16", "group 3, two kv heads", "window", "alibi", "fp8, 128", "f16, int8, 80"])
def test_gather_route_matches_the_reference(name):
    launcher = ShimLauncher()
    torch.manual_seed(0)
    check_prefill(launcher, SPECS[name], QUERY_LENS, CONTEXT_LENS, route="gather")
    assert not launcher.launches


def test_the_route_is_chosen_by_the_table(four_ways, monkeypatch):
    monkeypatch.setattr(cuda_attention_prefill, "GATHER_FROM", ((64, 8, 40), (128, 1, 1)))

    def case(launcher: ShimLauncher) -> None:
        for query_lens, context_lens, num_launches in (([8, 9], [40, 41], 0), ([8, 7], [40, 41], 1), ([8], [39], 1)):
            launcher.launches.clear()
            spec = Spec()
            sequences = make_sequences(spec, context_lens)
            plan = plan_prefill(
                launcher, query_lens, context_lens, num_heads=4, num_kv_heads=1, head_dim=64, device="cpu"
            )
            q = torch.randn(sum(query_lens), 4, 64).to(BF16)
            arguments = (launcher, q, sequences.pool, sequences.block_tables, plan)
            prefill_attention(*arguments, spec.options(), stream=0)
            assert len(launcher.launches) == num_launches
            launcher.launches.clear()
            prefill_attention(*arguments, AttentionOptions(0.1, soft_cap=1.0), stream=0)
            assert len(launcher.launches) == 1

    four_ways(case)


def _plan(query_lens, context_lens, *, sm_count=4, num_heads=8, num_kv_heads=2, head_dim=64):
    return plan_prefill(
        ShimLauncher(sm_count=sm_count), query_lens, context_lens,
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize(("sm_count", "tile_rows"), [(5, 128), (6, 64)])
def test_plan_covers_every_row_once(sm_count, tile_rows):
    query_lens, context_lens = [1, 64, 33, 100], [900, 64, 40, 100]
    plan = _plan(query_lens, context_lens, sm_count=sm_count, num_heads=6, num_kv_heads=1)
    assert plan.tile_rows == tile_rows
    tiles = plan.tiles.tolist()
    assert len(tiles) == len(set(map(tuple, tiles)))
    assert sorted(map(tuple, tiles)) == [
        (seq, row) for seq, query_len in enumerate(query_lens) for row in range(0, 6 * query_len, tile_rows)
    ]
    starts, ends = plan.query_starts.tolist(), []
    assert starts == [0, 1, 65, 98, 198]
    for seq, row in tiles:
        last = min((row + tile_rows - 1) // 6, query_lens[seq] - 1)
        ends.append(context_lens[seq] - query_lens[seq] + last)
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "heads", "message"),
    [
        ([], [], {}, "0 query lengths and 0 context lengths"),
        ([1], [1, 2], {}, "1 query lengths and 2 context lengths"),
        ([4, 0], [4, 5], {}, "sequence 1 has 0 query tokens in a context of 5"),
        ([4, 6], [4, 5], {}, "sequence 1 has 6 query tokens in a context of 5"),
        ([4], [4], {"num_heads": 34}, "give 17 rows"),
        ([4], [4], {"num_heads": 7}, "7 query heads are not a multiple of 2"),
        ([4], [4], {"head_dim": 100}, "head_dim is 100"),
        ([2**21], [2**21], {"head_dim": 256}, "make 131072 tiles"),
    ],
)
def test_plan_refuses(query_lens, context_lens, heads, message):
    with pytest.raises(ValueError, match=message):
        _plan(query_lens, context_lens, **heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"q": a["q"][1:]}, r"q is bfloat16 \[49, 8, 64\] on cpu, but it must be .* \[50, 8, 64\]"),
        (lambda a: {"q": a["q"].float()}, "queries are torch.float32"),
        (lambda a: {"q": a["q"].half()}, "the pool is torch.bfloat16"),
        (lambda a: {"pool": a["pool"]._replace(keys=a["pool"].keys.transpose(0, 1))}, "keys is .* not contiguous"),
        (lambda a: {"block_tables": a["block_tables"][:, :1].contiguous()}, "1 blocks a sequence for 30 tokens"),
        (lambda a: {"block_tables": a["block_tables"][:1]}, r"block_tables is int32 \[1, 2\]"),
        (lambda a: {"options": AttentionOptions(0.1, window=0)}, "window is 0"),
        (lambda a: {"options": AttentionOptions(math.inf)}, "scale is inf"),
        (lambda a: {"route": "flash"}, "route is 'flash'"),
        (lambda a: {"route": "gather", "lse": torch.zeros(50, 8)}, "'gather' has no lse"),
        (lambda a: {"route": "gather", "options": AttentionOptions(0.1, soft_cap=5.0)}, "'gather' has no soft_cap"),
        (lambda a: {"out": torch.zeros(50, 8, 64)}, "out is float32"),
    ],
)
def test_refuses(change, message):
    sequences = make_sequences(Spec(num_kv_heads=2), [20, 30])
    arguments = {
        "q": torch.zeros(50, 8, 64, dtype=BF16),
        "pool": sequences.pool,
        "block_tables": sequences.block_tables,
        "plan": _plan([20, 30], [20, 30]),
        "options": AttentionOptions(0.1),
    }
    given = change(arguments)
    arguments.update({name: given.pop(name) for name in list(given) if name in arguments})
    launcher = ShimLauncher()
    with pytest.raises(ValueError, match=message):
        prefill_attention(launcher, *arguments.values(), **given, stream=0)
    assert not launcher.launches


def windowed(launcher: ShimLauncher) -> None:
    chunks(launcher, SPECS["all options"])


def wide_window(launcher: ShimLauncher) -> None:
    chunks(launcher, SPECS["window over a tile"])


def quantised(launcher: ShimLauncher) -> None:
    chunks(launcher, SPECS["fp8, 128"])


KERNEL, SHARED = "attention_prefill.cu", "attention.cuh"
PLANTS = {
    "a tile is read before it has landed": (
        KERNEL,
        "cp_async_wait<1>();\n        __syncthreads();  // every thread's part of the tile has landed",
        "cp_async_wait<2>();\n        __syncthreads();",
        chunks,
    ),
    "warps do not wait for each other's pages": (
        KERNEL,
        "__syncthreads();  // every thread's part of the tile has landed",
        "__syncwarp();",
        chunks,
    ),
    "a stage is overwritten while it is read": (
        KERNEL,
        "__syncthreads();  // the stage may be overwritten",
        "",
        long_prefix,
    ),
    "queries are read before they have landed": (
        KERNEL,
        "__syncthreads();  // every thread's part of the queries has landed",
        "",
        chunks,
    ),
    "the widened tile is read too early": (KERNEL, "__syncthreads();  // the tile is widened", "", quantised),
    "no mask for the last row's keys": (
        KERNEL,
        "const int seen_to = prefix + first_row / p.group + 1;",
        "const int seen_to = end_key;",
        chunks,
    ),
    "no mask at the window's begin": (
        KERNEL,
        "const int seen_from = p.window > 0 ? end_key - p.window : 0;",
        "const int seen_from = 0;",
        wide_window,
    ),
    "tiles of keys begin at the window": (
        KERNEL,
        "first_key / TILE_TOKENS * TILE_PAGES",
        "first_key / BLOCK_TOKENS",
        rows_alone,
    ),
    "rows past the chunk are written": (
        KERNEL,
        "if (tile_row < num_rows)\n            store16",
        "store16",
        chunks,
    ),
    "half of the rows are not rescaled": (
        KERNEL,
        "out[i][j] *= factor[j / 2];",
        "out[i][j] *= factor[0];",
        chunks,
    ),
    "value scales in the weights alone": (
        KERNEL,
        "sum[h] += QUANTISED<KV> ? score * inverse : score;",
        "sum[h] += score;",
        quantised,
    ),
    "even and odd dims are swapped": (
        KERNEL,
        "(even & 0xffffu) | odd << 16",
        "(odd & 0xffffu) | even << 16",
        quantised,
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_caught(planted, name):
    file, old, new, case = PLANTS[name]
    planted({file: [(old, new)]}, case)
