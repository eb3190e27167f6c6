"""What `submit()` returns: await it for the whole answer, iterate it for deltas, or cancel it."""

from collections.abc import AsyncIterator, Callable, Generator

from millrace.runtime.errors import MillraceError
from millrace.runtime.mailbox import Mailbox
from millrace.runtime.types import Choice, Completion, Delta, FinishReason, RequestId, TokenLogprob, Usage


class _Collected:
    """Everything that has been read of one choice."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *delta.logprobs]
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


class RequestHandle:
    """One request in flight.

    `await handle` returns a `Completion`; `async for delta in handle` yields `Delta`s as they come. Both raise the
    request's error (`MillraceError`) if it was refused, cancelled, timed out or failed. Cancelling the task that
    awaits, leaving the iteration, and dropping the last reference all cancel the request. One reader at a time.

    Attributes:
        id: the request's name in logs and on the wire.
        mailbox: for readers that want a call per step instead of a task to wake (`mailbox.on_ready`, `take`).
    """

    def __init__(
        self, rid: RequestId, name: str, model: str, choices: int, mailbox: Mailbox, cancel: Callable[[], None]
    ) -> None:
        self.rid = rid
        self.id = name
        self.model = model
        self.mailbox = mailbox
        self._cancel = cancel  # safe from any thread, and after the runtime is closed
        self._collected = [_Collected() for _ in range(choices)]

    def cancel(self) -> None:
        """Ends the request at the next step; idempotent, and nothing after the request's end."""
        if not self.mailbox.closed:
            self._cancel()

    @property
    def done(self) -> bool:
        """The request has ended; its last deltas may still wait to be read."""
        return self.mailbox.closed

    @property
    def error(self) -> MillraceError | None:
        return self.mailbox.error

    @property
    def usage(self) -> Usage:
        """Tokens so far: of the prompt, and of those deltas that have been taken."""
        return Usage(
            prompt_tokens=len(self.mailbox.prompt_token_ids),
            completion_tokens=sum(len(choice.token_ids) for choice in self._collected),
            cached_tokens=self.mailbox.cached_tokens,
        )

    def take(self) -> list[Delta]:
        """What has come since the last read, without waiting."""
        deltas = self.mailbox.take()
        for delta in deltas:
            self._collected[delta.index].add(delta)
        return deltas

    def completion(self) -> Completion:
        """The answer read so far; complete once `done` and everything has been taken."""
        prompt_logprobs = self.mailbox.prompt_logprobs
        return Completion(
            id=self.id,
            model=self.model,
            choices=tuple(
                Choice(
                    index=index,
                    text="".join(choice.text),
                    token_ids=tuple(choice.token_ids),
                    finish_reason=choice.finish_reason or FinishReason.CANCELLED,
                    stop_reason=choice.stop_reason,
                    logprobs=None if choice.logprobs is None else tuple(choice.logprobs),
                )
                for index, choice in enumerate(self._collected)
            ),
            usage=self.usage,
            prompt_token_ids=self.mailbox.prompt_token_ids,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
        )

    def __await__(self) -> Generator[object, None, Completion]:
        return self._wait().__await__()

    async def _wait(self) -> Completion:
        self.mailbox.collect()
        try:
            while not self.mailbox.closed:
                await self.mailbox.wait()
                self.take()
            self.take()
        finally:
            self.cancel()
        if self.mailbox.error is not None:
            raise self.mailbox.error
        return self.completion()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return _Deltas(self)

    def __del__(self) -> None:
        self.cancel()


class _Deltas:
    """An iteration over a handle. Dropping it before its end cancels the request, so that `break` does."""

    def __init__(self, handle: RequestHandle) -> None:
        self._handle = handle
        self._ready: list[Delta] = []

    def __aiter__(self) -> "_Deltas":
        return self

    async def __anext__(self) -> Delta:
        handle = self._handle
        while not self._ready:
            closed = handle.mailbox.closed
            self._ready = handle.take()[::-1]
            if self._ready:
                break
            if closed:
                if handle.mailbox.error is not None:
                    raise handle.mailbox.error
                raise StopAsyncIteration
            try:
                await handle.mailbox.wait()
            except BaseException:
                handle.cancel()
                raise
        return self._ready.pop()

    def __del__(self) -> None:
        self._handle.cancel()
