"""The three lanes of an engine on one GPU, with the memory that they share."""

from millrace.kernels.cuda_launch import Launcher
from millrace.kernels.cuda_sampling import SamplerTables
from millrace.runtime.cuda.decode import CudaDecode
from millrace.runtime.cuda.driver import CudaDriver
from millrace.runtime.cuda.prefill import CudaPrefill
from millrace.runtime.cuda.rows import DeviceRows
from millrace.runtime.cuda.sampling import CudaSampling
from millrace.runtime.cuda.staging import PinnedRing
from millrace.runtime.cuda.swap import CudaSwap, SwappableModel
from millrace.runtime.kv.tables import BlockTables
from millrace.runtime.lanes import Lanes
from millrace.runtime.types import BLOCK_SIZE


def cuda_lanes(
    driver: CudaDriver,
    launcher: Launcher,
    model: SwappableModel,
    *,
    num_blocks: int,
    max_rows: int,
    max_model_len: int,
    max_logprobs: int,
    use_graphs: bool = True,
    swap_slots: int = 0,
) -> Lanes:
    """Allocates KV storage and all that has to stand at fixed addresses; `CudaDecode.warm_up` captures the graphs.

    `swap_slots`: blocks that the host has room for; 0 makes no swap lane."""
    spec, device = model.spec, driver.device
    max_blocks = -(-max_model_len // BLOCK_SIZE)
    ring = PinnedRing(driver)
    kv = model.allocate_kv(num_blocks)
    # One row more than the scheduler has: graphs put it where a batch is smaller than they are.
    tables = SamplerTables(max_rows + 1, spec.vocab_size, device, edit_slots=max_rows)
    rows = DeviceRows(max_rows, tables.last_tokens)
    return Lanes(
        CudaPrefill(driver, ring, model, kv, BlockTables(max_rows, max_blocks)),
        CudaDecode(driver, ring, model, kv, rows, max_blocks, use_graphs=use_graphs),
        CudaSampling(driver, ring, launcher, tables, rows, spec.eos_token_ids, max_logprobs),
        CudaSwap(driver, launcher, model, kv, swap_slots) if swap_slots else None,
    )
