"""`python -m gateway`: one gateway, configured by `BATON_*` variables and `baton.toml`."""

from __future__ import annotations

import sys

from fleet.lifecycle import run_from_settings
from fleet.service_settings import GatewaySettings
from gateway.service import serve


def main() -> int:
    """Run until a signal; returns the exit code."""
    return run_from_settings(GatewaySettings, serve, service="gateway")


if __name__ == "__main__":
    sys.exit(main())
