"""The chat page in headless Chromium. Over 500 lines, because the scripted server stands with the tests that script it.

The page is served by an application of the test's own. Its chat route is scripted: a test takes the request that the
page sent as an `Exchange` and says piece by piece what comes back, so nothing here waits for a clock.
"""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Browser, Locator, Page, async_playwright, expect

from millrace.server.page import add_page_routes

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LAUNCH_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 20_000
MODEL = "grist-tiny"


# ---- The scripted server ---------------------------------------------------------------------------------------------


@dataclass
class Exchange:
    """One chat request of the page, and what the test lets the server answer."""

    request: web.Request
    body: dict[str, Any]
    actions: "asyncio.Queue[Callable[[], Awaitable[bool]]]" = field(default_factory=asyncio.Queue)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    response: web.StreamResponse | None = None

    async def handle(self) -> web.StreamResponse:
        try:
            while await (await self.actions.get())():
                pass
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        assert self.response is not None
        return self.response

    def refuse(self, status: int, message: str) -> None:
        async def act() -> bool:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            self.response = web.json_response({"error": error}, status=status)
            return False

        self.actions.put_nowait(act)

    def raw(self, data: bytes) -> None:
        async def act() -> bool:
            if self.response is None:
                self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await self.response.prepare(self.request)
            await self.response.write(data)
            return True

        self.actions.put_nowait(act)

    def event(self, data: dict[str, Any]) -> None:
        self.raw(b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        self.event({**head, "choices": [choice], "usage": None})

    def text(self, *pieces: str) -> None:
        for piece in pieces:
            self.chunk({"content": piece})

    def end(self, tokens: int, finish_reason: str = "stop") -> None:
        self.chunk({}, finish_reason)
        usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
        self.event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": usage})
        self.raw(b"data: [DONE]\n\n")
        self.close()

    def close(self) -> None:
        async def act() -> bool:
            return False

        self.actions.put_nowait(act)

    def drop(self) -> None:
        async def act() -> bool:
            assert self.request.transport is not None
            self.request.transport.abort()
            return False

        self.actions.put_nowait(act)


class FakeServer:
    """The routes that the page uses, on a port of their own."""

    def __init__(self) -> None:
        self.exchanges: asyncio.Queue[Exchange] = asyncio.Queue()
        self.models: list[dict[str, Any]] = [{"id": MODEL, "object": "model", "created": 1, "owned_by": "millrace"}]
        self.api_key: str | None = None
        self.health_status = 200
        app = web.Application()
        add_page_routes(app)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_post("/v1/chat/completions", self.chat)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        self.url = ""

    async def start(self) -> None:
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        host, port = self.runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/"

    async def next(self) -> Exchange:
        """The next chat request of the page, its stream opened by nothing yet."""
        return await asyncio.wait_for(self.exchanges.get(), TIMEOUT_MS / 1000)

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=self.health_status)

    async def list_models(self, request: web.Request) -> web.Response:
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "Send an API key."}}, status=401)
        return web.json_response({"object": "list", "data": self.models})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        exchange = Exchange(request, await request.json())
        self.exchanges.put_nowait(exchange)
        return await exchange.handle()


# ---- In a browser ----------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"THE CHAT PAGE IS NOT TESTED: none of {', '.join(BROWSERS)} is on the PATH; install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found, args=LAUNCH_ARGUMENTS)
        expect.set_options(timeout=TIMEOUT_MS)
        yield browser
        await browser.close()


class Chat:
    """The page as a person sees it, beside the server that it talks to."""

    def __init__(self, browser: Browser, fake: FakeServer) -> None:
        self.browser = browser
        self.fake = fake
        self.problems: list[str] = []
        self.page: Page
        self.failing_requests = False  # set by a test that makes requests fail: the browser logs each of them

    async def open(self, ready: str | None = MODEL, **options: Any) -> Page:
        context = await self.browser.new_context(**options)
        context.set_default_timeout(TIMEOUT_MS)
        self.page = await context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        await self.page.goto(self.fake.url)
        if ready is not None:
            await expect(self.page.locator("#model-name")).to_have_text(ready)
        return self.page

    async def ask(self, prompt: str) -> Exchange:
        await self.page.get_by_label("Message", exact=True).fill(prompt)
        await self.page.keyboard.press("Enter")
        return await self.fake.next()

    @property
    def answer(self) -> Locator:
        return self.page.locator(".answer > .text").last

    @property
    def stats(self) -> Locator:
        return self.page.locator(".stats").last

    @property
    def error(self) -> Locator:
        return self.page.locator(".error .message").last

    async def idle(self) -> None:
        await expect(self.page.get_by_role("button", name="Send")).to_be_visible()
        await expect(self.page.locator(".streaming")).to_have_count(0)


