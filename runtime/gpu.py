"""Running on an NVIDIA GPU: finding it, measuring what a model needs of its memory, and starting the lanes on it."""

import gc
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from millrace.kernels.cpu_build import BuildError
from millrace.kernels.cuda_backend import CudaBackend, attention_lacks, model_kernels
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_launch import CupyLauncher, Launcher
from millrace.kernels.torch_backend import TorchBackend
from millrace.runtime.config import Config
from millrace.runtime.cuda.decode import CudaDecode
from millrace.runtime.cuda.device import CudaDevice
from millrace.runtime.cuda.driver import CudaDriver, TorchDriver
from millrace.runtime.cuda.lanes import cuda_lanes
from millrace.runtime.cuda.prefill import CudaPrefill
from millrace.runtime.cuda.start import on_lane
from millrace.runtime.cuda.swap import CudaSwap, SwappableModel
from millrace.runtime.errors import ConfigError
from millrace.runtime.lanes import Lanes
from millrace.runtime.models.declaration import Placement
from millrace.runtime.plan import GpuMemory, MemoryPlan, plan_gpu, swap_slots
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.types import BLOCK_SIZE
from millrace.runtime.world import World

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (what, done, total)


class Gpu(NamedTuple):
    """One GPU, and how kernels get onto it."""

    driver: CudaDriver
    launcher: Launcher


def open_gpu(config: Config) -> Gpu | None:
    """The GPU that the configuration asks for; None where it asks for the CPU, or for whatever there is and there is no
    GPU. Raises ConfigError that says what is missing."""
    device = config.device
    if device.kind == "cpu":
        return None
    missing = _missing(device.index)
    if missing and device.kind == "auto":
        if torch.cuda.is_available():
            _log.warning("there is a GPU, but the model runs on the CPU: %s", missing)
        return None
    if missing:
        raise ConfigError(
            f"device.kind is cuda, but {missing}; with device.kind = cpu it runs here", param="device.kind"
        )
    return Gpu(TorchDriver(device.index), CupyLauncher(device.index))


