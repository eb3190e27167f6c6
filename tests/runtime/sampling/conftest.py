"""A slow and obvious sampler in float64 loops, to hold the real one against."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch

from millrace.kernels import cpu_build, host_sampling
from millrace.kernels.cpu_library import load_library
from millrace.kernels.cpu_sampling import CpuSampling
from millrace.kernels.numpy_sampling import NumpySampling
from millrace.kernels.sampling import Sampling
from millrace.runtime.types import SamplingParams


class Filtered(NamedTuple):
    probability: dict[int, float]  # of every token that can be drawn
    ranked: list[int]  # the same tokens, most likely first, lowest id first on ties
    ambiguous: bool  # a filter's bound lies so near a token that rounding may decide


class Reference:
    """One row: the steps of the documentation, one after the other, one token at a time."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int] = ()
    ) -> None:
        self.params, self.prompt, self.output, self.eos = params, list(prompt), list(output), list(eos)

    def edited(self, logits: Sequence[float]) -> list[float]:
        p, x = self.params, [float(value) for value in logits]
        ends = set(p.stop_token_ids) | (set() if p.ignore_eos else set(self.eos))
        for token in range(len(x)):
            if p.allowed_token_ids is not None and token not in p.allowed_token_ids:
                x[token] = -math.inf
            if token in p.banned_token_ids:
                x[token] = -math.inf
            x[token] += p.logit_bias.get(token, 0.0)
            if len(self.output) < p.min_tokens and token in ends:
                x[token] = -math.inf
            if token in self.prompt or token in self.output:
                x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
            times = self.output.count(token)
            x[token] -= p.frequency_penalty * times + p.presence_penalty * (times > 0)
        return x

    def greedy(self, logits: Sequence[float]) -> int:
        x = self.edited(logits)
        return x.index(max(x))

    def filtered(self, logits: Sequence[float]) -> Filtered:
        p, x = self.params, self.edited(logits)
        top = max(x)
        weight = {token: math.exp((value - top) / p.temperature) for token, value in enumerate(x) if value > -math.inf}
        ranked = sorted(weight, key=lambda token: (-x[token], token))
        ambiguous = any(abs(weight[token] / p.min_p - 1.0) < 1e-4 for token in ranked if p.min_p and x[token] != top)
        ranked = [token for token in ranked if weight[token] >= p.min_p]
        if p.top_k > 0:
            ranked = ranked[: p.top_k]
        if p.top_p < 1.0:
            total, running = sum(weight[token] for token in ranked), 0.0
            for place, token in enumerate(ranked):
                running += weight[token] / total
                ambiguous |= abs(running - p.top_p) < 1e-4
                if running >= p.top_p:
                    ranked = ranked[: place + 1]
                    break
        total = sum(weight[token] for token in ranked)
        return Filtered({token: weight[token] / total for token in ranked}, ranked, ambiguous)


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    return Reference


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=["numpy", "cpu"])
def sampling(request: pytest.FixtureRequest) -> Sampling:
    if request.param == "numpy":
        return NumpySampling()
    if cpu_build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    return CpuSampling(load_library(cpu_build.build_library(cpu_build.Toolchain())))


@pytest.fixture(autouse=True)
def default_sampling(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_sampling, "default_sampling", lambda: sampling)
