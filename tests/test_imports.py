"""The tree is the architecture: which room may import which, and what stays out of the laws and the wire."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("engine", "envs", "policies", "profiles", "controller")
MAY_IMPORT = {
    "engine": set[str](),
    "envs": {"engine"},
    "policies": {
        *("engine.protocol", "engine.compiled"),
        *("envs.codec", "envs.step_mean", "envs.step_time", "envs.slo"),
        *("envs.outlook", "envs.batch_choice", "envs.machine_speed", "envs.watch", "envs.features"),
    },
    "policies/train.py": {"envs"},  # what trains laws; nothing that drives an engine imports it
    "policies/scenarios.py": {"engine.config", "envs"},
    "profiles": {"engine", "envs", "policies"},
    "controller": {"engine.protocol", "engine.link", "policies"},
}
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
TORCH_FREE = (
    *("protocol", "link", "config", "request", "batching", "block_manager", "scheduler", "telemetry", "core"),
    *("step_input", "step_shapes", "layout", "shapes", "falcon", "model_config"),
    *("flags", "tuned", "philox", "prefix_cache"),
    *("parallel/messages", "parallel/runner"),
)


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_the_table_allows(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    own_rooms = {m for m in imported_modules(path) if m.split(".")[0] in {*ROOMS, "run", "tests", "benchmarks"}}
    allowed = MAY_IMPORT[room] | MAY_IMPORT.get(str(path.relative_to(ROOT)), set()) | {room}
    strangers = {m for m in own_rooms if not within(m, allowed)}
    assert not strangers, f"{room} must not import {strangers}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_time_and_randomness_are_injected(path: Path) -> None:
    banned = {m for m in imported_modules(path) if within(m, {"time", "random", "datetime", "uuid", "secrets"})}
    assert not banned - {"datetime.timedelta"}  # a length of time tells no time
    text = path.read_text()
    for unseeded in ("default_rng()", "np.random.rand", "np.random.seed", "torch.rand(", "manual_seed()"):
        assert unseeded not in text


@pytest.mark.parametrize("name", TORCH_FREE)
def test_the_engine_without_its_model_needs_no_torch(name: str) -> None:
    assert not {m for m in imported_modules(ROOT / "engine" / f"{name}.py") if within(m, {"torch", "transformers"})}


@pytest.mark.parametrize("module", ["controller.sidecar", "engine.scheduler", "policies.catalogue"])
def test_the_controller_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'gymnasium'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_trained_law_decides_without_torch() -> None:
    code = (
        "import sys; from envs.slo import Slo; from envs.step_time import StepTimeModel; "
        "from policies.catalogue import parse_law; from policies.rehearsal import _telemetry; "
        "law = parse_law('rl', Slo.parse('tbt:40'), StepTimeModel.from_formula((0.005, 0, 0), (0.005,) * 5)); "
        "assert law.make(_telemetry(1)).decide(_telemetry(1)).budget_tokens > 0; "
        "assert not {'torch', 'gymnasium', 'stable_baselines3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_packages_say_nothing_of_their_own() -> None:
    assert all(path.read_text() == "" for room in ROOMS for path in (ROOT / room).rglob("__init__.py"))


@pytest.mark.parametrize("path", [ROOT / "run.py", *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 50, f"{node.name} is long"
