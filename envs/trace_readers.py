"""Recorded requests, each file in its publisher's own format, plain or gzipped, to one form.

Every reader takes a path, and names the file and the line (or entry) of what it cannot read in a ValueError. Requests
without prompt or output tokens are failures in the public recordings: they are left out and counted in
`dropped_requests`. Rows are put in order of arrival; times count from the first.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

MIN_SHAREGPT_TOKENS = 4
MAX_SHAREGPT_PROMPT_TOKENS = 1024
MAX_SHAREGPT_TOTAL_TOKENS = 2048


class _MooncakeRequest(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int


class _Turn(msgspec.Struct):
    value: Any = None  # what is wrong with a later turn does not matter


class _Conversation(msgspec.Struct):
    conversations: list[_Turn] = []


def read_csv(path: Path) -> Workload | Lengths:
    """Pacer's own CSV file, `arrival_s,prompt_tokens,output_tokens`; `Lengths` if every arrival is empty.

    Nothing is dropped here: a row that is no request is an error. The rows may be in any order of arrival.
    """
    arrival_s, prompts, outputs = read_columns(path, CSV_HEADER, pa.float64(), may_be_empty=True)
    missing = np.flatnonzero(np.isnan(arrival_s))
    if 0 < len(missing) < len(arrival_s):
        raise ValueError(f"{path}: data row {missing[0]} has no arrival_s; give it to all rows, or to none")
    for row in np.flatnonzero((arrival_s < 0) | np.isinf(arrival_s))[:1]:
        refuse_row(path, int(row) + 1, "arrival_s must be a finite number, 0 or more")
    try:
        lengths = Lengths(prompts, outputs)
    except ValueError as error:
        raise ValueError(f"{path}, data {error}") from error
    order = np.argsort(arrival_s, kind="stable")
    return lengths if len(missing) else Workload(arrival_s[order], prompts[order], outputs[order])


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
    tokens on a side, over 1024 in the prompt, or over 2048 together are left out, and so are entries that cannot be
    read: `dropped_requests` counts both. Without `count_tokens`, four characters count as a token.
    """
    count = count_tokens or _about_tokens
    with open_trace(path) as stream:
        try:
            # Not msgspec: that stops at half a surrogate pair, and people do cut emojis in two.
            entries = json.loads(stream.read().decode(errors="replace"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: cannot read it as ShareGPT's conversations ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f'{path} is no list of ShareGPT conversations: [{{"conversations": [...]}}, ...]')
    conversations = [_first_texts(entry) for entry in entries]
    turns = [texts for texts in conversations if texts is not None and len(texts) == 2]
    pairs = np.array([[count(text) for text in texts] for texts in turns], dtype=np.int64).reshape(-1, 2)
    kept = (pairs >= MIN_SHAREGPT_TOKENS).all(axis=1) & (pairs[:, 0] <= MAX_SHAREGPT_PROMPT_TOKENS)
    kept &= pairs.sum(axis=1) <= MAX_SHAREGPT_TOTAL_TOKENS
    if not kept.any():
        raise ValueError(f"{path}: none of {len(entries)} entries is a conversation with two turns of usable length")
    return Lengths(pairs[kept, 0], pairs[kept, 1], int((~kept).sum()) + conversations.count(None))


def _first_texts(entry: Any) -> list[str] | None:
    """What the first two turns say, or the only one; None if the entry or one of them is nothing of the kind."""
    try:
        texts = [turn.value for turn in msgspec.convert(entry, _Conversation).conversations[:2]]
    except msgspec.ValidationError:
        return None
    return texts if all(isinstance(text, str) for text in texts) else None


def tokenizer_count(folder: Path) -> Callable[[str], int]:
    """Counts a text's tokens, special ones included, with the tokenizer of a Hugging Face folder."""
    tokenizer = load_tokenizer(folder)
    return lambda text: len(tokenizer(text.encode(errors="replace").decode()).input_ids)


READERS: dict[str, Callable[[Path], Workload | Lengths]] = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "burstgpt": read_burstgpt,
    "sharegpt": read_sharegpt,
    "csv": read_csv,
}


def read_named(kind: str, options: str) -> Workload | Lengths:
    """The file that `KIND:PATH` names, KIND one of `READERS`; "sharegpt" takes `PATH,tokenizer=FOLDER` as well."""
    if not options:
        raise ValueError(f"{kind!r} names no file: write {kind}:PATH")
    path, _, folder = options.partition(",tokenizer=")
    if kind == "sharegpt" and folder:
        return read_sharegpt(Path(path), tokenizer_count(Path(folder)))
    return READERS[kind](Path(options))


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
