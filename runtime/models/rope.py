"""Rotary position embeddings: frequencies from config.json, as transformers 4 and 5 write them, and the cos/sin table.

Sources: RoFormer (Su et al. 2021); position interpolation (Chen et al. 2023); YaRN (Peng et al. 2023);
the frequency bands of Llama 3.1.
"""

import math
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from millrace.runtime.models.config import ConfigReader

_Scaling = Callable[["_RopeSettings"], tuple[Tensor, float]]


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes:
    inverse_frequencies: [head_dim / 2] float32, radians per position.
    amplitude: factor on cos and sin (YaRN's attention factor).
    max_positions: positions that the frequencies were made for.
    """

    inverse_frequencies: Tensor
    amplitude: float
    max_positions: int

    def cos_sin(self, num_positions: int) -> Tensor:
        """The table [num_positions, head_dim] float32: cos in the first half of a row, sin in the second."""
        # Angles in float32, as the models were trained with: float64 angles would differ at large positions.
        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = torch.outer(positions, self.inverse_frequencies)  # [num_positions, head_dim / 2]
        table = torch.empty(num_positions, 2 * angles.shape[1])
        half = angles.shape[1]
        torch.cos(angles, out=table[:, :half])
        torch.sin(angles, out=table[:, half:])
        return table.mul_(self.amplitude) if self.amplitude != 1.0 else table


class _RopeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a scaling rule reads; `section` is rope_parameters or rope_scaling."""

    section: ConfigReader
    theta: float
    head_dim: int
    original_positions: int

    def plain(self) -> Tensor:
        """Unscaled inverse frequencies, [head_dim / 2]."""
        return torch.reciprocal(self.theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim))


def read_rope(config: ConfigReader, head_dim: int) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

    Raises CheckpointError for a rope type, or a part of one, that is not supported.
    """
    if head_dim % 2:
        config.refuse("head_dim", "even, since rotary embeddings turn pairs")
    section = config.section("rope_parameters") or config.section("rope_scaling") or ConfigReader({})
    if any(isinstance(value, dict) for value in section.values.values()):
        config.refuse("rope_parameters", "one flat object: rotary embeddings per layer type are not supported")
    for reader in (config, section):
        if reader.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            reader.refuse("partial_rotary_factor", "1.0 or absent")
    type_key = "rope_type" if section.values.get("rope_type") is not None else "type"
    rope_type = section.one_of(type_key, tuple(_SCALINGS), "default")
    theta = section.number("rope_theta", config.number("rope_theta", 10000.0))
    positions = config.integer("max_position_embeddings")
    # Some checkpoints keep the length before scaling beside the section; it wins there, as in transformers.
    owner = config if config.values.get("original_max_position_embeddings") is not None else section
    original = owner.integer("original_max_position_embeddings", positions)
    settings = _RopeSettings(section=section, theta=theta, head_dim=head_dim, original_positions=original)
    frequencies, amplitude = _SCALINGS[rope_type](settings)
    if rope_type == "yarn":
        # Qwen's instructions add YaRN to config.json and leave max_position_embeddings at the length before scaling.
        positions = max(positions, int(original * section.number("factor")))
    return Rope(inverse_frequencies=frequencies, amplitude=amplitude, max_positions=positions)


def _default(settings: _RopeSettings) -> tuple[Tensor, float]:
    return settings.plain(), 1.0


def _linear(settings: _RopeSettings) -> tuple[Tensor, float]:
    return settings.plain() / settings.section.number("factor"), 1.0


def _dynamic(settings: _RopeSettings) -> tuple[Tensor, float]:
    # Dynamic NTK changes the frequencies only past max_position_embeddings, where it would turn all cached keys anew
    # at each length. Up to that length, which is as far as this model is served, it equals the plain frequencies.
    settings.section.number("factor")
    return settings.plain(), 1.0


def _llama3(settings: _RopeSettings) -> tuple[Tensor, float]:
    section = settings.section
    factor = section.number("factor")
    low_factor = section.number("low_freq_factor")
    high_factor = section.number("high_freq_factor")
    if high_factor <= low_factor:
        section.refuse("high_freq_factor", f"above low_freq_factor ({low_factor:g})")
    frequencies = settings.plain()
    wavelengths = 2 * math.pi / frequencies
    # 1 keeps a frequency (short waves), 0 divides it by the factor (waves longer than the original context).
    kept = (settings.original_positions / wavelengths - low_factor) / (high_factor - low_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies, 1.0


def _factors(settings: _RopeSettings) -> tuple[Tensor, float]:
    """GGUF files hold Llama 3's scaling as what each frequency is divided by; config.json has no such type."""
    frequencies, factors = settings.plain(), settings.section.values.get("factors")
    if (
        not isinstance(factors, list)
        or len(factors) != len(frequencies)
        or not all(isinstance(factor, float) and 0.0 < factor < math.inf for factor in factors)
    ):
        settings.section.refuse("factors", f"{len(frequencies)} positive numbers, one for each frequency")
    return frequencies / torch.tensor(factors), 1.0


def _yarn(settings: _RopeSettings) -> tuple[Tensor, float]:
    section, dim = settings.section, settings.head_dim
    factor = section.number("factor")

    def dimension(rotations: float) -> float:
        """The dimension that turns this many times within the original context."""
        wavelength = settings.original_positions / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(settings.theta))

    low, high = dimension(section.number("beta_fast", 32.0)), dimension(section.number("beta_slow", 1.0))
    if section.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as in the reference: a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = settings.plain()
    frequencies = frequencies / factor * ramp + frequencies * (1 - ramp)
    return frequencies, _yarn_amplitude(section, factor)


def _yarn_amplitude(section: ConfigReader, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if section.values.get("attention_factor") is not None:
        return section.number("attention_factor")
    if section.values.get("mscale") and section.values.get("mscale_all_dim"):
        return scale(section.number("mscale")) / scale(section.number("mscale_all_dim"))
    return scale(1.0)


_SCALINGS: dict[str, _Scaling] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "factors": _factors,
    "llama3": _llama3,
    "yarn": _yarn,
}
