"""Puts an engine together: model from disk, pool sized from memory, then the parts that share that pool.

In two steps, since the memory of the pool belongs to whoever hands pages off: `open_model` says how much is wanted,
`OpenModel.over` lays the engine over the memory that was made.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.activity import Activity
from engine.cpu.shared_cores import SharedCores
from engine.cpu.weight_cache import WeightCache
from engine.grammar.desk import GrammarDesk
from engine.hub import resolve_model
from engine.kv_pool import allocate_pool, kv_page_bytes, pool_over
from engine.load import LoadedModel, load_model
from engine.memory import PoolPlan, available_memory_bytes, plan_pool
from engine.pages import PagePool
from engine.prefix_cache import PrefixCache
from engine.runner import DecodeForward, ModelRunner, input_shape
from fleet import model_files
from fleet.errors import SettingsError
from fleet.logs import get_logger
from fleet.service_settings import WorkerSettings
from fleet.types import Fingerprint, PeerRef, Role, WorkerLoad, WorkerRecord

CPU_FRACTION = 0.2
GPU_FRACTION = 0.85
"""Share of the free memory that a pool takes: a CPU worker has neighbours, a GPU is one worker's own."""

_log = get_logger("assembly")


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts that share one pool. `page_bytes` is the size of one page."""

    page_bytes: int
    pool: PagePool
    cache: PrefixCache
    runner: ModelRunner
    grammars: GrammarDesk
    activity: Activity

    def close(self) -> None:
        """End what runs beside the steps."""
        self.grammars.close()
        self.activity.close()

    def load(self, *, num_running: int, num_waiting: int, waiting_tokens: int = 0) -> WorkerLoad:
        """The worker's figures as heartbeats carry them."""
        return WorkerLoad(
            num_running=num_running,
            num_waiting=num_waiting,
            waiting_tokens=waiting_tokens,
            total_pages=self.pool.num_pages,
            free_pages=self.pool.num_free,
            cached_pages=self.pool.num_cached,
            quarantined_pages=self.pool.num_quarantined,
            prefix_query_tokens=self.cache.query_tokens,
            prefix_hit_tokens=self.cache.hit_tokens,
        )


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A loaded model and the plan for its pool.

    Attributes:
        names: served name first, then its aliases.
        files: digest and content of the small files that gateways need.
    """

    settings: WorkerSettings
    model: LoadedModel
    plan: PoolPlan
    names: tuple[str, ...]
    files: tuple[str, dict[str, bytes]]
    cores: SharedCores | None = None

    @property
    def page_facts(self) -> dict[str, Any]:
        """What a page is made of, as `kvtransfer.layout.PageLayout` takes it."""
        config = self.model.config
        return {
            "num_layers": config.num_layers,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "page_size": self.plan.page_size,
            "dtype": self.model.kv_dtype_name,
            "axis_order": self.model.transformer.backend.page_order(config, self.plan.page_size, self.model.kv_dtype),
        }

    def record(
        self, peer: PeerRef, role: Role, fingerprint: Fingerprint, *, host: str, transports: tuple[str, ...]
    ) -> WorkerRecord:
        """What the registry says of a worker that serves this model from now on."""
        return WorkerRecord(
            peer=peer,
            role=role,
            model=self.names[0],
            aliases=self.names[1:],
            fingerprint=fingerprint,
            model_files=self.files[0],
            max_model_len=self.plan.max_model_len,
            max_num_seqs=self.settings.max_num_seqs,
            max_requests_per_gateway=self.settings.max_requests_per_gateway,
            page_size=self.plan.page_size,
            num_pages=self.plan.num_pages,
            host=host,
            pid=os.getpid(),
            transports=transports,
            started_at_s=time.time(),
        )

    def over(self, memory: Any, fingerprint: Fingerprint, *, decodes: bool = False) -> Engine:
        """Lay pool, prefix cache and runner over `memory`, which must outlive them.

        Args:
            memory: a writable buffer, an array on the model's CUDA device (`__cuda_array_interface__`), or None for
                memory of the pool's own.
            fingerprint: of the pages.
            decodes: steps will mostly be of one token per sequence; on a CUDA device such steps are captured as graphs.
        """
        config, plan = self.model.config, self.plan
        if memory is None:
            tensor = allocate_pool(
                config=config,
                num_pages=plan.num_pages,
                page_size=plan.page_size,
                dtype=self.model.kv_dtype,
                device=self.model.device,
            )
        else:
            tensor = pool_over(
                memory,
                config=config,
                num_pages=plan.num_pages,
                page_size=plan.page_size,
                dtype=self.model.kv_dtype,
            )
        pool = PagePool(plan.num_pages, plan.page_size)
        # Under dynamic rope the keys of a long prompt depend on its length, so equal tokens are not equal pages.
        reusable = not config.rotation_salt(plan.max_model_len)
        cache = PrefixCache(pool, fingerprint, enabled=self.settings.prefix_cache and reusable)
        self.model.transformer.backend.warm(config, plan.page_size)
        grammars = GrammarDesk(self.files[1], config.vocab_size)
        grammars.warm()
        graphs = self._graphs(tensor) if decodes and self.model.device.type == "cuda" else None
        runner = ModelRunner(self.model, tensor, plan.page_size, grammars, graphs)
        return Engine(plan.page_bytes, pool, cache, runner, grammars, Activity(self.cores))

    def _graphs(self, pool: torch.Tensor) -> DecodeForward:
        from engine.decode_graphs import DecodeGraphs, cuda_capture
        from engine.kernel_backend import KernelBackend

        transformer, plan = self.model.transformer, self.plan
        assert isinstance(transformer.backend, KernelBackend)  # noqa: S101 - what `load_model` takes on CUDA devices
        began_s = time.perf_counter()
        graphs = DecodeGraphs(
            transformer,
            transformer.backend,
            pool,
            input_shape(self.model, plan.page_size),
            max_rows=self.settings.max_num_seqs,
            max_model_len=plan.max_model_len,
            capture=cuda_capture(),
        )
        _log.info("decode steps captured", max_rows=self.settings.max_num_seqs, s=time.perf_counter() - began_s)
        return graphs


def open_model(settings: WorkerSettings, *, ceiling_bytes: int | None) -> OpenModel:
    """Load the model and plan the pool. Blocking, for seconds or minutes.

    Args:
        settings: of the worker.
        ceiling_bytes: what the pool's memory can hold at most, e.g. the room in `/dev/shm`.

    Raises:
        SettingsError: no model is set, or the pool does not fit.
        ModelError: the checkpoint is missing or not supported.
    """
    if not settings.model:
        raise SettingsError("BATON_MODEL is not set: a checkpoint directory or a Hugging Face hub id")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    directory = resolve_model(settings.model, weights=settings.load_format != "dummy")
    device = resolve_device(settings.device)
    cores = SharedCores(Path(settings.shared_cores), torch.get_num_threads()) if settings.shared_cores else None
    weights = settings.weight_directory
    loaded = load_model(
        directory,
        settings.dtype,
        device,
        cores,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        load_format=settings.load_format,
        weight_cache=None if weights is None else WeightCache(weights),
        page_size=settings.page_size,
    )
    plan = plan_pool(
        page_bytes=kv_page_bytes(loaded.config, settings.page_size, loaded.kv_dtype),
        page_size=settings.page_size,
        max_model_len=_model_len(settings, loaded),
        max_num_seqs=settings.max_num_seqs,
        available_bytes=_available_bytes(loaded.device),
        fraction=CPU_FRACTION if loaded.device.type == "cpu" else GPU_FRACTION,
        kv_cache_bytes=settings.kv_cache_bytes or None,
        ceiling_bytes=ceiling_bytes,
    )
    files = model_files.read(directory)
    _log.info(
        "model loaded",
        model=settings.model,
        dtype=loaded.dtype_name,
        load_format=settings.load_format,
        fp8_matrices=loaded.num_fp8,
        int8_matrices=loaded.num_int8,
        kv_dtype=loaded.kv_dtype_name,
        page_bytes=plan.page_bytes,
        device=str(loaded.device),
        weight_mib=round(loaded.weight_bytes / 2**20, 1),
        load_s=round(loaded.load_s, 2),
        threads=torch.get_num_threads(),
        pool=plan.sentence,
    )
    named_files = (model_files.digest_of(files), files)
    return OpenModel(settings, loaded, plan, _served_names(settings, directory), named_files, cores)


def resolve_device(name: str) -> str:
    """What the setting `device` means here: `cpu`, or a CUDA device by name. Raises: SettingsError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise SettingsError(f"BATON_DEVICE = {name!r}: auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"BATON_DEVICE = {name}, but torch sees no CUDA device")
    return name


def _model_len(settings: WorkerSettings, loaded: LoadedModel) -> int:
    longest = loaded.config.max_length
    if settings.max_model_len > longest:
        raise SettingsError(
            f"BATON_MAX_MODEL_LEN = {settings.max_model_len}, but the model is made for {longest} tokens"
        )
    return settings.max_model_len or longest


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # What we map of files, weights above all, counts as free too, but it must stay.
    return max(0, available_memory_bytes() - int(psutil.Process().memory_info().shared))


def _served_names(settings: WorkerSettings, directory: Path) -> tuple[str, ...]:
    names = tuple(name.strip() for name in settings.served_model_name.split(",") if name.strip())
    if names:
        return names
    return (directory.resolve().name if Path(settings.model).is_dir() else settings.model,)
