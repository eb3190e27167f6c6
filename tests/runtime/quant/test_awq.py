"""AWQ: scaling changes nothing before rounding, and less after it."""

from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from torch import Tensor

from millrace.runtime.quant.awq import quantize_awq_block, search_factors
from millrace.runtime.quant.blocks import Block, Input, InputStatistics, output_error
from millrace.runtime.quant.rounding import round_to_nearest
from millrace.runtime.quant.source import Source

GROUP = 16


def make_block(folder: Path, kind: str, **overrides: object) -> Block:
    source = Source(make_checkpoint(kind, folder, **overrides))
    block = Block(source.layers[0], source.read, source.decl.rope.cos_sin(32))
    generator = torch.Generator().manual_seed(2)
    # A few inputs much larger than the others, as trained models have them.
    for norm in (block.decl.input_norm, block.decl.post_attention_norm):
        block.norms[norm.name][torch.randperm(64, generator=generator)[:4]] *= 20
    return block


def inputs(count: int = 4) -> Tensor:
    return torch.randn(count, 32, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "overrides"), [
    ("llama-biases", {"num_key_value_heads": 4}),  # values of their own for each head: o folds into v
    ("llama", {}),
    ("qwen3", {}),
])  # fmt: skip
def test_folding_leaves_the_layer_as_it_is_and_rounding_loses_less(
    kind: str, overrides: dict[str, object], tmp_path: Path
) -> None:
    block, x = make_block(tmp_path, kind, **overrides), inputs()
    before = dict(block.weights)
    want = torch.stack([block.run(window) for window in x])
    block.weights = {name: round_to_nearest(weight, 4, GROUP).widen() for name, weight in before.items()}
    nearest = torch.stack([block.run(window) for window in x]) - want
    block.weights = dict(before)

    rounded = quantize_awq_block(block, x, GROUP)

    folded = torch.stack([block.run(window) for window in x])
    torch.testing.assert_close(folded, want, rtol=1e-3, atol=1e-3)
    changed = {name.rsplit(".", 1)[1] for name, weight in block.weights.items() if weight is not before[name]}
    assert changed >= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert ("o_proj" in changed) == (block.decl.num_heads == block.decl.num_kv_heads)
    block.weights = {name: weight.widen() for name, weight in rounded.items()}
    assert set(rounded) == set(before)
    error = torch.stack([block.run(window) for window in x]) - want
    assert error.square().sum() < 0.8 * nearest.square().sum()


def test_factors_protect_the_inputs_that_are_large(tmp_path: Path) -> None:
    block, x = make_block(tmp_path, "llama"), inputs()
    seen = InputStatistics(block, Input.ATTENTION, x)
    weights = [block.weights[name] for name in block.readers(Input.ATTENTION)]
    factors = search_factors(weights, seen, GROUP)
    large = seen.mean_abs.topk(4).indices
    assert factors[large].min() > 2 * factors.median()
    plain, scaled = (
        sum(
            output_error(round_to_nearest(weight * scale, 4, GROUP).widen() / scale - weight, seen.gram)
            for weight in weights
        )
        for scale in (torch.ones(64), factors)
    )
    assert scaled < 0.5 * plain


def test_statistics_are_those_of_the_inputs(tmp_path: Path) -> None:
    block, x = make_block(tmp_path, "llama"), inputs(3)
    seen = InputStatistics(block, Input.HIDDEN, x)
    hidden = torch.cat([block.run(window, Input.HIDDEN) for window in x])
    torch.testing.assert_close(seen.gram, hidden.t() @ hidden, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seen.mean_abs, hidden.abs().mean(0))
    change = torch.randn(8, 112, generator=torch.Generator().manual_seed(4))
    assert output_error(change, seen.gram) == pytest.approx(float((hidden @ change.t()).square().sum()), rel=1e-3)
