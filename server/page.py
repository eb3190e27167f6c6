"""The chat page: static files of the package, served with headers that let nothing else in."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources

from aiohttp import ETag, web

# The page talks to its own server and loads its own files; nothing inline, nothing foreign, no frame around it.
# Trusted Types make the browser itself refuse text that is assigned as HTML.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)

PAGE = "index.html"
# Spelled out: the system's table of types differs between machines, and nosniff refuses a script with a wrong one.
CONTENT_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page, held in memory: a few kilobytes, and no path of a request ever reaches the disk."""

    body: bytes
    content_type: str
    etag: str  # 32 hex digits of the body's SHA-256


def load_assets() -> dict[str, Asset]:
    """The files of the page by name.

    Raises:
        FileNotFoundError: the installed package lacks the page's files.
    """
    assets: dict[str, Asset] = {}
    folder = resources.files("millrace.server").joinpath("web")
    for entry in folder.iterdir() if folder.is_dir() else ():
        content_type = CONTENT_TYPES.get(entry.name[entry.name.rfind(".") :])
        if content_type is not None:
            body = entry.read_bytes()
            assets[entry.name] = Asset(body, content_type, hashlib.sha256(body).hexdigest()[:32])
    if PAGE not in assets:
        raise FileNotFoundError(f"the chat page is missing: no {PAGE} in {folder}; reinstall the package")
    return assets


def add_page_routes(app: web.Application) -> None:
    """Adds ``GET /`` (the chat page) and ``GET /assets/{name}`` (its files); HEAD is answered too.

    A reply may be stored, and is asked for anew each time (``no-cache`` with an ETag): an upgrade shows at once.

    Raises:
        FileNotFoundError: the installed package lacks the page's files.
    """
    assets = load_assets()

    async def page(request: web.Request) -> web.Response:
        return _reply(request, assets[PAGE])

    async def asset(request: web.Request) -> web.Response:
        found = assets.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound(text="no such file of the chat page")
        return _reply(request, found)

    routes: tuple[tuple[str, Callable[[web.Request], Awaitable[web.Response]]], ...] = (
        ("/", page),
        ("/assets/{name}", asset),
    )
    for path, handler in routes:
        app.router.add_get(path, handler)


def _reply(request: web.Request, asset: Asset) -> web.Response:
    asked = request.if_none_match or ()
    unchanged = any(tag.value in (asset.etag, "*") for tag in asked)
    response = web.Response(status=304) if unchanged else web.Response(body=asset.body)
    if not unchanged:
        response.content_type = asset.content_type
        response.charset = "utf-8"
    response.etag = ETag(asset.etag)
    response.headers.update(
        {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
    )
    return response
