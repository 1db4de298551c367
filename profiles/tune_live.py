"""`pacer tune --live`: the token budget of a running engine, tuned through its knobs while it serves.

Candidates come from `profiles.tune_windows` and are the trials of an Optuna study, so that its storage, plots and
dashboard serve here, too. The engine is neither restarted nor loaded: what is measured is its own traffic. Knobs live
as long as someone repeats them, so what has been found is written for `--tuned`; `--hold` repeats it until Ctrl-C.
"""

import argparse
import importlib.metadata
import math
import signal
from collections.abc import Callable
from typing import Any

import optuna
import zmq
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from rich.console import Console

from engine.link import ControllerLink, CurveKeys, Endpoints
from engine.protocol import VERSION, Knobs, Telemetry
from engine.tuned import SUFFIX, Tuned
from envs.slo import Slo
from profiles.tune_flags import check_limits
from profiles.tune_report import write_report
from profiles.tune_storage import open_storage, storage_errors
from profiles.tune_windows import LiveTuner, Window, tbt_bound_s

TICK_S = 0.2  # how often signals are looked after when no telemetry comes
SILENCE_S = 60.0  # an idle engine speaks several times within that
METRICS = ("tokens/s at the full budget", "TTFT (s)")
CONSTRAINT = "TBT at the full budget, above the SLO"


class LiveStudy:
    """The windows of one tuning as trials: each is running while it is measured, and told when it has ended."""

    def __init__(self, url: str, name: str, slo: Slo, bounds: tuple[int, int]) -> None:
        self.name = name
        self.windows: list[Window] = []
        self._bound_s, self._bounds = tbt_bound_s(slo), bounds
        self._trial: optuna.Trial | None = None
        self._study = optuna.create_study(storage=_storage(url), study_name=name, directions=("maximize", "minimize"))
        self._study.set_metric_names(list(METRICS))

    def begun(self, budget_tokens: int) -> None:
        self._study.enqueue_trial({"budget_tokens": budget_tokens})
        self._trial = self._study.ask()
        self._trial.suggest_int("budget_tokens", *self._bounds)

    def ended(self, window: Window) -> None:
        """A window without any iteration that spent its budget has no figures: its trial failed."""
        assert self._trial is not None
        self.windows.append(window)
        for name, value in _figures(window).items():
            self._trial.set_user_attr(name, value)
        if window.n_spent and window.ttft_s:
            self._trial.set_constraint(CONSTRAINT, window.quantile_s / self._bound_s - 1)
            self._study.tell(self._trial, (window.tokens_per_s, sum(window.ttft_s) / len(window.ttft_s)))
        else:
            self._study.tell(self._trial, state=TrialState.FAIL)
        self._trial = None

    def close(self) -> None:
        """A window that is left unfinished failed."""
        if self._trial is not None:
            self._study.tell(self._trial, state=TrialState.FAIL)


class Session:
    """One tuning of one engine: hears its telemetry, answers with the tuner's candidates.

    Raises ValueError when another controller answers it already, ConnectionError when the engine starts anew or falls
    silent.
    """

    def __init__(self, link: ControllerLink, clock: Callable[[], int], make: Callable[[Telemetry], LiveTuner]) -> None:
        self.tuner: LiveTuner | None = None
        self.first: Telemetry | None = None
        self._link = link
        self._clock = clock
        self._make = make
        self._sequence = 0

    def run(self, goes_on: Callable[[LiveTuner | None], bool]) -> None:
        heard_ns = self._clock()
        while goes_on(self.tuner):
            for telemetry in self._link.receive(TICK_S):
                heard_ns = self._clock()
                self._answer(telemetry)
            if self._clock() - heard_ns >= SILENCE_S * 1e9:
                raise ConnectionError(
                    f"no telemetry for {SILENCE_S:.0f} s: the engine does not run, or not by that name"
                )

    def _answer(self, telemetry: Telemetry) -> None:
        if self.tuner is None or self.first is None:
            if telemetry.knobs.source == "controller":
                raise ValueError(
                    "another controller answers this engine: end it, and wait for the engine's --knobs-ttl"
                )
            self._sequence, self.first, self.tuner = telemetry.knobs.sequence, telemetry, self._make(telemetry)
        if telemetry.engine_id != self.first.engine_id:
            raise ConnectionError(f"the engine started anew, as {telemetry.engine_id!r}: tune it again")
        if telemetry.knobs.sequence > self._sequence:
            raise ValueError("another controller has begun to answer this engine: end it, and tune again")
        self._sequence += 1
        decision = self.tuner.decide(telemetry)
        self._link.send(Knobs(VERSION, telemetry.engine_id, self._sequence, telemetry.iteration, *decision))


