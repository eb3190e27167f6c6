"""One layer in float32 with its matrices open to change: what calibration runs instead of a packed model."""

from collections.abc import Callable, Iterator
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.runtime.errors import CheckpointError
from millrace.runtime.models.declaration import LinearDecl, RMSNormDecl
from millrace.runtime.models.rotary import RotaryLayerDecl

Read = Callable[[str], Tensor]  # a tensor of the checkpoint by its declared name
Rounding = Callable[[Tensor], Tensor]  # what becomes of an activation on its way into a matrix


class Input(Enum):
    """The four activations of a layer that matrices read, in the order in which they are computed."""

    ATTENTION = "the normed input of q, k and v"
    ATTENDED = "what attention gives to o"
    MLP = "the normed input of gate and up"
    HIDDEN = "what gate and up give to down"


class Block:
    """A layer of the Llama family: weights by name, and the pass over windows of tokens.

    Attributes:
        weights: <name> of a matrix -> [out, in] float32. May be replaced.
        biases: <name> of a matrix -> [out] float32, for those that have one. May be changed.
        norms: <name> of a norm -> [width] float32. May be changed.
        round_inputs: applied to what goes into each matrix (None: nothing is).
    """

    def __init__(self, decl: RotaryLayerDecl, read: Read, cos_sin: Tensor) -> None:
        """`cos_sin` is [positions, head_dim], cosines first; windows are at most `positions` long.

        Raises CheckpointError for a tensor with values that are not finite.
        """
        self.decl = decl
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.round_inputs: Rounding | None = None
        self._cos, self._sin = cos_sin.chunk(2, dim=1)
        for linear in self._linears().values():
            for part in linear.parts:
                self.weights[part.name] = _wide(read, f"{part.name}.weight")
                if part.bias:
                    self.biases[part.name] = _wide(read, f"{part.name}.bias")
        norms = (decl.input_norm, decl.q_norm, decl.k_norm, decl.post_attention_norm)
        self.norms = {norm.name: _wide(read, f"{norm.name}.weight") for norm in norms if norm is not None}

    def _linears(self) -> dict[Input, LinearDecl]:
        decl = self.decl
        return {
            Input.ATTENTION: decl.qkv,
            Input.ATTENDED: decl.output,
            Input.MLP: decl.gate_up,
            Input.HIDDEN: decl.down,
        }

    def readers(self, of: Input) -> tuple[str, ...]:
        """Names of the matrices that read an input."""
        return tuple(part.name for part in self._linears()[of].parts)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the layer holds besides its matrices, by the names of the checkpoint."""
        for norm, weight in self.norms.items():
            yield f"{norm}.weight", weight
        for name, bias in self.biases.items():
            yield f"{name}.bias", bias

    def run(self, x: Tensor, until: Input | None = None) -> Tensor:
        """The layer's output for one window [tokens, hidden] of positions from 0 on; or, before it is complete, one
        input of its matrices, [tokens, in]."""
        decl = self.decl
        normed = self._norm(decl.input_norm, x)
        if until is Input.ATTENTION:
            return normed
        attended = self._attend(normed)
        if until is Input.ATTENDED:
            return attended
        x = x + self._linear(decl.output, attended)
        normed = self._norm(decl.post_attention_norm, x)
        if until is Input.MLP:
            return normed
        gate, up = self._linear(decl.gate_up, normed).chunk(2, dim=1)
        hidden = F.silu(gate) * up
        return hidden if until is Input.HIDDEN else x + self._linear(decl.down, hidden)

    def _norm(self, norm: RMSNormDecl, x: Tensor) -> Tensor:
        return F.rms_norm(x, (norm.width,), self.norms[norm.name], norm.eps)

    def _linear(self, linear: LinearDecl, x: Tensor) -> Tensor:
        if self.round_inputs is not None:
            x = self.round_inputs(x)
        parts = [F.linear(x, self.weights[part.name], self.biases.get(part.name)) for part in linear.parts]
        return torch.cat(parts, dim=1)

    def _attend(self, x: Tensor) -> Tensor:
        decl = self.decl
        heads, kv_heads, tokens = decl.num_heads, decl.num_kv_heads, len(x)
        qkv = self._linear(decl.qkv, x).view(tokens, heads + 2 * kv_heads, decl.head_dim).transpose(0, 1)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads])
        q, k = self._rotate(self._head_norm(decl.q_norm, q)), self._rotate(self._head_norm(decl.k_norm, k))
        mask = None
        if decl.window is not None and decl.window < tokens:
            at = torch.arange(tokens)
            back = at[:, None] - at
            mask = (back >= 0) & (back < decl.window)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )  # [heads, tokens, head_dim]
        return attended.transpose(0, 1).reshape(tokens, -1)

    def _head_norm(self, norm: RMSNormDecl | None, x: Tensor) -> Tensor:
        return x if norm is None else self._norm(norm, x)

    def _rotate(self, x: Tensor) -> Tensor:
        cos, sin = self._cos[: x.shape[1]], self._sin[: x.shape[1]]
        first, second = x.chunk(2, dim=2)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2)


class InputStatistics:
    """What is kept of a matrix's inputs over all windows.

    Attributes:
        gram: sum of x xᵀ over the tokens, [in, in] float32: the error of a changed matrix is tr(D gram Dᵀ), without
            any activation at hand.
        mean_abs: mean of |x|, [in].
    """

    def __init__(self, block: Block, of: Input, x: Tensor) -> None:
        """Runs a block over windows [count, tokens, hidden]."""
        width = block.weights[block.readers(of)[0]].shape[1]
        self.gram = torch.zeros(width, width)
        total = torch.zeros(width)
        for window in x:
            seen = block.run(window, of)
            self.gram.addmm_(seen.t(), seen)
            total += seen.abs().sum(0)
        self.mean_abs = total / (x.shape[0] * x.shape[1])


def output_error(change: Tensor, gram: Tensor) -> float:
    """Sum over tokens and outputs of the squared change in the product: `change` [out, in]."""
    return float(((change @ gram) * change).sum())


def _wide(read: Read, name: str) -> Tensor:
    wide = read(name).to(torch.float32, copy=True)  # nothing stays in the memory map
    if not bool(wide.isfinite().all()):
        raise CheckpointError(f"{name} holds values that are not finite: the checkpoint is damaged")
    return wide
