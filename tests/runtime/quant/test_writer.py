"""Layouts of published formats, read back by what the formats' own definitions say."""

import pytest
import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.quant import writer


def words(tensor: Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in row] for row in tensor.tolist()]


def bits_of(stream: list[int], start: int, count: int) -> int:
    """`count` bits from bit `start` of 32-bit words, lowest first."""
    return sum(((stream[at // 32] >> (at % 32)) & 1) << (at - start) for at in range(start, start + count))


def weight(outputs: int, inputs: int, group: int, bits: int, seed: int = 1) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // group, generator=generator).half()
    zeros = torch.randint(1, 1 << bits, (outputs, inputs // group), generator=generator).half()
    return QuantizedWeight(q, scales, zeros, 8 if bits == 8 else 4)


def test_awq() -> None:
    given = weight(16, 32, 16, 4)
    stored = writer.awq_tensors("x", given)
    assert stored["x.qweight"].shape == (32, 2)
    assert stored["x.qzeros"].shape == (2, 2)
    assert {tensor.dtype for tensor in stored.values()} == {torch.int32, torch.float16}
    # AutoAWQ's gemm order: the nibbles of a word, lowest first, are outputs 0, 2, 4, 6, 1, 3, 5, 7.
    place = {output: nibble for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    packed, zeros = words(stored["x.qweight"]), words(stored["x.qzeros"])
    wide = torch.empty(16, 32)
    for out in range(16):
        for column in range(32):
            q = (packed[column][out // 8] >> (4 * place[out % 8])) & 15
            zero = (zeros[column // 16][out // 8] >> (4 * place[out % 8])) & 15
            wide[out, column] = (q - zero) * stored["x.scales"][column // 16, out].float()
    assert torch.equal(wide, given.widen())


def test_awq_order_in_one_word() -> None:
    given = QuantizedWeight(
        torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 2), torch.ones(8, 1).half(), torch.ones(8, 1).half(), 4
    )
    assert words(writer.awq_tensors("x", given)["x.qweight"]) == [[0x75316420]] * 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq(bits: int, ordered: bool) -> None:
    given = weight(32, 64, 16, bits)
    if ordered:
        given = given._replace(order=torch.randperm(64, generator=torch.Generator().manual_seed(3)))
    stored = writer.gptq_tensors("x", given, bits)
    assert stored["x.qweight"].shape == (64 * bits // 32, 32)
    assert stored["x.qzeros"].shape == (4, 32 * bits // 32)
    assert (stored["x.scales"].dtype, stored["x.g_idx"].dtype) == (torch.float16, torch.int32)
    packed = words(stored["x.qweight"].t())  # a row for each output
    zeros = words(stored["x.qzeros"])
    wide = torch.empty(32, 64)
    for out in range(32):
        for column in range(64):
            group = int(stored["x.g_idx"][column])
            zero = bits_of(zeros[group], out * bits, bits) + 1  # version 1 stores them less 1
            wide[out, column] = (bits_of(packed[out], column * bits, bits) - zero) * stored["x.scales"][
                group, out
            ].float()
    torch.testing.assert_close(wide, given.widen(), rtol=0, atol=0)


def test_packed_integers_of_three_bits_cross_words() -> None:
    values = torch.arange(32, dtype=torch.uint8)[None] % 8
    stream = words(writer.pack_bits(values, 3))[0]
    assert len(stream) == 3
    assert [bits_of(stream, 3 * at, 3) for at in range(32)] == values[0].tolist()
    assert words(writer.pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)) == [[0x321]]


def test_compressed_tensors_libraries_agree() -> None:
    compressed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    given = weight(10, 48, 16, 4)._replace(zeros=torch.full((10, 3), 8.0).half())
    stored = writer.packed_tensors("x", given)
    assert stored["x.weight_shape"].tolist() == [10, 48]
    signed = compressed.unpack_from_int32(stored["x.weight_packed"], 4, torch.Size((10, 48)))
    assert torch.equal(signed.int(), given.q.int() - 8)
    with pytest.raises(ValueError, match="x: all zeros must be 8"):
        writer.packed_tensors("x", weight(10, 48, 16, 4))


def test_int8_and_fp8() -> None:
    given = weight(4, 8, 8, 8)._replace(zeros=torch.full((4, 1), 128.0).half())
    stored = writer.int8_tensors("x", given)
    assert torch.equal(stored["x.weight"].float() * stored["x.weight_scale"].float(), given.widen())
    wide = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1e-4], [1.0], [50.0], [0.0]])
    eight = writer.round_to_fp8(wide)
    stored = writer.fp8_tensors("x", eight)
    assert stored["x.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(stored["x.weight"].float() * stored["x.weight_scale"], eight.widen())
    # Three bits behind the leading one; below the smallest normal number, 2^-6, steps of 2^-9.
    assert ((eight.widen() - wide).abs() <= wide.abs() / 16 + eight.scales * 2**-10).all()
    assert torch.equal(eight.scales.to(torch.bfloat16).float(), eight.scales)
