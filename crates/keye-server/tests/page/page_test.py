"""Uses the page as a person would, in a real Chromium.

python page_test.py BASE_URL CLIP PICTURE [DIRECTORY_FOR_SCREENSHOTS]

Needs Python's `playwright`; the browser is the one that KEYE_TEST_CHROMIUM names. The server's model may answer anything: what
depends on the answer's text is checked with answers that a mocked stream gives to the page.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

BASE, CLIP, PICTURE = sys.argv[1].rstrip("/"), Path(sys.argv[2]), Path(sys.argv[3])
SHOTS = Path(sys.argv[4]) if len(sys.argv) > 4 else None
DROP = """([target, files]) => {
    const transfer = new DataTransfer();
    for (const [name, type, data] of files) {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        transfer.items.add(new File([bytes], name, { type }));
    }
    for (const kind of ["dragenter", "dragover", "drop"])
        document.querySelector(target).dispatchEvent(
            new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer }));
}"""
PASTE = """([name, type, data]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
    document.activeElement.dispatchEvent(new ClipboardEvent("paste", { bubbles: true, clipboardData: transfer }));
}"""
ANSWER = """Two scenes, <b>no</b> <img src=x onerror=alert(1)> markup:

| when | what |
|---|---|
| 00:01 | a **red** square |
| 1.2 to 1.8 seconds | `1.5s` is code |

1. It starts at <0.5 seconds>.
   - inner, at 0:01.5
2. At 1:02:03 nothing, the clip is shorter.

```
x = 1
```
[a link](https://example.org/) and [no link](javascript:alert(1))
"""


def encoded(path, kind):
    return [path.name, kind, base64.b64encode(path.read_bytes()).decode()]


def events(chunks):
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def mocked(answer, reasoning=""):
    """A stream with this answer, in small pieces."""
    deltas = [{"reasoning_content": reasoning}] if reasoning else []
    deltas += [{"content": answer[at : at + 7]} for at in range(0, len(answer), 7)]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return events(chunks + [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}])


class Session:
    """A page whose console stays empty and that talks to its own server only."""

    def __init__(self, browser, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=BASE)
        self.page = self.context.new_page()
        self.console, self.foreign, self.expected = [], [], []
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.console.append(m.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", self.request)
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(f"{BASE}/")
        expect(self.page.locator("#model")).not_to_be_empty()
        self.real()

    def request(self, request):
        if not request.url.startswith((f"{BASE}/", f"blob:{BASE}/", "data:")):
            self.foreign.append(request.url)

    def wait(self, expression, seconds=20):
        """Until it is true; Playwright's own way evaluates strings in the page, which its policy forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(50)

    def ask(self, question):
        self.page.locator("#question").fill(question)
        self.page.keyboard.press("Enter")

    def done(self, count):
        expect(self.page.locator(".turn .foot:not([hidden])")).to_have_count(count, timeout=60_000)

    def settings(self, **values):
        self.page.get_by_role("button", name="Settings").click()
        for name, value in values.items():
            field = self.page.locator(f"#settings [name={name}]")
            field.select_option(value) if name == "thinking" else field.fill(str(value))
        self.page.get_by_role("button", name="Done").click()

    def mock(self, body, status=200, headers=None):
        self.page.route("**/v1/chat/completions", lambda route: route.fulfill(
            status=status, body=body, headers={"content-type": "text/event-stream", **(headers or {})}))

    def real(self):
        """Answers of the server, which go on until they are cut: the model of the tests stops where it likes."""
        self.page.unroute("**/v1/chat/completions")
        more = {"ignore_eos": True, "skip_special_tokens": False}
        self.page.route("**/v1/chat/completions", lambda route: route.continue_(
            post_data=json.dumps({**json.loads(route.request.post_data), **more})))

    def shot(self, name):
        if SHOTS:
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=str(SHOTS / f"{name}.png"))

    def close(self):
        noise = [text for text in self.console if not any(known in text for known in self.expected)]
        assert not noise, noise
        assert not self.foreign, self.foreign
        self.context.close()


