"""What the README shows works: its commands are understood, its policy runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from plant import Loop

import run
from policies.catalogue import Law

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(text for kind, text in BLOCKS if kind == "sh").replace("\\\n", " ")
COMMANDS = [line.partition(" #")[0].strip() for line in SHELL.splitlines() if line.startswith("pacer ")]


def test_there_are_commands_to_check() -> None:
    assert {shlex.split(command)[1] for command in COMMANDS} >= {"launch", "bench", "serve", "control"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_understood(command: str) -> None:
    assert callable(run._parser().parse_args(shlex.split(command)[1:]).run)


def test_the_policy_of_the_readme_drives_an_engine() -> None:
    source = next(text for kind, text in BLOCKS if kind == "python" and "class Halve" in text)
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # the README is ours
    loop = Loop(None)
    loop.control_by(Law("halve", 0.1, lambda first: namespace["Halve"](first, 0.1)))
    loop.run_saturated(3)
    assert loop.budgets[-1] == loop.config.max_budget_tokens // 2
    assert all(Path(name).exists() for name in re.findall(r"\]\((\w+\.md)\)", README))


def test_every_file_of_the_tree_is_in_the_readme() -> None:
    tree = README[README.index("## The tree") : README.index("## What the loop costs")]
    root = Path(__file__).parent.parent
    for room in ("engine", "envs", "policies", "profiles", "controller"):
        missing = [p.name for p in (root / room).glob("*.py") if p.name != "__init__.py" and p.name not in tree]
        assert not missing, f"{room}: {missing}"
