"""transformers' continuous batching behind the completions API.

    PYTHON bench/adapters/transformers_server.py MODEL_DIRECTORY PORT KV_TOKENS THREADS

`ContinuousBatchingManager` as `transformers serve --continuous-batching` uses it, whose own server takes no token ids.
On a CPU its number of cache blocks must be given; the attention is torch's `sdpa`. Needs `transformers` and torch.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch
from completions_front import Request, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE_SIZE = 32
NO_TOKEN = -1


class TransformersEngine:
    """A manager, and a thread's worth of reading what it gives out."""

    def __init__(self, directory: Path, kv_tokens: int, threads: int) -> None:
        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa")
        generation = GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0, max_new_tokens=16)
        config = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=kv_tokens // PAGE_SIZE,
            max_batch_tokens=512,
            max_requests_per_batch=32,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        )
        self._manager = model.init_continuous_batching(generation, config)
        self._lock = threading.Lock()
        self._requests: dict[str, tuple[Request, int]] = {}
        self._count = 0
        self._manager.start()

    def submit(self, request: Request) -> None:
        """See `completions_front.Engine`."""
        with self._lock:
            self._count += 1
            name = f"r{self._count}"
            self._requests[name] = (request, 0)
        self._manager.add_request(
            request.prompt, request_id=name, max_new_tokens=request.max_tokens, streaming=True, eos_token_id=NO_TOKEN
        )

    def run(self) -> None:
        """See `completions_front.Engine`."""
        while True:
            out = self._manager.get_result(timeout=1.0)
            if out is None:
                continue
            with self._lock:
                request, given = self._requests.pop(out.request_id)
                if not out.is_finished():
                    self._requests[out.request_id] = (request, len(out.generated_tokens))
            if out.error is not None:
                print(f"request failed: {out.error}", file=sys.stderr, flush=True)
            for token in out.generated_tokens[given:]:
                request.emit(int(token))
            if out.is_finished():
                request.emit(None)


if __name__ == "__main__":
    directory, port, tokens, threads = sys.argv[1:]
    serve(TransformersEngine(Path(directory), int(tokens), int(threads)), int(port))
