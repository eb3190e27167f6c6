"""Cases of every kernel that run on any launcher: on a device, and on the host shim, from the same inputs.

Inputs are drawn on the CPU and moved, so that both see the same bits. Pools come from the tests of the shim: every slot
that no context uses holds NaN, and block tables name no block behind a context.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu.tree import ROOT
from millrace.kernels import (
    cuda_attention,
    cuda_copy,
    cuda_elementwise,
    cuda_gemv,
    cuda_gemv_rows,
    cuda_rounded,
    cuda_sampling,
)
from millrace.kernels import reference_cuda_attention as attention_reference
from millrace.kernels import reference_cuda_elementwise as reference
from millrace.kernels import reference_cuda_gemv as gemv_reference
from millrace.kernels import reference_cuda_sampling as sampling_reference
from millrace.kernels.cuda_launch import Launcher
from millrace.kernels.quantized import Float8Weight

if str(ROOT / "tests" / "kernels" / "cuda") not in sys.path:
    sys.path.append(str(ROOT / "tests" / "kernels" / "cuda"))
from attention_cases import BF16, F16, FP8, INT8, Spec, make_sequences

UNIT = {BF16: 2.0**-8, F16: 2.0**-11}  # of the last place, of a value's size
ROPE_POSITIONS, ROPE_SLOTS = [0, 9, 3, 9, 4, 1], [5, 47, -1, 16, 64, 31]  # of 4 blocks: one nowhere, one behind


class Place(NamedTuple):
    """Where a case runs."""

    launcher: Launcher
    device: str
    stream: int

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, copy=True)  # kernels may change what they are given

    @property
    def way(self) -> dict[str, Any]:
        return {"launcher": self.launcher, "stream": self.stream}


class Checked(NamedTuple):
    """Results on the CPU and what they should be, in float64; `tolerance` is of norm(got - want) / norm(want)."""

    got: list[Tensor]
    want: list[Tensor]
    tolerance: float


class Case(NamedTuple):
    group: str
    name: str
    run: Callable[[Place], Checked]
    small: bool = False  # also under compute-sanitizer


def error_of(got: Tensor, want: Tensor) -> float:
    """norm(got - want) / norm(want); infinite where something is not finite that should be, or the other way round."""
    a, b = got.double(), want.double()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    kept = b.isfinite()
    infinite = b.isinf()
    if not torch.equal(a[infinite], b[infinite]):
        return float("inf")
    size = float(b[kept].norm())
    difference = float((a[kept] - b[kept]).norm())
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


# ---- attention --------------------------------------------------------------------------------------------------


def _pool(place: Place, pool: cuda_attention.KvPool) -> cuda_attention.KvPool:
    return cuda_attention.KvPool(*(None if part is None else place.put(part) for part in pool))


def _options(place: Place, spec: Spec) -> tuple[cuda_attention.AttentionOptions, cuda_attention.AttentionOptions]:
    """On the CPU and on the device."""
    options = spec.options()
    slopes = options.alibi_slopes
    return options, options._replace(alibi_slopes=None if slopes is None else place.put(slopes))


def decode(place: Place, spec: Spec, lens: Sequence[int], batch_invariant: bool = False) -> Checked:
    sequences = make_sequences(spec, lens)
    options, there = _options(place, spec)
    q = torch.randn(len(lens) * spec.num_queries, spec.num_heads, spec.head_dim).to(spec.dtype)
    shape = spec.shape(len(lens) + 1, max(*lens, 16), batch_invariant)
    workspace = cuda_attention.decode_workspace(shape, place.launcher, place.device)
    context_lens, lse = place.put(sequences.context_lens), torch.empty(q.shape[:2], device=place.device)
    inputs = (place.put(q), _pool(place, sequences.pool), place.put(sequences.block_tables), context_lens)
    outs = []
    for _ in range(2):  # the second time it finds what the first has left
        cuda_attention.plan_decode(place.launcher, context_lens, workspace, stream=place.stream)
        out = cuda_attention.decode_attention(
            place.launcher, *inputs, workspace, there, lse=lse, out=torch.full_like(inputs[0], torch.nan),
            stream=place.stream,
        )  # fmt: skip
        outs.append(out.cpu())
    want, want_lse = attention_reference.paged_attention(
        q, sequences.pool, sequences.block_tables, [spec.num_queries] * len(lens), list(lens), options
    )
    return Checked([*outs, lse.cpu()], [want, want, want_lse], UNIT[spec.dtype])


def prefill(place: Place, spec: Spec, queries: Sequence[int], lens: Sequence[int], route: Any = "kernel") -> Checked:
    sequences = make_sequences(spec, lens)
    options, there = _options(place, spec)
    q = torch.randn(sum(queries), spec.num_heads, spec.head_dim).to(spec.dtype)
    plan = cuda_attention.plan_prefill(
        place.launcher, queries, lens, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim, device=place.device,
    )  # fmt: skip
    there_q = place.put(q)
    out = cuda_attention.prefill_attention(
        place.launcher, there_q, _pool(place, sequences.pool), place.put(sequences.block_tables), plan, there,
        out=torch.full_like(there_q, torch.nan), route=route, stream=place.stream,
    )  # fmt: skip
    want, _ = attention_reference.paged_attention(
        q, sequences.pool, sequences.block_tables, list(queries), list(lens), options
    )
    return Checked([out.cpu()], [want], UNIT[spec.dtype])


def invariant(place: Place, spec: Spec) -> Checked:
    """Bits of a sequence's result, alone and among others."""
    lens = [1100, 30, 513]
    sequences = make_sequences(spec, lens)
    q = torch.randn(3, spec.num_heads, spec.head_dim).to(spec.dtype)
    pool, options = _pool(place, sequences.pool), _options(place, spec)[1]
    workspace = cuda_attention.decode_workspace(spec.shape(8, 1100, True), place.launcher, place.device)

    def attend(rows: list[int]) -> Tensor:
        context_lens = place.put(sequences.context_lens[rows])
        cuda_attention.plan_decode(place.launcher, context_lens, workspace, stream=place.stream)
        out = cuda_attention.decode_attention(
            place.launcher, place.put(q[rows]), pool, place.put(sequences.block_tables[rows]), context_lens, workspace,
            options, stream=place.stream,
        )  # fmt: skip
        return out.cpu()

    together = attend([0, 1, 2])
    return Checked([attend([2, 1, 0]).flip(0), *(attend([row]) for row in range(3))],
                   [together, *(together[row : row + 1] for row in range(3))], 0.0)  # fmt: skip


