"""A stream that a test watches while it breaks things, and compares with an undisturbed one afterwards."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Self

import openai

STALL_S = 60.0
MAX_TOKENS = 4000
HELD_BACK_CHARS = 24
"""An answer that ends shows what a stream under way still holds back, such as the beginning of a character."""


def body_of(number: int, max_tokens: int) -> dict[str, Any]:
    """A request at temperature 1 whose answer its number decides."""
    return {
        "model": "demo",
        "prompt": f"{number}: what is the KV cache?",
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "seed": number,
        "extra_body": {"ignore_eos": True},
    }


async def answer_of(client: openai.AsyncOpenAI, number: int, max_tokens: int) -> str:
    """A whole answer; its length is checked."""
    answer = await client.completions.create(**body_of(number, max_tokens))
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens
    return answer.choices[0].text


class TailedStream:
    """Reads one answer in a task of its own. A context manager: whoever leaves it early closes the connection.

    Attributes:
        text, num_tokens, request_id: as far as the answer has come.
    """

    def __init__(self, client: openai.AsyncOpenAI, number: int) -> None:
        self.text, self.num_tokens, self.request_id = "", 0, ""
        self._client = client
        self._number = number
        self._grown = asyncio.Event()

    async def _read(self) -> None:
        try:
            usage = {"include_usage": True, "continuous_usage_stats": True}
            body = body_of(self._number, MAX_TOKENS)
            async with await self._client.completions.create(**body, stream=True, stream_options=usage) as stream:
                async for chunk in stream:
                    self.request_id = chunk.id
                    self.text += "".join(choice.text for choice in chunk.choices)
                    self.num_tokens = chunk.usage.completion_tokens
                    self._grown.set()
        finally:
            self._grown.set()

    async def grow(self, num_tokens: int = 20) -> None:
        """Wait until so many more tokens have come; raises what ends the stream before."""
        goal = self.num_tokens + num_tokens
        async with asyncio.timeout(STALL_S):
            while self.num_tokens < goal:
                if self._task.done():
                    await self._task
                    raise AssertionError(f"the stream has ended after {self.num_tokens} tokens")
                self._grown.clear()
                await self._grown.wait()

    async def end(self) -> None:
        """Wait for the end; raises what the SDK raises."""
        async with asyncio.timeout(STALL_S):
            await self._task

    async def check(self) -> None:
        """Close the connection, and compare what has come with an undisturbed answer of as many tokens."""
        await self._close()
        whole = await answer_of(self._client, self._number, self.num_tokens)
        assert whole.startswith(self.text)
        assert len(whole) - len(self.text) <= HELD_BACK_CHARS

    async def _close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError, openai.APIError):
            await self._task

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()
