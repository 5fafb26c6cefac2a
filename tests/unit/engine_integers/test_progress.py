"""Booking a row: what is said of it must not get lost with the way it ends."""

from __future__ import annotations

from support.passports import make_fingerprint, make_passport

from engine.pages import PagePool
from engine.plan import Complete, Row, ScoredPrompt
from engine.prefix_cache import PrefixCache
from engine.progress import settle
from engine.sequence import Sequence
from fleet.types import FinishReason


def test_scores_of_a_prompt_whose_output_is_complete_before_it_begins_are_kept() -> None:
    sequence = Sequence.from_passport(make_passport([5, 6, 7]), arrival=0)
    sequence.page_table = [0, 1, 2, 3]
    cache = PrefixCache(PagePool(8, 16), make_fingerprint())
    scored = ScoredPrompt(position=1, logprobs=[])
    row = Row(sequence, 0, len(sequence.token_ids), sample=True)
    progress = settle(row, Complete(), scored, cache=cache, page_size=16, max_model_len=128)
    assert progress.finish is FinishReason.STOP
    assert progress.sampled is None
    assert progress.scored is scored
