"""Sampling of one step: from a batch of logits to one token per row, and the log probabilities that were asked for."""

from millrace.kernels.philox import uniforms
from millrace.runtime.sampling.batch import Sampled, SamplerState
from millrace.runtime.sampling.logprobs import prompt_logprobs

__all__ = ["Sampled", "SamplerState", "prompt_logprobs", "uniforms"]
