"""Settings: unknown and bad values name themselves; variables win over the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet.errors import SettingsError
from fleet.service_settings import WorkerSettings
from fleet.settings import FleetSettings, load


def test_variables_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "baton.toml"
    path.write_text('lease_s = 9.0\nnamespace = "file"\n')
    settings = load(FleetSettings, environ={"BATON_NAMESPACE": "variable"}, toml_path=path)
    assert (settings.lease_s, settings.namespace, settings.log_level) == (9.0, "variable", "info")


def test_an_unknown_variable_is_named_with_the_nearest_known() -> None:
    with pytest.raises(SettingsError, match=r"BATON_LEESE_S .*BATON_LEASE_S"):
        load(FleetSettings, environ={"BATON_LEESE_S": "1"})


def test_another_services_variable_is_no_error() -> None:
    settings = load(FleetSettings, known=[WorkerSettings], environ={"BATON_PAGE_SIZE": "32"})
    assert settings == FleetSettings()


@pytest.mark.parametrize(("name", "value"), [("BATON_LEASE_S", "soon"), ("BATON_LEASE_S", "0"), ("BATON_LEASE_S", "")])
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        load(FleetSettings, environ={name: value})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("QUANTIZATION", "int4", "auto, fp8 or int8"), ("LOAD_FORMAT", "gguf", "auto or dummy"), ("DTYPE", "", "auto, ")],
)
def test_one_of_few_values_is_refused_with_what_there_is(name: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError, match=f"BATON_{name} = '{value}': {allowed}"):
        load(WorkerSettings, environ={f"BATON_{name}": value})


def test_a_bad_secret_is_not_echoed(tmp_path: Path) -> None:
    path = tmp_path / "baton.toml"
    path.write_text("cluster_secret = 12345\n")
    with pytest.raises(SettingsError) as caught:
        load(FleetSettings, environ={}, toml_path=path)
    assert "12345" not in str(caught.value)


def test_booleans_and_numbers_are_read_from_text() -> None:
    settings = load(WorkerSettings, environ={"BATON_PREFIX_CACHE": "false", "BATON_PAGE_SIZE": "32"})
    assert (settings.prefix_cache, settings.page_size) == (False, 32)


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "baton.toml"
    path.write_text("lease_s = = 1")
    with pytest.raises(SettingsError, match=r"baton\.toml is not TOML"):
        load(FleetSettings, environ={}, toml_path=path)
