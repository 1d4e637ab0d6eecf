"""The report in a real browser: at two widths, light, dark and on paper.

No console error, no network and no sideways scrolling.

Chromium is spoken to over its debugging pipe (JSON messages ended by NUL on file descriptors 3 and
4), so that nothing but the browser is needed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
from report_samples import make_codes, make_evidence, make_report

from mnemonic_jax.report import render

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
  CHROMIUM is None, reason=f"no Chromium on the PATH (looked for {', '.join(NAMES)})"
)

FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--disable-dev-shm-usage",
  "--no-first-run",
  "--hide-scrollbars",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--disable-extensions",
  "--remote-debugging-pipe",
]
WIDTHS = (360, 1200)
DEADLINE = 600.0  # which only a browser that hangs reaches


class Browser:
  """One headless Chromium with one page."""

  def __init__(self, profile: str):
    (child_in, ours_out), (ours_in, child_out) = os.pipe(), os.pipe()
    # Descriptors above 9 first, so that making 3 and 4 out of them cannot overwrite either.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (child_in, child_out)]
    script = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
    self.process = subprocess.Popen(
      [
        "bash",
        "-c",
        script,
        "bash",
        str(CHROMIUM),
        *FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
      ],
      pass_fds=ends,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )
    for end in (child_in, child_out, *ends):
      os.close(end)
    self.out, self.into = ours_out, ours_in
    self.buffer, self.serial, self.events, self.session = b"", 0, [], None
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")
    self.call("Page.setLifecycleEventsEnabled", enabled=True)

  def close(self) -> None:
    """End the browser and its helpers, which share its process group."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    os.close(self.out)
    os.close(self.into)

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """Send one command and return its result; what arrives meanwhile is kept in `events`."""
    self.serial += 1
    message = {"id": self.serial, "method": method, "params": params}
    if self.session:
      message["sessionId"] = self.session
    os.write(self.out, json.dumps(message).encode() + b"\0")
    while (answer := self._read()).get("id") != self.serial:
      self.events.append(answer)
    assert "error" not in answer, (method, answer)
    return answer["result"]

  def open(self, address: str) -> None:
    """Go to a page and wait until this load has ended; `events` then holds what happened since."""
    self.events.clear()
    loader = self.call("Page.navigate", url=address)["loaderId"]
    while not any(_ends_load(event, loader) for event in self.events):
      self.events.append(self._read())

  def evaluate(self, expression: str) -> Any:
    """Return the value of a JavaScript expression in the page."""
    return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get(
      "value"
    )

  def _read(self) -> dict[str, Any]:
    end = time.monotonic() + DEADLINE
    while b"\0" not in self.buffer:
      ready, _, _ = select.select([self.into], [], [], max(0.0, end - time.monotonic()))
      data = os.read(self.into, 1 << 20) if ready else b""
      if not data:
        raise AssertionError(f"Chromium did not answer within {DEADLINE:.0f} s, or ended.")
      self.buffer += data
    message, self.buffer = self.buffer.split(b"\0", 1)
    return json.loads(message)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    running = Browser(profile)
    try:
      yield running
    finally:
      running.close()


def faults(browser: Browser, path: pathlib.Path, width: int, scheme: str = "light") -> list[str]:
  """Load a page and list its faults: console and page errors, requests, horizontal overflow."""
  size = {"width": width, "height": 900, "screenWidth": width, "screenHeight": 900}
  browser.call(
    "Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=width < 500
  )
  media = [{"name": "prefers-color-scheme", "value": scheme}]
  browser.call("Emulation.setEmulatedMedia", media="", features=media)
  address = path.resolve().as_uri()
  browser.open(address)
  overflow = browser.evaluate("document.documentElement.scrollWidth - screen.width")
  found = [text for event in browser.events if (text := _fault(event, address))]
  return found + (
    [f"overflow: {overflow} px wider than the window of {width} px"] if overflow > 0 else []
  )


def _ends_load(event: dict[str, Any], loader: str) -> bool:
  params = event.get("params", {})
  return event.get("method") == "Page.lifecycleEvent" and (params["loaderId"], params["name"]) == (
    loader,
    "load",
  )


