"""Whether the services that score responses answer, before anything is started."""

import os
import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.reward import EndpointSource
from rlhf.errors import ConfigError


def starts_ray_here(config: TrainConfig, environ: Mapping[str, str]) -> bool:
    """Whether the run starts a Ray cluster on this machine, instead of joining one."""
    return not (config.cluster.address or environ.get("RAY_ADDRESS"))


def require_services(config: TrainConfig) -> None:
    """Raise ConfigError where nothing listens at the address of a judge or a reward service. A service that only the
    nodes of another cluster can reach is not asked."""
    if isinstance(config, OnlineConfig) and starts_ray_here(config, os.environ) and (problems := list(_silent(config))):
        raise ConfigError(problems)


def services_of(config: TrainConfig) -> list[str]:
    """The addresses of the services of a run."""
    if not isinstance(config, OnlineConfig):
        return []
    return [source.url for source in config.reward.all_sources if isinstance(source, EndpointSource)]


def _silent(config: OnlineConfig) -> Iterator[str]:
    listed = bool(config.reward.sources)
    for n, source in enumerate(config.reward.all_sources):
        if not isinstance(source, EndpointSource):
            continue
        address = urlsplit(source.url)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname or "", port), source.connect_timeout_s).close()
        except OSError as error:
            where = f"reward.sources.{n}.url" if listed else "reward.url"
            why = error.strerror or str(error) or type(error).__name__
            yield f"{where}: nothing answers at {address.hostname}:{port} ({why}). Start the service first."
