"""Every kernel on the device against float64, and against the host shim from the same inputs."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from gpu.case_list import Case, Checked, Place, cases, error_of
from gpu.context import Context
from gpu.plan import Row

SHIM_TOLERANCE = 2.0  # times a case's own: both round, and each in its own order


def device_place() -> Place:
    from millrace.kernels.cuda_launch import CupyLauncher

    return Place(CupyLauncher(0), "cuda", torch.cuda.current_stream().cuda_stream)


def shim_place() -> Place | None:
    """The host shim, where there is a C++ compiler for it."""
    from shim.build import compiler
    from shim.launcher import ShimLauncher

    return None if compiler() is None else Place(ShimLauncher(), "cpu", 0)


def seeded(case: Case, place: Place) -> Checked:
    torch.manual_seed(zlib.crc32(f"{case.group} {case.name}".encode()))
    return case.run(place)


def worst(checked: Checked) -> float:
    return max(error_of(got, want) for got, want in zip(checked.got, checked.want, strict=True))


def differing(device: list[Tensor], shim: list[Tensor]) -> float:
    """How far the device's results are from the shim's."""
    return max(error_of(got, want.double()) for got, want in zip(device, shim, strict=True))


def check(
    context: Context,
    chosen: list[Case],
    place: Place,
    shim: Place | None,
    settle: Callable[[], None] = lambda: torch.cuda.synchronize(),
) -> None:
    """One row for each group of cases, with its worst error; another one for the shim's.

    A case that raises fails its group; a device that has failed ends the part.
    """
    for group in dict.fromkeys(case.group for case in chosen):
        members = [case for case in chosen if case.group == group]
        if context.left < 2:
            context.say(f"   {group} and what follows: no time left")
            return
        for against in ("reference", "shim") if shim is not None else ("reference",):
            errors: list[tuple[float, float, str]] = []  # share of the tolerance, error, case
            note = ""
            for case in members:
                try:
                    checked = seeded(case, place)
                    settle()
                    error, tolerance = worst(checked), checked.tolerance
                    if against == "shim" and shim is not None:
                        error = differing(checked.got, seeded(case, shim).got)
                        tolerance = max(SHIM_TOLERANCE * checked.tolerance, 0.0)
                    share = error / tolerance if tolerance else (0.0 if error == 0 else float("inf"))
                    errors.append((share, error, case.name))
                except Exception as error:
                    note = f"{case.name}: {type(error).__name__}: {error}"[:300]
                    settle()  # raises if the device is lost
            share, error, name = max(errors, default=(float("inf"), float("inf"), ""))
            failed = bool(note) or not share <= 1.0
            text = note or f"{len(members)} cases; worst is {name} at {share:.0%} of what is allowed"
            context.row(Row(context.part.name, f"{group} vs {against}", _finite(error), "relative", note=text,
                            failed=failed))  # fmt: skip


def _finite(error: float) -> float:
    """JSON has no infinity."""
    return error if error < 1e30 else 1e30


def run(context: Context) -> None:
    chosen = [case for case in cases() if case.small or not context.small]
    shim = None if context.small else shim_place()
    if shim is None and not context.small:
        context.say("   no g++ or clang++: the device is not compared with the host shim")
    check(context, chosen, device_place(), shim)