def _fault(event: dict[str, Any], address: str) -> str:
  method, params = event.get("method"), event.get("params", {})
  if method == "Runtime.exceptionThrown":
    return f"page error: {params['exceptionDetails']}"
  if method == "Runtime.consoleAPICalled":
    return f"console: {params['type']} {params['args']}"
  if method == "Log.entryAdded":
    return f"log: {params['entry']}"
  if method == "Network.requestWillBeSent":
    url = params["request"]["url"]
    return "" if url == address or url.startswith("data:") else f"request: {url}"
  return ""


def write(folder: pathlib.Path, html: str) -> pathlib.Path:
  path = folder / "report.html"
  path.write_text(html, encoding="utf-8")
  return path


PAGES = {
  "ten classes": lambda: render(
    make_report(10, [0]), make_evidence(10, [0]), make_codes(10, (8, 8, 1))
  ),
  "two classes": lambda: render(
    make_report(2, [1]), make_evidence(2, [1]), make_codes(2, (32, 32, 3))
  ),
  "thirty classes": lambda: render(
    make_report(30, [3, 7]), make_evidence(30, [3, 7]), make_codes(30, (5,))
  ),
  "a hundred classes": lambda: render(
    make_report(100, [3, 7, 9]), make_evidence(100, [3, 7, 9]), None
  ),
  "hostile names": lambda: render(
    make_report(10, [0])
    | {"checkpoint": "x" * 500, "versions": {"y" * 300: "<img src=http://127.0.0.1:9/>"}},
    make_evidence(10, [0])
    | {
      "class_names": ["<script>alert(1)</script>", "z" * 200] + ["W" * 80] * 8,
      "model": "m" * 300,
    },
    make_codes(10, (8, 8, 1)),
  ),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_page_loads_without_a_fault(
  browser: Browser, tmp_path: pathlib.Path, page: str, width: int, scheme: str
) -> None:
  assert faults(browser, write(tmp_path, PAGES[page]()), width, scheme) == []
  assert browser.evaluate("document.querySelectorAll('section').length") == 8
  assert browser.evaluate("document.querySelectorAll('script').length") == 0
  assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


FAULTY = {
  "console": ("<script>console.error('deliberate')</script>", "console: error"),
  "page error": ("<script>throw new Error('deliberate')</script>", "page error"),
  "request": ("<img src='http://127.0.0.1:9/x.png' alt=''>", "request: http://127.0.0.1:9/x.png"),
  "overflow": ("<div style='width:1500px;height:1px'></div>", "overflow"),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", FAULTY)
def test_the_checker_finds_each_fault(
  browser: Browser, tmp_path: pathlib.Path, kind: str, width: int
) -> None:
  body, expected = FAULTY[kind]
  head = (
    "<!doctype html><html lang=en>"
    "<meta name=viewport content='width=device-width, initial-scale=1'><title>x</title>"
  )
  found = faults(browser, write(tmp_path, head + body), width)
  assert any(text.startswith(expected) for text in found), found


def test_page_refuses_scripts_even_if_one_slipped_in(
  browser: Browser, tmp_path: pathlib.Path
) -> None:
  html = PAGES["two classes"]().replace("</body>", "<script>document.title = 'run'</script></body>")
  found = faults(browser, write(tmp_path, html), 1200)
  assert browser.evaluate("document.title") != "run"
  assert any("Content Security Policy" in text for text in found), found


def test_nothing_is_hidden_beside_the_window(browser: Browser, tmp_path: pathlib.Path) -> None:
  """Only the matrices may scroll sideways, each in its own box.

  With ten classes, not even they do on a phone.
  """
  faults(browser, write(tmp_path, PAGES["ten classes"]()), 360)
  hidden = "[...document.querySelectorAll('.scroll')].map(box => box.scrollWidth - box.clientWidth)"
  assert browser.evaluate(hidden) == [0, 0]


def test_prints_to_a_few_pages(browser: Browser, tmp_path: pathlib.Path) -> None:
  faults(browser, write(tmp_path, PAGES["ten classes"]()), 1200)
  pdf = base64.b64decode(
    browser.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]
  )
  pages = pdf.count(b"/Type /Page\n") or pdf.count(b"/Type /Page ")
  assert 2 <= pages <= 6, pages
