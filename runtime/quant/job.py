"""The making of a quantised checkpoint, layer by layer: in memory are one layer and the activations.

Windows of text go through the layers as they are rounded, three times over: calibration text through the rounded
layers, held-out text through both the given ones and the rounded ones. So the report's perplexities need no model in
memory, and no loader of the format.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from millrace.runtime.errors import CheckpointError
from millrace.runtime.quant.blocks import Block
from millrace.runtime.quant.calibration import Windows
from millrace.runtime.quant.evaluate import exp_mean
from millrace.runtime.quant.methods import Method
from millrace.runtime.quant.source import Source
from millrace.runtime.quant.workfolder import WorkFolder

Progress = Callable[[int, int], None]  # (layers done, layers in all)

_SLICE = 1 << 24  # weights of the output matrix that are wide at a time


class Texts(NamedTuple):
    calibration: Windows
    held_out: Windows


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        before, after: perplexity of the held-out text; after: with rounded weights, and activations as the format
            rounds them.
        scored: tokens of the held-out text that they are of.
        windows: of calibration text that were used; None where the method looks at none.
        asked: windows that were wanted.
        bytes_before, bytes_after: of all tensors.
        layer_seconds: mean over the layers of this run, 0 where an earlier one had done them all.
        seconds: of this run.
    """

    method: str
    output: Path
    before: float
    after: float
    scored: int
    windows: int | None
    asked: int
    bytes_before: int
    bytes_after: int
    layer_seconds: float
    seconds: float

    def table(self) -> str:
        rows = (
            ("perplexity", f"{self.before:.4f}", f"{self.after:.4f}", self.after / self.before,
             f"{self.scored:,} held-out tokens"),
            ("size", f"{self.bytes_before / 1e6:,.1f} MB", f"{self.bytes_after / 1e6:,.1f} MB",
             self.bytes_after / self.bytes_before, "all tensors"),
        )  # fmt: skip
        lines = [f"{self.method:<12}{'before':>14}{'after':>14}{'change':>11}"]
        lines += [
            f"{name:<12}{before:>14}{after:>14}{ratio - 1:>+11.2%}  {note}" for name, before, after, ratio, note in rows
        ]
        if self.windows is not None:
            short = f" of {self.asked:,} that were asked for: the text is too short" * (self.windows < self.asked)
            lines.append(f"{'calibration':<12}{self.windows:>12,} windows{short}")
        lines.append(f"{'time':<12}{self.layer_seconds:>12.1f} s a layer, {self.seconds:.1f} s in all")
        return "\n".join(lines)


