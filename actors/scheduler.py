"""The scheduler: owner of request records, rows, the KV block pool and the prefix cache.

There are no phases, only a gap to close: every sequence has a number of positions whose keys and values are computed
(or are being computed by a launched step) and a number that it wants, and a plan closes some of the gap. Prefill and
decode are lanes of execution, each with two credits: at most two of its steps are launched and not yet reported.
"""

import heapq
from collections import deque
from collections.abc import Callable
from itertools import chain

from millrace.runtime.channel import Receiver, Sender
from millrace.runtime.config import SchedulerConfig
from millrace.runtime.errors import DeadlineExceededError, ErrorInfo, QueueFullError, RequestCancelledError
from millrace.runtime.kv.host import HostSlots
from millrace.runtime.kv.pool import BlockPool
from millrace.runtime.kv.prefix import PrefixHasher
from millrace.runtime.messages import (
    Admitted,
    Cancel,
    Closed,
    DecodePlan,
    Flow,
    PrefillInbox,
    SchedulerInbox,
    Started,
    StreamerInbox,
    TokensSampled,
)
from millrace.runtime.scheduling.batch import DecodeBatch
from millrace.runtime.scheduling.budget import PrefillBudget
from millrace.runtime.scheduling.plans import Chunk, Copy, Update, decode_plan, prefill_plan
from millrace.runtime.scheduling.records import Request, SchedulerStats, Sequence, Step
from millrace.runtime.scheduling.residency import Residency
from millrace.runtime.scheduling.swaps import Swaps
from millrace.runtime.scheduling.waiting import WaitingQueue
from millrace.runtime.types import BLOCK_SIZE, FinishReason, Lane, RequestId, SequenceId
from millrace.runtime.world import World

PROMPT_LOGPROB_CHUNK = 64  # tokens; logits of a whole chunk are held at once, [chunk, vocab_size] float32


