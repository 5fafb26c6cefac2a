"""Float32 on a CPU, where a token's result depends on nothing but its own sequence, to the last bit.

A stream that moves, is replayed or hits the prefix cache is computed in other batches and other chunks than before. If
sums then came out in another order, a token could flip where two candidates are nearly alike. So every sum here has one
order, whatever the batch:

- Matrix products take whole runs of rows (`whole_rows`); then each element is summed alone, in order of the inner axis.
- Attention takes keys in blocks of a fixed size from position 0 on, the rest filled with zeros, which add nothing; the
  softmax's denominator is one more column of the values, so that it is summed in that same order.
- Functions such as exp are computed by vectors, and the few elements left over at the end of a thread's share by other
  code with other roundings; whole runs of rows leave none over.

Found by measuring torch's MKL on one to three threads; `tests/unit/engine_tensors/test_exactness.py` checks the whole
model. Sliding windows begin at other places as a sequence grows, and keep ordinary rounding.

Letters: N matrices (rows and key heads), M queries of each, S keys, D head_dim.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

KEY_RUN = 128
_FEWEST_ROWS = 8
_ROWS_PER_THREAD = 4


def whole_rows(num_rows: int) -> int:
    """Rows to compute so that each element of a matrix product is summed in the same order, whatever their number.

    Below four rows for a thread the library takes another kernel, with another order. Threads share out whole rows.
    """
    run = max(_FEWEST_ROWS, _ROWS_PER_THREAD * torch.get_num_threads())
    return -(-num_rows // run) * run


def is_exact(tensor: torch.Tensor) -> bool:
    """Whether results of this tensor's kind must not depend on the company."""
    return tensor.dtype is torch.float32 and tensor.device.type == "cpu"


def padded(rows: torch.Tensor) -> torch.Tensor:
    """`[T, ...]` with zero rows added up to `whole_rows`; new memory, unless there is nothing to add."""
    spare = whole_rows(rows.shape[0]) - rows.shape[0]
    return functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, spare)) if spare else rows


def attend_exactly(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor:
    """Softmax attention.

    Args:
        queries: [N, M, D] float32.
        keys: [N, S, D], finite.
        values: likewise.
        visible: bool that broadcasts to [N, M, S], None for all. Every query sees something.

    Returns:
        [N, M, D], new memory.
    """
    num, num_queries, head_dim = queries.shape
    num_keys = keys.shape[1]
    spare_keys = -num_keys % KEY_RUN
    rows = functional.pad(queries, (0, 0, 0, whole_rows(num_queries) - num_queries))
    keys = functional.pad(keys, (0, 0, 0, spare_keys))
    counted = functional.pad(torch.cat((values, values.new_ones(num, num_keys, 1)), dim=2), (0, 0, 0, spare_keys))
    scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(1 / math.sqrt(head_dim))  # [N, M', S']
    scores[:, :, num_keys:] = -torch.inf
    if visible is not None:
        scores[:, :num_queries, :num_keys].masked_fill_(~visible, -torch.inf)
    weights = scores.sub_(scores.amax(dim=2, keepdim=True)).exp_()
    total = torch.bmm(weights[:, :, :KEY_RUN], counted[:, :KEY_RUN])  # [N, M', D + 1]
    for begin in range(KEY_RUN, num_keys + spare_keys, KEY_RUN):
        total += torch.bmm(weights[:, :, begin : begin + KEY_RUN], counted[:, begin : begin + KEY_RUN])
    return total[:, :num_queries, :head_dim] / total[:, :num_queries, head_dim:]
