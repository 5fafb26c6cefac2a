"""Every setting of every service as a flag of `baton up`, made from the settings structs themselves."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import msgspec

from fleet.service_settings import DecodeSettings, GatewaySettings, PrefillSettings, WorkerSettings
from fleet.settings import FleetSettings, base_of, choices, parse

# One file or address for several processes would tell nothing; these are for one service in a container.
NOT_FLAGS = frozenset({"liveness_file", "admin_address"})
_SECTIONS: tuple[tuple[str, type[FleetSettings], type[FleetSettings] | None], ...] = (
    ("every service", FleetSettings, None),
    ("workers", WorkerSettings, FleetSettings),
    ("prefill workers", PrefillSettings, WorkerSettings),
    ("decode workers", DecodeSettings, WorkerSettings),
    ("gateway", GatewaySettings, FleetSettings),
)
_DEST = "setting:"


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field, grouped by who reads it. Mutates `parser`."""
    for title, kind, base in _SECTIONS:
        group = parser.add_argument_group(f"settings of {title}" if title != "gateway" else "settings of the gateway")
        inherited = set() if base is None else set(base.__struct_fields__)
        hints = get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            if field.name not in inherited and field.name not in NOT_FLAGS:
                _add_flag(group, field, hints[field.name])


def overrides_of(namespace: argparse.Namespace) -> dict[str, str]:
    """The settings that were given as flags: field names and values as text, checked already."""
    given = vars(namespace)
    return {key.removeprefix(_DEST): value for key, value in given.items() if key.startswith(_DEST)}


def explain_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """One sentence about arguments that nobody knows, with the nearest flag there is."""
    first = unknown[0].partition("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings]  # noqa: SLF001 - no public list
    close = difflib.get_close_matches(first, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; see `baton up --help`"
    return f"unknown argument {first}{hint}"


class _SwitchAction(argparse.Action):
    """`--flag` and `--no-flag`, kept as the text that a variable would hold."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - argparse's signature
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,  # noqa: ARG002
        option_string: str | None = None,
    ) -> None:
        """Store `true` or `false`."""
        setattr(namespace, self.dest, "false" if (option_string or "").startswith("--no-") else "true")


def _add_flag(group: argparse._ArgumentGroup, field: msgspec.structs.FieldInfo, annotation: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    dest = _DEST + field.name
    description = _description(annotation)
    shown = "" if field.default in {"", None} or field.default is msgspec.NODEFAULT else f" (default: {field.default})"
    text = (description + shown).replace("%", "%%")
    base = base_of(annotation)
    if base is bool:
        negative = "--no-" + field.name.replace("_", "-")
        group.add_argument(
            flag, negative, dest=dest, action=_SwitchAction, nargs=0, default=argparse.SUPPRESS, help=text
        )
        return
    metavar = {int: "N", float: "X"}.get(base, "|".join(choices(annotation)) or "TEXT")
    group.add_argument(
        flag, dest=dest, type=_checked(annotation), default=argparse.SUPPRESS, metavar=metavar, help=text
    )


def _description(annotation: Any) -> str:
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, msgspec.Meta) and extra.description:
            return extra.description
    return ""


def _checked(annotation: Any) -> Callable[[str], str]:
    def check(text: str) -> str:
        try:
            parse(text, annotation)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check
