"""The report's HTML page, also opened in a real browser."""

import json
import re
import shutil
import time

import numpy as np
import pytest
from made_up import stub_gflops, write_solved_run

from dhtm.report.report import report

BROWSER = shutil.which("chromium"), shutil.which("chromedriver")
METHODS = ("unmerged", "dhtm", "tome", "lotm", "atc")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    for number, method in enumerate(METHODS):
        kl = np.zeros(200) if method == "unmerged" else rng.exponential(0.01 * number, 200)
        speed = {"images_per_s": 50.0 + number}
        write_solved_run(folder / "runs", number, method, correct=rng.random(200) < 0.9, kl=kl, **speed)
    write_solved_run(folder / "runs", 9, "sit", trained=True, correct=rng.random(200) < 0.8, images_per_s=60.0)
    sweep = folder / "runs" / "sweeps" / "evaluate-12345678"
    sweep.mkdir(parents=True)
    overrides = [["method=sit", "seed=0"], ["method=lotm", "seed=0"]]
    (sweep / "sweep.json").write_text(json.dumps({"command": "evaluate -m", "runs": overrides}))
    (sweep / "001.json").write_text(json.dumps({"state": "skipped", "reason": "out of reach"}))
    with pytest.MonkeyPatch.context() as patch:
        stub_gflops(patch)
        report(folder / "runs", folder / "out")
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser():
    if not all(BROWSER):
        pytest.skip("chromium and chromedriver (Debian's chromium-driver) are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER[0]
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(BROWSER[1]))
    yield driver
    driver.quit()


def point_labels(browser, chart):
    """Wait until a chart is drawn; return the labels of its points for screen readers."""
    for _ in range(100):
        if found := browser.find_elements("css selector", f"#{chart} .mark-symbol.role-mark path"):
            return [point.get_attribute("aria-label") for point in found]
        time.sleep(0.1)
    raise AssertionError(f"{chart} was not drawn in 10 s")


def test_page_is_small_and_lists_all_runs_and_the_missing_ones(page):
    html = page.read_text()
    assert len(html.encode()) < 4_000_000
    for number in (*range(len(METHODS)), 9):
        assert f"{number:016x}" in html
    html_ids = set(re.findall(r' id="([^"]+)"', html))
    links = re.findall(r'href="#([^"]+)"', html)
    assert set(links) <= html_ids and {f"{number:016x}" for number in range(len(METHODS))} <= set(links)
    for heading in ("What was run", "Figures", "Where the accuracy goes", "What is missing", "All runs"):
        assert f"<h2>{heading}</h2>" in html
    missing = re.findall(r"<td>(.*)</td>", html[html.index('id="missing"') : html.index('id="runs"')])
    assert missing == ["method=sit", "waiting", "", "method=lotm", "skipped", "out of reach"]
    assert html.count("<figure><img src") == html.count('" alt="') > 0


@pytest.mark.parametrize(("width", "media"), [(360, "screen"), (1400, "screen"), (1050, "print")])
def test_page_fits_the_width_and_loads_nothing(page, browser, width, media):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    point_labels(browser, "chart1")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    requests = [entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]]
    assert requests and not [request for request in requests if '"url":"http' in request]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_filters_select_the_points_of_the_chart(page, browser):
    from selenium.webdriver.support.ui import Select

    browser.get(page.as_uri())
    labels = point_labels(browser, "chart1")
    assert len(labels) == len(METHODS) + 1 and any("SiT" in label for label in labels)
    filters = {label.text.split()[0]: label for label in browser.find_elements("css selector", "#chart1 label")}
    for name, choice, expected in (
        ("training", "w/ train", 1),
        ("training", "all", 6),
        ("method", "DHTM", 1),
    ):
        Select(filters[name].find_element("css selector", "select")).select_by_visible_text(choice)
        time.sleep(0.5)
        assert len(point_labels(browser, "chart1")) == expected
