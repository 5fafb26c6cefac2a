"""`python -m decode_svc`: one decode worker, configured by `BATON_*` variables and `baton.toml`."""

from __future__ import annotations

import asyncio
import sys

from fleet.lifecycle import run_from_settings
from fleet.service_settings import DecodeSettings


def main() -> int:
    """Run until a signal; returns the exit code."""

    async def serve_lazily(settings: DecodeSettings, stop: asyncio.Event) -> None:
        # The engine's imports take seconds; settings are checked before.
        from decode_svc.service import serve

        await serve(settings, stop)

    return run_from_settings(DecodeSettings, serve_lazily, service="decode")


if __name__ == "__main__":
    sys.exit(main())
