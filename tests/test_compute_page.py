"""The compute page in Chromium: its picture fills in, stops, and ends with its tab."""

from __future__ import annotations

import collections.abc
import shutil
import typing

import pytest

from .helpers import wait_until
from .servers import Server
from .test_compute import jobs

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and its driver (Debian: chromium-driver)"
)

Browser = typing.Any


@pytest.fixture(scope="module")
def server() -> collections.abc.Iterator[Server]:
    with Server("workers.compute:app", "--pool", "1", workers=1) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> collections.abc.Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield made
    finally:
        made.quit()


def open_page(browser: Browser, server: Server, **fields: object) -> None:
    browser.get(f"http://localhost:{server.port}/")
    for name, value in fields.items():
        browser.execute_script(f"form.{name}.value = '{value}'")


def click(browser: Browser, element: str) -> None:
    browser.find_element("id", element).click()


def state(browser: Browser) -> str:
    return str(browser.find_element("id", "state").text)


def progress(browser: Browser) -> float:
    return float(browser.execute_script("return document.getElementById('progress').value"))


def colours(browser: Browser) -> int:
    """How many different colours the canvas shows."""
    return int(
        browser.execute_script(
            "return new Set(new Uint32Array(context.getImageData(0, 0, canvas.width,"
            " canvas.height).data.buffer)).size"
        )
    )


def test_the_picture_fills_in_and_is_whole_at_the_end(server: Server, browser: Browser) -> None:
    open_page(browser, server, width=320, height=240, iterations=60)
    assert colours(browser) == 1
    click(browser, "start")
    wait_until(lambda: state(browser).startswith("done in "), "it is drawn")
    assert progress(browser) == 1
    assert colours(browser) > 20
    opaque = (
        "return context.getImageData(0, 0, 320, 240).data.every((v, i) => i % 4 < 3 || v == 255)"
    )
    assert browser.execute_script(opaque)
    # No script, style or picture was refused. (It also advises on reading canvases.)
    assert [x for x in browser.get_log("browser") if x["source"] != "rendering"] == []


def test_a_click_into_the_picture_draws_it_closer(server: Server, browser: Browser) -> None:
    open_page(browser, server, width=160, height=120, iterations=30)
    click(browser, "start")
    wait_until(lambda: state(browser).startswith("done in "), "it is drawn")
    click(browser, "picture")
    wait_until(lambda: browser.execute_script("return form.scale.value") == "0.8", "it zooms")
    wait_until(lambda: state(browser).startswith("done in "), "it is drawn again")


def test_a_job_is_seen_cancelled_and_stopped_from_the_page(
    server: Server, browser: Browser
) -> None:
    open_page(browser, server, width=4096, height=4096, iterations=1000)
    click(browser, "start")
    wait_until(lambda: 0 < progress(browser) < 1, "tiles arrive")
    (job,) = jobs(server)
    assert job["id"] in state(browser)
    cancel = "#jobs button"
    wait_until(lambda: browser.find_elements("css selector", cancel), "it is listed")
    browser.find_element("css selector", cancel).click()
    wait_until(lambda: "cancelled" in state(browser) or "error" in state(browser), "it hears")
    wait_until(lambda: jobs(server) == [], "it ends")
    click(browser, "start")
    wait_until(lambda: 0 < progress(browser) < 1, "tiles arrive again")
    click(browser, "stop")
    wait_until(lambda: state(browser) == "stopped" and jobs(server) == [], "it is stopped")


def test_closing_the_tab_ends_its_job(server: Server, browser: Browser) -> None:
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    open_page(browser, server, width=4096, height=4096, iterations=1000)
    click(browser, "start")
    wait_until(lambda: 0 < progress(browser) < 1, "tiles arrive")
    assert len(jobs(server)) == 1
    browser.close()
    browser.switch_to.window(first)
    wait_until(lambda: jobs(server) == [], "nobody computes for it")
    open_page(browser, server, width=64, height=64, iterations=10)
    click(browser, "start")
    wait_until(lambda: state(browser).startswith("done in "), "the processor is free for the next")
