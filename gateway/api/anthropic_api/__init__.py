"""Anthropic's Messages API: turns of blocks in, one turn of blocks out, over the same chat jobs as OpenAI's API."""
