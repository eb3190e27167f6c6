"""The engine: six actors, their channels, and the requests that are open. The composition root of actors/."""

import asyncio
import math
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from millrace.actors.admission import Admission, Capacity
from millrace.actors.decode import Decode
from millrace.actors.prefill import Prefill
from millrace.actors.sampler import Sampler
from millrace.actors.scheduler import Scheduler
from millrace.actors.streamer import Streamer
from millrace.runtime.channel import Receiver, Sender, channel
from millrace.runtime.config import Config
from millrace.runtime.device import Device
from millrace.runtime.errors import InvalidRequestError, MillraceError, QueueFullError, RuntimeClosedError
from millrace.runtime.handle import RequestHandle
from millrace.runtime.kv.host import HostSlots
from millrace.runtime.kv.pool import BlockPool
from millrace.runtime.kv.prefix import PrefixHasher
from millrace.runtime.lanes import Lanes, host_lanes
from millrace.runtime.log import Logger
from millrace.runtime.mailbox import Mailbox
from millrace.runtime.messages import (
    AdmissionInbox,
    Cancel,
    DecodeInbox,
    PrefillInbox,
    SamplerInbox,
    SchedulerInbox,
    StreamerInbox,
    Submit,
)
from millrace.runtime.metrics import Metrics
from millrace.runtime.models.base import Model
from millrace.runtime.plan import MemoryPlan
from millrace.runtime.supervisor import Supervisor
from millrace.runtime.text.chat import ChatTemplate
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.types import (
    BLOCK_SIZE,
    MAX_CHOICES,
    FinishReason,
    Priority,
    Prompt,
    RequestId,
    SamplingParams,
)
from millrace.runtime.world import World

STALL_SECONDS = 5.0  # a launched step that takes longer, and eight times the longest step so far, is stuck
FIRST_STEP_SECONDS = 60.0  # the first step also pays for pages and caches that nothing has touched


class Health(msgspec.Struct, frozen=True):
    """What readiness is judged by. `progressing` is the engine's own clock, not a probe's."""

    state: str  # starting, ready, draining, failed or closed
    progressing: bool
    reason: str
    running: int
    waiting: int
    seconds_since_progress: float