class Job:
    """One checkpoint in the making."""

    def __init__(
        self, source: Source, method: Method, texts: Texts, asked: int, work: WorkFolder, progress: Progress | None
    ) -> None:
        """`asked`: how many windows of calibration were wanted."""
        self._source = source
        self._method = method
        self._texts = texts
        self._asked = asked
        self._work = work
        self._progress = progress or (lambda done, total: None)
        self._cos_sin = source.decl.rope.cos_sin(texts.held_out.ids.shape[1])

    def run(self, started: float) -> Report:
        """`started` is when the run began, by time.perf_counter."""
        layers, work = self._source.layers, self._work
        state = work.state() if work.layers_done else self._embed()
        self._progress(work.layers_done, len(layers))
        seconds = []
        while work.layers_done < len(layers):
            began = time.perf_counter()
            state = self._layer(work.layers_done, state)
            self._source.release()
            seconds.append(time.perf_counter() - began)
            self._progress(work.layers_done, len(layers))
        before, after, scored = self._perplexities(state)
        size = self._finish()
        return Report(
            method=self._describe(),
            output=work.output,
            before=before,
            after=after,
            scored=scored,
            windows=len(self._texts.calibration.ids) if self._method.calibrated else None,
            asked=self._asked,
            bytes_before=self._source.stored_bytes,
            bytes_after=size,
            layer_seconds=sum(seconds) / len(seconds) if seconds else 0.0,
            seconds=time.perf_counter() - started,
        )

    def _describe(self) -> str:
        group = f" g{self._method.group_size}" if self._method.group_size else ""
        return f"{self._method.name} {self._method.bits} bits{group}"

    def _shard(self, number: int) -> str:
        """Shard 1 is the embedding, the last one what stands behind the layers."""
        return f"model-{number:05}-of-{len(self._source.layers) + 2:05}.safetensors"

    def _embed(self) -> dict[str, Tensor]:
        table = self._source.read(f"{self._source.decl.embedding.name}.weight")
        largest = max(int(text.ids.max()) for text in self._texts if text.ids.numel())
        if largest >= len(table):
            raise CheckpointError(
                f"the tokenizer gives the id {largest}, but the model has {len(table)}: they do not belong together"
            )
        own, held_out = (table[text.ids] for text in self._texts)
        return {
            "calibration": self._kept(own, "the embedding").float(),
            "before": held_out.float(),
            "after": self._kept(held_out, "the embedding").float(),
        }

    def _layer(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        block = Block(self._source.layers[index], self._source.read, self._cos_sin)
        state = state | {"before": _through(block, state["before"])}
        rounded = self._method.quantize(block, state["calibration"])
        tensors: dict[str, Tensor] = {}
        for name, weight in rounded.items():
            tensors.update(self._method.tensors(name, weight))
            block.weights[name] = weight.widen()
        for values, suffix in ((block.norms, "weight"), (block.biases, "bias")):
            for name, value in values.items():
                full = f"{name}.{suffix}"
                tensors[full] = self._kept(value, full) if self._method.is_half else self._source.read(full)
                values[name] = tensors[full].float()
        block.round_inputs = self._method.round_input
        state = {
            "calibration": _through(block, state["calibration"]),
            "before": state["before"],
            "after": _through(block, state["after"]),
        }
        self._work.finish_layer(self._shard(index + 2), tensors, state)
        return state

    def _kept(self, value: Tensor, name: str) -> Tensor:
        """A tensor that is not rounded, in the type that it is written in."""
        if not self._method.is_half or value.dtype is torch.float16:
            return value
        half = value.to(torch.float16)
        if not bool(half.isfinite().all()):
            raise CheckpointError(
                f"{name} has values beyond the range of float16, in which {self._method.name} stores it: "
                "use int8, int4 or fp8"
            )
        return half

    def _perplexities(self, state: dict[str, Tensor]) -> tuple[float, float, int]:
        """Of the held-out text before and after, and the number of tokens that they are of."""
        decl = self._source.decl
        norm = self._source.read(f"{decl.final_norm.name}.weight")
        name = (decl.lm_head.parts[0].name if decl.lm_head is not None else decl.embedding.name) + ".weight"
        head = self._source.read(name)

        def nll(x: Tensor, kept: Callable[[Tensor], Tensor]) -> float:
            normed = torch.nn.functional.rms_norm(x, (x.shape[2],), kept(norm).float(), decl.final_norm.eps)
            return _nll(normed, self._texts.held_out, head, kept)

        before = nll(state["before"], lambda given: given)
        after = nll(state["after"], lambda given: self._kept(given, f"{decl.final_norm.name} or {name}"))
        self._source.release()
        scored = int(self._texts.held_out.scored[:, 1:].sum())
        return exp_mean(before, scored), exp_mean(after, scored), scored

    def _finish(self) -> int:
        """Writes what is not a layer, and gives the output its name; returns the bytes of all tensors."""
        source, decl, work = self._source, self._source.decl, self._work
        first = f"{decl.embedding.name}.weight"
        work.save(self._shard(1), {first: self._kept(source.read(first), first)})
        last = [tensor.name for module in (decl.final_norm, decl.lm_head) if module for tensor in module.tensors()]
        work.save(self._shard(len(source.layers) + 2), {name: self._kept(source.read(name), name) for name in last})
        source.release()
        source.copy_others(work.shards)
        weight_map: dict[str, str] = {}
        total = 0
        for number in range(1, len(source.layers) + 3):
            shard = self._shard(number)
            for name, tensor in work.read(work.shards / shard).items():
                weight_map[name] = shard
                total += tensor.nbytes
        config = source.written_config()
        if self._method.is_half:
            # The key of transformers 5, and that of 4, which 5 reads too.
            config["dtype" if "dtype" in config else "torch_dtype"] = "float16"
        config["quantization_config"] = self._method.config()
        work.publish(config, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return total


def _through(block: Block, x: Tensor) -> Tensor:
    """Windows [count, tokens, hidden] behind the layer."""
    return torch.stack([block.run(window) for window in x]) if len(x) else x


def _nll(x: Tensor, text: Windows, head: Tensor, kept: Callable[[Tensor], Tensor]) -> float:
    """Sum of -log p over the scored tokens; `x` is [count, tokens, hidden], normed. The output matrix is widened slice
    by slice, for it may be larger than a layer."""
    wanted = text.scored[:, 1:].flatten()
    states = x[:, :-1].flatten(0, 1)[wanted]
    targets = text.ids[:, 1:].flatten()[wanted]
    total = torch.full((len(states),), float("-inf"))
    right = torch.empty(len(states))
    rows = max(1, _SLICE // head.shape[1])
    for start in range(0, len(head), rows):
        part = kept(head[start : start + rows]).float()
        inside = ((targets >= start) & (targets < start + len(part))).nonzero().flatten()
        right[inside] = (states[inside] * part[targets[inside] - start]).sum(1)
        # Tokens in slices too: their logits are as wide as the part.
        sums = [torch.logsumexp(some @ part.t(), 1) for some in torch.split(states, 512)]
        total = torch.logaddexp(total, torch.cat(sums))
    return float((total - right).double().sum())
