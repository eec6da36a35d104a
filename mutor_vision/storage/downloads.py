"""Downloads of weights that fail in seconds, not minutes, when the host does not answer."""

import socket
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mutor_vision.errors import UserError

CONNECT_SECONDS = 3.0  # for a host to answer
STALLED_SECONDS = 60.0  # a download that receives no byte for this long fails


def host_answers(url: str) -> bool:
    """Whether the host of a URL, or the proxy that the environment sets for it, accepts a connection. Tells in seconds,
    while download clients retry for minutes."""
    try:
        parts = urlsplit(url)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
            parts = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
        port = parts.port or {"https": 443, "socks5": 1080, "socks5h": 1080}.get(parts.scheme, 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
        return True
    except (OSError, ValueError):  # ValueError: a name or port that is none
        return False


@contextmanager
def ending_downloads() -> Iterator[None]:
    """Within it, a stalled connection of urllib, which torch.hub uses, raises an error instead of waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def check_cache(folder: Path, variable: str) -> None:
    """Raise UserError when `folder`, the cache for downloads, cannot be written. variable: the environment variable
    that sets its place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}, where downloaded weights are kept, cannot be written ({error.strerror}); set {variable} to a "
            "folder that can, or pass --weights FILE"
        ) from None
