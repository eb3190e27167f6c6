"""Reading a request body and decoding its JSON, with every bound checked before the work that it bounds."""

import asyncio
import re
from typing import TypeVar

import msgspec
import numpy as np
from aiohttp import web

from millrace.runtime.config import Limits
from millrace.server.errors import BadRequest, HttpError

T = TypeVar("T")

_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_PATH = re.compile(r"^(?P<what>.*?) - at `(?:key` in `)?\$\.?(?P<path>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `([^`]*)`$")
_STEPS = bytes.maketrans(b'"[]{}', b"\x00\x01\xff\x01\xff")


async def read_body(request: web.Request, limits: Limits) -> bytes:
    """The whole body, at most `max_body_bytes` of it, within `body_timeout_s`.

    Raises HttpError 400 (broken framing), 408 (too slow), 413 (too large) or 415 (encoded).
    """
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise HttpError(
            415,
            "unsupported_encoding",
            "Content-Encoding is not accepted on requests; send the JSON body as it is",
            close=True,
        )
    if request.content_length is not None and request.content_length > limits.max_body_bytes:
        raise _too_large(request.content_length, limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise _too_large(len(body), limits)
    except TimeoutError:
        raise HttpError(
            408,
            "body_timeout",
            f"the request body did not arrive within {limits.body_timeout_s:g} s; {len(body)} bytes had come",
            close=True,
        ) from None
    except web.RequestPayloadError:
        raise HttpError(400, "invalid_body", "the framing of the request body is broken", close=True) from None
    return bytes(body)


def _too_large(size: int, limits: Limits) -> HttpError:
    return HttpError(
        413,
        "body_too_large",
        f"the request body has {size} bytes or more, but this server takes at most {limits.max_body_bytes}",
        close=True,
    )


def json_depth(body: bytes) -> int:
    """How deep arrays and objects nest, in linear time and without recursion. Meaningful for valid JSON only."""
    structure = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
    if not structure:
        return 0
    steps = np.frombuffer(structure.translate(_STEPS), dtype=np.int8)  # [num_symbols] +1 opens, -1 closes, 0 a quote
    # An odd number of quotes up to a symbol: it stands within a string. Eight bits are enough for a parity.
    within = np.cumsum(steps == 0, dtype=np.uint8) & 1  # [num_symbols]
    return max(0, int(np.cumsum(steps * (1 - within).astype(np.int8), dtype=np.int32).max()))


def check_depth(body: bytes, limits: Limits) -> None:
    """Raises BadRequest for JSON that nests deeper than `max_json_depth`."""
    if body.count(b"[") + body.count(b"{") <= limits.max_json_depth:
        return  # too few brackets to nest so deep: the common case costs two scans
    depth = json_depth(body)
    if depth > limits.max_json_depth:
        raise BadRequest(
            f"the JSON body nests {depth} levels deep, but this server takes at most {limits.max_json_depth}",
            code="invalid_json",
        )


def decode(body: bytes | msgspec.Raw, kind: type[T], path: str = "") -> T:
    """Decodes JSON into a type. Raises BadRequest that names the field; `path` stands before names within the body."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        found = _PATH.match(str(error))
        what, inner = (found["what"], found["path"]) if found else (str(error), "")
        if missing := _MISSING.match(what):
            what, inner = "this field is required", f"{inner}.{missing[1]}".lstrip(".")
        param = f"{path}{inner}" if inner.startswith("[") or not path else f"{path}.{inner}".rstrip(".")
        raise BadRequest(f"{param}: {what}" if param else f"the body: {what}", param or None) from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except UnicodeError:
        raise BadRequest("the body is not valid UTF-8", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("the JSON body nests too deep", code="invalid_json") from None
