"""The balancer's configuration: the file's keys, and what they resolve to. It opens files, never sockets."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from balancer.history import HISTORY_TICKS_MAX
from balancer.migrate import MigrateSettings
from balancer.series import ExternalSeries, SeriesTable, Source, check_series
from engine.client.admission import LimitsTable, ServiceLimits
from engine.client.config import Identity, load_config, load_identity, resolve
from engine.client.httpconfig import HttpConfig, HttpTable, http_config
from engine.client.membership import Membership, OwnCurve, open_membership
from engine.errors import ConfigError
from engine.protocol.requests import MOVES_MAX

__all__ = ["BalancerConfig", "Settings", "load_settings", "prepare_data"]

Endpoint = Annotated[str, Meta(max_length=256, pattern=r"^(tcp://.+)?$")]


class MigrateTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The section ``[migrate]``: whether and how quickly keys are moved, repaired and refreshed."""

    enabled: bool = True
    keys_per_s: Annotated[float, Meta(ge=1, le=100_000)] = 300.0
    batch: Annotated[int, Meta(ge=1, le=MOVES_MAX)] = 64
    under_way: Annotated[int, Meta(ge=1, le=64)] = 2
    repair_after_s: Annotated[float, Meta(ge=1, le=30 * 86_400)] = 300.0
    refresh_every_h: Annotated[float, Meta(ge=0, le=10 * 366 * 24)] = 0.0

    def settings(self) -> MigrateSettings:
        """What it sets."""
        return MigrateSettings(
            self.enabled,
            self.keys_per_s,
            self.batch,
            self.under_way,
            self.repair_after_s,
            self.refresh_every_h * 3600.0,
        )


class RegistryTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The section ``[registry]``: where the registry is, if not in a file of the data folder."""

    postgresql: Annotated[str, Meta(max_length=2048)] = ""


class BalancerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """``balancer.toml``. Paths are relative to the file's folder; an empty endpoint means the manifest's."""

    version: Annotated[int, Meta(ge=1, le=1)]
    identity: str
    manifest: str
    manifest_pin: str
    data: str
    bind: Endpoint = ""
    publish_bind: Endpoint = ""
    tick_ms: Annotated[int, Meta(ge=50, le=60_000)] = 1_000
    history_ticks: Annotated[int, Meta(ge=100, le=HISTORY_TICKS_MAX)] = 3_600
    limits: LimitsTable = LimitsTable()
    http: HttpTable = HttpTable()
    migrate: MigrateTable = MigrateTable()
    registry: RegistryTable = RegistryTable()
    series: Annotated[list[SeriesTable], Meta(max_length=16)] = []


@dataclass(frozen=True, slots=True)
class Settings:
    """A checked configuration: who this balancer is, its membership, its folder, endpoints and clock.

    ``bind`` and ``publish_bind`` are empty where the manifest's endpoints are bound. ``http`` is None where nothing is
    served over HTTP. ``postgresql`` is empty where the registry is a file in the folder, and else a connection string.
    """

    identity: Identity
    membership: Membership
    own: OwnCurve
    data: Path
    bind: str
    publish_bind: str
    tick_ms: int
    history_ticks: int
    limits: ServiceLimits
    http: HttpConfig | None
    migrate: MigrateSettings
    series: tuple[tuple[SeriesTable, Path], ...]
    postgresql: str

    def sources(self) -> ExternalSeries:
        """The external series, not yet begun."""
        return ExternalSeries([Source(table, path) for table, path in self.series])


def load_settings(path: str | os.PathLike[str]) -> Settings:
    """Read and check the configuration and the files it names; changes nothing.

    ``ConfigError`` and ``ManifestError`` name the file and what is wrong with it.
    """
    config = load_config(path, BalancerConfig)
    identity = load_identity(resolve(path, config.identity))
    membership = open_membership(resolve(path, config.manifest), config.manifest_pin)
    check_series(config.series, str(path))
    http = http_config(path, "http", config.http)
    if http is not None:
        from engine.client.web import check_http  # which takes a while

        check_http(http)
    cluster = membership.cluster
    member = cluster.members.get(identity.name)
    if identity.role != "balancer" or member is None or member.role != "balancer":
        raise ConfigError(f"{path}: {identity.name!r} is no balancer of the cluster {cluster.name!r}")
    if not identity.is_in(cluster):
        raise ConfigError(f"{path}: the keys of {identity.name!r} are not those in the manifest of {cluster.name!r}")
    if not (config.publish_bind or member.publish_endpoint):
        raise ConfigError(f"{path}: no publish_bind, and the manifest has no publish endpoint for {identity.name!r}")
    data = resolve(path, config.data)
    if data.exists():
        _check_folder(data)
    return Settings(
        identity=identity,
        membership=membership,
        own=OwnCurve(identity, membership, resolve(path, config.identity)),
        data=data,
        bind=config.bind,
        publish_bind=config.publish_bind,
        tick_ms=config.tick_ms,
        history_ticks=config.history_ticks,
        limits=config.limits.service(),
        http=http,
        migrate=config.migrate.settings(),
        series=tuple((table, resolve(path, table.file or ".")) for table in config.series),
        postgresql=_connection_string(path, config.registry.postgresql),
    )


def _connection_string(path: str | os.PathLike[str], told: str) -> str:
    if not told:
        return ""
    try:
        from balancer.postgres import check_connection_string  # which not every balancer has
    except ImportError as error:
        raise ConfigError(f"{path}: [registry] needs `pip install 'keyquorum[postgresql]'` ({error})") from None
    return check_connection_string(told, f"{path}: [registry] postgresql")


def prepare_data(settings: Settings) -> Path:
    """Make the data folder (mode 0700) if need be; the registry's file in it."""
    try:
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{settings.data}: {error.strerror}") from None
    _check_folder(settings.data)
    return settings.data / "registry.db"


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"{path}: no folder")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path}: mode {mode:04o} lets others at it; it must be 0700")
