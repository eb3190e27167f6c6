"""From a checked request to its handles, and waiting for the end of an answer that is not streamed."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from millrace.runtime.handle import RequestHandle
from millrace.runtime.types import ChatPrompt, Completion, TextPrompt, TokensPrompt
from millrace.server.context import Context
from millrace.server.protocol import Job


def submit(
    context: Context, job: Job, prompt: ChatPrompt | TextPrompt | TokensPrompt, request_id: str
) -> RequestHandle:
    return context.runtime.submit(
        prompt,
        job.sampling,
        priority=job.priority,
        deadline=job.deadline,
        request_id=request_id,
        cache_salt=job.cache_salt,
    )


@contextmanager
def submitted(context: Context, job: Job, request_id: str) -> Iterator[list[RequestHandle]]:
    """Submits a request for each prompt, and cancels what still runs when the block is left, for whatever reason."""
    handles: list[RequestHandle] = []
    try:
        for number, prompt in enumerate(job.prompts):
            name = request_id if len(job.prompts) == 1 else f"{request_id}-{number}"
            handles.append(submit(context, job, prompt, name))
        yield handles
    finally:
        for handle in handles:
            handle.mailbox.on_ready = None
            handle.cancel()


async def finished(handles: Sequence[RequestHandle]) -> list[Completion]:
    """The whole answers, read once at their ends: no task wakes for a token.

    Raises the MillraceError of the first request that failed, as soon as it does.
    """
    end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def look() -> None:
        over = all(handle.done for handle in handles) or any(handle.error is not None for handle in handles)
        if over and not end.done():
            end.set_result(None)

    for handle in handles:
        handle.mailbox.collect()
        handle.mailbox.on_ready = look
    look()
    await end
    for handle in handles:
        if handle.error is not None:
            raise handle.error
        handle.take()
    return [handle.completion() for handle in handles]
