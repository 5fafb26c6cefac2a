"""A checkout knows its version without being installed."""

from __future__ import annotations

import importlib.metadata

import pytest

from fleet.version import version


def test_a_checkout_that_is_not_installed_has_the_version_of_its_project_file(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = version()

    def not_there(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", not_there)
    assert version() == installed
