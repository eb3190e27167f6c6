"""The weights that training starts from: small random numbers, and three layers that already know how to look back.

To say back a name that it has never seen, a model must find where the name stands and repeat it piece by piece.
Transformers learn that in two layers (a head that looks at the token before, and above it one that looks for what
followed the last time: an "induction head"), but usually after far more text than grist's few minutes can read. So one
group of heads is born with it in each of three layers:

- layer 0 copies what stood one, two and three tokens before into subspaces of its own;
- layers 1 and 2 look for the place where the token before was the present one, and add what stands there to the output.

Nothing is frozen: training uses and reshapes all of it. All embeddings share one added direction, which tied scores
do not notice (softmax ignores a common shift), but which gives the heads of layer 0 something constant to turn with
position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from millrace.runtime.assets.grist.model import Attention, Grist

# Large beside what the layers write, so that deep layers still see which token stands where; the last norm starts
# small, to bring the scores of the tied output back to a sensible size.
EMBEDDING_STD = 0.5
LAST_NORM = 0.1
LOOK_BACK = 41.0  # how sharply layer 0 looks at one place, in units of attention score times sqrt(head_dim)
MATCH = 3.0  # on the side of queries and of keys each
SLOW = 8  # rotary pairs from this one on turn slowly enough to compare tokens hundreds of places apart
KEPT = 1.0  # how loudly layer 0 writes
SAID = 5.0  # how loudly layers 1 and 2 write


@torch.no_grad()
def initialise(model: Grist, seed: int) -> None:
    """Set every weight of `model`."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * model.shape.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = EMBEDDING_STD if "embed" in name else 0.02 * (depth if is_output else 1.0)
            nn.init.normal_(parameter, std=std, generator=generator)
    model.model.norm.weight.fill_(LAST_NORM)
    _add_look_back(model, generator)


def _add_look_back(model: Grist, generator: torch.Generator) -> None:
    shape, size = model.shape, model.shape.head_dim
    basis = torch.linalg.qr(torch.randn(shape.hidden_size, shape.hidden_size, generator=generator))[0].T
    constant, kept, content = basis[0], basis[1 : 1 + size], basis[1 + size : 1 + 4 * size]
    before = (kept, content[:size], content[size : 2 * size])  # where layer 0 writes; only the first is kept apart
    embedding = model.model.embed_tokens.weight
    norm = EMBEDDING_STD * shape.hidden_size**0.5
    embedding -= (embedding @ basis[: 1 + size].T) @ basis[: 1 + size]
    embedding += norm * constant
    # After RMSNorm the constant direction has the length sqrt(hidden) * 1 / sqrt(2), its share of the embedding.
    unit = constant / (shape.hidden_size / 2) ** 0.5
    group = shape.num_attention_heads // shape.num_key_value_heads
    speeds = shape.rope_theta ** (-torch.arange(0, size, 2) / size)

    attention = _attention(model, 0)
    key = torch.zeros(size, shape.hidden_size)
    key[:4] = math.sqrt(LOOK_BACK) * unit
    _kv_rows(attention.k_proj.weight, size)[:] = key
    read = content[-size:]
    _kv_rows(attention.v_proj.weight, size)[:] = read
    for i in range(group):
        query = torch.zeros(size, shape.hidden_size)
        angle = speeds[:4] * (i + 1)
        query[:4] = math.sqrt(LOOK_BACK) * angle.cos()[:, None] * unit
        query[size // 2 : size // 2 + 4] = -math.sqrt(LOOK_BACK) * angle.sin()[:, None] * unit
        head = slice((group + i) * size, (group + i + 1) * size)
        attention.q_proj.weight[head] = query
        attention.o_proj.weight[:, head] = KEPT * before[i].T

    slow = torch.cat((torch.arange(SLOW, size // 2), torch.arange(size // 2 + SLOW, size)))
    halves = slice(0, len(slow)), slice(len(slow), 2 * len(slow))
    for layer, half, said in ((1, halves[0], content[2 * size : 3 * size]), (2, halves[1], basis[-size:])):
        attention = _attention(model, layer)
        key, query = torch.zeros(size, shape.hidden_size), torch.zeros(size, shape.hidden_size)
        key[slow], query[slow] = MATCH * kept[half], MATCH * read[half]
        _kv_rows(attention.k_proj.weight, size)[:] = key
        _kv_rows(attention.v_proj.weight, size)[:] = said
        for i in range(group):
            head = slice((group + i) * size, (group + i + 1) * size)
            attention.q_proj.weight[head] = query
            attention.o_proj.weight[:, head] = SAID / group * said.T


def _attention(model: Grist, layer: int) -> Attention:
    attention = model.model.layers[layer].get_submodule("self_attn")
    assert isinstance(attention, Attention)
    return attention


def _kv_rows(weight: Tensor, size: int) -> Tensor:
    """The rows of the second key-value head, whose heads look back; those of the first are left random."""
    return weight[size : 2 * size]
