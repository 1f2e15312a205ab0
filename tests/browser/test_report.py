"""Clicks through a suite's report.html in Chromium: `make browser-test`, once the suite was run.

The report is `results/smoke/report.html`, or what LORAFUSION_REPORT names.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lorafusion.core.config import CONFIGS

REPORT = Path(os.environ.get("LORAFUSION_REPORT", CONFIGS.parent / "results" / "smoke" / "report.html"))
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
    *("disable-background-networking", "disable-component-update", "disable-dev-shm-usage"),
]
WIDTHS = (1280, 390)  # pixels: a desk's screen, a phone's
HEIGHT = 900
CATEGORIES = {"Figures", "Checks", "Measurements"}
LEAST_TEXT = 50  # letters of a page that is not empty

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("Chromium and its driver are not installed (Debian: chromium chromium-driver)")
    if not REPORT.exists():
        pytest.skip(f"{REPORT} is not there: make reproduce SUITE=smoke")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


class Report:
    """The report in a browser: what a reader clicks on, and what is shown then."""

    def __init__(self, driver, width: int) -> None:
        self.driver = driver
        metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(REPORT.resolve().as_uri())
        self.expected = driver.execute_script("return categories")

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def click(self, element) -> None:
        """Click, and see that the page did not break."""
        self.driver.execute_script("arguments[0].click()", element)
        self.require_no_error()

    def require_no_error(self) -> None:
        errors = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors, errors
        assert self.all("nav"), "the page is blank"

    def open(self, item: str) -> None:
        """Go to the menu and choose one of its items."""
        self.click(self.all("nav ol a")[0])
        named = [link for link in self.all("nav li a") if link.get_attribute("textContent").strip() == item]
        assert len(named) == 1, item
        self.click(named[0])

    def toggles(self) -> list:
        return self.all("nav fieldset input")

    def rows(self) -> list:
        return self.all("nav tbody tr")

    def require_content(self, name: str) -> None:
        """What was chosen is shown, or would be downloaded, and is not empty."""
        images, frames = self.all("div.overflow-auto img[src^='data:image']"), self.all("iframe")
        if frames:
            source = frames[0].get_attribute("src")
            assert len(source) > 1000, name
            if source.startswith("data:text/html"):
                self.driver.switch_to.frame(frames[0])
                text = self.driver.find_element("css selector", "body").text
                wide = self.driver.execute_script("return document.documentElement.scrollWidth > innerWidth + 1")
                self.driver.switch_to.default_content()
                assert len(text) > LEAST_TEXT, name
                assert not wide, f"{name} is wider than its window"
            else:
                assert source.startswith("data:application/pdf"), name
        else:
            assert images, f"{name} is not shown"
            ready = "return arguments[0].decode().then(() => arguments[0].naturalWidth)"
            assert self.driver.execute_script(ready, images[0]) > 100, name


def show(report: Report, index: int) -> str:
    """Choose a row's result and read about it; returns the row's text."""
    row = report.rows()[index]
    name = row.text
    view, about = row.find_elements("css selector", "a")
    download = view.get_attribute("download")
    if download:
        assert len(view.get_attribute("href")) > 100, name
    else:
        report.click(view)
        report.require_content(name)
    report.click(about)
    assert len(report.all("nav")[0].text) > LEAST_TEXT, name
    return name


@pytest.mark.parametrize("width", WIDTHS)
def test_every_result_of_every_category_is_shown(browser, width):
    report = Report(browser, width)
    assert set(report.expected) == CATEGORIES
    for item in ("Workflow", "Statistics", "About"):
        report.open(item)
    for category, subcategories in report.expected.items():
        paths = [path for results in subcategories.values() for path in results]
        report.open(category)
        shown = 0
        for toggle in range(max(1, len(report.toggles()))):
            for index in range(len(report.rows())):
                report.open(category)
                if report.toggles():
                    report.click(report.toggles()[toggle])
                show(report, index)
                shown += 1
            report.open(category)
        assert shown == len(paths), f"{category}: {shown} of {len(paths)} results"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("term", ["png", "measurements", "lossless", "re:.*"])
def test_every_search_shows_what_it_finds(browser, width, term):
    report = Report(browser, width)
    field = report.all("nav input[type=text]")[0]
    field.send_keys(term, "\n")
    report.require_no_error()
    assert report.rows(), term
    for index in range(len(report.rows())):
        view = report.rows()[index].find_elements("css selector", "a")[0]
        if not view.get_attribute("download"):
            report.click(view)
