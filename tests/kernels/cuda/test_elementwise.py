"""Norms, activations, embedding and the way from qkv into the pool: executed on the shim, against float64."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.kernels import cuda_elementwise as front
from millrace.kernels import reference_cuda_elementwise as reference
from shim.fence import fenced, nan_filled
from shim.launcher import ShimLauncher

pytestmark = (
    pytest.mark.slow
)  # tests/runtime/cuda drives the same kernels within models, and `make test-fast` runs that

FourWays = Callable[[Callable[[ShimLauncher], object]], None]
BF16, F16 = torch.bfloat16, torch.float16
# Half a unit in the last place by the rounding of the result, and the same again for all that comes before.
RTOL = {BF16: 2.0**-8, F16: 2.0**-10}


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return fenced((torch.randn(shape) * scale + shift).to(dtype))


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL[dtype], atol=atol, equal_nan=True)


# One row of each way to lay a row out: less than a warp, a last vector short of a block, and 1, 2 and 4 vectors.
WIDTHS = [8, 520, 4096, 4104, 8200]


def norm_case(
    launcher: ShimLauncher, kind: str, width: int = 520, rows: int = 3, dtype: torch.dtype = BF16, residual: bool = True
) -> None:
    x, weight = random(rows, width, dtype=dtype, shift=2.0), random(width, dtype=dtype)
    bias = random(width, dtype=dtype) if kind == "layer_norm" and width % 3 else None
    before = random(rows, width, dtype=dtype) if residual else None
    total = x if before is None else (x.float() + before.float()).to(dtype)
    out = nan_filled(rows, width, dtype=dtype)
    options: dict[str, Any] = {"residual": before, "out": out, "launcher": launcher, "stream": 0}
    if kind == "rms_norm":
        expected = reference.rms_norm(total, weight, 1e-5)
        front.rms_norm(x, weight, 1e-5, **options)
    else:
        expected = reference.layer_norm(total, weight, bias, 1e-5)
        front.layer_norm(x, weight, bias, 1e-5, **options)
    assert_near(out, expected, dtype, atol=2e-5)
    assert before is None or torch.equal(before, total)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(four_ways: FourWays, kind: str, width: int) -> None:
    def cases(launcher: ShimLauncher) -> None:
        norm_case(launcher, kind, width, rows=1, residual=False)
        norm_case(launcher, kind, width, rows=2)
        norm_case(launcher, kind, width, rows=2, dtype=F16)

    four_ways(cases)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_a_row_does_not_depend_on_the_batch_and_keeps_its_nan(four_ways: FourWays, kind: str) -> None:
    def case(launcher: ShimLauncher) -> None:
        x, weight = random(4, 264), random(264)
        x[2, 7] = torch.nan
        options: dict[str, Any] = {"launcher": launcher, "stream": 0}

        def run(rows: Tensor) -> Tensor:
            if kind == "rms_norm":
                return front.rms_norm(rows, weight, 1e-5, **options)
            return front.layer_norm(rows, weight, None, 1e-5, **options)

        together = run(x)
        assert together[2].isnan().all() and not together[[0, 1, 3]].isnan().any()
        for row in (0, 1, 3):
            assert torch.equal(run(fenced(x[row : row + 1]))[0], together[row])

    four_ways(case)


ACTIVATIONS = list(itertools.product(["silu", "gelu_tanh", "gelu_erf"], [False, True]))


def activation_case(
    launcher: ShimLauncher, name: str, gated: bool, width: int = 2088, rows: int = 2, dtype: torch.dtype = BF16
) -> None:
    x = random(rows, width * (2 if gated else 1), dtype=dtype, scale=3.0)
    x[:, ::7] *= 30  # far into both tails
    out = nan_filled(rows, width, dtype=dtype)
    front.activation(x, name, gated=gated, out=out, launcher=launcher, stream=0)
    assert_near(out, reference.activation(x, name, gated), dtype, atol=1e-4)


@pytest.mark.parametrize(("name", "gated"), ACTIVATIONS)
def test_activations(four_ways: FourWays, name: str, gated: bool) -> None:
    def cases(launcher: ShimLauncher) -> None:
        for rows, width in ((3, 8), (1, 264), (2, 2088)):
            activation_case(launcher, name, gated, width, rows, F16 if name == "gelu_tanh" else BF16)

    four_ways(cases)


def test_activations_keep_nan_and_infinity(four_ways: FourWays) -> None:
    def case(launcher: ShimLauncher) -> None:
        for name, gated in ACTIVATIONS:
            x = random(2, 16)
            x[0, 3], x[1, 2] = torch.nan, torch.inf
            y = front.activation(x, name, gated=gated, launcher=launcher, stream=0)
            assert y[0, 3].isnan() and y[1, 2].isinf() and y.isfinite().sum() == y.numel() - 2

    four_ways(case)


def embedding_case(launcher: ShimLauncher, width: int, learned: bool, dtype: torch.dtype = BF16) -> None:
    weight, tokens = random(11, width, dtype=dtype), fenced(torch.tensor([3, 10, 0, 11, -1, 3]))
    positions = fenced(torch.tensor([0, 6, 2, 3, 4, 7])) if learned else None
    table = random(7, width, dtype=dtype) if learned else None
    out = nan_filled(6, width, dtype=dtype)
    options: dict[str, Any] = {"positions": positions, "position_weight": table, "out": out}
    front.embedding(tokens, weight, **options, launcher=launcher, stream=0)
    assert_near(out, reference.embedding(tokens, weight, positions, table), dtype)


@pytest.mark.parametrize("learned", [False, True])
def test_embedding(four_ways: FourWays, learned: bool) -> None:
    def cases(launcher: ShimLauncher) -> None:
        for width, dtype in ((8, BF16), (2056, F16)):
            embedding_case(launcher, width, learned, dtype)

    four_ways(cases)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A model's shape, and what it does between qkv and attention."""

    num_heads: int = 3
    num_kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 64  # 0: none
    bias: bool = False
    norm: bool = False
    dtype: torch.dtype = BF16
    pool: torch.dtype | None = None  # None: dtype
    separate: bool = False  # queries go to a matrix of their own


