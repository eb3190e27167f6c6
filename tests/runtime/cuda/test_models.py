"""Whole models in bfloat16 and float16 through the CUDA kernels, executed on the CPU, against transformers.

Tolerance: transformers' own logits in bfloat16 are off by 0.04 to 0.06 from its float32 ones on these checkpoints
(standard deviation of the logits about 1, two layers), so that is what rounding alone does. Ours must be within 0.1 of
the float32 logits everywhere, and on average no further off than 1.25 times transformers' in the same type.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
import transformers
from checkpoints import (
    PagedSequences,
    agree_until_a_tie,
    load_reference,
    make_checkpoint,
    random_tokens,
    reference_logits,
)
from cuda_fakes import CountingLauncher, FakeDriver, gpu
from fakes import engine, greedy, submit
from quantized_checkpoints import Stored, make_pair
from torch import Tensor

from millrace.kernels.cuda_backend import CudaBackend
from millrace.kernels.torch_backend import TorchBackend
from millrace.runtime.gpu import wanted_kernels
from millrace.runtime.models.declaration import Placement
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.quant import writer
from millrace.runtime.quant.methods import METHODS
from millrace.runtime.quant.rounding import Method, Quantization, round_to_nearest
from millrace.runtime.weights.loader import load_model
from shim.launcher import ShimLauncher

WORST, MEAN = 0.1, 1.25
_SIZES: dict[str, Any] = {"num_hidden_layers": 2, "head_dim": 64}
# name: (kind of checkpoint, sizes)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "llama3-scaling": ("llama-rope-llama3", _SIZES),
    "biases": ("llama-biases", _SIZES),
    "mistral-window": ("mistral", _SIZES),
    "qwen2": ("qwen2", _SIZES),
    "qwen2-windows": ("qwen2-windows", _SIZES | {"num_attention_heads": 8}),
    "qwen3-norms": ("qwen3", _SIZES | {"head_dim": 128}),
    "gpt2": ("gpt2", {"n_layer": 2, "n_embd": 128, "n_head": 2}),
    "head_dim of torch": ("llama", _SIZES | {"head_dim": 24}),  # no kernel has it
}


class Pair(NamedTuple):
    model: DecoderModel
    reference: transformers.PreTrainedModel  # float32
    narrow: transformers.PreTrainedModel  # the type of the model
    launcher: ShimLauncher


def place(
    launcher: Any, dtype: torch.dtype, stream: Any = lambda: 0, kv: torch.dtype | None = None, max_seqs: int = 8
) -> Placement:
    backend = CudaBackend(launcher, stream, max_seqs=max_seqs)
    return Placement(activation=dtype, scales=dtype, kv=kv, backends=(backend, TorchBackend()))


def checkpoint(name: str, folder: Path, dtype: torch.dtype, **more: Any) -> Path:
    kind, sizes = SHAPES[name]
    return make_checkpoint(kind, folder, dtype=dtype, **(sizes | more))


@pytest.fixture(
    scope="module",
    params=[(name, torch.bfloat16) for name in SHAPES] + [("llama", torch.float16), ("gpt2", torch.float16)],
    ids=lambda param: f"{param[0]}-{str(param[1])[6:]}",
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shim: ShimLauncher) -> Pair:
    name, dtype = request.param
    folder = checkpoint(name, tmp_path_factory.mktemp("checkpoint"), dtype)
    narrow = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return Pair(load_model(folder, placement=place(shim, dtype)), load_reference(folder), narrow.eval(), shim)


def check(pair: Pair, tokens: Sequence[int], got: Tensor) -> None:
    want = reference_logits(pair.reference, tokens)
    assert want.std() > 0.3
    theirs = (reference_logits(pair.narrow, tokens).float() - want).abs().mean()
    error = (got.float() - want).abs().nan_to_num(nan=float("inf"))
    assert error.max() < WORST
    assert error.mean() < MEAN * theirs


def run(sequences: PagedSequences, chunks: dict[int, Sequence[int]], *, decode: bool = False) -> dict[int, Tensor]:
    with torch.inference_mode():
        return sequences.step(chunks, is_decode=decode)


def test_chunks_behind_a_prefix_then_decode_steps(pair: Pair) -> None:
    tokens = random_tokens(70, seed=1)
    sequence = PagedSequences(pair.model, 1, 96)
    got = [run(sequence, {0: tokens[at : at + 30]})[0] for at in (0, 30)]
    got += [run(sequence, {0: [token]}, decode=True)[0] for token in tokens[60:]]
    assert got[0].dtype == pair.model.dtype
    check(pair, tokens, torch.cat(got))


@pytest.mark.slow
def test_ragged_batches(pair: Pair) -> None:
    """Several sequences in one prefill step, over shuffled tables and a poisoned pool, then decode steps of all."""
    prompts = {seq: random_tokens(length, seed=seq) for seq, length in enumerate((1, 16, 33, 40))}
    sequences = PagedSequences(pair.model, 4, 64, seed=4)
    first = run(sequences, {seq: prompt[: len(prompt) // 2 + 1] for seq, prompt in prompts.items()})
    got = {seq: [logits] for seq, logits in first.items()}
    rest = {seq: prompt[len(prompt) // 2 + 1 :] for seq, prompt in prompts.items()}
    for at in range(4):
        step = {seq: [rest[seq][at]] for seq in rest if at < len(rest[seq])}
        for seq, logits in run(sequences, step, decode=True).items():
            got[seq].append(logits)
    for seq, logits in got.items():
        count = sum(len(part) for part in logits)
        check(pair, prompts[seq][:count], torch.cat(logits))


def test_launches_of_a_decode_step(pair: Pair) -> None:
    """At most ten launches per layer in the graph: six of ours beside the four products."""
    if pair.model.spec.head_dim not in (64, 128):
        pytest.skip("torch computes the attention")
    tokens = random_tokens(20, seed=1)
    sequence = PagedSequences(pair.model, 1, 96)
    run(sequence, {0: tokens[:-1]})
    before = len(pair.launcher.launches)
    run(sequence, {0: tokens[-1:]}, decode=True)
    names = [kernel.name for kernel in pair.launcher.launches[before:]]
    layers = pair.model.spec.num_layers
    assert names.count("mr_attention_decode") == names.count("mr_rope_kv") == layers
    assert len(names) <= 5 * layers + 4  # embedding, first norm, a plan for each window


@pytest.mark.slow
@pytest.mark.parametrize(("kv", "worst"), [(torch.int8, 0.15), (torch.float8_e4m3fn, 0.6)])
def test_a_pool_of_8_bits(kv: torch.dtype, worst: float, shim: ShimLauncher, tmp_path: Path) -> None:
    """Keys and values are off by up to 1 in 254 of the largest of their head (int8), or 1 in 16 of themselves (fp8)."""
    folder = checkpoint("qwen3-norms", tmp_path, torch.bfloat16, head_dim=64)
    reference = load_reference(folder)
    model = load_model(folder, placement=place(shim, torch.bfloat16, kv=kv))
    assert model.kv_bytes_per_token == 2 * 2 * 2 * (64 + 4)
    tokens = random_tokens(50, seed=1)
    sequence = PagedSequences(model, 1, 96)
    got = [run(sequence, {0: tokens[:45]})[0]]
    got += [run(sequence, {0: [token]}, decode=True)[0] for token in tokens[45:]]
    error = (torch.cat(got).float() - reference_logits(reference, tokens)).abs().nan_to_num(nan=float("inf"))
    assert error.max() < worst
    assert error.mean() < worst / 8
    source, target = torch.tensor([sequence.tables[0][0]]), torch.tensor([sequence.tables[0][5]])
    model.copy_blocks(sequence.kv, source, target)
    for tensor in (sequence.kv.storage.view(torch.uint8), sequence.kv.scales):
        assert tensor is not None
        assert torch.equal(tensor[:, :, source], tensor[:, :, target])
    by_torch = run(PagedSequences(load_model(folder, placement=torch_only(kv)), 1, 96), {0: tokens})[0]
    error = (by_torch.float() - reference_logits(reference, tokens)).abs().nan_to_num(nan=float("inf"))
    assert error.max() < worst


@pytest.mark.slow
@pytest.mark.parametrize(("method", "group", "dtype"), [("int8", 64, torch.float16), ("int4", 32, torch.bfloat16)])
def test_rounded_weights(method: Method, group: int, dtype: torch.dtype, shim: ShimLauncher, tmp_path: Path) -> None:
    """The same integers in float32 are the reference: a prompt by widened slices, decode steps by the integers."""
    folder = checkpoint("qwen3-norms", tmp_path, torch.bfloat16, head_dim=64, tie_word_embeddings=True)
    rounded = Quantization(method=method, group_size=group)
    place_there = place(shim, dtype)
    model = load_model(folder, placement=msgspec.structs.replace(place_there, quantize=rounded))
    reference = load_model(folder, placement=Placement(quantize=rounded, backends=(TorchBackend(),)))
    assert model.weight_bytes < 0.7 * load_model(folder, placement=place_there).weight_bytes
    tokens = random_tokens(45, seed=1)
    found: list[Tensor] = []
    shim.launches.clear()
    for one in (model, reference):
        sequence = PagedSequences(one, 1, 96)
        parts = [run(sequence, {0: tokens[:40]})[0]]
        parts += [run(sequence, {0: [token]}, decode=True)[0] for token in tokens[40:]]
        found.append(torch.cat(parts).float())
    assert {"mr_gemv", "mr_dequantise"} <= {kernel.name for kernel in shim.launches}
    assert set(shim.launches) <= set(wanted_kernels(model))
    assert (found[0] - found[1]).abs().nan_to_num(nan=float("inf")).max() < WORST
    assert found[1].std() > 0.3


def in_8_bits(folder: Path, method: str) -> Path:
    """A checkpoint of W8A8, as `millrace quantize` writes them."""

    def convert(name: str, weight: Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        found = round_to_nearest(weight, 8, None) if method == "int8" else writer.round_to_fp8(weight)
        tensors = METHODS[method](bits=8).tensors(name, found)
        return Stored({key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}, found.widen())

    config = METHODS[method](bits=8).config()
    return make_pair(folder, convert, config, kind="qwen2", dtype=torch.bfloat16, **_SIZES).quantized


@pytest.mark.slow
@pytest.mark.parametrize(("source", "method", "dtype", "worst", "mean"), [
    ("stored", "fp8", torch.bfloat16, 0.45, 0.07),
    ("stored", "int8", torch.bfloat16, 0.16, 0.024),
    ("rounded", "fp8", torch.float16, 0.45, 0.07),
])  # fmt: skip
def test_8_bits_by_8_bits(
    source: str, method: Method, dtype: torch.dtype, worst: float, mean: float, shim: ShimLauncher, tmp_path: Path
) -> None:
    """A prompt is multiplied in 8 bits, decode steps are not. The reference has the same weights, float32 and unrounded
    activations: rounding those alone moves these logits by up to 0.3 (mean 0.05) in FP8, by 0.1 (0.014) in int8."""
    folder, rounded = tmp_path, None
    if source == "stored":
        folder = in_8_bits(tmp_path, method)
    else:
        folder = checkpoint("qwen2", tmp_path, torch.bfloat16, tie_word_embeddings=True)
        rounded = Quantization(method=method)
    model = load_model(folder, placement=msgspec.structs.replace(place(shim, dtype), quantize=rounded))
    reference = load_model(folder, placement=Placement(quantize=rounded, backends=(TorchBackend(),)))
    tokens = random_tokens(45, seed=1)
    found: list[Tensor] = []
    shim.launches.clear()
    for one in (model, reference):
        sequence = PagedSequences(one, 1, 96)
        parts = [run(sequence, {0: tokens[:40]})[0]]
        parts += [run(sequence, {0: [token]}, decode=True)[0] for token in tokens[40:]]
        found.append(torch.cat(parts).float())
    names = {kernel.name for kernel in shim.launches}
    assert {"mr_gemv_rows", "mr_round_rows"} <= names
    assert "mr_dequantise" not in names
    assert ("mr_scale_sums" in names) is (method == "int8")
    assert ("mr_widen_rows" in names) is (source == "rounded")  # the tied table, as it is not for rounded activations
    assert set(shim.launches) <= set(wanted_kernels(model))
    error = (found[0] - found[1]).abs().nan_to_num(nan=float("inf"))
    assert error.max() < worst
    assert error.mean() < mean
    assert found[1].std() > 0.3


def torch_only(kv: torch.dtype) -> Placement:
    return Placement(activation=torch.bfloat16, scales=torch.bfloat16, kv=kv, backends=(TorchBackend(),))


@pytest.mark.slow
async def test_the_engine_gives_the_tokens_of_the_cpu(shim: ShimLauncher, tmp_path: Path) -> None:
    """Prefill, graphs and sampling together, in every combination. Where 16 bits leave two tokens as good as equal,
    each engine goes its own way: then float32 must find them as close as the tolerance of the logits."""
    folder = checkpoint("qwen3-norms", tmp_path, torch.bfloat16, head_dim=64)
    reference = load_reference(folder)
    prompts = [random_tokens(3 + 11 * i % 40, seed=i) for i in range(5)]
    sampling = greedy(10, ignore_eos=True)

    async def outputs(made: Any, together: bool) -> list[list[int]]:
        if together:
            done = await asyncio.gather(*[submit(made, prompt, sampling) for prompt in prompts])
        else:
            done = [await submit(made, prompt, sampling) for prompt in prompts]
        return [list(completion.token_ids) for completion in done]

    async with engine(model=load_model(folder), num_blocks=60, null_device=False) as made:
        wanted = await outputs(made, True)
    alone: list[list[list[int]]] = []
    for overlap in (True, False):
        for graphs in (True, False):
            driver = FakeDriver("random")
            launcher = CountingLauncher(shim, driver)
            model = load_model(folder, placement=place(launcher, torch.bfloat16, driver.current))
            options = {"scheduler__overlap": overlap, "scheduler__max_num_seqs": 4, "scheduler__max_prefill_tokens": 32}
            async with engine(
                model=model,
                num_blocks=60,
                gpu=gpu(driver, launcher, use_graphs=graphs),
                model__max_model_len=128,
                **options,
            ) as made:
                for got, want, prompt in zip(await outputs(made, True), wanted, prompts, strict=True):
                    assert len(got) == len(want)
                    agree_until_a_tie(reference, prompt, got, want, 2 * WORST)
                if graphs:
                    alone.append(await outputs(made, False))
    assert alone[0] == alone[1]  # overlap on and off


@pytest.mark.slow
@pytest.mark.parametrize("kv", [None, torch.int8])
async def test_preempted_sequences_come_back_from_the_host(
    shim: ShimLauncher, tmp_path: Path, kv: torch.dtype | None
) -> None:
    folder = checkpoint("qwen3-norms", tmp_path, torch.bfloat16, head_dim=64)
    reference = load_reference(folder)
    prompts = [random_tokens(20 + i, seed=i) for i in range(3)]
    found: list[list[list[int]]] = []
    for num_blocks, slots in ((60, 0), (9, 30)):
        driver = FakeDriver("random")
        launcher = CountingLauncher(shim, driver)
        there = msgspec.structs.replace(place(launcher, torch.bfloat16, driver.current), kv=kv)
        async with engine(
            model=load_model(folder, placement=there),
            num_blocks=num_blocks,
            gpu=gpu(driver, launcher, use_graphs=False, swap_slots=slots),
            kv__prefix_cache=False,
            model__max_model_len=128,
            scheduler__max_num_seqs=4,
            scheduler__max_prefill_tokens=32,
        ) as made:
            done = await asyncio.gather(*[submit(made, prompt, greedy(28, ignore_eos=True)) for prompt in prompts])
            found.append([list(completion.token_ids) for completion in done])
            swaps = made.scheduler.residency.swaps
    assert swaps is not None
    assert swaps.num_in > 0
    for one, two, prompt in zip(*found, prompts, strict=True):
        agree_until_a_tie(reference, prompt, one, two, 2 * WORST)