@pytest_asyncio.fixture(loop_scope="module")
async def chat(browser: Browser) -> AsyncIterator[Chat]:
    fake = FakeServer()
    await fake.start()
    chat = Chat(browser, fake)
    yield chat
    for context in browser.contexts:
        await context.close()
    await fake.runner.cleanup()
    noise = "Failed to load resource" if chat.failing_requests else "\0"
    assert [problem for problem in chat.problems if noise not in problem] == []


async def test_answer_streams_in_and_the_quiet_line_measures_it(chat: Chat) -> None:
    page = await chat.open()
    await page.clock.install()
    await expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    await page.get_by_role("button", name="How do I make tea?").click()
    exchange = await chat.fake.next()
    assert exchange.body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "How do I make tea?"}],
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert exchange.request.headers["Origin"] + "/" == chat.fake.url  # by which the server knows its own page
    await expect(page.get_by_role("heading", name="What would you like to know?")).to_be_hidden()
    await page.clock.fast_forward(3000)
    exchange.chunk({"role": "assistant", "content": ""})
    exchange.text("Boil", " water.")
    await expect(chat.answer).to_have_text("Boil water.")
    await expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    await expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    await page.clock.fast_forward(2000)
    exchange.text("\n\n  Wait.")
    exchange.end(11, "length")
    await chat.idle()
    assert await chat.answer.inner_text() == "Boil water.\n\n  Wait."
    await expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
    await expect(page.get_by_role("log")).to_have_attribute("aria-live", "polite")
    tokens, rate, first, reason = await chat.stats.locator("span").all_inner_texts()
    assert (tokens, reason) == ("11 tokens", "reached the maximum length")
    assert 0 < float(rate.removesuffix(" tokens/s")) <= 10 / 2  # 10 tokens after the first one, in 2 s or more
    assert float(first.removesuffix(" s to first token")) >= 3


async def test_rate_of_an_answer_that_came_all_at_once_is_over_the_whole_time(chat: Chat) -> None:
    page = await chat.open()
    await page.clock.install()
    exchange = await chat.ask("What is the capital of France?")
    await page.clock.fast_forward(2000)
    exchange.text("The capital of France is Paris.")
    exchange.end(8)
    await chat.idle()
    tokens, rate, _ = await chat.stats.locator("span").all_inner_texts()
    assert tokens == "8 tokens"
    assert 0 < float(rate.removesuffix(" tokens/s")) <= 8 / 2


async def test_history_is_sent_and_html_stays_text(chat: Chat) -> None:
    page = await chat.open()
    html = "<img src=x onerror=alert(1)><b>bold</b> & <script>alert(2)</script>"
    exchange = await chat.ask(html)
    exchange.chunk({"reasoning_content": "<i>hm</i>"})
    exchange.text(html[:7], html[7:])
    exchange.end(5)
    await chat.idle()
    await expect(chat.answer).to_have_text(html)
    await expect(page.locator(".prompt .text")).to_have_text(html)
    await expect(page.locator(".reasoning .text")).to_have_text("<i>hm</i>")
    assert await page.locator(".turn :is(img, b, i, script)").count() == 0
    exchange = await chat.ask("next")
    assert exchange.body["messages"] == [
        {"role": "user", "content": html},
        {"role": "assistant", "content": html},
        {"role": "user", "content": "next"},
    ]
    chat.failing_requests = True
    exchange.refuse(400, html)
    await expect(chat.error).to_have_text(html)
    assert await page.locator(".turn :is(img, b, i, script)").count() == 0


@pytest.mark.parametrize("way", ["button", "Escape", "new chat"])
async def test_stop_cancels_the_request_on_the_server(chat: Chat, way: str) -> None:
    page = await chat.open()
    exchange = await chat.ask("count")
    exchange.text("one two")
    await expect(chat.answer).to_have_text("one two")
    if way == "Escape":
        await page.keyboard.press("Escape")
    else:
        await page.get_by_role("button", name="Stop" if way == "button" else "New chat").click()
    await asyncio.wait_for(exchange.cancelled.wait(), TIMEOUT_MS / 1000)
    await chat.idle()
    if way == "new chat":
        await expect(page.locator(".turn")).to_have_count(0)
        await expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    else:
        await expect(chat.answer).to_have_text("one two")
        await expect(chat.stats).to_contain_text("stopped")
    kept = ["count", "one two"] if way != "new chat" else []
    exchange = await chat.ask("on")
    assert [message["content"] for message in exchange.body["messages"]] == [*kept, "on"]