def a_clip_is_dropped_and_asked_about(browser):
    session = Session(browser)
    page = session.page
    policy = page.request.get(f"{BASE}/").headers
    assert "default-src 'none'" in policy["content-security-policy"]
    assert page.request.get(f"{BASE}/", headers={"if-none-match": policy["etag"]}).status == 304
    session.shot("empty-light")
    session.settings(max_tokens=150, seed=9, fps=4, temperature=1.5)
    page.evaluate(DROP, ["#stage", [encoded(CLIP, "video/mp4")]])
    expect(page.locator("#pending li")).to_contain_text(CLIP.name)
    sent = []
    page.on("request", lambda r: r.method == "POST" and sent.append(json.loads(r.post_data)))
    session.ask("What happens?")
    session.done(1)
    assert page.locator(".turn .prose").last.inner_text().strip(), "an answer"
    [request] = sent
    assert (request["max_tokens"], request["seed"]) == (150, 9)
    part = request["messages"][0]["content"][0]["video_url"]
    assert part["preprocess_kwargs"] == {"fps": 4} and part["url"].startswith("data:video/mp4;base64,")

    # The filmstrip: what the server said, with thumbnails that are not empty.
    frames = page.locator("#strip button")
    kinds = frames.evaluate_all("all => all.map((f) => f.className)")
    assert kinds.count("slow") >= 1 and kinds.count("fast") >= 1, kinds
    times = frames.evaluate_all("all => all.map((f) => Number(f.dataset.time))")
    assert times == sorted(times) and times[0] == 0, times
    legend = page.locator("#legend").inner_text()
    assert f"{kinds.count('slow')} slow" in legend and f"{kinds.count('fast')} fast" in legend, legend
    frames.last.scroll_into_view_if_needed()
    expect(page.locator("#strip canvas[data-drawn]")).to_have_count(len(kinds))
    drawn = page.locator("#strip canvas").evaluate_all(
        "all => all.map((c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v, i) => i % 4 < 3 && v > 9))")
    assert all(drawn), drawn
    frames.nth(len(times) - 1).click()
    assert abs(page.evaluate("document.querySelector('#screen video').currentTime") - times[-1]) < 0.05
    expect(frames.nth(len(times) - 1)).to_have_attribute("aria-current", "true")

    # A second turn sends the clip again and the answer to the first, and not what was thought.
    session.ask("And then?")
    session.done(2)
    roles = [message["role"] for message in sent[1]["messages"]]
    assert roles == ["user", "assistant", "user"], roles
    assert sent[1]["messages"][0] == sent[0]["messages"][0]

    # It survives a reload, media too.
    before = page.locator("#turns").inner_text()
    page.reload()
    session.done(2)
    assert page.locator("#turns").inner_text() == before
    expect(page.locator("#strip canvas[data-drawn]").first).to_be_visible()
    session.wait("document.querySelector('#screen video')?.readyState > 0")

    # Retry and edit.
    page.get_by_role("button", name="Retry the question").click()
    session.done(2)
    assert len(sent) == 3 and len(sent[2]["messages"]) == 3
    page.get_by_role("button", name="Edit the question").last.click()
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator("#question")).to_have_value("And then?")

    # The request as curl does what it did.
    page.get_by_role("button", name="Copy the request as curl").click()
    script = page.evaluate("navigator.clipboard.readText()")
    shell = subprocess.run(["bash", "-c", script], cwd=CLIP.parent, capture_output=True, text=True, timeout=120)
    answer = json.loads(shell.stdout)
    assert f"{answer['usage']['prompt_tokens']:,} tokens in" in page.locator(".figures").inner_text(), answer
    page.get_by_role("button", name="Copy the request as Python").click()
    script = page.evaluate("navigator.clipboard.readText()")
    compile(script, "copied", "exec")
    assert CLIP.name in script and "max_tokens=150" in script, script

    # A new chat forgets all of it.
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#choose")).to_be_visible()
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)
    session.close()


