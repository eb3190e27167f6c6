"""The public face: a model, loaded and ready, in your own asyncio program."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from prometheus_client import CollectorRegistry

from millrace.kernels.cuda_driver import has_driver
from millrace.runtime.config import Config, load_config, replace
from millrace.runtime.device import CpuDevice, Device
from millrace.runtime.engine import Engine, Health
from millrace.runtime.errors import ConfigError, RuntimeClosedError
from millrace.runtime.handle import RequestHandle
from millrace.runtime.loading import Loaded, load
from millrace.runtime.log import Logger, make_logger
from millrace.runtime.models.base import Model, ModelSpec
from millrace.runtime.plan import MemoryPlan, plan_memory
from millrace.runtime.text.chat import ChatTemplate
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.types import Priority, PromptLike, SamplingParams, as_prompt
from millrace.runtime.world import AsyncioWorld

if TYPE_CHECKING:
    from millrace.runtime.cuda.swap import SwappableModel
    from millrace.runtime.gpu import Gpu


class Runtime:
    """One model in this process, on this event loop.

        async with Runtime() as runtime:
            completion = await runtime.submit("Once upon a time")
            async for delta in runtime.submit([{"role": "user", "content": "Hello"}]):
                print(delta.text, end="")

    It installs no signal handler, starts no process, and gives memory, threads and descriptors back on close.

    Args:
        model: checkpoint folder, GGUF file or hub id; None takes `config.model.path`, and where that is empty the
            embedded model.
        config: a whole configuration; the default is Config().
        progress: called with (what, done, total) while weights load.
        options: single options over `config`, as `section__name=value` (`scheduler__max_num_seqs=8`).

    Raises:
        ConfigError, CheckpointError: from `start`, before anything is allocated.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: Config | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        **options: Any,
    ) -> None:
        overrides = {key.replace("__", ".", 1): value for key, value in options.items()}
        if model is not None:
            overrides["model.path"] = str(model)
        self.config = replace(config or load_config(), overrides)
        self.registry = CollectorRegistry()
        self.log: Logger = make_logger(self.config.log)
        self.created = 0
        self._progress = progress
        self._world: AsyncioWorld | None = None
        self._engine: Engine | None = None
        self._gpu: Gpu | None = None
        self._loaded: Loaded | None = None
        self._plan: MemoryPlan | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Loads the model and starts the engine. A runtime starts once."""
        if self._world is not None or self._closing is not None:
            raise RuntimeClosedError("a runtime starts once; make another one")
        world = self._world = AsyncioWorld()
        self.created = int(world.wall())
        try:
            loaded = await world.to_thread(self._load)
            self._check_open()
            self._engine = await self._make_engine(world, loaded)
        except BaseException:
            self._loaded = None
            await self.close()
            raise
        self._engine.start()

    def _load(self) -> Loaded:
        kind = self.config.device.kind
        if kind == "cuda" or (kind == "auto" and has_driver()):
            from millrace.runtime.gpu import open_gpu  # with torch, whose import a CPU with a build does without

            self._gpu = open_gpu(self.config)
        return load(self.config, self._progress, self._gpu)

    def _check_open(self) -> None:
        if self._closing is not None:
            raise RuntimeClosedError("the runtime was closed while it started")

    async def _make_engine(self, world: AsyncioWorld, loaded: Loaded) -> Engine:
        self._loaded = loaded
        max_model_len = _max_model_len(self.config, loaded.model)
        device: Device
        lanes = None
        if self._gpu is not None:
            from millrace.runtime.gpu import start_gpu

            try:
                model = cast("SwappableModel", loaded.model)  # as one is that was loaded onto a GPU
                started = await start_gpu(world, self._gpu, self.config, model, self._progress)
            except RuntimeError:
                self._check_open()  # closed meanwhile, which is why helper threads are gone
                raise
            device, lanes, self._plan = started.device, started.lanes, started.plan
            for note in started.notes:
                self.log.warning("gpu", note=note)
        else:
            self._plan = plan_memory(self.config, loaded.model, max_model_len)
            device = CpuDevice(world, self.config.device.threads or available_cores())
        try:
            self._check_open()
            return Engine(
                config=self.config,
                world=world,
                device=device,
                model=loaded.model,
                plan=self._plan,
                tokenizer=loaded.tokenizer,
                template=loaded.template,
                model_name=self.model_name,
                registry=self.registry,
                log=self.log,
                lanes=lanes,
            )
        except BaseException:
            device.close()
            raise

    async def close(self) -> None:
        """Ends open requests with RuntimeClosedError and gives everything back. Idempotent; being cancelled stops the
        waiting, not the closing."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close(), name="millrace-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()
        self._loaded = None
        gpu, self._gpu = self._gpu, None
        if self._world is not None:
            if gpu is not None and engine is not None:
                await self._world.to_thread(gpu.driver.release_cached)  # torch would keep it for this process
            await self._world.close()

    async def __aenter__(self) -> "Runtime":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def submit(
        self,
        prompt: PromptLike,
        sampling: SamplingParams | None = None,
        *,
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> RequestHandle:
        """Opens a request and returns at once; await the handle, or iterate it.

        Args:
            prompt: text, token ids, or chat messages.
            sampling: the default draws at temperature 1 to the end of the context.
            priority: order in the queue.
            deadline: seconds from now after which the request ends with DeadlineExceededError.
            request_id: a name for logs and for the wire; not necessarily unique.
            cache_salt: requests share cached prefixes only with those under the same salt.

        Raises:
            InvalidRequestError: the prompt is of no known kind. Everything else that may be wrong with a request
                arrives where its handle is read.
        """
        if self._engine is None:
            raise RuntimeClosedError("the runtime is not started; use `async with Runtime() as runtime`")
        return self._engine.submit(
            as_prompt(prompt),
            sampling or SamplingParams(),
            priority=priority,
            deadline=deadline,
            name=request_id or f"req-{os.urandom(8).hex()}",
            cache_salt=cache_salt,
        )

    async def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits for open ones; False if some are still open after `timeout` seconds."""
        engine = self._running()
        engine.drain()
        try:
            async with asyncio.timeout(timeout):
                await engine.idle()
        except TimeoutError:
            return False
        return True

    def health(self) -> Health:
        if self._engine is None:
            state = "starting" if self._closing is None else "closed"
            return Health(state, False, f"the runtime is {state}", 0, 0, 0.0)
        return self._engine.health()

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        return self.config.model.served_name or self._ready().name

    @property
    def spec(self) -> ModelSpec:
        return self._ready().model.spec

    @property
    def tokenizer(self) -> Tokenizer:
        return self._ready().tokenizer

    @property
    def template(self) -> ChatTemplate:
        return self._ready().template

    @property
    def memory_plan(self) -> MemoryPlan:
        self._ready()
        assert self._plan is not None
        return self._plan

    @property
    def max_model_len(self) -> int:
        return self.memory_plan.max_model_len

    def _ready(self) -> Loaded:
        if self._loaded is None:
            raise RuntimeClosedError("the runtime is not started; use `async with Runtime() as runtime`")
        return self._loaded

    def _running(self) -> Engine:
        if self._engine is None:
            raise RuntimeClosedError("the runtime is not started; use `async with Runtime() as runtime`")
        return self._engine


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _max_model_len(config: Config, model: Model[Any]) -> int:
    wanted, most = config.model.max_model_len, model.spec.max_model_len
    if wanted > most:
        raise ConfigError(
            f"model.max_model_len is {wanted}, but the checkpoint was made for {most} positions",
            param="model.max_model_len",
        )
    return wanted or most
