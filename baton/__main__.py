"""`python -m baton` is the `baton` command."""

from __future__ import annotations

import sys

from baton.cli import main

if __name__ == "__main__":
    sys.exit(main())
