"""POST /v1/chat/completions."""

from aiohttp import web

from millrace.runtime.types import ChatPrompt
from millrace.server.answer import finished, submitted
from millrace.server.body import read_body
from millrace.server.context import CONTEXT, REQUEST_ID, wall
from millrace.server.protocol import Job, parse_chat
from millrace.server.shapes import ChatFormat
from millrace.server.sse import EventStream


def chat_format(job: Job) -> ChatFormat:
    """With `echo`, an answer that goes on with the assistant's message begins with that message."""
    (prompt,) = job.prompts
    last = prompt.messages[-1] if isinstance(prompt, ChatPrompt) else None
    return ChatFormat(last.content if job.echo and last is not None and last.role == "assistant" else "")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    job = parse_chat(await read_body(request, context.limits), context)
    request_id = job.request_id or request[REQUEST_ID]
    name, created, form = f"chatcmpl-{request_id}", wall(), chat_format(job)
    with submitted(context, job, request_id) as handles:
        if job.stream:
            return await EventStream(
                context,
                request,
                handles,
                form,
                n=job.sampling.n,
                name=name,
                created=created,
                usage=job.include_usage,
                running=job.continuous_usage,
            ).run()
        (completion,) = await finished(handles)
    body = form.whole(completion, name, created, job.logprobs, job.show_prompt_logprobs)
    return web.Response(body=body, content_type="application/json")
