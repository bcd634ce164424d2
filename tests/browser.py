"""Chromium without a window, driven through its debugging pipe: what a reader's mouse and keys do.

    with open_page(file) as page:
        page.move("#tokens button:nth-child(3)")
        page.click("#views input")
        page.press("ArrowRight")
        page.run("document.title")

Reference: the Chrome DevTools Protocol; JSON messages that end with a zero byte, on files 3 and 4.
"""
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
        "ArrowDown": 40}


@contextlib.contextmanager
def open_page(file, width=1280, height=900):
    """A Page that has loaded the file; the test is skipped where there is no Chromium."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip("there is no Chromium here (Debian's: apt-get install chromium-headless-shell)")
    (theirs, to_it), (from_it, back) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{back}', binary, "--headless",
             "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(theirs, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(back)
        try:
            yield Page(to_it, from_it, file, width, height)
        finally:
            os.close(to_it)             # which ends it
            process.terminate()
            process.wait()
            os.close(from_it)


class Page:
    """A page that is open. errors: what its script raised; requests: the addresses it asked for."""

    def __init__(self, to_it, from_it, file, width, height):
        self.to_it, self.from_it, self.unread, self.sent, self.session = to_it, from_it, b"", 0, {}
        self.errors, self.requests, self.loaded = [], [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target,
                                               flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not self.loaded:
            self.read()

    def read(self):
        """One message of the browser."""
        while b"\0" not in self.unread:
            if not select.select([self.from_it], [], [], 300)[0]:
                raise RuntimeError("the browser does not answer")
            got = os.read(self.from_it, 2**20)
            if not got:
                raise RuntimeError("the browser ended")
            self.unread += got
        message, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(message)
        params = message.get("params", {})
        self.loaded |= message.get("method") == "Page.loadEventFired"
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def call(self, method, **params):
        """The result of one of the protocol's methods."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params, **self.session}
        os.write(self.to_it, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.sent:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def run(self, code):
        """The value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector):
        """What an element shows."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def move(self, selector, x=0.5, y=0.5):
        """The mouse to this part of an element, which must be what is seen there."""
        x, y, seen = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            f"e.scrollIntoView({{block: 'center', inline: 'center'}});"
            f"const b = e.getBoundingClientRect();"
            f"const x = b.x + {x} * b.width, y = b.y + {y} * b.height;"
            f"return [x, y, e.contains(document.elementFromPoint(x, y))]; }})()")
        assert seen, f"{selector} is covered, or outside"
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector, x=0.5, y=0.5):
        """A click on an element."""
        x, y = self.move(selector, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        """A key, on what has the focus."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=KEYS[key])