async def test_settings_are_sent_and_remembered(chat: Chat) -> None:
    page = await chat.open()
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("Temperature").fill("1.25")
    await page.get_by_label("Maximum length in tokens").fill("0")
    await page.get_by_role("button", name="Done").click()
    await expect(page.get_by_role("dialog")).to_be_visible()  # the browser says that 0 is no length; the dialog stays
    await page.get_by_label("Maximum length in tokens").fill("33")
    await page.get_by_label("System prompt").fill("Be brief.")
    await page.get_by_role("button", name="Done").click()
    await expect(page.get_by_role("dialog")).to_be_hidden()
    for _ in range(2):
        exchange = await chat.ask("hello")
        assert exchange.body["temperature"] == 1.25
        assert exchange.body["max_tokens"] == 33
        assert exchange.body["messages"][0] == {"role": "system", "content": "Be brief."}
        exchange.end(0)
        await chat.idle()
        await page.reload()
    await page.get_by_role("button", name="Settings").click()
    await expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    await page.get_by_role("button", name="Reset").click()
    await page.keyboard.press("Escape")
    exchange = await chat.ask("hello")
    assert exchange.body["temperature"] == 0.5 and "max_tokens" not in exchange.body
    assert len(exchange.body["messages"]) == 1


async def test_model_is_chosen_among_several(chat: Chat) -> None:
    chat.fake.models.append({"id": "other/model", "object": "model", "created": 1, "owned_by": "millrace"})
    page = await chat.open(ready=None)
    await page.get_by_label("Model", exact=True).select_option("other/model")
    await page.reload()
    await expect(page.get_by_label("Model", exact=True)).to_have_value("other/model")
    assert (await chat.ask("hello")).body["model"] == "other/model"


async def test_api_key_is_asked_for(chat: Chat) -> None:
    chat.fake.api_key = "secret"
    chat.failing_requests = True
    page = await chat.open(ready="API key needed")
    await page.get_by_role("button", name="What is 7 plus 5?").click()
    await expect(chat.error).to_have_text("Send an API key.")
    await page.get_by_role("button", name="Enter an API key").click()
    await page.keyboard.type("secret")
    await page.keyboard.press("Enter")
    await expect(page.locator("#model-name")).to_have_text(MODEL)
    await page.get_by_role("button", name="Try again").click()
    exchange = await chat.fake.next()
    assert exchange.request.headers["Authorization"] == "Bearer secret"
    assert await page.evaluate("JSON.stringify(localStorage).includes('secret')") is False


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ("refused", "The queue is full: 8 of 8 places are taken."),
        ("error event", "The executor failed."),
        ("dropped", "The connection to the server was lost before the answer was complete."),
        ("cut off", "The server ended the stream before the answer was complete."),
        ("not JSON", "The server sent a piece that is not JSON: oops"),
    ],
)
async def test_fault_is_shown_and_can_be_tried_again(chat: Chat, fault: str, shown: str) -> None:
    chat.failing_requests = True
    page = await chat.open()
    exchange = await chat.ask("hello")
    if fault == "refused":
        exchange.refuse(429, shown)
    else:
        exchange.text("Good ")
        await expect(chat.answer).to_have_text("Good ")
        if fault == "error event":
            exchange.event({"error": {"message": shown, "type": "server_error", "param": None, "code": None}})
        elif fault == "not JSON":
            exchange.raw(b"data: oops\n\n")
        exchange.drop() if fault == "dropped" else exchange.close()
    await expect(chat.error).to_have_text(shown)
    await expect(chat.answer).to_have_text("" if fault == "refused" else "Good ")
    await page.get_by_role("button", name="Try again").click()
    exchange = await chat.fake.next()
    assert exchange.body["messages"] == [{"role": "user", "content": "hello"}]
    exchange.text("Good day.")
    exchange.end(3)
    await chat.idle()
    await expect(chat.answer).to_have_text("Good day.")
    await expect(chat.error).to_be_hidden()


