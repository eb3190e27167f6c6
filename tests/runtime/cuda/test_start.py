"""Starting on a GPU: the memory plan, the refusal with settings that would fit, and a whole runtime on one."""

import re
import sys
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from cuda_fakes import CountingLauncher, FakeDriver, PaddedLedger, lanes_alive
from fakes import LedgerModel

from millrace.kernels.cuda_backend import model_kernels
from millrace.runtime import Runtime, SamplingParams
from millrace.runtime.config import Config, load_config
from millrace.runtime.errors import ConfigError
from millrace.runtime.gpu import Gpu, open_gpu, start_gpu
from millrace.runtime.models.base import ModelSpec
from millrace.runtime.plan import GpuMemory, MemoryPlan, plan_gpu
from millrace.runtime.world import AsyncioWorld
from shim.launcher import ShimLauncher

GIB = 1 << 30
MIB = 1 << 20


class Sizes:
    """As much of a model as planning looks at: Llama-3.1-8B in bfloat16."""

    weight_bytes = 15 * GIB
    kv_bytes_per_token = 32 * 2 * 8 * 128 * 2

    def __init__(self) -> None:
        self.spec = ModelSpec(
            architecture="LlamaForCausalLM",
            vocab_size=128256,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            max_model_len=131072,
        )


def config(**options: Any) -> Config:
    return load_config(None, {key.replace("__", ".", 1): value for key, value in options.items()})


def memory(total: float, **more: int) -> GpuMemory:
    numbers = {"activations": 500 * MIB, "graphs": 200 * MIB} | more
    return GpuMemory("GPU of a test", int(total * GIB), int((total - 15.4) * GIB), **numbers)


def plan(given: Config, total: float, **more: int) -> MemoryPlan:
    model: Any = Sizes()
    return plan_gpu(given, model, memory(total, **more))


def test_the_cache_takes_what_is_left() -> None:
    made = plan(config(), 80)
    left = 80 * 0.9 * GIB - 15.4 * GIB - 700 * MIB
    assert left - made.kv_per_token * 16 < made.kv_cache <= left
    assert made.num_tokens == (made.num_blocks - 1) * 16
    assert made.max_model_len == 131072
    table = made.table()
    for line in ("80 GiB  of GPU of a test", "15 GiB  resident", "500 MiB", "200 MiB"):
        assert line in table


def test_the_context_is_as_long_as_there_is_room_for() -> None:
    made = plan(config(), 24)
    assert 2048 < made.max_model_len < 131072
    assert made.max_model_len == made.num_tokens
    assert plan(config(kv__memory_mb=1024), 24).kv_cache == GIB


def test_a_small_model_does_not_take_the_whole_device() -> None:
    made = plan(config(model__max_model_len=64, scheduler__max_num_seqs=4), 80)
    assert made.num_blocks == 4 * (4 * 4 + 1)


@pytest.mark.parametrize(
    ("options", "total", "more"),
    [
        ({"model__max_model_len": 131072}, 24, {}),
        ({}, 17.9, {}),
        ({"scheduler__max_prefill_tokens": 8192}, 20, {"activations": 3 * GIB}),
        ({"scheduler__max_num_seqs": 512}, 20, {"graphs": 3 * GIB}),
        ({"kv__memory_mb": 9000}, 24, {}),
        ({"model__max_model_len": 8192, "scheduler__max_prefill_tokens": 2048}, 18.9, {"activations": GIB}),
    ],
)
def test_every_setting_that_the_refusal_names_would_fit(options: Any, total: float, more: dict[str, int]) -> None:
    """Each alone, with what the device would measure then: steps and graphs in proportion."""
    given = config(**options)
    with pytest.raises(ConfigError) as refused:
        plan(given, total, **more)
    text = str(refused.value)
    for line in ("weights", "steps", "graphs", "unused", "left", "needed"):
        assert re.search(rf"^  {line} ", text, re.MULTILINE)
    settings = re.findall(r"^  (\w+)\.(\w+) = (\S+)$", text, re.MULTILINE)
    assert settings
    for section, name, value in settings:
        changed = msgspec.json.decode(value)
        again = config(**(options | {f"{section}__{name}": changed}))
        measured = {"activations": 500 * MIB, "graphs": 200 * MIB} | more
        share = again.scheduler.max_prefill_tokens / given.scheduler.max_prefill_tokens
        measured["activations"] = int(measured["activations"] * share)
        measured["graphs"] = int(measured["graphs"] * again.scheduler.max_num_seqs / given.scheduler.max_num_seqs)
        if not again.device.cuda_graphs:
            measured["graphs"] = 0
        plan(again, total, **measured)


