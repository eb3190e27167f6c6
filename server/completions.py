"""POST /v1/completions, the legacy endpoint; with echo, max_tokens 0 and logprobs it scores a text."""

from aiohttp import web

from millrace.runtime.types import TextPrompt, TokensPrompt
from millrace.server.answer import finished, submitted
from millrace.server.body import read_body
from millrace.server.context import CONTEXT, REQUEST_ID, Context, wall
from millrace.server.protocol import Job, parse_completion
from millrace.server.shapes import CompletionFormat
from millrace.server.sse import EventStream


def _echoes(context: Context, job: Job) -> list[str] | None:
    if not job.echo:
        return None
    texts = []
    for prompt in job.prompts:
        if isinstance(prompt, TextPrompt):
            texts.append(prompt.text)
        elif isinstance(prompt, TokensPrompt):
            texts.append(context.runtime.tokenizer.decode(prompt.tokens, skip_special_tokens=False))
    return texts


async def completions(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    job = parse_completion(await read_body(request, context.limits), context)
    request_id = job.request_id or request[REQUEST_ID]
    name, created = f"cmpl-{request_id}", wall()
    with submitted(context, job, request_id) as handles:
        form = CompletionFormat(job.sampling.n, _echoes(context, job), job.logprobs)
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
        answers = await finished(handles)
    body = form.whole(answers, name, created, job.show_prompt_logprobs)
    return web.Response(body=body, content_type="application/json")
