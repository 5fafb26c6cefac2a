"""Decode steps as captured CUDA graphs: one launch in place of some hundreds.

A graph replays the same kernels on the same memory, so everything that changes from step to step lies in buffers that
are filled before each replay. Batches are padded to the next bucket: a padding row has context 0, is written to no
slot, and its logits are dropped. All windows' work plans are padded to their largest number of parts.

A bucket is two graphs: the forward pass, and the choice of tokens (one for each kind of choice). Between them masks of
constrained rows come from the host, which makes them while the forward pass runs. The chosen ids stay on the device,
where the forward pass of the next step finds those that the host does not know yet. Only one bucket runs at a time, so
all share one buffer of logits, in the model's type: what chooses widens them as it reads.

Letters: B rows of a bucket, R rows of a step, V vocab_size, n pages of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from engine.attention_inputs import InputShape
from engine.device_copies import to_device
from engine.device_sampler import ALL_KINDS, ChoiceInputs, ChoiceKind, DeviceSampler
from engine.device_step import AskedLogprobs, DeviceStep
from engine.grammar.desk import StepMasks
from engine.grammar.matcher import MaskWords
from engine.inputs import StepInputs
from engine.kernel_backend import KernelBackend, PagedAttention
from engine.kernels.decode_plan import DecodePlan
from engine.plan import Row
from engine.transformer import Transformer

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Records what a function launches, into memory that is there already; returns what launches all of it again."""

_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_NO_SLOT = -1
_KNOWN = -1  # in place of the row that a token follows
_PADDING = np.array([[0], [_KNOWN], [0], [1], [_NO_SLOT]], dtype=np.int64)  # a row's `_Bucket.integers` where none is


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that graphs are captured for; the last one is `max_rows`, or the largest there is."""
    return (*(size for size in _BUCKETS if size < max_rows), min(max_rows, _BUCKETS[-1]))


def cuda_capture() -> Capture:
    """Captures into graphs that share one memory pool: only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(work: Work) -> Work:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels compile and cuBLAS takes its workspace before anything is recorded
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        return graph.replay

    return capture


