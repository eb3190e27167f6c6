"""What the ways to sample on the host share: settings, codes, and what each offers. Nothing here wants torch.

`host_sampling` chooses one and checks arguments, `cpu_sampling` and `numpy_sampling` compute. Either way a row's result
has the same bits in every batch and for any number of threads. Between the two the last bits of exp differ, so that a
draw whose random number falls that near a bound may give the neighbouring token.
"""

import abc

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]
Index = npt.NDArray[np.signedinteger]
Settings = npt.NDArray[np.void]  # of DRAW_DTYPE

LOGIT_BLOCK = 64  # ids per block of maxima and sums, a power of two

# What the draws of a row depend on besides its logits; struct Settings of cpu/sampling.cpp.
DRAW_DTYPE = np.dtype(
    [
        ("seed", "u8"),
        ("choice", "u8"),
        ("position", "i8"),  # tokens drawn before; a draw adds one
        ("greedy", "i8"),  # 1 takes the most likely id, whatever stands below
        ("top_k", "i8"),  # the vocabulary's size or more is off; 0 marks a row that is not in use
        ("top_p", "f8"),  # 1 is off
        ("min_p", "f8"),  # 0 is off
        ("temperature", "f8"),  # above 0
    ]
)
BROKEN, EMPTY = -1, -2  # in place of a token: NaN or an infinity among the logits; all of them are -inf


class TokenDrawer(abc.ABC):
    """Draws tokens from logits; made by `host_sampling.token_drawer`. Used by one thread at a time."""

    def __init__(self, table: Settings, vocab: int) -> None:
        self.table, self.vocab = table, vocab

    @abc.abstractmethod
    def __call__(self, logits: Floats, rows: Index, source: Index | None = None) -> tuple[Tokens, int]:
        """Draws one token for each of some rows, and advances their positions.

        A greedy row takes the most likely id, the lowest one on ties. Another takes one number in [0, 1) from Philox
        (`philox.uniforms`) of its seed, choice and position, and inverts with it the cumulative distribution of
        exp(logit / temperature): over all ids in the order of the blocks of `block_sums`, or, where a filter is on,
        over the ids that min_p, then top_k, then top_p over what those two keep have left, the most likely one first.

        Args:
            logits: [num_logits, vocab] float32, whose rows may lie apart.
            rows: [num_draws] int32 or int64, distinct rows of the table that are in use.
            source: [num_draws] int32 or int64, the row of the logits that each draw reads; None is the identity.

        Returns:
            Tokens [num_draws], BROKEN or EMPTY where the logits allow none, and how many those are; such a row's
            position stays.

        Raises:
            ValueError: an argument is of another shape or type, or names a row that it may not.
        """

    def check(self, logits: Floats, rows: Index, source: Index) -> None:
        """Raises ValueError, with the numbers, unless a draw may have these arguments."""
        if logits.ndim != 2 or logits.shape[1] != self.vocab or logits.dtype != np.float32:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}, but float32 [num_logits, {self.vocab}] is needed"
            )
        if not has_whole_rows(logits):
            raise ValueError(
                f"logits have strides of {logits.strides} bytes, but neighbouring ids must lie side by side and rows"
                " whole numbers of float32 apart"
            )
        for name, index in (("rows", rows), ("logits_index", source)):
            if index.dtype not in (np.int32, np.int64) or index.ndim != 1:
                raise ValueError(
                    f"{name} is {index.dtype} {list(index.shape)}, but int32 or int64 [num_draws] is needed"
                )
        named, sources = rows.tolist(), source.tolist()
        if len(sources) != len(named):
            raise ValueError(f"logits_index has {len(sources)} entries for {len(named)} rows")
        if sources and not 0 <= min(sources) <= max(sources) < len(logits):
            raise ValueError(f"logits_index reaches {max(sources)}, but there are {len(logits)} rows of logits")
        if not all(0 <= row < len(self.table) and self.table["top_k"][row] > 0 for row in named):
            raise ValueError(f"rows {named} name one that has not joined")
        if len(set(named)) != len(named):
            raise ValueError(f"rows {named} name one twice; a row draws one token per step")


class Sampling(abc.ABC):
    """One way to sample on the host. Arguments are those of the fronts in `host_sampling`, which has checked them."""

    name: str

    @abc.abstractmethod
    def block_maxima(self, logits: Floats) -> Floats: ...

    @abc.abstractmethod
    def block_sums(self, logits: Floats, row_max: Floats) -> Floats: ...

    @abc.abstractmethod
    def token_drawer(self, table: Settings, vocab: int) -> TokenDrawer: ...


def num_blocks(vocab: int) -> int:
    return -(-vocab // LOGIT_BLOCK)


def has_whole_rows(logits: Floats) -> bool:
    """Whether each row of logits [rows, vocab] is one run of numbers; rows may lie apart, by whole numbers of them."""
    rows, vocab = logits.shape
    between_rows, between_ids = logits.strides  # without a meaning where there is nothing between
    return (between_ids == logits.itemsize or vocab == 1 or rows == 0) and between_rows % logits.itemsize == 0
