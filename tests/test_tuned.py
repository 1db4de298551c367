"""`--tuned FILE`: what it sets, what stands above it, and which engines it refuses."""

import argparse
from pathlib import Path

import msgspec
import pytest

from engine import flags
from engine.config import EngineConfig, ModelSource
from engine.protocol import Bounds
from engine.tuned import EngineFacts, Tuned, facts_of

HERE = facts_of(ModelSource(threads=2), EngineConfig(), "sdpa")
TUNED = Tuned(
    budget_tokens=192,
    chunk_tokens=128,
    max_requests=48,
    policy="pid:set_point=0.9",
    laws={"static": "static:budget=192,chunk=128", "pid": "pid:set_point=0.9"},
    slo="tbt:100",
    engine=HERE,
    schedule="stall-free",
    tile_tokens=16,
    kv_tokens=65_536,
    max_model_tokens=2048,
    provenance={"seeds": [0, 1, 2]},
    step_time={"version": 2, "residuals": [0.5, 1.5]},
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    TUNED.save(tmp_path / "made" / "here.tuned.json")
    return tmp_path / "made" / "here.tuned.json"


def parsed(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    flags.add_tuned_flag(parser)  # as `launch`: the engine's flags and the controller's in one parser
    parser.add_argument("--policy")
    parser.add_argument("--slo")
    return parser.parse_args(["--threads", "2", *given])


def test_what_is_saved_is_read_back(file: Path) -> None:
    assert Tuned.load(file) == TUNED
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: b"{", "truncated"),
        (lambda data: data.replace(b'"version": 1', b'"version": 2'), "tune again"),
        (lambda data: data.replace(b'"slo"', b'"slow"'), "slow"),
        (lambda data: data.replace(b'"budget_tokens": 192', b'"budget_tokens": "many"'), "budget_tokens"),
        (lambda data: data.replace(b'"budget_tokens": 192', b'"budget_tokens": 64'), "no larger than the budget"),
        (lambda data: data.replace(b'"max_requests": 48', b'"max_requests": 0'), "max_requests is 0"),
    ],
)
def test_a_file_that_will_not_do_is_named_with_what_is_wrong(file: Path, change: object, told: str) -> None:
    assert callable(change)
    changed = change(file.read_bytes())
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    with pytest.raises(ValueError, match=r"here\.tuned\.json holds no tuned knobs") as raised:
        Tuned.load(file)
    assert told in str(raised.value)


def test_a_file_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json.*pacer tune"):
        Tuned.load(tmp_path / "none.json")


def test_an_engine_starts_with_the_tuned_knobs(file: Path) -> None:
    config = flags.engine_config(parsed("--tuned", str(file)))
    assert (config.budget_tokens, config.chunk_tokens, config.max_requests) == (192, 128, 48)
    without = flags.engine_config(parsed())
    assert (without.budget_tokens, without.chunk_tokens, without.max_requests) == (256, 256, 64)


@pytest.mark.parametrize(
    ("given", "knobs"),
    [
        (("--budget", "64"), (64, 64, 48)),
        (("--chunk", "64"), (192, 64, 48)),
        (("--budget", "512", "--chunk", "256"), (512, 256, 48)),
        (("--max-num-seqs", "8"), (192, 128, 8)),
    ],
)
def test_a_flag_that_is_given_stands_above_the_file(
    file: Path, given: tuple[str, ...], knobs: tuple[int, int, int]
) -> None:
    args = parsed("--tuned", str(file), *given)
    config = flags.engine_config(args)
    assert (config.budget_tokens, config.chunk_tokens, config.max_requests) == knobs
    found = flags.tuned(args)
    assert found is not None
    found.check_bounds(config.bounds)  # so `launch` starts what its own controller then accepts


