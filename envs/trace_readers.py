"""Recorded requests, each file in its publisher's own format, plain or gzipped, to one form.

Every reader takes a path, and names the file and the line (or entry) of what it cannot read in a ValueError. Requests
without prompt or output tokens are failures in the public recordings: they are left out and counted in
`dropped_requests`. Rows are put in order of arrival; times count from the first.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from engine.tokenizer import load_tokenizer
from envs.trace_files import decoded_lines, open_trace, read_columns, refuse_row
from envs.workload import CSV_HEADER, FloatArray, IntArray, Lengths, Workload

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")

CHARACTERS_PER_TOKEN = 4
"""Without a tokenizer: OpenAI's rule of thumb for English text, one token for about four characters."""

SNIFFED_BYTES = 4096
MIN_SHAREGPT_TOKENS = 4
MAX_SHAREGPT_PROMPT_TOKENS = 1024
MAX_SHAREGPT_TOTAL_TOKENS = 2048


class _MooncakeRequest(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int


class _Turn(msgspec.Struct):
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Turn] = []


def read_csv(path: Path) -> Workload | Lengths:
    """Pacer's own CSV file, `arrival_s,prompt_tokens,output_tokens`; `Lengths` if every arrival is empty.

    Nothing is dropped or put in order here: a row that is not a request, or comes too early, is an error.
    """
    arrival_s, prompts, outputs = read_columns(path, CSV_HEADER, pa.float64(), may_be_empty=True)
    missing = np.flatnonzero(np.isnan(arrival_s))
    if 0 < len(missing) < len(arrival_s):
        raise ValueError(f"{path}: data row {missing[0]} has no arrival_s; give it to all rows, or to none")
    try:
        return Lengths(prompts, outputs) if len(missing) else Workload(arrival_s, prompts, outputs)
    except ValueError as error:
        raise ValueError(f"{path}, data {error}") from error


def read_azure(path: Path) -> Workload:
    """Azure LLM inference traces of 2023 and 2024 (github.com/Azure/AzurePublicDataset): CSV with the columns TIMESTAMP
    (date and time to 100 ns; with its UTC offset in 2024), ContextTokens, GeneratedTokens.
    """
    stamps, prompts, outputs = read_columns(path, AZURE_COLUMNS, pa.timestamp("ns"))
    # Whole nanoseconds are subtracted first: seconds since 1970 in a float would lose the last digits.
    return _in_order(path, (stamps - stamps.min()) / 1e9, prompts, outputs, header_rows=1)


def read_burstgpt(path: Path) -> Workload:
    """BurstGPT (github.com/HPMLL/BurstGPT): CSV with at least the columns Timestamp (seconds), Request tokens and
    Response tokens. All models and log types are read; vLLM's benchmark keeps the GPT-4 rows only.
    """
    arrival_s, prompts, outputs = read_columns(path, BURSTGPT_COLUMNS, pa.float64())
    return _in_order(path, arrival_s, prompts, outputs, header_rows=1)


def read_mooncake(path: Path) -> Workload:
    """Mooncake traces (github.com/kvcache-ai/Mooncake): JSON lines with timestamp (ms), input_length, output_length.

    `hash_ids`, the shared prefixes, are not used: every request computes its whole prompt.
    """
    requests = [(r.timestamp, r.input_length, r.output_length) for r in decoded_lines(path, _MooncakeRequest)]
    if not requests:
        raise ValueError(f"{path} is empty; a Mooncake trace has one JSON object on each line")
    milliseconds, prompts, outputs = (np.array(column) for column in zip(*requests, strict=True))
    return _in_order(path, (milliseconds - milliseconds.min()) / 1e3, prompts, outputs, header_rows=0)


