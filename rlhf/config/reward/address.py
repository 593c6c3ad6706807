"""Addresses of services: what can be checked in their text alone."""

import ipaddress
import re
from typing import Annotated
from urllib.parse import SplitResult, unquote_plus, urlsplit

from pydantic import AfterValidator

NO_SECRETS = "no credentials in the address; name an environment variable by auth_env."
SECRET_NAME = re.compile(r"key|token|secret|passw|pwd|auth|sig(?:nature)?$|credential|^code$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9_\-+/=.~]{20,}")
"""A long value of letters and digits, as tokens are."""
SECRET_PART = re.compile(
    r"(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{24,}|^(?:sk-|hf_|gh[pousr]_|xox[a-z]-|AKIA)[\w-]{8,}"
)
"""What looks like a token in a path: a long run of letters and digits, or the beginning that some services give theirs.
The ids of deployments and models have words, hyphens or fewer characters."""


def is_link_local(address: str) -> bool:
    """Whether an IP address is link-local. Such addresses serve the credentials of cloud machines."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_link_local


def is_private(address: str) -> bool:
    """Whether an IP address belongs to this machine or a private network."""
    return ipaddress.ip_address(address.partition("%")[0]).is_private


def literal_address(url: str) -> str | None:
    """The URL's host, if it is an IP address."""
    host = urlsplit(url).hostname or ""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def check_plain_http(url: str) -> None:
    """Refuse plain http to an IP address that is not private."""
    address = literal_address(url)
    if url.lower().startswith("http:") and address is not None and not is_private(address):
        raise ValueError("url: plain http to a non-private host; use https, or a source with allow_plain_http.")


def require_no_secrets(url: str, refusal: str = NO_SECRETS) -> None:
    """Raise ValueError, with `refusal` and without the value, for an address with a user, or with a parameter or a part
    of its path that looks like a secret."""
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ValueError(refusal)
    for piece in re.split("[/;&#?]", f"{parts.path}?{parts.query}#{parts.fragment}"):
        name, sign, value = piece.partition("=")
        name, value = unquote_plus(name), unquote_plus(value)
        if sign and (SECRET_NAME.search(name) or SECRET_VALUE.fullmatch(value)):
            raise ValueError(f'{refusal.removesuffix(".")} (the parameter "{name}" looks like one).')
        if not sign and SECRET_PART.search(name):
            raise ValueError(f"{refusal.removesuffix('.')} (a part of its path looks like one).")


def _checked_variable(name: str) -> str:
    """The name of an environment variable. A message about another text does not repeat it: it may be the token."""
    if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is None:
        raise ValueError("must be the name of an environment variable; export the token under that name.")
    if name != name.upper() and (SECRET_VALUE.fullmatch(name) or SECRET_PART.search(name)):
        raise ValueError("looks like the token itself; export it as an environment variable, and give its name.")
    return name


def _checked_url(url: str) -> str:
    if any(character.isspace() or not character.isprintable() for character in url):
        raise ValueError("the address contains a space or a control character.")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f'scheme must be http or https (got "{parts.scheme}").')
    if not parts.hostname:
        raise ValueError(f'no host in the address (got "{url.partition("?")[0]}").')
    require_no_secrets(url)
    _check_port(parts)
    address = literal_address(url)
    if address is not None and is_link_local(address):
        raise ValueError("link-local address refused.")
    return url


def _check_port(parts: SplitResult) -> None:
    given = parts.netloc.rpartition("]")[2].rpartition(":")[2] if ":" in parts.netloc.rpartition("]")[2] else None
    if given is not None and not (given.isascii() and given.isdigit() and 0 < int(given) < 65536):
        raise ValueError(f'port must be a number from 1 to 65535 (got "{given}").')


Url = Annotated[str, AfterValidator(_checked_url)]
Variable = Annotated[str, AfterValidator(_checked_variable)]