def test_the_controller_takes_policy_and_promise_from_the_file_unless_they_are_given(file: Path) -> None:
    found = flags.tuned(parsed("--tuned", str(file)))
    assert found is not None
    assert (found.policy, found.slo) == ("pid:set_point=0.9", "tbt:100")
    found = flags.tuned(parsed("--tuned", str(file), "--policy", "aimd", "--slo", "tbt:50"))
    assert found is not None
    assert (found.policy, found.slo) == ("aimd", "tbt:50")
    assert flags.tuned(parsed()) is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--budget", "0"), "budget_tokens 0: both must be at least 1"),
        (("--chunk", "0"), "chunk_tokens 0 and budget_tokens 192"),
        (("--chunk", "99999"), "chunk_tokens 99999 .* no larger than the budget"),
        (("--max-num-seqs", "0"), "max_requests is 0"),
    ],
)
def test_a_flag_that_no_engine_could_take_is_refused_as_it_is_without_a_file(
    file: Path, given: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        flags.engine_config(parsed("--tuned", str(file), *given))
    with pytest.raises(ValueError, match=given[1]):
        flags.engine_config(parsed(*given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--threads", "1"), "device"),
        (("--shape", "yi-6b"), "model 'pacer-26m', not 'yi-6b'"),
        (("--dtype", "bfloat16"), "dtype 'float32', not 'bfloat16'"),
        (("--tensor-parallel-size", "2"), "tensor_parallel 1, not 2"),
        (("--pipeline-parallel-size", "2"), "pipeline_parallel 1, not 2"),
        (("--attention", "flashinfer"), "attention 'sdpa', not 'flashinfer'"),
        (("--max-num-batched-tokens", "128"), "outside"),
        (("--schedule", "prefill-first"), "schedule 'stall-free', not 'prefill-first'"),
        (("--tile", "64"), "tile_tokens 16, not 64"),
        (("--block-size", "16", "--kv-blocks", "1024"), "kv_tokens 65536, not 16384"),
        (("--max-model-len", "4096"), "max_model_tokens 2048, not 4096"),
    ],
)
def test_an_engine_of_another_kind_is_refused_before_it_starts(file: Path, given: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        flags.engine_config(parsed("--tuned", str(file), *given))


@pytest.mark.parametrize(
    "given",
    [
        ("--max-model-len", "1024"),
        ("--block-size", "16", "--kv-blocks", "9000"),
        ("--block-size", "16", "--kv-blocks", "3900"),  # 95.2 %: as a GPU's memory may come out another day
    ],
)
def test_an_engine_on_which_the_promise_is_easier_or_alike_may_start(
    file: Path, given: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    assert flags.engine_config(parsed("--tuned", str(file), *given)).budget_tokens == 192
    assert caplog.messages == []


def test_a_file_that_does_not_tell_its_engine_starts_with_a_warning(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    msgspec.structs.replace(TUNED, engine=EngineFacts()).save(file)
    flags.engine_config(parsed("--tuned", str(file)))
    (told,) = caplog.messages
    assert f"{file} does not tell which device and model" in told


def test_what_only_a_running_engine_knows_is_checked_then() -> None:
    cuda, config = ModelSource(device="cuda", dtype="bfloat16"), EngineConfig()
    asked = facts_of(cuda, config)
    assert (asked.device, asked.attention) == (None, None)
    tuned = msgspec.structs.replace(TUNED, engine=facts_of(cuda, EngineConfig(), "flash-attn-4", "NVIDIA H200"))
    tuned.check(asked, EngineConfig(block_tokens=0, kv_blocks=0))  # the loader settles them
    tuned.check(tuned.engine, config)
    with pytest.raises(ValueError, match=r"device 'NVIDIA H200', not 'NVIDIA A100'; attention .*pacer tune"):
        tuned.check(facts_of(cuda, config, "flash-attn-2", "NVIDIA A100"), config)
    with pytest.raises(ValueError, match="kv_tokens 65536, not 32768"):
        tuned.check(tuned.engine, EngineConfig(kv_blocks=2048))


def test_the_facts_are_those_of_a_profile() -> None:
    provenance = {"source": "pacer profile", "date": "today", **msgspec.to_builtins(HERE)}
    assert EngineFacts.of(provenance) == HERE
    nothing = EngineFacts.of({"sources": ["vllm"]})
    msgspec.structs.replace(TUNED, engine=nothing).check(HERE, EngineConfig())
    with pytest.raises(ValueError, match=r"tensor_parallel.*make it again with pacer profile"):
        EngineFacts.of(provenance | {"tensor_parallel": "two"})


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        (Bounds(16, 128, 16, 48, 65_536), "budget_tokens 192 is outside the running engine's 16..128"),
        (Bounds(160, 512, 16, 48, 65_536), "chunk_tokens 128 is outside"),
        (Bounds(16, 512, 16, 64, 65_536), "max_requests 48, but the running engine has 64"),
        (Bounds(16, 512, 32, 48, 65_536), "tile_tokens 16, not 32"),
        (Bounds(16, 512, 16, 48, 4096), "kv_tokens 65536, not 4096"),
    ],
)
def test_an_engine_with_other_bounds_is_told_from_its_telemetry(bounds: Bounds, told: str) -> None:
    TUNED.check_bounds(Bounds(16, 512, 16, 48, 65_536))
    with pytest.raises(ValueError, match=told):
        TUNED.check_bounds(bounds)
