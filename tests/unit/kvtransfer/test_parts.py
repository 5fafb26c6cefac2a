"""The small parts of the hand-off: layouts, memory that forgets, target rounds, liveness."""

from __future__ import annotations

import dataclasses
import random

import pytest

from fleet.hand_off_messages import Alive
from fleet.types import PAGE_MAJOR_PAIRS, PeerRef
from kvtransfer.errors import LayoutMismatch
from kvtransfer.layout import PageLayout, require_equal
from kvtransfer.limits import HandOffLimits
from kvtransfer.numbering import belongs_to, first_number
from kvtransfer.pulse import Pulse
from kvtransfer.remembered import Remembered
from kvtransfer.targets import TargetRounds

LAYOUT = PageLayout(num_layers=28, num_kv_heads=8, head_dim=128, page_size=16, dtype="bfloat16")


def peer(name: str, incarnation: int = 1) -> PeerRef:
    return PeerRef(name=name, incarnation=incarnation, address=f"sim://{name}")


def test_page_bytes_count_keys_and_values_of_all_layers() -> None:
    assert LAYOUT.page_bytes == 28 * 2 * 8 * 16 * 128 * 2


@pytest.mark.parametrize("change", [{"dtype": "int4"}, {"num_layers": 0}, {"axis_order": "page-minor"}])
def test_an_impossible_layout_is_refused(change: dict[str, object]) -> None:
    fields = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "page_size": 1, "dtype": "float32"} | change
    with pytest.raises(ValueError, match=r"page|order of axes"):
        PageLayout(**fields)  # type: ignore[arg-type]


def test_unequal_fingerprints_are_both_named_with_what_differs() -> None:
    ours, theirs = LAYOUT.fingerprint("model-a"), LAYOUT.fingerprint("model-b")
    require_equal(expected=ours, got=LAYOUT.fingerprint("model-a"))
    with pytest.raises(LayoutMismatch) as caught:
        require_equal(expected=ours, got=theirs)
    assert (caught.value.expected, caught.value.got) == (ours, theirs)
    assert "layouts differ in model (expected 'model-a', got 'model-b')" in str(caught.value)
    assert str(ours) in str(caught.value)
    assert str(theirs) in str(caught.value)


def test_pages_of_pairs_and_plain_ones_are_not_exchanged() -> None:
    pairs = dataclasses.replace(LAYOUT, axis_order=PAGE_MAJOR_PAIRS)
    assert pairs.page_bytes == LAYOUT.page_bytes
    with pytest.raises(LayoutMismatch, match=r"layout .expected 'page-major-1', got 'page-major-pairs-1'"):
        require_equal(expected=LAYOUT.fingerprint("m"), got=pairs.fingerprint("m"))


def test_numbers_of_two_lives_never_meet() -> None:
    first, second = first_number(2**62 + 12345), first_number(2**62 + 12346)
    assert first != second
    assert belongs_to(first + 1000, 2**62 + 12345)
    assert not belongs_to(first + 1000, 2**62 + 12346)
    assert 0 < first_number(0) < first_number(2**63 - 1) < 2**63


def test_memory_forgets_by_age_and_by_number() -> None:
    memory: Remembered[str, int] = Remembered(memory_s=10.0, max_entries=2)
    memory.put("a", 1, 0.0)
    memory.put("b", 2, 1.0)
    memory.put("a", 3, 2.0)
    assert (memory.get("a", 11.0), memory.get("b", 11.0), memory.get("a", 12.0)) == (3, None, None)
    memory.put("c", 4, 3.0)
    assert (memory.get("b", 3.0), memory.get("a", 3.0), len(memory)) == (None, 3, 2)
    memory.put("d", 5, 50.0)
    assert len(memory) == 1


def test_rounds_skip_struck_targets_and_pause_longer_each_time() -> None:
    limits = HandOffLimits(backoff_s=0.1, max_backoff_s=1.0)
    rounds = TargetRounds([peer("a"), peer("b"), peer("a")], limits, random.Random(1))
    pauses = []
    for _ in range(6):
        first, second = rounds.next(), rounds.next()
        assert first is not None
        assert second is not None
        assert (first.peer.name, second.peer.name) == ("a", "b")
        assert rounds.next() is None
        pauses.append(rounds.pause_s())
    for pause_s, ceiling_s in zip(pauses, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0], strict=True):
        assert ceiling_s / 2 <= pause_s <= ceiling_s
    struck = rounds.next()
    assert struck is not None
    struck.struck = True
    rounds.hint(0.9)
    left = rounds.next()
    assert left is not None
    assert left.peer.name == "b"
    assert not rounds.exhausted
    left.struck = True
    assert rounds.next() is None
    assert rounds.exhausted


def test_a_hint_lengthens_a_pause_within_bounds() -> None:
    limits = HandOffLimits(backoff_s=0.01, max_backoff_s=0.5)
    rounds = TargetRounds([peer("a")], limits, random.Random(1))
    rounds.hint(0.3)
    rounds.hint(0.2)
    assert rounds.pause_s() == pytest.approx(0.2)
    rounds.hint(60.0)
    assert rounds.pause_s() == pytest.approx(0.5)


def test_silence_is_counted_from_the_last_sign_of_life_and_told_once() -> None:
    pulse = Pulse(peer("me"), HandOffLimits(liveness_s=4.0))
    pulse.follow({peer("a"), peer("b")}, 0.0)
    for now_s in (1.0, 2.0, 3.0):
        pulse.heard(peer("a"), now_s)
        assert pulse.silent(now_s) == []
    assert pulse.silent(4.0) == [peer("b")]
    assert pulse.silent(5.0) == []
    assert pulse.silent(7.0) == [peer("a")]


def test_time_in_which_we_stood_still_counts_against_nobody() -> None:
    pulse = Pulse(peer("me"), HandOffLimits(liveness_s=4.0))
    pulse.follow({peer("a")}, 0.0)
    pulse.silent(1.0)
    assert pulse.silent(100.0) == []
    for now_s in (101.0, 102.0):
        assert pulse.silent(now_s) == []
    assert pulse.silent(103.5) == [peer("a")]


def test_late_and_repeated_beats_are_known_for_what_they_are() -> None:
    pulse = Pulse(peer("me"), HandOffLimits())
    beats = [Alive(sender=peer("a"), beat=beat, hand_offs=[]) for beat in (1, 3, 2, 3, 4)]
    assert not pulse.in_order(beats[0]), "we share nothing"
    pulse.follow({peer("a")}, 0.0)
    assert [pulse.in_order(beat) for beat in beats] == [True, True, False, False, True]


def test_a_new_life_voids_the_former_and_a_late_word_of_that_voids_nothing() -> None:
    pulse = Pulse(peer("me"), HandOffLimits())
    pulse.follow({peer("a", 1), peer("b", 1)}, 0.0)
    assert pulse.former_lives(peer("a", 1), 0.0) == []
    assert pulse.former_lives(peer("a", 2), 1.0) == [peer("a", 1)]
    pulse.follow({peer("a", 2)}, 1.0)
    assert pulse.former_lives(peer("a", 1), 2.0) == []
