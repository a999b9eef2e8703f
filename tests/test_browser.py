"""The site and JupyterLab in headless Chromium, as a reader meets them. `make browser-test` runs these."""

from __future__ import annotations

import functools
import http.server
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from gcalib.publish.notebooks import notebooks
from gcalib.publish.site import write_site
from gcalib.study.theme import VEGALITE

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[1]
COMMITTED = notebooks(folder=ROOT / "notebooks")
NAMES = ["index", *(path.stem for path in COMMITTED)]
PATIENCE = 600  # seconds: a machine may be busy with other things
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage "
)
# A name of another host is not even looked up: who asks for one gets an error on the console.
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"

# Contrast of each text with the nearest background behind it, as WCAG 2 defines it; texts below `least` come back.
PALE = """
const [least] = arguments;
const parse = colour => colour.match(/[\\d.]+/g).map(Number);
const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const behind = node => {
  for (; node; node = node.parentElement) {
    const [r, g, b, a = 1] = parse(getComputedStyle(node).backgroundColor);
    if (a === 1) return [r, g, b];
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), pale = [];
let seen = 0;
for (let text; (text = walker.nextNode());) {
  const node = text.parentElement, ink = node.namespaceURI.endsWith("svg") || node.matches("script, .anchor-link");
  if (!text.data.trim() || ink || !node.getClientRects().length) continue;
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
  seen += 1;
  if ((a + 0.05) / (b + 0.05) < least) pale.push([text.data.trim(), node.className, (a + 0.05) / (b + 0.05)]);
}
return [seen, pale.slice(0, 5)];
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A fresh Chromium that writes down every request and every word on the console."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.fail("These tests need Chromium and its driver on the PATH, on Debian: apt-get install chromium-driver.")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), NOWHERE, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1000"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    chrome.set_page_load_timeout(PATIENCE)
    chrome.set_script_timeout(PATIENCE)
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, written from the committed notebooks."""
    return write_site(COMMITTED, tmp_path_factory.mktemp("site")).parent


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """The address of the site on a static host of this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def visit(browser: webdriver.Chrome, address: str) -> None:
    """Open a page, wait until its charts are drawn, and unfold what is folded."""
    browser.get(address)
    undrawn = "return document.querySelectorAll('figure.chart > img').length"
    WebDriverWait(browser, PATIENCE).until(lambda chrome: chrome.execute_script(undrawn) == 0)
    browser.execute_script("for (const fold of document.querySelectorAll('details')) fold.open = true")


def requested(browser: webdriver.Chrome) -> list[str]:
    """Addresses that pages asked for since the last call, without data and what is inside the browser itself."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if urlsplit(url).scheme not in ("data", "blob", "chrome", "chrome-untrusted")]


