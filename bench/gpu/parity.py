"""Whole models on the device against transformers in float32, and the engine with and without overlap.

Logits of a model in bf16 differ from float32's by its rounding: a relative error of norms near 1e-2 over a few layers.
What transformers itself loses in bf16 stands beside ours, and ours may be at most half as much again, or under 2e-2.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpu.case_list import Place, error_of
from gpu.cases import device_place
from gpu.context import Context
from gpu.model_tools import placement, prepare, prompt_batch
from gpu.plan import Row
from millrace.runtime.cuda.driver import CudaDriver, TorchDriver
from millrace.runtime.weights.loader import load_model
from millrace.runtime.weights.resolve import resolve_model
from millrace.runtime.weights.synthetic import preset, write_random_checkpoint

TOLERANCE, BESIDE = 2e-2, 1.5
PROMPT, NEW_TOKENS = 300, 48
_SIZES = {"vocab_size": 4096, "num_hidden_layers": 4, "intermediate_size": 1408, "max_position_embeddings": 16384}
MODELS: Mapping[str, dict[str, Any]] = {
    "llama 128, group 4": preset("llama-3.1-8b")
    | _SIZES
    | {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1},
    "llama 64, group 1": preset("tiny-6x256")
    | _SIZES
    | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8},
    "qwen2 64, group 7": preset("qwen2.5-0.5b") | _SIZES | {"hidden_size": 896, "bos_token_id": 0, "eos_token_id": 1},
}


def tokens_of(count: int, vocab: int) -> list[int]:
    return [(i * 2654435761 + 12345) % vocab for i in range(count)]


def logits_of(reference: Any, tokens: list[int], device: str) -> torch.Tensor:
    return reference(torch.tensor([tokens], device=device)).logits[0].float().cpu()


def logits_rows(
    context: Context, place: Place, driver: CudaDriver, name: str, folder: Path, num_tokens: int = PROMPT
) -> None:
    """One row: our error, with transformers' own beside it."""
    import transformers  # the part is skipped where it is missing

    model = load_model(folder, placement=placement(place, driver, 8), max_model_len=512)
    prepare(place, model)
    tokens = tokens_of(num_tokens, model.spec.vocab_size)
    kv = model.allocate_kv(-(-num_tokens // 16) + 1)
    ours = model.forward(prompt_batch(tokens, driver.device, all_logits=True), kv).float().cpu()
    wanted = []
    for dtype in (torch.float32, torch.bfloat16):
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place.device).eval()
        wanted.append(logits_of(reference, tokens, place.device))
        del reference
    error, beside = error_of(ours, wanted[0]), error_of(wanted[1], wanted[0])
    agree = float((ours.argmax(-1) == wanted[0].argmax(-1)).float().mean())
    note = f"transformers bf16: {beside:.2e}; same greedy token at {agree:.0%} of the positions"
    failed = not error <= max(TOLERANCE, BESIDE * beside)
    context.row(Row(context.part.name, f"logits, {name}", min(error, 1e30), "relative", note=note, failed=failed))


def _drawing(index: int) -> dict[str, Any]:
    """Greedy for every other request."""
    return {"seed": index, "temperature": 0.8 * (index % 2), "top_k": 20}


async def completions(
    folder: Path, overlap: bool, graphs: bool, prompts: list[list[int]], **options: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the requests one after the other, and all at once; nothing is found in the prefix cache."""
    from millrace.runtime import Runtime, SamplingParams

    settings: dict[str, Any] = {"device__kind": "cuda", "device__batch_invariant": True, "log__level": "warning"}
    settings |= {"scheduler__overlap": overlap, "scheduler__max_num_seqs": 16, "device__cuda_graphs": graphs}
    async with Runtime(folder, model__max_model_len=512, **(settings | options)) as runtime:

        def submit(index: int, salt: str) -> Any:
            sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **_drawing(index))
            return runtime.submit(prompts[index], sampling, cache_salt=f"{salt} {index}")

        alone = [list((await submit(index, "alone")).token_ids) for index in range(len(prompts))]
        handles = [submit(index, "at once") for index in range(len(prompts))]
        return alone, [list((await handle).token_ids) for handle in handles]


def engine_rows(context: Context, folder: Path, vocab: int, num_prompts: int = 8, **options: Any) -> None:
    """Tokens with and without overlap, and with and without graphs.

    One after the other they must be equal. At once they need not: who shares a step with whom is a matter of time, and
    cuBLAS multiplies a larger batch in another order, which may decide between two likely tokens.
    """
    prompts = [tokens_of(5 + 37 * i, vocab) for i in range(num_prompts)]
    ways = {"as usual": (True, True), "overlap off": (False, True), "graphs off": (True, False)}
    found = {name: asyncio.run(completions(folder, *way, prompts, **options)) for name, way in ways.items()}
    for name in ("overlap off", "graphs off"):
        for index, how in enumerate(("alone", "at once")):
            pairs = zip(found["as usual"][index], found[name][index], strict=True)
            same = sum(a == b for a, b in pairs)
            failed = how == "alone" and same < len(prompts)
            note = f"of {len(prompts)} requests, {NEW_TOKENS} tokens each"
            context.row(Row(context.part.name, f"equal with {name}, {how}", same, "requests", note=note, failed=failed))


def run(context: Context) -> None:
    place, driver = device_place(), TorchDriver(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for index, (name, config) in enumerate(MODELS.items()):
            write_random_checkpoint(folder / str(index), config, seed=index, dtype="bfloat16")
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(resolve_model().path / file, folder / str(index) / file)
            with torch.inference_mode():
                logits_rows(context, place, driver, name, folder / str(index))
        if context.left > 12:
            engine_rows(context, folder / "0", 4096)
        else:
            context.say("   overlap on = off: no time left")
