"""Where a model's files lie: a local directory, or a snapshot of a Hugging Face hub id."""

from __future__ import annotations

from pathlib import Path

from fleet.errors import ModelNotFound

_WEIGHTS = "*.safetensors"
_WANTED = (
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "chat_templates/*",
)
_UNWANTED = ("original/*", "consolidated*.safetensors", "adapter_*", "onnx/*")


def resolve_model(name: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The directory that holds `config.json` and, unless they are not wanted, weights for `name`.

    A path to a directory is used as it is, without the network. Anything else is taken for a hub id (`org/name`) and
    fetched into the Hugging Face cache, or found there when offline (`HF_HUB_OFFLINE`). Blocking, for minutes on a
    first download.

    Raises:
        ModelNotFound: no such directory, no such id, no access, or the hub cannot be reached.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelNotFound(f"{directory} holds no config.json")
        return directory.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelNotFound(f"{name!r} is not a directory")
    return _snapshot(name, revision, [*_WANTED, _WEIGHTS] if weights else [*_WANTED])


def _snapshot(hub_id: str, revision: str | None, wanted: list[str]) -> Path:
    """Download or find a snapshot. Raises ModelNotFound."""
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=list(_UNWANTED))
    except GatedRepoError as error:
        raise ModelNotFound(f"{hub_id} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(f"{hub_id} is neither a directory nor cached, and the hub cannot be reached") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelNotFound(f"{hub_id} is neither a directory nor a hub id: {error}") from error
    except (HTTPError, OSError) as error:
        raise ModelNotFound(f"{hub_id} cannot be fetched: {error}") from error
    return Path(path)
