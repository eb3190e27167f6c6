"""What a step does when the GPU has no memory for it: it is computed in halves, and only what does not fit even alone
fails."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from millrace.runtime.cuda.driver import CudaDriver
from millrace.runtime.device import StepMemoryError

Part = TypeVar("Part")


def in_halves(
    driver: CudaDriver,
    parts: Sequence[Part],
    compute: Callable[[Sequence[Part]], None],
    split: Callable[[Part], tuple[Part, Part] | None] = lambda part: None,
) -> list[tuple[Part, StepMemoryError]]:
    """Computes all parts at once if the memory lets it, else the halves one after the other, and so on down.

    A computation that ran out of memory is repeated, so it must be harmless to begin twice: keys and values are written
    again, into the same slots.

    Args:
        compute: raises torch.OutOfMemoryError where the parts do not fit together.
        split: cuts a part that does not fit alone, in order; None if it cannot be cut.

    Returns:
        Parts that did not fit even alone, with the error for each; everything else was computed.
    """
    if not parts:
        return []
    try:
        compute(parts)
        return []
    except torch.OutOfMemoryError as error:
        shortage = str(error).partition("\n")[0]
    # Out of the except block: the traceback holds the frames, and with them the tensors, of the attempt that failed.
    driver.release_cached()
    if len(parts) > 1:
        middle = (len(parts) + 1) // 2
        halves: tuple[Sequence[Part], Sequence[Part]] = (parts[:middle], parts[middle:])
    else:
        pieces = split(parts[0])
        if pieces is None:
            free, total = driver.memory()
            return [(parts[0], StepMemoryError(f"out of GPU memory, {free} of {total} bytes free: {shortage}"))]
        halves = ([pieces[0]], [pieces[1]])
    failed = in_halves(driver, halves[0], compute, split)
    if failed and len(parts) == 1:
        return [(parts[0], failed[0][1])]  # what comes behind it would read keys that are not there
    behind = in_halves(driver, halves[1], compute, split)
    return [(parts[0], behind[0][1])] if behind and len(parts) == 1 else failed + behind
