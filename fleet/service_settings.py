"""Settings of every service, side by side, since they share one environment, one `baton.toml` and one command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from fleet.settings import FleetSettings, user_cache


class WorkerSettings(FleetSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of worker need: the model, its numbers, its pages."""

    model: Annotated[str, Meta(description="checkpoint directory or Hugging Face hub id")] = ""
    served_model_name: Annotated[
        str, Meta(description="names that clients use, comma-separated; default: the directory's name")
    ] = ""
    load_format: Annotated[
        Literal["auto", "dummy"],
        Meta(
            description="auto: the checkpoint's safetensors; dummy: random weights made at start, for measuring a "
            "model whose directory holds configuration and tokenizer only"
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Meta(description="auto, float32, bfloat16 or float16")
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "fp8", "int8"],
        Meta(
            description="auto: as the checkpoint is; fp8: unquantized weights become FP8 as they are loaded; int8: "
            "likewise whole numbers of 8 bits, on CPUs with AVX512-BF16"
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8_e4m3"],
        Meta(description="of KV pages: auto (as computed in) or fp8_e4m3; equal on workers that hand off"),
    ] = "auto"
    device: Annotated[str, Meta(description="auto, cpu or cuda")] = "auto"
    threads: Annotated[int, Meta(description="compute threads; 0: all cores", ge=0, le=1024)] = 0
    shared_cores: Annotated[
        str, Meta(description="file that says how many cores this machine's workers lend each other; empty: none")
    ] = ""
    weight_cache: Annotated[
        str,
        Meta(
            description="directory of packed weights that all workers of a machine map (bfloat16 on CPUs with "
            "AVX512-BF16); auto: `baton/weights` in the user's cache; off: each packs its own"
        ),
    ] = "auto"
    page_size: Annotated[int, Meta(description="tokens per page", ge=1, le=1024)] = 16
    max_model_len: Annotated[int, Meta(description="longest prompt plus output; 0: the model's own", ge=0)] = 0
    max_num_seqs: Annotated[int, Meta(description="sequences that run at once", ge=1, le=65536)] = 64
    max_requests_per_gateway: Annotated[
        int, Meta(description="requests that one gateway may have on a worker; what is more goes back to it", ge=1)
    ] = 256
    kv_cache_bytes: Annotated[int, Meta(description="bytes for KV pages; 0: sized from memory", ge=0)] = 0
    transports: Annotated[
        str, Meta(description="hand-off transports allowed, best first; auto: shm,tcp, on a GPU cuda_ipc,tcp")
    ] = "auto"
    prefix_cache: Annotated[bool, Meta(description="reuse pages of equal prefixes")] = True
    hand_off_liveness_s: Annotated[
        float, Meta(description="a hand-off peer that is silent this long counts as gone", ge=0.2, le=300)
    ] = 3.0
    drain_timeout_s: Annotated[
        float, Meta(description="grace period after SIGTERM in which running work may leave", ge=0)
    ] = 30.0
    admin_address: Annotated[
        str, Meta(description="HOST:PORT or unix:PATH of the admin socket (POST /drain); empty: none")
    ] = ""
    reclaim_notice: Annotated[
        str, Meta(description="where reclaim notices are polled: aws, gcp, azure or url; empty: nowhere")
    ] = ""
    reclaim_url: Annotated[
        str, Meta(description="for url the address to poll, for a cloud another base of its metadata service")
    ] = ""
    reclaim_file: Annotated[str, Meta(description="file whose appearance is a reclaim notice; empty: none")] = ""

    @property
    def weight_directory(self) -> Path | None:
        """Where packed weights are kept, None for nowhere."""
        if self.weight_cache == "off":
            return None
        return user_cache() / "weights" if self.weight_cache == "auto" else Path(self.weight_cache).expanduser()

    @property
    def transport_names(self) -> tuple[str, ...]:
        """The configured transports, best first; empty for those that suit the device."""
        if self.transports == "auto":
            return ()
        return tuple(name.strip() for name in self.transports.split(",") if name.strip())


class PrefillSettings(WorkerSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a prefill worker needs beyond every worker's settings."""

    max_step_tokens: Annotated[int, Meta(description="prompt tokens per prefill step, over all prompts", ge=1)] = 512
    max_chunk_tokens: Annotated[
        int, Meta(description="tokens of one prompt per step while others wait; 0: no bound", ge=0)
    ] = 0


class DecodeSettings(WorkerSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a decode worker needs beyond every worker's settings."""

    lookahead_tokens: Annotated[
        int,
        Meta(description="output tokens per sequence for which an admission leaves room; more preempts less", ge=0),
    ] = 128
    watermark_pages: Annotated[int, Meta(description="pages that an admission leaves free", ge=0)] = 0
    rebalance: Annotated[
        bool, Meta(description="move sequences to emptier decode workers when short of pages or much fuller than they")
    ] = True
    rebalance_gap: Annotated[
        float,
        Meta(
            description="how much fuller than the emptiest one is much, as a share of seats or pages",
            ge=0.05,
            le=1,
        ),
    ] = 0.4


class GatewaySettings(FleetSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the gateway needs beyond the fleet's own settings."""

    host: Annotated[str, Meta(description="address of the HTTP server")] = "127.0.0.1"
    port: Annotated[int, Meta(description="port of the HTTP server", ge=0, le=65535)] = 8000
    insecure: Annotated[bool, Meta(description="serve beyond loopback although no API key exists")] = False
    max_queued_requests: Annotated[
        int, Meta(description="requests without a first token, beyond which new ones get 429", ge=1)
    ] = 512
    max_queue_wait_s: Annotated[
        float, Meta(description="a request whose first token is expected later than this gets 429; 0: no bound", ge=0)
    ] = 30.0
    worker_wait_s: Annotated[
        float, Meta(description="how long a request waits for a worker to come before it ends with 503", ge=0)
    ] = 15.0
    max_body_bytes: Annotated[int, Meta(description="largest request body", ge=1024)] = 16 * 2**20
    response_ttl_s: Annotated[
        int, Meta(description="how long stored responses are kept after their last use", ge=60)
    ] = 86_400
    tool_format: Annotated[
        str,
        Meta(
            description="form of calls: auto (from the chat template), none, hermes, llama3, mistral; or model=form, …"
        ),
    ] = "auto"
    reasoning_format: Annotated[
        str, Meta(description="form of reasoning: auto (from the chat template), none, think; or model=form, …")
    ] = "auto"
    shared_prefix_cache: Annotated[
        bool, Meta(description="prefixes cached for one API key serve the others too, whose timing then tells of them")
    ] = False
    cors_origins: Annotated[
        str, Meta(description="origins that browsers may call from, comma-separated, * for all; empty: none")
    ] = ""


SERVICES: tuple[type[FleetSettings], ...] = (GatewaySettings, PrefillSettings, DecodeSettings)
"""A name that any of these knows is no error for the others."""