class Engine:
    """Everything between `submit` and a mailbox. Start, then submit; stop ends every open request."""

    def __init__(
        self,
        *,
        config: Config,
        world: World,
        device: Device,
        model: Model[Any],
        plan: MemoryPlan,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        model_name: str,
        registry: CollectorRegistry,
        log: Logger,
        lanes: Lanes | None = None,
    ) -> None:
        """`lanes` are the device's own; None makes those of the CPU."""
        self.state = "starting"
        self.failure: str = ""
        self._config = config
        self._world = world
        self._device = device
        self._model_name = model_name
        self._log = log
        self._mailboxes: dict[RequestId, Mailbox] = {}
        self._cancelled: set[RequestId] = set()  # of those that are open
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self._supervisor = Supervisor(world, self._fail)

        rows = config.scheduler.max_num_seqs
        live = self._max_open = config.scheduler.max_queue + rows
        eos = model.spec.eos_token_ids
        key = world.rng("prefix-key").getrandbits(256).to_bytes(32, "little")
        hasher = PrefixHasher(key, BLOCK_SIZE) if config.kv.prefix_cache else None
        lanes = lanes or host_lanes(model, plan.num_blocks, rows, plan.max_model_len)
        metrics = self._metrics = Metrics(registry)

        # What a client sends may wait at `capacity`; what comes back along the cycles uses the reserve, and is bounded
        # by two steps per lane, or by one message for each open request.
        admission_in: tuple[Sender[AdmissionInbox], Receiver[AdmissionInbox]]
        admission_in = channel("admission", live, world, reserve=live)
        to_admission, admission_inbox = admission_in
        scheduler_in: tuple[Sender[SchedulerInbox], Receiver[SchedulerInbox]]
        scheduler_in = channel("scheduler", live, world, reserve=(2 + MAX_CHOICES) * live + 8)
        to_scheduler, scheduler_inbox = scheduler_in
        prefill_in: tuple[Sender[PrefillInbox], Receiver[PrefillInbox]] = channel("prefill", 4, world)
        to_prefill, prefill_inbox = prefill_in
        decode_in: tuple[Sender[DecodeInbox], Receiver[DecodeInbox]] = channel("decode", 4, world)
        to_decode, decode_inbox = decode_in
        sampler_in: tuple[Sender[SamplerInbox], Receiver[SamplerInbox]] = channel("sampler", 12, world)
        to_sampler, sampler_inbox = sampler_in
        streamer_in: tuple[Sender[StreamerInbox], Receiver[StreamerInbox]]
        streamer_in = channel("streamer", live, world, reserve=2 * live + 8)
        to_streamer, streamer_inbox = streamer_in
        self._submit = to_admission

        self.capacity = Capacity(
            max_model_len=plan.max_model_len,
            num_blocks=plan.num_blocks - 1,
            max_rows=rows,
            vocab_size=model.spec.vocab_size,
            max_logprobs=config.limits.max_logprobs,
        )
        self.scheduler = Scheduler(
            config=config.scheduler,
            pool=BlockPool(plan.num_blocks),
            hasher=hasher,
            max_model_len=plan.max_model_len,
            world=world,
            inbox=scheduler_inbox,
            prefill=to_prefill,
            decode=to_decode,
            streamer=to_streamer,
            concurrent=device.concurrent,
            host=None if lanes.swap is None else HostSlots(lanes.swap.num_slots, lanes.swap.block_seconds),
        )
        admission = Admission(
            world=world,
            tokenizer=tokenizer,
            template=template,
            hasher=hasher,
            capacity=self.capacity,
            metrics=metrics,
            inbox=admission_inbox,
            streamer=to_streamer.clone(),
            scheduler=to_scheduler,
        )
        prefill = Prefill(
            device=device,
            lane=lanes.prefill,
            swap=lanes.swap,
            inbox=prefill_inbox,
            sampler=to_sampler,
        )
        decode = Decode(
            device=device,
            lane=lanes.decode,
            inbox=decode_inbox,
            sampler=to_sampler.clone(),
        )
        sampler = Sampler(
            device=device,
            world=world,
            lane=lanes.sampling,
            eos_token_ids=eos,
            inbox=sampler_inbox,
            own=to_sampler.clone(),
            decode=to_decode.clone(),
            scheduler=to_scheduler.clone(),
            streamer=to_streamer.clone(),
        )
        streamer = Streamer(
            world=world,
            tokenizer=tokenizer,
            metrics=metrics,
            inbox=streamer_inbox,
            scheduler=to_scheduler.clone(),
        )
        self._actors = {
            "streamer": streamer.run,
            "sampler": sampler.run,
            "decode": decode.run,
            "prefill": prefill.run,
            "scheduler": self.scheduler.run,
            "admission": admission.run,
        }
        self._export(metrics)

    def start(self) -> None:
        """Starts the actors, readers before writers."""
        for name, run in self._actors.items():
            self._supervisor.start(name, run)
        self.state = "ready"

    async def stop(self) -> None:
        """Ends every open request with RuntimeClosedError, stops the actors, and gives the device's threads back."""
        self.state = "closed"
        self._fail_all(RuntimeClosedError("the runtime was closed before the request finished"))
        await self._supervisor.stop()
        self._actors.clear()  # and with them weights and KV cache
        await self._world.to_thread(self._device.close)

    @property
    def num_open(self) -> int:
        """Requests without a terminal event."""
        return len(self._mailboxes)

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        priority: Priority,
        deadline: float | None,
        name: str,
        cache_salt: str,
    ) -> RequestHandle:
        """Opens a request; whatever is wrong with it arrives as its terminal event. `deadline` is in seconds."""
        world = self._world
        rid = world.new_id()
        choices = sampling.n if isinstance(sampling.n, int) and 1 <= sampling.n <= MAX_CHOICES else 1
        mailbox = Mailbox(choices, self._config.streamer.max_unread_tokens)
        mailbox.on_closed = lambda: self._forget(rid)

        def cancel() -> None:
            world.call_soon_threadsafe(lambda: self._cancel(rid))

        handle = RequestHandle(rid, name, self._model_name, choices, mailbox, cancel)
        now = world.now()
        try:
            self._check_open()
            until = None if deadline is None else now + _seconds(deadline)
            submit = Submit(rid, prompt, sampling, _priority(priority), until, now, _salt(cache_salt), mailbox)
        except MillraceError as error:
            self._metrics.finished(FinishReason.REFUSED, 0.0, 0)
            mailbox.fail(error)
            return handle
        self._mailboxes[rid] = mailbox
        self._idle.clear()
        self._submit.send_nowait(submit)
        return handle

    def drain(self) -> None:
        """From now on new requests are refused; open ones go on."""
        if self.state == "ready":
            self.state = "draining"

    async def idle(self) -> None:
        """Returns when no request is open."""
        await self._idle.wait()

    def health(self) -> Health:
        stats = self.scheduler.stats
        now = self._world.now()
        last = max(stats.last_progress, stats.last_launch)
        silent = now - last if self.scheduler.num_launched else 0.0
        limit = max(STALL_SECONDS, 8 * stats.longest_step) if stats.last_progress else FIRST_STEP_SECONDS
        progressing = self.state in ("ready", "draining") and silent < limit
        reason = self.failure
        if silent >= limit:
            reason = f"no step has finished for {silent:.1f} s; the longest so far took {stats.longest_step:.1f} s"
        return Health(
            state=self.state,
            progressing=progressing,
            reason=reason,
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            seconds_since_progress=silent,
        )

    def _check_open(self) -> None:
        if self.state != "ready":
            raise RuntimeClosedError(self.failure or f"the runtime is {self.state} and takes no requests")
        if len(self._mailboxes) >= self._max_open:
            raise QueueFullError(
                f"{len(self._mailboxes)} requests are open, as many as scheduler.max_queue and scheduler.max_num_seqs "
                "let in; try again later"
            )

    def _forget(self, rid: RequestId) -> None:
        self._mailboxes.pop(rid, None)
        self._cancelled.discard(rid)
        if not self._mailboxes:
            self._idle.set()

    def _cancel(self, rid: RequestId) -> None:
        if rid in self._mailboxes and rid not in self._cancelled:
            self._cancelled.add(rid)
            self._submit.send_nowait(Cancel(rid))

    def _fail(self, name: str, error: BaseException) -> None:
        """An actor has died: everybody who waits learns of it."""
        if self.state == "closed":
            return
        self.state = "failed"
        self.failure = f"the runtime has failed ({name}: {type(error).__name__}) and must be started anew"
        self._log.error("actor_failed", actor=name, exc_info=error)
        self._supervisor.cancel()  # nobody is left to read what the others would compute
        self._fail_all(RuntimeClosedError(self.failure))

    def _fail_all(self, error: MillraceError) -> None:
        for mailbox in list(self._mailboxes.values()):
            self._metrics.finished(FinishReason.FAILED, 0.0, 0)
            # An exception of its own for each: a raised one collects the frames of whoever raised it.
            mailbox.fail(error.info().exception())

    def _export(self, metrics: Metrics) -> None:
        scheduler = self.scheduler
        pool, stats = scheduler.residency.pool, scheduler.stats
        for name, documentation, read in (
            ("sequences_running", "Sequences that hold a row", lambda: scheduler.num_running),
            ("requests_waiting", "Sequences in the queue", lambda: scheduler.num_waiting),
            ("kv_cache_usage_ratio", "KV blocks in use", lambda: 1 - pool.num_free / pool.num_usable),
            ("prefill_budget_tokens", "Prompt tokens the next prefill step may hold", lambda: stats.prefill_budget),
            ("steps_launched", "Steps that have not reported", lambda: scheduler.num_launched),
        ):
            metrics.gauge(name, documentation, read)
        for name, documentation, count in (
            ("preemptions", "Sequences whose blocks were taken away", lambda: stats.preemptions),
            ("prefix_cache_queries_tokens", "Prompt tokens looked up", lambda: stats.prefix_queries),
            ("prefix_cache_hits_tokens", "Prompt tokens found", lambda: stats.prefix_hits),
        ):
            metrics.counter(name, documentation, count)
        swaps = scheduler.residency.swaps
        if swaps is not None:
            metrics.counter("kv_blocks_swapped_out", "KV blocks copied to the host", lambda: swaps.num_out)
            metrics.counter("kv_blocks_swapped_in", "KV blocks copied back", lambda: swaps.num_in)


def _seconds(deadline: float) -> float:
    if not isinstance(deadline, int | float) or math.isnan(deadline):
        raise InvalidRequestError(f"deadline is {deadline!r}, but it must be a number of seconds", param="deadline")
    return float(deadline)


def _priority(priority: Priority | int) -> Priority:
    try:
        return Priority(priority)
    except ValueError:
        names = ", ".join(f"{member.name} ({member.value})" for member in Priority)
        raise InvalidRequestError(
            f"priority is {priority!r}, but it must be one of {names}", param="priority"
        ) from None


def _salt(salt: str) -> str:
    try:
        salt.encode()
    except (AttributeError, UnicodeEncodeError):
        raise InvalidRequestError("cache_salt must be text that UTF-8 can hold", param="cache_salt") from None
    return salt
