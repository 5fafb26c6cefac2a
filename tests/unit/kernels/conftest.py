"""Kernels run interpreted on a CPU, compiled where there is a GPU; without Triton their tests are skipped."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()

if HAS_TRITON and not ON_GPU:
    from triton_interpreter import import_interpreted

    import_interpreted()


class _WithoutTriton(pytest.Module):
    """A test module that is not imported."""

    def collect(self) -> NoReturn:
        pytest.skip("Triton is not installed; the extra `gpu` has it", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip with the reason where the kernels cannot be imported."""
    return None if HAS_TRITON else _WithoutTriton.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels and twins run."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _gpu_arithmetic() -> Iterator[None]:
    """Infinities and NaN pass in silence, as on a GPU; numpy would warn."""
    with np.errstate(all="ignore"):
        yield