def run_live(
    args: argparse.Namespace, engine: Endpoints, keys: CurveKeys | None, clock: Callable[[], int], date: str
) -> int:
    """Tune, print the windows, write the tuned knobs and the report to `--out`; returns the exit status.

    It is 1 if no budget that was measured keeps the promise, and 130 if interrupted before the end: the engine then
    goes back to its own knobs. `clock` is monotonic, in ns. Raises ValueError for flags and a storage that will not do.
    """
    check_limits(args)
    slo = Slo.parse(args.slo)
    tbt_bound_s(slo)  # refused before anything begins
    args.out.mkdir(parents=True, exist_ok=True)
    url = args.storage or f"sqlite:///{(args.out / 'study.db').resolve()}"
    _storage(url)  # likewise
    console = Console()
    studies: list[LiveStudy] = []

    def make(first: Telemetry) -> LiveTuner:
        bounds = first.bounds.min_budget_tokens, first.bounds.max_budget_tokens
        study = LiveStudy(url, f"live-{first.engine_id}-{clock():x}", slo, bounds)
        studies.append(study)

        def ended(window: Window) -> None:
            study.ended(window)
            console.print(_line(window), soft_wrap=True)

        return LiveTuner(first, slo, args.trials, study.begun, ended)

    stopping = _signals()
    end_ns = clock() + (math.inf if args.timeout is None else args.timeout) * 1e9
    link = ControllerLink(zmq.Context(), [engine], keys)
    session = Session(link, clock, make)
    try:
        with storage_errors(url):
            session.run(lambda tuner: not stopping and clock() < end_ns and not (tuner and tuner.done))
        if stopping:
            return 130
        if reason := _failure(session.tuner, slo):
            console.print(f"{reason} Nothing is written: the engine goes back to its own knobs.", soft_wrap=True)
            return 1
        tuned = _conclude(session, studies[0], args, url, date, console)
        if args.hold:
            console.print(f"Holding {tuned.budget_tokens} tokens until Ctrl-C.")
            session.run(lambda _: not stopping)
        return 0
    finally:
        link.close()
        with storage_errors(url):
            for study in studies:
                study.close()


def _signals() -> list[bool]:
    """Has an element for every SIGINT and SIGTERM from now on."""
    heard: list[bool] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: heard.append(True))
    return heard


def _storage(url: str) -> RDBStorage:
    """Trials that are asked for one by one have no heartbeat, and are never begun again."""
    return open_storage(url, heartbeat=False)


def _failure(tuner: LiveTuner | None, slo: Slo) -> str:
    """Why nothing was found, and the remedy; "" if something was."""
    if tuner is None or tuner.edge_tokens is None:
        return "No window judged a budget. It needs time, and traffic."
    if tuner.hopeless:
        return (
            f"No budget keeps {slo} on this engine, not even its least, {tuner.budget_tokens} tokens: take a weaker "
            "--slo, or start it with a lower --min-budget."
        )
    if tuner.best_tokens is None:
        return (
            f"No budget that was measured keeps {slo}; one near {tuner.edge_tokens:.0f} tokens might: give more "
            "--trials or --timeout, and traffic."
        )
    return ""


def _conclude(
    session: Session, study: LiveStudy, args: argparse.Namespace, url: str, date: str, console: Console
) -> Tuned:
    """Write what was found, and answer with it from now on."""
    tuner, first = session.tuner, session.first
    assert tuner is not None and first is not None, "something was found"
    tuner.end()
    tuned, path = _tuned(tuner, first, study, args, date), args.out / f"live{SUFFIX}"
    tuned.save(path)
    report = args.out / "live.report.html"  # beside that of a tuning in simulation
    write_report(url, [study.name], tuned, report)
    settled = "" if tuner.settled else " It has not settled: give more --timeout or --trials."
    console.print(
        f"Tuned to {tuned.budget_tokens} tokens: {path}; report: {report}.{settled} The engine's own knobs are back "
        f"after its --knobs-ttl: hold these with pacer control --tuned {path}, or start it so.",
        soft_wrap=True,
    )
    return tuned


def _tuned(tuner: LiveTuner, first: Telemetry, study: LiveStudy, args: argparse.Namespace, date: str) -> Tuned:
    """What a running engine is, its telemetry does not tell: `Tuned.engine` is left open."""
    budget = tuner.budget_tokens
    slo = Slo.parse(args.slo)
    policy = f"static:budget={budget}"
    return Tuned(
        budget_tokens=budget,
        chunk_tokens=budget,
        max_requests=first.bounds.max_requests,
        tile_tokens=first.bounds.tile_tokens,
        kv_tokens=first.bounds.kv_tokens,
        policy=policy,
        laws={"static": policy},
        slo=str(slo),
        provenance={
            "source": "pacer tune --live",
            "date": date,
            "engine_id": first.engine_id,
            "study": study.name,
            "settled": tuner.settled,
            "edge_tokens": tuner.edge_tokens,
            "found_in_force": first.knobs.budget_tokens,
            "windows": [{"budget_tokens": w.budget_tokens, **_figures(w)} for w in study.windows],
            "versions": {name: importlib.metadata.version(name) for name in ("pacer", "optuna", "numpy")},
        },
    )


def _figures(window: Window) -> dict[str, Any]:
    """`backlog_tokens_per_s`: by how much the prompt tokens that wait grew while it was measured."""
    first, last = window.backlog_tokens
    quantile_s = window.quantile_s
    return {
        "tbt_quantile_s": None if math.isnan(quantile_s) else quantile_s,
        "iterations": window.iterations,
        "spent_iterations": window.n_spent,
        "late_iterations": window.n_late,
        "cut": window.cut,
        "seconds": window.seconds,
        "backlog_tokens_per_s": (last - first) / max(window.seconds, 1e-9),
    }


def _line(window: Window) -> str:
    figures = _figures(window)
    quantile_s = figures["tbt_quantile_s"]
    tbt = "no gap" if quantile_s is None else f"P{100 * window.slo.quantile:g} TBT {1e3 * quantile_s:.0f} ms"
    return (
        f"{window.budget_tokens:>6} tokens: {tbt} in {window.n_spent} iterations that spent them, {window.n_late} late"
        f"{', cut short' if window.cut else ''}; backlog {figures['backlog_tokens_per_s']:+.0f} tokens/s, "
        f"{window.seconds:.0f} s"
    )
