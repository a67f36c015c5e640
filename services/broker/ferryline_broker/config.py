"""Settings of a broker: TOML file < environment (FERRYLINE_BROKER_*) < command-line flags.

Times in ms, sizes in bytes, as everywhere inside the services. Each field says what it bounds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

ENV_PREFIX = "FERRYLINE_BROKER_"
SECRETS = frozenset({"join_token"})
MIB = 1024 * 1024


class BrokerConfig(BaseSettings):
    """Everything a broker can be told. Made by `load_config`; frozen afterwards."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, toml_file=None)

    data_root: Path = Field(description="Directory of the data directories; the first free one is locked and used.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(9443, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    coordinator: Annotated[list[str], NoDecode] = Field(
        default=["https://127.0.0.1:8443"], min_length=1, description="URLs of coordinators; may be repeated."
    )
    ca_file: Path | None = Field(None, description="Cluster CA; needed until the first join stored it.")
    join_token: str = Field("", description="One-time token for the first start.")
    join_token_file: Path | None = Field(None, description="File that holds a one-time token.")
    join_token_dir: Path | None = Field(
        None, description="Directory of one-time tokens; one is claimed by renaming it."
    )
    advertise_internal: str = Field("", description="https URL at which brokers and the coordinator reach this broker.")
    advertise_external: str = Field("", description="https URL at which clients reach this broker.")
    tls_names: Annotated[list[str], NoDecode] = Field(
        default=[], description="Further names and addresses for the certificate asked for at the first join."
    )

    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error.")
    log_form: str = Field("console", pattern="^(console|json)$", description="console or json.")

    heartbeat_ms: int = Field(500, ge=10, le=60_000, description="Heartbeat to the coordinator.")
    lag_max_ms: int = Field(10_000, ge=100, description="A secondary behind for longer leaves the in-sync set.")
    stop_ms: int = Field(5_000, ge=100, description="Most that a clean stop spends on handing partitions over.")
    fetch_bytes_max: int = Field(MIB, ge=4096, le=16 * MIB, description="Answer to a secondary, per log.")

    session_produce_bytes_max: int = Field(64 * MIB, ge=MIB, description="Unsettled produce bytes of one session.")
    produce_bytes_max: int = Field(256 * MIB, ge=MIB, description="Unsettled produce bytes of all sessions.")
    answer_bytes_max: int = Field(8 * MIB, ge=65536, le=24 * MIB, description="Payload of one fetch answer.")
    parked_max: int = Field(100_000, ge=1, description="Parked fetches and metadata requests of all sessions.")

    disk_reserve_bytes: int = Field(
        1024 * MIB, ge=0, description="Records are refused when less is free; only delivery state may use the rest."
    )
    disk_reserve_percent: float = Field(5.0, ge=0, le=50, description="The same, in percent of the file system.")
    disk_check_ms: int = Field(1_000, ge=50, description="How often free space is looked at.")
    checkpoint_ms: int = Field(1_000, ge=50, le=1_000, description="How often each changed log gets its checkpoint.")
    retention_ms: int = Field(10_000, ge=50, description="How often retention is applied.")
    priority_wait_ms: int = Field(
        10_000,
        ge=0,
        le=86_400_000,
        description="How long a record of a queue waits behind higher priorities before it gets a share.",
    )
    metrics_topics_max: int = Field(
        200, ge=1, le=10_000, description="Topics with metrics of their own; further ones are counted together."
    )
    scrub_bytes_per_s: int = Field(4 * MIB, ge=0, description="Read rate of the scrubber; 0 turns it off.")

    @field_validator("coordinator", "tls_names", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Environment variables hold a JSON list or names separated by commas."""
        if isinstance(value, str):
            text = value.strip()
            return (
                json.loads(text) if text.startswith("[") else [part.strip() for part in text.split(",") if part.strip()]
            )
        return value

    @field_validator("coordinator", "advertise_internal", "advertise_external")
    @classmethod
    def _is_url(cls, value: Any) -> Any:
        for url in value if isinstance(value, list) else [value]:
            if url and not url.startswith("https://"):
                raise ValueError(f"{url[:200]!r} does not begin with https://")
        return value

    @model_validator(mode="after")
    def _relations(self) -> BrokerConfig:
        given = [bool(self.join_token), self.join_token_file is not None, self.join_token_dir is not None]
        if sum(given) > 1:
            raise ValueError("give one of join_token, join_token_file and join_token_dir")
        if self.session_produce_bytes_max > self.produce_bytes_max:
            raise ValueError("session_produce_bytes_max is above produce_bytes_max")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def shown(self) -> dict[str, Any]:
        """The effective settings for logs and --print-config, secrets masked."""
        values = self.model_dump(mode="json")
        return {name: ("***" if name in SECRETS and value else value) for name, value in values.items()}


def load_config(flags: dict[str, Any], toml_file: Path | None = None) -> BrokerConfig:
    """Settings from the file, the environment and ``flags`` (the strongest). Raises pydantic.ValidationError, and
    OSError or tomllib.TOMLDecodeError for a bad file."""
    if toml_file is None:
        return BrokerConfig(**flags)
    toml_file.stat()  # a file that was named must exist; the settings source would pass over it in silence

    class FromFile(BrokerConfig):
        model_config = SettingsConfigDict(toml_file=toml_file)

    return FromFile(**flags)


def as_toml(values: dict[str, Any]) -> str:
    """Flat settings as TOML; unset ones are left out. JSON text of strings, numbers and lists is TOML too."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value is not None)
