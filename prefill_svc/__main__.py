"""`python -m prefill_svc`: one prefill worker, configured by `BATON_*` variables and `baton.toml`."""

from __future__ import annotations

import asyncio
import sys

from fleet.lifecycle import run_from_settings
from fleet.service_settings import PrefillSettings
from fleet.worker_run import check


def main() -> int:
    """Run until a signal; returns the exit code."""

    async def serve_lazily(settings: PrefillSettings, stop: asyncio.Event) -> None:
        check(settings)  # before the engine's imports, which take seconds
        from prefill_svc.service import serve

        await serve(settings, stop)

    return run_from_settings(PrefillSettings, serve_lazily, service="prefill")


if __name__ == "__main__":
    sys.exit(main())
