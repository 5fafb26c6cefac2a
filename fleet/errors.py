"""The error tree of the shared floor.

BatonError
├── SettingsError            a setting is unknown or bad; names itself
├── WireError                bytes that are not a message of ours
│   ├── WrongVersion         the peer speaks another protocol version
│   └── Malformed            the bytes do not decode, or a field is out of bounds
├── BusError
│   ├── BusClosed            the bus was used after close()
│   └── AddressInUse         the socket could not bind
├── RegistryError
│   └── NameTaken            another live process holds this worker name
└── ModelError
    ├── ModelNotFound        no such directory or hub id
    └── UnsupportedModel     the checkpoint needs something we do not have; names it

Other rooms hang their own branches under `BatonError` in their own `errors.py`.
"""


class BatonError(Exception):
    """Root of every error that Baton raises on purpose."""


class SettingsError(BatonError):
    """A setting is unknown or has a bad value. The message names the setting and says what is accepted."""


class WireError(BatonError):
    """Bytes arrived that are not a message of ours."""


class WrongVersion(WireError):
    """The peer speaks another version of the protocol."""

    def __init__(self, *, expected: int, actual: int) -> None:
        super().__init__(f"peer speaks protocol version {actual}, this process speaks {expected}")
        self.expected = expected
        self.actual = actual


class Malformed(WireError):
    """The bytes do not decode into a known message, or a field is out of bounds."""


class BusError(BatonError):
    """The message bus cannot do what was asked."""


class BusClosed(BusError):
    """The bus was used after `close()`."""


class AddressInUse(BusError):
    """The bus could not bind its inbox."""


class RegistryError(BatonError):
    """The registry refuses."""


class NameTaken(RegistryError):
    """Another live process is registered under this name."""


class ModelError(BatonError):
    """A checkpoint cannot be served."""


class ModelNotFound(ModelError):
    """No such directory or hub id."""


class UnsupportedModel(ModelError):
    """The checkpoint needs something that Baton does not have. The message names it."""
