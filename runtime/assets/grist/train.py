"""Train grist from nothing on the CPU, and write the finished checkpoint folder.

    python -m millrace.runtime.assets.grist.train --minutes 60 --out DIR

The clock is the budget: the learning rate falls to zero as the minutes run out, however fast the machine is. Matrices
are stepped by Muon (momentum, then the nearest orthogonal matrix), which needs fewer tokens than Adam at this size;
embedding and norms by AdamW. Rows are packed with whole conversations that cannot see each other. Later, one step in
ten is on one long conversation of up to the full context, so that far positions and far distances are trained as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from millrace.runtime.assets.grist.corpus import TRAIN_SEED, Conversation, make_conversation
from millrace.runtime.assets.grist.model import END, PAD, Grist, Shape, load
from millrace.runtime.assets.grist.skills import make_name
from millrace.runtime.assets.grist.start import initialise
from millrace.runtime.assets.grist.text import encode_conversations, save_text_files, train_tokenizer

ROW = 256  # tokens per packed row
LONG_EVERY = 10  # every tenth step sees a long conversation
LONG_AFTER = 0.3  # share of the time after which long conversations begin: before, they would teach little

# Token ids, which of them are learned (bool), and the number of the conversation in its row; each [rows, tokens].
DRILL_UNTIL = 0.2  # share of the time during which one row of each step is a copying drill

Batch = tuple[Tensor, Tensor, Tensor]


class Muon:
    """Muon over matrices, grouped by shape so that each group is one batched iteration."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self._groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]
        self._momentum = momentum

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """One step at learning rate `rate`; weights shrink by `rate * decay`."""
        for group, moment in self._groups:
            gradient = torch.stack([_gradient(parameter) for parameter in group])
            moment.lerp_(gradient, 1 - self._momentum)
            update = orthogonal(gradient.lerp_(moment, self._momentum))
            scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * decay).add_(change, alpha=-rate * scale)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Roughly the nearest orthogonal matrix of each of [n, rows, columns], by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Batches:
    """An endless supply of packed batches from one seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._samples = self._stream()
        self._waiting: list[tuple[list[int], list[bool]]] = []

    def _stream(self) -> Iterator[tuple[list[int], list[bool]]]:
        while True:
            chunk: list[Conversation] = [make_conversation(self._rng) for _ in range(1000)]
            yield from encode_conversations(self._tokenizer, chunk)

    def _row(self, length: int) -> list[tuple[list[int], list[bool]]]:
        """Conversations that fill `length` tokens: always the longest waiting one that still fits."""
        row: list[tuple[list[int], list[bool]]] = []
        room = length
        while True:
            while len(self._waiting) < 64:
                ids, learned = next(self._samples)
                self._waiting.append((ids[:length], learned[:length]))
            fitting = [i for i, (ids, _) in enumerate(self._waiting) if len(ids) <= room]
            if not fitting:
                return row
            # The oldest goes first into an empty row, so that none waits for ever.
            best = max(fitting, key=lambda i: len(self._waiting[i][0])) if row else 0
            row.append(self._waiting.pop(best))
            room -= len(row[-1][0])

    def packed(self, rows: int, drills: int = 0, length: int = ROW) -> Batch:
        """A batch of rows filled with whole conversations, but for the first `drills` of them."""
        ids = torch.full((rows, length), PAD)
        learned = torch.zeros((rows, length), dtype=torch.bool)
        number = torch.full((rows, length), -1)
        for r in range(rows):
            if r < drills:
                ids[r], learned[r], number[r] = self.drill(length)
                continue
            at = 0
            for n, (sample, marks) in enumerate(self._row(length)):
                end = at + len(sample)
                ids[r, at:end] = torch.tensor(sample)
                learned[r, at:end] = torch.tensor(marks)
                number[r, at:end] = n
                at = end
        return ids, learned, number

    def drill(self, length: int = ROW) -> Batch:
        """Some names, again and again: from the second round on they can be known by looking back, and only so."""
        names = "".join(f" {make_name(self._rng, False)}" for _ in range(self._rng.randint(3, 20)))
        once = torch.tensor(self._tokenizer.encode(names, add_special_tokens=False).ids[: length // 2])
        ids = once.repeat(length // len(once) + 1)[:length]
        return ids, torch.arange(length) > len(once), torch.zeros(length, dtype=torch.long)

    def long(self, length: int) -> Batch:
        """One conversation of `length` tokens; it is cut where it would be longer."""
        turns = length // 20
        ((ids, learned),) = encode_conversations(self._tokenizer, [make_conversation(self._rng, turns)])
        return torch.tensor([ids[:length]]), torch.tensor([learned[:length]]), torch.zeros(1, len(ids[:length]))


def loss_of(model: Grist, batch: Batch) -> Tensor:
    """Mean cross entropy over the tokens to be learned; scores are computed for those tokens only."""
    ids, learned, number = batch
    mask = None
    if ids.shape[0] > 1:
        tokens = ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        mask = ((number[:, :, None] == number[:, None, :]) & causal)[:, None]
    states = model.hidden(ids, mask)[:, :-1]
    chosen = learned[:, 1:]
    return F.cross_entropy(model.logits(states[chosen]), ids[:, 1:][chosen])


def rate_at(done: float, fall: float = 0.5, warm: float = 0.02) -> float:
    """Warm up, stay, then fall to zero over the last share `fall` of the time."""
    return min(1.0, done / warm, (1.0 - done) / fall) if done < 1 else 0.0


def export(model: Grist, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint folder; weights become bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    partial = folder / "model.safetensors.part"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # it is made for the owner alone
    partial.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.shape.config(), indent=2) + "\n")
    generation = {"do_sample": False, "eos_token_id": END, "pad_token_id": PAD, "max_new_tokens": 256}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_text_files(tokenizer, folder)


def train(
    minutes: float,
    folder: Path,
    *,
    rows: int = 8,
    seed: int = TRAIN_SEED,
    save_minutes: float = 5,
    fall: float = 0.5,
    start_from: Path | None = None,
) -> None:
    """Train for `minutes` and leave the checkpoint in `folder`, with an unfinished one there every `save_minutes`.

    With `start_from`, go on from the weights and the tokenizer of that folder instead of from `start`.
    """
    if start_from is None:
        tokenizer, model = train_tokenizer(Shape().vocab_size), Grist(Shape())
        initialise(model, seed)
    else:
        tokenizer, model = Tokenizer.from_file(str(start_from / "tokenizer.json")), load(start_from).train()
    export(model, tokenizer, folder)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    # A large epsilon: else the slight push away from tokens that did not come up is blown up to full steps, and all
    # rare tokens drift to one and the same place, where they cannot be told apart or copied.
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), eps=5e-5, weight_decay=0.0, fused=True)
    batches = Batches(tokenizer, seed)
    start = saved = time.monotonic()
    total, average = 0, 0.0
    for step in itertools.count(1):
        done = (time.monotonic() - start) / (60 * minutes)
        if done >= 1:
            break
        is_long = step % LONG_EVERY == 0 and done > LONG_AFTER
        drills = 1 if done < DRILL_UNTIL and start_from is None else 0
        batch = batches.long(ROW * (2, 4, 6, 8)[step // LONG_EVERY % 4]) if is_long else batches.packed(rows, drills)
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(others, 1.0)
        rate = rate_at(done, fall)
        muon.step(0.01 * rate, decay=0.02)
        for group in adam.param_groups:
            group["lr"] = 0.004 * rate
        adam.step()
        model.zero_grad(set_to_none=True)
        total += batch[0].numel()
        average += (loss.item() - average) * (1.0 if step == 1 else 0.05)
        now = time.monotonic()
        if step % 50 == 0:
            with torch.no_grad():
                ids, learned, number = batches.drill()
                copying = loss_of(model, (ids[None], learned[None], number[None])).item()
            speed = f"{total / 1e6:.2f} M tokens  {total / (now - start):.0f}/s"
            print(f"step {step}  {speed}  loss {average:.3f}  copying {copying:.3f}", flush=True)
        if now - saved > 60 * save_minutes:
            export(model, tokenizer, folder)
            saved = now
    export(model, tokenizer, folder)
    print(f"{step - 1} steps, {total / 1e6:.2f} M tokens, loss {average:.3f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the checkpoint to")
    parser.add_argument("--rows", type=int, default=8, help=f"rows of {ROW} tokens per step")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--fall", type=float, default=0.5, help="share of the time over which the learning rate falls")
    parser.add_argument("--start-from", type=Path, help="go on from the checkpoint in this folder")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    train(
        arguments.minutes,
        arguments.out,
        rows=arguments.rows,
        seed=arguments.seed,
        save_minutes=arguments.save_minutes,
        fall=arguments.fall,
        start_from=arguments.start_from,
    )


if __name__ == "__main__":
    main()
