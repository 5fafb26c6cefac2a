"""Checkpoints are made once per session; torch keeps to one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint

from engine.cpu import backend as cpu_backend
from engine.packed_backend import can_pack


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a variant's random checkpoint."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / variant, variant)
        return made[variant]

    return get


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own kernel on any machine that can compile it."""
    pytest.importorskip("numba")
    if not can_pack(torch.device("cpu")):
        pytest.skip("bfloat16 is not packed here")
    monkeypatch.setattr(cpu_backend, "suits_own_products", lambda: True)
