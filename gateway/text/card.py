"""Everything the gateway knows of a model, from the small files beside its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from fleet.tokenizer_files import eos_ids, text_config
from gateway.errors import CardError
from gateway.text.control_marks import ControlMarks
from gateway.text.detokenizer import DetokenizerFactory
from gateway.text.message_syntax import AUTO, THINK_END, MessageSyntax, SyntaxChoice
from gateway.text.template import ChatTemplate, pick_template
from gateway.text.tokenizer import TextTokenizer


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What applies where a request says nothing.

    As in vLLM (`--generation-config auto`): `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` of
    `generation_config.json` replace OpenAI's defaults, whether or not it says `do_sample`; `max_new_tokens`
    bounds the output of requests that set no bound.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None


class ModelCard:
    """Tokenizer, chat template and defaults of one model. Immutable, shared by all its requests.

    Attributes:
        tokenizer: text to ids.
        detokenizers: ids to text.
        template: None if the model has none (chat is then refused).
        eos_ids: ids that end an answer, from `generation_config.json`, `config.json` and the tokenizer.
        tool_template: the one for conversations with tools: the same, unless the files have one of its own.
        syntax: how the model writes calls of functions and reasoning.
        think_end_id: id of `</think>` where that is one token of a model that thinks.
        marker_ids: ids of the syntax's markers that are special tokens.
        vocab_size: ids from 0 up to it exist in the model, though not all may have text.
        hidden_size: numbers in an embedding; None if `config.json` does not say.
        defaults: sampling defaults.
        digest: hex digest of the files, stable over restarts.
    """

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        template: ChatTemplate | None,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        hidden_size: int | None,
        defaults: SamplingDefaults,
        digest: str,
        syntax: MessageSyntax = MessageSyntax(),  # noqa: B008 (frozen)
        tool_template: ChatTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.detokenizers = DetokenizerFactory(tokenizer)
        self.template = template
        self.tool_template = tool_template or template
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.defaults = defaults
        self.digest = digest
        self.syntax = syntax
        ids = {tokenizer.id_of(marker) for marker in syntax.markers}
        self.think_end_id = tokenizer.id_of(THINK_END) if syntax.thinks else None
        self.marker_ids = frozenset(one for one in ids if one in tokenizer.special_ids)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], choice: SyntaxChoice = AUTO) -> ModelCard:
        """Build from file contents by name; `choice` may override the syntax that the template shows.

        `tokenizer.json` is required; `tokenizer_config.json`, `config.json`, `generation_config.json` and
        `chat_template.jinja` are used where present.
        Takes some tenths of a second for a large vocabulary: call it on a thread.
        Raises: CardError naming the file.
        """
        if "tokenizer.json" not in files:
            raise CardError("tokenizer.json is missing; Baton serves models with a fast tokenizer only")
        tokenizer_config = _json_object(files, "tokenizer_config.json")
        config = _json_object(files, "config.json")
        generation = _json_object(files, "generation_config.json")
        tokenizer = TextTokenizer(files["tokenizer.json"], tokenizer_config)
        marks = ControlMarks(tokenizer.special_texts)
        jinja_file = files.get("chat_template.jinja")
        source = pick_template(tokenizer_config, jinja_file)
        tool_source = pick_template(tokenizer_config, jinja_file, name="tool_use")
        template, tool_template = (
            ChatTemplate(one, tokenizer.special_tokens, marks) if one is not None else None
            for one in (source, tool_source if tool_source != source else None)
        )
        return cls(
            tokenizer=tokenizer,
            template=template,
            eos_ids=eos_ids(tokenizer.backend, tokenizer.special_tokens, config, generation),
            vocab_size=_size(config, "vocab_size") or tokenizer.num_tokens,
            hidden_size=_size(config, "hidden_size"),
            defaults=_defaults(generation),
            digest=_digest(files),
            syntax=choice.of((source or "") + (tool_source or "")),
            tool_template=tool_template,
        )


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        return msgspec.json.decode(files[name], type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CardError(f"{name} is not a JSON object: {error}") from error


def _size(config: Mapping[str, Any], name: str) -> int | None:
    size = config.get(name, text_config(config).get(name))
    return size if isinstance(size, int) else None


def _defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    chosen = {name: generation[name] for name in names if generation.get(name) is not None}
    try:
        return msgspec.convert(chosen, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise CardError(f"generation_config.json: {error}") from error


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.blake2b(files[name]).digest())
    return digest.hexdigest()
