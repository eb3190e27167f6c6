"""The main job, end to end: `millrace serve` as a process, and every kind of client against it."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import pytest
from playwright.async_api import async_playwright, expect

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BROWSER = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
QUESTION = "What is the capital of France?"
MILLRACE = [sys.executable, "-m", "millrace.runtime"]


class Server:
    """A server process on a free port."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [*MILLRACE, "serve", "--port", "0", "--threads", "1"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "120"},
        )
        assert self.process.stderr is not None
        self.banner = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", self.banner)):
            line = self.process.stderr.readline()
            assert line, f"the server has ended: {self.banner}"
            self.banner += line
        self.url = found.group()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=30)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    assert made.stop() == 0


def test_the_start_prints_the_page_and_the_plan(server: Server) -> None:
    assert "KV cache" in server.banner
    assert "chat page" in server.banner


def test_openai_client_streams_sense(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="grist", messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "Paris" in text
    assert [model.id for model in client.models.list()] == ["grist"]


async def test_websocket_streams_two_at_once(server: Server) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/v1/ws") as socket:
        for name, question in (("a", QUESTION), ("b", "What is 2 plus 3?")):
            await socket.send_json(
                {"id": name, "model": "grist", "temperature": 0, "messages": [{"role": "user", "content": question}]}
            )
        texts, done = {"a": "", "b": ""}, set()
        while done != {"a", "b"}:
            frame = await socket.receive_json(timeout=30)
            if frame.get("type") == "done":
                done.add(frame["id"])
            else:
                texts[frame["id"]] += frame["choices"][0]["delta"].get("content") or ""
    assert "Paris" in texts["a"]
    assert texts["b"]


@pytest.mark.skipif(BROWSER is None, reason="THE CHAT PAGE IS NOT TESTED AGAINST THE SERVER: install chromium")
async def test_a_person_chats_in_the_browser(server: Server) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = await browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        await page.goto(server.url)
        await page.get_by_role("textbox").first.fill(QUESTION)
        await page.keyboard.press("Enter")
        await expect(page.locator("body")).to_contain_text("Paris", timeout=30_000)
        await expect(page.locator("body")).to_contain_text("tokens/s", timeout=30_000)
        assert problems == []
        await browser.close()


def test_stopping_lets_open_streams_finish() -> None:
    async def run(own: Server) -> tuple[str, int]:
        async with aiohttp.ClientSession() as session:
            body = {"model": "grist", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
            async with session.post(f"{own.url}/v1/completions", json=body) as response:
                await response.content.readline()
                own.process.send_signal(signal.SIGTERM)
                rest = (await response.content.read()).decode()
        return rest, await asyncio.to_thread(own.process.wait, 30)

    own = Server()
    rest, code = asyncio.run(run(own))
    assert rest.rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"length"' in rest
    assert code == 0


def test_commands() -> None:
    text = subprocess.run(
        [*MILLRACE, "generate", "--prompt", "Once upon", "--max-tokens", "8", "--temperature", "0", "--threads", "1"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert text.startswith(" a time")
    shown = subprocess.run([*MILLRACE, "inspect"], capture_output=True, text=True, check=True).stderr
    assert "LlamaForCausalLM" in shown
    assert re.search(r"^  matrices +b?float", shown, re.MULTILINE)
    assert re.search(r"tokens +[\d,]+ +fit into the cache", shown)
    chat = subprocess.run(
        [*MILLRACE, "chat", "--temperature", "0"], input=f"{QUESTION}\n", capture_output=True, text=True, check=True
    ).stdout
    assert "Paris" in chat
    wrong = subprocess.run([*MILLRACE, "serve", "--port", "99999"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "server.port is 99999" in wrong.stderr


def test_the_ten_lines_of_the_readme(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text("utf-8")
    program = re.search(r"```python\n(import asyncio.*?)```", readme, re.DOTALL)
    assert program, "the README shows no program"
    out = subprocess.run(
        [sys.executable, "-c", program.group(1)], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "Paris" in out


def test_the_wheel_is_whole_and_nothing_in_it_is_bare(tmp_path: Path) -> None:
    import zipfile

    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("millrace-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"millrace"}
    packed = {name.removeprefix("millrace/") for name in names}
    for folder in ("runtime", "actors", "kernels", "server"):
        for path in (root / folder).rglob("*"):
            relative = path.relative_to(root).as_posix()
            if path.is_file() and "__pycache__" not in relative:
                assert relative in packed, f"{relative} is not in the wheel"
