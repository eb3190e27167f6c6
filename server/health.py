"""GET /livez, /readyz, /health, /metrics and /v1/models."""

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from millrace.runtime.errors import ModelNotFoundError
from millrace.server.context import CONTEXT, Context
from millrace.server.errors import RETRY_AFTER_S


def _json(body: object, status: int = 200) -> web.Response:
    headers = {"Retry-After": str(RETRY_AFTER_S[503])} if status == 503 else {}
    headers["Cache-Control"] = "no-store"
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json", headers=headers)


async def livez(request: web.Request) -> web.Response:
    """The process answers: nothing is said about the engine, whose failure a restart of the engine cures."""
    return _json({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Requests would be served now: the engine is up, and it makes progress on what it has."""
    health = request.app[CONTEXT].runtime.health()
    if health.state == "ready" and health.progressing:
        return _json({"status": "ready"})
    return _json({"status": "not ready", "state": health.state, "reason": health.reason}, 503)


async def health(request: web.Request) -> web.Response:
    """The same verdict as /readyz, with the figures behind it."""
    context = request.app[CONTEXT]
    state = context.runtime.health()
    ready = state.state == "ready" and state.progressing
    body = {
        "status": "ok" if ready else "unavailable",
        "state": state.state,
        "progressing": state.progressing,
        "reason": state.reason,
        "running": state.running,
        "waiting": state.waiting,
        "seconds_since_progress": round(state.seconds_since_progress, 3),
        "model": context.runtime.model_name,
    }
    return _json(body, 200 if ready else 503)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text: the runtime's metrics, then the server's own."""
    context = request.app[CONTEXT]
    body = generate_latest(context.runtime.registry) + generate_latest(context.metrics.registry)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _model(context: Context) -> dict[str, object]:
    runtime = context.runtime
    return {
        "id": runtime.model_name,
        "object": "model",
        "created": runtime.created,
        "owned_by": "millrace",
        "root": runtime.model_name,
        "parent": None,
        "max_model_len": runtime.max_model_len,
        "permission": [],
    }


async def list_models(request: web.Request) -> web.Response:
    return _json({"object": "list", "data": [_model(request.app[CONTEXT])]})


async def get_model(request: web.Request) -> web.Response:
    """One model; its id may hold slashes."""
    context = request.app[CONTEXT]
    name = request.match_info["id"]
    if name != context.runtime.model_name:
        raise ModelNotFoundError(
            f"there is no model {name[:128]!r} here; this server has {context.runtime.model_name!r}", param="model"
        )
    return _json(_model(context))
