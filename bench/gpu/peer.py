"""transformers' continuous batching under the load that `engine` puts on Millrace, in the same run."""

import asyncio
import gc
import time
from typing import Any

import torch

from gpu.context import Context
from gpu.engine import follow, make_runtime, prompts
from gpu.plan import Row
from millrace.runtime.weights.synthetic import preset

NAME, BATCH, PROMPT, NEW_TOKENS = "llama-3.1-8b", 64, 512, 64
NEED = 18.0  # seconds for the second of the two


async def ours(requests: list[list[int]], new_tokens: int) -> float:
    """Seconds from the first submission to the last token."""
    async with make_runtime(NAME, len(requests), 2048) as runtime:
        await follow(runtime, [1] * 64, 8)
        begin = time.perf_counter()
        await asyncio.gather(*(follow(runtime, prompt, new_tokens) for prompt in requests))
        return time.perf_counter() - begin


def config_of(values: dict[str, Any]) -> Any:
    """A transformers config from the values of a config.json."""
    from transformers import LlamaConfig

    known = {name: value for name, value in values.items() if name not in ("architectures", "model_type")}
    known.pop("torch_dtype", None)
    return LlamaConfig(**known)


def theirs(requests: list[list[int]], new_tokens: int) -> tuple[float, str]:
    """Seconds of generate_batch, and which attention it ran with."""
    import transformers
    from transformers.generation import GenerationConfig

    config = config_of(preset(NAME))
    failures = []
    for attention in ("flash_attention_2", "sdpa_paged", "sdpa"):
        try:
            config._attn_implementation = attention
            torch.set_default_dtype(torch.bfloat16)
            with torch.device("cuda"):
                model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
            settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
            model.generate_batch(inputs=requests[:2], generation_config=settings)  # whatever is done once
            begin = time.perf_counter()
            outputs = model.generate_batch(inputs=requests, generation_config=settings)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            made = sum(len(output.generated_tokens) for output in outputs.values())
            if made != len(requests) * new_tokens:
                raise RuntimeError(f"{made} tokens came, not {len(requests) * new_tokens}")
            return seconds, attention
        except Exception as error:
            failures.append(f"{attention}: {type(error).__name__}: {error}"[:160])
        finally:
            torch.set_default_dtype(torch.float32)
        model = None
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError("transformers' continuous batching ran with none: " + "; ".join(failures))


def run(context: Context) -> None:
    part = context.part.name
    requests = prompts(BATCH, PROMPT, preset(NAME)["vocab_size"], 5)
    tokens = BATCH * NEW_TOKENS
    note = f"{BATCH} x ({PROMPT} in, {NEW_TOKENS} out), prompts included"
    own = tokens / asyncio.run(ours(requests, NEW_TOKENS))
    context.row(Row(part, f"{NAME}, Millrace", own, "tokens/s", note=note))
    gc.collect()
    torch.cuda.empty_cache()
    if context.left < NEED:
        context.say("   transformers: no time left")
        return
    seconds, attention = theirs(requests, NEW_TOKENS)
    context.row(Row(part, f"{NAME}, transformers", tokens / seconds, "tokens/s", note=f"{note}; {attention}"))
    context.row(Row(part, "Millrace over transformers", own * seconds / tokens, "times"))