def _missing(index: int) -> str:
    """What a run on the GPU lacks; empty if nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if index >= torch.cuda.device_count():
        return f"device.index is {index}, and there are {torch.cuda.device_count()} CUDA devices, counted from 0"
    if torch.cuda.get_device_capability(index) < (8, 0):
        major, minor = torch.cuda.get_device_capability(index)
        return f"the kernels need compute capability 8.0, and device {index} has {major}.{minor}"
    try:
        import cupy  # an optional dependency
    except ImportError:
        return "CuPy is not installed: pip install 'millrace[cuda]'"
    try:
        int(cupy.cuda.Device(index).compute_capability)
    except Exception as error:  # a CuPy for another CUDA, or one that misses its libraries
        return f"CuPy cannot use device {index} ({type(error).__name__}: {error}): pip install 'millrace[cuda]'"
    return ""


def placement(gpu: Gpu, config: Config, dtype: torch.dtype, quantize: Quantization | None = None) -> Placement:
    """Where a model is loaded to: the GPU in 16 bits, with matrices that are rounded as they are loaded if `quantize`
    says so. Torch serves what the kernels refuse.
    """
    backend = CudaBackend(
        gpu.launcher,
        gpu.driver.current,
        max_seqs=config.scheduler.max_num_seqs,
        batch_invariant=config.device.batch_invariant,
    )
    return Placement(
        device=gpu.driver.device,
        activation=dtype,
        scales=dtype,
        kv={"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[config.kv.dtype],
        backends=(backend, TorchBackend()),
        quantize=quantize,
    )


class Started(NamedTuple):
    device: CudaDevice
    lanes: Lanes
    plan: MemoryPlan
    notes: tuple[str, ...]  # for the log: what runs otherwise than one might expect


async def start_gpu(
    world: World, gpu: Gpu, config: Config, model: SwappableModel, progress: Progress | None = None
) -> Started:
    """Measures the model, sizes the KV cache from what is left, and captures the decode steps.

    Raises ConfigError, with a table and settings that would fit, where there is no room; nothing is left behind then.
    """
    tell = progress or (lambda what, done, total: None)
    spec = model.spec
    lacking = attention_lacks(spec.head_dim, spec.num_heads // spec.num_kv_heads)
    if config.kv.dtype != "auto" and lacking:
        message = f"kv.dtype is {config.kv.dtype}, which torch's attention does not read, and {lacking}: use auto"
        raise ConfigError(message, param="kv.dtype")
    device = CudaDevice(world, gpu.driver)
    try:
        if isinstance(gpu.launcher, CupyLauncher):
            launcher = gpu.launcher
            wanted = wanted_kernels(model)
            # On a lane's thread: modules are loaded into the context that is current there.
            prepare = partial(launcher.prepare, wanted, lambda built: tell("CUDA kernels", built.done, built.total))
            await on_lane(world, device, "prefill", 1, prepare)
        memory = await _measure(world, device, gpu, config, model)
        plan = plan_gpu(config, model, memory)
        make = partial(_lanes, gpu, config, model, plan.num_blocks, plan.max_model_len, plan.swap_slots)
        lanes = await world.to_thread(make)
        decode, prefill = _ours(lanes)
        count, rows = min(config.scheduler.max_prefill_tokens, plan.max_model_len), config.scheduler.max_num_seqs
        await on_lane(world, device, "prefill", 1, lambda: prefill.rehearse(count, count, rows))
        await on_lane(
            world, device, "decode", 0, lambda: decode.warm_up(lambda done, total: tell("CUDA graphs", done, total))
        )
        if isinstance(lanes.swap, CudaSwap):
            await _measure_swap(world, device, lanes.swap)
    except torch.OutOfMemoryError as error:
        device.close()
        shortage = str(error).partition("\n")[0]
        raise ConfigError(
            f"the GPU's memory ran out behind the cache that was planned ({shortage}): lower device.memory_fraction ="
            f" {config.device.memory_fraction} or scheduler.max_num_seqs = {config.scheduler.max_num_seqs}, or set"
            " device.cuda_graphs to false",
            param="device.memory_fraction",
        ) from None
    except BuildError as error:
        device.close()
        raise ConfigError(f"the CUDA kernels cannot be built: {error}", param="device.kind") from error
    except BaseException:
        device.close()
        raise
    reason = f"torch computes the attention, as {lacking}" if lacking else decode.graphs.refused
    notes = (f"decode runs without CUDA graphs: {reason}",) if reason and config.device.cuda_graphs else ()
    return Started(device, lanes, plan, notes)


async def _measure(world: World, device: CudaDevice, gpu: Gpu, config: Config, model: SwappableModel) -> GpuMemory:
    """Runs the largest prefill step, and captures the largest decode step, against a cache that just holds them."""
    driver = gpu.driver
    tokens, rows = config.scheduler.max_prefill_tokens, config.scheduler.max_num_seqs
    length = config.model.max_model_len or model.spec.max_model_len
    blocks = -(-tokens // BLOCK_SIZE) + -(-tokens // length) + 1
    driver.release_cached()
    before = driver.memory()
    try:
        # One slot: what a swap takes of the device is its staging buffer.
        slots = min(1, swap_slots(config, model))
        lanes = await world.to_thread(partial(_lanes, gpu, config, model, blocks, length, slots))
        decode, prefill = _ours(lanes)
        rehearse, capture = partial(prefill.rehearse, tokens, length, rows), partial(decode.graphs.capture, most=2)
        await on_lane(world, device, "prefill", 1, rehearse)
        activations = before.free - driver.memory().free - blocks * model.kv_bytes_per_token * BLOCK_SIZE
        middle = driver.memory().free
        await on_lane(world, device, "decode", 0, capture)
        graphs = middle - driver.memory().free
        sizes = len(decode.graphs.sizes)
        # The largest graph holds the memory that all share; each further one takes about what the second took.
        more = max(0, decode.graphs.capture_bytes[-1]) if len(decode.graphs.capture_bytes) > 1 else 0
        graphs = max(0, graphs) + more * max(0, sizes - 2)
    except torch.OutOfMemoryError as error:
        shortage = str(error).partition("\n")[0]
        raise ConfigError(
            f"the weights leave {before.free / 2**30:.2f} of {before.total / 2**30:.2f} GiB of GPU memory, and the"
            f" largest steps do not fit into it ({shortage}); lower scheduler.max_prefill_tokens = {tokens},"
            f" scheduler.max_num_seqs = {rows} or model.max_model_len = {length}",
            param="scheduler.max_prefill_tokens",
        ) from None
    del lanes, decode, prefill, rehearse, capture
    gc.collect()  # the trial's memory must be back before the cache takes it
    driver.release_cached()
    return GpuMemory(
        name=driver.name,
        total=before.total,
        free=before.free,
        activations=max(0, activations),
        graphs=graphs,
    )


async def _measure_swap(world: World, device: CudaDevice, swap: CudaSwap) -> None:
    """Times some blocks on their way to the host and back; the first round loads what later ones have."""
    for _ in range(2):
        before = world.now()
        count = await on_lane(world, device, "swap", 1, swap.rehearse)
        swap.block_seconds = (world.now() - before) / count


def _lanes(gpu: Gpu, config: Config, model: SwappableModel, num_blocks: int, max_model_len: int, slots: int) -> Lanes:
    spec = model.spec
    lacking = attention_lacks(spec.head_dim, spec.num_heads // spec.num_kv_heads)
    lanes = cuda_lanes(
        gpu.driver,
        gpu.launcher,
        model,
        num_blocks=num_blocks,
        max_rows=config.scheduler.max_num_seqs,
        max_model_len=max_model_len,
        max_logprobs=config.limits.max_logprobs,
        # Torch's attention reads lengths back from the device, which no graph can.
        use_graphs=config.device.cuda_graphs and not lacking,
        swap_slots=slots,
    )
    gpu.driver.settle()  # weights and lanes were filled on another stream than those that will read them
    return lanes


def _ours(lanes: Lanes) -> tuple[CudaDecode, CudaPrefill]:
    decode, prefill = lanes.decode, lanes.prefill
    assert isinstance(decode, CudaDecode)
    assert isinstance(prefill, CudaPrefill)
    return decode, prefill


def wanted_kernels(model: Any) -> list[Kernel]:
    """What the model's steps may launch."""
    found = {*model_kernels(model.dtype, model.spec.head_dim, model.kv_dtype)}
    for backend in model.backends or ():
        if isinstance(backend, CudaBackend):
            found |= backend.quantized_kernels
    return list(found)
