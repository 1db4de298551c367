import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tokenizer import load_tokenizer
from envs.forward_passes import read_forward_passes
from envs.iterations import COMPOSITION, load_iterations, stretches
from envs.trace import Workload, make_workload, read_csv, write_csv
from envs.trace_readers import READERS, read_azure, read_burstgpt, read_mooncake, read_sharegpt, tokenizer_count

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:50,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,0,7
2024-05-10 00:00:02.509930+00:00,30,0
2024-05-10 01:00:03.509930+01:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,API log
118,GPT-4,417,276,693,Conversation log
"""
BURSTGPT_WITH_SESSIONS = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82-0a46,43,GPT-4,906,446,1352,Conversation log
19440161.5,d5983bf9-4b48,2,ChatGPT,36,29,65,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1, 2]}

{"timestamp": 3052, "input_length": 2287, "output_length": 0, "hash_ids": []}
{"timestamp": 3052, "input_length": 7234, "output_length": 794, "hash_ids": [0, 28]}
"""


def written(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def columns(trace: Workload) -> list[tuple[float, int, int]]:
    return list(zip(trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))


def turns(*texts: str) -> dict[str, list[dict[str, str]]]:
    return {"conversations": [{"from": "human", "value": text} for text in texts]}


CONVERSATIONS = [
    turns("p" * 40, "o" * 100, "a later turn"),
    turns("only a prompt, no answer"),
    {"id": "without conversations"},
    turns("p" * 8, "o" * 100),  # 2 tokens: too short
    turns("p" * 4100, "o" * 100),  # 1025 tokens: too long a prompt
    turns("p" * 4096, "o" * 4100),  # 1024 + 1025: too long together
    turns("p" * 4096, "o" * 4096),
]


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_azure_2023_counts_from_its_first_request(tmp_path: Path, name: str) -> None:
    read = read_azure(written(tmp_path, AZURE_2023, name))
    assert columns(read) == [(0.0, 374, 44), (pytest.approx(4.314579), 396, 109), (pytest.approx(63.31941), 879, 55)]
    assert read.dropped_requests == 0


def test_azure_2024_heeds_the_offset_and_drops_what_has_no_tokens(tmp_path: Path) -> None:
    read = read_azure(written(tmp_path, AZURE_2024))
    assert columns(read) == [(0.0, 2162, 5), (3.5, 2399, 6)]
    assert read.dropped_requests == 2


def test_burstgpt_drops_and_counts_failed_requests(tmp_path: Path) -> None:
    read = read_burstgpt(written(tmp_path, BURSTGPT))
    assert columns(read) == [(0.0, 472, 18), (113.0, 417, 276)]
    assert read.dropped_requests == 1
    sessions = read_burstgpt(written(tmp_path, BURSTGPT_WITH_SESSIONS))
    assert columns(sessions) == [(0.0, 906, 446), (51.5, 36, 29)]


def test_mooncake_counts_in_milliseconds(tmp_path: Path) -> None:
    read = read_mooncake(written(tmp_path, MOONCAKE, "trace.jsonl.gz"))
    assert columns(read) == [(0.0, 6755, 500), (3.052, 7234, 794)]
    assert read.dropped_requests == 1


def test_rows_out_of_order_are_sorted_and_equal_times_keep_theirs(tmp_path: Path) -> None:
    rows = [(30, 1), (10, 2), (20, 3), (10, 4)]
    lines = [json.dumps({"timestamp": ms, "input_length": n, "output_length": n}) for ms, n in rows]
    read = read_mooncake(written(tmp_path, "\n".join(lines)))
    assert columns(read) == [(0.0, 2, 2), (0.0, 4, 4), (0.01, 3, 3), (0.02, 1, 1)]


def test_sharegpt_takes_the_first_two_turns_within_the_limits_of_vllm(tmp_path: Path) -> None:
    read = read_sharegpt(written(tmp_path, json.dumps(CONVERSATIONS)))
    assert list(zip(read.prompt_tokens, read.output_tokens, strict=True)) == [(10, 25), (1024, 1024)]
    assert read.dropped_requests == 3


def test_sharegpt_counts_with_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    load_tokenizer(None).save_pretrained(tmp_path / "bytes")
    path = written(tmp_path, json.dumps([turns("hello there", "grüße"), turns("abc", "too short a prompt")]))
    workload = make_workload(
        "poisson:1", f"sharegpt:{path},tokenizer={tmp_path / 'bytes'}", np.random.default_rng(0), 5
    )
    assert set(zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)) == {(11, 7)}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("azure", AZURE_2023),
        ("azure", AZURE_2024),
        ("burstgpt", BURSTGPT),
        ("burstgpt", BURSTGPT_WITH_SESSIONS),
        ("mooncake", MOONCAKE),
        ("csv", "arrival_s,prompt_tokens,output_tokens\n0,5,1\n0.5,7,3\n"),
        ("csv", "arrival_s,prompt_tokens,output_tokens\r\n0,5,1\r\n"),
        ("csv", '"id","arrival_s","prompt_tokens","output_tokens"\n"x",0,5.0,1.0\n'),
        ("azure", AZURE_2024.replace("GeneratedTokens\n", "GeneratedTokens\n\n")),
    ],
)
def test_the_spec_replays_any_file_with_or_without_a_byte_order_mark(tmp_path: Path, kind: str, text: str) -> None:
    path = written(tmp_path, text, "some-file.gz")
    direct, marked = READERS[kind](path), READERS[kind](written(tmp_path, f"\ufeff{text}", "marked"))
    assert isinstance(direct, Workload)
    assert isinstance(marked, Workload)
    assert columns(marked) == columns(direct)
    replayed = make_workload("trace", f"{kind}:{path}", np.random.default_rng(0))
    assert columns(replayed) == columns(direct)
    assert replayed.dropped_requests == direct.dropped_requests


