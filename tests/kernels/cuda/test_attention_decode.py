"""Decode attention, executed on the host shim and compared with float64."""

import dataclasses
import math

import pytest
import torch
from attention_cases import BF16, F16, FP8, INT8, Spec, check_decode, make_sequences, make_workspace

from millrace.kernels.cuda_attention import (
    AttentionOptions,
    KvPool,
    decode_attention,
    decode_workspace_bytes,
    plan_decode,
)
from shim.launcher import ShimLauncher

pytestmark = (
    pytest.mark.slow
)  # tests/runtime/cuda drives the same kernels within models, and `make test-fast` runs that

RAGGED = [1, 15, 16, 17, 0, 33, 300]
SPECS = {
    "bf16": Spec(),
    "mha": Spec(group=1, num_kv_heads=3),
    "group 3, two kv heads": Spec(group=3, num_kv_heads=2),
    "group 8": Spec(group=8),
    "window": Spec(window=37),
    "window of a block": Spec(window=16),
    "window of one": Spec(window=1),
    "soft cap": Spec(soft_cap=1.5),
    "alibi": Spec(slopes=True),
    "all options": Spec(window=50, soft_cap=2.0, slopes=True, num_kv_heads=2, group=2),
    "two queries": Spec(num_queries=2),
    "five queries, window": Spec(group=1, num_kv_heads=2, num_queries=5, window=20, slopes=True),
    "f16, 128, group 9": Spec(group=9, head_dim=128, dtype=F16, kv_dtype=F16),
    "f16, 128, group 16": Spec(group=16, head_dim=128, dtype=F16, kv_dtype=F16),
    "f16, 128, 4 x 4 rows": Spec(group=4, num_queries=4, head_dim=128, dtype=F16, kv_dtype=F16),
    "256, group 16": Spec(group=16, head_dim=256),
    "fp8, 128": Spec(head_dim=128, kv_dtype=FP8),
    "fp8, 128, all options": Spec(head_dim=128, kv_dtype=FP8, window=50, soft_cap=2.0, slopes=True),
    "f16, int8, 80": Spec(group=7, head_dim=80, dtype=F16, kv_dtype=INT8),
    "f16, fp8, 80": Spec(group=2, head_dim=80, dtype=F16, kv_dtype=FP8, num_kv_heads=2),
    "int8, 96, group 12": Spec(group=12, head_dim=96, kv_dtype=INT8),
    "32, group 12": Spec(group=12, head_dim=32),
    "fp8, 32": Spec(group=2, head_dim=32, kv_dtype=FP8, num_kv_heads=2),
}


@pytest.mark.parametrize("name", SPECS)
def test_matches_the_reference(four_ways, name):
    four_ways(lambda launcher: check_decode(launcher, SPECS[name], RAGGED))


def long_sequence(launcher: ShimLauncher) -> None:
    """More pages for each warp than one load of block ids brings."""
    launcher.sm_count = 1
    check_decode(launcher, Spec(group=1, num_kv_heads=4), [2300])


def test_long_sequence(four_ways):
    four_ways(long_sequence)


def several_rounds(launcher: ShimLauncher) -> None:
    """More items than the grid has slots, and several splits each."""
    launcher.sm_count = 1
    check_decode(launcher, Spec(group=8, num_kv_heads=3), [40, 20, 1100, 600], batch_invariant=True)


def test_more_items_than_slots(four_ways):
    four_ways(several_rounds)


def many_splits(launcher: ShimLauncher) -> None:
    """More than are combined in one round."""
    launcher.sm_count = 16
    check_decode(launcher, Spec(window=1250), [1350, 200, 1250])


def test_many_splits(four_ways):
    four_ways(many_splits)


