"""The streamer: turns token ids into text and puts it into the mailboxes of those who wait for it.

It is the author of stop strings (docs/architecture.md, "One terminal event").
"""

import asyncio
import math
from collections import Counter
from collections.abc import Iterable
from itertools import compress

from millrace.runtime.channel import Receiver, Sender
from millrace.runtime.errors import MillraceError, RequestFailedError
from millrace.runtime.mailbox import Mailbox
from millrace.runtime.messages import (
    Cancel,
    Closed,
    Column,
    Finished,
    Flow,
    LogprobColumns,
    Opened,
    PromptLogprobs,
    SchedulerInbox,
    Started,
    StreamerInbox,
    TokensSampled,
)
from millrace.runtime.metrics import Metrics
from millrace.runtime.text.detokenizer import Detokenizer
from millrace.runtime.text.stops import StopMatcher
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.types import (
    FinishReason,
    RequestId,
    SamplingParams,
    SequenceId,
    TokenLogprob,
    TopLogprob,
    request_of,
    sequence_id,
)
from millrace.runtime.world import World

PROMPT_TAIL = 8  # prompt tokens that a detokeniser sees, for decoders that treat the beginning of a text specially
TURN_TOKENS = 512  # tokens handled before the loop gets its turn: below a millisecond


class _Choice:
    """The text side of one choice."""

    __slots__ = ("detokenizer", "index", "last_at", "mailbox", "num_tokens", "stops", "stream")

    def __init__(self, index: int, opened: Opened, stream: "_Stream", tokenizer: Tokenizer) -> None:
        sampling = opened.sampling
        self.index = index
        self.stream = stream
        self.mailbox = stream.mailbox
        self.num_tokens = 0  # tokens delivered: the only position that is accepted next
        self.last_at = 0.0  # when the last one was delivered
        tail = opened.prompt[-PROMPT_TAIL:].tolist()
        self.detokenizer = Detokenizer(tokenizer, tail, sampling.skip_special_tokens)
        self.stops = StopMatcher(sampling.stop, sampling.include_stop) if sampling.stop else None


class _Stream:
    """One open request."""

    __slots__ = ("arrived", "choices", "mailbox", "sampling")

    def __init__(self, opened: Opened) -> None:
        self.mailbox: Mailbox = opened.mailbox
        self.sampling: SamplingParams = opened.sampling
        self.choices = opened.sampling.n  # still open
        self.arrived = opened.arrived