def test_sharegpt_passes_over_what_it_cannot_read_and_counts_it(tmp_path: Path) -> None:
    good = turns("p" * 40, "o" * 100)
    later = turns("p" * 44, "o" * 100, "later")
    later["conversations"][2] = {"from": "human", "value": None}  # type: ignore[dict-item]
    bad = [{"conversations": None}, turns("p" * 40), {"conversations": [{"value": 3}, {"value": "o" * 40}]}]
    text = json.dumps([good, later, *bad, turns("LONE" * 10, "o" * 40)]).replace("LONELONE", "LONE\\ud83d", 1)
    read = read_sharegpt(written(tmp_path, f"\ufeff{text}"))
    assert read.prompt_tokens.tolist() == [10, 11, 9]
    assert read.dropped_requests == 2, "not the one without an answer"
    path = written(tmp_path, "")
    path.write_bytes(json.dumps([good, later]).encode().replace(b"pppp", b"\xffppp", 1))
    assert read_sharegpt(path).prompt_tokens.tolist() == [10, 11]
    load_tokenizer(None).save_pretrained(tmp_path / "bytes")
    counted = read_sharegpt(written(tmp_path, text), tokenizer_count(tmp_path / "bytes"))
    assert counted.prompt_tokens.tolist() == [40, 44, 37]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("azure", AZURE_2023.replace("396", "3x6"), "line 3: cannot read '2023-11-16 18:15:50.9951690,3x6,109'"),
        ("azure", AZURE_2023.replace("\n2023-11-16 18:16:50", "\n\nnoon"), "line 5: cannot read"),
        ("azure", AZURE_2023.replace(",55", ""), "line 4: .*Expected 3 columns, got 2"),
        ("azure", AZURE_2023.replace("396", "-396"), "line 3: .*tokens below 0"),
        ("azure", AZURE_2023.replace("396", ""), "line 3: .*ContextTokens is empty"),
        ("azure", AZURE_2024.replace("2024-05-10 00:00:01+00:00", "2024-05-10 00:00:01"), "line 3: .*zone offset"),
        ("azure", AZURE_2023.replace("ContextTokens", "Context"), "the first line is 'TIMESTAMP,Context,Gen"),
        ("azure", AZURE_2023.splitlines()[0] + "\n", "no row below its header"),
        ("azure", "", "the first line is ''"),
        ("burstgpt", BURSTGPT.replace("118", "nan"), "line 4: .*a time that is no number"),
        ("burstgpt", BURSTGPT.replace("118,", ","), "line 4: .*Timestamp is empty"),
        ("burstgpt", BURSTGPT.replace(",18,", ",0,").replace(",276,", ",0,"), "none of its 3 requests"),
        ("mooncake", MOONCAKE.replace("7234", '"7234"'), r"line 4: .*Expected `int`, got `str` - at `\$.input_length`"),
        (
            "mooncake",
            MOONCAKE.replace('"output_length": 794, ', ""),
            "line 4: .*missing required field `output_length`",
        ),
        ("mooncake", MOONCAKE.replace("6755", "-1"), "line 1: .*tokens below 0"),
        ("mooncake", MOONCAKE[:-20], "line 4: .*truncated"),
        ("mooncake", "\n", "is empty"),
        ("burstgpt", BURSTGPT.replace(",18,", ",18.5,"), "line 2: .*no whole number"),
        ("mooncake", f"[{MOONCAKE}]", "line 1: .*Expected `object`"),
        ("sharegpt", f"[{MOONCAKE.splitlines()[0]}]", "none of 1 entries is a conversation"),
        ("sharegpt", "{}", "no list of ShareGPT conversations"),
        ("csv", "arrival_s,prompt_tokens,output_tokens\n0,1,1\n-1,1,1\n", "line 3: .*a finite number, 0 or more"),
        ("sharegpt", json.dumps([turns("short", "x")]), "none of 1 entries"),
        ("sharegpt", json.dumps(CONVERSATIONS)[:-5], "cannot read it as ShareGPT.s"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, kind: str, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        READERS[kind](path)
    assert str(path) in str(caught.value)


def test_a_gzip_file_cut_off_is_refused(tmp_path: Path) -> None:
    lines = "".join(f"{second},{1 + second % 977},{1 + second % 89}\n" for second in range(5000))
    path = written(tmp_path, "arrival_s,prompt_tokens,output_tokens\n" + lines, "cut.csv.gz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut off or damaged"):
        read_csv(path)


requests = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 10**5), st.integers(0, 10**4)), min_size=1, max_size=30
)