async def test_server_that_is_gone_is_said(chat: Chat) -> None:
    chat.failing_requests = True
    page = await chat.open()
    await chat.fake.runner.cleanup()
    await page.get_by_role("button", name="What is 7 plus 5?").click()
    await expect(chat.error).to_contain_text("The server cannot be reached")
    await expect(page.locator("#dot")).to_have_attribute("data-state", "offline")


async def test_server_that_is_starting_is_waited_for(chat: Chat) -> None:
    chat.failing_requests = True
    chat.fake.health_status = 503
    page = await chat.open(ready="Starting…")
    await expect(page.get_by_role("status")).to_have_text("The server is starting")
    chat.fake.health_status = 200
    await expect(page.locator("#model-name")).to_have_text(MODEL)
    await expect(page.get_by_role("status")).to_have_text("The server is ready")


async def test_bytes_may_be_cut_anywhere_on_the_way(chat: Chat) -> None:
    await chat.open()
    exchange = await chat.ask("hello")
    chunk = '{"choices":[{"index":0,"delta":{"content":"é水🐟 "},"finish_reason":null}]}'
    for byte in f": ping\r\n\r\ndata:{chunk}\r\n\r\ndata: {chunk}\n\n".encode():
        exchange.raw(bytes([byte]))
    exchange.end(2)
    await chat.idle()
    assert await chat.answer.text_content() == "é水🐟 é水🐟 "


async def test_parser_gives_the_same_events_for_every_split(chat: Chat) -> None:
    page = await chat.open()
    stream = (
        "\ufeff: comment\n\ndata: a水🐟\n\ndata:b\r\n\r\nevent: x\rdata: c\r\r"
        "data: d1\ndata\ndata: d: 3\nid: 1\n\n\n: ping\n\ndatax: no\n\ndata:  e\r\ndata: f\r\n\r\ndata: cut off"
    )
    result = await page.evaluate(
        """async (text) => {
          const { createSseParser } = await import("/assets/sse.js");
          const bytes = new TextEncoder().encode(text);
          const parse = (cuts) => {
            const parser = createSseParser(), events = [];
            let start = 0;
            for (const cut of [...cuts, bytes.length]) {
              events.push(...parser.push(bytes.slice(start, cut)));
              start = cut;
            }
            return JSON.stringify(events);
          };
          const seen = new Set([parse([...bytes.keys()])]);
          for (let i = 0; i <= bytes.length; i++) for (let j = i; j <= bytes.length; j++) seen.add(parse([i, j]));
          return [...seen];
        }""",
        stream,
    )
    assert [json.loads(events) for events in result] == [["a水🐟", "b", "c", "d1\n\nd: 3", " e\nf"]]


async def test_keyboard_alone_is_enough(chat: Chat) -> None:
    page = await chat.open()
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    height = await page.locator("#input").evaluate("e => e.clientHeight")
    await page.keyboard.type("one")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("two")
    assert await page.locator("#input").evaluate("e => e.clientHeight") > height
    await page.keyboard.press("Enter")
    exchange = await chat.fake.next()
    assert exchange.body["messages"][0]["content"] == "one\ntwo"
    await page.keyboard.type("early")
    await page.keyboard.press("Enter")  # nothing is sent while an answer is written, and nothing typed is lost
    exchange.end(0)
    await chat.idle()
    assert chat.fake.exchanges.empty()
    await expect(page.locator("#input")).to_have_value("early")
    for name in ("Dark theme", "New chat"):
        button = page.get_by_role("button", name=name)
        for _ in range(8):  # backwards from the field past the buttons of the answer and of the header
            await page.keyboard.press("Shift+Tab")
            if await button.evaluate("e => e === document.activeElement"):
                break
        assert await button.evaluate("e => e.matches(':focus') && getComputedStyle(e).outlineStyle") == "solid"
        await page.keyboard.press("Enter")
    await expect(page.locator(".turn")).to_have_count(0)


