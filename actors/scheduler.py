"""The scheduler: owner of request records, rows, the KV block pool and the prefix cache.

There are no phases, only a gap to close: every sequence has a number of positions whose keys and values are computed
(or are being computed by a launched step) and a number that it wants, and a plan closes some of the gap. Prefill and
decode are lanes of execution, each with two credits: at most two of its steps are launched and not yet reported.

What is counted per row lives in columns (`Rows`), so that the cost of a steady step hardly depends on the batch.
A row and its blocks are given back when its sequence has ended *and* every launched step that names the row has
reported (`inflight`), because a step in flight still writes there.
"""

import heapq
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from millrace.runtime.channel import Receiver, Sender
from millrace.runtime.config import SchedulerConfig
from millrace.runtime.errors import DeadlineExceededError, ErrorInfo, QueueFullError, RequestCancelledError
from millrace.runtime.kv.pool import BlockPool
from millrace.runtime.kv.prefix import PrefixHasher
from millrace.runtime.messages import (
    Admitted,
    BlockCopies,
    Cancel,
    Closed,
    DecodePlan,
    Flow,
    PrefillPlan,
    SampleJoin,
    SchedulerInbox,
    Started,
    StreamerInbox,
    TokensSampled,
)
from millrace.runtime.scheduling import (
    PrefillBudget,
    Request,
    Rows,
    SchedulerStats,
    Sequence,
    Step,
    block_updates,
    num_blocks,
)
from millrace.runtime.types import BLOCK_SIZE, FinishReason, Lane, RequestId, SequenceId
from millrace.runtime.world import World

