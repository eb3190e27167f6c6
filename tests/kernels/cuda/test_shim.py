"""The shim itself: what it computes, what it refuses, and that a crash fails one test alone."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from millrace.kernels.cuda_compile import Kernel
from shim import isolation
from shim.build import ShimBuildError, rewrite
from shim.fence import fenced, nan_filled
from shim.isolation import run_isolated
from shim.launcher import ShimError, ShimLauncher

HERE = Path(__file__).parent
PARAMS = np.dtype([("x", "u8"), ("y", "u8"), ("n", "i4"), ("k", "i4")], align=True)
FourWays = Callable[[Callable[["Probe"], object]], None]


class Probe(ShimLauncher):
    """Launches the kernels of shim/probes.cu."""

    def _read(self, name: str) -> str:
        return (HERE / "shim" / name).read_text() if name == "probes.cu" else super()._read(name)

    def run(
        self,
        name: str,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        k: int = 0,
        grid: int = 1,
        block: int = 32,
        shared: int = 0,
        defines: tuple[tuple[str, str], ...] = (("MR_T", "bf16"),),
    ) -> None:
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (x, y)]
        params = np.array((*pointers, 0 if y is None else y.numel(), k), PARAMS)[()]
        self.launch(Kernel("probes.cu", name, defines), (grid, 1, 1), block, params, shared_bytes=shared, stream=0)


@pytest.fixture
def probes(shim_cache: Path) -> list[Probe]:
    """The four ways."""
    ways = [(backward, late) for backward in (False, True) for late in (True, False)]
    return [Probe(backward=backward, late_copies=late, cache_dir=shim_cache) for backward, late in ways]


def test_conversions_agree_with_torch_everywhere(probes: list[Probe]) -> None:
    every = torch.arange(65536, dtype=torch.int32)
    bits16, bits8 = every.to(torch.uint16), torch.arange(256, dtype=torch.int32).to(torch.uint8)
    # Floats with every sign, exponent and the bits around each rounding, and their neighbours.
    patterns = (every.long()[:, None] << 16 | torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    patterns = torch.cat((patterns, torch.arange(0x32000000, 0x48000000, 4093)))
    floats = fenced(torch.where(patterns >= 2**31, patterns - 2**32, patterns).to(torch.int32).view(torch.float32))
    saturated = floats.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    expected = [
        bits16.view(torch.float16).float(),
        bits16.view(torch.bfloat16).float(),
        bits8.view(torch.float8_e4m3fn).float(),
        floats.half().float(),
        floats.bfloat16().float(),
        saturated,
        floats.half().float(),
        floats.bfloat16().float(),
    ]
    for k, wanted in enumerate(expected):
        out = nan_filled(len(wanted), dtype=torch.float32)
        probes[0].run("conversions", floats, out, k=k, grid=-(-len(wanted) // 256), block=256)
        assert torch.equal(out.isnan(), wanted.isnan())
        assert torch.equal(out.nan_to_num(0.0), wanted.nan_to_num(0.0)), f"conversion {k}"


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_copies_fragments_and_mma_make_a_product(probes: list[Probe], name: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    x = fenced(torch.cat((a.flatten(), b.flatten())))
    for probe in probes:
        y = nan_filled(16, 8, dtype=torch.float32)
        probe.run("product", x, y, defines=(("MR_T", name),))
        torch.testing.assert_close(y.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fallback", [False, True], ids=["switch", "ucontext"])
def test_collectives(probes: list[Probe], fallback: bool) -> None:
    lane = torch.arange(64) % 32
    v = torch.arange(64) + 100
    base = torch.arange(64) // 32 * 32 + 100
    turns = torch.where(lane < 20, 3 * ((lane + 1) % 20), lane ^ 1)
    expected = [
        base + 5,
        base + lane // 8 * 8 + 3,
        base + (lane ^ 9),
        torch.where(lane >= 3, v - 3, v),
        torch.where(lane % 16 < 14, v + 2, v),
        torch.tensor(sum(1 << i for i in range(0, 32, 3))).expand(64),
        torch.tensor(1).expand(64),
        torch.tensor(496).expand(64),
        torch.tensor(0).expand(64),
        torch.tensor(7).expand(64),
        torch.tensor(496).expand(64),
        lane // 8 * 8 + 7,
        torch.tensor(2016).expand(64),
        torch.tensor(63).expand(64),
        turns,
        turns.view(2, 32).flip(1).flatten(),
        torch.tensor(3201).expand(64),
        lane ^ 1,
        torch.tensor(1).expand(64),
        torch.tensor(10000 + 8000 + 400 + 31).expand(64),
        torch.tensor(1).expand(64),
    ]
    defines = (("MR_T", "bf16"), *((("MR_EMU_UCONTEXT", "1"),) if fallback else ()))
    for probe in probes:
        y = fenced(torch.zeros(2 * 64, 32, dtype=torch.int32))
        probe.run("collectives", None, y, grid=2, block=64, defines=defines)
        assert torch.equal(y[:64], y[64:])
        for column, wanted in enumerate(expected):
            assert y[:64, column].tolist() == [int(x) - 2**32 if x >= 2**31 else int(x) for x in wanted], column
        assert probe.num_switches > 0


def test_threads_warps_and_blocks_run_in_the_order_of_the_way(probes: list[Probe]) -> None:
    for probe in probes:
        for k in (0, 1):  # with the counter set by the kernel, and left at the poison of shared memory
            counter, y = fenced(torch.zeros(4, dtype=torch.int32)), nan_filled(3, 96, dtype=torch.int32)
            probe.run("order", counter, y, k=k, grid=3, block=96)
            blocks = y[:, 0] // 1000
            y[:, 0] %= 1000
            step = -1 if probe.backward else 1
            assert blocks.tolist() == [0, 1, 2][::step]
            assert y.tolist() == [list(range(96))[::step]] * 3


def test_copies_land_at_their_wait_or_at_once(probes: list[Probe]) -> None:
    x = fenced(torch.arange(1.0, 9.0))
    for probe in probes:
        y = nan_filled(2, 8, dtype=torch.float32)
        probe.run("copies", x, y, block=2, shared=2 * 12 * 4)
        first, second = y[:, :6].nan_to_num(-1.0).tolist()
        if probe.late_copies:
            assert first == [-1, 2, -1, -1, 6, 0]  # thread 0 has two groups, and waits for the first
            assert second == [-1, 2, 5, -1, 6, 0]  # thread 1 has three, and waits for two
        else:
            assert first == second == [1, 2, 5, 0, 6, 0]


def test_the_last_block_sees_what_all_have_left(probes: list[Probe]) -> None:
    x = fenced(torch.randn(5, 64))
    for probe in probes:
        y = fenced(torch.zeros(8))
        for _ in range(2):
            y[1:] = torch.nan
            probe.run("last_block", x, y, grid=5, block=64)
            assert y.view(torch.int32)[0] == 0
            torch.testing.assert_close(y[1].double(), x.double().sum(), rtol=1e-5, atol=1e-5)


MISDEEDS = {
    0: r"deadlock: 40 of 64 threads wait at __syncthreads, 24 in a warp collective .*__syncwarp",
    1: r"__shfl_xor_sync.*exited|the thread exited while lane \d+ waits for it in __shfl_xor_sync",
    2: r"met in different collectives: (__shfl_sync and __syncwarp|__syncwarp and __shfl_sync)",
    3: r"deadlock: lanes \d+ and \d+ of warp \d wait with different masks",
    4: r"__shfl_sync: lane \d+ reads lane \d+, which does not take part",
    5: r"__syncwarp.*exited|the thread exited while lane \d+ waits for it in __syncwarp",
    6: r"__syncwarp.*exited|the thread exited while lane \d+ waits for it in __syncwarp",
    7: r"__syncwarp: lane \d+ is not in its own mask",
    8: r"invalid memory access at address \(nil\)",
    9: r"invalid memory access at address 0x",
    10: r"invalid memory access at address 0x",
    11: r"store16: address 0x\w+ is not a multiple of 16",
    12: r"cp.async, shared address: address 0x\w+ is not a multiple of 16",
    13: r"cp.async: 16 bytes at offset 256 are not in shared memory, of which 256 bytes are dynamic",
    14: r"cp.async: 16 bytes at offset -?\d+ are not in shared memory",
    15: r"ldmatrix: 16 bytes at offset \d+ are not in shared memory",
    16: r"wrote \d+ bytes behind the 256 bytes of the dynamic shared memory",
    17: r"wrote \d+ bytes behind the 16 bytes of fixed",
    18: r"wrote \d+ bytes before fixed",
    19: r"arithmetic fault",
    20: r"__trap\(\)",
    21: r"ldmatrix.*exited|the thread exited while lane \d+ waits for it in ldmatrix",
    22: r"local variables of over 96 KB",
    23: r"a trap that g\+\+ put|arithmetic fault",
    24: r"__activemask\(\) has no defined value",
}


@pytest.mark.parametrize("fallback", [False, True], ids=["switch", "ucontext"])
def test_misdeeds_are_named_with_their_place(probes: list[Probe], fallback: bool) -> None:
    defines = (("MR_T", "bf16"), *((("MR_EMU_UCONTEXT", "1"),) if fallback else ()))
    for probe in probes[:: 3 if fallback else 1]:
        for k, message in MISDEEDS.items():
            x, y = fenced(torch.zeros(1024)), fenced(torch.zeros(1024))  # each of one page
            with pytest.raises(ShimError) as caught:
                probe.run("misdeeds", x, y, k=k, block=64, shared=256, defines=defines)
            place = rf"misdeeds.*({message}).*block 0,0,0(\)| thread \d)"
            assert re.search(place, str(caught.value)), f"{k} of {probe}: {caught.value}"
        # The launcher is as good as new afterwards.
        y = nan_filled(2, 8, dtype=torch.float32)
        probe.run("copies", fenced(torch.ones(8)), y, block=2, shared=96)
        assert y[0, 4] == 1


def test_wrong_launches_are_refused(probes: list[Probe]) -> None:
    probe = probes[0]
    kernel, params = Kernel("probes.cu", "copies", (("MR_T", "bf16"),)), np.zeros((), PARAMS)[()]
    with pytest.raises(ShimError, match="a block of 1025 threads"):
        probe.launch(kernel, (1, 1, 1), 1025, params, stream=0)
    with pytest.raises(ShimError, match="grid"):
        probe.launch(kernel, (1, 65536, 1), 32, params, stream=0)
    with pytest.raises(ShimError, match="300000 bytes of dynamic shared memory"):
        probe.launch(kernel, (1, 1, 1), 32, params, shared_bytes=300000, stream=0)
    with pytest.raises(ShimError, match="argument record has 24 bytes, but 8 were passed"):
        probe.launch(kernel, (1, 1, 1), 32, np.zeros((), [("x", "u8")])[()], stream=0)
    with pytest.raises(ShimBuildError, match="has no such kernel"):
        probe.launch(kernel._replace(name="nothing"), (1, 1, 1), 32, params, stream=0)


def test_rewriting_keeps_the_lines_and_refuses_what_it_does_not_know() -> None:
    text = (
        "/* two\nlines */ struct P { int n; };\n"
        'extern "C" __global__ void\n__launch_bounds__(max(64, 2)) name(const P p) {\n'
        "    extern __shared__ __align__(16) unsigned char bytes[];\n"
        "    static __shared__ float sums[4]\n[8]; __shared__ bool last;\n}\n"
    )
    done = rewrite("a.cu", text)
    assert done.count("\n") == text.count("\n") + 2
    assert "__shared__" not in done and "MR_EMU_KERNEL(name, P)" in done
    with pytest.raises(ShimBuildError, match="one variable per __shared__ declaration"):
        rewrite("a.cu", "__shared__ float a[2], b;")
    with pytest.raises(ShimBuildError, match="0 of 1 kernels read"):
        rewrite("a.cu", 'extern "C" __global__ void name(int n, float x) {}')


def test_an_edit_needs_exactly_one_place(shim_cache: Path) -> None:
    launcher = ShimLauncher(cache_dir=shim_cache, edits={"norm.cu": [("MR_T* residual;", ""), ("float", "double")]})
    with pytest.raises(ShimBuildError, match=r"norm.cu: 'float' is there \d+ times"):
        launcher.launch(Kernel("norm.cu", "mr_rms_norm"), (1, 1, 1), 32, np.zeros((), PARAMS)[()], stream=0)


def test_what_ends_a_child_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise AssertionError("seven is not eight")

    def spinning() -> None:
        while True:
            pass

    assert run_isolated(lambda: None).kind == "passed"
    outcome = run_isolated(failing)
    assert (outcome.kind, outcome.name) == ("failed", "AssertionError") and "seven is not eight" in outcome.text
    assert run_isolated(lambda: int("x"))[:2] == ("error", "ValueError")
    assert run_isolated(lambda: pytest.skip("not here")) == ("skipped", "Skipped", "not here")
    assert run_isolated(os.abort)[:2] == ("crashed", "SIGABRT")
    assert run_isolated(lambda: os._exit(3))[:2] == ("crashed", "status 3")
    monkeypatch.setattr(isolation, "LIMIT_S", 0.2)
    assert run_isolated(spinning)[:2] == ("crashed", "Timeout")


@pytest.mark.slow
def test_a_crash_fails_one_test_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import os\n"
        "def test_before(shim_cache): pass\n"
        "def test_crash(shim_cache): os.abort()\n"
        "def test_wrong(shim_cache): assert shim_cache is None\n"
        "def test_after(shim_cache): pass\n"
        "def test_caught(planted): planted({}, lambda launcher: os.abort())\n"
        "def test_missed(planted): planted({}, lambda launcher: None)\n"
        "def test_error(planted): planted({}, lambda launcher: int('x'))\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q", "-rA", "test_three.py"]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    results = {
        line.split("::")[1].split(" ")[0]: line.split(" ")[0]
        for line in done.stdout.splitlines()
        if "test_three.py::" in line
    }
    failed = {"test_crash", "test_wrong", "test_missed", "test_error"}
    assert {name for name, result in results.items() if result == "FAILED"} == failed, done.stdout
    assert {name for name, result in results.items() if result == "PASSED"} == {
        "test_before",
        "test_after",
        "test_caught",
    }
    assert "ended with SIGABRT" in done.stdout and "the planted bug was not caught: passed" in done.stdout
