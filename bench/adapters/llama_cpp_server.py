"""llama.cpp behind the completions API, batching as its own llama-server does; runs in llama-cpp-python's environment.

    PYTHON bench/adapters/llama_cpp_server.py MODEL_DIRECTORY PORT KV_TOKENS THREADS

llama-cpp-python's own server computes one request at a time, so its low-level API is driven here as llama-server drives
the library: a token of every running sequence, then prompt tokens up to `n_batch` (2,048, computed 512 at a time; both
llama-server's defaults). Needs `llama-cpp-python` and `gguf`.
"""

from __future__ import annotations

import queue
import sys
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
import numpy as np
from completions_front import Request, serve
from gguf_checkpoint import gguf_file

SLOTS = 32
BATCH, MICRO_BATCH = 2048, 512


@dataclass
class Slot:
    """A sequence at work: how much of its prompt lies in the cache, and what came out."""

    request: Request
    number: int
    done: int = 0
    tokens: list[int] = field(default_factory=list)


class LlamaEngine:
    """One context, one batch after another."""

    def __init__(self, path: Path, kv_tokens: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = kv_tokens, BATCH, MICRO_BATCH, SLOTS
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp makes no context of this size")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._waiting: queue.Queue[Request] = queue.Queue()
        self._free = list(range(SLOTS))
        self._slots: list[Slot] = []

    def submit(self, request: Request) -> None:
        """See `completions_front.Engine`."""
        self._waiting.put(request)

    def run(self) -> None:
        """See `completions_front.Engine`."""
        while True:
            while self._free and (not self._slots or not self._waiting.empty()):
                self._slots.append(Slot(self._waiting.get(), self._free.pop()))
            self._step()

    def _step(self) -> None:
        batch = self._batch
        batch.n_tokens = 0
        sampling: list[tuple[Slot, int]] = []
        for slot in self._slots:
            if slot.tokens:
                sampling.append((slot, batch.n_tokens))
                self._put(slot, slot.tokens[-1], len(slot.request.prompt) + len(slot.tokens) - 1, wanted=True)
        for slot in self._slots:
            prompt = slot.request.prompt
            while slot.done < len(prompt) and batch.n_tokens < BATCH:
                last = slot.done == len(prompt) - 1
                if last:
                    sampling.append((slot, batch.n_tokens))
                self._put(slot, prompt[slot.done], slot.done, wanted=last)
                slot.done += 1
        if (code := llama_cpp.llama_decode(self._context, batch)) != 0:
            raise SystemExit(f"llama_decode failed with {code}")
        for slot, place in sampling:
            logits = np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(self._context, place), shape=(self._vocab_size,)
            )
            slot.tokens.append(int(logits.argmax()))
            slot.request.emit(slot.tokens[-1])
            if len(slot.tokens) == slot.request.max_tokens:
                slot.request.emit(None)
                memory = llama_cpp.llama_get_memory(self._context)
                llama_cpp.llama_memory_seq_rm(memory, slot.number, -1, -1)
                self._free.append(slot.number)
                self._slots.remove(slot)

    def _put(self, slot: Slot, token: int, position: int, *, wanted: bool) -> None:
        batch, at = self._batch, self._batch.n_tokens
        batch.token[at], batch.pos[at] = token, position
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, slot.number
        batch.logits[at] = wanted
        batch.n_tokens += 1


if __name__ == "__main__":
    directory, port, tokens, threads = sys.argv[1:]
    serve(LlamaEngine(gguf_file(Path(directory)), int(tokens), int(threads)), int(port))
