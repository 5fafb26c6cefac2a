"""The demo model's tokenizer: byte-level BPE trained on the generated text, and a ChatML template.

The layout follows Qwen's: no normalizer (any Unicode text round-trips), one token per digit, and three special
tokens. See Sennrich et al. 2016 for BPE; the byte alphabet is GPT-2's.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from demo_text.shapes import END_OF_TEXT, TURN_END, TURN_START
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS: Final = (END_OF_TEXT, TURN_START, TURN_END)  # ids 0, 1 and 2
CONTEXT_TOKENS: Final = 4096

# Contractions; words with one leading mark or space; single digits; other marks; line ends; spaces.
_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Whitespace control is explicit everywhere, so the result does not depend on trim_blocks or lstrip_blocks.
CHAT_TEMPLATE: Final = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- elif content is iterable -%}
    {%- for part in content -%}{{- part.text if part.text is defined else '' -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set first_is_system = messages and messages[0].role in ['system', 'developer'] -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if first_is_system -%}{{- text(messages[0].content) + '\\n\\n' -}}{%- endif -%}
  {{- '# Tools\\nCall a function with JSON inside <tool_call></tool_call>.\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools><|im_end|>\\n' -}}
{%- elif first_is_system -%}
  {{- '<|im_start|>system\\n' + text(messages[0].content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if loop.first and first_is_system -%}
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + text(message.content) + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' + text(message.content) -}}
    {%- for call in message.tool_calls or [] -%}
      {%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
      {%- set function = call.function or call -%}
      {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
      {%- if function.arguments is string -%}{{- function.arguments -}}
      {%- else -%}{{- function.arguments | tojson -}}{%- endif -%}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + ('system' if message.role == 'developer' else message.role) + '\\n' -}}
    {{- text(message.content) + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a tokenizer with ``vocab_size`` tokens learned from ``texts``; all 256 bytes are among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template) into ``folder``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        str(index): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                     "special": True}
        for index, token in enumerate(SPECIAL_TOKENS)
    }  # fmt: skip
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": special,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": CONTEXT_TOKENS,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
