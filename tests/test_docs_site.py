"""The site of the documents, built as ``make docs`` does it: its links, and its search in a browser."""

import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

import parapolicy
from tests.conftest import PATIENCE, ROOT
from tests.test_report import BROWSER

MKDOCS = shutil.which("mkdocs", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(MKDOCS is None, reason="no MkDocs here; make docs-test installs it"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [str(MKDOCS), "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


class Links(html.parser.HTMLParser):
    """What a page links to and loads, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.targets.add(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def test_every_link_inside_the_site_leads_somewhere(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 15
    checked = 0
    for page, links in pages.items():
        for target in links.targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            assert path.is_file(), f"{page.relative_to(site)} links to {target}"
            if parts.fragment and path in pages:
                where = urllib.parse.unquote(parts.fragment)
                assert where in pages[path].places, f"{page.relative_to(site)} links to {target}"
            checked += 1
    assert checked > 500


def test_the_reference_has_the_public_names(site: Path) -> None:
    text = (site / "reference" / "index.html").read_text()
    for name in parapolicy.__all__:
        assert f'id="parapolicy.{name}"' in text
    assert not re.search(r":(func|class|meth|data|attr|mod):", text)
    assert 'href="#parapolicy.make_plan"' in text


def test_nothing_is_loaded_from_other_machines(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|img)[^>]+src="https?:|<link[^>]+stylesheet[^>]+https?:', page.read_text())


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here")
def test_the_search_finds_pages_in_a_browser(address: str, tmp_path: Path) -> None:
    """By Chromium's debugging protocol: a dump of the page would not wait for the search's worker."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command += [f"--user-data-dir={tmp_path}", f"{address}/?q=collocation"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = tmp_path / "DevToolsActivePort"
        until(lambda: port.is_file() and "\n" in port.read_text())
        number, _ = port.read_text().split()
        (page,) = until(lambda: [tab for tab in tabs(number) if tab["url"].startswith(address)])
        with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:

            def evaluate(expression: str) -> Any:
                found = ask(socket, "Runtime.evaluate", expression=expression, returnByValue=True)
                return found["result"].get("value")

            links = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
            found = until(lambda: evaluate(links))
            assert any(link.startswith(f"{address}/samplers/") for link in found)
    finally:
        browser.kill()
        browser.wait()
        shutil.rmtree(tmp_path, ignore_errors=True)


def until(ready: Any) -> Any:
    """The first value of ``ready()`` that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (found := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def tabs(port: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE) as answer:
        return json.load(answer)


def ask(socket: Any, method: str, **parameters: Any) -> Any:
    """A method's result; events that come in between are left out."""
    socket.send(json.dumps({"id": 1, "method": method, "params": parameters}))
    while (answer := json.loads(socket.recv())).get("id") != 1:
        pass
    return answer["result"]
