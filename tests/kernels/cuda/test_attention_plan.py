"""The work table of decode attention, filled on the host shim and compared with a plain model of its rule."""

import random

import pytest
import torch
from attention_cases import FAR, Spec

from millrace.kernels import cuda_attention
from millrace.kernels.cuda_attention import DecodeWorkspace, decode_workspace, plan_decode
from shim.fence import fenced
from shim.launcher import ShimLauncher


def expected(workspace: DecodeWorkspace, context_lens: list[int], window: int | None) -> list[list[int]]:
    """Header and items: [seq, first page, pages, split | splits << 16]."""
    shape = workspace.shape
    pages = []
    for context_len in context_lens:
        first = 0 if window is None else max(0, context_len - shape.num_queries + 1 - window) // 16
        pages.append((first, -(-context_len // 16) - first))
    if shape.batch_invariant:
        size, most = cuda_attention.INVARIANT_SPLIT_PAGES, cuda_attention.INVARIANT_MAX_SPLITS
    else:
        total = sum(count for _, count in pages)
        size, most = max(cuda_attention.MIN_SPLIT_PAGES, -(-total // workspace.target_items)), cuda_attention.MAX_SPLITS
    items = []
    for seq, (first, count) in enumerate(pages):
        length = -(-count // min(most, -(-count // size))) if count else 1
        splits = max(1, -(-count // length))
        items += [
            [seq, first + split * length, min(length, count - split * length), split | splits << 16]
            for split in range(splits)
        ]
    return [[len(items), size, 0, 0], *items]


def plan(
    launcher: ShimLauncher, context_lens: list[int], window: int | None = None, *, max_seqs: int = 0, **options: object
) -> None:
    spec = Spec(window=window, num_kv_heads=2, num_queries=2)
    shape = spec.shape(max(max_seqs, len(context_lens)), max(*context_lens, 16), **options)  # type: ignore[arg-type]
    workspace = decode_workspace(shape, launcher, "cpu")
    table = fenced(torch.full_like(workspace.tables[window], FAR))
    workspace.tables[window] = table  # type: ignore[index]
    plan_decode(launcher, fenced(torch.tensor(context_lens, dtype=torch.int32)), workspace, stream=0)
    want = expected(workspace, context_lens, window)
    assert table[: len(want)].tolist() == want
    assert (table[len(want) :] == FAR).all()


CASES = {
    "one": [1],
    "padded": [0, 0, 5, 0],
    "ragged": [1, 16, 17, 5000, 716, 300],
    "one long": [100_000],
    "as many as threads": [100] * 256,
    "more than threads": [random.Random(1).randrange(0, 900) for _ in range(300)],
}


@pytest.mark.slow
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("window", [None, 1, 700])
@pytest.mark.parametrize("name", CASES)
def test_table(four_ways, name, window, invariant):
    four_ways(lambda launcher: plan(launcher, CASES[name], window, batch_invariant=invariant))


def test_every_batch_fits_the_table(four_ways):
    """With as many items as can be: the front's capacity is enough, and the device is filled."""

    def case(launcher: ShimLauncher) -> None:
        rng = random.Random(0)
        for _ in range(20):
            launcher.sm_count = rng.randrange(1, 140)
            plan(launcher, [rng.randrange(0, 3000) for _ in range(rng.randrange(1, 40))], max_seqs=rng.randrange(1, 60))

    four_ways(case)


def test_one_launch_per_window(four_ways):
    def case(launcher: ShimLauncher) -> None:
        shape = Spec().shape(2, 100)
        both = decode_workspace(shape.__class__(**{**vars(shape), "windows": (None, 20)}), ShimLauncher(), "cpu")
        plan_decode(launcher, torch.tensor([100, 10], dtype=torch.int32), both, stream=0)
        assert [kernel.name for kernel in launcher.launches] == ["mr_plan_decode"] * 2
        assert both.tables[None][1].tolist() == [0, 0, 7, 1 << 16]
        assert both.tables[20][1].tolist() == [0, 5, 2, 1 << 16]

    four_ways(case)


@pytest.mark.parametrize(
    ("context_lens", "message"),
    [
        (torch.ones(3, dtype=torch.int32), "3 sequences, but the workspace is for 1 to 2"),
        (torch.ones(0, dtype=torch.int32), "0 sequences"),
        (torch.ones(2, dtype=torch.int64), "context_lens is int64"),
        (torch.ones(4, dtype=torch.int32)[::2], "not contiguous"),
    ],
)
def test_refuses(context_lens, message):
    workspace = decode_workspace(Spec().shape(2, 100), ShimLauncher(), "cpu")
    with pytest.raises(ValueError, match=message):
        plan_decode(ShimLauncher(), context_lens, workspace, stream=0)


def all_cases(launcher: ShimLauncher) -> None:
    for context_lens in CASES.values():
        plan(launcher, context_lens, 700)
        plan(launcher, context_lens, batch_invariant=True)


PLANTS = {
    "the scan loses a warp": ("if (i < warp) before += warp_totals[i];", "if (i < warp - 1) before += warp_totals[i];"),
    "readers of the call before": ("__syncthreads();  // readers of the call before are done", ""),
    "a split too long": ("min(size, num_pages - split * size)", "size"),
    "a query's window": ("context_len - p.num_queries + 1 - p.window", "context_len - p.window"),
    "no item for a padded row": ("seq < p.num_seqs ? 1 : 0", "pages.count > 0 ? 1 : 0"),
    "another lane's sequence": ("item[0] = seq - lane + owner;", "item[0] = seq;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_caught(planted, name):
    planted({"attention_plan.cu": [PLANTS[name]]}, all_cases)
