"""The command line: what it refuses, and how it says so."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pacer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "run", *arguments], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )


@pytest.mark.parametrize("verb", ["serve", "control", "launch", "bench", "train", "demo"])
def test_every_verb_has_help(verb: str) -> None:
    answer = pacer(verb, "--help")
    assert answer.returncode == 0
    assert verb in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--budget", "99999"), "budget_tokens 99999 is outside"),
        (("serve", "--model", "/nowhere"), "/nowhere"),
        (("serve", "--listen", "tcp://127.0.0.1:5557"), "two addresses"),
        (("control", "--policy", "pid"), "--slo tbt:MILLISECONDS"),
        (("control", "--policy", "pid:speed=3", "--slo", "tbt:100"), "no parameter 'speed'"),
        (("control", "--policy", "static", "--curve-key", "x"), "--curve-peer"),
        (("control", "--policy", "static", "--slo", "tbt"), "tbt"),
        (("bench", "--base-url", "http://127.0.0.1:9", "--num-prompts", "1"), "127.0.0.1:9"),
        (("bench", "--arrivals", "sometimes:3", "--num-prompts", "1"), "sometimes"),
    ],
)
def test_bad_input_ends_with_the_reason_and_no_traceback(arguments: tuple[str, ...], message: str) -> None:
    answer = pacer(*arguments)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_no_command_waits_for_the_statistics_of_another() -> None:
    code = "import sys, run; run._parser(); assert not {'scipy.stats', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
