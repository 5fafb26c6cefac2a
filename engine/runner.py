"""The tensor side of a step: plan in, sampled tokens out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from engine.attention_inputs import InputShape
from engine.choice import choice_for
from engine.grammar.desk import GrammarDesk, StepMasks
from engine.inputs import StepInputs, build_inputs, row_error
from engine.kv_pool import page_shape
from engine.load import LoadedModel
from engine.page_tables import PageArray, PageTables
from engine.plan import Failed, Pending, Result, Row, ScoredPrompt, StepOutput, StepPlan
from engine.prompt_outputs import needs_hidden_states, pool, score
from engine.sampler import sample


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Where the time of one step went."""

    inputs_s: float
    forward_s: float
    sample_s: float
    num_tokens: int


def input_shape(model: LoadedModel, page_size: int) -> InputShape:
    """What translation into tensors needs to know of a model."""
    config = model.config
    return InputShape(
        page_size=page_size,
        windows=tuple(dict.fromkeys(config.layer_windows)),
        last_window=config.layer_windows[-1],
        layer_token_bytes=2 * config.num_kv_heads * config.head_dim * model.dtype.itemsize,
        device=model.device,
    )


class DecodeForward(Protocol):
    """A faster way through the model for steps that only decode; `engine.decode_graphs` has one."""

    def why_host(self, rows: Many[Row]) -> str | None:
        """What keeps a step of these rows from `launch`, in a word, or None. Cheap."""

    def launch(self, rows: Many[Row], begin_masks: Callable[[], StepMasks | None] | None) -> Pending:
        """Queue a step whose tokens are chosen on the device. Requires: `why_host` has nothing against sound rows.

        Args:
            rows: of the step.
            begin_masks: starts on the rows' masks, once what they follow is booked; None where none is constrained.
        """

    def forward(self, rows: Many[Row]) -> torch.Tensor | None:
        """Logits `[R, V]` float32, or None for steps that it does not serve."""


