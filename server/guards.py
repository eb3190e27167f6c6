"""What every request passes: an id, the checks against browsers that were tricked, CORS, and errors as objects."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from millrace.runtime.errors import MillraceError
from millrace.server.context import CONTEXT, REQUEST_ID, Context, new_request_id
from millrace.server.errors import HttpError, error_response, internal_error

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SAFE_ID = re.compile(r"[A-Za-z0-9._:\-]+")
_CORS_SECONDS = "600"  # a browser asks again after this long
_EXPOSED = "x-request-id, Retry-After, x-should-retry"


def request_id(request: web.Request, context: Context) -> str:
    """The client's own id, if it is short and harmless; else a new one."""
    given = request.headers.get("x-request-id", "")
    if len(given) <= context.limits.max_name_chars and _SAFE_ID.fullmatch(given):
        return given
    return new_request_id()


def loopback_hosts(host: str, origins: tuple[str, ...]) -> frozenset[str] | None:
    """The names that a Host header may carry when the server listens on `host`; None for any.

    A page on the web can point a name of its own at 127.0.0.1 and so reach a server that only this machine should
    reach (DNS rebinding). Its requests carry that name.
    """
    try:
        loopback = ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback or "*" in origins:
        return None
    return frozenset({host.lower(), "localhost", *(urlsplit(origin).hostname or "" for origin in origins)})


def check_host(request: web.Request, context: Context) -> None:
    """Raises HttpError 403 for a Host header with a foreign name."""
    if context.hosts is None:
        return
    name = _host_name(request.headers.get(hdrs.HOST, ""))
    if name in context.hosts or name.endswith(".localhost"):
        return
    try:
        ip_address(name)
    except ValueError:
        raise HttpError(
            403,
            "host_not_allowed",
            f"the Host {name[:128]!r} is not a name of this server, which listens on the loopback address; "
            "add its origin to server.allowed_origins if it is meant",
        ) from None


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def check_origin(request: web.Request, context: Context) -> str | None:
    """The foreign origin that may read the answer, or None for the server's own page and for programs.

    Raises HttpError 403 for any other page: a browser sends its requests too, and only hides the answers.
    """
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None:
        return None
    host = request.headers.get(hdrs.HOST, "").lower()
    if origin.lower() in (f"http://{host}", f"https://{host}") and host:
        return None
    if "*" in context.origins or origin.rstrip("/").lower() in context.origins:
        return origin
    raise HttpError(
        403,
        "origin_not_allowed",
        f"the origin {origin[:128]!r} may not use this server; add it to server.allowed_origins if it is meant",
    )


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Checks the request, and turns whatever the handler raises into an error object."""
    context = request.app[CONTEXT]
    request[REQUEST_ID] = request_id(request, context)
    try:
        check_host(request, context)
        origin = check_origin(request, context)
        if origin is not None:
            request[CORS_ORIGIN] = origin
        if request.method == hdrs.METH_OPTIONS:
            response: web.StreamResponse = _options(request)
        else:
            response = await handler(request)
    except HttpError as error:
        response = error_response(error)
    except MillraceError as error:
        response = error_response(error)
    except web.HTTPException as error:
        response = _routing_error(request, error)
    except ConnectionError:
        raise  # the client has gone: nobody is left to answer
    except asyncio.CancelledError:
        context.metrics.responses.labels(_route(request), "499").inc()
        raise
    except Exception as error:
        context.log.error("a handler failed", request_id=request[REQUEST_ID], route=_route(request), exc_info=error)
        if request.writer.output_size > 0:
            raise ConnectionResetError("a part of the response has been sent; no other can follow") from error
        response = error_response(internal_error())
    context.metrics.responses.labels(_route(request), str(response.status)).inc()
    return response


CORS_ORIGIN = web.RequestKey("cors_origin", str)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """On each response, just before its head is written."""
    if REQUEST_ID in request:
        response.headers["x-request-id"] = request[REQUEST_ID]
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers[hdrs.SERVER] = "millrace"  # aiohttp would name its own version and Python's
    if CORS_ORIGIN in request:
        response.headers["Access-Control-Allow-Origin"] = request[CORS_ORIGIN]
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        response.headers[hdrs.VARY] = "Origin"


def _options(request: web.Request) -> web.Response:
    """Answers a browser's question before it sends a request of its own making."""
    failed = request.match_info.http_exception
    if isinstance(failed, web.HTTPNotFound):
        raise failed
    methods = sorted(failed.allowed_methods) if isinstance(failed, web.HTTPMethodNotAllowed) else []
    allowed = ", ".join([*methods, hdrs.METH_OPTIONS])
    response = web.Response(status=204, headers={hdrs.ALLOW: allowed})
    if CORS_ORIGIN in request:
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        response.headers["Access-Control-Allow-Methods"] = allowed
        # The origin is trusted, so its headers are; they are named because `*` leaves out Authorization.
        response.headers["Access-Control-Allow-Headers"] = wanted or "content-type, authorization, x-request-id"
        response.headers["Access-Control-Max-Age"] = _CORS_SECONDS
    return response


def _routing_error(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    """aiohttp's own answers (no such route, wrong method) in our shape; redirects and the like pass."""
    if error.status < 400:
        return error
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        text = f"{request.method} is not allowed on {request.path[:128]}; it takes {allowed}"
        return error_response(HttpError(405, "method_not_allowed", text, headers={hdrs.ALLOW: allowed}))
    if isinstance(error, web.HTTPNotFound):
        return error_response(HttpError(404, "not_found", f"there is no route {request.method} {request.path[:128]}"))
    return error_response(HttpError(error.status, "invalid_request", error.reason))


def _route(request: web.Request) -> str:
    """The route's pattern: a label of bounded variety, where the path is not."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unmatched"
