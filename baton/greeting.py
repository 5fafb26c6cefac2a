"""The last thing `baton up` prints: where it serves and lines that work as they stand."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.rule import Rule


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a person needs to know of the running fleet.

    Attributes:
        model: the name clients use.
        api_url: base URL.
        run_dir: logs.
        needs_key: whether API keys exist.
        new_key: a key made for this run, shown here for the only time; empty: none.
    """

    model: str
    api_url: str
    run_dir: str
    needs_key: bool
    new_key: str = ""

    def show(self, console: Console) -> None:
        """Print it between two rules: no box around, so that every line can be copied."""

        def line(text: str = "") -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        console.print(Rule(f"Baton serves {self.model}", style="green", align="left"))
        line(f"base URL   {self.api_url}")
        line(f"chat page  {self.api_url.removesuffix('v1')}")
        line(f"logs       {self.run_dir}")
        line("stop       Ctrl-C (a second one stops at once)")
        if self.new_key:
            line(f"API key    {self.new_key}   (not shown again)")
        line()
        for text in self.curl_line(), "", *self.sdk_lines():
            line(text)
        console.print(Rule(style="green"))

    def curl_line(self) -> str:
        """A streamed chat by curl."""
        key = f' -H "Authorization: Bearer {self.new_key or "$BATON_API_KEY"}"' if self.needs_key else ""
        body = f'{{"model": "{self.model}", "messages": [{{"role": "user", "content": "Hello!"}}], "stream": true}}'
        return f"curl -N {self.api_url}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"

    def sdk_lines(self) -> list[str]:
        """The same by the `openai` package, in Python."""
        key = (self.new_key or "your key") if self.needs_key else "none"
        messages = '[{"role": "user", "content": "Hello!"}]'
        return [
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{self.api_url}", api_key="{key}")',
            f'reply = client.chat.completions.create(model="{self.model}", messages={messages})',
            "print(reply.choices[0].message.content)",
        ]
