"""Checks the addresses that the host name of a reward service resolves to."""

import socket
from urllib.parse import urlsplit

from rlhf.config.reward import is_link_local, is_private
from rlhf.errors import ConfigError


def check_address(url: str, *, allow_plain_http: bool) -> bool:
    """Whether the host is this machine or on a private network.

    Raises ConfigError for a link-local address (where cloud machines serve their own credentials), and for plain http
    to a host that is not private.
    """
    parts = urlsplit(url)
    plain = parts.scheme == "http" and not allow_plain_http
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or parts.scheme, type=socket.SOCK_STREAM)
    except OSError as error:
        if plain:
            raise ConfigError(f"reward.url: host {parts.hostname} is unknown.") from error
        return False  # a proxy may be able to resolve it
    addresses = [str(address[0]) for *_, address in found]
    if any(is_link_local(address) for address in addresses):
        raise ConfigError("reward.url: link-local address refused.")
    private = all(is_private(address) for address in addresses)
    if plain and not private:
        raise ConfigError("reward.url: plain http to a non-private host; use https, or allow_plain_http of the source.")
    return private
