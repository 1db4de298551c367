"""The report of a tuning: Optuna's plots of studies that are kept in a database, on a page that needs nothing else."""

import re
import shutil
from pathlib import Path

import optuna
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from engine.tuned import Tuned
from profiles.tune_report import write_report

TUNED = Tuned(
    budget_tokens=96,
    chunk_tokens=96,
    max_requests=8,
    policy="static:budget=96",
    laws={"static": "static:budget=96", "pid": "pid:set_point=0.9"},
    slo="tbt:40",
    provenance={"note": "<script>alert(1)</script>"},
    step_time={"residuals": [0.9871]},
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def study(url: str, name: str, trials: int, seed: int = 0) -> None:
    """Capacity and TTFT of a made-up machine: more budget and more seats serve more, until the promise breaks."""

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        budget, seats = trial.suggest_int("budget_tiles", 1, 64, log=True), trial.suggest_int("max_requests", 1, 8)
        trial.set_constraint("SLO", budget / 32 - 1)
        return budget * seats / (20 + budget), 10.0 / budget + seats

    made = optuna.create_study(
        storage=url,
        study_name=name,
        directions=("maximize", "minimize"),
        sampler=optuna.samplers.RandomSampler(seed),
    )
    made.set_metric_names(["capacity (req/s)", "TTFT (s)"])
    made.optimize(objective, n_trials=trials)


def plots_in(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page)


EVERY_PLOT = [
    "History: capacity (req/s)",
    "Against each parameter: capacity (req/s)",
    "Importance for capacity (req/s)",
    "History: TTFT (s)",
    "Against each parameter: TTFT (s)",
    "Importance for TTFT (s)",
    "Pareto front",
]


def test_every_study_has_its_history_importance_and_front(url: str, tmp_path: Path) -> None:
    study(url, "tuned-static", 12)
    study(url, "tuned-pid", 6, seed=1)
    write_report(url, ["tuned-static", "tuned-pid"], TUNED, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert plots_in(page) == EVERY_PLOT * 2
    assert "Trials: 12 complete." in page
    assert "best pid" in page
    assert "<script>alert" not in page
    assert "0.9871" not in page
    assert 'src="http' not in page


def test_a_study_that_has_little_to_show_says_so(url: str, tmp_path: Path) -> None:
    study(url, "two", 2)
    optuna.create_study(storage=url, study_name="none", directions=("maximize", "minimize"))
    failed = optuna.create_study(storage=url, study_name="failed", directions=("maximize",))
    failed.tell(failed.ask(), state=optuna.trial.TrialState.FAIL)
    one = optuna.create_study(storage=url, study_name="one", directions=("maximize",))
    trial = one.ask()
    trial.suggest_int("budget_tokens", 16, 512)
    one.tell(trial, 1.0)
    write_report(url, ["two", "none", "failed", "one"], TUNED, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert plots_in(page) == [name for name in EVERY_PLOT if "Importance" not in name] + ["History: objective 0"]
    assert page.count("nothing to plot") == 2
    assert "Trials: 1 fail." in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_all_of_it_and_loads_nothing(url: str, tmp_path: Path) -> None:
    study(url, "tuned-static", 12)
    write_report(url, ["tuned-static"], TUNED, tmp_path / "report.html")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'chrome'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get((tmp_path / "report.html").as_uri())
        drawn = (By.CSS_SELECTOR, ".js-plotly-plot .main-svg .infolayer")
        WebDriverWait(browser, 60).until(lambda b: len(b.find_elements(*drawn)) >= len(EVERY_PLOT))
        assert browser.get_log("browser") == []
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert all(plot.size["width"] <= 1200 for plot in browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot"))
    finally:
        browser.quit()
