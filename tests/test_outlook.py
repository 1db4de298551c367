"""What a law foresees of the batch that its answer acts on, held against the batch that then is formed."""

from collections import deque
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from plant import Loop
from test_peers import telemetry

from engine.config import EngineConfig
from engine.protocol import MOST_PROMPTS, BatchComposition, InForce, QueueState, Telemetry
from envs.outlook import Outlook, foresee
from envs.simulator import Plant, Simulation
from envs.step_time import StepTimeModel
from envs.workload import Workload

MODEL = StepTimeModel.from_formula((5e-3, 1e-5, 4e-8), (6e-3, 5e-5, 4e-8, 1e-9, 3e-4)).with_noise(0.1)
TILE = 16
NEVER_ENDS = 4000
NOTHING = np.zeros((0, 2))


def engine(budget: int = 256, chunk: int = 256) -> EngineConfig:
    """Room for everybody: nothing is preempted, nobody waits for a seat."""
    return EngineConfig(
        budget_tokens=budget,
        chunk_tokens=chunk,
        max_budget_tokens=2048,
        max_requests=512,
        max_model_tokens=16_384,
        kv_blocks=100_000,
        tile_tokens=TILE,
    )


def listed(heard: Telemetry) -> list[list[int]]:
    return [*map(list, zip(heard.queue.prompt_remaining_tokens, heard.queue.prompt_context_tokens, strict=True))]


def under(heard: Telemetry, budget: int) -> Telemetry:
    """Its batch was formed under this budget."""
    return msgspec.structs.replace(heard, knobs=InForce(budget, budget, 0, 0, "controller"))


def same(outlook: Outlook, after: Telemetry) -> None:
    """Exactly what telemetry says when the batch is formed, of as many prompts as were listed."""
    assert outlook.decodes == after.batch.decode_tokens
    assert outlook.decode_context_tokens == after.batch.decode_context_tokens
    assert outlook.prompts.tolist() == listed(after)[: len(outlook.prompts)]
    if not outlook.behind_requests:
        assert outlook.prompts.tolist() == listed(after)