async def test_follows_the_end_until_the_reader_scrolls_up(chat: Chat) -> None:
    page = await chat.open(viewport={"width": 800, "height": 500})
    exchange = await chat.ask("count")
    scroller = page.locator("#scroller")
    rest = "e => e.scrollHeight - e.clientHeight - e.scrollTop"
    exchange.text("".join(f"line {i}\n" for i in range(60)), "first part")
    await expect(chat.answer).to_contain_text("first part")
    assert await scroller.evaluate(rest) < 2
    await page.mouse.move(400, 200)
    await page.mouse.wheel(0, -300)
    to_end = page.get_by_role("button", name="To the end")
    await expect(to_end).to_be_visible()
    top = await scroller.evaluate("e => e.scrollTop")
    exchange.text("\nmore\n" * 10, "second part")
    await expect(chat.answer).to_contain_text("second part")
    assert await scroller.evaluate("e => e.scrollTop") == top
    await to_end.click()
    await expect(to_end).to_be_hidden()
    exchange.text("\nmore\n" * 10, "third part")
    await expect(chat.answer).to_contain_text("third part")
    assert await scroller.evaluate(rest) < 2


async def test_answer_is_copied_and_asked_for_again(chat: Chat) -> None:
    page = await chat.open(permissions=["clipboard-read", "clipboard-write"])
    exchange = await chat.ask("hello")
    exchange.text("Good\n  day.")
    exchange.end(3)
    await chat.idle()
    await page.get_by_role("button", name="Copy answer").click()
    await expect(page.get_by_title("Copied")).to_be_visible()
    assert await page.evaluate("navigator.clipboard.readText()") == "Good\n  day."
    await page.get_by_role("button", name="Answer again").click()
    exchange = await chat.fake.next()
    assert exchange.body["messages"] == [{"role": "user", "content": "hello"}]
    await expect(chat.answer).to_have_text("")


# Of each visible text: the contrast with what is behind it, by the formula of WCAG 2.2 section 1.4.3.
CONTRASTS = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    const color = rgb(getComputedStyle(e).backgroundColor);
    return color[3] === 0 ? behind(e.parentElement) : color;
  };
  const scope = document.querySelector("dialog[open]") ?? document.body;
  return [...scope.querySelectorAll("*")]
    .filter((e) => e.checkVisibility() && !e.disabled && !e.closest("svg"))
    .filter((e) => e.placeholder || [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .map((e) => {
      const color = getComputedStyle(e, e.placeholder ? "::placeholder" : null).color;
      const [low, high] = [luminance(rgb(color)), luminance(behind(e))].sort((a, b) => a - b);
      return [e.outerHTML.slice(0, 80), (high + 0.05) / (low + 0.05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_theme_follows_the_system_until_chosen_and_is_readable(chat: Chat, scheme: Any) -> None:
    page = await chat.open(color_scheme=scheme, reduced_motion="reduce")
    dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((v) => v < 64)"
    assert await page.evaluate(dark) is (scheme == "dark")
    seen = await page.evaluate(CONTRASTS)
    exchange = await chat.ask("hello")
    exchange.text("Good")
    await expect(chat.answer).to_have_text("Good")
    assert await chat.answer.evaluate("e => getComputedStyle(e, '::after').animationName") == "none"
    exchange.event({"error": {"message": "The executor failed."}})
    exchange.close()
    await expect(chat.error).to_be_visible()
    seen += await page.evaluate(CONTRASTS)
    await page.get_by_role("button", name="Settings").click()
    seen += await page.evaluate(CONTRASTS)
    assert len(seen) > 30 and [pair for pair in seen if pair[1] < 4.5] == []
    await page.keyboard.press("Escape")
    toggle = page.get_by_role("button", name="Dark theme")
    for changed in (True, False):
        await toggle.click()
        is_dark = (scheme == "dark") is not changed
        for _ in range(2):
            await expect(toggle).to_have_attribute("aria-pressed", "true" if is_dark else "false")
            assert await page.evaluate(dark) is is_dark
            await page.reload()


async def test_narrow_phone_has_no_sideways_scroll(chat: Chat) -> None:
    chat.fake.models[0]["id"] = "a-model-with-a-very-long-name/of-many-billion-parameters"
    page = await chat.open(ready=None, viewport={"width": 320, "height": 600})
    await expect(page.locator("#model-name")).to_have_text(chat.fake.models[0]["id"])
    exchange = await chat.ask("w" * 200)
    exchange.text("v" * 300)
    exchange.end(1)
    await chat.idle()
    wide = "() => [...document.querySelectorAll('body, main, .log, .top')].map((e) => e.scrollWidth - e.clientWidth)"
    assert await page.evaluate(wide) == [0, 0, 0, 0]
    await expect(page.get_by_role("button", name="Settings")).to_be_in_viewport(ratio=1)
    await expect(page.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)
