"""Answers of the demo model under grammars, in-process and in batches, with the ends that a worker would give them."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from engine.plan import Complete, Failed, Sampled
from engine.sequence import Sequence
from engine.stopping import finish_reason
from fleet.types import FinishReason, SamplingParams
from support.engine_driver import Driver

DEMO = Path(__file__).parents[2] / "models" / "demo"
MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class Answer:
    """Text without a stop token, why it ended, and what the worker said if it failed."""

    text: str
    finish: FinishReason
    error: str = ""


class ConstrainedModel:
    """The demo model with its vocabulary."""

    def __init__(self) -> None:
        self.driver = Driver(DEMO, page_size=16, num_pages=4096)
        self.tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        self.eos_id = self.tokenizer.token_to_id("<|endoftext|>")

    def answers(self, params: Many[SamplingParams], *, prompt: str = "Answer: ", batch: int = 64) -> list[Answer]:
        """One answer each, `batch` at a time in one step, a free place taken by the next at once."""
        waiting = list(enumerate(params))[::-1]
        done: dict[int, Answer] = {}
        running: dict[int, Sequence] = {}
        ids = self.tokenizer.encode(prompt).ids
        while waiting or running:
            while waiting and len(running) < batch:
                place, each = waiting.pop()
                running[place] = self.driver.admit(ids, each, room=each.max_tokens)
            results = self.driver.step(list(running.values()))
            for (place, sequence), result in zip(list(running.items()), results, strict=True):
                answer = self._end(sequence, result)
                if answer is not None:
                    done[place] = answer
                    self.driver.deck += running.pop(place).page_table
        return [done[place] for place in range(len(params))]

    def _end(self, sequence: Sequence, result: Sampled | Complete | Failed | None) -> Answer | None:
        output = sequence.token_ids[sequence.prompt_len :]
        match result:
            case Failed(message):
                return Answer(self.tokenizer.decode(output), FinishReason.ERROR, message)
            case Complete():
                return Answer(self.tokenizer.decode(output), FinishReason.STOP)
            case Sampled(token_id=token_id, ends=ends):
                del sequence.token_ids[-1]
                finish = FinishReason.STOP if ends else finish_reason(sequence, token_id, MAX_MODEL_LEN)
                sequence.token_ids.append(token_id)
                if finish is None:
                    return None
                stopped = token_id in sequence.params.stop_token_ids
                return Answer(self.tokenizer.decode(output[:-1] if stopped else output), finish)
            case None:
                return None