# ---- elementwise ------------------------------------------------------------------------------------------------


def norm(place: Place, kind: str, width: int, dtype: torch.dtype) -> Checked:
    x, residual = (torch.randn(5, width).add(2.0).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width).to(dtype) for _ in range(2))
    total = (x.float() + residual.float()).to(dtype)
    there = place.put(residual)
    if kind == "rms_norm":
        out = cuda_elementwise.rms_norm(place.put(x), place.put(weight), 1e-5, residual=there, **place.way)
        want = reference.rms_norm(total, weight, 1e-5)
    else:
        out = cuda_elementwise.layer_norm(
            place.put(x), place.put(weight), place.put(bias), 1e-5, residual=there, **place.way
        )
        want = reference.layer_norm(total, weight, bias, 1e-5)
    return Checked([out.cpu(), there.cpu()], [want, total.double()], UNIT[dtype])


def activation(place: Place, name: str, gated: bool, dtype: torch.dtype) -> Checked:
    x = torch.randn(7, 2 * 1368 if gated else 1368).mul(3).to(dtype)
    out = cuda_elementwise.activation(place.put(x), name, gated=gated, **place.way)
    return Checked([out.cpu()], [reference.activation(x, name, gated)], UNIT[dtype])


def embedding(place: Place, dtype: torch.dtype) -> Checked:
    tokens, positions = torch.tensor([0, 40, 3, 41, -1, 3]), torch.tensor([1, 0, 7, 2, 2, 8])
    weight, table = torch.randn(41, 264).to(dtype), torch.randn(8, 264).to(dtype)
    plain = cuda_elementwise.embedding(place.put(tokens), place.put(weight), **place.way)
    added = cuda_elementwise.embedding(
        place.put(tokens), place.put(weight), positions=place.put(positions), position_weight=place.put(table),
        **place.way,
    )  # fmt: skip
    want = [reference.embedding(tokens, weight, None, None), reference.embedding(tokens, weight, positions, table)]
    return Checked([plain.cpu(), added.cpu()], want, UNIT[dtype])