@pytest.mark.parametrize("dead_time", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_foresight_is_what_the_simulator_then_forms(dead_time: int, seed: int) -> None:
    """Random knobs, a chunk often far below the budget: several prompts at once. No request ends, none arrives."""
    rng = np.random.default_rng(seed)
    prompts = np.exp(rng.uniform(np.log(100), np.log(6000), 60)).astype(np.int64)
    workload = Workload(np.zeros(60), prompts, np.full(60, NEVER_ENDS))
    simulation = Simulation(Plant(engine(), MODEL, dead_time), workload)
    under_way = deque([(256, 256)] * (dead_time - 1), maxlen=dead_time - 1)
    foreseen: deque[Outlook] = deque()
    at_once, deepest = list[int](), 0
    computed = 0

    def decide(heard: Telemetry, now_ns: int) -> tuple[int, int, str]:
        nonlocal deepest, computed
        if len(foreseen) == dead_time:
            outlook = foreseen.popleft()
            same(outlook, heard)
            assert outlook.n_prompts == len(prompts) - heard.batch.decode_tokens
            assert outlook.prompt_tokens == int(prompts.sum()) - computed
            at_once.append(heard.batch.prefill_requests)
            deepest = max(deepest, outlook.behind_requests)
        computed += heard.batch.prefill_tokens
        foreseen.append(foresee(heard, under_way))
        budget = int(rng.integers(16, 1024 // TILE)) * TILE
        knobs = budget, int(rng.integers(budget // TILE // 8, budget // TILE + 1)) * TILE
        under_way.append(knobs)
        return *knobs, "random"

    simulation.run_law(decide, until_s=20.0)
    assert simulation.outcome().produced.min() > 0, "all prompts were computed"
    assert len(at_once) > 100
    assert max(at_once) > 2, "several prompts share a batch"
    assert deepest > 60 - MOST_PROMPTS - 5, "and more wait than telemetry lists"


@pytest.mark.parametrize(("budget", "chunk"), [(256, 256), (512, 96), (32, 32), (1024, 128)])
def test_foresight_is_what_the_live_core_then_forms(budget: int, chunk: int) -> None:
    loop = Loop(None, config=engine(budget, chunk))
    lengths = np.exp(np.random.default_rng(2).uniform(np.log(100), np.log(6000), 40)).astype(int)
    for i, length in enumerate(lengths.tolist()):
        loop.submit(str(i), length, NEVER_ENDS)
    now = loop.step()
    at_once = 0
    for _ in range(300):
        outlook, now = foresee(now), loop.step()
        same(outlook, now)
        at_once = max(at_once, now.batch.prefill_requests)
    assert at_once >= budget // chunk
    assert now.batch.decode_tokens > 0


def test_requests_that_end_are_all_that_foresight_does_not_know() -> None:
    loop = Loop(None, config=EngineConfig(budget_tokens=512, chunk_tokens=96))
    loop.run_saturated(20, streams=12)
    ends = 0
    for now, after in zip(loop.link.published, loop.link.published[1:], strict=False):
        outlook = foresee(now)
        ended = [f for c in after.completed for f in c.finished]
        assert outlook.decodes - len(ended) == after.batch.decode_tokens
        their_context = sum(f.prompt_tokens + f.output_tokens - 1 for f in ended)
        assert outlook.decode_context_tokens - their_context == after.batch.decode_context_tokens
        assert outlook.prompts.tolist() == listed(after)[: len(outlook.prompts)], "others may have come since"
        ends += bool(ended)
    assert ends > 20


def test_behind_the_listed_prompts_wait_those_that_telemetry_only_counts() -> None:
    """20 prompts of 100 tokens begun or waiting; of the second, under way, 40 are computed before and 60 now."""
    batch = BatchComposition(1, 500, 1, 60, (60,), (40,), 60 * 70.0)
    queue = QueueState(2, 19, 1900, 1.0, (60, *(100,) * (MOST_PROMPTS - 1)), (40, *(0,) * (MOST_PROMPTS - 1)))
    outlook = foresee(under(telemetry(batch, queue), 61))
    assert (outlook.decodes, outlook.decode_context_tokens) == (2, 501 + 100)
    assert outlook.prompts.tolist() == [[100, 0]] * (MOST_PROMPTS - 1)
    assert (outlook.behind_requests, outlook.behind_tokens) == (4, 400)
    assert (outlook.n_prompts, outlook.prompt_tokens) == (19, 1900)
    assert outlook.head_context_tokens == 0


def test_what_is_missing_of_the_knobs_under_way_are_those_in_force() -> None:
    batch = BatchComposition(2, 1000, 1, 30, (30,), (0,), 450.0)
    queue = QueueState(3, 0, 0, 0.0, (500,), (0,))
    heard = msgspec.structs.replace(under(telemetry(batch, queue), 64), dead_time_iterations=3)
    assert foresee(heard).prompts.tolist() == [[500 - 30 - 62 - 62, 30 + 62 + 62]]
    assert foresee(heard, [(128, 16)]).prompts.tolist() == [[500 - 30 - 16 - 62, 30 + 16 + 62]]
    assert foresee(heard, [(128, 16), (1024, 1024)]).prompts.tolist() == [], "it ends before our batch"
    assert foresee(heard, [(128, 16), (1024, 1024)]).decodes == 3
    assert foresee(heard, [(2, 2), (1, 1)]).prompts.tolist() == [[470, 30]], "decodes take the whole budget"


@pytest.mark.parametrize(
    ("kv_tokens", "max_requests", "budget", "left"),
    [
        (6000, 8, 32, [[470, 30], [300, 0], [2000, 0], [400, 0]]),  # there is room for all
        (4000, 8, 32, [[470, 30], [300, 0]]),  # 2000 tokens free: not for the second who waits, so for none behind it
        (6000, 5, 32, [[470, 30], [300, 0], [2000, 0]]),  # two seats
        (6000, 3, 32, [[470, 30]]),
        (6000, 8, 64, [[470, 30]]),  # tokens were left over, and the first who waits has not got them
    ],
)
def test_those_for_whom_there_is_no_room_are_not_served(
    kv_tokens: int, max_requests: int, budget: int, left: list[list[int]]
) -> None:
    batch = BatchComposition(2, 1000, 1, 30, (30,), (0,), 450.0)
    queue = QueueState(3, 3, 2700, 1.0, (500, 300, 2000, 400), (0, 0, 0, 0))
    heard = telemetry(batch, queue, kv_usage=0.5, kv_tokens=kv_tokens, max_requests=max_requests)
    outlook = foresee(under(heard, budget))
    assert outlook.prompts.tolist() == left
    assert (outlook.n_prompts, outlook.prompt_tokens) == (4, 3170), "the others are there all the same"
    assert outlook.held_requests == 4 - len(left)


def test_who_decodes_in_other_microbatches_has_begun_no_prompt() -> None:
    """40 run, 10 of them decode in this batch, 30 in others; no seat is free for the five who wait."""
    queue = QueueState(40, 5, 500, 1.0, (100,) * 5, (0,) * 5)
    heard = telemetry(BatchComposition(10, 10_000), queue, max_requests=40)
    outlook = foresee(under(heard, 10))
    assert len(outlook.prompts) == 0
    assert (outlook.held_requests, outlook.held_tokens) == (5, 500)


def test_a_prompt_that_the_prefix_cache_holds_is_foreseen_even_without_room() -> None:
    """Should a seat become free, its context would be in the batch; others that fill it have none."""
    queue = QueueState(2, 2, 900, 1.0, (600, 300), (30_000, 0))
    heard = telemetry(BatchComposition(2, 2000), queue, max_requests=2)
    assert foresee(under(heard, 2)).prompts.tolist() == [[600, 30_000], [300, 0]]


@pytest.mark.parametrize("dead_time", [1, 2, 3])
def test_a_full_kv_cache_lets_nobody_past_the_prompts_that_run(dead_time: int) -> None:
    """Who waits is short and would be served first, if the long one at the head of the queue were not in the way."""
    prompts = np.array([6000, 6000, 3000, *[50] * 20])
    workload = Workload(np.zeros(23), prompts, np.full(23, NEVER_ENDS))
    config = replace(engine(), kv_blocks=13_000 // 16, max_model_tokens=12_000)
    simulation = Simulation(Plant(config, MODEL, dead_time), workload)
    under_way = deque([(256, 256)] * (dead_time - 1), maxlen=dead_time - 1)
    foreseen: deque[Outlook] = deque()
    knobs = (512, 96), (512, 512)
    compared = 0

    def decide(heard: Telemetry, now_ns: int) -> tuple[int, int, str]:
        nonlocal compared
        if len(foreseen) == dead_time:
            left = [prompt for prompt in listed(heard) if prompt not in ([3000, 0], [50, 0])]
            assert foreseen.popleft().prompts.tolist() == left
            compared += 1
        foreseen.append(foresee(heard, under_way))
        answer = knobs[heard.iteration % 2]
        under_way.append(answer)
        return *answer, "by turns"

    simulation.run_law(decide, until_s=0.7)
    assert compared > 15
    assert simulation.outcome().produced[2:].max() == 0, "they still wait"


def test_an_idle_engine_leaves_nothing_to_foresee() -> None:
    assert foresee(telemetry())._replace(prompts=NOTHING) == Outlook(0, 0, NOTHING, 0, 0)
    assert foresee(telemetry()).prompts.shape == NOTHING.shape
    assert foresee(telemetry()).head_context_tokens == 0
