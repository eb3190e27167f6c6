"""The files of the chat page as the server hands them out: headers, revalidation, and nothing inline or foreign."""

import re

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from millrace.server.page import CONTENT_SECURITY_POLICY, add_page_routes, load_assets


async def test_files_carry_strict_headers_and_are_revalidated() -> None:
    app = web.Application()
    add_page_routes(app)
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    async with TestClient(TestServer(app)) as client:
        for path in ("/", *(f"/assets/{name}" for name in load_assets())):
            reply = await client.get(path)
            assert reply.status == 200
            assert reply.content_type == types[path[path.rfind(".") :] if "." in path else ".html"]
            assert reply.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert reply.headers["Referrer-Policy"] == "no-referrer"
            assert reply.headers["Cache-Control"] == "no-cache"
            again = await client.get(path, headers={"If-None-Match": reply.headers["ETag"]})
            assert (again.status, await again.read()) == (304, b"")
            other = await client.get(path, headers={"If-None-Match": '"another"'})
            assert other.status == 200
        for path in ("/assets/none.js", "/assets/../page.py", "/assets/%2e%2e%2fpage.py", "/assets/page.py"):
            assert (await client.get(path)).status == 404


def test_policy_allows_nothing_inline_and_nothing_foreign() -> None:
    directives = dict(part.split(" ", 1) for part in CONTENT_SECURITY_POLICY.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert "unsafe" not in CONTENT_SECURITY_POLICY and "http" not in CONTENT_SECURITY_POLICY


def test_page_has_nothing_inline_and_names_only_its_own_files() -> None:
    assets = {name: asset.body.decode() for name, asset in load_assets().items()}
    page = assets["index.html"]
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=", page)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", page))
    named = re.findall(r'(?:src|href)="(?!#)([^"]+)"', page)
    assert len(named) >= 4 and {name.removeprefix("assets/") for name in named} <= set(assets)
    for name, text in assets.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), f"{name} names a foreign address"
