"""From rows to columns of numbers, against their definitions; page tables that follow what schedulers append."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.engine_driver import make_sequence

from engine.attention_inputs import InputShape, TableRow, gather_plan
from engine.inputs import build_inputs, row_error
from engine.page_tables import PageArray, PageTables
from engine.plan import Row

PAGE_SIZE = 4
SHAPE = InputShape(PAGE_SIZE, (None,), None, layer_token_bytes=64, device=torch.device("cpu"))


def random_rows(draw: random.Random, counts: tuple[int, ...]) -> list[Row]:
    rows = []
    for number in range(draw.randint(1, 9)):
        start, count = draw.randint(0, 40), draw.choice(counts)
        ids = [draw.randrange(100) for _ in range(start + count)]
        sequence = make_sequence(ids, prompt_len=draw.randint(1, start + count), arrival=number)
        sequence.page_table = draw.sample(range(1000), -(-(start + count) // PAGE_SIZE) + draw.randint(0, 2))
        rows.append(Row(sequence, start, count, sample=draw.random() < 0.6))
    return rows


@pytest.mark.parametrize("counts", [(1,), (1, 2, 7, 30)])
@pytest.mark.parametrize("seed", range(20))
def test_columns_are_what_they_are_called(counts: tuple[int, ...], seed: int) -> None:
    rows = random_rows(random.Random(seed), counts)
    plans: list[list[TableRow]] = []

    def plan(table_rows: Sequence[TableRow], _window: int | None, _shape: InputShape) -> int:
        plans.append(list(table_rows))
        return len(plans) - 1

    inputs = build_inputs(rows, SHAPE, plan)
    tokens = [(row, position) for row in rows for position in range(row.start, row.start + row.count)]
    pages = [row.sequence.page_table[position // PAGE_SIZE] for row, position in tokens]
    assert inputs.token_ids.tolist() == [row.sequence.token_ids[position] for row, position in tokens]
    assert inputs.positions.tolist() == [position for _, position in tokens]
    assert inputs.rope_lengths.tolist() == [max(row.sequence.prompt_len, position + 1) for row, position in tokens]
    assert inputs.page_ids.tolist() == pages
    assert inputs.offsets.tolist() == [position % PAGE_SIZE for _, position in tokens]
    assert inputs.slots.tolist() == [
        page * PAGE_SIZE + position % PAGE_SIZE for page, (_, position) in zip(pages, tokens, strict=True)
    ]
    last = [at for at, (row, position) in enumerate(tokens) if row.sample and position == row.start + row.count - 1]
    assert inputs.sampled_tokens.tolist() == last
    for row, table_row in zip(rows, plans[inputs.attention[None]], strict=True):
        covering = -(-(row.start + row.count) // PAGE_SIZE)
        assert table_row.table.tolist() == row.sequence.page_table[:covering]
        assert tokens[table_row.begin] == (row, table_row.start)
        assert table_row.count == row.count
    if len(last) in {0, len(tokens)}:
        assert inputs.sampled_attention is None
        return
    for at, (token, table_row) in enumerate(zip(last, plans[inputs.sampled_attention], strict=True)):
        row, position = tokens[token]
        assert (table_row.begin, table_row.start, table_row.count) == (at, position, 1)
        assert (
            table_row.table.tolist()[: position // PAGE_SIZE + 1]
            == row.sequence.page_table[: position // PAGE_SIZE + 1]
        )


def test_tables_kept_from_step_to_step_give_the_same_inputs() -> None:
    draw, tables = random.Random(3), PageTables()
    rows = random_rows(draw, (1,))
    for _ in range(30):
        kept = build_inputs(rows, SHAPE, gather_plan, [tables.of(row.sequence) for row in rows])
        fresh = build_inputs(rows, SHAPE, gather_plan)
        assert torch.equal(kept.slots, fresh.slots)
        for row in rows:
            row.sequence.token_ids.append(1)
            if row.start + 2 > len(row.sequence.page_table) * PAGE_SIZE:
                row.sequence.page_table += [draw.randrange(1000)]
        rows = [Row(row.sequence, row.start + 1, 1, sample=row.sample) for row in rows]


@given(steps=st.lists(st.one_of(st.lists(st.integers(-3, 99), max_size=5), st.none()), max_size=12))
@example(steps=[[], [-2]])
def test_a_page_array_is_its_list_whatever_happens_to_it(steps: list[list[int] | None]) -> None:
    sequence, tables = make_sequence([1, 2]), PageTables()
    for fresh in steps:
        if fresh is None:  # given back and taken again: another list
            sequence.page_table = [7] * (len(sequence.page_table) // 2)
        else:
            sequence.page_table += fresh
        array = tables.of(sequence)
        assert array.first(len(array)).tolist() == sequence.page_table
        assert array.first(1).tolist() == sequence.page_table[:1]
        expected = (min(sequence.page_table), max(sequence.page_table)) if sequence.page_table else (0, -1)
        assert (array.lowest, array.highest) == expected


def test_pages_outside_the_pool_are_found_when_they_are_appended() -> None:
    sequence, tables = make_sequence(range(6)), PageTables()
    row = Row(sequence, 5, 1, sample=True)

    def error() -> str | None:
        return row_error(row, tables.of(sequence), vocab_size=10, page_size=PAGE_SIZE, num_pages=8)

    sequence.page_table = [3]
    assert error() == "1 pages do not hold 6 tokens"
    sequence.page_table += [8]
    assert error() == "the page table leaves the pool of 8 pages"
    sequence.page_table = [3, 7]
    assert error() is None
    assert len(PageArray([])) == 0
