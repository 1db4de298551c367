"""Other systems' laws: their published values, cases computed by hand, and no telemetry that breaks any law."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plant import Loop

from engine.config import EngineConfig
from engine.protocol import (
    VERSION,
    BatchComposition,
    Bounds,
    Completion,
    Finished,
    InForce,
    QueueState,
    Telemetry,
    decode_telemetry,
    encode,
)
from envs.slo import Slo
from envs.step_time import StepTimeModel
from policies.catalogue import LAWS, parse_law
from policies.guard import Guard
from policies.peers import TrtllmTuner
from policies.peers_timed import SglangDynamicChunk
from policies.policy import Decision

PER_TOKEN_S, PER_PAIR_S = 1e-4, 2e-8
STEP_TIME = StepTimeModel.from_formula((5e-3, PER_TOKEN_S, 0.0), (5e-3, PER_TOKEN_S, 0.0, 0.0, 0.0))
QUADRATIC = StepTimeModel.from_formula((5e-3, PER_TOKEN_S, 0.0), (5e-3, PER_TOKEN_S, 0.0, PER_PAIR_S, 0.0))
SLO = Slo(tbt_s=0.1)
SECOND_NS = 1_000_000_000


def telemetry(
    batch: BatchComposition | None = None,
    queue: QueueState | None = None,
    completed: tuple[Completion, ...] = (),
    kv_usage: float = 0.0,
    scheduled_ns: int = 0,
    max_budget: int = 8192,
    kv_tokens: int = 880_000,
    max_requests: int = 2048,
) -> Telemetry:
    return Telemetry(
        version=VERSION,
        engine_id="e-1",
        iteration=1,
        scheduled_ns=scheduled_ns,
        schedule="stall-free",
        dead_time_iterations=1,
        knobs=InForce(512, 512, 1, 0, "controller"),
        bounds=Bounds(16, max_budget, 16, max_requests, kv_tokens),
        batch=batch or BatchComposition(),
        queue=queue or QueueState(),
        kv_usage=kv_usage,
        preemptions=0,
        rejected_knobs=0,
        completed=completed,
    )


def completion(
    completed_ns: int,
    tbt: dict[int, float] | None = None,
    ttft: dict[int, float] | None = None,
    finished: tuple[Finished, ...] = (),
) -> Completion:
    """An iteration that gave tokens to these slots, after these gaps."""
    tbt, ttft = tbt or {}, ttft or {}
    gaps, firsts = (tuple(tbt.values()), tuple(tbt)), (tuple(ttft.values()), tuple(ttft))
    return Completion(0, completed_ns - 20_000_000, completed_ns, 0.02, *gaps, *firsts, finished, ())


def decide(spec: str, *messages: Telemetry, step_time: StepTimeModel = STEP_TIME) -> Decision:
    """The law's answer to the last of these messages."""
    law = parse_law(spec, SLO, step_time).make(messages[0])
    return [law.decide(message) for message in messages][-1]


DECODES = BatchComposition(decode_tokens=10, decode_context_tokens=10_000)


# P-PAS


@pytest.mark.parametrize(
    ("decodes", "running", "waiting", "budget"),
    [(10, 10, 2, 2058), (10, 10, 1, 16384), (10, 11, 1, 2058), (0, 0, 5, 16384), (10, 10, 0, 16384)],
)
def test_ppas_caps_prompts_under_pressure_only(decodes: int, running: int, waiting: int, budget: int) -> None:
    batch = BatchComposition(decode_tokens=decodes, decode_context_tokens=1000 * decodes)
    prompts = (1000,) * (running - decodes + waiting)
    queue = QueueState(running, waiting, 1000 * waiting, 0.0, prompts, (0,) * len(prompts))
    assert decide("ppas", telemetry(batch, queue)).budget_tokens == budget


