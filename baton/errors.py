"""What the command reports instead of doing what was asked.

BatonError
└── CommandError             ends the command with exit code 1 and one sentence
    ├── PortInUse            somebody else listens where the gateway should
    ├── RedisUnusable        no embedded server here, or the configured one does not answer
    ├── ServiceDied          a service ended before it was ready, or too often; holds its last log lines
    ├── NotReadyInTime       the fleet did not become ready within the time given
    ├── NoSuchModel          the model to serve is not where it should be
    ├── StateUnwritable      nowhere to put logs and the note of the running fleet
    ├── NoFleet              no Redis was named and no running `baton up` was found
    └── SeveralFleets        several are running and none was named
"""

from __future__ import annotations

from collections.abc import Sequence

from fleet.errors import BatonError

BAD_SETTINGS_CODE = 2


class CommandError(BatonError):
    """The command cannot do what was asked; the message says why and what to do."""

    exit_code = 1


class PortInUse(CommandError):
    """The gateway's port cannot be had."""


class RedisUnusable(CommandError):
    """There is no Redis to work with."""


class ServiceDied(CommandError):
    """A service ended when it should run.

    Attributes:
        log_lines: the last lines it wrote.
    """

    def __init__(self, name: str, *, code: int, log_lines: Sequence[str], log_path: str, why: str) -> None:
        self.log_lines = list(log_lines)
        # A service that refuses its settings says so with this code; the command passes it on.
        self.exit_code = BAD_SETTINGS_CODE if code == BAD_SETTINGS_CODE else 1
        super().__init__(f"{name} {why} ({describe_exit(code)}); its log is {log_path}")


class NotReadyInTime(CommandError):
    """The fleet took too long."""


class NoSuchModel(CommandError):
    """The model is not there."""


class StateUnwritable(CommandError):
    """The state directory cannot be written."""


class NoFleet(CommandError):
    """Nothing says which Redis to use."""


class SeveralFleets(CommandError):
    """More than one fleet could be meant."""


def describe_exit(code: int) -> str:
    """An exit status in words: `exit code 1`, `killed by SIGKILL`."""
    import signal

    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
