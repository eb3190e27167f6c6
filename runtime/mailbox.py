"""Where a request's deltas wait for their reader: one merging slot per choice, so that delivery never blocks.

The streamer writes, the request's owner reads; both run on the same loop. If the reader is slower than the engine,
deltas merge, and beyond `max_unread` tokens the request itself pauses until the reader has caught up.
"""

import asyncio
from collections.abc import Callable

from millrace.runtime.errors import MillraceError
from millrace.runtime.types import Delta, FinishReason, TokenLogprob


class _Slot:
    """Unread output of one choice."""

    __slots__ = ("finish", "logprobs", "stop_reason", "text", "tokens")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None
        self.finish: FinishReason | None = None
        self.stop_reason: str | int | None = None


class Mailbox:
    """One request's output.

    Attributes:
        prompt_tokens, cached_tokens: known once the request is open, and once its first token has come.
        error: why the request ended, when it did not end by its own tokens.
        closed: the terminal event has been written; it may still wait to be read.
        collecting: the owner wants everything at the end, so there is no reader to fall behind.
    """

    def __init__(self, choices: int, max_unread: int) -> None:
        self.prompt_token_ids: tuple[int, ...] = ()
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.cached_tokens = 0
        self.error: MillraceError | None = None
        self.closed = False
        self.collecting = False
        self.max_unread = max_unread
        self.set_flow: Callable[[bool], None] | None = None  # the streamer's: pauses or resumes the request
        self.on_ready: Callable[[], None] | None = None  # a reader that wants a call instead of a task to wake
        self.on_closed: Callable[[], None] | None = None
        self._slots: list[_Slot | None] = [None] * choices
        self._open = choices
        self._unread = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None

    # -- the streamer's side ------------------------------------------------------------------------------------------

    def push(self, index: int, text: str, token: int, logprob: TokenLogprob | None = None) -> None:
        """Adds one token; the reader hears of it at the next `notify`."""
        slot = self._slots[index]
        if slot is None:
            slot = self._slots[index] = _Slot()
        slot.text.append(text)
        slot.tokens.append(token)
        if logprob is not None:
            if slot.logprobs is None:
                slot.logprobs = []
            slot.logprobs.append(logprob)
        self._unread += 1

    def finish(self, index: int, text: str, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """Ends one choice, with the text that was held back; the last choice ends the request."""
        slot = self._slots[index]
        if slot is None:
            slot = self._slots[index] = _Slot()
        slot.text.append(text)
        slot.finish = reason
        slot.stop_reason = stop_reason
        self._open -= 1
        if self._open == 0:
            self._close()

    def fail(self, error: MillraceError) -> None:
        """Ends the whole request with an error, once; later calls change nothing."""
        if not self.closed:
            self.error = error
            self._close()
            self.notify()

    def notify(self) -> None:
        """Wakes the reader, once per step however many tokens came."""
        if self.on_ready is not None:
            self.on_ready()
        else:
            waiter = self._waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        if self._unread > self.max_unread and not (self._paused or self.collecting or self.closed) and self.set_flow:
            self._paused = True
            self.set_flow(True)

    def _close(self) -> None:
        self.closed = True
        if self.on_closed is not None:
            self.on_closed()

    # -- the reader's side --------------------------------------------------------------------------------------------

    @property
    def unread(self) -> int:
        """Tokens that wait to be read."""
        return self._unread

    def collect(self) -> None:
        """From now on the whole output is wanted at the end: a long wait between reads is no reason to pause."""
        self.collecting = True
        self._resume()

    def take(self) -> list[Delta]:
        """What has come since the last call, one delta per choice at most."""
        deltas = []
        for index, slot in enumerate(self._slots):
            if slot is None:
                continue
            self._slots[index] = None
            deltas.append(
                Delta(
                    index=index,
                    text="".join(slot.text),
                    token_ids=tuple(slot.tokens),
                    logprobs=None if slot.logprobs is None else tuple(slot.logprobs),
                    finish_reason=slot.finish,
                    stop_reason=slot.stop_reason,
                )
            )
        self._unread = 0
        self._resume()
        return deltas

    async def wait(self) -> None:
        """Returns when there is something to take or the request has ended. One waiter at a time."""
        while not self.closed and not any(slot is not None for slot in self._slots):
            if self._waiter is not None:
                raise RuntimeError("two tasks read one request; read it once, and share what comes")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            if self.set_flow is not None and not self.closed:
                self.set_flow(False)