PROMPT_LOGPROB_CHUNK = 64  # tokens; logits of a whole chunk are held at once, [chunk, vocab_size] float32
_EMPTY = np.empty(0, dtype=np.int32)


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
        prefill: Sender[PrefillPlan],
        decode: Sender[DecodePlan],
        streamer: Sender[StreamerInbox],
    ) -> None:
        self.pool = pool
        self.stats = SchedulerStats()
        self._config = config
        self._hasher = hasher  # None: no prefix cache
        self._world = world
        self._inbox = inbox
        self._prefill = prefill
        self._decode = decode
        self._streamer = streamer

        self._rows = Rows(config.max_num_seqs, max_model_len)
        self._requests: dict[RequestId, Request] = {}
        self._waiting: list[Sequence] = []  # heap
        self._parked: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._ready: list[Sequence] = []
        self._batch: dict[int, Sequence] = {}  # row -> sequence
        self._batch_rows: NDArray[np.int32] = _EMPTY  # columns of the batch, replaced (never changed) when it changes
        self._batch_seqs: list[SequenceId] = []
        self._batch_changed = False
        self._retiring: list[Sequence] = []  # ended or preempted
        self._num_paused = 0  # requests
        # Head of the queue, free rows and free blocks when it last found no room: nothing new, no new attempt.
        self._stuck: tuple[Sequence, int, int] | None = None
        self._deadlines: list[tuple[float, RequestId]] = []  # heap

        depth = 2 if config.overlap else 1
        self._credits = {Lane.PREFILL: depth, Lane.DECODE: depth}
        self._next_step = {Lane.PREFILL: 0, Lane.DECODE: 0}
        self._launched: dict[Lane, deque[Step]] = {Lane.PREFILL: deque(), Lane.DECODE: deque()}
        self._budget = PrefillBudget(config.max_prefill_tokens, config.inter_token_target_ms / 1000)
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

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._rows.owner) - len(self._rows.free)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, and paused ones that have given up their row."""
        return len(self._waiting) + len(self._parked)

    @property
    def num_launched(self) -> int:
        """Steps that have not reported."""
        return sum(len(steps) for steps in self._launched.values())

    def check(self) -> None:
        """Raises AssertionError unless blocks, rows and places are accounted for. For tests, and when idle."""
        self.pool.check(sequence.table for sequence in self._rows.owner if sequence is not None)
        held = [sequence for sequence in self._rows.owner if sequence is not None]
        assert len(held) + len(self._rows.free) == len(self._rows.owner)
        for row, sequence in enumerate(self._rows.owner):
            assert sequence is None or sequence.row == row
        assert self._retiring == [sequence for sequence in self._retiring if sequence.retiring and sequence.row >= 0]
        if not self.num_launched:
            assert not self._rows.inflight.any()
        if not self._requests:
            assert len(held) == len(self._retiring), "a row outlives its request"
            assert not self._waiting
            assert not self._parked
        if not held:
            assert self.pool.num_free == self.pool.num_usable

    # -- requests -----------------------------------------------------------------------------------------------------

    def _admit(self, admitted: Admitted) -> None:
        if self.num_waiting >= self._config.max_queue:
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
        heapq.heappush(self._waiting, first)
        if admitted.deadline is not None:
            heapq.heappush(self._deadlines, (admitted.deadline, admitted.rid))

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
        if not flow.paused:
            for sequence in [s for s in self._parked if s.request is request]:
                self._parked.remove(sequence)
                heapq.heappush(self._waiting, sequence)

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
        self._retire_later(sequence)
        request = sequence.request
        request.live -= 1
        if request.live == 0:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.admitted.rid]
        self._num_paused -= request.paused

    def _displace(self, sequence: Sequence) -> None:
        if sequence.row < 0:
            if sequence in self._parked:
                self._parked.remove(sequence)
            elif sequence in self._waiting:
                self._waiting.remove(sequence)
                heapq.heapify(self._waiting)
        elif self._batch.get(sequence.row) is sequence:
            self._leave_batch(sequence.row)
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)
        elif sequence in self._ready:
            self._ready.remove(sequence)

    # -- rows and blocks ----------------------------------------------------------------------------------------------

    def _retire_later(self, sequence: Sequence) -> None:
        if sequence.row >= 0 and not sequence.retiring:
            sequence.retiring = True
            self._retiring.append(sequence)

    def _retire(self) -> None:
        """Gives back rows and blocks of sequences that have ended or are preempted, once no step names them."""
        if not self._retiring:
            return
        waits = []
        for sequence in self._retiring:
            row = sequence.row
            if self._rows.inflight[row]:
                waits.append(sequence)
                continue
            if not sequence.ended:
                sequence.history = self._rows.history[row, : self._rows.known[row]].copy()
                if sequence.request.paused:
                    self._parked.append(sequence)
                else:
                    heapq.heappush(self._waiting, sequence)
            self.pool.release(sequence.table)
            sequence.table = []
            sequence.row = -1
            sequence.retiring = False
            self._rows.owner[row] = None
            self._rows.free.append(row)
        self._retiring = waits

    def _preempt(self, sequence: Sequence) -> None:
        """Takes row and blocks away; what was computed is computed again later, or found in the prefix cache."""
        self.stats.preemptions += 1
        self._displace(sequence)
        self._retire_later(sequence)
        self._retire()

    def _preemptible(self) -> list[Sequence]:
        """Who holds a row, those first in line for preemption last: paused readers, then by the order of the queue."""
        holders = [s for s in self._rows.owner if s is not None and not s.retiring]
        return sorted(holders, key=lambda s: (s.request.paused, s.request.key, s.seq))

    def _take_row(self, sequence: Sequence, tokens: NDArray[np.int32], confirmed: int) -> None:
        rows = self._rows
        row = rows.free.pop()
        sequence.row = row
        rows.owner[row] = sequence
        rows.history[row, : len(tokens)] = tokens
        rows.known[row] = len(tokens)
        rows.computed[row] = rows.confirmed[row] = confirmed
        admitted = sequence.request.admitted
        rows.target[row] = len(admitted.prompt) + max(admitted.max_new_tokens, 1) - 1

    def _start(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence its row and the blocks of all tokens that it has; False if there is no room."""
        request = sequence.request
        fresh = not request.started
        rows_wanted = request.admitted.sampling.n if fresh else 1
        tokens = sequence.history
        # The last token is always computed anew: its logits are wanted.
        if len(self._rows.free) < rows_wanted:
            return False
        matchable: list[bytes] = []
        if self._hasher is not None and request.admitted.sampling.prompt_logprobs is None:
            self._hasher.extend(sequence.hashes, tokens, request.admitted.cache_salt)
            matchable = sequence.hashes[: (len(tokens) - 1) // BLOCK_SIZE]
        hits = self.pool.match(matchable, tokens, BLOCK_SIZE)
        wanted = num_blocks(len(tokens)) - len(hits)
        # Room for everybody who runs to grow by a block: starting one more must not preempt at once.
        reserve = self.num_running
        if self.pool.num_free < wanted + reserve:
            self.pool.release(hits)
            return False
        sequence.table = hits + self.pool.allocate(wanted)
        sequence.published = len(hits)
        sequence.announced = False
        self._take_row(sequence, tokens, len(hits) * BLOCK_SIZE)
        self.stats.prefix_queries += len(tokens)
        self.stats.prefix_hits += len(hits) * BLOCK_SIZE
        if fresh:
            request.started = True
            self._streamer.send_nowait(Started(request.admitted.rid, len(hits) * BLOCK_SIZE, self._world.now()))
            # Rows of the other choices are taken now, so that they need not wait once the prompt is computed.
            for choice in range(1, rows_wanted):
                other = Sequence(request, choice, tokens)
                request.sequences.append(other)
                self._take_row(other, tokens, 0)
        self._prefilling.append(sequence)
        return True

    def _start_waiting(self) -> bool:
        """Starts the head of the queue; those behind it never overtake it for being smaller."""
        head = self._waiting[0]
        if self._stuck == (head, len(self._rows.free), self.pool.num_free):
            return False
        while not self._start(head):
            # Those whose readers have stalled give way to those who can run.
            holders = self._preemptible()
            if not holders or not holders[-1].request.paused:
                self._stuck = (head, len(self._rows.free), self.pool.num_free)
                return False
            self._preempt(holders[-1])
        heapq.heappop(self._waiting)
        return True

    # -- prefill ------------------------------------------------------------------------------------------------------

    def _plan_prefill(self) -> bool:
        budget = self._budget.tokens(decoding=bool(self._batch))
        self.stats.prefill_budget = budget
        rows = self._rows
        chunks: list[tuple[Sequence, int, int]] = []
        started = iter(self._prefilling[:])
        while budget > 0:
            sequence = next(started, None)
            if sequence is None:
                if not (self._waiting and self._start_waiting()):
                    break
                sequence = self._prefilling[-1]
            if sequence.request.paused:
                continue
            row = sequence.row
            start, end = int(rows.computed[row]), int(rows.known[row])
            if sequence.request.admitted.sampling.prompt_logprobs is not None:
                end = min(end, start + PROMPT_LOGPROB_CHUNK)
            end = min(end, start + budget)
            chunks.append((sequence, start, end))
            budget -= end - start
        if not chunks:
            return False
        self._launch_prefill(chunks)
        return True

    def _launch_prefill(self, chunks: list[tuple[Sequence, int, int]]) -> None:
        rows = self._rows
        joins: list[SampleJoin] = []
        join_of: list[int] = []
        named = [sequence for sequence, _, _ in chunks]
        ends = [end for _, _, end in chunks]
        tables: list[Sequence] = []
        next_tokens = []
        for index, (sequence, start, end) in enumerate(chunks):
            row = sequence.row
            if not sequence.announced:
                sequence.announced = True
                tables.append(sequence)
            rows.computed[row] = end
            last = end == rows.known[row]
            next_tokens.append(-1 if last else int(rows.history[row, end]))
            if last:
                self._prefilling.remove(sequence)
                for joining in self._join_sampler(sequence):
                    joins.append(self._sample_join(joining))
                    join_of.append(index)
                    if joining is not sequence:
                        named.append(joining)
                        ends.append(end)
        named_rows = np.array([s.row for s in named], dtype=np.int32)
        rows.inflight[named_rows] += 1
        num_tokens = sum(end - start for _, start, end in chunks)
        step = Step(named_rows, named, num_tokens, np.array(ends, dtype=np.int64))
        plan = PrefillPlan(
            step=self._take_credit(Lane.PREFILL, step),
            seqs=[s.seq for s, _, _ in chunks],
            rows=np.array([s.row for s, _, _ in chunks], dtype=np.int32),
            starts=np.array([start for _, start, _ in chunks], dtype=np.int32),
            lengths=np.array([end - start for _, start, end in chunks], dtype=np.int32),
            tokens=np.concatenate([rows.history[s.row, start:end] for s, start, end in chunks]),
            prompt_logprobs=np.array([self._wanted_logprobs(s) for s, _, _ in chunks], dtype=np.int32),
            next_tokens=np.array(next_tokens, dtype=np.int32),
            blocks=block_updates([(s.row, 0, s.table) for s in tables]),
            joins=tuple(joins),
            join_of=np.array(join_of, dtype=np.int32),
        )
        self._prefill.send_nowait(plan)

    def _join_sampler(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that draw from the last logits of a prompt: the other choices fork here."""
        request = sequence.request
        siblings = [s for s in request.sequences if s.choice > 0 and s.row >= 0 and not s.table and not s.retiring]
        if sequence.choice > 0 or not siblings:
            return [sequence]
        position = self._rows.computed[sequence.row]
        for sibling in siblings:
            self.pool.share(sequence.table)
            sibling.table = list(sequence.table)
            sibling.hashes = list(sequence.hashes)
            sibling.published = len(sequence.table)  # the first choice publishes what they share
            self._rows.computed[sibling.row] = position
        return [sequence, *siblings]

    def _sample_join(self, sequence: Sequence) -> SampleJoin:
        admitted = sequence.request.admitted
        row = sequence.row
        return SampleJoin(
            seq=sequence.seq,
            row=row,
            sampling=admitted.sampling,
            seed=admitted.seed,
            max_new_tokens=admitted.max_new_tokens,
            prompt=admitted.prompt,
            output=self._rows.history[row, len(admitted.prompt) : self._rows.known[row]].copy(),
        )

    def _wanted_logprobs(self, sequence: Sequence) -> int:
        """Prompt log probabilities are reported once, not again when a preempted sequence is computed anew."""
        wanted = sequence.request.admitted.sampling.prompt_logprobs
        first_time = self._rows.known[sequence.row] == len(sequence.request.admitted.prompt)
        return wanted if wanted is not None and first_time and sequence.choice == 0 else -1

    # -- decode -------------------------------------------------------------------------------------------------------

    def _plan_decode(self) -> bool:
        rows = self._rows
        self._refresh_batch()
        for row in self._batch_rows[rows.computed[self._batch_rows] >= rows.target[self._batch_rows]].tolist():
            self._leave_batch(row)  # its last tokens are on their way
        if self._num_paused:
            for row, sequence in list(self._batch.items()):
                if sequence.request.paused:
                    self._leave_batch(row)
                    self._ready.append(sequence)
        self._refresh_batch()

        updates: list[tuple[int, int, list[int]]] = []  # (row, first index, blocks)
        copies: list[tuple[Sequence, int, int]] = []  # (for whom, source, target)
        self._grow_batch(updates)
        joined = self._join_batch(updates, copies)
        self._refresh_batch()
        if not self._batch:
            return False
        updates = [update for update in updates if update[0] in self._batch]
        batch = self._batch_rows
        joined_rows = np.array([s.row for s in joined], dtype=np.int32)
        plan = DecodePlan(
            step=self._take_credit(Lane.DECODE, Step(batch, list(self._batch.values()), len(batch), None)),
            seqs=self._batch_seqs,
            rows=batch,
            joined_rows=joined_rows,
            joined_positions=rows.computed[joined_rows].astype(np.int32),
            blocks=block_updates(updates),
            copies=BlockCopies(
                np.array([source for _, source, _ in copies], dtype=np.int64),
                np.array([target for _, _, target in copies], dtype=np.int64),
            )
            if copies
            else None,
        )
        rows.computed[batch] += 1
        rows.inflight[batch] += 1
        self._decode.send_nowait(plan)
        return True

    def _grow_batch(self, updates: list[tuple[int, int, list[int]]]) -> None:
        """Gives the batch the blocks that its next tokens need; who gets none leaves until there is one."""
        rows = self._batch_rows
        for row in rows[self._rows.computed[rows] % BLOCK_SIZE == 0].tolist():
            sequence = self._batch.get(row)
            if sequence is None:
                continue  # preempted by one before it
            blocks = self._allocate_one(sequence)
            if blocks is not None:
                updates.append((row, len(sequence.table), blocks))
                sequence.table += blocks
            elif row in self._batch:
                self._leave_batch(row)
                self._ready.append(sequence)

    def _join_batch(
        self, updates: list[tuple[int, int, list[int]]], copies: list[tuple[Sequence, int, int]]
    ) -> list[Sequence]:
        """Takes those who are ready into the batch, in the order of the queue."""
        joined: list[Sequence] = []
        for sequence in sorted(self._ready):
            if sequence.retiring or sequence.row < 0 or sequence.request.paused:
                continue  # preempted by one before it, or its reader has stalled
            if self._make_writable(sequence, copies):
                self._ready.remove(sequence)
                joined.append(sequence)
        # One who joined may have been preempted by one behind it whose reader is faster.
        joined = [sequence for sequence in joined if sequence.row >= 0 and not sequence.retiring]
        copies[:] = [copy for copy in copies if copy[0] in joined]
        for sequence in joined:
            self._batch[sequence.row] = sequence
            self._batch_changed = True
            updates.append((sequence.row, 0, sequence.table))
        return joined

    def _make_writable(self, sequence: Sequence, copies: list[tuple[Sequence, int, int]]) -> bool:
        """Sees that the block of the next position is there and belongs to this sequence alone (copy-on-write)."""
        index = int(self._rows.computed[sequence.row]) // BLOCK_SIZE
        if index < len(sequence.table) and self.pool.refcount(sequence.table[index]) == 1:
            return True
        blocks = self._allocate_one(sequence)
        if blocks is None:
            return False
        if index < len(sequence.table):
            shared = sequence.table[index]
            copies.append((sequence, shared, blocks[0]))
            sequence.table[index] = blocks[0]
            self.pool.release([shared])
        else:
            sequence.table += blocks
        return True

    def _allocate_one(self, sequence: Sequence) -> list[int] | None:
        """A block for a running sequence, if need be from one that matters less; None if it must wait or go itself."""
        while self.pool.num_free < 1:
            if self._retiring:
                return None  # blocks are on their way back
            victim = self._preemptible()[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        return self.pool.allocate(1)

    def _leave_batch(self, row: int) -> None:
        del self._batch[row]
        self._batch_changed = True

    def _refresh_batch(self) -> None:
        """Makes the columns of the batch anew. Launched plans hold the old ones, which is why they are replaced."""
        if self._batch_changed:
            self._batch_changed = False
            self._batch_rows = np.fromiter(self._batch, dtype=np.int32, count=len(self._batch))
            self._batch_seqs = [sequence.seq for sequence in self._batch.values()]

    # -- steps --------------------------------------------------------------------------------------------------------

    def _take_credit(self, lane: Lane, step: Step) -> int:
        if not self.num_launched:
            self.stats.last_launch = self._world.now()
        number = self._next_step[lane]
        self._next_step[lane] = number + 1
        self._credits[lane] -= 1
        self._launched[lane].append(step)
        return number

    def _apply(self, sampled: TokensSampled) -> None:
        """Takes in what a step brought: tokens, ends, a credit, and blocks that may now be shared."""
        lane = sampled.lane
        step = self._launched[lane].popleft()
        self._credits[lane] += 1
        rows = self._rows
        rows.inflight[step.rows] -= 1
        self.stats.steps[lane] += 1
        # Steps of both lanes may share one processor: a step begins when it was launched and the one before had ended.
        seconds = sampled.ready_at - max(sampled.launched_at, self.stats.last_progress)
        self.stats.last_progress = sampled.ready_at
        self.stats.longest_step = max(self.stats.longest_step, seconds)
        if sampled.error is not None:
            self._fail(step, sampled.error)
            return

        if step.ends is None:
            before = rows.confirmed[step.rows]
            after = before + 1
            sampled_rows = step.rows
        else:
            before = rows.confirmed[step.rows]
            after = step.ends
            sampled_rows = self._rows_of(sampled.seqs, step)
            self._budget.observe(step.num_tokens, seconds)
        rows.confirmed[step.rows] = after
        if self._hasher is not None:
            for index in np.flatnonzero(before // BLOCK_SIZE != after // BLOCK_SIZE).tolist():
                self._publish(step.sequences[index], int(after[index]))

        drawn = sampled_rows[sampled.counts > 0]
        rows.history[drawn, rows.known[drawn]] = sampled.tokens
        rows.known[drawn] += 1
        if step.ends is not None:
            self._ready += [
                sequence
                for sequence in (rows.owner[row] for row in drawn.tolist())
                if sequence is not None
                and not sequence.retiring
                and rows.computed[sequence.row] < rows.target[sequence.row]
            ]
        for finished in sampled.finished:
            sequence = rows.owner[int(sampled_rows[finished.index])]
            if sequence is not None:
                self._end(sequence)

    def _rows_of(self, seqs: list[SequenceId], step: Step) -> NDArray[np.int32]:
        rows = {sequence.seq: row for sequence, row in zip(step.sequences, step.rows.tolist(), strict=True)}
        return np.array([rows[seq] for seq in seqs], dtype=np.int32)

    def _publish(self, sequence: Sequence, confirmed: int) -> None:
        """Makes the full blocks among the confirmed positions findable."""
        assert self._hasher is not None
        if sequence.retiring:
            return
        tokens = self._rows.history[sequence.row]
        full = confirmed // BLOCK_SIZE
        self._hasher.extend(sequence.hashes, tokens[: full * BLOCK_SIZE], sequence.request.admitted.cache_salt)
        for index in range(sequence.published, full):
            own = tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
            self.pool.publish(sequence.table[index], sequence.hashes[index], own)
        sequence.published = max(sequence.published, full)

    def _fail(self, step: Step, error: ErrorInfo) -> None:
        """A failed step ends the requests that were in it, and no others."""
        for sequence in step.sequences:
            request = self._requests.get(sequence.request.admitted.rid)
            if request is not None and not sequence.ended:
                self._close(request.admitted.rid, FinishReason.FAILED, error)
                self._end_request(request)
