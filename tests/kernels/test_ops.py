"""What the fronts refuse, and in which order backends are asked."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from millrace.kernels import ops
from millrace.kernels.arguments import ActivationArgs, Backend, Refusal
from millrace.kernels.torch_backend import TorchBackend


class Unwilling(Backend):
    name = "unwilling"

    def silu_mul(self, args: ActivationArgs) -> Tensor | Refusal:
        return Refusal(f"width {args.x.shape[1]} is odd to me")


def test_the_next_backend_serves_what_the_first_refuses() -> None:
    x = torch.randn(2, 8)
    assert torch.equal(
        ops.silu_mul(x, backends=[Unwilling(), TorchBackend()]), ops.silu_mul(x, backends=[TorchBackend()])
    )


def test_a_miss_gives_every_reason() -> None:
    with pytest.raises(ops.UnservedError, match=r"silu_mul: unwilling: width 8 is odd to me; none: it has no silu_mul"):
        ops.silu_mul(torch.randn(2, 8), backends=[Unwilling(), Backend()])
    with pytest.raises(ops.UnservedError, match="list of backends is empty"):
        ops.silu_mul(torch.randn(2, 8), backends=[])


def test_the_cpu_backend_refuses_an_odd_head_dim_and_torch_serves(compiled: Backend) -> None:
    batch = ops.attention_batch(
        torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3], dtype=torch.int32),
        torch.tensor([[1]], dtype=torch.int32), 1, 3,
    )  # fmt: skip
    q, cache = torch.randn(1, 2, 10), torch.randn(2, 2, 16, 10)
    with pytest.raises(ops.UnservedError, match="head_dim 10"):
        ops.paged_attention(q, cache, cache, batch, 1.0, None, backends=[compiled])
    assert ops.paged_attention(q, cache, cache, batch, 1.0, None, backends=[compiled, TorchBackend()]).shape == q.shape


F, INT = torch.float32, torch.int32
X = torch.zeros(4, 8)
STRIDED = torch.zeros(8, 4).t()
HEADS, CACHE = torch.zeros(4, 2, 8), torch.zeros(3, 2, 16, 8)
LONGS = torch.zeros(4, dtype=torch.int64)
TABLE = torch.zeros(1, 2, dtype=INT)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=INT)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "weight of rank 1": (lambda: ops.pack_linear(torch.zeros(4)), r"weight is float32 \[4\]"),
    "weight of float64": (lambda: ops.pack_linear(X.double()), "float32 or bfloat16 or float16"),
    "weight not contiguous": (lambda: ops.pack_linear(STRIDED), "not contiguous"),
    "weight without rows": (lambda: ops.pack_linear(torch.zeros(0, 4)), "at least one row"),
    "bias of another length": (lambda: ops.pack_linear(X, torch.zeros(8)), r"\[4\]"),
    "tokens of int32": (lambda: ops.embedding(LONGS.int(), X), "int64"),
    "norm not contiguous": (lambda: ops.rms_norm(STRIDED, torch.zeros(8), 1e-6), "not contiguous"),
    "norm weight too long": (lambda: ops.rms_norm(X, torch.zeros(9), 1e-6), r"\[8\]"),
    "residual of another shape": (lambda: ops.add_rms_norm(X, X[:3], torch.zeros(8), 1e-6), r"\[4, 8\]"),
    "norm bias too long": (lambda: ops.layer_norm(X, torch.zeros(8), torch.zeros(9), 1e-6), "bias"),
    "odd gate_up": (lambda: ops.silu_mul(torch.zeros(2, 7)), "even width"),
    "gelu of float64": (lambda: ops.gelu_tanh(X.double()), "float32"),
    "rope k of other head_dim": (lambda: ops.rope_(HEADS, torch.zeros(4, 2, 6), torch.zeros(9, 8), LONGS), "k is"),
    "rope table too wide": (lambda: ops.rope_(HEADS, HEADS, torch.zeros(9, 10), LONGS), "rotary_dim"),
    "rope positions": (lambda: ops.rope_(HEADS, HEADS, torch.zeros(9, 8), LONGS[:3]), "positions"),
    "cache of another block size": (
        lambda: ops.write_kv(HEADS, HEADS, torch.zeros(3, 2, 8, 8), CACHE, LONGS),
        "k_cache",
    ),
    "v_cache of another shape": (lambda: ops.write_kv(HEADS, HEADS, CACHE, CACHE[:2], LONGS), "v_cache"),
    "8 bits without scales": (lambda: ops.write_kv(HEADS, HEADS, CACHE.char(), CACHE.char(), LONGS), "k_cache is int8"),
    "scales without 8 bits": (
        lambda: ops.write_kv(HEADS, HEADS, CACHE, CACHE, LONGS, kv_scales=torch.zeros(2, 3, 2, 16)),
        "float8_e4m3fn or int8",
    ),
    "scales of another shape": (
        lambda: ops.write_kv(HEADS, HEADS, CACHE.char(), CACHE.char(), LONGS, kv_scales=torch.zeros(2, 3, 2, 8)),
        r"kv_scales is float32 \[2, 3, 2, 8\]",
    ),
    "slots of another length": (lambda: ops.write_kv(HEADS, HEADS, CACHE, CACHE, LONGS[:1]), "slot_mapping"),
    "more queries than context": (lambda: ops.attention_batch(ints(0, 3), ints(2), TABLE, 3, 2), "sequence 0"),
    "query past the maximum": (lambda: ops.attention_batch(ints(0, 3), ints(9), TABLE, 2, 9), "max_query_len 2"),
    "context past the maximum": (lambda: ops.attention_batch(ints(0, 1), ints(9), TABLE, 1, 8), "max_context_len 8"),
    "table too narrow": (lambda: ops.attention_batch(ints(0, 1), ints(33), TABLE, 1, 33), "wide enough"),
    "starts not from zero": (lambda: ops.attention_batch(ints(1, 2), ints(3), TABLE, 1, 3), "begin with 0"),
    "lengths of int64": (lambda: ops.attention_batch(ints(0, 1), ints(3).long(), TABLE, 1, 3), "int32"),
    "copies of different lengths": (
        lambda: ops.copy_blocks(torch.zeros(1, 2, 3, 2, 16, 8), LONGS, LONGS[:2]),
        "target",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_argument_is_refused_with_the_numbers(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("q", "window", "message"),
    [
        (torch.zeros(2, 4, 8), None, "q is"),
        (torch.zeros(1, 3, 8), None, "divisible by num_kv_heads 2"),
        (torch.zeros(1, 4, 8), 0, "window is 0"),
    ],
)
def test_attention_refuses_wrong_queries(q: Tensor, window: int | None, message: str) -> None:
    batch = ops.attention_batch(ints(0, 1), ints(3), TABLE, 1, 3)
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(q, CACHE, CACHE, batch, 1.0, window)
