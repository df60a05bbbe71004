"""Check whether the Hugging Face Hub can be reached, without waiting for retries."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit


def hub_reachable() -> bool:
    """Return False if HF_HUB_OFFLINE is set or the Hub's host name does not resolve.

    Behind a proxy the result is True: the proxy resolves names, so only the request itself can tell.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    # this import takes a tenth of a second, and every tokenising process imports this module
    from urllib.request import getproxies

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    proxies = getproxies()
    if urlsplit(endpoint).scheme in proxies or "all" in proxies:
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True
