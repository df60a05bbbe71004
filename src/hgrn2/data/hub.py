"""Whether the Hugging Face Hub can be reached, told at once rather than after many retries."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit


def hub_reachable() -> bool:
    """True unless the Hub is switched off (HF_HUB_OFFLINE) or its host name does not resolve.

    Behind a proxy names are resolved by the proxy, so there the answer is True and the request itself
    decides.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    # takes a tenth of a second, and every process that tokenises imports this module
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