def test_ppas_does_not_count_a_prompt_that_ends_before_the_answer_acts() -> None:
    batch = BatchComposition(10, 10_000, 1, 300, (300,), (0,), 45_000.0)
    queue = QueueState(11, 1, 1000, 0.0, (300, 1000), (0, 0))
    assert decide("ppas", telemetry(batch, queue)).reason == "ppas no pressure"
    longer = msgspec.structs.replace(queue, prompt_remaining_tokens=(301, 1000))
    assert decide("ppas", telemetry(batch, longer)).chunk_tokens == 2048


# TensorRT-LLM: the values of its dynamicBatchTunerTest.cpp


@pytest.mark.parametrize(
    ("capacity", "size"),
    [(143, 128), (335, 256), (671, 512), (831, 768), (1279, 1024), (1663, 1536), (2049, 2048), (1665, 1665)],
)
def test_trtllm_batch_sizes_are_those_of_its_unit_test(capacity: int, size: int) -> None:
    assert TrtllmTuner.batch_size(capacity) == size


@pytest.mark.parametrize(
    ("prompt", "output", "requests", "tokens"),
    [
        (100, 2, 1, 8192),
        (100, 2, 256, 16384),
        (100, 100, 1, 4096),
        (100, 100, 4000, 8192),
        (2, 256, 1, 2048),
        (2, 256, 4000, 4096),
    ],
)
def test_trtllm_tokens_are_those_of_its_unit_test(prompt: int, output: int, requests: int, tokens: int) -> None:
    assert TrtllmTuner.max_num_tokens(requests, prompt / output) == tokens


def test_trtllm_goes_by_the_lengths_of_the_last_requests_and_the_kv_cache() -> None:
    """The cache has room for 5 requests of 4000; the table says 128."""

    def message(*lengths: tuple[int, int], max_requests: int = 2048) -> Telemetry:
        done = (completion(SECOND_NS, finished=tuple(Finished(0, 0, *pair) for pair in lengths)),)
        return telemetry(DECODES, QueueState(10), done, kv_tokens=20_000, max_requests=max_requests)

    assert decide("trtllm", message()).budget_tokens == 512
    assert decide("trtllm:window=1", message((3900, 100))).reason == "trtllm: 128 requests, prompt/output 39.00"
    assert decide("trtllm:window=1", message((3900, 100), (2000, 2000))).budget_tokens == 4096
    assert decide("trtllm:window=2", message((9, 9), (3900, 100), (2000, 2000))).reason.endswith("2.81")
    assert decide("trtllm:window=2", message((9, 9), (3900, 100), (2000, 2000))).budget_tokens == 8192
    assert decide("trtllm", message((3900, 100), max_requests=32)).reason.startswith("trtllm: 32 requests")


# gLLM


