"""Decode steps as captured CUDA graphs: one launch in place of some hundreds.

A graph replays the same kernels on the same memory, so everything that changes from step to step lies in buffers that
are filled before each replay. Batches are padded to the next bucket: a padding row has context 0, is written to no
slot, and its logits are dropped. All windows' work plans are padded to their largest number of parts.

Letters: B rows of a bucket, R rows of a step, V vocab_size, n pages of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention_inputs import InputShape
from engine.inputs import StepInputs
from engine.kernel_backend import KernelBackend, PagedAttention
from engine.kernels.decode_plan import DecodePlan
from engine.plan import Row
from engine.transformer import Transformer

Capture = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], None]]]
"""Records what a function launches; returns its result, and a function that launches all of it again in place."""

_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_NO_SLOT = -1


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that graphs are captured for; the last one is `max_rows`, or the largest there is."""
    return (*(size for size in _BUCKETS if size < max_rows), min(max_rows, _BUCKETS[-1]))


def cuda_capture() -> Capture:
    """Captures into graphs that share one memory pool: only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels compile and cuBLAS takes its workspace before anything is recorded
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = work()
        return result, graph.replay

    return capture


@dataclass(frozen=True, slots=True)
class _Captured:
    """One bucket: its inputs, the logits it leaves behind, and how to run it."""

    inputs: StepInputs
    logits: torch.Tensor  # [B, V] float32
    replay: Callable[[], None]


class DecodeGraphs:
    """Runs steps in which every row decodes one token. Mutates the pages that the rows name.

    Args:
        transformer: whose backend is `backend`.
        backend: whose attention reads plans that can be refilled.
        pool: as the transformer takes it.
        shape: of the inputs.
        max_rows: largest batch.
        max_model_len: longest sequence, in tokens.
        capture: records a bucket; `cuda_capture()`.
    """

    def __init__(
        self,
        transformer: Transformer,
        backend: KernelBackend,
        pool: torch.Tensor,
        shape: InputShape,
        *,
        max_rows: int,
        max_model_len: int,
        capture: Capture,
    ) -> None:
        self._transformer = transformer
        self._backend = backend
        self._pool = pool
        self._shape = shape
        self._num_pages = -(-max_model_len // shape.page_size)
        self._captured: dict[int, _Captured] = {}
        with torch.inference_mode():
            for bucket in reversed(buckets_up_to(max_rows)):  # the largest first, so that the others fit its memory
                self._captured[bucket] = self._record(bucket, capture)
        self._sizes = sorted(self._captured)

    @torch.inference_mode()
    def forward(self, rows: Many[Row]) -> torch.Tensor | None:
        """Logits `[R, V]` float32 of a step, valid until the next one; None where no graph fits it.

        Requires: rows are sound (`engine.inputs.row_error`).
        """
        if len(rows) > self._sizes[-1] or any(row.count != 1 or not row.sample for row in rows):
            return None
        bucket = next(size for size in self._sizes if size >= len(rows))
        captured = self._captured[bucket]
        self._fill(captured.inputs, rows, bucket)
        captured.replay()
        return captured.logits[: len(rows)]

    def _record(self, bucket: int, capture: Capture) -> _Captured:
        inputs = self._blank(bucket)

        def work() -> torch.Tensor:
            return self._transformer.logits(self._transformer.hidden_states(inputs, self._pool))

        logits, replay = capture(work)
        return _Captured(inputs, logits, replay)

    def _blank(self, bucket: int) -> StepInputs:
        """Inputs of padding alone."""
        device = self._shape.device

        def ids(value: int = 0) -> torch.Tensor:
            return torch.full((bucket,), value, dtype=torch.int64, device=device)

        tables = torch.zeros((bucket, self._num_pages), dtype=torch.int32, device=device)
        return StepInputs(
            token_ids=ids(),
            positions=ids(),
            rope_lengths=ids(1),
            page_ids=ids(),
            offsets=ids(),
            slots=ids(_NO_SLOT),
            attention={
                window: PagedAttention(tables, self._backend.plan_padded([0] * bucket, window, self._shape.device))
                for window in self._shape.windows
            },
            sampled_tokens=torch.arange(bucket, device=device),
        )

    def _fill(self, inputs: StepInputs, rows: Many[Row], bucket: int) -> None:
        """Write a step's integers where the graph reads them. `page_ids` and `offsets` are read by no kernel."""
        page_size = self._shape.page_size
        starts = [row.start for row in rows]
        pages = [row.sequence.page_table[start // page_size] for row, start in zip(rows, starts, strict=True)]
        slots = [page * page_size + start % page_size for page, start in zip(pages, starts, strict=True)]
        lengths = [start + 1 for start in starts]
        rope_lengths = [max(row.sequence.prompt_len, length) for row, length in zip(rows, lengths, strict=True)]
        _put(inputs.token_ids, (row.sequence.token_ids[row.start] for row in rows), bucket, 0)
        _put(inputs.positions, starts, bucket, 0)
        _put(inputs.rope_lengths, rope_lengths, bucket, 1)
        _put(inputs.slots, slots, bucket, _NO_SLOT)
        needed = max(-(-length // page_size) for length in lengths)
        table = np.zeros((len(rows), needed), dtype=np.int32)
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            own = row.sequence.page_table[: -(-length // page_size)]
            table[at, : len(own)] = own
        padded = lengths + [0] * (bucket - len(rows))
        filled_table = False
        for window, attention in inputs.attention.items():
            assert isinstance(attention, PagedAttention)  # noqa: S101 - made by `_blank`
            assert isinstance(attention.plan, DecodePlan)  # noqa: S101 - likewise
            if not filled_table:  # windows share the tables
                attention.tables[: len(rows), :needed].copy_(torch.from_numpy(table), non_blocking=True)
                filled_table = True
            fresh = self._backend.plan_padded(padded, window, torch.device("cpu"))
            for target, source in (
                (attention.plan.items, fresh.items),
                (attention.plan.program_items, fresh.program_items),
                (attention.plan.row_parts, fresh.row_parts),
            ):
                target.copy_(source, non_blocking=True)


def _put(target: torch.Tensor, values: Iterable[int], bucket: int, padding: int) -> None:
    row = np.full(bucket, padding, dtype=np.int64)
    given = np.fromiter(values, dtype=np.int64)
    row[: len(given)] = given
    target.copy_(torch.from_numpy(row), non_blocking=True)
