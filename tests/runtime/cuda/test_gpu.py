"""The engine on a real GPU: what the rest of this folder proves without one, on the device."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    PagedSequences,
    agree_until_a_tie,
    load_reference,
    make_checkpoint,
    random_tokens,
    reference_logits,
)
from fakes import engine, greedy, submit

from millrace.kernels import ops
from millrace.kernels.cuda_backend import CudaBackend
from millrace.kernels.torch_backend import TorchBackend
from millrace.runtime import Runtime, SamplingParams
from millrace.runtime.config import load_config
from millrace.runtime.cuda.device import CudaDevice
from millrace.runtime.cuda.driver import TorchDriver
from millrace.runtime.cuda.start import on_lane
from millrace.runtime.gpu import Gpu, open_gpu, placement, start_gpu
from millrace.runtime.models.declaration import Placement
from millrace.runtime.quant.rounding import Method, Quantization, round_to_float8, round_to_nearest
from millrace.runtime.weights.loader import load_model
from millrace.runtime.world import AsyncioWorld

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONFIG = {"scheduler.max_num_seqs": 6, "scheduler.max_prefill_tokens": 64, "device.memory_fraction": 0.3}
TOLERANCE = 0.2  # of logits with a standard deviation of about 1, in bfloat16 over two layers


def opened(**options: Any) -> Gpu:
    gpu = open_gpu(load_config(None, CONFIG | {"device.kind": "cuda"} | options))
    assert gpu is not None
    return gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 2, "head_dim": 64}
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("checkpoint"), dtype=torch.bfloat16, **sizes)


async def test_streams_events_and_graphs() -> None:
    driver, world = TorchDriver(0), AsyncioWorld()
    device = CudaDevice(world, driver)
    x = torch.ones(4, device=driver.device)
    y = torch.zeros(4, device=driver.device)
    driver.settle()

    def record() -> Any:
        y.add_(1)
        return driver.capture(lambda: y.copy_(x * 2 + y), None)

    graph = await on_lane(world, device, "decode", 0, record)
    assert y.tolist() == [1.0] * 4  # a capture executes nothing
    event = await on_lane(world, device, "prefill", 1, lambda: (x.fill_(5), driver.record())[1])

    def replay() -> None:
        driver.wait(event)
        driver.replay(graph)
        driver.replay(graph)

    await on_lane(world, device, "decode", 0, replay)
    assert y.tolist() == [21.0] * 4
    assert driver.pinned(64).is_pinned()
    device.close()
    await world.close()


def test_logits_of_chunks_and_decode_steps(folder: Path) -> None:
    gpu = opened()
    model = load_model(folder, placement=placement(gpu, load_config(None, CONFIG), torch.bfloat16))
    tokens = random_tokens(70, seed=1)
    gpu.driver.use(gpu.driver.stream(0))
    gpu.driver.settle()
    sequence = PagedSequences(model, 1, 96)
    with torch.inference_mode():
        parts = [sequence.step({0: tokens[at : at + 30]})[0] for at in (0, 30)]
        parts += [sequence.step({0: [token]}, is_decode=True)[0] for token in tokens[60:]]
    gpu.driver.drain()
    want = reference_logits(load_reference(folder), tokens)
    assert (torch.cat(parts).float().cpu() - want).abs().nan_to_num(nan=1e9).max() < TOLERANCE / 2


@pytest.mark.parametrize(("method", "worst"), [
    ("int8", TOLERANCE / 2), ("int4", TOLERANCE / 2), ("nf4", TOLERANCE / 2), ("fp8", 0.5),
])  # fmt: skip
def test_logits_of_rounded_weights(folder: Path, method: Method, worst: float) -> None:
    """The same weights in float32 on the CPU are the reference; a prompt's activations are rounded to FP8 as well."""
    gpu, rounded = opened(), Quantization(method=method, group_size=32)
    model = load_model(folder, placement=placement(gpu, load_config(None, CONFIG), torch.bfloat16, rounded))
    reference = load_model(folder, placement=Placement(quantize=rounded, backends=(TorchBackend(),)))
    tokens = random_tokens(50, seed=1)
    gpu.driver.use(gpu.driver.stream(0))
    gpu.driver.settle()
    found = []
    with torch.inference_mode():
        for one in (model, reference):
            sequence = PagedSequences(one, 1, 96)
            parts = [sequence.step({0: tokens[:40]})[0]]
            parts += [sequence.step({0: [token]}, is_decode=True)[0] for token in tokens[40:]]
            found.append(torch.cat(parts).float().cpu())
    assert (found[0] - found[1]).abs().nan_to_num(nan=1e9).max() < worst


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["fp8", "fp8, blocks", "int8"])
def test_products_of_8_bits(kind: str, dtype: torch.dtype, bias: bool) -> None:
    """Of few and of many rows, in a graph too, against float64; and that torch multiplies 8 bits by 8 bits where it can
    on this device."""
    gpu = opened()
    driver, device = gpu.driver, gpu.driver.device
    backend = CudaBackend(gpu.launcher, driver.current, max_seqs=1)
    wide = torch.randn(320, 512) * 0.05
    weight: Any = round_to_nearest(wide, 8, None) if kind == "int8" else round_to_float8(wide)
    if kind == "fp8, blocks":
        weight = weight._replace(scales=torch.rand(320, 4) * 0.001 + 0.0005, group_size=128)
    weight = weight._replace(is_w8a8=True)
    added = torch.randn(320) if bias else None
    driver.use(driver.stream(0))
    pack: Any = ops.pack_quantized if kind == "int8" else ops.pack_float8
    there = None if added is None else added.to(device)
    packed = pack(weight.to(device), there, activation=dtype, backends=(backend,))
    served = kind == "int8" or (kind == "fp8" and torch.cuda.get_device_capability(device) >= (8, 9))
    names = {kernel.name for kernel in backend.quantized_kernels}
    assert ("mr_round_rows" in names) is served
    for rows in (1, 9, 16, 17, 64, 1000):
        x = torch.randn(rows, 512).to(dtype)
        on_device = x.to(device)
        by_graph = torch.empty(rows, 320, dtype=dtype, device=device)
        driver.settle()
        eager = packed(on_device)
        driver.drain()
        driver.replay(driver.capture(partial(packed, on_device, by_graph), None))
        driver.drain()
        exact = x.double() @ weight.widen().double().t() + (0 if added is None else added.to(dtype).double())
        tolerance = 0.005 if rows <= 16 or not served else 0.05 if kind == "fp8" else 0.02
        for y in (eager, by_graph):
            assert (y.double().cpu() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
async def test_the_engine_gives_the_tokens_of_the_cpu(folder: Path, graphs: bool, overlap: bool) -> None:
    reference = load_reference(folder)
    prompts = [random_tokens(3 + 11 * i % 120, seed=i) for i in range(12)]
    sampling = greedy(40, ignore_eos=True)
    options = {"device.cuda_graphs": graphs, "scheduler.overlap": overlap}
    config = load_config(None, CONFIG | options)
    gpu = opened(**options)

    async def make(world: AsyncioWorld, model: Any, plan: Any, _: Any) -> Any:
        started = await start_gpu(world, gpu, config, model)
        assert not started.notes
        return started.device, started.lanes

    async def outputs(made: Any) -> list[list[int]]:
        done = await asyncio.gather(*[submit(made, prompt, sampling) for prompt in prompts])
        return [list(completion.token_ids) for completion in done]

    async with engine(model=load_model(folder), num_blocks=200, null_device=False) as made:
        wanted = await outputs(made)
    model = load_model(folder, placement=placement(gpu, config, torch.bfloat16))
    names = {key.replace(".", "__"): value for key, value in (CONFIG | options).items()}
    async with engine(model=model, num_blocks=200, gpu=make, **names) as made:
        first = await outputs(made)
        again = await outputs(made)  # with prefix hits
    for got in (first, again):
        for prompt, one, two in zip(prompts, got, wanted, strict=True):
            agree_until_a_tie(reference, prompt, one, two, TOLERANCE)


async def test_preempted_sequences_come_back_from_the_host(folder: Path) -> None:
    reference = load_reference(folder)
    prompts = [random_tokens(20 + i, seed=i) for i in range(6)]
    found: list[list[list[int]]] = []
    for num_blocks, megabytes in ((200, 0), (16, 16)):
        options = {"kv.swap_memory_mb": megabytes, "kv.prefix_cache": False}
        config, gpu = load_config(None, CONFIG | options), opened(**options)
        model = load_model(folder, placement=placement(gpu, config, torch.bfloat16))

        async def make(world: AsyncioWorld, model: Any, plan: Any, config: Any, gpu: Gpu = gpu) -> Any:
            started = await start_gpu(world, gpu, config, model)
            swap: Any = started.lanes.swap
            if swap is not None:
                assert swap.block_seconds > 0
                swap.block_seconds = 0.0  # a model so small is computed sooner
            return started.device, started.lanes

        names = {key.replace(".", "__"): value for key, value in (CONFIG | options).items()}
        async with engine(model=model, num_blocks=num_blocks, gpu=make, **names) as made:
            done = await asyncio.gather(*[submit(made, prompt, greedy(60, ignore_eos=True)) for prompt in prompts])
            found.append([list(completion.token_ids) for completion in done])
            swaps = made.scheduler.residency.swaps
    assert swaps is not None
    assert swaps.num_in > 0
    for one, two, prompt in zip(*found, prompts, strict=True):
        agree_until_a_tie(reference, prompt, one, two, TOLERANCE)


async def test_a_runtime_on_the_gpu_gives_its_memory_back() -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    async with Runtime(device__kind="cuda", device__memory_fraction=0.3) as runtime:
        completions = await asyncio.gather(
            *[runtime.submit(question, SamplingParams(temperature=0.0, max_tokens=24)) for _ in range(8)]
        )
        assert all("Paris" in completion.text for completion in completions)
        assert runtime.memory_plan.graphs >= 0
    assert torch.cuda.mem_get_info()[0] > before - (1 << 30)  # modules and library workspaces stay