@pytest.mark.parametrize(
    ("kv_usage", "waiting", "waiting_tokens", "tokens"),
    [
        (0.05, 0, 0, 1940),  # round(2048 * 0.9 / 0.95), one prompt due: no third term
        (0.05, 4, 4000, 687),  # 5500 due // 8
        (0.05, 1, 50, 193),
        (0.96, 4, 4000, 0),  # below the threshold
        (0.90, 9, 90_000, 108),  # round(2048 * 0.05 / 0.95)
    ],
)
def test_gllm_throttles_by_kv_and_by_prompts_due(
    kv_usage: float, waiting: int, waiting_tokens: int, tokens: int
) -> None:
    waiting_each = (waiting_tokens // waiting,) * waiting if waiting else ()
    queue = QueueState(11, waiting, waiting_tokens, 0.0, (1500, *waiting_each), (0,) * (1 + waiting))
    decision = decide("gllm", telemetry(DECODES, queue, kv_usage=kv_usage))
    assert decision.budget_tokens == tokens + 10


def test_gllm_keeps_to_the_free_tokens_above_its_threshold() -> None:
    """A cache of 2,000 tokens with 0.45 of it free above the threshold: 900 tokens."""
    queue = QueueState(2, 0, 0, 0.0, (9000,), (0,))
    decision = decide("gllm:maxp=100000", telemetry(DECODES, queue, kv_usage=0.5, kv_tokens=2000))
    assert decision.chunk_tokens == 900


# Sarathi-Serve's schedule


@pytest.mark.parametrize(("done", "size"), [(0, 2048), (2047, 2048), (2048, 1536), (6144, 512), (99_999, 512)])
def test_sarathi_dynamic_shrinks_with_the_prompt(done: int, size: int) -> None:
    assert (
        decide("sarathi-dynamic", telemetry(DECODES, QueueState(11, 0, 0, 0.0, (500,), (done,)))).budget_tokens == size
    )


def test_sarathi_dynamic_rounds_its_sizes_to_32() -> None:
    def size(done: int) -> int:
        spec = "sarathi-dynamic:low=128,high=1000,max_tokens=3000,stages=3"
        return decide(spec, telemetry(DECODES, QueueState(11, 0, 0, 0.0, (9000,), (done,)))).budget_tokens

    assert [size(done) for done in (0, 1000, 2000)] == [992, 576, 128]


# SGLang


def test_sglang_keeps_the_time_of_a_chunk_as_the_prompt_grows() -> None:
    law = SglangDynamicChunk(telemetry(), QUADRATIC, chunk=4096, smooth=1.0)

    def alone_s(length: int) -> float:
        return QUADRATIC.mean_s(0, 0, 1, length, 0.5 * length * length)

    first_s = alone_s(4096) - 5e-3
    for done in (1000, 4096, 10_000):
        chunk = law.next_chunk(done)
        assert chunk % 64 == 0
        assert alone_s(done + chunk) - alone_s(done) <= first_s < alone_s(done + chunk + 64) - alone_s(done)
    assert law.next_chunk(0) == 4096
    assert law.next_chunk(10**7) == 1024, "never below a quarter"


def test_sglang_smooths_the_change_by_three_quarters() -> None:
    """With f(l) = a l^2 the next chunk is sqrt(L^2 + chunk^2) - L."""
    model = StepTimeModel.from_formula((0.0, 0.0, 0.0), (0.0, 0.0, 0.0, PER_PAIR_S, 0.0))
    exact, smooth = (SglangDynamicChunk(telemetry(), model, chunk=4096, smooth=s) for s in (1.0, 0.75))
    # 806.3, below the quarter of 4096; 4096 + 0.75 (806.3 - 4096) = 1628.7
    assert exact.next_chunk(10_000) == 1024
    assert smooth.next_chunk(10_000) == 1600
    # 2077.1; 4096 + 0.75 (2077.1 - 4096) = 2581.8
    assert exact.next_chunk(3000) == 2048
    assert smooth.next_chunk(3000) == 2560


def test_sglang_stays_static_where_time_is_no_quadratic_and_ignores_decodes() -> None:
    law = SglangDynamicChunk(telemetry(), STEP_TIME)
    law._a = -abs(law._a)  # what a fit to measurements may give
    assert law.next_chunk(20_000) == 8192
    crowd = msgspec.structs.replace(DECODES, decode_tokens=200, decode_context_tokens=400_000)
    few, many = (
        decide(
            "sglang",
            telemetry(batch, QueueState(batch.decode_tokens + 1, 0, 0, 0.0, (50_000,), (20_000,))),
            step_time=QUADRATIC,
        )
        for batch in (DECODES, crowd)
    )
    assert few.chunk_tokens == many.chunk_tokens < 8192
    assert many.budget_tokens - few.budget_tokens == 190


# vllm-ascend


def test_ascend_looks_its_budget_up_with_both_keys_rounded_up() -> None:
    """0.1 s - 5 ms at 0.1 ms a token is 950 tokens; and 5 + 0.1 b + 1e-5 (b - 16)^2 ms <= 100 ms up to b = 887."""
    assert decide("ascend", telemetry(DECODES, QueueState(10))).budget_tokens == 896
    decision = decide("ascend", telemetry(DECODES, QueueState(10)), step_time=QUADRATIC)
    assert decision == Decision(832, 832, "ascend: table of 16 decodes at 1024 tokens")


def test_ascend_falls_to_its_largest_budget_without_decodes_or_entry() -> None:
    assert decide("ascend", telemetry(queue=QueueState(0, 3, 900, 0.0, (300,) * 3, (0,) * 3))).budget_tokens == 8192
    slow = StepTimeModel.from_formula((0.2, 0.0, 0.0), (0.2, 0.0, 0.0, 0.0, 0.0))
    assert decide("ascend", telemetry(DECODES, QueueState(10)), step_time=slow).budget_tokens == 8192


# QoServe


def at_slack(slack_s: float, spec: str = "qoserve", kv_usage: float = 0.0) -> Decision:
    """Ten decodes, due `slack_s` after the next batch is formed.

    All had their first token at once. The step under way takes 6 ms and gives each a token: 94 ms more than now.
    """
    late_s = 6.0 + 0.2 + 0.094 - slack_s
    first = completion(SECOND_NS, ttft=dict.fromkeys(range(10), 0.0))
    later = SECOND_NS + round(late_s * 1e9)
    return decide(
        spec,
        telemetry(DECODES, QueueState(10), (first,), scheduled_ns=SECOND_NS),
        telemetry(DECODES, QueueState(10), scheduled_ns=later, kv_usage=kv_usage),
    )


@pytest.mark.parametrize(
    ("slack_s", "total"),
    # 1.2 (5 ms + 0.1 ms T) <= slack
    [
        (-1.0, 128),
        (0.0, 128),
        (0.01, 128),
        (0.0368, 256),
        (0.0367, 128),
        (0.1, 768),
        (0.2519, 2048),
        (0.313, 2552),
        (5, 2552),
    ],
)
def test_qoserve_spends_the_slack(slack_s: float, total: int) -> None:
    assert at_slack(slack_s).budget_tokens == total


def test_qoserve_low_memory_and_parameters() -> None:
    assert at_slack(5.0, kv_usage=0.97).budget_tokens == 512, "26,400 of 880,000 tokens are free"
    assert at_slack(5.0, kv_usage=0.96).budget_tokens == 2552, "35,200 are free"
    assert at_slack(0.02, kv_usage=0.97).budget_tokens == 128
    assert at_slack(0.1, "qoserve:margin=2").budget_tokens == 256
    assert at_slack(5.0, "qoserve:largest=1000").budget_tokens == 768
    assert at_slack(5.0, "qoserve:largest=3500").budget_tokens == 3320


def test_qoserve_without_decodes_takes_its_largest_total_and_newly_come_assumes_no_slack() -> None:
    assert decide("qoserve", telemetry(queue=QueueState(0, 1, 900, 0.0, (900,), (0,)))).budget_tokens == 2552
    assert decide("qoserve", telemetry(DECODES, QueueState(10))).reason == "qoserve: slack 100 ms"


# All laws


@pytest.mark.parametrize("spec", [name for name in LAWS if name != "static"])
def test_every_law_drives_an_engine_and_explains_each_decision(spec: str) -> None:
    loop = Loop(spec, 0.1, EngineConfig(kv_blocks=600), noise=0.04)
    loop.run_saturated(6)
    while loop.core.scheduler.has_work:
        loop.step()
    loop.step()
    assert loop.controller is not None
    assert loop.controller._guards["e-1"]._failures == 0
    for row in loop.journal:
        assert row.knobs is not None
        assert row.knobs.reason.startswith(spec.split("-", maxsplit=1)[0])
        assert "\n" not in row.knobs.reason


@pytest.mark.parametrize("spec", ["qoserve", "ascend"])
def test_a_peer_runs_as_published_whatever_the_promise(spec: str) -> None:
    law = parse_law(spec, SLO, STEP_TIME)
    assert law.tbt_slo_s is None
    start = msgspec.structs.replace(telemetry(), knobs=InForce(16, 16, 0, 0, "fallback"))
    decision = Guard(law).decide(start, 0)
    assert decision is not None
    assert decision.budget_tokens > 2500, "no slew limit"


counts = st.integers(0, 300)
tokens = st.integers(0, 200_000)
seconds = st.floats(1e-6, 1e3)


@st.composite
def batches(draw: st.DrawFn) -> BatchComposition:
    decodes = draw(counts)
    chunks = draw(st.lists(st.integers(1, 4096), max_size=4))
    contexts = [draw(tokens) for _ in chunks]
    attention = sum(c * (length + 0.5 * c) for c, length in zip(chunks, contexts, strict=True))
    composition = (len(chunks), sum(chunks), tuple(chunks), tuple(contexts), attention)
    return BatchComposition(decodes, decodes * draw(tokens), *composition)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    gaps, firsts = (draw(st.dictionaries(st.integers(0, 20), seconds, max_size=6)) for _ in range(2))
    slots = sorted({*gaps, *firsts})
    gone = draw(st.lists(st.sampled_from(slots), unique=True)) if slots else []
    lengths = st.integers(1, 200_000)
    finished = tuple(Finished(slot, draw(tokens), draw(lengths), draw(lengths)) for slot in gone)
    return msgspec.structs.replace(completion(0, gaps, firsts, finished), iteration=draw(st.integers(0, 5)))


@st.composite
def messages(draw: st.DrawFn) -> Telemetry:
    """Any telemetry that the wire lets through, but for its times; engines are not trusted to make sense."""
    prompts = draw(st.lists(st.tuples(tokens, tokens), max_size=20))
    remaining, context = zip(*prompts, strict=True) if prompts else ((), ())
    queue = QueueState(draw(counts), draw(counts), draw(tokens), draw(seconds), remaining, context)
    done = tuple(draw(st.lists(completions(), max_size=2)))
    return msgspec.structs.replace(
        telemetry(draw(batches()), queue, done, draw(st.floats(0, 1))),
        iteration=draw(st.integers(0, 5)),
        dead_time_iterations=draw(st.integers(1, 5)),
        bounds=Bounds(
            *(draw(st.integers(1, 64)), draw(st.integers(512, 16384)), draw(st.sampled_from([1, 16, 128]))),
            *(draw(st.integers(1, 4096)), draw(st.integers(1, 10**7))),
        ),
        knobs=InForce(draw(st.integers(1, 16384)), draw(st.integers(1, 16384)), 0, 0, "fallback"),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[Telemetry]:
    """Messages of one engine, whose monotonic clock goes on."""
    now_ns, history = draw(st.integers(0, 10**15)), []
    for message in draw(st.lists(messages(), min_size=1, max_size=6)):
        done = []
        for ended in message.completed:
            now_ns += draw(st.integers(1, 10**10))
            done.append(msgspec.structs.replace(ended, scheduled_ns=now_ns - 1, completed_ns=now_ns))
        history.append(msgspec.structs.replace(message, completed=tuple(done), scheduled_ns=now_ns))
    return history


@pytest.mark.parametrize("spec", LAWS)
@settings(max_examples=40, deadline=None)
@given(history=histories())
def test_no_telemetry_breaks_a_law(spec: str, history: list[Telemetry]) -> None:
    law = parse_law(spec, SLO, QUADRATIC)
    policy, guard = law.make(history[0]), Guard(law)
    for message in history:
        assert decode_telemetry(encode(message)) == message
        decision = policy.decide(message)
        assert decision.budget_tokens >= 0
        assert decision.chunk_tokens >= 0
        assert decision.reason.startswith(spec.split("-", maxsplit=1)[0])
        sent = guard.decide(message, message.scheduled_ns)
        assert sent is not None, "no law failed"
        bounds = message.bounds
        assert bounds.min_budget_tokens <= sent.chunk_tokens <= sent.budget_tokens <= bounds.max_budget_tokens
        policy.track(sent)
