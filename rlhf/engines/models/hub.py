"""Whether the model hub can be reached, known in seconds: the hub's own client tries for half a minute."""

import os
import socket
import threading
from urllib.parse import urlsplit

from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import described_folder
from rlhf.errors import ModelError

HUB_TIMEOUT_S = 3.0
"""Time for the hub's first reply, for whatever is asked."""
DEFAULT_ENDPOINT = "https://huggingface.co"


def require_found(model: str, key: str) -> None:
    """Raises ModelError where a model is neither on this machine nor can be downloaded. `key` is its config key."""
    try:
        is_here = described_folder(model, os.environ) is not None
    except ModelFileError as error:
        raise ModelError(f"{key}: {error}") from error
    if not is_here and not hub_is_reachable():
        raise ModelError(f"{key}: {model} is no folder, and the hub cannot be reached.")


def hub_is_reachable(timeout_s: float = HUB_TIMEOUT_S) -> bool:
    """Whether a connection to the hub (`HF_ENDPOINT`), or to the proxy on the way to it, opens in time."""
    import urllib.request  # noqa: PLC0415  slow to import, and most models are on this machine

    endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT)
    address = urlsplit(urllib.request.getproxies().get(urlsplit(endpoint).scheme) or endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout_s).close()
        except OSError:
            return
        opened.set()

    # The lookup of a name has no deadline of its own, so it is left behind where it takes too long.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return opened.is_set()
