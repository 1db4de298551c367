"""`--tuned FILE` through the command line: a real engine starts by it, and who the file is not for is told so."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from live import Ear, Pacer, Served, free_port

from engine.config import EngineConfig, ModelSource
from engine.tuned import Tuned, facts_of
from envs.step_time import StepTimeModel

ROOT = Path(__file__).parent.parent
TUNED = Tuned(
    budget_tokens=192,
    chunk_tokens=128,
    max_requests=48,
    policy="static:budget=160",
    slo="tbt:100",
    engine=facts_of(ModelSource(threads=1), EngineConfig(), "sdpa"),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "here.tuned.json"
    TUNED.save(path)
    return path


@pytest.fixture(scope="module")
def served(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield Served(tmp_path_factory.mktemp("s"), "tuned", "--tuned", str(file), "--threads", "1", "--knobs-ttl", "1")
    Pacer.end_all()


def refusal(*command: str) -> str:
    """What a command that must end with status 2 says."""
    answer = subprocess.run(
        [sys.executable, "-m", "run", *command], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    return answer.stderr


def test_an_engine_falls_back_to_the_tuned_knobs(served: Served) -> None:
    ear = Ear(served.endpoints)
    heard = ear.wait_for(lambda t: t.knobs.source == "fallback", "its own knobs")
    ear.stop()
    assert (heard.knobs.budget_tokens, heard.knobs.chunk_tokens, heard.bounds.max_requests) == (192, 128, 48)


def test_the_controller_runs_the_tuned_law(served: Served, file: Path) -> None:
    address = ("--socket-dir", str(served.socket_dir), "--engine", served.name)
    ear = Ear(served.endpoints)
    controller = Pacer("control", *address, "--tuned", str(file))
    ear.wait_for(lambda t: t.knobs.source == "controller" and t.knobs.budget_tokens == 160, "the tuned law")
    controller.stop()
    ear.wait_for(lambda t: t.knobs.source == "fallback" and t.knobs.budget_tokens == 192, "the fallback again")
    ear.stop()


def test_a_law_that_predicts_has_its_step_time_model_in_the_file(served: Served, tmp_path: Path) -> None:
    model = StepTimeModel.load(ROOT / "profiles" / "data" / "h200-mistral-7b.json")
    predictive = msgspec.structs.replace(
        TUNED, policy="predictive:quantile=0.99", step_time=msgspec.to_builtins(model.description)
    )
    predictive.save(tmp_path / "predictive.tuned.json")
    address = ("--socket-dir", str(served.socket_dir), "--engine", served.name)
    ear = Ear(served.endpoints)
    controller = Pacer("control", *address, "--tuned", str(tmp_path / "predictive.tuned.json"))
    # It takes this CPU for an H200, on which 100 ms are enough for far more than the fallback's 192 tokens.
    ear.wait_for(lambda t: t.knobs.source == "controller" and t.knobs.budget_tokens > 1024, "the law that predicts")
    controller.stop()
    ear.stop()
    msgspec.structs.replace(predictive, step_time=None).save(tmp_path / "without.tuned.json")
    assert "add --profile FILE" in refusal("control", *address, "--tuned", str(tmp_path / "without.tuned.json"))


def test_a_controller_refuses_an_engine_with_other_bounds(served: Served, tmp_path: Path) -> None:
    msgspec.structs.replace(TUNED, max_requests=32).save(tmp_path / "other.tuned.json")
    address = ("--socket-dir", str(served.socket_dir), "--engine", served.name)
    told = refusal("control", *address, "--tuned", str(tmp_path / "other.tuned.json"))
    assert "max_requests 32, but the running engine has 48" in told


def test_flags_that_ask_for_another_engine_are_refused_at_once(file: Path, tmp_path: Path) -> None:
    told = refusal("serve", "--socket-dir", str(tmp_path / "s"), "--tuned", str(file), "--threads", "2")
    assert "device" in told
    assert "1 threads" in told


def test_what_only_the_loaded_engine_knows_is_refused_then(tmp_path: Path) -> None:
    other = msgspec.structs.replace(TUNED.engine, attention="flash-attn-4")
    msgspec.structs.replace(TUNED, engine=other).save(tmp_path / "gpu.tuned.json")
    place = ("--socket-dir", str(tmp_path / "s"), "--port", str(free_port()), "--threads", "1")
    told = refusal("serve", *place, "--tuned", str(tmp_path / "gpu.tuned.json"))
    assert "attention 'flash-attn-4', not 'sdpa'" in told
    msgspec.structs.replace(TUNED, kv_tokens=65_536).save(tmp_path / "here.tuned.json")
    told = refusal("serve", *place, "--tuned", str(tmp_path / "here.tuned.json"), "--kv-blocks", "128")
    assert "kv_tokens 65536, not 2048" in told
