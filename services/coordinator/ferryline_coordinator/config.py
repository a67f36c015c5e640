"""Settings of the coordinator: TOML file < environment (FERRYLINE_COORDINATOR_*) < command-line flags. Times in ms."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ferryline.protocol.access import AccessPolicy
from ferryline_coordinator.core.config import CoreConfig

ENV_PREFIX = "FERRYLINE_COORDINATOR_"


class CoordinatorConfig(BaseSettings):
    """Everything a coordinator can be told. Made by `load_config`; frozen afterwards."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, toml_file=None)

    data_dir: Path = Field(description="Directory of the records, the CA and the join tokens.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8443, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    advertise: str = Field("", description="https URL told to brokers and clients; made of host and port if empty.")
    hosts: Annotated[list[str], NoDecode] = Field(
        default=[], description="Further host names and addresses for the certificate; may be repeated."
    )
    join_token_dir: Path | None = Field(None, description="Directory of unused join tokens; default: in the data dir.")
    join_tokens: int = Field(16, ge=0, le=1000, description="Unused join tokens to keep in the directory.")
    store: str = Field(
        "sqlite",
        pattern="^(sqlite|etcd|memory)$",
        description="Where records are kept: sqlite (one coordinator), etcd (several), memory (forgets at the end).",
    )
    etcd_endpoints: Annotated[list[str], NoDecode] = Field(
        default=[], description="URLs of etcd's members; may be repeated. http only on loopback."
    )
    etcd_prefix: str = Field(
        "ferryline", pattern=r"^[A-Za-z0-9._/-]{1,100}$", description="Everything of this cluster is under this key."
    )
    etcd_ca: Path | None = Field(None, description="CA of etcd's certificates; default: what the system trusts.")
    etcd_cert: Path | None = Field(None, description="Our certificate for etcd, if it wants one.")
    etcd_key: Path | None = Field(None, description="The key of etcd_cert.")
    etcd_user: str = Field("", description="User, if etcd wants one.")
    etcd_password_file: Path | None = Field(None, description="File with the password of etcd_user.")
    etcd_lease_ms: int = Field(
        5_000,
        ge=2_000,
        le=60_000,
        description="A silent active coordinator is replaced after this long; whole seconds.",
    )
    etcd_compact: bool = Field(True, description="Let etcd forget history; say no if others use this etcd, too.")
    cluster_secret_file: Path | None = Field(
        None, description="Secret of at least 32 bytes that all coordinators share; seals the CA's key in etcd."
    )
    bootstrap_admin: Path | None = Field(
        None, description="With --access: the first start makes a principal admin, whose key is put into this file."
    )
    access: Path | None = Field(
        None, description="TOML file with principals, issuers and rules: who may do what. None: everybody everything."
    )
    plain_http: bool = Field(False, description="Serve without TLS, on loopback only: for tests.")

    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error.")
    log_form: str = Field("console", pattern="^(console|json)$", description="console or json.")

    heartbeat_ms: int = Field(500, ge=20, le=60_000, description="Interval of brokers' heartbeats.")
    fence_ms: int = Field(3_000, ge=100, le=600_000, description="Silence after which a broker is fenced.")
    probe_ms: int = Field(300, ge=10, le=60_000, description="A probe without answer after this long has failed.")
    replacement_ms: int = Field(30_000, ge=0, description="A lost replica is replaced after this long.")
    balance_ms: int = Field(1_000, ge=50, description="How often placement is looked at while it is not settled.")
    preferred_ms: int = Field(5_000, ge=0, description="A returned broker gets its primaries back after this long.")
    moves_max: int = Field(10, ge=1, le=1000, description="Replicas that move at a time.")
    handovers_max: int = Field(8, ge=1, le=1000, description="Primaries that hand over at a time.")
    recovery: str = Field("wait", pattern="^(wait|balanced)$", description="Partitions without candidate: see docs.")
    group_heartbeat_ms: int = Field(3_000, ge=50, description="Interval of group members' heartbeats.")
    group_unsettled_ms: int = Field(250, ge=20, description="The same while partitions change hands.")

    @field_validator("hosts", "etcd_endpoints", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Environment variables hold a JSON list or names separated by commas."""
        if isinstance(value, str):
            text = value.strip()
            return json.loads(text) if text.startswith("[") else [p.strip() for p in text.split(",") if p.strip()]
        return value

    @field_validator("advertise")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if value and not value.startswith(("https://", "http://")):
            raise ValueError(f"{value[:200]!r} is no https URL")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _relations(self) -> CoordinatorConfig:
        if self.store == "etcd":
            self._check_etcd()
        if self.bootstrap_admin is not None and self.access is None:
            raise ValueError("bootstrap_admin: only with access; without it nobody needs a key")
        if self.plain_http and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(f"plain_http: only on loopback, not on {self.host}")
        self.core(())
        return self

    def _check_etcd(self) -> None:
        if not self.etcd_endpoints:
            raise ValueError("etcd_endpoints: store etcd needs at least one")
        for url in self.etcd_endpoints:
            parts = urlsplit(url)
            if parts.scheme not in ("https", "http") or not parts.hostname:
                raise ValueError(f"etcd_endpoints: {url[:200]!r} is no https URL")
            if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
                raise ValueError(f"etcd_endpoints: {url[:200]!r} would send in clear; use https")
        if self.cluster_secret_file is None:
            raise ValueError(
                "cluster_secret_file: store etcd needs one, the same for every coordinator; "
                "make it with: ferryline-coordinator secret --out FILE"
            )
        if (self.etcd_cert is None) != (self.etcd_key is None):
            raise ValueError("etcd_cert and etcd_key: give both or none")

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

    def core(self, coordinators: tuple[str, ...], access: AccessPolicy | None = None) -> CoreConfig:
        """The part that the core needs; ``access`` is what the access file says. Raises ValueError when timings
        contradict each other."""
        return CoreConfig(
            heartbeat_ms=self.heartbeat_ms,
            fence_ms=self.fence_ms,
            probe_ms=self.probe_ms,
            replacement_ms=self.replacement_ms,
            balance_ms=self.balance_ms,
            preferred_ms=self.preferred_ms,
            moves_max=self.moves_max,
            handovers_max=self.handovers_max,
            recovery=self.recovery,
            group_heartbeat_ms=self.group_heartbeat_ms,
            group_unsettled_ms=self.group_unsettled_ms,
            coordinators=coordinators,
            access=access,
        )

    def url(self, port: int) -> str:
        """What others are told to connect to."""
        if self.advertise:
            return self.advertise
        host = socket.gethostname() if self.host in ("0.0.0.0", "::", "") else self.host
        return f"{'http' if self.plain_http else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"

    def shown(self) -> dict[str, Any]:
        """The effective settings for logs and --print-config."""
        return self.model_dump(mode="json")


def load_config(flags: dict[str, Any], toml_file: Path | None = None) -> CoordinatorConfig:
    """Settings from the file, the environment and ``flags`` (the strongest). Raises pydantic.ValidationError, and
    OSError or tomllib.TOMLDecodeError for a bad file."""
    if toml_file is None:
        return CoordinatorConfig(**flags)
    toml_file.stat()  # a file that was named must exist; the settings source would pass over it in silence

    class FromFile(CoordinatorConfig):
        model_config = SettingsConfigDict(toml_file=toml_file)

    return FromFile(**flags)


def as_toml(values: dict[str, Any]) -> str:
    """Flat settings as TOML; unset ones are left out. JSON text of strings, numbers and lists is TOML too."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value is not None)
