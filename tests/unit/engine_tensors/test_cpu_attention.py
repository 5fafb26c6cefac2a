"""The CPU's attention kernel: against its torch twin, over pools of NaN, and bit by bit against itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from support.engine_driver import GREEDY, make_sequence
from support.paired_pages import paired

pytest.importorskip("numba")

from engine.attention import attend
from engine.attention_inputs import InputShape
from engine.cpu.attention_runs import PagedRows
from engine.cpu.backend import CpuBackend
from engine.inputs import build_inputs
from engine.plan import Row

ROUNDING = 2.0**-8  # of bfloat16, relative
LENGTHS = (1, 38, 70, 8, 83, 301, 5)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="this build of torch has no oneDNN",
)


@dataclass(frozen=True)
class Scene:
    """Sequences whose keys and values lie in a pool of NaN, in pages of a shuffled deck; all numbers are bf16's."""

    pages: list[list[int]]
    queries: list[torch.Tensor]  # [length, Hq, D] each
    keys_values: list[torch.Tensor]  # [length, 2, Hkv, D] each
    pool: torch.Tensor  # [N, 2, Hkv, P, D]
    window: int | None

    @classmethod
    def of(
        cls, lengths: tuple[int, ...], group: int, head_dim: int, page_size: int = 16, window: int | None = None
    ) -> Scene:
        torch.manual_seed(0)
        num_kv_heads = 3
        deck = random.Random(0).sample(range(200), 200)
        pages = [[deck.pop() for _ in range(-(-length // page_size))] for length in lengths]
        queries = [torch.randn(length, num_kv_heads * group, head_dim).bfloat16() for length in lengths]
        keys_values = [torch.randn(length, 2, num_kv_heads, head_dim).bfloat16() for length in lengths]
        pool = torch.full((200, 2, num_kv_heads, page_size, head_dim), torch.nan).bfloat16()
        for table, own in zip(pages, keys_values, strict=True):
            for position, pair in enumerate(own):
                pool[table[position // page_size], :, :, position % page_size] = pair
        return cls(pages, queries, keys_values, pool, window)

    def rows(self, spans: list[tuple[int, int, int]]) -> PagedRows:
        """Attention inputs of a step of `(sequence, start, count)`."""
        plan = []
        for at, start, count in spans:
            sequence = make_sequence(range(start + count), GREEDY)
            sequence.page_table = self.pages[at][: -(-(start + count) // self.pool.shape[3])]
            plan.append(Row(sequence, start, count, sample=True))
        shape = InputShape(
            self.pool.shape[3], (self.window,), self.window, layer_token_bytes=64, device=torch.device("cpu")
        )
        rows = build_inputs(plan, shape, CpuBackend().plan_attention).attention[self.window]
        assert isinstance(rows, PagedRows)
        return rows

    def of_step(self, tensors: list[torch.Tensor], spans: list[tuple[int, int, int]]) -> torch.Tensor:
        return torch.cat([tensors[at][start : start + count] for at, start, count in spans])

    def expected(self, spans: list[tuple[int, int, int]]) -> torch.Tensor:
        """By the twin, in float32."""
        queries, keys_values = (self.of_step(one, spans).float() for one in (self.queries, self.keys_values))
        return attend(queries, keys_values, self.pool.float(), self.rows(spans).gathered)

    def attended(self, spans: list[tuple[int, int, int]], backend: CpuBackend, layer: torch.Tensor) -> torch.Tensor:
        """By the kernel; `layer` is the pool in pairs."""
        return backend.attention(self.of_step(self.queries, spans), None, layer, self.rows(spans))


def assert_alike(result: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (result.float() - expected).abs().max().item()
    print(f"largest difference {difference:.5f} of {expected.abs().max().item():.3f}")
    assert difference <= 2 * ROUNDING * expected.abs().max().item()


SPANS = [(0, 0, 1), (1, 37, 1), (2, 0, 70), (3, 7, 1), (4, 50, 33), (5, 120, 181), (6, 3, 2)]


@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize(
    ("group", "head_dim", "page_size"),
    [(1, 64, 16), (2, 128, 16), (4, 16, 32), (5, 80, 16), (7, 64, 48), (8, 256, 16)],
)
def test_attention_matches_its_twin(group: int, head_dim: int, page_size: int, window: int | None) -> None:
    scene = Scene.of(LENGTHS, group, head_dim, page_size, window)
    assert_alike(scene.attended(SPANS, CpuBackend(), paired(scene.pool)), scene.expected(SPANS))


def test_processors_without_products_of_pairs_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.cpu.paged_attention.has_pair_products", lambda: False)
    scene = Scene.of(LENGTHS, 2, 64, window=70)
    assert_alike(scene.attended(SPANS, CpuBackend(), paired(scene.pool)), scene.expected(SPANS))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chunks_company_and_threads_change_no_bit(threads: int, window: int | None) -> None:
    scene = Scene.of(LENGTHS, 2, 64, window=window)
    backend, layer = CpuBackend(), paired(scene.pool)
    whole = [scene.attended([(at, 0, length)], backend, layer) for at, length in enumerate(LENGTHS)]
    draw = random.Random(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        done = [0] * len(LENGTHS)
        while waiting := [at for at, length in enumerate(LENGTHS) if done[at] < length]:
            spans = [
                (at, done[at], min(LENGTHS[at] - done[at], draw.choice((1, 1, 2, 3, 17, 60))))
                for at in draw.sample(waiting, draw.randint(1, len(waiting)))
            ]
            results = scene.attended(spans, backend, layer)
            for at, start, count in spans:
                result, results = results[:count], results[count:]
                expected = whole[at][start : start + count]
                assert torch.equal(result.view(torch.int16), expected.view(torch.int16)), (at, start, count)
                done[at] += count
    finally:
        torch.set_num_threads(before)


def test_a_row_of_nan_is_nan_alone() -> None:
    scene = Scene.of((40, 40), 2, 64)
    layer = paired(scene.pool)
    scene.queries[0][39] = torch.nan
    result = scene.attended([(0, 30, 10), (1, 30, 10)], CpuBackend(), layer)
    assert result[9].isnan().all()
    assert result[:9].isfinite().all()
    assert result[10:].isfinite().all()
