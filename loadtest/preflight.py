"""What is settled before the first measured request: model, dialect, token costs."""

import asyncio

import msgspec

from loadtest.chunks import StreamSink
from loadtest.errors import ConnectFailed, ExchangeError, ModelUnknown, ServerRefused, ServerUnreachable
from loadtest.record import Tally
from loadtest.server import Server
from loadtest.settings import Endpoint, PromptForm, Settings
from loadtest.sizing import Sizes, find_tokenizer, from_probes, measure_words, probe_text, with_overhead
from loadtest.workload import Dialect, endpoint_path, make_body

_SMALL_PROBE_WORDS = 4
_LARGE_PROBE_WORDS = 256


class Target(msgspec.Struct, frozen=True):
    """The server as the run will use it. ``notes`` are lines that the report repeats."""

    model: str
    dialect: Dialect
    sizes: Sizes
    notes: tuple[str, ...]


async def prepare(settings: Settings, server: Server) -> Target:
    """Ask the server what the run needs to know; sends a few requests of one output token.

    Raises: ServerUnreachable, ServerRefused, ModelUnknown.
    """
    model, notes = await _pick_model(settings, server)
    dialect, prompt_tokens = await _agree(settings, server, model)
    if settings.ignore_eos is None and not dialect.ignore_eos:
        notes.append("the server refuses ignore_eos: outputs may end before their full length")
    if not dialect.include_usage:
        notes.append("the server refuses stream_options: each content chunk counts as one token")
    sizes = await _size(settings, server, model, dialect, prompt_tokens)
    if settings.prompt_form is PromptForm.TOKENS and not sizes.token_ids:
        raise ServerRefused(
            "--prompt-form tokens needs a /tokenize that returns token ids, and this server has none; "
            "use --prompt-form text"
        )
    text = settings.prompt_form is PromptForm.TEXT
    if text and settings.prompt_len.low <= sizes.overhead + settings.shared_prefix_len:
        notes.append(
            f"the chat template and special tokens alone are {sizes.overhead:.0f} tokens: "
            "the shortest prompts come out longer than asked"
        )
    return Target(model, dialect, sizes, tuple(notes))


async def _pick_model(settings: Settings, server: Server) -> tuple[str, list[str]]:
    path = f"{server.base}/models"
    try:
        answer = await server.get_json(path)
    except ServerUnreachable:
        raise
    except ExchangeError as error:
        if settings.model is not None:
            return settings.model, [f"{path} is not readable ({error}); the model name was taken on trust"]
        raise ServerRefused(f"{path} is not readable ({error}); name the model with --model") from error
    if answer.status in {401, 403}:
        raise ServerRefused(
            f"{path} answered {answer.status} ({answer.message}): give a valid key with --api-key "
            "or the variable OPENAI_API_KEY"
        )
    data = answer.body.get("data") if isinstance(answer.body, dict) and answer.status == 200 else None
    if not isinstance(data, list):
        if settings.model is not None:
            return settings.model, [f"{path} lists no models; the model name was taken on trust"]
        raise ServerRefused(
            f"{path} answered {answer.status} ({answer.message}): check that --url ends where the OpenAI paths "
            "begin (usually /v1), or name the model with --model"
        )
    names = [str(entry["id"]) for entry in data if isinstance(entry, dict) and "id" in entry]
    if settings.model is not None:
        if settings.model not in names:
            raise ModelUnknown(f"no model {settings.model!r} at {server.address}; it serves {_listed(names)}")
        return settings.model, []
    if len(names) != 1:
        raise ModelUnknown(f"{server.address} serves {_listed(names)}; name one with --model")
    return names[0], []


async def _agree(settings: Settings, server: Server, model: str) -> tuple[Dialect, int | None]:
    """Find the richest dialect that the server takes; also return the small probe's prompt tokens."""
    status, message = 0, ""
    for dialect in _ladder(settings):
        status, message, tokens = await _probe(settings, server, model, dialect, probe_text(_SMALL_PROBE_WORDS))
        if status == 200:
            return dialect, tokens
        if status not in {400, 422}:
            break
    hints = {
        401: "give a valid key with --api-key",
        403: "give a key that may use this model with --api-key",
        404: "check --url, --model and --endpoint",
        429: "it is already at its limit; wait, or raise the key's limit",
        503: "it has no worker ready; wait until it has",
    }
    hint = hints.get(status, "check --endpoint, --extra-body, --temperature and --ignore-eos")
    raise ServerRefused(f"{endpoint_path(settings, server)} answered a probe request with {status} ({message}): {hint}")


def _ladder(settings: Settings) -> list[Dialect]:
    limits = ["max_tokens"]
    if settings.endpoint is Endpoint.CHAT:
        limits.append("max_completion_tokens")
    wishes = [True, False] if settings.ignore_eos is None else [settings.ignore_eos]
    ladder = [Dialect(ignore_eos=ignore, limit_field=limit) for ignore in wishes for limit in limits]
    return [*ladder, Dialect(ignore_eos=wishes[-1], include_usage=False)]


async def _probe(
    settings: Settings, server: Server, model: str, dialect: Dialect, text: str
) -> tuple[int, str, int | None]:
    """Send one request of one output token; return status, error message and prompt tokens."""
    body = make_body(settings, model, dialect, text, 1)
    request = server.post_bytes(endpoint_path(settings, server), msgspec.json.encode(body))
    sink = StreamSink(Tally())
    try:
        async with asyncio.timeout(settings.timeout_s):
            await server.send(request, sink)
    except ConnectFailed as error:
        raise ServerUnreachable(settings.url, str(error)) from error
    except ExchangeError as error:
        raise ServerRefused(f"a probe request failed: {error}") from error
    except TimeoutError as error:
        raise ServerRefused(
            f"a probe request had no end within {settings.timeout_s:g} s; is the server well? "
            "Raise --timeout-s if it is only slow"
        ) from error
    if sink.status == 200 and (failure := sink.failure or sink.fault()) is not None:
        raise ServerRefused(f"a probe request was not answered with a usable stream: {failure}")
    return sink.status or 0, sink.error_message(), sink.usage.prompt_tokens if sink.usage else None


async def _size(settings: Settings, server: Server, model: str, dialect: Dialect, small_tokens: int | None) -> Sizes:
    count = await find_tokenizer(server, model)
    if count is not None:
        try:
            sizes = await measure_words(count)
        except ExceptionGroup as group:
            first = group.exceptions[0]
            if not isinstance(first, (ExchangeError, ServerUnreachable)):
                raise
            raise ServerRefused(f"/tokenize stopped answering: {first}") from first
        return with_overhead(sizes, _SMALL_PROBE_WORDS, small_tokens)
    small = (_SMALL_PROBE_WORDS, small_tokens)
    num_words = max(2 * _SMALL_PROBE_WORDS, min(_LARGE_PROBE_WORDS, settings.prompt_len.high))
    while small_tokens is not None and num_words > _SMALL_PROBE_WORDS:
        status, _, tokens = await _probe(settings, server, model, dialect, probe_text(num_words, spread=True))
        if status == 200:
            return from_probes(small, (num_words, tokens))
        if status not in {400, 413, 422}:
            break
        num_words //= 2  # too long for the model's context
    return from_probes(small, (num_words, None))


def _listed(names: list[str]) -> str:
    if not names:
        return "no model at all"
    shown = ", ".join(names[:8])
    return f"{len(names)} models, among them {shown}" if len(names) > 8 else shown