@given(requests)
def test_formats_agree_on_the_same_requests(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    burst = "Timestamp,Request tokens,Response tokens\n" + "".join(f"{ms / 1000!r},{p},{o}\n" for ms, p, o in rows)
    lines = [json.dumps({"timestamp": ms, "input_length": p, "output_length": o}) for ms, p, o in rows]
    moon = written(folder, "\n".join(lines), "moon")
    paths = ((read_burstgpt, written(folder, burst, "burst")), (read_mooncake, moon))
    usable = [row for row in rows if row[1] > 0 and row[2] > 0]
    if not usable:
        for reader, path in paths:
            with pytest.raises(ValueError, match="none of its"):
                reader(path)
        return
    expected = sorted(usable, key=lambda row: row[0])
    for reader, path in paths:
        read = reader(path)
        assert isinstance(read, Workload)
        assert read.dropped_requests == len(rows) - len(usable)
        assert list(zip(read.prompt_tokens, read.output_tokens, strict=True)) == [row[1:] for row in expected]
        np.testing.assert_allclose(read.arrival_s, [(row[0] - expected[0][0]) / 1000 for row in expected], atol=1e-9)
    again = folder / "again.csv"
    write_csv(again, read)
    copy = read_csv(again)
    assert isinstance(copy, Workload)
    assert columns(copy) == columns(read)


def forward_pass(counter: int, wall_time: float, worker: str = "4192", **scheduled: int) -> str:
    counts = ("num_prefill_requests", "sum_prefill_tokens", "sum_prefill_kv_tokens")
    batch = dict.fromkeys((*counts, "num_decode_requests", "sum_decode_kv_tokens"), 0)
    metrics = {"version": 1, "worker_id": worker, "dp_rank": 0, "counter_id": counter, "wall_time": wall_time}
    metrics |= {"scheduled_requests": batch | scheduled | {"var_prefill_length": 100.0}, "queued_requests": {}}
    source = {"namespace": "default", "component": "backend", "producer_id": worker}
    event = {"schema": "dynamo.fpm.trace.v1", "source": source, "capture_mode": "full", "fpm": metrics}
    return json.dumps({"timestamp": 1250, "event": event | {"observed_at_unix_ms": 1782777601250}}) + "\n"


def test_forward_passes_become_iterations(tmp_path: Path) -> None:
    lines = [
        forward_pass(1, 0.025, num_prefill_requests=2, sum_prefill_tokens=256, sum_prefill_kv_tokens=64),
        forward_pass(2, 0.010, num_decode_requests=3, sum_decode_kv_tokens=1024),
        forward_pass(1, 0.030, "b", num_prefill_requests=1, sum_prefill_tokens=100, sum_prefill_kv_tokens=1000),
    ]
    read = load_iterations(written(tmp_path, "".join(lines), "fpm.jsonl.gz"))
    # two prefills of 128 at context 32: 2 * 128 * (32 + 64); one of 100 at context 1000: 100 * (1000 + 50)
    assert [getattr(read, name).tolist() for name in ("seconds", *COMPOSITION)] == [
        [0.025, 0.010, 0.030],
        [0, 3, 0],
        [0, 1024, 0],
        [2, 0, 1],
        [256, 0, 100],
        [24_576, 0, 105_000],
    ]
    assert read.runs.tolist() == [0, 0, 1]
    assert read.intervals, "the time between two updates of the scheduler, whose stamps may be late"
    with pytest.raises(ValueError, match="has no device_s"):
        load_iterations(tmp_path / "fpm.jsonl.gz", "device_s")


def test_passes_of_a_worker_are_neighbours_if_it_counted_them_in_turn(tmp_path: Path) -> None:
    def decode(counter: int, seconds: float, worker: str) -> str:
        return forward_pass(counter, seconds, worker, num_decode_requests=1, sum_decode_kv_tokens=9)

    def prefill(counter: int, seconds: float, worker: str) -> str:
        return forward_pass(counter, seconds, worker, num_prefill_requests=1, sum_prefill_tokens=16)

    lines = [decode(1, 0.1, "a"), decode(7, 0.2, "b"), prefill(2, 0.3, "a"), decode(8, 0.4, "b"), decode(3, 0.5, "a")]
    lines += [forward_pass(4, 0.0, "a"), decode(5, 0.6, "a"), prefill(9, 0.7, "b"), decode(12, 0.8, "b")]
    read = read_forward_passes(written(tmp_path, "".join(lines), "fpm.jsonl"))
    assert read.seconds.tolist() == [0.1, 0.3, 0.5, 0.2, 0.4, 0.7, 0.6, 0.8]
    assert read.runs.tolist() == [0, 0, 0, 1, 1, 1, 2, 3], "idling ends a run, and so does what is left out"
    assert stretches(read).rows.tolist() == [3, 1, 2, 1, 1]


@pytest.mark.parametrize("name", ["fpm.jsonl", "fpm.jsonl.gz"])
def test_of_a_segment_that_is_still_being_written_the_complete_lines_are_read(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    lines = [forward_pass(i, random.random(), num_decode_requests=1) for i in range(1000)]
    path = written(tmp_path, "".join(lines), name)
    path.write_bytes(path.read_bytes()[:-40])
    read = read_forward_passes(path)
    assert 900 < len(read) < 1000
    assert read.seconds.tolist() == [json.loads(line)["event"]["fpm"]["wall_time"] for line in lines[: len(read)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (forward_pass(1, 0.01, num_decode_requests=1).replace("trace.v1", "trace.v2"), "line 1: .*dynamo.fpm.trace.v2"),
        (forward_pass(1, 0.01) + forward_pass(2, 0.01).replace('"version": 1', '"version": 2'), "line 2: .*version"),
        (forward_pass(1, 0.0), "holds no iteration"),
    ],
)
def test_other_forward_passes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_forward_passes(written(tmp_path, text))
