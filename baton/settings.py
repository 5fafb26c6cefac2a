"""What the command reads from its surroundings: variables, `baton.toml`, and where a user's files belong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fleet.errors import SettingsError
from fleet.service_settings import SERVICES
from fleet.settings import PREFIX, TOML_NAME, FleetSettings, load

S = TypeVar("S", bound=FleetSettings)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The environment a command was started in.

    Attributes:
        environ: all variables; children inherit them.
        state_dir: this user's directory for logs and notes of running fleets (XDG base directory specification).
        toml_path: the settings file in the working directory; it need not exist.
    """

    environ: Mapping[str, str]
    state_dir: Path
    toml_path: Path

    def is_given(self, name: str) -> bool:
        """Whether a variable or `baton.toml` sets this field. Raises SettingsError when the file is not TOML."""
        return variable(name) in self.environ or name in self._toml_keys()

    def _toml_keys(self) -> frozenset[str]:
        import tomllib

        try:
            return frozenset(tomllib.loads(self.toml_path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return frozenset()
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"cannot read {self.toml_path}: {error}") from error

    def load(self, kind: type[S], overrides: Mapping[str, str]) -> S:
        """Settings of one service as it will see them; `overrides` are fields by name, as text.

        Raises:
            SettingsError: an unknown name or a bad value.
        """
        environ = {key: text for key, text in self.environ.items() if key.startswith(PREFIX)} | as_variables(overrides)
        return load(
            kind, known=SERVICES, environ=environ, toml_path=self.toml_path if self.toml_path.is_file() else None
        )


def surroundings(environ: Mapping[str, str] | None = None) -> Surroundings:
    """Read them; the argument stands in for the process environment."""
    variables = dict(os.environ if environ is None else environ)
    home = Path(variables.get("HOME") or "~").expanduser()
    state_home = variables.get("XDG_STATE_HOME", "")
    # The specification says to ignore relative paths.
    base = Path(state_home) if state_home.startswith("/") else home / ".local" / "state"
    return Surroundings(environ=variables, state_dir=base / "baton", toml_path=Path(TOML_NAME))


def variable(name: str) -> str:
    """The environment variable of a field: `max_num_seqs` is `BATON_MAX_NUM_SEQS`."""
    return PREFIX + name.upper()


def as_variables(overrides: Mapping[str, str]) -> dict[str, str]:
    """Fields by name as environment variables."""
    return {variable(name): text for name, text in overrides.items()}


def without_password(url: str) -> str:
    """A URL that may be shown."""
    head, at, tail = url.rpartition("@")
    scheme, separator, _ = head.partition("://")
    return f"{scheme}{separator}***@{tail}" if at else url