def rope(place: Place, head_dim: int, rotary_dim: int, extras: bool, pool_dtype: torch.dtype) -> Checked:
    """Queries, and what the pool holds in the slots of the tokens. Bias and q/k-norm with `extras`."""
    heads, kv_heads, num = 6, 2, len(ROPE_SLOTS)
    qkv = torch.randn(num, (heads + 2 * kv_heads) * head_dim).to(BF16)
    bias = torch.randn(qkv.shape[1]).to(BF16) if extras else None
    norms = [torch.randn(head_dim).to(BF16) if extras else None for _ in range(2)]
    angles = torch.rand(10, rotary_dim // 2) * 6
    cos_sin, positions = torch.cat((angles.cos(), angles.sin()), 1), torch.tensor(ROPE_POSITIONS)
    quantised = pool_dtype != BF16
    pool = torch.zeros(2, 4, kv_heads, 16, head_dim).to(pool_dtype)
    scales = place.put(torch.zeros(2, 4, kv_heads, 16)) if quantised else None
    there = place.put(pool)
    moved = [None if part is None else place.put(part) for part in (bias, *norms)]
    queries = cuda_elementwise.rope_write_kv(
        place.put(qkv), place.put(torch.tensor(ROPE_SLOTS)), there, num_heads=heads, bias=moved[0], q_norm=moved[1],
        k_norm=moved[2], cos_sin=place.put(cos_sin), positions=place.put(positions), kv_scales=scales, **place.way,
    )  # fmt: skip
    want = reference.qkv_heads(qkv, heads, kv_heads, bias, *norms, 1e-6, cos_sin, positions)
    held = there.cpu().double()
    if scales is not None:
        held = held * scales.cpu().double().unsqueeze(-1)
    expected = torch.zeros_like(held)
    for token, slot in enumerate(ROPE_SLOTS):
        if 0 <= slot < 64:
            for half in range(2):
                reference.slot(expected[half], slot).copy_(want[1 + half][token])
    # 448 levels of four significant bits, or 127 steps, of the largest element of a head.
    tolerance = {BF16: UNIT[BF16], FP8: 2.0**-4, INT8: 2.0**-6}[pool_dtype]
    return Checked([queries.cpu().view(want[0].shape), held], [want[0], expected], tolerance)


# ---- sampling, copies, quantised products -----------------------------------------------------------------------


def _sample(place: Place, logits: Tensor, settings: list[cuda_sampling.RowSettings]) -> Tensor:
    tables = cuda_sampling.SamplerTables(len(settings), logits.shape[1], place.device)
    for row, one in enumerate(settings):
        tables.join(row, one, prompt_tokens=[1, 2], output_tokens=[3, 3], max_new_tokens=2)
    buffers = cuda_sampling.SampleBuffers.allocate(len(settings), tables, max_top=5)
    rows = torch.arange(len(settings), dtype=torch.int32)
    cuda_sampling.sample(place.launcher, tables, buffers, place.put(logits), place.put(rows), stream=place.stream)
    return torch.stack([buffers.tokens.cpu(), buffers.codes.cpu()])


def greedy(place: Place, vocab: int, dtype: torch.dtype, rows: int) -> Checked:
    logits = (torch.randn(rows, vocab) * 4).to(dtype)
    settings = [cuda_sampling.RowSettings(0, temperature=0.0)] * rows
    want = torch.stack([logits.float().argmax(-1), torch.zeros(rows, dtype=torch.int64)])
    return Checked([_sample(place, logits, settings)], [want.double()], 0.0)


def filtered(place: Place, vocab: int) -> Checked:
    """Of each row, whether its token is one that the filters keep, and that nothing was refused."""
    logits = torch.randn(8, vocab) * 3
    settings = [
        cuda_sampling.RowSettings(seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                                  repetition_penalty=1.3 if seed % 2 else 1.0, banned=(7, 9))
        for seed, (temperature, top_k, top_p, min_p) in enumerate(
            [(1.0, 3, 1.0, 0.0), (1.0, 40, 0.9, 0.0), (0.3, 0, 0.9, 0.0), (2.0, 0, 0.4, 0.0), (1.0, 0, 1.0, 0.1),
             (0.7, 100, 0.95, 0.05), (1.0, 1, 1.0, 0.0), (1.5, 2000, 0.5, 0.0)]
        )
    ]  # fmt: skip
    tokens, codes = _sample(place, logits, settings)
    kept = []
    for row, one in enumerate(settings):
        # Rounding may decide at the edge of a nucleus, so that the reference keeps a little more there.
        relaxed = one._replace(top_p=min(1.0, one.top_p + 1e-4), min_p=one.min_p * 0.9999)
        edited = sampling_reference.edited_logits(logits[row], one, [1, 2], [3, 3])
        kept.append(float(sampling_reference.probabilities(edited, relaxed)[int(tokens[row])] > 0))
    return Checked([torch.tensor(kept), codes], [torch.ones(8).double(), torch.zeros(8).double()], 0.0)


def distribution(place: Place, draws: int) -> Checked:
    """Frequencies of draws with one seed a row. E norm(found - p)^2 = (1 - norm(p)^2) / draws; twice its root."""
    vocab = 48
    logits = torch.randn(1, vocab).expand(draws, vocab).contiguous()
    settings = [cuda_sampling.RowSettings(seed * 7919 + 13) for seed in range(draws)]
    tokens, codes = _sample(place, logits, settings)
    found = torch.bincount(tokens.long(), minlength=vocab).double() / draws
    want = torch.softmax(logits[0].double(), -1)
    size = float(want.norm())
    return Checked([found, codes], [want, torch.zeros(draws).double()], 2.0 * ((1 - size**2) / draws) ** 0.5 / size)


def copies(place: Place, dtype: torch.dtype) -> Checked:
    pool = torch.randn(3, 2, 9, 2, 16, 64).to(dtype)
    there, wanted = place.put(pool), pool.clone()
    cuda_copy.copy_blocks(place.launcher, there, [0, 2, 2], [3, 1, 8], stream=place.stream)
    wanted[:, :, [3, 1, 8]] = pool[:, :, [0, 2, 2]]
    staging = place.put(torch.zeros(2, 3, 2, 2, 16, 64).to(dtype))
    cuda_copy.gather_blocks(place.launcher, there, [8, 4], staging, stream=place.stream)
    cuda_copy.scatter_blocks(place.launcher, staging, there, [5, 6], stream=place.stream)
    wanted[:, :, [5, 6]] = wanted[:, :, [8, 4]]
    return Checked([there.cpu().float()], [wanted.double()], 0.0)


def gemv(
    place: Place, bits: int, group: int, zeros: str, m: int, dtype: torch.dtype = BF16, codebook: bool = False
) -> Checked:
    """The product, and the weights as rows of `dtype`."""
    n, k = 336, 1152
    weight = gemv_reference.random_weight(n, k, bits, group or k, zeros, codebook)
    x = (torch.randn(m, k) / 64).to(dtype)
    there = {name: place.put(part) for name, part in weight._asdict().items() if isinstance(part, Tensor)}
    packed = cuda_gemv.pack(weight._replace(**there), None, dtype)
    out = cuda_gemv.gemv(place.launcher, place.put(x), packed, stream=place.stream)
    wide = cuda_gemv.dequantise(place.launcher, packed, range(n), stream=place.stream)
    whole = gemv_reference.widened(weight)
    return Checked([out.cpu(), wide.cpu()], [gemv_reference.gemv(x, whole), whole], UNIT[dtype])


def gemv_rows(place: Place, codes: torch.dtype, group: int, m: int, dtype: torch.dtype = BF16) -> Checked:
    """The product, and the weights as rows of `dtype`, of numbers of 8 bits that lie row by row."""
    n, k = 336, 1160
    if codes == INT8:
        weight: Any = gemv_reference.random_weight(n, k, 8, k, "centre")
    else:
        numbers = torch.randint(0, 256, (n, k), dtype=torch.uint8)
        weight = Float8Weight((numbers & 0xBF).view(FP8), torch.rand(n, -(-k // (group or k))) + 0.5, group or k)
    whole, x = weight.widen().double(), (torch.randn(m, k) / 64).to(dtype)
    there = {name: place.put(part) for name, part in weight._asdict().items() if isinstance(part, Tensor)}
    pack: Any = cuda_gemv_rows.pack_integers if codes == INT8 else cuda_gemv_rows.pack_float8
    packed = pack(weight._replace(**there), None, dtype)
    out = cuda_gemv_rows.gemv(place.launcher, place.put(x), packed, stream=place.stream)
    wide = cuda_gemv_rows.widen(place.launcher, packed, range(n), stream=place.stream)
    return Checked([out.cpu(), wide.cpu()], [gemv_reference.gemv(x, whole), whole], UNIT[dtype])


def rounded(place: Place, codes: torch.dtype, dtype: torch.dtype = BF16) -> Checked:
    """Activations as numbers of 8 bits times their scale; and sums of integers, scaled."""
    x = torch.randn(5, 4104).to(dtype)
    found, scales = cuda_rounded.round_rows(place.launcher, place.put(x), codes, stream=place.stream)
    weight = gemv_reference.random_weight(48, 64, 8, 64, "centre")
    there = {name: place.put(part) for name, part in weight._asdict().items() if isinstance(part, Tensor)}
    packed = cuda_gemv_rows.pack_integers(weight._replace(**there), place.put(torch.randn(48)), dtype)
    sums, y = torch.randint(-(1 << 20), 1 << 20, (5, 48), dtype=torch.int32), torch.empty(5, 48, dtype=dtype)
    out, there_sums = place.put(y), place.put(sums)
    cuda_rounded.scale_sums(place.launcher, there_sums, scales, packed, slice(0, 48), out, stream=place.stream)
    bias = packed.bias.double().cpu() if packed.bias is not None else 0
    wanted = sums.double() * scales.double().cpu()[:, None] * weight.scales[:, 0].double() + bias
    back = found.float().cpu() * scales.cpu()[:, None]
    return Checked([back, out.cpu()], [x.double(), wanted], 0.04 if codes == FP8 else 0.02)


RAGGED = [1, 15, 16, 17, 0, 33, 300, 1300]
DECODE = {
    "bf16 128, group 4": Spec(head_dim=128, num_kv_heads=2),
    "bf16 64, group 1": Spec(group=1, num_kv_heads=3),
    "bf16 128, group 8": Spec(group=8, head_dim=128),
    "bf16 64, group 7": Spec(group=7, num_kv_heads=2),
    "f16 128, group 16": Spec(group=16, head_dim=128, dtype=F16, kv_dtype=F16),
    "bf16 256, group 16": Spec(group=16, head_dim=256),
    "bf16 80": Spec(head_dim=80),
    "window, cap, ALiBi": Spec(window=50, soft_cap=2.0, slopes=True, num_kv_heads=2, group=2),
    "four queries": Spec(num_queries=4, head_dim=128),
    "fp8 128": Spec(head_dim=128, kv_dtype=FP8),
    "int8 96, group 12": Spec(group=12, head_dim=96, kv_dtype=INT8),
}
PREFILL = {
    "bf16 128, group 4": Spec(head_dim=128, num_kv_heads=2),
    "bf16 64, group 1": Spec(group=1, num_kv_heads=3),
    "f16 256": Spec(head_dim=256, dtype=F16, kv_dtype=F16),
    "window, cap, ALiBi": Spec(window=50, soft_cap=2.0, slopes=True),
    "fp8 128": Spec(head_dim=128, kv_dtype=FP8),
    "int8 80": Spec(head_dim=80, kv_dtype=INT8),
}
_SMALL = ("bf16 128, group 4", "window, cap, ALiBi", "fp8 128")
_CHUNKS = ([1, 40, 130], [1, 57, 200])  # query lengths, context lengths


def cases() -> list[Case]:
    """Every case, group by group."""
    found: list[Case] = []

    def add(group: str, name: str, run: Callable[..., Checked], *args: Any, small: bool = False, **more: Any) -> None:
        found.append(Case(group, name, lambda place: run(place, *args, **more), small))

    for name, spec in DECODE.items():
        add("decode attention", name, decode, spec, RAGGED, small=name in _SMALL)
    add("decode attention", "fixed splits", decode, DECODE["bf16 128, group 4"], RAGGED, True)
    add("batch invariance, bits", "decode", invariant, DECODE["bf16 128, group 4"])
    for name, spec in PREFILL.items():
        add("prefill attention", name, prefill, spec, *_CHUNKS, small=name in _SMALL)
    add("prefill attention", "torch route", prefill, PREFILL["bf16 128, group 4"], *_CHUNKS, "gather")
    for kind in ("rms_norm", "layer_norm"):
        for width, dtype in ((520, BF16), (4096, BF16), (8200, F16)):
            add("norms", f"{kind} {width}", norm, kind, width, dtype, small=width == 520)
    for name, gated in (("silu", True), ("gelu_tanh", False), ("gelu_erf", True)):
        add("activations", name, activation, name, gated, BF16, small=name == "silu")
    add("embedding", "with positions", embedding, BF16, small=True)
    for pool in (BF16, FP8, INT8):
        for head_dim, rotary, extras in ((128, 128, False), (80, 32, True)):
            add("rope and KV write", f"{head_dim} {pool}", rope, head_dim, rotary, extras, pool, small=extras)
    add("greedy", "128,256 bf16", greedy, 128_256, BF16, 4)
    add("greedy", "4,099 f32", greedy, 4_099, torch.float32, 5, small=True)
    add("filtered draws", "128,256", filtered, 128_256)
    add("filtered draws", "8,000", filtered, 8_000, small=True)
    add("distribution of draws", "48 ids", distribution, 1500)
    for dtype in (BF16, INT8):
        add("block copies, bits", str(dtype), copies, dtype, small=dtype == BF16)
    for bits, group, zeros, m, codebook in (
        (8, 0, "centre", 1, False), (8, 128, "fractions", 5, False), (8, 16, "centre", 2, False),
        (4, 32, "fractions", 8, False), (4, 64, "centre", 1, False), (4, 128, "integers", 3, False),
        (4, 16, "fractions", 8, False), (4, 64, "centre", 4, True),
    ):  # fmt: skip
        name = f"{bits} bits, {'codes, ' if codebook else ''}{group}, zeros {zeros}, {m} rows"
        add("int8 and int4 products", name, gemv, bits, group, zeros, m, codebook=codebook, small=m == 8)
    for codes, group, m in ((FP8, 0, 1), (FP8, 128, 8), (INT8, 0, 5)):
        name = f"{codes}, {'blocks' if group else 'rows'}, {m} rows"
        add("products of 8 bits by rows", name, gemv_rows, codes, group, m, small=m == 8)
    for codes in (FP8, INT8):
        add("activations in 8 bits", str(codes), rounded, codes, small=codes == INT8)
    return found