def replayed(launcher: ShimLauncher) -> None:
    """As a captured graph would: one workspace, other lengths, nothing cleared in between."""
    spec = Spec(num_kv_heads=2, group=2)
    workspace = make_workspace(launcher, spec, 4, 400)
    for context_lens in ([400, 1, 0, 100], [20, 399, 300, 64], [1, 1, 1], [0, 0, 0, 0]):
        check_decode(launcher, spec, context_lens, workspace=workspace)


def test_a_workspace_serves_any_lengths(four_ways):
    four_ways(replayed)


@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
def test_batch_invariant(four_ways, kv_dtype):
    spec = Spec(group=2, num_kv_heads=2, head_dim=128, kv_dtype=kv_dtype)

    def case(launcher: ShimLauncher) -> None:
        sequences = make_sequences(spec, [1100, 30, 513])
        q = torch.randn(3, spec.num_heads, spec.head_dim).to(spec.dtype)

        def attend(rows: list[int], num_padding: int) -> torch.Tensor:
            workspace = make_workspace(launcher, spec, 8, 1100, batch_invariant=True)
            lens = torch.cat([sequences.context_lens[rows], torch.zeros(num_padding, dtype=torch.int32)])
            tables = torch.cat([sequences.block_tables[rows], sequences.block_tables[:1].expand(num_padding, -1)])
            queries = torch.cat([q[rows], q[:1].expand(num_padding, -1, -1)])
            plan_decode(launcher, lens, workspace, stream=0)
            out = decode_attention(launcher, queries, sequences.pool, tables, lens, workspace, spec.options(), stream=0)
            return out[: len(rows)]

        together = attend([0, 1, 2], 0)
        assert torch.equal(attend([2, 1, 0], 3).flip(0), together)
        for row in range(3):
            assert torch.equal(attend([row], row)[0], together[row])

    four_ways(case)


def test_scales_of_any_size(four_ways):
    """Values near the smallest normal float: the weights keep their precision in f16."""

    def case(launcher: ShimLauncher) -> None:
        spec = Spec(head_dim=80, dtype=F16, kv_dtype=INT8)
        sequences = make_sequences(spec, [50])
        pool = sequences.pool._replace(value_scales=sequences.pool.value_scales * 1e-3)
        large = sequences.pool._replace(value_scales=sequences.pool.value_scales * 1e3)
        q = torch.randn(1, spec.num_heads, spec.head_dim).to(spec.dtype)
        outs = []
        for given in (pool, large):
            workspace = make_workspace(launcher, spec, 1, 64)
            plan_decode(launcher, sequences.context_lens, workspace, stream=0)
            outs.append(
                decode_attention(
                    launcher, q, given, sequences.block_tables, sequences.context_lens, workspace, spec.options(),
                    stream=0,
                ).double()
            )  # fmt: skip
        torch.testing.assert_close(outs[0] * 1e6, outs[1], rtol=1e-2, atol=0.2)

    four_ways(case)


def test_nothing_is_launched_per_split(four_ways):
    def case(launcher: ShimLauncher) -> None:
        check_decode(launcher, Spec(), [300])
        assert [kernel.name for kernel in launcher.launches] == ["mr_plan_decode", "mr_attention_decode"]

    four_ways(case)


def test_thread_blocks_of_a_multiprocessor():
    """By registers, which come in eights, and by shared memory, of which devices have different amounts."""

    def count(kib: int, **options: object) -> int:
        launcher, spec = ShimLauncher(shared_bytes_per_sm=kib * 1024), Spec(num_kv_heads=1, **options)
        return make_workspace(launcher, spec, 1, 16).target_items // launcher.sm_count

    h100, l4 = 228, 100
    assert [count(h100), count(h100, head_dim=128), count(h100, head_dim=256)] == [4, 3, 3]
    assert [count(l4), count(l4, head_dim=128), count(l4, head_dim=256)] == [1, 1, 1]


