"""The /metrics page: latencies from the request path, the engine's state from its telemetry."""

import pytest
from served_wire import LAST, Server, WireEnd, engine_fixture, raw_request, server_fixture, until  # noqa: F401 (pytest finds fixtures by import)

from engine.protocol import VERSION, BatchComposition, Bounds, Completion, InForce, QueueState, Telemetry, encode
from engine.request import Submit, TokenOutput


def test_latency_metrics_are_the_injected_clocks_differences(engine: WireEnd, server: Server) -> None:
    engine.now_ns = 1_000_000_000
    connection = raw_request(server, {"prompt": "four", "stream": True})
    submit = engine.receive(Submit)
    for now_s, output in (
        (1.25, TokenOutput(submit.request_id, ord("a"), queue_s=0.125, cached_tokens=2)),
        (1.5, TokenOutput(submit.request_id, ord("b"))),
        (2.5, TokenOutput(submit.request_id, ord("c"), LAST)),
    ):
        engine.now_ns = int(now_s * 1e9)
        engine.send(output)
        expected = b'"text":"%c"' % output.token_id
        while expected not in connection.recv(65536):  # the server has read the clock for it by then
            pass
    connection.close()
    found = server.metrics()
    assert {name: found[name] for name in found if name.startswith("vllm:") and name.endswith(("_sum", "_count"))} == {
        "vllm:time_to_first_token_seconds_sum": 0.25,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_sum": 1.25,
        "vllm:inter_token_latency_seconds_count": 2,
        "vllm:request_time_per_output_token_seconds_sum": 0.625,
        "vllm:request_time_per_output_token_seconds_count": 1,
        "vllm:e2e_request_latency_seconds_sum": 1.5,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:request_queue_time_seconds_sum": 0.125,
        "vllm:request_queue_time_seconds_count": 1,
        "vllm:iteration_tokens_total_sum": 0,
        "vllm:iteration_tokens_total_count": 0,
    }
    assert found["vllm:request_success_total{length}"] == 1
    assert (found["vllm:prompt_tokens_total"], found["vllm:generation_tokens_total"]) == (4, 3)
    assert (found["vllm:prefix_cache_queries_total"], found["vllm:prefix_cache_hits_total"]) == (4, 2)


def telemetry(engine_id: str, iteration: int, preemptions: int, rejected: int, fallback: bool) -> Telemetry:
    source = InForce(384, 128, 9, 41, "fallback" if fallback else "controller")
    batch = BatchComposition(decode_tokens=3, prefill_tokens=17) if iteration else BatchComposition()
    nothing: tuple[tuple[()], ...] = ((), (), (), (), (), ())
    done = (Completion(iteration - 1, 0, 1, 0.004, *nothing), Completion(iteration, 1, 2, 0.008, *nothing))
    return Telemetry(
        version=VERSION,
        engine_id=engine_id,
        iteration=iteration,
        scheduled_ns=0,
        schedule="stall-free",
        dead_time_iterations=1,
        knobs=source,
        bounds=Bounds(16, 2048, 16, 64, 65_536),
        batch=batch,
        queue=QueueState(running_requests=4, waiting_requests=2, waiting_prompt_tokens=77),
        kv_usage=0.25,
        preemptions=preemptions,
        rejected_knobs=rejected,
        completed=done if iteration else (),
    )


def test_engine_metrics_follow_the_telemetry_through_an_engine_restart(engine: WireEnd, server: Server) -> None:
    assert server.get("/health")[0] == 200
    engine.wait_for_subscriber()
    engine.publish(encode(telemetry("one", 42, preemptions=5, rejected=1, fallback=False)))
    engine.publish(b"garbage")
    engine.publish(encode(telemetry("one", 0, preemptions=6, rejected=1, fallback=False)))
    engine.publish(encode(telemetry("two", 43, preemptions=2, rejected=0, fallback=True)))
    until(lambda: server.metrics()["pacer:knobs_source{fallback}"] == 1)
    expected = {
        "vllm:num_requests_running": 4,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:num_preemptions_total": 8,
        "vllm:iteration_tokens_total_count": 2,
        "vllm:iteration_tokens_total_sum": 40,
        "pacer:token_budget": 384,
        "pacer:chunk_tokens": 128,
        "pacer:knobs_source{controller}": 0,
        "pacer:rejected_knobs_total": 1,
        "pacer:step_seconds_count": 4,
        "pacer:step_seconds_sum": 0.024,
        "pacer:waiting_prompt_tokens": 77,
    }
    found = server.metrics()
    assert {name: found[name] for name in expected} == pytest.approx(expected)