def test_three_settings_are_named_where_three_would_do() -> None:
    options = {"model__max_model_len": 24576, "scheduler__max_prefill_tokens": 4096}
    with pytest.raises(ConfigError) as refused:
        plan(config(**options), 21.5, activations=int(1.5 * GIB))
    assert str(refused.value).count(" = ") >= 3 + 2
    assert "any one of these would fit" in str(refused.value)


def test_weights_that_fill_the_device() -> None:
    with pytest.raises(ConfigError, match=r"no single setting makes it fit; .* GiB would"):
        plan(config(), 15.5)


def test_a_cpu_is_what_is_asked_for_or_what_there_is() -> None:
    assert open_gpu(config(device__kind="cpu")) is None
    if not torch.cuda.is_available():
        assert open_gpu(config()) is None
        with pytest.raises(ConfigError, match=r"device\.kind is cuda, but .*; with device\.kind = cpu it runs here"):
            open_gpu(config(device__kind="cuda"))


def test_a_cupy_that_cannot_use_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be one for another CUDA: then importing it succeeds."""

    class Device:
        def __init__(self, index: int) -> None:
            raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Device=Device)))
    with pytest.raises(ConfigError, match=r"CuPy cannot use device 0 .*cudaErrorInsufficientDriver"):
        open_gpu(config(device__kind="cuda"))
    assert open_gpu(config()) is None


async def test_the_rehearsal_gives_as_many_logits_as_a_step_can(shim: ShimLauncher) -> None:
    model: Any = PaddedLedger(max_model_len=256)
    driver, world = FakeDriver("at once"), AsyncioWorld()
    options = {"scheduler__max_num_seqs": 90, "scheduler__max_prefill_tokens": 120, "device__cuda_graphs": False}
    gpu = Gpu(driver, CountingLauncher(shim, driver))
    started = await start_gpu(world, gpu, config(**options), model)
    started.device.close()
    await world.close()
    assert model.most_logits == 90


async def test_start_measures_plans_and_captures(shim: ShimLauncher) -> None:
    model: Any = PaddedLedger(max_model_len=256)
    driver = FakeDriver("random", free=64 * MIB, total=80 * MIB, step_bytes=4 * MIB, capture_bytes=(3 * MIB, MIB))
    given = config(scheduler__max_num_seqs=6, scheduler__max_prefill_tokens=300, device__memory_fraction=0.5)
    world = AsyncioWorld()
    told: list[tuple[str, int, int]] = []
    started = await start_gpu(
        world, Gpu(driver, CountingLauncher(shim, driver)), given, model, lambda *step: told.append(step)
    )
    try:
        # Captured twice: a trial of two graphs, and then all: 1, 2, 4 and 6 places.
        assert [pool for _, pool in driver.captures] == [None, "pool", None, "pool", "pool", "pool"]
        assert started.plan.graphs == 3 * MIB + MIB + 2 * MIB
        trial_blocks = 19 + 2 + 1
        assert started.plan.activations == 4 * MIB - trial_blocks * 16 * model.kv_bytes_per_token
        assert started.plan.num_blocks == 4 * (6 * 16 + 1)
        assert told == [("CUDA graphs", done, 4) for done in (1, 2, 3, 4)]
        assert started.notes == ()
    finally:
        started.device.close()
        await world.close()
    assert lanes_alive() == []


async def test_a_shortage_behind_the_plan_names_settings(shim: ShimLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = PaddedLedger(max_model_len=64)
    driver, world = FakeDriver("random"), AsyncioWorld()
    capture = driver.capture

    def short(*arguments: Any) -> Any:
        if len(driver.captures) >= 3:  # two are the trial
            raise torch.OutOfMemoryError("CUDA out of memory\nand a long explanation")
        return capture(*arguments)

    monkeypatch.setattr(driver, "capture", short)
    gpu = Gpu(driver, CountingLauncher(shim, driver))
    with pytest.raises(ConfigError, match=r"\(CUDA out of memory\): lower device\.memory_fraction = 0\.9"):
        await start_gpu(world, gpu, config(scheduler__max_num_seqs=2), model)
    await world.close()
    assert lanes_alive() == []


async def test_a_start_that_is_refused_leaves_no_thread(shim: ShimLauncher) -> None:
    model: Any = PaddedLedger(max_model_len=256)
    world = AsyncioWorld()
    for driver, limit, message in (
        (FakeDriver(free=10 * MIB, total=80 * MIB), 1 << 30, "would fit"),
        (FakeDriver("at once"), 100, "largest steps do not fit into it"),
    ):
        model.limit = limit
        gpu = Gpu(driver, CountingLauncher(shim, driver))
        with pytest.raises(ConfigError, match=message):
            await start_gpu(world, gpu, config(device__memory_fraction=0.5), model)
        assert lanes_alive() == []
    await world.close()


async def test_keys_are_of_16_bits_or_of_8_for_some_head_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher: Any = SimpleNamespace(device_type="cpu", sm_count=1)  # nothing gets so far as to launch a kernel
    monkeypatch.setattr("millrace.runtime.app.has_driver", lambda: True)
    monkeypatch.setattr("millrace.runtime.gpu.open_gpu", lambda config: Gpu(FakeDriver(), launcher))
    with pytest.raises(ConfigError, match=r"kv\.dtype is bfloat16, but on a GPU it must be auto"):
        await Runtime(kv__dtype="bfloat16").start()
    model: Any = LedgerModel()  # of a head size that no kernel has
    gpu, world = Gpu(FakeDriver(), launcher), AsyncioWorld()
    with pytest.raises(ConfigError, match=r"kv\.dtype is int8, .*head sizes of 32, 64, .* not 1: use auto"):
        await start_gpu(world, gpu, config(kv__dtype="int8"), model)
    await world.close()


async def test_attention_in_torch_is_not_captured(shim: ShimLauncher) -> None:
    model: Any = PaddedLedger(max_model_len=64)
    model.spec = msgspec.structs.replace(model.spec, head_dim=24)
    driver, world = FakeDriver("random"), AsyncioWorld()
    gpu = Gpu(driver, CountingLauncher(shim, driver))
    started = await start_gpu(world, gpu, config(scheduler__max_num_seqs=2), model)
    started.device.close()
    await world.close()
    assert driver.captures == []
    (note,) = started.notes
    assert note.startswith("decode runs without CUDA graphs: torch computes the attention") and "not 24" in note


@pytest.mark.slow
@pytest.mark.parametrize(("graphs", "quantize"), [(True, "none"), (True, "int8"), (True, "fp8"), (False, "none")])
async def test_a_runtime_on_a_gpu(
    shim: ShimLauncher, monkeypatch: pytest.MonkeyPatch, graphs: bool, quantize: str
) -> None:
    """The embedded model from loading to close, in bfloat16 on the kernels."""
    driver = FakeDriver("random")
    gpu = Gpu(driver, CountingLauncher(shim, driver))
    monkeypatch.setattr("millrace.runtime.app.has_driver", lambda: True)
    monkeypatch.setattr("millrace.runtime.gpu.open_gpu", lambda config: gpu)
    options = {"scheduler__max_num_seqs": 2, "scheduler__max_prefill_tokens": 32, "model__max_model_len": 128}
    async with Runtime(device__cuda_graphs=graphs, model__quantize=quantize, **options) as runtime:
        assert "a GPU that is none" in runtime.memory_plan.table()
        question = [{"role": "user", "content": "What is the capital of France?"}]
        completion = await runtime.submit(question, SamplingParams(temperature=0.0, max_tokens=12))
        assert "Paris" in completion.text
    assert (driver.replays > 0) is graphs
    assert lanes_alive() == []


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernels_of_a_model_are_a_small_part_of_all(head_dim: int) -> None:
    wanted = list(model_kernels(torch.bfloat16, head_dim))
    names = {kernel.name for kernel in wanted}
    assert {"mr_rms_norm", "mr_rope_kv", "mr_attention_decode", "mr_attention_prefill", "mr_sample_draw"} <= names
    assert {"mr_plan_decode", "mr_move_blocks", "mr_embedding", "mr_activation"} <= names
    assert len(wanted) == len(set(wanted)) < 30
    assert all(dict(kernel.defines).get("MR_T", "bf16") == "bf16" for kernel in wanted)
    narrow = list(model_kernels(torch.bfloat16, head_dim, torch.int8))
    assert {dict(kernel.defines).get("MR_KV", "2") for kernel in narrow} == {"int8", "2"}
