"""`python -m decode_svc`: one decode worker, configured by `BATON_*` variables and `baton.toml`."""

from __future__ import annotations

import asyncio
import sys

from fleet.lifecycle import run_from_settings
from fleet.service_settings import DecodeSettings
from fleet.worker_run import check


def main() -> int:
    """Run until a signal; returns the exit code."""

    async def serve_lazily(settings: DecodeSettings, stop: asyncio.Event) -> None:
        check(settings)  # before the engine's imports, which take seconds
        from decode_svc.service import serve

        await serve(settings, stop)

    return run_from_settings(DecodeSettings, serve_lazily, service="decode")


if __name__ == "__main__":
    sys.exit(main())
