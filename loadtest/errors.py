"""What can stop a load test before or while it runs.

::

    LoadTestError               exit code 1
    ├── BadArgument             exit code 2: an option's value cannot be used; names the option
    ├── SetupError              exit code 3: the server cannot be tested as asked
    │   ├── ServerUnreachable   nothing answers at the address
    │   ├── ServerRefused       something answers, but refuses what every request of the run needs
    │   └── ModelUnknown        the model is missing, or several are served and none was named
    └── ExchangeError           one HTTP exchange failed; becomes that request's outcome
        ├── ConnectFailed       no connection came about
        ├── ConnectionBroken    the peer left before its answer was whole
        └── BadAnswer           the bytes are not an HTTP or JSON answer we can read
"""


class LoadTestError(Exception):
    """Root of this package's errors; ``exit_code`` is what the command returns for it."""

    exit_code = 1


class BadArgument(LoadTestError):  # the tree names what happened
    """An option's value cannot be used. The message names the option and says what to give instead."""

    exit_code = 2

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option = option


class SetupError(LoadTestError):
    """The server cannot be tested as asked; no measured request was sent."""

    exit_code = 3


class ServerUnreachable(SetupError):
    """Nothing answers at the address."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"cannot reach {url}: {reason}. Start the server, or give its address with --url "
            "(scheme, host, port and the path before /chat/completions, usually /v1)"
        )


class ServerRefused(SetupError):
    """Something answers, but refuses what every request of the run needs."""


class ModelUnknown(SetupError):
    """The model is missing, or several are served and none was named."""


class ExchangeError(LoadTestError):
    """One HTTP exchange failed; becomes that request's outcome."""


class ConnectFailed(ExchangeError):
    """No connection came about."""


class ConnectionBroken(ExchangeError):
    """The peer left before its answer was whole."""


class BadAnswer(ExchangeError):
    """The bytes are not an HTTP or JSON answer we can read."""