def test_workspace_bytes():
    launcher = ShimLauncher()
    for invariant in (False, True):
        shape = Spec(num_kv_heads=2).shape(9, 5000, invariant)
        workspace = make_workspace(launcher, Spec(num_kv_heads=2), 9, 5000, batch_invariant=invariant)
        tensors = [*workspace.tables.values(), workspace.partial_out, workspace.partial_lse, workspace.counters]
        assert decode_workspace_bytes(shape, launcher) == sum(x.numel() * x.element_size() for x in tensors)


def _refused(change, message):
    """The arguments of a good call, one of them changed, are refused before anything is launched."""
    launcher, spec = ShimLauncher(), Spec(num_kv_heads=2)
    sequences = make_sequences(spec, [20, 30])
    arguments = {
        "q": torch.zeros(2, 8, 64, dtype=BF16),
        "pool": sequences.pool,
        "block_tables": sequences.block_tables,
        "context_lens": sequences.context_lens,
        "workspace": make_workspace(launcher, spec, 2, 32),
        "options": spec.options(),
        "out": None,
        "lse": None,
    }
    arguments.update(change(arguments))
    out, lse = arguments.pop("out"), arguments.pop("lse")
    with pytest.raises(ValueError, match=message):
        decode_attention(launcher, *arguments.values(), out=out, lse=lse, stream=0)
    assert not launcher.launches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"q": a["q"].half()}, "queries are torch.float16 over a pool of torch.bfloat16"),
        (lambda a: {"q": a["q"][:1]}, r"q is bfloat16 \[1, 8, 64\] on cpu, but it must be .* \[2, 8, 64\]"),
        (lambda a: {"q": a["q"].transpose(1, 2).contiguous().transpose(1, 2)}, "q is .* not contiguous"),
        (lambda a: {"q": torch.zeros(2 * 8 * 64 + 1, dtype=BF16)[1:].view(2, 8, 64)}, "not a multiple of 16 bytes"),
        (lambda a: {"q": a["q"].to("meta")}, "q is on meta, but the kernels run on cpu"),
        (lambda a: {"pool": a["pool"]._replace(values=a["pool"].values[1:])}, r"values is bfloat16 \[6, 2, 16, 64\]"),
        (lambda a: {"pool": a["pool"]._replace(key_scales=torch.ones(7, 2, 16))}, "key_scales is float32"),
        (
            lambda a: {"pool": KvPool(a["pool"].keys[:, :1].contiguous(), a["pool"].values)},
            r"keys is .*\[7, 1, 16, 64\]",
        ),
        (lambda a: {"block_tables": a["block_tables"].long()}, "block_tables is int64"),
        (lambda a: {"block_tables": torch.zeros(2, 3, dtype=torch.int32)}, "3 blocks a sequence, .* of 32 tokens"),
        (lambda a: {"context_lens": torch.ones(3, dtype=torch.int32)}, r"\[3\] on cpu, but .* is for \[1 to 2\]"),
        (lambda a: {"context_lens": a["context_lens"].long()}, "context_lens is int64"),
        (lambda a: {"options": AttentionOptions(0.1, window=8)}, r"window is 8, but the workspace is for \[None\]"),
        (lambda a: {"options": AttentionOptions(math.nan)}, "scale is nan"),
        (lambda a: {"options": AttentionOptions(0.1, soft_cap=0.0)}, r"soft_cap 0\.0"),
        (lambda a: {"options": AttentionOptions(0.1, alibi_slopes=torch.ones(4))}, r"alibi_slopes is float32 \[4\]"),
        (lambda a: {"out": torch.zeros(2, 8, 64)}, "out is float32"),
        (lambda a: {"lse": torch.zeros(2, 7)}, r"lse is float32 \[2, 7\]"),
    ],
)
def test_refuses(change, message):
    _refused(change, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "6 query heads are not a multiple of 4"),
        ({"num_heads": 34, "num_kv_heads": 2}, "give 17 rows"),
        ({"num_queries": 5}, "give 20 rows"),
        ({"head_dim": 72}, "head_dim is 72"),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, "queries are torch.float32"),
        ({"kv_dtype": torch.float16}, "the pool is torch.float16"),
        ({"windows": (0,)}, "window is 0"),
        ({"max_seqs": 0}, "max_seqs 0"),
    ],
)
def test_workspace_refuses(changes, message):
    shape = dataclasses.replace(Spec(num_kv_heads=1).shape(4, 100), **changes)
    with pytest.raises(ValueError, match=message):
        decode_workspace_bytes(shape, ShimLauncher())


