"""What handlers share: the pipeline, the limiter, the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from fleet.keys import ApiKey
from fleet.usage import Counts, UsageRow
from gateway.api.auth import STATE_KEY
from gateway.api.config import ApiConfig
from gateway.api.rate_limit import RateLimiter
from gateway.api.replies import AnyRequest
from gateway.errors import NotAllowed, Unavailable, UnknownModel
from gateway.pipeline import Pipeline, ServedModel

if TYPE_CHECKING:
    from gateway.api.responses_api.background import BackgroundRuns
    from gateway.api.responses_api.store import ResponseStore


class UsageLedger(Protocol):
    """Where usage is counted: `fleet.usage.MemoryUsage` or `RedisUsage`."""

    def add(self, key_id: str, model: str, counts: Counts) -> None:
        """Count. Never waits."""
        ...

    async def read(self, from_s: int, to_s: int) -> list[UsageRow]:
        """Hourly rows. Raises what Redis raises."""
        ...


OwnId = tuple[str | None, str]
"""An API key's id and a request id that its owner chose."""


class ApiContext:
    """Made once by `create_app`.

    Attributes:
        responses, background: stored responses and those that run on their own; None without Redis.
    """

    def __init__(self, pipeline: Pipeline, config: ApiConfig, limiter: RateLimiter, usage: UsageLedger) -> None:
        self.pipeline = pipeline
        self.config = config
        self.limiter = limiter
        self.responses: ResponseStore | None = None
        self.background: BackgroundRuns | None = None
        self.usage = usage
        self.ids_under_way: set[OwnId] = set()

    def find_model(self, name: str, key: ApiKey | None) -> ServedModel:
        """The model a client asked for. Raises: UnknownModel, also for one that the key may not use."""
        model = self.pipeline.model(name)
        if model is None or not may_use(key, model):
            raise UnknownModel(name[:200])
        return model

    def fingerprint(self, model: ServedModel) -> str:
        """`system_fingerprint`: changes with Baton's version and the model's files."""
        return f"baton-{self.config.version}-{model.card.digest}"


Api = NamedDependency[SkipValidation[ApiContext]]


def caller_key(request: AnyRequest) -> ApiKey | None:
    """The API key that the guard found, None on an open server."""
    key = request.scope["state"].get(STATE_KEY)
    return key if isinstance(key, ApiKey) else None


def require_admin(request: AnyRequest) -> None:
    """Raises: NotAllowed unless the caller's key has the admin scope. A server without keys is open."""
    key = caller_key(request)
    if key is not None and not key.admin:
        raise NotAllowed("This needs a key with the admin scope; make one with `baton keys create NAME --admin`.")


def may_use(key: ApiKey | None, model: ServedModel) -> bool:
    """Whether the key's list of models, if it has one, names this one."""
    return key is None or not key.models or not {model.name, *model.aliases}.isdisjoint(key.models)


def model_or_only(api: ApiContext, name: str | None, request: AnyRequest) -> ServedModel:
    """The named model; without a name, the first one served."""
    key = caller_key(request)
    if name is not None:
        return api.find_model(name, key)
    for model in api.pipeline.models():
        if may_use(key, model):
            return model
    if key is not None and key.models:
        raise UnknownModel(key.models[0])
    raise Unavailable("No model is served yet.", retry_after_s=1)
