"""The requests of a run, made one after the other from the seed."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from loadtest.server import Server
from loadtest.settings import Endpoint, PromptForm, Settings
from loadtest.sizing import Sizes
from loadtest.traces import TRACE_PAGE_TOKENS, Entry

_TRACE_PREFIX = 1_000_003
_THINKING = 1_000_033
"""Words apart from the seeds of prompts, so that no two draws share random numbers."""

Message = dict[str, str]


class Dialect(msgspec.Struct, frozen=True):
    """Which optional fields the server takes; settled before the run by :mod:`loadtest.preflight`."""

    ignore_eos: bool = False
    limit_field: str = "max_tokens"
    include_usage: bool = True


class Share(msgspec.Struct, frozen=True):
    """Which requests are ours when several processes share a load: those whose number is ``index`` modulo ``of``."""

    index: int = 0
    of: int = 1

    def count_of(self, total: int) -> int:
        """Return how many of the first ``total`` are ours."""
        return len(range(self.index, total, self.of))


class Call(msgspec.Struct, frozen=True):
    """One request ready to send: the bytes for the socket and the lengths they ask for, in tokens.

    ``turn`` counts from 0 within a conversation of ``turns``; ``messages`` is the conversation so far, empty where it
    ends here. ``think_s`` is the pause before each later turn.
    """

    index: int
    request: bytes
    prompt_tokens: int
    output_tokens: int
    turn: int = 0
    turns: int = 1
    messages: tuple[Message, ...] = ()
    think_s: tuple[float, ...] = ()


class _Ask(msgspec.Struct, frozen=True):
    """What a request shall be like, before it has words."""

    prompt_tokens: int
    output_tokens: int
    prefix: int
    turns: int
    trace_ids: tuple[int, ...] = ()


def make_body(
    settings: Settings,
    model: str,
    dialect: Dialect,
    prompt: str | list[int],
    output_tokens: int,
    history: Sequence[Message] = (),
) -> dict[str, Any]:
    """Return the JSON body of one streamed request; ``--extra-body`` has the last word.

    ``history`` is what was said before ``prompt``, in a conversation.
    """
    body: dict[str, Any] = {"model": model}
    if settings.endpoint is Endpoint.CHAT:
        body["messages"] = [*history, {"role": "user", "content": prompt}]
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
    answers nor the number of processes change them; only later turns of conversations hold what was answered.
    ``warmup`` gives other prompts with the same shared prefixes, so that a warm-up warms nothing of the measured
    requests but those. ``trace`` gives lengths and prefixes instead, for as many calls as it has entries.
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
        share: Share | None = None,
        trace: Sequence[Entry] = (),
    ) -> None:
        self._settings = settings
        self._server = server
        self._model = model
        self._dialect = dialect
        self._sizes = sizes
        self._share = share or Share()
        self._trace = trace
        self._path = endpoint_path(settings, server)
        self._costs = np.array(sizes.costs)  # [W] float64
        self._seed = (settings.seed, int(warmup))
        prefixes, lengths = np.random.SeedSequence(self._seed).spawn(2)
        if warmup:
            prefixes = np.random.SeedSequence((settings.seed, 0)).spawn(1)[0]
        self._length_rng = np.random.default_rng(lengths)
        self._next_index = 0
        prefix_rng = np.random.default_rng(prefixes)
        self._prefixes: list[list[int]] = [
            self._draw(settings.shared_prefix_len, prefix_rng) if settings.shared_prefix_len else []
            for _ in range(settings.num_prefixes)
        ]

    def next_call(self) -> Call:
        """Make the next call of our share. Mutates: this object's random state."""
        while True:
            index, ask = self._next_index, self._next_ask()
            self._next_index += 1
            if index % self._share.of == self._share.index:
                return self._first_turn(index, ask)

    def follow_up(self, call: Call, answer: str, answer_tokens: int) -> Call:
        """Return the next turn of the conversation of ``call``, which got ``answer``."""
        settings = self._settings
        rng = np.random.default_rng((*self._seed, call.index, call.turn + 1))
        words = settings.prompt_len.draw(rng)
        text = self._text(self._draw(max(1.0, words - self._sizes.overhead), rng))
        history = (*call.messages, {"role": "assistant", "content": answer})
        output_tokens = settings.output_len.draw(rng)
        return msgspec.structs.replace(
            call,
            request=self._request(text, output_tokens, history),
            prompt_tokens=call.prompt_tokens + answer_tokens + words,
            output_tokens=output_tokens,
            turn=call.turn + 1,
            messages=(*history, {"role": "user", "content": text}),
        )

    def _next_ask(self) -> _Ask:
        settings, rng = self._settings, self._length_rng
        if self._trace:
            entry = self._trace[self._next_index]
            return _Ask(entry.prompt_tokens, entry.output_tokens, 0, 1, entry.prefix_ids)
        return _Ask(
            prompt_tokens=settings.prompt_len.draw(rng),
            output_tokens=settings.output_len.draw(rng),
            prefix=int(rng.integers(len(self._prefixes))),
            turns=settings.turns.draw(rng),
        )

    def _first_turn(self, index: int, ask: _Ask) -> Call:
        rng = np.random.default_rng((*self._seed, index))
        prefix = self._trace_prefix(ask) if ask.trace_ids else self._prefixes[ask.prefix]
        prompt: str | list[int]
        if self._settings.prompt_form is PromptForm.TOKENS:
            prompt = (prefix + self._draw(max(0, ask.prompt_tokens - len(prefix)), rng))[: ask.prompt_tokens]
        else:
            spent = self._sizes.overhead + (float(self._costs[prefix].sum()) if prefix else 0.0)
            prompt = self._text(prefix + self._draw(max(0.0, ask.prompt_tokens - spent), rng))
        if ask.turns == 1 or not isinstance(prompt, str):
            return Call(index, self._request(prompt, ask.output_tokens), ask.prompt_tokens, ask.output_tokens)
        return Call(
            index,
            self._request(prompt, ask.output_tokens),
            ask.prompt_tokens,
            ask.output_tokens,
            turns=ask.turns,
            messages=({"role": "user", "content": prompt},),
            think_s=self._thinking(index, ask.turns - 1),
        )

    def _thinking(self, index: int, number: int) -> tuple[float, ...]:
        mean_s = self._settings.think_s
        if mean_s == 0:
            return (0.0,) * number
        rng = np.random.default_rng((*self._seed, index, _THINKING))
        return tuple(map(float, rng.exponential(mean_s, number)))

    def _trace_prefix(self, ask: _Ask) -> list[int]:
        """Return the beginning that a trace's ids stand for; its last, partly filled one is left to chance."""
        tokens = max(1, round(TRACE_PAGE_TOKENS * self._settings.trace_scale))
        whole = int(max(0.0, ask.prompt_tokens - self._sizes.overhead)) // tokens
        places: list[int] = []
        for trace_id in ask.trace_ids[:whole]:
            places += self._draw(tokens, np.random.default_rng((self._settings.seed, _TRACE_PREFIX, trace_id)))
        return places

    def _text(self, places: Sequence[int]) -> str:
        return " ".join(self._sizes.words[place] for place in places)

    def _request(self, prompt: str | list[int], output_tokens: int, history: Sequence[Message] = ()) -> bytes:
        body = make_body(self._settings, self._model, self._dialect, prompt, output_tokens, history)
        return self._server.post_bytes(self._path, msgspec.json.encode(body))

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
