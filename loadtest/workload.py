"""The requests of a run, made one after the other from the seed."""

from typing import Any

import msgspec
import numpy as np

from loadtest.server import Server
from loadtest.settings import Endpoint, PromptForm, Settings
from loadtest.sizing import Sizes


class Dialect(msgspec.Struct, frozen=True):
    """Which optional fields the server takes; settled before the run by :mod:`loadtest.preflight`."""

    ignore_eos: bool = False
    limit_field: str = "max_tokens"
    include_usage: bool = True


class Call(msgspec.Struct, frozen=True):
    """One request ready to send: the bytes for the socket and the lengths they ask for, in tokens."""

    index: int
    request: bytes
    prompt_tokens: int
    output_tokens: int


def make_body(
    settings: Settings, model: str, dialect: Dialect, prompt: str | list[int], output_tokens: int
) -> dict[str, Any]:
    """Return the JSON body of one streamed request; ``--extra-body`` has the last word."""
    body: dict[str, Any] = {"model": model}
    if settings.endpoint is Endpoint.CHAT:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    body[dialect.limit_field] = output_tokens
    body["temperature"] = settings.temperature
    body["stream"] = True
    if dialect.include_usage:
        body["stream_options"] = {"include_usage": True}
    if dialect.ignore_eos:
        body["ignore_eos"] = True
    return body | settings.extra_body


def endpoint_path(settings: Settings, server: Server) -> str:
    """Return the path that takes the requests."""
    name = "chat/completions" if settings.endpoint is Endpoint.CHAT else "completions"
    return f"{server.base}/{name}"


class Workload:
    """Makes calls without end.

    Lengths, prompts and the choice of prefix follow from ``settings.seed`` alone: neither the rate nor the
    answers change them. ``warmup`` gives other prompts with the same shared prefixes, so that a warm-up
    warms nothing of the measured requests but those.
    """

    def __init__(
        self,
        settings: Settings,
        server: Server,
        model: str,
        dialect: Dialect,
        sizes: Sizes,
        *,
        warmup: bool = False,
    ) -> None:
        self._settings = settings
        self._server = server
        self._model = model
        self._dialect = dialect
        self._sizes = sizes
        self._path = endpoint_path(settings, server)
        self._costs = np.array(sizes.costs)  # [W] float64
        prefixes, lengths, words = np.random.SeedSequence((settings.seed, int(warmup))).spawn(3)
        if warmup:
            prefixes = np.random.SeedSequence((settings.seed, 0)).spawn(1)[0]
        self._length_rng = np.random.default_rng(lengths)
        self._word_rng = np.random.default_rng(words)
        self._next_index = 0
        prefix_rng = np.random.default_rng(prefixes)
        self._prefixes: list[list[int]] = [
            self._draw(settings.shared_prefix_len, prefix_rng) if settings.shared_prefix_len else []
            for _ in range(settings.num_prefixes)
        ]

    def next_call(self) -> Call:
        """Make the next call. Mutates: this object's random state."""
        settings = self._settings
        prompt_tokens = settings.prompt_len.draw(self._length_rng)
        output_tokens = settings.output_len.draw(self._length_rng)
        prefix = self._prefixes[int(self._length_rng.integers(len(self._prefixes)))]
        prompt: str | list[int]
        if settings.prompt_form is PromptForm.TOKENS:
            prompt = prefix + self._draw(prompt_tokens - len(prefix), self._word_rng)
        else:
            spent = self._sizes.overhead + (float(self._costs[prefix].sum()) if prefix else 0.0)
            places = prefix + self._draw(max(0.0, prompt_tokens - spent), self._word_rng)
            prompt = " ".join(self._sizes.words[place] for place in places)
        body = make_body(settings, self._model, self._dialect, prompt, output_tokens)
        request = self._server.post_bytes(self._path, msgspec.json.encode(body))
        call = Call(self._next_index, request, prompt_tokens, output_tokens)
        self._next_index += 1
        return call

    def _draw(self, tokens: float, rng: np.random.Generator) -> list[int]:
        """Return random token ids, or places in the word list, worth ``tokens``; at least one."""
        if self._settings.prompt_form is PromptForm.TOKENS:
            return [int(token) for token in rng.choice(self._sizes.token_ids, int(tokens))]
        if not self._sizes.exact:
            number = max(1, round(tokens / self._costs[0]))
            return [int(place) for place in rng.integers(len(self._costs), size=number)]
        return self._draw_exactly(tokens, rng)

    def _draw_exactly(self, tokens: float, rng: np.random.Generator) -> list[int]:
        costs = self._costs
        cheapest = float(costs.min())
        places = rng.integers(len(costs), size=int(tokens / cheapest) + 1)
        num_fitting = int(np.searchsorted(np.cumsum(costs[places]), tokens, side="right"))
        # The last word that fits may leave a rest that no word fills: choose the last ones with care.
        kept = [int(place) for place in places[: max(0, num_fitting - 1)]]
        rest = tokens - float(costs[kept].sum()) if kept else tokens
        while rest >= cheapest:
            after = rest - costs
            (good,) = np.nonzero((after == 0) | (after >= cheapest))
            (fitting,) = np.nonzero(after >= 0)
            place = int(rng.choice(good if good.size else fitting))
            kept.append(place)
            rest -= float(costs[place])
        return kept or [int(costs.argmin())]
