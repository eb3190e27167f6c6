"""What sampling on the GPU means, in float64 and plain words: for the tests of `cuda_sampling`."""

import torch
from torch import Tensor

from millrace.kernels.cuda_sampling import RowSettings


def edited_logits(
    logits: Tensor, settings: RowSettings, prompt: list[int] | None = None, output: list[int] | None = None
) -> Tensor:
    """[vocab] float64: allowed ids, biases and bans, ids held back until min_tokens, penalties; in this order."""
    x = logits.double().clone()
    prompt, output = prompt or [], output or []
    if settings.allowed is not None:
        allowed = torch.zeros(len(x), dtype=torch.bool)
        allowed[list(settings.allowed)] = True
        x[~allowed] = -torch.inf
    for token, bias in settings.logit_bias.items():
        x[token] += bias
    x[list(settings.banned)] = -torch.inf
    if len(output) < settings.min_tokens:
        x[list(settings.held)] = -torch.inf
    for token in set(output) | (set(prompt) if settings.repetition_penalty != 1.0 else set()):
        times = output.count(token)
        value = x[token]
        value = value / settings.repetition_penalty if value > 0 else value * settings.repetition_penalty
        x[token] = value - settings.frequency_penalty * times - settings.presence_penalty * (times > 0)
    return x


def ranked(logits: Tensor) -> Tensor:
    """Ids by likelihood: largest logit first, lowest id first among equals."""
    return torch.sort(logits.double(), descending=True, stable=True).indices


def probabilities(edited: Tensor, settings: RowSettings) -> Tensor:
    """[vocab] float64: temperature, then min_p, top_k, and top_p over what those two keep."""
    weights = torch.exp((edited - edited.max()) / settings.temperature)
    order = ranked(edited)
    in_order = weights[order]
    kept = int((in_order >= settings.min_p).sum())
    if settings.top_k > 0:
        kept = min(kept, settings.top_k)
    kept = max(kept, 1)
    if settings.top_p < 1.0:
        running = in_order[:kept].cumsum(0)
        kept = min(kept, int((running < settings.top_p * running[-1]).sum()) + 1)
    found = torch.zeros_like(weights)
    found[order[:kept]] = in_order[:kept] / in_order[:kept].sum()
    return found


def log_probabilities(logits: Tensor) -> Tensor:
    """[vocab] float64, of the model's own distribution."""
    return torch.log_softmax(logits.double(), -1)
