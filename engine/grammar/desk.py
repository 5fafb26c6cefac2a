"""Grammars of a worker: compiled once, followed per sequence, masks made beside the forward pass.

A step asks for its masks before the model runs (`begin`) and takes them when the logits are there (`StepMasks.wait`).
Threads of our own do the work, and the library lets go of the interpreter lock while it computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLExecutor

from engine.errors import EngineError
from engine.grammar.matcher import MaskWords, Matcher, Standing, fill
from engine.grammar.vocabulary import Vocabulary
from engine.plan import Complete, Failed, Sampled
from engine.sequence import Phase, Sequence
from fleet.types import Grammar

NUM_THREADS = 2  # one for masks, one that may compile meanwhile; and two that share the masks of a large batch
MAX_COMPILED = 128  # grammars kept
MAX_COMPILED_CHARS = 1_000_000  # and of these sources at most; compiled, the worst take 400 bytes for each character


@dataclass(slots=True)
class Masked:
    """One constrained row: its place in the step's logits and how it stands. `outcome` None: choose by the mask."""

    row: int
    sequence: Sequence
    matcher: Matcher | None = None
    outcome: Complete | Failed | None = None


class StepMasks:
    """The masks of one step, under way."""

    def __init__(self, rows: list[Masked], done: Future[MaskWords]) -> None:
        self._rows = rows
        self._done = done

    def wait(self) -> tuple[list[int], MaskWords]:
        """Rows of the logits `[C]` and their masks `[C, W]` int32. Rows with an outcome of their own allow all."""
        return [masked.row for masked in self._rows], self._done.result()

    def settle(self, chosen: list[Sampled | Failed]) -> list[Sampled | Failed | Complete]:
        """The step's results with what the grammars say of them. Call after `wait`."""
        results: list[Sampled | Failed | Complete] = list(chosen)
        for masked in self._rows:
            result = chosen[masked.row]
            if masked.outcome is not None:
                results[masked.row] = masked.outcome
            elif isinstance(result, Sampled) and masked.matcher is not None:
                ends = masked.matcher.accept(result.token_id, masked.sequence.params.stop_token_ids)
                results[masked.row] = Sampled(result.token_id, result.logprob, ends=ends)
        return results


class GrammarDesk:
    """Compiles, remembers and follows grammars.

    `prepare` may be called from any thread; `begin` from the step thread, whose `StepMasks` must be waited for before
    the next. A sequence's matcher lives as long as the sequence; one that comes with output begins by reading it.

    Args:
        files: contents by name, as `fleet.model_files.read` gives them.
        vocab_size: V, of the model.
    """

    def __init__(self, files: Mapping[str, bytes], vocab_size: int) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._executor = LLExecutor(num_threads=NUM_THREADS)
        self._files = files
        self._vocab_size = vocab_size
        self._vocabulary: Future[Vocabulary] | None = None
        self._compiled: OrderedDict[Grammar, Future[Matcher]] = OrderedDict()
        self._num_chars = 0  # of all sources in `_compiled`
        self._lock = Lock()
        self._matchers: WeakKeyDictionary[Sequence, Matcher] = WeakKeyDictionary()

    def warm(self) -> None:
        """Read the vocabulary in the background now, rather than at the first grammar."""
        with self._lock:
            self._vocabulary = self._vocabulary or self._pool.submit(
                Vocabulary.from_files, self._files, self._vocab_size
            )

    def prepare(self, grammar: Grammar | None) -> None:
        """Begin to compile, so that the first step need not wait for it. Does not block; None does nothing."""
        if grammar is not None:
            self._compile(grammar)

    def begin(self, sequences: Many[Sequence]) -> StepMasks | None:
        """Start on the masks of a step that samples for `sequences`, in this order; None if none is constrained."""
        rows = [Masked(row, each) for row, each in enumerate(sequences) if each.params.grammar is not None]
        if not rows:
            return None
        for masked in rows:
            self.prepare(masked.sequence.params.grammar)
        return StepMasks(rows, self._pool.submit(self._fill, rows))

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> Future[Matcher]:
        self.warm()
        with self._lock:
            found = self._compiled.get(grammar)
            if found is None:
                found = self._compiled[grammar] = self._pool.submit(self._compile_now, grammar)
                self._num_chars += len(grammar.source)
                self._evict()
            self._compiled.move_to_end(grammar)
            return found

    def _evict(self) -> None:
        """Forget what was used longest ago, but never the newest."""
        while len(self._compiled) > MAX_COMPILED or (self._num_chars > MAX_COMPILED_CHARS and len(self._compiled) > 1):
            oldest, _ = self._compiled.popitem(last=False)
            self._num_chars -= len(oldest.source)

    def _compile_now(self, grammar: Grammar) -> Matcher:
        assert self._vocabulary is not None, "warm comes first"  # noqa: S101 (our own invariant)
        return Matcher.compile(self._vocabulary.result(), grammar)

    def _fill(self, rows: list[Masked]) -> MaskWords:
        masks: MaskWords = np.full((len(rows), self._num_words()), -1, dtype=np.int32)
        followed: list[tuple[Matcher, int]] = []
        for place, masked in enumerate(rows):
            if masked.sequence.phase is Phase.DONE:
                continue  # it ended in a step that this one was queued behind: what is chosen is thrown away
            try:
                masked.matcher = self._matcher(masked.sequence)
                followed.append((masked.matcher, place))
            except EngineError as error:
                masked.outcome = _failed(error)
        fill(self._executor, followed, masks)
        for matcher, place in followed:
            masked = rows[place]
            try:
                if matcher.stand(masks[place], masked.sequence.params.stop_token_ids) is Standing.COMPLETE:
                    masked.outcome = Complete()
            except EngineError as error:
                masked.outcome = _failed(error)
            if masked.outcome is not None:
                masks[place] = -1
        return masks

    def _num_words(self) -> int:
        """Words of a mask; a vocabulary that cannot be used fails the rows, not the step."""
        assert self._vocabulary is not None, "warm comes first"  # noqa: S101 (our own invariant)
        if self._vocabulary.exception() is not None:
            return -(-self._vocab_size // 32)
        return self._vocabulary.result().num_words

    def _matcher(self, sequence: Sequence) -> Matcher:
        """The sequence's matcher, standing behind its last output token. Raises: EngineError."""
        matcher = self._matchers.get(sequence)
        if matcher is None:
            assert sequence.params.grammar is not None, "only constrained rows"  # noqa: S101 (our own invariant)
            matcher = self._compile(sequence.params.grammar).result().copy()
            self._matchers[sequence] = matcher
        matcher.follow(sequence.token_ids[sequence.prompt_len :])
        return matcher


def _failed(error: EngineError) -> Failed:
    return Failed(f"the grammar of this request cannot be followed: {error}")
