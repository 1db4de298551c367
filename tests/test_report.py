"""The report in a real browser: nothing is wrong, all is drawn, and a click hides a policy."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from test_compare import POLICIES, question

from profiles.compare import compare
from profiles.report import colours, write_report
from profiles.results import BEST_STATIC, ORACLE_STATIC, Comparison

PLOTS = ("capacity", "goodput", "tbt", "ttft", "budget")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-quic", "--disable-component-update", "--disable-sync", "--window-size=1280,900"),
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(question(), tmp_path_factory.mktemp("compare"), processes=2)


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    folder = tmp_path_factory.mktemp("report")
    write_report(comparison, folder / "report.html")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get((folder / "report.html").as_uri())
        WebDriverWait(browser, 60).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, ".main-svg .infolayer")) >= 5)
        yield browser
    finally:
        browser.quit()


def test_the_page_loads_nothing_and_reports_no_error(page: webdriver.Chrome) -> None:
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


def test_the_table_holds_every_row(page: webdriver.Chrome, comparison: Comparison) -> None:
    text = page.find_element(By.TAG_NAME, "table").text
    assert all(len(re.findall(re.escape(name), text)) >= 2 for name in comparison.contenders)
    assert "at 6 req/s" in text
    assert len(page.find_elements(By.CSS_SELECTOR, "table tr")) == 1 + 2 * (1 + len(comparison.contenders))


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_is_drawn(page: webdriver.Chrome, name: str) -> None:
    plot = page.find_element(By.ID, name)
    assert plot.find_element(By.CSS_SELECTOR, "svg.main-svg").size["height"] > 300
    marks = ".barlayer .point path" if name == "capacity" else ".scatterlayer .trace path.js-line"
    drawn = plot.find_elements(By.CSS_SELECTOR, marks)
    assert len(drawn) >= (len(POLICIES) if name != "goodput" else len(POLICIES) + 2)
    assert all(len(path.get_attribute("d") or "") > 10 for path in drawn)
    assert plot.size["width"] <= 1280


@pytest.mark.parametrize("name", PLOTS)
def test_a_click_on_a_legend_entry_hides_its_policy(page: webdriver.Chrome, name: str) -> None:
    def visible() -> list[str]:
        names: list[str] = page.execute_script(
            "return document.getElementById(arguments[0])._fullData.filter(t => t.visible === true).map(t => t.name)",
            name,
        )
        return names

    before = visible()
    plot = page.find_element(By.ID, name)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    plot.find_element(By.CSS_SELECTOR, ".legend .traces .legendtoggle").click()
    WebDriverWait(page, 10).until(lambda _: len(visible()) == len(before) - 1)
    assert visible() == before[1:]


def test_a_button_shows_another_rate(page: webdriver.Chrome, comparison: Comparison) -> None:
    def shown() -> set[float]:
        rates: list[float] = page.execute_script(
            "return document.getElementById('ttft')._fullData.filter(t => t.visible === true).map(t => t.meta)"
        )
        return set(rates)

    plot = page.find_element(By.ID, "ttft")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    for button, rate in zip(plot.find_elements(By.CSS_SELECTOR, ".updatemenu-button"), comparison.rates, strict=True):
        button.click()
        WebDriverWait(page, 10).until(lambda _, rate=rate: shown() == {rate})


def test_the_page_fits_1280_pixels(page: webdriver.Chrome) -> None:
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_policy_has_one_colour_throughout(page: webdriver.Chrome, comparison: Comparison) -> None:
    colour = colours(comparison)
    assert len(set(colour.values())) == len(POLICIES) + 2 == len(set(colour) | {BEST_STATIC, ORACLE_STATIC})
    for name in PLOTS:
        used = page.execute_script(
            "return document.getElementById(arguments[0]).data.map(t => [t.name, (t.line || t.marker).color])", name
        )
        assert used and all(seen == colour[re.sub(r" \(\d+\)$", "", policy)] for policy, seen in used)


def test_names_are_shown_not_run(comparison: Comparison, tmp_path: Path) -> None:
    evil = msgspec.structs.replace(comparison, title="<script>alert(1)</script>")
    write_report(evil, tmp_path / "report.html")
    assert "<script>alert" not in (tmp_path / "report.html").read_text()
