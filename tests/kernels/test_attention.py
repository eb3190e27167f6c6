"""Paged attention against one token, one head and one key at a time; every slot outside the contexts holds NaN, or of 8
bits anything with a scale of NaN."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from millrace.kernels import ops, reference
from millrace.kernels.arguments import Backend


@dataclass
class Case:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    kv_scales: Tensor | None = None

    def run(self, backend: Backend, window: int | None) -> Tensor:
        query_lens = self.query_starts.diff().tolist()
        batch = ops.attention_batch(
            self.query_starts, self.context_lens, self.block_tables, max(query_lens, default=0),
            max(self.context_lens.tolist(), default=0),
        )  # fmt: skip
        return ops.paged_attention(
            self.q, self.k_cache, self.v_cache, batch, 0.3, window, kv_scales=self.kv_scales, backends=[backend]
        )


def make_case(
    query_lens: list[int],
    context_lens: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    kv: torch.dtype = torch.float32,
) -> Case:
    blocks = [-(-length // 16) for length in context_lens]
    order = (torch.randperm(sum(blocks) + 2) + 1).int()
    k_cache = torch.full((sum(blocks) + 3, kv_heads, 16, head_dim), torch.nan)
    v_cache = k_cache.clone()
    tables = torch.zeros(len(blocks), max(blocks, default=0) + 1, dtype=torch.int32)
    for seq, length in enumerate(context_lens):
        tables[seq, : blocks[seq]] = order[sum(blocks[:seq]) : sum(blocks[: seq + 1])]
        at = torch.arange(length)
        block = tables[seq, at // 16].long()
        k_cache[block, :, at % 16] = torch.randn(length, kv_heads, head_dim)
        v_cache[block, :, at % 16] = torch.randn(length, kv_heads, head_dim)
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    q = torch.randn(sum(query_lens), kv_heads * group, head_dim)
    lens = torch.tensor(context_lens, dtype=torch.int32)
    if kv.itemsize > 1:
        return Case(q, k_cache.to(kv), v_cache.to(kv), starts, lens, tables)
    (k_cache, k_scales), (v_cache, v_scales) = (in_8_bits(cache, kv) for cache in (k_cache, v_cache))
    return Case(q, k_cache, v_cache, starts, lens, tables, torch.stack((k_scales, v_scales)))


def in_8_bits(cache: Tensor, kv: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = cache.abs().amax(-1) / (127 if kv == torch.int8 else 448)
    elements = cache / scales[..., None]
    return (elements.nan_to_num(99).round() if kv == torch.int8 else elements).to(kv), scales


def dequantised(case: Case, half: int) -> np.ndarray:
    cache = (case.k_cache, case.v_cache)[half].double()
    return (cache if case.kv_scales is None else cache * case.kv_scales[half][..., None].double()).numpy()


def expected(case: Case, window: int | None) -> np.ndarray:
    arrays = (case.q, case.query_starts, case.context_lens, case.block_tables)
    q, starts, lens, tables = (array.numpy() for array in arrays)
    return reference.paged_attention(q, dequantised(case, 0), dequantised(case, 1), starts, lens, tables, 0.3, window)


RAGGED = {
    "decode": ([1, 1, 1, 1], [1, 16, 17, 150]),
    "prefill": ([21, 3], [21, 3]),
    "mixed": ([1, 18, 0, 5, 1], [40, 18, 9, 33, 5]),
}
NARROW = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("kind", RAGGED)
@pytest.mark.parametrize("group", [1, 2, 4, 7])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_matches_the_reference(backend: Backend, head_dim: int, group: int, kind: str, window: int | None) -> None:
    case = make_case(*RAGGED[kind], kv_heads=2, group=group, head_dim=head_dim)
    y = case.run(backend, window)
    np.testing.assert_allclose(y.numpy(), expected(case, window), rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kind", RAGGED)
@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("kv", NARROW)
def test_narrow_pools(backend: Backend, kv: str, head_dim: int, group: int, kind: str, window: int | None) -> None:
    case = make_case(*RAGGED[kind], kv_heads=2, group=group, head_dim=head_dim, kv=NARROW[kv])
    y = case.run(backend, window)
    np.testing.assert_allclose(y.numpy(), expected(case, window), rtol=0, atol=2e-5)


def test_every_element_of_8_bits_is_read_as_what_it_is(backend: Backend) -> None:
    """One key in each of two contexts: the result is its value, which a scale that is a power of two leaves exact."""
    for kv, codes in ((torch.int8, range(256)), (torch.float8_e4m3fn, (*range(127), 0, *range(128, 255), 0))):
        case = make_case([1, 1], [1, 1], kv_heads=1, group=1, head_dim=128, kv=kv)
        for seq in range(2):
            line = torch.tensor(codes[seq * 128 : (seq + 1) * 128], dtype=torch.uint8)
            case.v_cache[case.block_tables[seq, 0], 0, 0] = line.view(kv)
        assert case.kv_scales is not None
        case.kv_scales[:, :, :, 0] = 0.25
        np.testing.assert_array_equal(case.run(backend, None).numpy(), expected(case, None))


@pytest.mark.parametrize("kv", NARROW)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [None, 300])
def test_long_contexts_of_narrow_pools(backend: Backend, window: int | None, threads: int, kv: str) -> None:
    torch.set_num_threads(threads)
    case = make_case([1, 30, 1], [500, 290, 128], kv_heads=1, group=2, head_dim=32, kv=NARROW[kv])
    np.testing.assert_allclose(case.run(backend, window).numpy(), expected(case, window), rtol=0, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [None, 300])
def test_long_contexts_cross_segments(backend: Backend, window: int | None, threads: int) -> None:
    torch.set_num_threads(threads)
    case = make_case([1, 30, 1], [700, 290, 128], kv_heads=1, group=2, head_dim=32)
    np.testing.assert_allclose(case.run(backend, window).numpy(), expected(case, window), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kv", [torch.float32, *NARROW.values()])
def test_one_long_sequence_is_shared_among_threads(compiled: Backend, kv: torch.dtype) -> None:
    case = make_case([1], [900], kv_heads=1, group=4, head_dim=64, kv=kv)
    alone = case.run(compiled, None)
    np.testing.assert_allclose(alone.numpy(), expected(case, None), rtol=0, atol=2e-5)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(case.run(compiled, None), alone)


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("kv", [torch.float32, *NARROW.values()])
def test_a_token_has_the_same_bits_in_any_chunk_and_batch(
    compiled: Backend, kv: torch.dtype, group: int, window: int | None
) -> None:
    case = make_case([300, 150], [300, 150], kv_heads=2, group=group, head_dim=64, kv=kv)
    whole = case.run(compiled, window)
    for begin, end in ((299, 300), (128, 129), (100, 163), (7, 290)):
        part = Case(
            case.q[begin:end].contiguous(), case.k_cache, case.v_cache,
            torch.tensor([0, end - begin], dtype=torch.int32), torch.tensor([end], dtype=torch.int32),
            case.block_tables[:1], case.kv_scales,
        )  # fmt: skip
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(part.run(compiled, window), whole[begin:end])


@pytest.mark.parametrize("kv", [torch.float32, *NARROW.values()])
def test_large_scores_do_not_overflow(backend: Backend, kv: torch.dtype) -> None:
    case = make_case([1, 4], [70, 200], kv_heads=1, group=2, head_dim=32, kv=kv)
    case.q *= 500
    np.testing.assert_allclose(case.run(backend, None).numpy(), expected(case, None), rtol=0, atol=2e-2)


def test_a_query_that_is_not_a_number_says_so(backend: Backend) -> None:
    case = make_case([1, 1], [20, 30], kv_heads=1, group=2, head_dim=32)
    case.q[1, 0, 3] = torch.nan
    y = case.run(backend, None)
    assert y[1, 0].isnan().all() and not y[0].isnan().any() and not y[1, 1].isnan().any()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_a_number_reaches_only_those_who_see_it(
    compiled: Backend, kv: torch.dtype, window: int | None
) -> None:
    case = make_case([40], [40], kv_heads=1, group=3, head_dim=64, kv=kv)
    clean = case.run(compiled, window)
    case.v_cache[case.block_tables[0, 0].long(), 0, 9] = torch.nan
    y = case.run(compiled, window)
    last = 40 if window is None else 9 + window
    assert y[9:last].isnan().all()
    others = [*range(9), *range(last, 40)]
    torch.testing.assert_close(y[others], clean[others], rtol=0, atol=1e-6)


def test_an_empty_batch_gives_nothing(backend: Backend) -> None:
    case = make_case([0], [5], kv_heads=2, group=2, head_dim=32)
    assert case.run(backend, None).shape == (0, 4, 32)
    nobody = make_case([], [], kv_heads=2, group=2, head_dim=32)
    assert nobody.run(backend, None).shape == (0, 4, 32)


def test_a_block_outside_the_pool_is_an_error(backend: Backend) -> None:
    case = make_case([1], [40], kv_heads=2, group=2, head_dim=32)
    case.block_tables[0, 1] = 99
    with pytest.raises(IndexError):
        case.run(backend, None)


def test_the_plan_of_a_batch_is_made_once() -> None:
    case = make_case([1, 1], [20, 30], kv_heads=1, group=1, head_dim=32)
    batch = ops.attention_batch(case.query_starts, case.context_lens, case.block_tables, 1, 30)
    made: list[int] = []
    assert batch.plan("a", lambda: made.append(1) or 5) == 5
    assert batch.plan("a", lambda: made.append(2) or 6) == 5
    assert made == [1]
