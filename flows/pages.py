"""Where a browser finds the pages of a run: SANITIZE_REPORT_BASE_URL, an address at which a web server of yours shows
the folder or bucket SANITIZE_REPORT_ROOT (default: the working directory).

Not a setting of any recipe: it changes no result, and each machine may have another.
"""

import os
from urllib.parse import quote, urlsplit

from sanitize.errors import ConfigError
from sanitize.storage import absolute, is_local


def check_base() -> str:
    """The base of all addresses; "" where none is set. Raises ConfigError if it is no http(s) address."""
    base = os.environ.get("SANITIZE_REPORT_BASE_URL", "").strip().rstrip("/")
    if not base:
        return ""
    try:
        parts = urlsplit(base)
        is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
    except ValueError:
        is_plain = False
    if not is_plain or quote(base, safe=":/%[]@~") != base:
        raise ConfigError(f"SANITIZE_REPORT_BASE_URL={base!r} must be a plain http:// or https:// address")
    return base


def page_address(url: str) -> str:
    """Address of a page for a browser, where one is known; otherwise its absolute path or URL, which is no link.

    Raises:
        ConfigError: SANITIZE_REPORT_BASE_URL is no http(s) address.
    """
    base, root = check_base(), os.environ.get("SANITIZE_REPORT_ROOT", ".")
    place, below = (absolute(one) if is_local(one) else one.rstrip("/") for one in (url, root))
    below = below.rstrip("/") + "/"
    if not base or not place.startswith(below):
        return place
    return f"{base}/{quote(place.removeprefix(below))}"