class Streamer:
    def __init__(
        self,
        *,
        world: World,
        tokenizer: Tokenizer,
        metrics: Metrics,
        inbox: Receiver[StreamerInbox],
        scheduler: Sender[SchedulerInbox],
    ) -> None:
        self._world = world
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._inbox = inbox
        self._scheduler = scheduler
        self._streams: dict[RequestId, _Stream] = {}
        self._choices: dict[SequenceId, _Choice] = {}

    async def run(self) -> None:
        while True:
            handled = 0
            for message in await self._inbox.recv_batch():
                self.handle(message)
                if isinstance(message, TokensSampled):
                    handled += len(message.seqs)
                    if handled >= TURN_TOKENS:
                        handled = 0
                        await asyncio.sleep(0)

    def handle(self, message: StreamerInbox) -> None:
        if isinstance(message, TokensSampled):
            self._deliver(message)
        elif isinstance(message, Opened):
            self._open(message)
        elif isinstance(message, Started):
            stream = self._streams.get(message.rid)
            if stream is not None:
                stream.mailbox.cached_tokens = message.cached_tokens
                self._metrics.queue_time.observe(message.at - stream.arrived)
        else:
            self._close(message)

    def _open(self, opened: Opened) -> None:
        rid = opened.rid
        opened.mailbox.prompt_token_ids = tuple(opened.prompt.tolist())
        opened.mailbox.set_flow = lambda paused: self._scheduler.send_nowait(Flow(rid, paused))
        stream = _Stream(opened)
        choices = [_Choice(index, opened, stream, self._tokenizer) for index in range(opened.sampling.n)]
        self._streams[rid] = stream
        for choice in choices:
            self._choices[sequence_id(rid, choice.index)] = choice

    def _close(self, closed: Closed) -> None:
        stream = self._streams.get(closed.rid)
        if stream is not None:
            self._fail(closed.rid, stream, closed.reason, closed.error.exception())

    def _deliver(self, sampled: TokensSampled) -> None:
        """One step: every token to its choice, then the ends, then one word to every reader."""
        for scores in sampled.prompt_logprobs:
            self._score_prompt(scores)
        touched: dict[Mailbox, None] = {}
        if len(sampled.tokens):
            self._push_tokens(sampled, touched)
        for end in sampled.finished:
            self._end(sampled.seqs[end.index], end, touched)
        for mailbox in touched:
            mailbox.notify()

    def _push_tokens(self, sampled: TokensSampled, touched: dict[Mailbox, None]) -> None:
        logprobs = {} if sampled.logprobs is None else self._logprobs(sampled.logprobs, sampled)
        stop_ids = {end.index for end in sampled.finished if end.stop_id is not None}
        now = self._world.now()
        since: list[float] = []  # when the token before was delivered: to nearly all of them in the same step
        tokens = sampled.tokens.tolist()
        columns: list[Iterable[int]] = [range(len(sampled.seqs)), sampled.seqs, sampled.positions.tolist()]
        if len(tokens) < len(sampled.seqs):
            drawn = sampled.counts.tolist()
            columns = [compress(column, drawn) for column in columns]
        choices = self._choices
        for place, seq, position, token in zip(*columns, tokens, strict=True):
            choice = choices.get(seq)
            if choice is None:
                continue  # closed here already: a stop string, a cancel, or an error
            if position != choice.num_tokens:
                raise AssertionError(f"token {position} came after {choice.num_tokens} tokens")
            if position:
                since.append(choice.last_at)
            else:
                self._metrics.time_to_first_token.observe(now - choice.stream.arrived)
            choice.num_tokens = position + 1
            choice.last_at = now
            # The id that ends a text is no part of it, unless its owner asked to see where it stopped.
            hidden = stop_ids and place in stop_ids and not choice.stream.sampling.include_stop
            text = "" if hidden else choice.detokenizer.push_one(token)
            mailbox = choice.mailbox
            touched[mailbox] = None
            if choice.stops is None:
                mailbox.push(choice.index, text, token, logprobs.get(place) if logprobs else None)
            else:
                self._push_with_stops(seq, choice, text, token, logprobs.get(place))
        self._metrics.tokens_generated.inc(len(tokens))
        if since and since.count(since[0]) == len(since):
            self._metrics.inter_token.observe(now - since[0], len(since))
        else:
            for last_at, count in Counter(since).items():
                self._metrics.inter_token.observe(now - last_at, count)

    def _push_with_stops(
        self, seq: SequenceId, choice: _Choice, text: str, token: int, logprob: TokenLogprob | None
    ) -> None:
        assert choice.stops is not None
        if choice.num_tokens <= choice.stream.sampling.min_tokens:
            choice.mailbox.push(choice.index, text, token, logprob)
            return
        shown, matched = choice.stops.push(text)
        choice.mailbox.push(choice.index, shown, token, logprob)
        if matched is not None:
            self._scheduler.send_nowait(Cancel(request_of(seq), reason=None, choice=choice.index))
            self._finish(seq, choice, "", FinishReason.STOP, matched)

    def _end(self, seq: SequenceId, end: Finished, touched: dict[Mailbox, None]) -> None:
        choice = self._choices.get(seq)
        if choice is None:
            return
        if end.reason is FinishReason.FAILED:
            # The other choices of the request are of no use to anybody now.
            error = end.error.exception() if end.error is not None else RequestFailedError("the request failed")
            self._scheduler.send_nowait(Cancel(request_of(seq), reason=None))
            self._fail(request_of(seq), self._streams[request_of(seq)], end.reason, error)
            return
        text = choice.detokenizer.finish()
        matched: str | None = None
        if choice.stops is not None:
            shown, matched = choice.stops.push(text)
            text = shown if matched is not None else shown + choice.stops.finish()
        touched[choice.mailbox] = None
        if matched is not None:
            self._finish(seq, choice, text, FinishReason.STOP, matched)
        else:
            self._finish(seq, choice, text, end.reason, end.stop_id)

    def _finish(
        self, seq: SequenceId, choice: _Choice, text: str, reason: FinishReason, stop: str | int | None
    ) -> None:
        """Ends a choice, and the request with its last one."""
        del self._choices[seq]
        rid = request_of(seq)
        stream = self._streams[rid]
        stream.choices -= 1
        if stream.choices == 0:
            self._forget(rid, stream, reason)
        choice.mailbox.finish(choice.index, text, reason, stop)

    def _fail(self, rid: RequestId, stream: _Stream, reason: FinishReason, error: MillraceError) -> None:
        for index in range(stream.sampling.n):
            self._choices.pop(sequence_id(rid, index), None)
        self._forget(rid, stream, reason)
        stream.mailbox.fail(error)

    def _forget(self, rid: RequestId, stream: _Stream, reason: FinishReason) -> None:
        del self._streams[rid]
        self._metrics.finished(reason, self._world.now() - stream.arrived, len(stream.mailbox.prompt_token_ids))

    # -- log probabilities --------------------------------------------------------------------------------------------

    def _logprobs(self, columns: LogprobColumns, sampled: TokensSampled) -> dict[int, TokenLogprob]:
        """By place in the step."""
        flat = {place: index for index, place in enumerate(sampled.counts.nonzero()[0].tolist())}
        return {
            place: self._token_logprob(columns, entry, int(sampled.tokens[flat[place]]))
            for entry, place in enumerate(columns.index.tolist())
            if place in flat
        }

    def _score_prompt(self, scores: PromptLogprobs) -> None:
        stream = self._streams.get(request_of(scores.seq))
        if stream is None:
            return
        mailbox = stream.mailbox
        if mailbox.prompt_logprobs is None:
            mailbox.prompt_logprobs = [self._plain(mailbox.prompt_token_ids[0])]
        # A prompt that was preempted is computed again, and scored again: its beginning is here already.
        known = len(mailbox.prompt_logprobs) - 1 - scores.start
        mailbox.prompt_logprobs += [
            self._token_logprob(scores.columns, entry, token)
            for entry, token in enumerate(scores.tokens.tolist())
            if entry >= known
        ]

    def _plain(self, token: int) -> TokenLogprob:
        return TokenLogprob(token, self._tokenizer.token_text(token), self._tokenizer.token_bytes(token), None)

    def _token_logprob(self, columns: LogprobColumns, entry: int, token: int) -> TokenLogprob:
        count = int(columns.num_top[entry])
        ids: Column = columns.top_ids[entry, :count]
        top = zip(ids.tolist(), columns.top_logprobs[entry, :count].tolist(), strict=True)
        tokenizer = self._tokenizer
        value = float(columns.logprobs[entry])
        return TokenLogprob(
            token_id=token,
            token=tokenizer.token_text(token),
            bytes=tokenizer.token_bytes(token),
            logprob=None if math.isnan(value) else value,  # broken logits at a prompt position
            top=tuple(
                TopLogprob(other, tokenizer.token_text(other), tokenizer.token_bytes(other), value)
                for other, value in top
            ),
        )