class ModelRunner:
    """Runs step plans of one model over one pool. Implements `engine.plan.Runner`.

    Not thread-safe: one step at a time, all on the step thread. Mutates pages that the plan's rows name, nothing else.

    Attributes:
        last_timing: of the latest step that `run` computed, None before the first.
        num_steps: on a device that could choose their tokens, by where they were chosen: `device`, `device_grammar`
            (there too, by masks from the host), or for what reason on the host.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: torch.Tensor,
        page_size: int,
        grammars: GrammarDesk | None = None,
        decode: DecodeForward | None = None,
    ) -> None:
        expected = page_shape(model.config, page_size)
        if tuple(pool.shape[1:]) != expected or pool.dtype != model.kv_dtype:
            raise ValueError(
                f"pool pages are {list(pool.shape[1:])} {pool.dtype}, not {list(expected)} {model.kv_dtype}"
            )
        self._model = model
        self._pool = pool
        self._grammars = grammars or GrammarDesk({}, model.config.vocab_size)
        self._decode = decode
        self._choose = choice_for(model.device)
        self._tables = PageTables()
        self._row_error = partial(
            row_error, vocab_size=model.config.vocab_size, page_size=page_size, num_pages=pool.shape[0]
        )
        self._input_shape = input_shape(model, page_size)
        self.last_timing: StepTiming | None = None
        self.num_steps: Counter[str] = Counter()
        self._judged: tuple[StepPlan, str | None] | None = None

    def feeds_next(self, plan: StepPlan) -> bool:
        """See `engine.plan.Runner`."""
        return self._decode is not None and self._why_host(self._decode, plan) is None

    def launch(self, plan: StepPlan) -> StepOutput | Pending:
        """See `engine.plan.Runner`. What the device cannot do is computed by `run`, and counted."""
        if self._decode is None:
            return self.run(plan)
        reason = self._why_host(self._decode, plan)
        if reason is not None:
            self.num_steps[reason] += 1
            return self.run(plan)
        sequences = [row.sequence for row in plan.rows]
        if not any(one.params.grammar is not None for one in sequences):
            self.num_steps["device"] += 1
            return self._decode.launch(plan.rows, None)
        self.num_steps["device_grammar"] += 1
        return self._decode.launch(plan.rows, partial(self._grammars.begin, sequences))

    def _why_host(self, decode: DecodeForward, plan: StepPlan) -> str | None:
        """Looked into once for a plan, which is asked about before its launch, by it, and for the step after it."""
        if self._judged is None or self._judged[0] is not plan:
            tables = ((row, self._tables.of(row.sequence)) for row in plan.rows if row.follows is None)
            bad = any(self._row_error(row, table) is not None for row, table in tables)
            self._judged = plan, "bad_row" if bad else decode.why_host(plan.rows)
        return self._judged[1]

    def run(self, plan: StepPlan) -> StepOutput:
        """Run one step; blocking. A bad row yields `Failed` for itself and leaves the others as they would be."""
        began_s = time.perf_counter()
        results: list[Result | None] = [None] * len(plan.rows)
        good: list[int] = []
        tables: list[PageArray] = []
        for at, row in enumerate(plan.rows):
            table = self._tables.of(row.sequence)
            problem = self._row_error(row, table)
            if problem is None:
                good.append(at)
                tables.append(table)
            else:
                results[at] = Failed(problem)
        if not good:
            return StepOutput(tuple(results))
        rows = [plan.rows[at] for at in good]
        sampling = [at for at in good if plan.rows[at].sample]
        sequences = [plan.rows[at].sequence for at in sampling]
        masks = self._grammars.begin(sequences)  # made on other threads while the model computes
        scored: dict[int, ScoredPrompt] = {}
        logits = None if self._decode is None else self._decode.forward(rows)
        built_s = time.perf_counter()
        if logits is None:
            inputs = build_inputs(rows, self._input_shape, self._model.transformer.backend.plan_attention, tables)
            built_s = time.perf_counter()
            if any(needs_hidden_states(row) for row in rows):
                logits = self._forward_with_prompts(plan, good, inputs, results, scored)
            else:
                logits = self.forward(inputs)
        forwarded_s = time.perf_counter()
        if sampling:
            with torch.inference_mode():
                chosen = sample(logits, sequences, masks, self._choose)
            settled = chosen if masks is None else masks.settle(chosen)
            for at, result in zip(sampling, settled, strict=True):
                results[at] = result
        if not sampling and self._model.device.type == "cuda":
            # Pages are handed off as soon as a step is booked; a step that samples has been waited for already.
            torch.cuda.synchronize(self._model.device)
        self.last_timing = StepTiming(
            inputs_s=built_s - began_s,
            forward_s=forwarded_s - built_s,
            sample_s=time.perf_counter() - forwarded_s,
            num_tokens=sum(row.count for row in rows),
        )
        return StepOutput(tuple(results), scored)

    @torch.inference_mode()
    def _forward_with_prompts(
        self,
        plan: StepPlan,
        good: list[int],
        inputs: StepInputs,
        results: list[Result | None],
        scored: dict[int, ScoredPrompt],
    ) -> torch.Tensor:
        """Like `forward`, where some rows want vectors or scores of their prompts. Mutates: `results` and `scored`."""
        transformer = self._model.transformer
        hidden = transformer.hidden_states(inputs, self._pool)
        begin = 0
        for at in good:
            row = plan.rows[at]
            states = hidden[begin : begin + row.count]
            begin += row.count
            if row.sequence.passport.pooling is not None:
                results[at] = pool(transformer, states, row)
            elif (scores := score(transformer, states, row)) is not None:
                scored[at] = scores
        return transformer.logits(hidden[inputs.sampled_tokens])

    @torch.inference_mode()
    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Logits of the sampling rows, `[R, V]` float32; writes pages. R may be 0."""
        transformer = self._model.transformer
        return transformer.logits(transformer.sampled_states(inputs, self._pool))

    @torch.inference_mode()
    def hidden_states(self, plan: StepPlan) -> torch.Tensor:
        """Final hidden states of all the plan's tokens, `[T, E]` before the final norm; writes pages.

        For uses that need vectors and not tokens. Requires: every row is sound.
        """
        transformer = self._model.transformer
        inputs = build_inputs(plan.rows, self._input_shape, transformer.backend.plan_attention)
        return transformer.hidden_states(inputs, self._pool)