def charts_of(path: Path) -> int:
    cells = nbformat.read(path, as_version=4).cells
    return sum(VEGALITE in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def test_every_chart_is_drawn_from_a_file_and_nothing_is_asked_of_anyone(browser: webdriver.Chrome, site: Path) -> None:
    expected = {"index": 1, **{path.stem: charts_of(path) for path in COMMITTED}}
    for name, charts in expected.items():
        address = (site / f"{name}.html").as_uri()
        visit(browser, address)
        marks = "s => s.querySelectorAll('g.role-mark > *').length"
        drawn = browser.execute_script(f"return [...document.querySelectorAll('figure.chart svg')].map({marks})")
        assert len(drawn) == charts and all(drawn), (name, drawn)
        broken = "return [...document.images].filter(i => !i.naturalWidth || !i.alt).map(i => i.src.slice(0, 80))"
        assert browser.execute_script(broken) == []
        assert requested(browser) == [address]
    assert sum(expected.values()) > 10 and browser.get_log("browser") == []


def test_no_link_is_broken_and_every_page_is_reached_from_the_front(browser: webdriver.Chrome, served: str) -> None:
    ids: dict[str, set[str]] = {}
    links: set[str] = set()
    waiting = [f"{served}/index.html"]
    while waiting:
        page = waiting.pop()
        visit(browser, page)
        ids[page] = set(browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)"))
        assert ids[page], f"{page} is not there"
        here = set(browser.execute_script("return [...document.links].map(a => a.href)"))
        links |= here
        near = {urldefrag(link).url for link in here if link.startswith(served)}
        waiting += sorted(near - set(ids) - set(waiting))
    assert sorted(ids) == sorted(f"{served}/{name}.html" for name in NAMES)
    for link in links:
        address, fragment = urldefrag(link)
        if link.startswith(served):
            assert not fragment or {fragment, unquote(fragment)} & ids[address], link
        else:  # for a reader to click on; no file of the machine that the site was made on
            assert urlsplit(link).scheme == "https", link
    assert all(url.startswith(served) for url in requested(browser)) and browser.get_log("browser") == []


def test_a_phone_scrolls_no_page_sideways(browser: webdriver.Chrome, site: Path) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for name in NAMES:
        visit(browser, (site / f"{name}.html").as_uri())
        widths = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert widths == [390, 390], name
        size = browser.execute_script("return parseFloat(getComputedStyle(document.querySelector('main p')).fontSize)")
        assert size >= 16


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_background(browser: webdriver.Chrome, site: Path, scheme: str) -> None:
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    for name in NAMES:
        visit(browser, (site / f"{name}.html").as_uri())
        seen, pale = browser.execute_script(PALE, 4.5)
        assert seen > 20 and pale == [], (name, pale)
        papers = "[document.body, ...document.querySelectorAll('.chart')]"
        body, *charts = browser.execute_script(f"return {papers}.map(e => getComputedStyle(e).backgroundColor)")
        assert (max(map(int, body[4:-1].split(","))) < 40) == (scheme == "dark")
        assert set(charts) <= {"rgb(255, 255, 255)"}


def test_the_front_page_tells_the_finding_and_leads_to_the_notebooks(browser: webdriver.Chrome, site: Path) -> None:
    visit(browser, (site / "index.html").as_uri())
    said = browser.execute_script("return [...document.querySelector('main ul').children].map(e => e.innerText)")
    assert len(said) == 3 and all(sentence.endswith(".") for sentence in said)
    browser.execute_script("document.querySelector('footer [rel=next]').click()")
    for number, name in enumerate(NAMES[1:]):
        WebDriverWait(browser, PATIENCE).until(lambda chrome, name=name: chrome.current_url.endswith(f"/{name}.html"))
        current = "return [...document.querySelectorAll('nav a')].findIndex(a => a.ariaCurrent === 'page')"
        assert browser.execute_script(current) == number
        browser.execute_script("document.querySelector('footer [rel=next]')?.click()")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of notebook 00, without outputs, in a JupyterLab on a copy of what it needs."""
    for name in ("gcalib", "params", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    book = nbformat.read(COMMITTED[0], as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (tmp_path / "notebooks").mkdir()
    nbformat.write(book, tmp_path / "notebooks" / COMMITTED[0].name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex()
    address = f"http://127.0.0.1:{port}"
    own = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with (tmp_path / "lab.log").open("w") as log:
        environment = {**os.environ, **own, "PYTHONPATH": str(tmp_path)}
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)

        def answers(_: object) -> bool:
            assert server.poll() is None, (tmp_path / "lab.log").read_text()
            try:
                with urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=PATIENCE):
                    return True
            except urllib.error.URLError:
                return False

        try:
            WebDriverWait(None, PATIENCE).until(answers)  # type: ignore[type-var]
            yield f"{address}/lab/tree/notebooks/{COMMITTED[0].name}?token={token}"
        finally:
            server.terminate()
            server.wait(60)


def test_jupyterlab_runs_the_first_notebook_from_a_fresh_kernel(browser: webdriver.Chrome, lab: str) -> None:
    # JupyterLab's current widget is the one in focus, and a page of a headless Chromium need not have it.
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    browser.get(lab)
    panel = "const panel = window.jupyterapp?.shell.currentWidget;"
    ready = f"{panel} return panel?.sessionContext?.session?.kernel?.connectionStatus === 'connected'"
    WebDriverWait(browser, PATIENCE).until(lambda chrome: chrome.execute_script(ready))
    run = f"{panel} const [done] = arguments; jupyterapp.commands.execute('notebook:run-all-cells').then(() => done(1))"
    assert browser.execute_async_script(run)
    content = browser.execute_script(f"{panel} return panel.content.model.toJSON()")
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [(i, output) for i, cell in enumerate(content["cells"]) for output in cell.get("outputs", [])]
    assert [output for _, output in outputs if output["output_type"] == "error"] == []
    charts = [i for i, output in outputs if VEGALITE in output.get("data", {})]
    assert len(charts) == charts_of(COMMITTED[0]) > 0
    find = "panel.content.widgets[arguments[0]].node.querySelector('.jp-OutputArea-output :is(svg, canvas, img)')"
    drawn = "node && node.getBoundingClientRect().width > 300 && node.naturalWidth !== 0"
    shown = f"{panel} const node = {find}; return !!({drawn})"
    for number in charts:
        browser.execute_async_script(f"{panel} panel.content.scrollToItem(arguments[0]).then(arguments[1])", number)
        WebDriverWait(browser, PATIENCE).until(lambda chrome, number=number: chrome.execute_script(shown, number))
    assert {urlsplit(url).hostname for url in requested(browser)} == {"127.0.0.1"}
