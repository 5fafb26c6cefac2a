"""The README's table of settings is what the settings are."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import msgspec

from fleet.service_settings import SERVICES, DecodeSettings, GatewaySettings, PrefillSettings

README = Path(__file__).parents[3] / "README.md"
BEGIN = "<!-- settings: written by tests/unit/fleet/test_settings_table.py -->\n"
END = "<!-- end of settings -->\n"
NAMES = {GatewaySettings: "gateway", PrefillSettings: "prefill", DecodeSettings: "decode"}


def table() -> str:
    rows: dict[str, tuple[list[str], str, str]] = {}
    for kind in SERVICES:
        hints = get_type_hints(kind, include_extras=True)
        for info in msgspec.structs.fields(kind):
            meta = next(part for part in get_args(hints[info.name]) if isinstance(part, msgspec.Meta))
            default = "" if info.default == "" else f"`{str(info.default).lower()}`"
            entry = rows.setdefault(info.name, ([], default, str(meta.description)))
            entry[0].append(NAMES[kind])
    lines = ["| variable | read by | default | meaning |", "| --- | --- | --- | --- |"]
    for name, (readers, default, meaning) in rows.items():
        who = "all" if len(readers) == len(SERVICES) else ", ".join(readers)
        lines.append(f"| `BATON_{name.upper()}` | {who} | {default} | {meaning} |")
    return "\n" + "\n".join(lines) + "\n\n"


def test_the_readme_shows_every_setting() -> None:
    text = README.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0]
    assert shown == table(), "the table of settings in README.md is out of date; it should be:\n" + table()