def times_are_links_and_markup_stays_text(browser):
    session = Session(browser)
    page = session.page
    page.evaluate(DROP, ["body", [encoded(CLIP, "video/mp4")]])
    session.wait("document.querySelector('#screen video')?.readyState > 0")
    session.mock(mocked(ANSWER, "Let me look at 0.5s."))
    session.ask("When?")
    session.done(1)
    links = page.locator(".answer > .prose a.time")
    found = links.evaluate_all("all => all.map((a) => [a.textContent, Number(a.hash.slice(3))])")
    assert found == [["00:01", 1], ["1.2", 1.2], ["1.8 seconds", 1.8], ["0.5 seconds", 0.5], ["0:01.5", 1.5]], found
    body = page.locator(".answer > .prose")
    assert body.locator("b, img, script").count() == 0
    assert "<img src=x onerror=alert(1)>" in body.inner_text()
    assert body.locator("strong").inner_text() == "red" and body.locator("td").count() == 4
    assert body.locator("ol > li > ul > li").count() == 1 and body.locator("pre").inner_text() == "x = 1"
    outer = body.locator("a:not(.time)").evaluate_all("all => all.map((a) => a.href)")
    assert outer == ["https://example.org/"], outer
    links.nth(2).click()
    session.wait("Math.abs(document.querySelector('#screen video').currentTime - 1.8) < 0.05")
    thinking = page.locator(".thinking")
    assert not thinking.evaluate("d => d.open") and "Thought" in thinking.locator("summary").inner_text()
    thinking.locator("summary").click()
    thinking.locator("a.time").click()
    session.wait("Math.abs(document.querySelector('#screen video').currentTime - 0.5) < 0.05")
    page.get_by_role("button", name="Copy the answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == ANSWER

    # Times in every form that models write, from the function itself.
    cases = {
        "at 3.2s": [3.2], "3.2 s": [3.2], "from 3 to 5 seconds": [3, 5], "2s-4s": [2, 4], "00:12": [12], "1:02:03": [3723],
        "<5.0 seconds>": [5], "00:01:02.5 - 00:01:05": [62.5, 65], "1 min 20 s": [80], "第5秒到8秒": [5, 8], "3~4秒": [3, 4],
        "16:9": [], "in 5 steps": [], "v1.2.3s": [], "12:75": [], "10 secrets": [], "1.5x": [], "5 and 6 seconds": [5, 6],
    }
    for text, wanted in cases.items():
        got = page.evaluate("""async (text) => (await import("/page/render.js")).splitTimes(text)""", text)
        assert [piece["time"] for piece in got if isinstance(piece, dict)] == wanted, (text, got)
        assert "".join(piece if isinstance(piece, str) else piece["text"] for piece in got) == text
    session.close()


def keyboard_alone(browser):
    session = Session(browser)
    page = session.page
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    expect(page.locator("#question")).to_have_value("first line\nsecond")
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "open-settings":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    expect(page.locator("#settings [name=thinking]")).to_be_focused()
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.type("20000")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "question":
            break
    page.keyboard.press("Control+a")
    page.keyboard.type("Go on without end.")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    session.wait("document.querySelector('.answer').textContent.length > 40")
    page.keyboard.press("Escape")
    session.done(1)
    assert "stopped" in page.locator(".figures").inner_text()
    expect(page.locator("#question")).to_be_focused()
    # What was typed in the settings is used again after a reload; a script in them is text.
    page.reload()
    session.done(1)
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#settings [name=max_tokens]")).to_have_value("20000")
    page.locator("#defaults").click()
    page.keyboard.press("Escape")
    # Frames are one stop of Tab, arrows move among them.
    page.evaluate(DROP, ["body", [encoded(CLIP, "video/mp4")]])
    session.settings(max_tokens=2)
    session.ask("What is it?")
    session.done(2)
    page.locator("#strip button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    chosen = page.evaluate("Number(document.activeElement.dataset.time)")
    assert chosen > 0
    session.wait(f"Math.abs(document.querySelector('#screen video').currentTime - {chosen}) < 0.05")
    session.close()


def pictures_and_several_media(browser):
    session = Session(browser)
    page = session.page
    session.settings(max_tokens=3)
    page.locator("#question").focus()
    page.evaluate(PASTE, encoded(PICTURE, "image/png"))
    expect(page.locator("#pending li")).to_have_count(1)
    page.locator("#file").set_input_files(str(CLIP))
    expect(page.locator("#pending li")).to_have_count(2)
    page.evaluate(DROP, ["body", [["notes.txt", "text/plain", base64.b64encode(b"x").decode()]]])
    expect(page.locator("#notice")).to_contain_text("neither a clip nor a picture")
    session.ask("Compare.")
    session.done(1)
    expect(page.locator("#tabs button")).to_have_count(2)
    expect(page.locator("#strip button")).not_to_have_count(0)
    page.locator("#tabs button").first.click()
    expect(page.locator("#screen img")).to_be_visible()
    expect(page.locator("#legend")).to_contain_text("pixels")
    page.locator(".chips button").nth(1).click()
    expect(page.locator("#screen video")).to_be_visible()
    session.close()


def errors_in_plain_words(browser):
    session = Session(browser)
    page = session.page
    session.expected = ["Failed to load resource", "net::ERR"]
    page.evaluate(DROP, ["body", [["bad.mp4", "video/mp4", base64.b64encode(b"not a clip at all" * 99).decode()]]])
    session.ask("What?")
    session.done(1)
    expect(page.locator(".error")).to_contain_text("bad.mp4: this is text")
    # The next question goes without what could not be read.
    session.settings(max_tokens=2)
    session.ask("Hello?")
    session.done(2)
    expect(page.locator(".turn").nth(1).locator(".error")).to_be_hidden()
    for status, words in [(429, "busy. Try again in 7"), (413, "larger"), (503, "shutting down")]:
        session.mock('{"error": {"message": "the server is shutting down"}}', status, {"retry-after": "7"})
        session.ask("Again?")
        expect(page.locator(".turn").last.locator(".error")).to_contain_text(words)
        session.real()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    session.ask("Again?")
    expect(page.locator(".turn").last.locator(".error")).to_contain_text("cannot be reached")
    session.real()
    session.mock('data: {"choices": []}\n\ndata: {"error": {"message": "no room", "type": "invalid_request_error"}}\n\n')
    session.ask("Again?")
    expect(page.locator(".turn").last.locator(".error")).to_contain_text("No room.")
    session.real()
    # A key is asked for, kept for the tab, and sent.
    def keyed(route):
        if route.request.headers.get("authorization") == "Bearer secret":
            return route.fallback()
        return route.fulfill(status=401, body='{"error": {"message": "no key", "code": "invalid_api_key"}}')
    page.route("**/v1/**", keyed)
    page.reload()
    expect(page.locator("#key")).to_be_visible()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_hidden()
    session.ask("With a key?")
    expect(page.locator(".turn").last.locator(".foot")).to_be_visible(timeout=30_000)
    expect(page.locator(".turn").last.locator(".error")).to_be_hidden()
    page.get_by_role("button", name="Copy the request as curl").last.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "secret" not in copied and "$KEYE_API_KEY" in copied
    assert page.evaluate("localStorage.getItem('keye.key')") is None
    session.close()


def looks(browser):
    """Wide and narrow, dark and light: nothing is cut off sideways."""
    for name, options in {
        "dark": {"color_scheme": "dark"},
        "light": {"color_scheme": "light"},
        "phone": {"viewport": {"width": 390, "height": 800}, "device_scale_factor": 2, "has_touch": True},
    }.items():
        session = Session(browser, **options)
        page = session.page
        session.shot(f"empty-{name}")
        session.settings(max_tokens=2, fps=2)
        page.locator("#file").set_input_files(str(CLIP))
        session.shot(f"pending-{name}")
        session.ask("List what can be seen, with times.")
        session.done(1)
        session.mock(mocked(SHOWN, "The clip has several shots. The first runs until 0.8s, then the picture changes."))
        page.get_by_role("button", name="Retry the question").click()
        session.done(1)
        page.locator("a.time").nth(1).click()
        session.shot(f"done-{name}")
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], (name, wide)
        session.close()


SHOWN = """The clip has **three** parts:

1. **0:00 to 0:00.8** a square moves across the picture.
2. **0.8s to 1.5s** the scene changes to bars.
3. From <1.5 seconds> on the bars stay where they are.

| time | seen |
|---|---|
| 0:00.5 | the square in the middle |
| 0:01.6 | bars |
"""

TESTS = [
    a_clip_is_dropped_and_asked_about, times_are_links_and_markup_stays_text, keyboard_alone, pictures_and_several_media,
    errors_in_plain_words, looks,
]

with sync_playwright() as playwright, tempfile.TemporaryDirectory() as home:
    os.environ["HOME"] = home
    browser = playwright.chromium.launch(
        executable_path=os.environ["KEYE_TEST_CHROMIUM"], args=["--no-sandbox", "--disable-gpu"])
    only = os.environ.get("KEYE_TEST_PAGE", "")
    for test in TESTS:
        if only in test.__name__:
            test(browser)
            print(f"{test.__name__}: ok")
    browser.close()
