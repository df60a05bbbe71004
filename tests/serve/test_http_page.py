"""The page in a headless Chromium: streaming, rewinding, forking and pausing, without the network."""

import re
import shutil
import subprocess
from importlib import resources

import pytest

from hgrn2.serve.http.options import ServerOptions
from tests.serve.http_server import EndlessTokenizer, running

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_the_page_needs_no_other_server():
    text = resources.files("hgrn2.serve.http").joinpath("page.html").read_text("utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|url\(|innerHTML|eval\(|document\.write", text)
    with running() as server:
        status, headers, body = server.send("GET", "/")
    assert (status, body.decode()) == (200, text)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_shows_the_model(tmp_path):
    options = ServerOptions(name="a-model")
    with running(options=options) as server:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=3000", "--dump-dom", server.url,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert '<h1 id="model">a-model</h1>' in done.stdout, done.stderr
    assert "2.0 KiB" in done.stdout


@pytest.fixture
def page():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = browser.new_page(viewport={"width": 1200, "height": 760})
        yield found
        browser.close()


@pytest.mark.slow
def test_a_text_is_written_rewound_forked_and_paused(page, tmp_path):
    trouble, asked = [], []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    points = page.locator("#points li")

    def write(prompt, count):
        page.fill("#prompt", prompt)
        page.click("#write")
        done(count)

    def done(count):
        page.wait_for_selector(f"#points li:nth-child({count}) button:not([disabled])", timeout=30_000)
        assert points.count() == count

    def current():
        return page.locator("#points li[aria-current]").inner_text()

    options = ServerOptions(name="a-model", session_folder=tmp_path, max_tokens=100_000)
    with running(tokenizer=EndlessTokenizer(), options=options) as server:
        page.goto(server.url)
        page.wait_for_selector("text=a-model")
        page.fill("#max_tokens", "40")
        # without a prompt there is nothing to continue
        page.click("#write")
        page.wait_for_selector("#error:not(:empty)")
        assert "empty" in page.inner_text("#error")
        trouble.clear()
        write("<b>def</b> f(", 1)
        first = page.inner_text("#text")
        # text is shown as it is, and control characters are not obeyed
        assert first.startswith("<b>def</b> f(")
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", first)
        assert re.fullmatch(r"\d+ tokens/s", page.inner_text("#speed"))
        assert "2.0 KiB" in page.inner_text("#state")
        assert page.inner_text("#length") == "54 tokens"
        write(" and", 2)
        assert page.inner_text("#text").startswith(first + " and")
        assert page.inner_text("#length") == "98 tokens"
        points.nth(0).get_by_role("button", name="Rewind").click()
        assert page.inner_text("#text") == first
        assert current().startswith("1 ")
        points.nth(0).get_by_role("button", name="Fork").click()
        done(3)
        assert current().startswith("3 from 1")
        assert page.inner_text("#text").startswith(first)
        # a text without an end is stopped, and its state kept
        page.fill("#max_tokens", "100000")
        page.fill("#prompt", "!")
        page.click("#write")
        page.wait_for_selector("#text .new:not(:empty)")
        page.screenshot(path=tmp_path / "running.png")
        page.click("#stop")
        done(4)
        assert current().startswith("4 from 3")
        page.fill("#max_tokens", "5")
        write("", 5)
        assert current().startswith("5 from 4")
        points.nth(4).get_by_role("button", name="Save").click()
        points.nth(4).get_by_role("button", name="Saved").wait_for()
        assert len(list(tmp_path.glob("session-*.safetensors"))) == 1
        page.screenshot(path=tmp_path / "page.png")
        assert not page.inner_text("#error")
    assert not trouble
    assert asked
    assert all(url.startswith((server.url, "data:")) for url in asked)
