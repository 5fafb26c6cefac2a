"""Settings: frozen, read once, from `BATON_*` variables, `baton.toml` and the command line.

A service's settings are one struct; each field `max_step_tokens` is the variable `BATON_MAX_STEP_TOKENS`, the key
`max_step_tokens` in `baton.toml`, and the flag `--max-step-tokens` of `baton up`. An unknown or bad value stops the
start and names itself. `os.environ` is read here and nowhere else.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from fleet.errors import SettingsError

PREFIX = "BATON_"
TOML_NAME = "baton.toml"


class FleetSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every service needs: how to find and trust the others."""

    redis_url: Annotated[str, Meta(description="Redis that holds registry, request state and keys")] = (
        "redis://127.0.0.1:6379/0"
    )
    namespace: Annotated[
        str, Meta(description="prefix of all Redis keys; one fleet each", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    ] = "baton"
    name: Annotated[
        str, Meta(description="this process's name in the fleet; drawn at random when empty", max_length=64)
    ] = ""
    bind_host: Annotated[str, Meta(description="address on which this process's inbox listens")] = "127.0.0.1"
    advertise_host: Annotated[
        str, Meta(description="address under which others reach the inbox; default: bind_host")
    ] = ""
    cluster_secret: Annotated[
        str, Meta(description="shared by the fleet; keys of all sockets beyond loopback derive from it")
    ] = ""
    lease_s: Annotated[float, Meta(description="a process that is silent this long counts as gone", ge=0.3, le=300)] = (
        3.0
    )
    log_level: Annotated[str, Meta(description="debug, info, warning or error")] = "info"
    log_format: Annotated[str, Meta(description="console or json")] = "console"
    liveness_file: Annotated[
        str, Meta(description="file touched at every heartbeat, for health checks; empty: none")
    ] = ""

    @property
    def heartbeat_s(self) -> float:
        """Seconds between heartbeats: six of them fit into a lease, so five may be lost."""
        return self.lease_s / 6


S = TypeVar("S", bound=FleetSettings)


def field_names(kinds: Iterable[type[FleetSettings]]) -> set[str]:
    """All field names of these settings structs."""
    return {name for kind in kinds for name in kind.__struct_fields__}


def environment() -> dict[str, str]:
    """The `BATON_*` part of the process environment."""
    return {key: value for key, value in os.environ.items() if key.startswith(PREFIX)}


def user_cache(environ: Mapping[str, str] | None = None) -> Path:
    """Where files of this user's belong that can be made again (XDG base directory specification)."""
    environ = os.environ if environ is None else environ
    home = environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore relative paths.
    return (Path(home) if home.startswith("/") else Path("~/.cache").expanduser()) / "baton"


def load(
    kind: type[S],
    *,
    known: Iterable[type[FleetSettings]] = (),
    environ: Mapping[str, str] | None = None,
    toml_path: Path | None = None,
) -> S:
    """Read settings of `kind`; variables win over `baton.toml`, which wins over the defaults.

    Args:
        kind: the settings struct to fill.
        known: structs whose fields may also be present, since services share one environment and one file.
        environ: variables to read instead of the process environment.
        toml_path: file to read instead of `baton.toml` in the working directory, if that exists.

    Raises:
        SettingsError: a name is unknown or a value is bad; the message names it.
    """
    environ = environment() if environ is None else environ
    path = Path(TOML_NAME) if toml_path is None else toml_path
    mine = set(kind.__struct_fields__)
    others = field_names(known)
    values: dict[str, tuple[str, object]] = {}
    if toml_path is not None or path.is_file():
        for key, value in _read_toml(path).items():
            values[key] = (f"{path}: {key}", value)
    for key, text in environ.items():
        if key.startswith(PREFIX):
            values[key[len(PREFIX) :].lower()] = (key, text)
    chosen: dict[str, Any] = {}
    for name, (source, value) in values.items():
        if name in mine:
            chosen[name] = _convert(kind, name, value, source)
        elif name not in others:
            raise SettingsError(f"{source} is not a setting of Baton; {_nearest(name, mine | others)}")
    return kind(**chosen)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error


def _convert(kind: type[FleetSettings], name: str, value: object, source: str) -> Any:
    try:
        return parse(value, get_type_hints(kind, include_extras=True)[name])
    except ValueError as error:
        # A secret or a URL with a password must not be echoed into a log.
        shown = "***" if "secret" in name or "url" in name else repr(value)
        raise SettingsError(f"{source} = {shown}: {error}") from error


def parse(value: object, annotation: Any) -> Any:
    """A setting's value from text or TOML; ValueError says what is wrong with it, or what there is to choose from."""
    try:
        return msgspec.convert(value, annotation, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        *others, last = choices(annotation) or (str(error),)
        raise ValueError(f"{', '.join(others)} or {last}" if others else last) from error


def choices(annotation: Any) -> tuple[str, ...]:
    """All values of a setting that has only a few; else none."""
    base = base_of(annotation)
    return get_args(base) if get_origin(base) is Literal else ()


def base_of(annotation: Any) -> Any:
    """A setting's type without what is said about it."""
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def _nearest(name: str, names: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f"did you mean {PREFIX}{close[0].upper()}?" if close else "see the table of settings in the README"
