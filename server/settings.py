"""Every knob of the server: from `ESPALIER_*` environment variables or the caller, checked once, never changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models.errors import faults
from models.image_limits import MAX_PIXELS, PILLOW_MAX_PIXELS
from pruning.dynamic.token_policy import TokenPolicy
from server.logs import LogFormat

PREFIX = "ESPALIER_"
OTHERS = ("ESPALIER_CACHE", "ESPALIER_THINGS")
"""Variables that are read elsewhere: where what is fetched and built is kept, and which drawings."""


MODEL_NAME = r"[\w.-]+(/[\w.-]+)*"
"""What a model may be called here; `@` stands before a level, so no name has it."""
NamedCheckpoint = Annotated[str, Field(pattern=f"^{MODEL_NAME}=.+$")]
HostName = Annotated[str, Field(pattern=r"^[\w*?.:\[\]-]+$")]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z]+://.+)$")]


def _listed(value: Any) -> Any:
    """Of a variable, which is one text: JSON, or values between commas."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.startswith("[") else [one.strip() for one in value.split(",") if one.strip()]


HostNames = Annotated[tuple[HostName, ...], NoDecode, BeforeValidator(_listed)]
Origins = Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_listed)]
NamedCheckpoints = Annotated[tuple[NamedCheckpoint, ...], NoDecode, BeforeValidator(_listed)]


class Settings(BaseSettings):
    """`Settings(port=1234)` → port 1234; without arguments, what the environment says; then these defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    shutdown_grace_s: int = Field(30, ge=0, description="Seconds that running requests may take to end on SIGTERM.")
    hang_exit_s: int = Field(60, ge=0, description="Seconds that a hanging pass may take, unready, before the process ends.")

    api_keys: str = Field("", repr=False, description="API keys, between commas; better set as ESPALIER_API_KEYS.")
    api_key_file: Path | None = Field(None, description="API keys by their hashes, with levels and limits: docs/operations.md.")
    open_metrics: bool = Field(False, description="Let /metrics be read without a key.")
    allowed_hosts: HostNames = Field((), description="Host names that this server answers to, such as *.example.com; else all.")
    allow_image_hosts: HostNames = Field(
        (), description="Fetch pictures by URL from these hosts, such as images.example.com; needs the extra urls. By default none."
    )
    cors_origins: Origins = Field((), description="Web origins that may ask, such as https://app.example.com; its own always may.")

    checkpoint: str = Field("embedded", description="A directory that transformers loads, or the name of a shipped checkpoint.")
    model: NamedCheckpoints = Field(
        (), description="NAME=CHECKPOINT, one of several to serve; may repeat. CHECKPOINT is then served only if given."
    )
    served_model_name: str | None = Field(
        None, pattern=f"^{MODEL_NAME}$", description="The model's name; by default the checkpoint's."
    )
    device: str = Field("cpu", description="Where to run: cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto takes the checkpoint's.")
    quantization: Literal["int8", "nf4"] | None = Field(
        None,
        description="Hold the weights in 8 or 4 bits; by default as the checkpoint does. Needs the extra `quant`, but for int8 on "
        "CPUs with AVX-512, where that is the fastest way to serve.",
    )
    threads: int = Field(0, ge=0, description="Threads that compute on a CPU; 0: as many as quota and affinity allow.")

    default_level: str = Field("off", description="Pruning level of requests that name none.")
    degrade: bool = Field(False, description="Under load, requests that name no level get a cheaper one than the default.")
    shadow: float = Field(
        0.0, ge=0, le=1, description="Share of the greedy answers that are checked against level off while nobody asks anything."
    )
    token_policy: TokenPolicy | None = Field(
        None, description="How levels choose the visual tokens to keep: by the checkpoint's router, or by merging if it has none."
    )

    max_batch: int = Field(8, ge=1, description="Requests that run at once.")
    max_queue: int = Field(64, ge=0, description="Requests that may wait for a place; more are answered 429.")
    max_queue_s: float = Field(
        1.5, gt=0, description="Seconds that the queue may take, at the pace of late; as many as run at once may wait however long."
    )
    max_prefill: int = Field(
        1024, ge=16, description="Tokens of prompts that run in one pass at most; fewer where answers go on beside them."
    )
    kv_tokens: int = Field(0, ge=0, description="Tokens that the KV cache holds; 0 fits it to the memory.")

    log_format: LogFormat = Field("text", description="text for people; json: one object a line.")
    otlp_endpoint: str | None = Field(
        None, pattern=r"^(https?://[^/\s]\S*)?$",
        description="OpenTelemetry collector for traces and metrics, such as http://localhost:4318; needs the extra otel.",
    )  # fmt: skip

    default_max_tokens: int = Field(256, ge=1, description="Length limit of an answer whose request sets none.")
    max_body_bytes: int = Field(32 * 2**20, ge=1, description="Size limit of a request body, counted while it is read.")
    max_bodies_bytes: int = Field(256 * 2**20, ge=1, description="Size limit of all bodies in flight; more are answered 429.")
    body_timeout_s: int = Field(60, ge=1, description="Seconds that a request's body may take to come.")
    max_images: int = Field(16, ge=1, description="Pictures that one request may hold.")
    max_image_bytes: int = Field(10 * 2**20, ge=1, description="Size limit of one picture's file.")
    max_image_pixels: int = Field(
        MAX_PIXELS, ge=1, le=PILLOW_MAX_PIXELS, description="Pixels one picture may have; its header is checked first."
    )
    max_request_pixels: int = Field(4 * MAX_PIXELS, ge=1, description="Pixels that a request's pictures may have together.")

    @property
    def _serves_checkpoint(self) -> bool:
        return not self.model or "checkpoint" in self.model_fields_set

    def checkpoints(self) -> list[tuple[str | None, str]]:
        """What is served: name and checkpoint, the first for requests that name none; without a name, the checkpoint's own."""
        found: list[tuple[str | None, str]] = []
        if self._serves_checkpoint:
            found.append((self.served_model_name, self.checkpoint))
        for one in self.model:
            name, _, checkpoint = one.partition("=")
            found.append((name, checkpoint))
        return found

    @model_validator(mode="after")
    def _names_what_is_served(self) -> Settings:
        if self.served_model_name and not self._serves_checkpoint:
            raise ValueError("served_model_name is CHECKPOINT's name, and none is given: a model's is in model, NAME=CHECKPOINT")
        return self

    @model_validator(mode="before")
    @classmethod
    def _refuse_strays(cls, values: Any) -> Any:
        """A mistyped variable would otherwise be silence: pydantic-settings reads only the names it knows."""
        known = [PREFIX + name.upper() for name in cls.model_fields]
        strays = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in (*known, *OTHERS))
        if strays:
            # Kubernetes makes such variables for a Service named espalier.
            hint = "; in Kubernetes, set enableServiceLinks: false" if PREFIX + "SERVICE_HOST" in strays else ""
            raise ValueError(f"unknown environment variables {', '.join(strays)}{hint}. Known: {', '.join(known)}")
        return values


def read_settings(given: dict[str, Any]) -> Settings:
    """Settings from the caller and the environment. Raises ValueError that names, on one line, everything that is wrong."""
    try:
        return Settings(**given)
    except ValidationError as error:
        raise ValueError("; ".join(map(str, faults(error)))) from error
