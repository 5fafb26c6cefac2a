"""`reasoning_effort`, by the variables that chat templates have for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.errors import InvalidRequest
from gateway.pipeline import ServedModel

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SWITCHES = ("enable_thinking", "thinking")  # of Qwen3 and of DeepSeek V3.1


def reads_effort(model: ServedModel) -> bool:
    """Whether the model's chat template has a variable that `reasoning_effort` can set."""
    return not _known(model).isdisjoint(("reasoning_effort", *_SWITCHES))


def template_variables(given: Mapping[str, Any], effort: str | None, model: ServedModel) -> dict[str, Any]:
    """`chat_template_kwargs` together with what `reasoning_effort` sets; what the client set itself wins.

    A template that reads `reasoning_effort` is given the word; one with a switch thinks unless the effort is `none`.
    Raises: InvalidRequest if the template has neither.
    """
    variables = dict(given)
    if effort is None:
        return variables
    if effort not in _EFFORTS:
        raise InvalidRequest(
            f"'reasoning_effort' is one of {', '.join(_EFFORTS)}.", param="reasoning_effort", code="invalid_value"
        )
    known = _known(model)
    if "reasoning_effort" in known:
        variables.setdefault("reasoning_effort", effort)
        return variables
    for switch in _SWITCHES:
        if switch in known:
            variables.setdefault(switch, effort != "none")
            return variables
    raise InvalidRequest(
        "'reasoning_effort' is not supported by this model: its chat template does not read it.",
        param="reasoning_effort",
        code="unsupported_parameter",
    )


def _known(model: ServedModel) -> frozenset[str]:
    return model.card.template.variables if model.card.template is not None else frozenset()