LAYERS = {
    "llama": Layer(num_heads=8, num_kv_heads=2, head_dim=128, rotary_dim=128),
    "qwen2": Layer(num_heads=7, num_kv_heads=1, bias=True, dtype=F16),
    "qwen3": Layer(head_dim=128, rotary_dim=128, norm=True, separate=True),
    "gpt2": Layer(num_heads=2, rotary_dim=0, bias=True),
    "phi": Layer(head_dim=80, rotary_dim=32, bias=True),
    "neox": Layer(head_dim=96, rotary_dim=24),
    "gemma": Layer(num_heads=1, num_kv_heads=1, head_dim=256, rotary_dim=256, norm=True, bias=True),
    "small": Layer(head_dim=8, rotary_dim=8, norm=True),
}
SLOTS = [5, 47, -1, 16, 64, 31]  # of 4 blocks; one nowhere, one behind the pool
POSITIONS = [0, 9, 3, 9, 4, 1]


def rope_case(launcher: ShimLauncher, layer: Layer) -> None:
    heads = layer.num_heads + 2 * layer.num_kv_heads
    qkv = random(len(SLOTS), heads * layer.head_dim, dtype=layer.dtype)
    bias = random(heads * layer.head_dim, dtype=layer.dtype) if layer.bias else None
    q_norm, k_norm = (random(layer.head_dim, dtype=layer.dtype) if layer.norm else None for _ in range(2))
    angles = torch.rand(10, layer.rotary_dim // 2) * 6
    cos_sin = fenced(torch.cat((angles.cos(), angles.sin()), 1)) if layer.rotary_dim else None
    positions = fenced(torch.tensor(POSITIONS)) if layer.rotary_dim else None
    pool = nan_filled(2, 4, layer.num_kv_heads, 16, layer.head_dim, dtype=layer.pool or layer.dtype)
    scales = nan_filled(2, 4, layer.num_kv_heads, 16, dtype=torch.float32) if layer.pool else None
    queries, keys, values = reference.qkv_heads(
        qkv, layer.num_heads, layer.num_kv_heads, bias, q_norm, k_norm, 1e-6, cos_sin, positions
    )
    out = nan_filled(len(SLOTS), layer.num_heads * layer.head_dim, dtype=layer.dtype) if layer.separate else None
    untouched = qkv[:, 0 if layer.separate else layer.num_heads * layer.head_dim :].clone()
    result = front.rope_write_kv(
        qkv,
        fenced(torch.tensor(SLOTS)),
        pool,
        num_heads=layer.num_heads,
        bias=bias,
        q_norm=q_norm,
        k_norm=k_norm,
        cos_sin=cos_sin,
        positions=positions,
        kv_scales=scales,
        out=out,
        launcher=launcher,
        stream=0,
    )
    assert (result is out) if layer.separate else (result.data_ptr() == qkv.data_ptr())
    assert_near(result.reshape(queries.shape), queries, layer.dtype, atol=2e-6)
    assert torch.equal(qkv[:, -untouched.shape[1] :], untouched)
    written = [(token, slot) for token, slot in enumerate(SLOTS) if 0 <= slot < 64]
    for half, expected in enumerate((keys, values)):
        for token, slot in written:
            stored = reference.slot(pool[half], slot).double()
            if scales is None:
                assert_near(stored, expected[token], layer.dtype, atol=2e-6)
                continue
            largest = expected[token].abs().amax(-1, keepdim=True)
            scale = reference.slot(scales[half], slot).double()[:, None]
            limit = 127 if layer.pool == torch.int8 else 448
            torch.testing.assert_close(scale, largest / limit, rtol=1e-5, atol=0.0)
            # INT8: half a step. e4m3: half a unit of four significant bits, or of the subnormals' step of 2^-9.
            error = (stored * scale - expected[token]).abs()
            step = scale / 2 if layer.pool == torch.int8 else (expected[token].abs() / 16).maximum(scale * 2.0**-10)
            assert (error <= step * 1.0001 + 1e-7).all()
    # What no token owns is as it was: 0xff.
    raw = pool.view(torch.uint8)
    for half in range(2):
        for slot in set(range(64)) - {slot for _, slot in written}:
            assert (reference.slot(raw[half], slot) == 0xFF).all()
            assert scales is None or reference.slot(scales[half], slot).isnan().all()


@pytest.mark.parametrize("name", LAYERS)
def test_rope_write_kv(four_ways: FourWays, name: str) -> None:
    four_ways(lambda launcher: rope_case(launcher, LAYERS[name]))


@pytest.mark.parametrize("pool", [torch.float8_e4m3fn, torch.int8], ids=["e4m3", "int8"])
@pytest.mark.parametrize("name", ["llama", "phi", "gemma", "small"])
def test_rope_write_kv_into_8_bits(four_ways: FourWays, name: str, pool: torch.dtype) -> None:
    layer = dataclasses.replace(LAYERS[name], pool=pool, dtype=F16 if name == "phi" else BF16)
    four_ways(lambda launcher: rope_case(launcher, layer))


@pytest.mark.parametrize("pool", [None, torch.float8_e4m3fn, torch.int8], ids=["same", "e4m3", "int8"])
def test_a_nan_and_a_zero_stay_with_their_head(four_ways: FourWays, pool: torch.dtype | None) -> None:
    def case(launcher: ShimLauncher) -> None:
        qkv = random(2, 3 * 64)
        qkv[0, 64 + 9] = torch.nan
        qkv[1, 128:] = 0
        cache = nan_filled(2, 1, 1, 16, 64, dtype=pool or BF16)
        scales = nan_filled(2, 1, 1, 16, dtype=torch.float32) if pool else None
        slots = fenced(torch.tensor([0, 1]))
        front.rope_write_kv(qkv, slots, cache, num_heads=1, kv_scales=scales, launcher=launcher, stream=0)
        stored = cache.double() if scales is None else cache.double() * scales.double()[..., None]
        assert stored[0, 0, 0, 0].isnan().any() and stored[1, 0, 0, 0].isfinite().all()
        assert stored[0, 0, 0, 1].isfinite().all() and (stored[1, 0, 0, 1] == 0).all()

    four_ways(case)


def test_an_unknown_position_makes_its_token_nan(four_ways: FourWays) -> None:
    def case(launcher: ShimLauncher) -> None:
        qkv, cache = random(3, 3 * 16), nan_filled(2, 1, 1, 16, 16, dtype=BF16)
        angles = torch.rand(5, 8)
        q = front.rope_write_kv(
            qkv,
            fenced(torch.tensor([0, 1, 2])),
            cache,
            num_heads=1,
            cos_sin=fenced(torch.cat((angles.cos(), angles.sin()), 1)),
            positions=fenced(torch.tensor([5, 4, -1])),
            launcher=launcher,
            stream=0,
        )
        assert q[[0, 2]].isnan().all() and q[1].isfinite().all()
        assert cache[0, 0, 0, [0, 2]].isnan().all() and cache[0, 0, 0, 1].isfinite().all()
        assert cache[1, 0, 0, :3].isfinite().all()

    four_ways(case)


def test_no_tokens_launch_nothing(launcher: ShimLauncher) -> None:
    none = torch.empty(0, 64, dtype=BF16)
    options: dict[str, Any] = {"launcher": launcher, "stream": 0}
    assert front.rms_norm(none, random(64), 1e-5, **options).shape == (0, 64)
    assert front.activation(none, "silu", gated=True, **options).shape == (0, 32)
    assert front.embedding(torch.empty(0, dtype=torch.int64), random(5, 64), **options).shape == (0, 64)
    cache, slots = torch.empty(2, 1, 1, 16, 16, dtype=BF16), torch.empty(0, dtype=torch.int64)
    assert front.rope_write_kv(none, slots, cache, num_heads=2, **options).shape == (0, 32)
    assert launcher.launches == []


class Unlaunched(ShimLauncher):
    """For calls that must be refused before a kernel is launched."""

    def launch(self, *arguments: Any, **options: Any) -> None:
        raise AssertionError("launched")


def shifted(tensor: Tensor) -> Tensor:
    """The same values one element further, so that they do not begin at a multiple of 16 bytes."""
    place = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return place.copy_(tensor)


X, WEIGHT = torch.zeros(3, 64, dtype=BF16), torch.zeros(64, dtype=BF16)
NO_TOKEN = torch.zeros(3, dtype=torch.int64)
POOL = torch.zeros(2, 4, 1, 16, 16, dtype=BF16)  # with X: two query heads
REFUSED: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any], str]] = {
    "dtype": (front.rms_norm, (X.float(), WEIGHT, 1e-5), {}, r"x is float32 \[3, 64\].*bfloat16 or float16"),
    "mixed": (front.rms_norm, (X, WEIGHT.half(), 1e-5), {}, r"weight is float16 \[64\].*bfloat16 \[64\]"),
    "weight": (front.layer_norm, (X, WEIGHT[:32], None, 1e-5), {}, r"weight is bfloat16 \[32\].*\[64\]"),
    "bias": (front.layer_norm, (X, WEIGHT, X, 1e-5), {}, r"bias is bfloat16 \[3, 64\]"),
    "residual": (front.rms_norm, (X, WEIGHT, 1e-5), {"residual": X[:2]}, r"residual is bfloat16 \[2, 64\].*\[3, 64\]"),
    "strides": (front.rms_norm, (X.T.contiguous().T, WEIGHT, 1e-5), {}, r"x is .*contiguous"),
    "alignment": (front.rms_norm, (shifted(X), WEIGHT, 1e-5), {}, "x begins at 0x.*multiple of 16"),
    "shared": (front.rms_norm, (X, WEIGHT, 1e-5), {"out": X}, "out shares memory with the input"),
    "width": (front.rms_norm, (X[:, :50].contiguous(), WEIGHT[:50], 1e-5), {}, "hidden is 50.*multiple of 8"),
    "too wide": (
        front.rms_norm,
        (torch.zeros(1, 32776, dtype=BF16), torch.zeros(32776, dtype=BF16), 1e-5),
        {},
        "hidden is 32776.*up to 32768",
    ),
    "odd": (front.activation, (X[:, :63].contiguous(), "silu"), {"gated": True}, "silu_mul: x is 63 wide.*even"),
    "narrow": (front.activation, (X[:, :40].contiguous(), "silu"), {"gated": True}, "width is 20"),
    "name": (front.activation, (X, "relu"), {}, "'relu' is none of silu, gelu_tanh, gelu_erf"),
    "out": (front.activation, (X, "silu"), {"out": X[:, :32].clone()}, r"out is bfloat16 \[3, 32\].*\[3, 64\]"),
    "ids": (front.embedding, (NO_TOKEN.int(), X), {}, r"tokens is int32 \[3\].*int64"),
    "table": (front.embedding, (NO_TOKEN, X), {"positions": NO_TOKEN}, "must be given together"),
    "head_dim": (
        front.rope_write_kv,
        (X, NO_TOKEN, POOL),
        {"num_heads": 3},
        r"qkv is 64 wide, but 3 query heads and 2 \* 1 of the pool of 16 each make 80",
    ),
    "slots": (front.rope_write_kv, (X, NO_TOKEN[:2], POOL), {"num_heads": 2}, r"slot_mapping is int64 \[2\]"),
    "pool": (front.rope_write_kv, (X, NO_TOKEN, POOL[0]), {"num_heads": 2}, r"kv_cache is .*\[2, num_blocks"),
    "pool dtype": (front.rope_write_kv, (X, NO_TOKEN, POOL.half()), {"num_heads": 2}, "kv_cache is float16"),
    "scales": (
        front.rope_write_kv,
        (X, NO_TOKEN, POOL.to(torch.int8)),
        {"num_heads": 2},
        r"kv_scales are missing with a pool of torch.int8",
    ),
    "no scales": (
        front.rope_write_kv,
        (X, NO_TOKEN, POOL),
        {"num_heads": 2, "kv_scales": POOL[..., 0].float()},
        "kv_scales are given with a pool of torch.bfloat16",
    ),
    "positions": (
        front.rope_write_kv,
        (X, NO_TOKEN, POOL),
        {"num_heads": 2, "cos_sin": torch.zeros(9, 16)},
        "must be given together",
    ),
    "rotary_dim": (
        front.rope_write_kv,
        (X, NO_TOKEN, POOL),
        {"num_heads": 2, "cos_sin": torch.zeros(9, 12), "positions": NO_TOKEN},
        "rotary_dim is 12.*multiple of 8 above 0 up to 16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_kernel_cannot_take_is_refused(name: str) -> None:
    function, arguments, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options, launcher=Unlaunched(), stream=0)


def test_tensors_of_another_device_are_refused() -> None:
    launcher = Unlaunched()
    launcher.device_type = "cuda"
    with pytest.raises(ValueError, match="rms_norm: x is on cpu, but it must be on a cuda device"):
        front.rms_norm(X, WEIGHT, 1e-5, launcher=launcher, stream=0)


# A bug in one place of a kernel, and the case that has to fail on it.
PLANTS: dict[str, tuple[str, str, str, Callable[[ShimLauncher], None]]] = {
    "sum without a barrier": (
        "norm.cu",
        "    __syncthreads();\n",
        "",
        lambda launcher: norm_case(launcher, "rms_norm"),
    ),
    "sum of the first warp alone": (
        "norm.cu",
        "lane < blockDim.x / 32 ? partial[lane] : 0.0f",
        "partial[0]",
        lambda launcher: norm_case(launcher, "rms_norm"),
    ),
    "sum over warps that do not exist": (
        "norm.cu",
        "lane < blockDim.x / 32 ? partial[lane] : 0.0f",
        "partial[lane]",
        lambda launcher: norm_case(launcher, "layer_norm"),
    ),
    "keeps the residual in place of the sum": (
        "norm.cu",
        "unpack16<MR_T>(kept[i], x);  // what is normalised is what the residual holds",
        "kept[i] = pack16<MR_T>(r);",
        lambda launcher: norm_case(launcher, "rms_norm"),
    ),
    "residual is not written": (
        "norm.cu",
        "store16(p.residual + row + vector * VEC<MR_T>, kept[i]);",
        "{}",
        lambda launcher: norm_case(launcher, "rms_norm"),
    ),
    "reads past the end of a row": (
        "norm.cu",
        "inside ? load16(p.weight + vector * VEC<MR_T>) : zeros",
        "load16(p.weight + vector * VEC<MR_T>)",
        lambda launcher: norm_case(launcher, "rms_norm"),
    ),
    "zeros of the padding enter the variance": (
        "norm.cu",
        "if (threadIdx.x + i * blockDim.x >= num_vectors) continue;  // its zeros are no elements of the row",
        "",
        lambda launcher: norm_case(launcher, "layer_norm"),
    ),
    "one partial array for two sums": (
        "norm.cu",
        "normalise<true>(p, means, squares);",
        "normalise<true>(p, means, means);",
        lambda launcher: norm_case(launcher, "layer_norm"),
    ),
    "writes past the end of a row": (
        "activation.cu",
        "if (column >= p.width) return;",
        "",
        lambda launcher: activation_case(launcher, "silu", False, rows=1),
    ),
    "gate and up change places": (
        "activation.cu",
        "up = load16_streaming(x + p.width);",
        "up = load16_streaming(x);",
        lambda launcher: activation_case(launcher, "gelu_tanh", True),
    ),
    "row offset of a gated matrix": (
        "activation.cu",
        "(MR_GATED ? 2 : 1)",
        "1",
        lambda launcher: activation_case(launcher, "silu", True),
    ),
    "an id one past the table": (
        "embedding.cu",
        "token >= p.vocab",
        "token > p.vocab",
        lambda launcher: embedding_case(launcher, 8, False),
    ),
    "rotation without a barrier": (
        "rope_kv.cu",
        "        __syncwarp();\n",
        "",
        lambda launcher: rope_case(launcher, LAYERS["llama"]),
    ),
    "wrong sign in the rotation": (
        "rope_kv.cu",
        "low ? -partner[e] : partner[e]",
        "low ? partner[e] : -partner[e]",
        lambda launcher: rope_case(launcher, LAYERS["phi"]),
    ),
    "values are rotated": (
        "rope_kv.cu",
        "is_value || at >= p.rotary_dim",
        "at >= p.rotary_dim",
        lambda launcher: rope_case(launcher, LAYERS["phi"]),
    ),
    "norm over two heads": (
        "rope_kv.cu",
        "warp_sum<MR_LANES>(sum)",
        "warp_sum(sum)",
        lambda launcher: rope_case(launcher, LAYERS["qwen3"]),
    ),
    "the slot -1 is written": (
        "rope_kv.cu",
        "slot >= 0 && ",
        "",
        lambda launcher: rope_case(launcher, LAYERS["llama"]),
    ),
    "offset inside of a block": (
        "rope_kv.cu",
        "* 16 + (slot & 15)",
        "* 16 + (slot & 7)",
        lambda launcher: rope_case(launcher, LAYERS["gpt2"]),
    ),
    "scale of a part of the head": (
        "rope_kv.cu",
        "for (int step = MR_LANES / 2; step > 0; step /= 2) bits",
        "for (int step = MR_LANES / 4; step > 0; step /= 2) bits",
        lambda launcher: rope_case(launcher, dataclasses.replace(LAYERS["llama"], pool=torch.int8)),
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_caught(planted: Callable[..., str], name: str) -> None:
    file, old, new, case = PLANTS[name]
    planted({file: [(old, new)]}, case)
