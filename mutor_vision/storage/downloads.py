"""Weights from the net, without a wait where no host answers."""

import socket
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mutor_vision.errors import UserError

CONNECT_SECONDS = 3.0  # for a host to answer
STALLED_SECONDS = 60.0  # without a byte, after which a download is given up


def host_answers(url: str) -> bool:
    """Can a connection be made to the host of a URL, or to the proxy that the environment names for it? Found out in
    seconds, where the clients of the net try again and again for minutes."""
    try:
        parts = urlsplit(url)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        if proxy and not urllib.request.proxy_bypass(parts.hostname):
            parts = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
        port = parts.port or {"https": 443, "socks5": 1080, "socks5h": 1080}.get(parts.scheme, 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
        return True
    except (OSError, ValueError):  # ValueError: a name or port that is none
        return False


@contextmanager
def ending_downloads() -> Iterator[None]:
    """Within it, a connection of urllib's (torch.hub's) that has stalled is an error instead of a wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def check_cache(folder: Path, variable: str) -> None:
    """UserError when downloaded weights cannot be kept in `folder`, which the environment's `variable` moves."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}, where downloaded weights are kept, cannot be written ({error.strerror}); set {variable} to a "
            "folder that can, or pass --weights FILE"
        ) from None