@dataclass(frozen=True, slots=True)
class _Bucket:
    """One captured size: its inputs, and how to run it.

    Attributes:
        integers: [5, B] int64: known token ids, the rows before that unknown ones follow (`_KNOWN` for none),
            positions, rope lengths, slots. The last three are what `inputs` shows.
        tables: [B, n] int32, shared by all windows.
    """

    integers: torch.Tensor
    tables: torch.Tensor
    inputs: StepInputs
    choice: ChoiceInputs
    replay_forward: Work
    replay_choice: dict[ChoiceKind, Work]


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
        sizes = buckets_up_to(max_rows)
        self._sampler = DeviceSampler(vocab_size=transformer.config.vocab_size, max_rows=sizes[-1], device=shape.device)
        self._chosen = torch.zeros(sizes[-1], dtype=torch.int64, device=shape.device)  # by the latest launch
        vocab_size, dtype = transformer.config.vocab_size, transformer.embedding.dtype
        self._logits = torch.zeros((sizes[-1], vocab_size), dtype=dtype, device=shape.device)
        self._latest: DeviceStep | None = None
        with torch.inference_mode():
            # The largest first, so that the others fit its memory.
            captured = {bucket: self._record(bucket, capture) for bucket in reversed(sizes)}
        self._buckets = [captured[size] for size in sizes]

    def why_host(self, rows: Many[Row]) -> str | None:
        """What keeps a step from `launch`, in a word, or None."""
        if not _only_decode(rows):
            return "prompt"
        return "batch" if self._bucket(rows) is None else self._sampler.why_host(rows)

    @torch.inference_mode()
    def forward(self, rows: Many[Row]) -> torch.Tensor | None:
        """Logits `[R, V]` float32 of a step, new memory; None where no graph fits it.

        Requires: rows are sound (`engine.inputs.row_error`) and follow nothing.
        """
        bucket = self._bucket(rows)
        if bucket is None or not _only_decode(rows):
            return None
        self._fill(bucket, rows)
        bucket.replay_forward()
        return self._logits[: len(rows)].to(torch.float32, copy=True)

    @torch.inference_mode()
    def launch(self, rows: Many[Row], begin_masks: Callable[[], StepMasks | None] | None) -> DeviceStep:
        """Queue a step, and the choice of its tokens unless rows are constrained: see `DeviceStep`.

        Waits for the masks of the step before if its choice is still to be queued, for the device never.

        Requires: rows are sound, `why_host` has nothing against them, and those that follow are behind a launch.
        """
        bucket = self._bucket(rows)
        assert bucket is not None, "`why_host` knows"  # noqa: S101 (our own invariant)
        before, self._latest = self._latest, None
        if before is not None:
            before.choose()
        self._fill(bucket, rows)
        kind = self._sampler.fill(bucket.choice, rows)
        bucket.replay_forward()
        self._latest = DeviceStep(
            AskedLogprobs(self._logits[: len(rows)], rows),
            partial(self._choose, bucket, kind, len(rows)),
            begin_masks,
        )
        return self._latest

    @torch.inference_mode()
    def _choose(self, bucket: _Bucket, kind: ChoiceKind, num_rows: int, masks: MaskWords | None) -> torch.Tensor:
        if masks is not None:
            self._sampler.put_masks(masks)
        bucket.replay_choice[kind]()
        return self._chosen[:num_rows]

    def _bucket(self, rows: Many[Row]) -> _Bucket | None:
        """The smallest that holds the rows."""
        return next((bucket for bucket in self._buckets if bucket.tables.shape[0] >= len(rows)), None)

    def _record(self, size: int, capture: Capture) -> _Bucket:
        device = self._shape.device
        integers = torch.from_numpy(_PADDING).to(device).repeat(1, size)
        known, follows, positions, rope_lengths, slots = integers
        tables = torch.zeros((size, self._num_pages), dtype=torch.int32, device=device)
        inputs = StepInputs(
            token_ids=torch.zeros_like(known),
            positions=positions,
            rope_lengths=rope_lengths,
            page_ids=torch.zeros_like(known),  # read by no kernel, as are the offsets
            offsets=torch.zeros_like(known),
            slots=slots,
            attention={
                window: PagedAttention(tables, self._backend.plan_padded([0] * size, window, device))
                for window in self._shape.windows
            },
            sampled_tokens=torch.arange(size, device=device),
            sampled_attention=None,
        )
        choice = self._sampler.blank(size)
        logits, chosen = self._logits[:size], self._chosen[:size]

        def forward() -> None:
            # A row without a choice is thrown away, and so is what follows it: any id will do.
            unseen = self._chosen.index_select(0, follows.clamp(min=0)).clamp(min=0)
            torch.where(follows == _KNOWN, known, unseen, out=inputs.token_ids)
            hidden = self._transformer.hidden_states(inputs, self._pool)
            logits.copy_(self._transformer.raw_logits(hidden))

        replay_forward = capture(forward)
        replay_choice = {
            kind: capture(partial(self._sampler.choose, choice, kind, logits, chosen)) for kind in ALL_KINDS
        }
        return _Bucket(integers, tables, inputs, choice, replay_forward, replay_choice)

    def _fill(self, bucket: _Bucket, rows: Many[Row]) -> None:
        """Write a step's integers where the graph reads them."""
        page_size, size = self._shape.page_size, bucket.tables.shape[0]
        integers = _PADDING.repeat(size, axis=1)
        lengths = [row.start + 1 for row in rows]
        needed = max(-(-length // page_size) for length in lengths)
        table = np.zeros((len(rows), needed), dtype=np.int32)
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            sequence, start = row.sequence, row.start
            token, follows = (0, row.follows) if row.follows is not None else (sequence.token_ids[start], _KNOWN)
            slot = sequence.page_table[start // page_size] * page_size + start % page_size
            integers[:, at] = token, follows, start, max(sequence.prompt_len, length), slot
            own = sequence.page_table[: -(-length // page_size)]
            table[at, : len(own)] = own
        to_device(integers, bucket.integers)
        to_device(table, bucket.tables[: len(rows), :needed])
        padded = lengths + [0] * (size - len(rows))
        for window, attention in bucket.inputs.attention.items():
            assert isinstance(attention, PagedAttention)  # noqa: S101 - made by `_record`
            assert isinstance(attention.plan, DecodePlan)  # noqa: S101 - likewise
            fresh = self._backend.plan_padded(padded, window, torch.device("cpu"))
            to_device(fresh.items, attention.plan.items)
            to_device(fresh.program_items, attention.plan.program_items)
            to_device(fresh.row_parts, attention.plan.row_parts)


def _only_decode(rows: Many[Row]) -> bool:
    """Whether every row computes one token and samples after it."""
    return all(row.count == 1 and row.sample for row in rows)
