"""AWQ (Lin et al. 2023): inputs that are often large get larger weights before rounding, and what comes before them
gets smaller by as much; then the range of each group is cut where that rounds better."""

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.quant.blocks import Block, Input, InputStatistics, output_error
from millrace.runtime.quant.rounding import round_to_nearest

BITS = 4  # all that the format has
_GRID = 20
_CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_SLICE = 1 << 22  # weights whose clipping is tried at a time


def quantize_awq_block(block: Block, x: Tensor, group_size: int) -> dict[str, QuantizedWeight]:
    """Rounds a layer's matrices for windows [count, tokens, hidden] of its input.

    The norms, and the matrices that come before others, are scaled in place; the layer computes the same as before
    until its matrices are replaced by what this returns.
    """
    seen = {of: InputStatistics(block, of, x) for of in Input}
    for of in Input:
        if _can_fold(block, of):
            factors = search_factors([block.weights[name] for name in block.readers(of)], seen[of], group_size)
            _fold(block, of, factors)
            seen[of].gram /= torch.outer(factors, factors)
    return {
        name: round_to_nearest(_clip(block.weights[name], seen[of].gram, group_size), BITS, group_size)
        for of in Input
        for name in block.readers(of)
    }


def search_factors(weights: Sequence[Tensor], seen: InputStatistics, group_size: int) -> Tensor:
    """Factors [in] on the columns of matrices [out, in] that read one input, so that the error of their rounded
    products is least: powers of the mean activation, by themselves and over the mean weight; 1 where nothing helps."""
    columns = sum(
        (weight.abs().view(len(weight), -1, group_size) / weight.abs().view(len(weight), -1, group_size)
         .amax(2, keepdim=True).clamp(min=1e-8)).flatten(1).sum(0)
        for weight in weights
    ) / sum(len(weight) for weight in weights)  # fmt: skip
    energies = [max(output_error(weight, seen.gram), 1e-30) for weight in weights]
    best, best_error = torch.ones_like(seen.mean_abs), float("inf")
    for step in range(_GRID):
        power = step / _GRID
        large = seen.mean_abs.clamp(min=1e-8) ** power
        for factors in (large, large / (columns ** (1 - power) + 1e-4)):
            factors = factors.clamp(min=1e-4)
            factors = factors / (factors.max() * factors.min()).sqrt()
            error = sum(
                output_error(_rounded(weight * factors, group_size) / factors - weight, seen.gram) / energy
                for weight, energy in zip(weights, energies, strict=True)
            )
            if error < best_error:
                best, best_error = factors, error
    return best


def _rounded(weight: Tensor, group_size: int) -> Tensor:
    return round_to_nearest(weight, BITS, group_size).widen()


def _can_fold(block: Block, of: Input) -> bool:
    """Where several heads share the values (GQA), no factor on them serves all inputs of o."""
    return of is not Input.ATTENDED or block.decl.num_heads == block.decl.num_kv_heads


def _fold(block: Block, of: Input, factors: Tensor) -> None:
    """Multiplies the columns of the matrices by `factors`, and divides what comes before by them."""
    for name in block.readers(of):
        block.weights[name] = block.weights[name] * factors
    decl = block.decl
    if of is Input.ATTENTION:
        block.norms[decl.input_norm.name] /= factors
    elif of is Input.MLP:
        block.norms[decl.post_attention_norm.name] /= factors
    else:
        before = (decl.qkv if of is Input.ATTENDED else decl.gate_up).parts[-1].name  # v, or up
        block.weights[before] = block.weights[before] / factors[:, None]
        if before in block.biases:
            block.biases[before] /= factors


def _clip(weight: Tensor, gram: Tensor, group_size: int) -> Tensor:
    """`weight` with each group's largest values cut off where that lowers the error of the group's own product."""
    groups = weight.shape[1] // group_size
    blocks = torch.stack(
        [gram[at : at + group_size, at : at + group_size] for at in range(0, groups * group_size, group_size)]
    )
    rows = max(1, _SLICE // weight.shape[1])
    return torch.cat([_clip_rows(part, blocks) for part in torch.split(weight, rows)])


def _clip_rows(weight: Tensor, blocks: Tensor) -> Tensor:
    """`blocks` is the diagonal of the Gram matrix, [groups, size, size]."""
    groups, size, _ = blocks.shape
    grouped = weight.view(len(weight), groups, size)
    largest = grouped.abs().amax(2, keepdim=True)
    best, best_error = grouped, torch.full_like(largest, float("inf"))
    for part in (1.0, *_CLIPS):
        cut = torch.minimum(torch.maximum(grouped, -largest * part), largest * part)
        change = _rounded(cut.flatten(1), size).view_as(grouped) - grouped
        product = torch.einsum("ogi,gij->ogj", change, blocks)
        error = (product * change).sum(2, keepdim=True)
        better = error < best_error
        best, best_error = torch.where(better, cut, best), torch.where(better, error, best_error)
    return best.flatten(1)
