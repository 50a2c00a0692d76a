"""A headless Chromium that opens a page, driven by its DevTools protocol over a pipe."""

import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")

_LAST_S = 60.0
# What a page says of itself: its width, and the elements that reach out of the window or hide a
# part of their text. A box that scrolls may be smaller than its content.
_CUT_OFF = """
(() => {
  const scrolls = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const inBox = (e) => e && (scrolls(e) || inBox(e.parentElement));
  const cut = [...document.body.querySelectorAll("*")].filter((e) => !e.closest("svg") && (
    (!inBox(e.parentElement) && e.getBoundingClientRect().right > innerWidth + 0.5) ||
    (!scrolls(e) && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX == "hidden")
  ));
  const svg = [...document.querySelectorAll("svg text")].filter((e) => {
    const text = e.getBoundingClientRect(), box = e.closest("svg").getBoundingClientRect();
    return text.left < box.left - 1 || text.right > box.right + 1 || text.bottom > box.bottom + 1;
  });
  return JSON.stringify({
    width: document.documentElement.scrollWidth,
    text: document.body.innerText,
    charts: document.querySelectorAll("svg").length,
    cut: [...cut, ...svg].map((e) => e.outerHTML.slice(0, 200)),
  });
})()
"""


class Chromium:
    """A browser, which is closed at the end of a `with` block."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM, "the caller has looked for it"
        ours, theirs = os.pipe(), os.pipe()
        command = (
            f"exec {shlex.quote(PROGRAM)} --headless=new --no-sandbox --disable-gpu "
            f"--remote-debugging-pipe --user-data-dir={shlex.quote(str(profile))} about:blank "
            f"3<&{ours[0]} 4>&{theirs[1]} 2>/dev/null"
        )
        self._process = subprocess.Popen(["bash", "-c", command], pass_fds=(ours[0], theirs[1]))
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = ours[1], os.fdopen(theirs[0], "rb")
        self._number = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: object) -> None:
        self._session = {}
        self.call("Browser.close")
        self._process.wait(_LAST_S)
        os.close(self._to)
        self._from.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        call = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(call).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, page: Path, width: int) -> dict[str, Any]:
        """Open a page in a window of this width; return what it shows, and what is cut off."""
        self.events.clear()
        window = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **window)
        self.call("Page.navigate", url=page.as_uri())
        until = time.monotonic() + _LAST_S
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < until, "the page does not load"
            self.events.append(self._read())
        value = self.call("Runtime.evaluate", expression=_CUT_OFF)["result"]["value"]
        shown: dict[str, Any] = json.loads(value)
        return shown

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for since it was opened."""
        found = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in found]

    def complaints(self) -> list[dict[str, Any]]:
        """Return what the page has written to the console since it was opened."""
        methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event for event in self.events if event["method"] in methods]

    def _read(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            message += byte
        answer: dict[str, Any] = json.loads(message)
        return answer