def read_sharegpt(path: Path, count_tokens: Callable[[str], int] | None = None) -> Lengths:
    """ShareGPT's JSON, [{"conversations": [{"value": ...}, ...]}, ...], as vLLM's benchmark reads it.

    The first turn is the prompt, the second the output. Conversations of fewer turns are passed over; pairs under 4
    tokens on a side, over 1024 in the prompt, or over 2048 together are left out, and counted in `dropped_requests`.
    Without `count_tokens`, four characters count as a token.
    """
    count = count_tokens or _about_tokens
    with open_trace(path) as stream:
        try:
            entries = msgspec.json.decode(stream.read(), type=list[_Conversation])
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: cannot read it as ShareGPT conversations ({error}; $[n] is entry n)") from error
    turns = [entry.conversations[:2] for entry in entries if len(entry.conversations) >= 2]
    pairs = np.array([[count(turn.value) for turn in pair] for pair in turns], dtype=np.int64).reshape(-1, 2)
    kept = (pairs >= MIN_SHAREGPT_TOKENS).all(axis=1) & (pairs[:, 0] <= MAX_SHAREGPT_PROMPT_TOKENS)
    kept &= pairs.sum(axis=1) <= MAX_SHAREGPT_TOTAL_TOKENS
    if not kept.any():
        raise ValueError(f"{path}: none of {len(entries)} entries has two turns of usable length")
    return Lengths(pairs[kept, 0], pairs[kept, 1], int((~kept).sum()))


def tokenizer_count(folder: Path) -> Callable[[str], int]:
    """Counts a text's tokens, special ones included, with the tokenizer of a Hugging Face folder."""
    tokenizer = load_tokenizer(folder)
    return lambda text: len(tokenizer(text).input_ids)


READERS: dict[str, Callable[[Path], Workload | Lengths]] = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "burstgpt": read_burstgpt,
    "sharegpt": read_sharegpt,
    "csv": read_csv,
}


def read_named(kind: str, options: str) -> Workload | Lengths:
    """The file that `KIND:PATH` names, KIND one of `READERS`; "sharegpt" takes `PATH,tokenizer=FOLDER` as well."""
    path, _, folder = options.partition(",tokenizer=")
    if kind == "sharegpt" and folder:
        return read_sharegpt(Path(path), tokenizer_count(Path(folder)))
    return READERS[kind](Path(options))


def read_trace(path: Path) -> Workload | Lengths:
    """Reads requests in any format of `READERS`, told apart by the header or the first object of the content."""
    with open_trace(path) as stream:
        start = stream.read(SNIFFED_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        return read_sharegpt(path)
    if start.startswith(b"{"):
        keys = set(next(decoded_lines(path, dict[str, msgspec.Raw])))
        if {"timestamp", "input_length", "output_length"} <= keys:
            return read_mooncake(path)
        if "event" in keys:
            raise ValueError(f"{path} holds iterations, not requests: read it with read_forward_passes")
        raise ValueError(f"{path}: a JSON object with {', '.join(sorted(keys)) or 'nothing'} is no known request")
    header = start.split(b"\n")[0].decode(errors="replace").strip()
    for columns, reader in ((CSV_HEADER, read_csv), (AZURE_COLUMNS, read_azure), (BURSTGPT_COLUMNS, read_burstgpt)):
        if set(columns) <= set(header.split(",")):
            return reader(path)
    raise ValueError(f"{path} starts with {header[:80]!r}: no trace format of {', '.join(READERS)} does")


def _in_order(path: Path, arrival_s: FloatArray, prompts: IntArray, outputs: IntArray, header_rows: int) -> Workload:
    """The requests with tokens on both sides, sorted by arrival, from time 0 on; the others dropped and counted."""
    for row in np.flatnonzero((prompts < 0) | (outputs < 0) | ~np.isfinite(arrival_s))[:1]:
        refuse_row(path, int(row) + header_rows, "a time that is no number, or tokens below 0")
    kept = np.flatnonzero((prompts > 0) & (outputs > 0))
    if not kept.size:
        raise ValueError(f"{path}: none of its {len(prompts)} requests has prompt and output tokens")
    kept = kept[np.argsort(arrival_s[kept], kind="stable")]
    first_s = arrival_s[kept[0]]
    return Workload(arrival_s[kept] - first_s, prompts[kept], outputs[kept], 0, len(prompts) - len(kept))


def _about_tokens(text: str) -> int:
    return round(len(text) / CHARACTERS_PER_TOKEN)