def quantised(launcher: ShimLauncher) -> None:
    check_decode(launcher, SPECS["fp8, 128"], [1, 17, 300])


def quantised_f16(launcher: ShimLauncher) -> None:
    check_decode(launcher, SPECS["f16, int8, 80"], [33, 100])


def windowed(launcher: ShimLauncher) -> None:
    check_decode(launcher, SPECS["all options"], RAGGED)


def ragged(launcher: ShimLauncher) -> None:
    check_decode(launcher, SPECS["bf16"], RAGGED)


KERNEL, SHARED, EIGHT = "attention_decode.cu", "attention.cuh", "eight_bits.cuh"
PLANTS = {
    "a stage is read before it has landed": (
        KERNEL,
        "cp_async_wait<STAGES - 1>();",
        "cp_async_wait<STAGES>();",
        ragged,
    ),
    "lanes do not wait for each other's copies": (
        KERNEL,
        "__syncwarp();  // every lane's part of the page has landed",
        "",
        ragged,
    ),
    "the merge overwrites a ring in use": (KERNEL, "__syncthreads();  // the ring of every warp is free", "", ragged),
    "no rescaling": (KERNEL, "out[i][h][0] *= even;", "", ragged),
    "one key too many": (KERNEL, "behind <= 0 ||", "behind < 0 ||", ragged),
    "a window too wide": (
        KERNEL,
        "p.window > 0 ? p.window : 0x7fffffff",
        "p.window > 0 ? p.window + 1 : 0x7fffffff",
        windowed,
    ),
    "counters are not re-armed": (KERNEL, "if (is_last) *counter = 0;", "", ragged),
    "the last CTA but one combines": (
        KERNEL,
        "static_cast<u32>(num_splits - 1);",
        "static_cast<u32>(num_splits - 2);",
        ragged,
    ),
    "partial results of another head": (
        KERNEL,
        "const i64 step = static_cast<i64>(gridDim.x) * num_rows;",
        "const i64 step = num_rows;",
        replayed,
    ),
    "rounds of the combine are not rescaled": (KERNEL, "sum *= factor;", "", many_splits),
    "unused slots are copied": (SHARED, "row >= valid_from - first && row < valid_to - first", "true", ragged),
    "inf - inf": (SHARED, "return x == -MR_INF ? 0.0f : x;", "return x;", ragged),
    "block ids run out": (SHARED, "now = next;\n", "", long_sequence),
    "the next item starts too early": (
        KERNEL,
        "__syncthreads();  // shared memory is free for the next item",
        "",
        several_rounds,
    ),
    "value scales in the weights alone": (KERNEL, "w[i] * value_inverse[i]", "w[i]", quantised),
    "e4m3 one binade off": (EIGHT, "0x7b807b80u", "0x7b007b00u", quantised),
    "signs of int8": (EIGHT, "const u32 high = word >> 8;", "const u32 high = word >> 8 & 0x7fffffu;", quantised_f16),
    "an odd last step": (
        KERNEL,
        "value_tile + lane % 16 * STRIDE + step * 16 + (two ? lane / 16 * 16 : 0)",
        "value_tile + lane % 16 * STRIDE + step * 16 + (two ? 0 : lane / 16 * 16)",
        quantised_f16,
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_caught(planted, name):
    file, old, new, case = PLANTS[name]
    planted({file: [(old, new)]}, case)