class Scheduler:
    """`handle` applies a message, `plan` launches what can be launched, `run` does both for whatever comes."""

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        pool: BlockPool,
        hasher: PrefixHasher | None,
        max_model_len: int,
        world: World,
        inbox: Receiver[SchedulerInbox],
        prefill: Sender[PrefillInbox],
        decode: Sender[DecodePlan],
        streamer: Sender[StreamerInbox],
        host: HostSlots | None = None,
        concurrent: bool = False,
    ) -> None:
        """`host`: where blocks of preempted sequences may go; None computes them again. `concurrent`: the device runs
        both lanes at once."""
        self._budget = PrefillBudget(config.max_prefill_tokens, config.inter_token_target_ms / 1000)
        self._swaps = None if host is None else Swaps(pool, host, self._budget)
        self.residency = Residency(pool, hasher, config.max_num_seqs, max_model_len, self._swaps)
        self.stats = SchedulerStats(concurrent=concurrent)
        self._config = config
        self._world = world
        self._inbox = inbox
        self._prefill = prefill
        self._decode = decode
        self._streamer = streamer

        self._rows = self.residency.rows
        self._requests: dict[RequestId, Request] = {}
        self._queue = WaitingQueue()
        self._prefilling: list[Sequence] = []
        self._ready: list[Sequence] = []
        self._batch = DecodeBatch()
        self._num_paused = 0  # requests
        # Head of the queue, free rows and free blocks when it last found no room: nothing new, no new attempt.
        self._stuck: tuple[Sequence, int, int] | None = None
        self._deadlines: list[tuple[float, RequestId]] = []  # heap

        depth = 2 if config.overlap else 1
        self._credits = {Lane.PREFILL: depth, Lane.DECODE: depth}
        self._next_step = {Lane.PREFILL: 0, Lane.DECODE: 0}
        self._launched: dict[Lane, deque[Step]] = {Lane.PREFILL: deque(), Lane.DECODE: deque()}
        self._handlers: dict[type, Callable[..., None]] = {
            Admitted: self._admit,
            Cancel: self._cancel,
            Flow: self._flow,
            TokensSampled: self._apply,
        }

    async def run(self) -> None:
        """Ends when every sender of the inbox has closed."""
        while True:
            until = self._deadlines[0][0] if self._deadlines else None
            for message in await self._inbox.recv_batch(until):
                self.handle(message)
            self.plan()

    def handle(self, message: SchedulerInbox) -> None:
        self._handlers[type(message)](message)

    def plan(self) -> None:
        """Launches steps while there are credits and work for them."""
        self._expire()
        self._retire()
        while self._credits[Lane.DECODE] and self._plan_decode():
            pass
        while self._credits[Lane.PREFILL] and self._plan_prefill():
            pass
        while self._swaps is not None and (swap := self._swaps.next()) is not None:
            self._prefill.send_nowait(swap)

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return self.residency.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, and paused ones that have given up their row."""
        return len(self._queue)

    @property
    def num_launched(self) -> int:
        """Steps that have not reported."""
        return len(self._launched[Lane.PREFILL]) + len(self._launched[Lane.DECODE])

    def check(self) -> None:
        """Raises AssertionError unless blocks, rows and places are accounted for. For tests, and when idle."""
        copied = [step.copied for step in chain(*self._launched.values())]
        self.residency.check(copied, [sequence.slots for sequence in self._queue])
        if not self._requests:
            assert not self.residency.holders(), "a row outlives its request"
            assert self.num_waiting == 0

    def _admit(self, admitted: Admitted) -> None:
        # Those who will start in a free row wait for a step, not for somebody else.
        if self.num_waiting >= self._config.max_queue + len(self._rows.free):
            message = (
                f"{self.num_waiting} requests wait already and the queue holds {self._config.max_queue}; "
                "try again later, or raise scheduler.max_queue"
            )
            self._close(admitted.rid, FinishReason.REFUSED, QueueFullError(message).info())
            return
        request = Request(admitted, self._config.aging_seconds)
        first = Sequence(request, 0, admitted.prompt)
        first.hashes = list(admitted.block_hashes)
        request.sequences.append(first)
        self._requests[admitted.rid] = request
        self._queue.push(first)
        if admitted.deadline is not None:
            heapq.heappush(self._deadlines, (admitted.deadline, admitted.rid))
            if len(self._deadlines) > 2 * len(self._requests) + 64:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
                heapq.heapify(self._deadlines)

    def _cancel(self, cancel: Cancel) -> None:
        request = self._requests.get(cancel.rid)
        if request is None:
            return  # it has ended already: the cancel and the end have crossed
        if cancel.choice is not None:
            for sequence in request.sequences:
                if sequence.choice == cancel.choice:
                    self._end(sequence)
            return
        if cancel.reason is not None:
            self._close(cancel.rid, cancel.reason, RequestCancelledError("the request was cancelled").info())
        self._end_request(request)

    def _flow(self, flow: Flow) -> None:
        request = self._requests.get(flow.rid)
        if request is None:
            return
        self._num_paused += flow.paused - request.paused
        request.paused = flow.paused
        self._stuck = None  # somebody may give way, or need not any more
        if not flow.paused:
            self._queue.resume(request)

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._world.now():
            deadline, rid = heapq.heappop(self._deadlines)
            request = self._requests.get(rid)
            if request is not None:
                seconds = deadline - request.admitted.arrived
                error = DeadlineExceededError(f"the request did not finish within its deadline of {seconds:.3f} s")
                self._close(rid, FinishReason.DEADLINE, error.info())
                self._end_request(request)

    def _close(self, rid: RequestId, reason: FinishReason, error: ErrorInfo) -> None:
        self._streamer.send_nowait(Closed(rid, reason, error))

    def _end_request(self, request: Request) -> None:
        for sequence in request.sequences:
            self._end(sequence)
        if request.live:  # it never left the queue: its other choices have no sequence yet
            self._forget(request)

    def _end(self, sequence: Sequence) -> None:
        """Takes a sequence out of every place; its row and blocks follow when no launched step names them."""
        if sequence.ended:
            return
        sequence.ended = True
        self._displace(sequence)
        self.residency.leave(sequence)
        request = sequence.request
        request.live -= 1
        if request.live == 0:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.admitted.rid]
        self._num_paused -= request.paused

    def _displace(self, sequence: Sequence) -> None:
        if sequence.row < 0:
            self._queue.remove(sequence)
        elif self._batch.get(sequence.row) is sequence:
            self._batch.leave(sequence.row)
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)
        elif sequence in self._ready:
            self._ready.remove(sequence)

    def _retire(self) -> None:
        """Takes back what no launched step names; those who were preempted wait again, in their old place."""
        for sequence in self.residency.retire(chain(*self._launched.values())):
            self._queue.push(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes row and blocks away; what was computed is computed again later, or found in the prefix cache, or comes
        back from the host."""
        self.stats.preemptions += 1
        self._displace(sequence)
        self.residency.leave(sequence)
        self._retire()

    def _start_waiting(self, head: Sequence) -> bool:
        """Starts the head of the queue if there is room; those behind it never overtake it for being smaller."""
        residency = self.residency
        # What is still on its way to the host cannot be asked back.
        if head.saving or self._stuck == (head, len(self._rows.free), residency.pool.num_free):
            return False
        while not self._start(head):
            # Those whose readers have stalled give way to those who can run.
            holders = residency.holders()
            if not holders or not holders[-1].request.paused:
                self._stuck = (head, len(self._rows.free), residency.pool.num_free)
                return False
            self._preempt(holders[-1])
        self._queue.pop()
        return True

    def _start(self, sequence: Sequence) -> bool:
        request = sequence.request
        num_rows = 1 if request.started else request.admitted.sampling.n
        cached = self.residency.enter(sequence, num_rows)
        if cached is None:
            return False
        self.stats.prefix_queries += len(sequence.history)
        self.stats.prefix_hits += cached
        if not request.started:
            request.started = True
            self._streamer.send_nowait(Started(request.admitted.rid, cached, self._world.now()))
            # Rows of the other choices are taken now, so that they need not wait once the prompt is computed.
            for choice in range(1, num_rows):
                other = Sequence(request, choice, sequence.history)
                request.sequences.append(other)
                self.residency.take_row(other)
        if not sequence.arriving:
            self._prefilling.append(sequence)
        return True

    def _plan_prefill(self) -> bool:
        budget = self._budget.tokens(decoding=bool(self._batch))
        self.stats.prefill_budget = budget
        rows = self._rows
        chunks: list[Chunk] = []
        # In the order of the queue: who waits with a better place starts before those behind it go on.
        line = sorted(s for s in self._prefilling if not s.request.paused)
        may_start = True
        while budget > 0:
            head = self._queue.head()
            if may_start and head is not None and (not line or head < line[0]):
                may_start = self._start_waiting(head)
                if may_start and not head.arriving:
                    line.insert(0, head)
                continue
            if not line:
                break
            sequence = line.pop(0)
            row = sequence.row
            start, end = int(rows.computed[row]), int(rows.known[row])
            if sequence.request.admitted.sampling.prompt_logprobs is not None:
                end = min(end, start + PROMPT_LOGPROB_CHUNK)
            end = min(end, start + budget)
            chunks.append(Chunk(sequence, start, end))
            budget -= end - start
        if not chunks:
            return False
        self._launch_prefill(chunks)
        return True

    def _launch_prefill(self, chunks: list[Chunk]) -> None:
        rows = self._rows
        forks: list[list[Sequence]] = []  # who draws the first token behind each chunk
        for chunk in chunks:
            sequence = chunk.sequence
            rows.computed[sequence.row] = chunk.end
            drawing: list[Sequence] = []
            if chunk.end == rows.known[sequence.row]:
                self._prefilling.remove(sequence)
                drawing = [sequence, *self.residency.fork(sequence)]
            forks.append(drawing)
        step, plan = prefill_plan(self._next_step[Lane.PREFILL], chunks, forks, rows)
        self._take_credit(Lane.PREFILL, step)
        self._prefill.send_nowait(plan)

    def _plan_decode(self) -> bool:
        rows, batch = self._rows, self._batch
        updates: list[Update] = []  # (row, first index, blocks)
        copies: list[Copy] = []  # (for whom, source, target)
        joined: list[Sequence] = []
        if batch.quiet_steps and not self._ready and not self._num_paused:
            batch.quiet_steps -= 1
        else:
            self._settle_batch(updates)
            joined = self._join_batch(updates, copies)
        if not batch:
            return False
        present = [update for update in updates if batch.get(update[0]) is not None] if updates else updates
        plan = decode_plan(self._next_step[Lane.DECODE], batch, joined, present, copies, rows)
        copied = [source for _, source, _ in copies]
        step = Step(batch.rows, batch.sequences, len(batch), None, copied, fills=batch.quiet_steps == 0)
        self._take_credit(Lane.DECODE, step)
        rows.computed[batch.rows] += 1
        self._decode.send_nowait(plan)
        return True

    def _settle_batch(self, updates: list[Update]) -> None:
        """Lets go who is at its target or paused, and gives the others the blocks that their next tokens need."""
        batch = self._batch
        computed = self._rows.computed[batch.rows]
        left = int((self._rows.target[batch.rows] - computed).min(initial=BLOCK_SIZE))
        if left <= 0:
            for row in batch.rows[computed >= self._rows.target[batch.rows]].tolist():
                batch.leave(row)  # its last tokens are on their way
        if self._num_paused:
            for sequence in batch.sequences:
                if sequence.request.paused:
                    batch.leave(sequence.row)
                    self._ready.append(sequence)
        room = int((-computed % BLOCK_SIZE).min(initial=BLOCK_SIZE))  # tokens that fit everywhere
        if room == 0:
            self._grow_batch(updates)
        batch.quiet_steps = max(0, min(left, room) - 1)

    def _grow_batch(self, updates: list[Update]) -> None:
        """Gives the batch the blocks that its next tokens need; who gets none leaves until there is one."""
        rows = self._batch.rows
        growing = rows[self._rows.computed[rows] % BLOCK_SIZE == 0].tolist()
        if len(growing) <= self.residency.pool.num_free:
            for row, block in zip(growing, self.residency.pool.allocate(len(growing)), strict=True):
                table = self._batch[row].table
                updates.append((row, len(table), [block]))
                table.append(block)
            return
        for row in growing:
            sequence = self._batch.get(row)
            if sequence is None:
                continue  # preempted by one before it
            blocks = self._allocate_one(sequence)
            if blocks is not None:
                updates.append((row, len(sequence.table), blocks))
                sequence.table += blocks
            elif self._batch.get(row) is sequence:
                self._batch.leave(row)
                self._ready.append(sequence)

    def _join_batch(self, updates: list[Update], copies: list[Copy]) -> list[Sequence]:
        """Takes those who are ready into the batch, in the order of the queue."""
        joined: list[Sequence] = []
        for sequence in sorted(self._ready):
            if sequence.leaving or sequence.row < 0 or sequence.request.paused:
                continue  # preempted by one before it, or its reader has stalled
            if self._make_writable(sequence, copies):
                self._ready.remove(sequence)
                joined.append(sequence)
        # One who joined may have been preempted by one behind it whose reader is faster.
        joined = [sequence for sequence in joined if sequence.row >= 0 and not sequence.leaving]
        for copy in [copy for copy in copies if copy[0] not in joined]:
            copies.remove(copy)
            self.residency.pool.release([copy[1]])
        for sequence in joined:
            self._batch.join(sequence)
            updates.append((sequence.row, 0, sequence.table))
        return joined

    def _make_writable(self, sequence: Sequence, copies: list[Copy]) -> bool:
        """Sees that the block of the next position is there and belongs to this sequence alone (copy-on-write)."""
        index = int(self._rows.computed[sequence.row]) // BLOCK_SIZE
        pool = self.residency.pool
        if index < len(sequence.table) and pool.refcount(sequence.table[index]) == 1:
            return True
        blocks = self._allocate_one(sequence)
        if blocks is None:
            return False
        if index < len(sequence.table):
            shared = sequence.table[index]
            # The reference to the shared block passes to the step, which reads it, and is dropped when it reports.
            copies.append((sequence, shared, blocks[0]))
            sequence.table[index] = blocks[0]
        else:
            sequence.table += blocks
        return True

    def _allocate_one(self, sequence: Sequence) -> list[int] | None:
        """A block for a running sequence, if need be from one that matters less; None if it must wait or go itself."""
        while self.residency.pool.num_free < 1:
            if self.residency.leaving:
                return None  # blocks are on their way back
            victim = self.residency.holders()[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        return self.residency.pool.allocate(1)

    def _take_credit(self, lane: Lane, step: Step) -> None:
        if not self.num_launched:
            self.stats.last_launch = self._world.now()
        self._next_step[lane] += 1
        self._credits[lane] -= 1
        self._launched[lane].append(step)

    def _apply(self, sampled: TokensSampled) -> None:
        """Takes in what a step brought: tokens, ends, a credit, and blocks that may now be shared."""
        lane = sampled.lane
        if lane is Lane.SWAP:
            self._arrive(failed=sampled.error is not None)
            return
        step = self._launched[lane].popleft()
        self._credits[lane] += 1
        rows = self._rows
        self.residency.pool.release(step.copied)
        seconds = self.stats.observe(lane, sampled.launched_at, sampled.ready_at)
        if sampled.error is not None:
            self._fail(step, sampled.error)
            return

        for seq, error in sampled.failed:
            self._fail(step, error, seq)
        self.residency.confirm(step)
        sampled_rows = step.rows
        if step.ends is not None:
            sampled_rows = step.rows_of(sampled.seqs)
            self._budget.observe(step.num_tokens, seconds)
        drawn = sampled_rows
        if len(sampled.tokens) < len(drawn):
            drawn = drawn[sampled.counts > 0]
        known = rows.known[drawn]
        rows.history[drawn, known] = sampled.tokens
        rows.known[drawn] = known + 1
        if step.ends is not None:
            self._ready += [
                sequence
                for sequence in (rows.owner[row] for row in drawn.tolist())
                if sequence is not None
                and not sequence.leaving
                and rows.computed[sequence.row] < rows.target[sequence.row]
            ]
        for finished in sampled.finished:
            sequence = rows.owner[int(sampled_rows[finished.index])]
            if sequence is not None:
                self._end(sequence)

    def _arrive(self, *, failed: bool) -> None:
        assert self._swaps is not None
        sequence = self.residency.swapped(self._swaps, failed=failed)
        if sequence is not None:
            self._prefilling.append(sequence)

    def _fail(self, step: Step, error: ErrorInfo, seq: SequenceId | None = None) -> None:
        """A failed step ends the requests that were in it, or that of one sequence, and no others."""
        for sequence in step.sequences:
            request = self._requests.get(sequence.request.admitted.rid)
            if request is not None and not sequence.ended and seq in (None, sequence.seq):
                self._close(request.admitted.rid, FinishReason.FAILED, error)
                self._end_request(request)
