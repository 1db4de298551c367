"""What a replay measured, in the words of `vllm bench serve`: the same console lines and the same JSON keys.

As there, latencies are those of completed requests, ITL is the gap between two streamed chunks, TPOT is
(E2EL - TTFT) / (output tokens - 1), percentiles are numpy's linear ones, and the SLO is judged per request. Unlike
there, a request that was still running at the end is counted as unfinished, and a statistic of nothing is None, not 0.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.slo import Slo
from profiles.load import LoadResult, RequestRecord

DETAIL_KEYS = (
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "latencies",
    "start_times",
    "queue_times",
    "statuses",
    "errors",
)
_METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
_TOTAL_LINES = (
    ("Successful requests:", "completed", "d"),
    ("Failed requests:", "failed", "d"),
    ("Benchmark duration (s):", "duration", ".2f"),
    ("Total input tokens:", "total_input_tokens", "d"),
    ("Total generated tokens:", "total_output_tokens", "d"),
    ("Request throughput (req/s):", "request_throughput", ".2f"),
    ("Request goodput (req/s):", "request_goodput", ".2f"),
    ("Output token throughput (tok/s):", "output_throughput", ".2f"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s", ".2f"),
    ("Peak concurrent requests:", "max_concurrent_requests", ".2f"),
    ("Total token throughput (tok/s):", "total_token_throughput", ".2f"),
)
_ERRORS_SHOWN = 5


def summarise(result: LoadResult, slo: Slo | None = None) -> dict[str, Any]:
    """The figures of a replay under vLLM's result keys: seconds, tokens, and milliseconds in keys with `_ms`.

    Beside them: model_id, num_prompts (planned), interrupted, unfinished, rejected_requests (too long, left out of the
    workload), statuses, client_lateness (of sending after the arrival time; a large one means an overloaded client).
    With an SLO: slo, slo_attainment (share of the requests sent that met it: one that failed or did not finish is a
    miss) and, of all tokens received, unfinished requests too: if it bounds TBT, share_of_tokens_in_slo (of the gaps
    between them); if it has a deadline, share_of_tokens_on_time. Raises ValueError if the replay has no duration.
    """
    if not result.duration_s > 0:
        raise ValueError(f"the replay lasted {result.duration_s} s: there is nothing to report")
    completed = [record for record in result.records if record.status == "completed"]
    return _totals(result, completed) | _slo_keys(result, completed, slo) | _latencies(completed) | _details(result)


def format_console(summary: dict[str, Any]) -> str:
    """The summary as `vllm bench serve` prints it, with a section of Pacer's own figures at the end."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    for label, key, form in _TOTAL_LINES:
        if key != "request_goodput" or summary[key] is not None:
            lines.append(_line(label, summary[key], form))
    for metric, (name, header) in _METRICS.items():
        lines.append(f"{header:-^50}")
        lines.append(_line(f"Mean {name} (ms):", summary[f"mean_{metric}_ms"]))
        lines.append(_line(f"Median {name} (ms):", summary[f"median_{metric}_ms"]))
        lines.append(_line(f"P99 {name} (ms):", summary[f"p99_{metric}_ms"]))
    lines.append(f"{'Pacer':-^50}")
    lines.append(_line("Unfinished requests:", summary["unfinished"], "d"))
    lines.append(_line("Rejected requests (too long):", summary["rejected_requests"], "d"))
    lines.append(_line("P99 client lateness (ms):", summary["client_lateness"]["p99_ms"]))
    lines.append(_line("Max client lateness (ms):", summary["client_lateness"]["max_ms"]))
    if "slo" in summary:
        lines.append(f"{'SLO:':<40} {summary['slo']}")
        lines.append(_line("Requests within SLO (%):", _percent(summary["slo_attainment"])))
    if "share_of_tokens_in_slo" in summary:
        lines.append(_line("Tokens within TBT SLO (%):", _percent(summary["share_of_tokens_in_slo"])))
    if "share_of_tokens_on_time" in summary:
        lines.append(_line("Tokens on time (%):", _percent(summary["share_of_tokens_on_time"])))
    for error, count in Counter(error for error in summary["errors"] if error).most_common(_ERRORS_SHOWN):
        lines.append(f"{count} failed: {error}")
    if summary["interrupted"]:
        sent = summary["completed"] + summary["failed"] + summary["unfinished"]
        lines.append(f"INTERRUPTED: {sent} of {summary['num_prompts']} requests were sent")
    return "\n".join([*lines, "=" * 50])


def write_json(path: Path, summary: dict[str, Any], detailed: bool = False) -> None:
    """Writes the summary as JSON; only `detailed` includes the lists with an entry per request (`DETAIL_KEYS`)."""
    kept = {key: value for key, value in summary.items() if detailed or key not in DETAIL_KEYS}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(kept)) + b"\n")


def peak_tokens_per_s(records: list[RequestRecord]) -> float:
    """Most chunks that came within one second, in whole seconds from the first sending."""
    if not records:
        return 0.0
    times_s = np.concatenate([record.token_times_s for record in records])
    first_s = min(record.sent_s for record in records)
    return float(np.bincount((times_s - first_s).astype(np.int64)).max())


def peak_concurrent_requests(records: list[RequestRecord]) -> int:
    """Most requests in flight at once, each from its sending up to (not including) its last token."""
    starts_s = np.sort([record.sent_s for record in records])
    ends_s = np.sort([record.sent_s + record.e2el_s for record in records])
    ended = np.searchsorted(ends_s, starts_s, side="right")
    return int(np.max(np.arange(1, len(records) + 1) - ended, initial=0))


def _totals(result: LoadResult, completed: list[RequestRecord]) -> dict[str, Any]:
    statuses = Counter(record.status for record in result.records)
    input_tokens = sum(record.prompt_tokens for record in completed)
    output_tokens = sum(record.output_tokens for record in completed)
    lateness = _statistics("lateness", [record.lateness_s for record in result.records])
    return {
        "model_id": result.model,
        "num_prompts": result.planned_requests,
        "interrupted": result.interrupted,
        "duration": result.duration_s,
        "completed": len(completed),
        "failed": statuses["failed"],
        "unfinished": statuses["unfinished"],
        "rejected_requests": result.rejected_requests,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(completed) / result.duration_s,
        "output_throughput": output_tokens / result.duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / result.duration_s,
        "max_output_tokens_per_s": peak_tokens_per_s(completed),
        "max_concurrent_requests": peak_concurrent_requests(completed),
        "client_lateness": {"p99_ms": lateness["p99_lateness_ms"], "max_ms": lateness["max_lateness_ms"]},
    }


def _slo_keys(result: LoadResult, completed: list[RequestRecord], slo: Slo | None) -> dict[str, Any]:
    if slo is None:
        return {"request_goodput": None}
    good = sum(slo.met(record.ttft_s, record.tbt_s, record.e2el_s) for record in completed)
    keys: dict[str, Any] = {
        "request_goodput": good / result.duration_s,
        "slo": str(slo),
        "slo_attainment": good / len(result.records) if result.records else None,
    }
    if slo.tbt_s is not None:
        gaps_s = _joined([record.tbt_s for record in result.records])
        keys["share_of_tokens_in_slo"] = slo.share_of_tokens(gaps_s) if gaps_s.size else None
    if slo.deadline_s is not None:
        keys["share_of_tokens_on_time"] = _share_on_time(result.records, slo)
    return keys


def _share_on_time(records: list[RequestRecord], slo: Slo) -> float | None:
    begun = [record for record in records if record.token_times_s]
    tokens = sum(1 + record.tbt_s.size for record in begun)
    late = sum(slo.late_tokens(record.ttft_s, record.tbt_s) for record in begun)
    return 1 - late / tokens if tokens else None


def _latencies(completed: list[RequestRecord]) -> dict[str, Any]:
    several = [record for record in completed if record.output_tokens > 1]
    tpots_s = [(record.e2el_s - record.ttft_s) / (record.output_tokens - 1) for record in several]
    return (
        _statistics("ttft", [record.ttft_s for record in completed])
        | _statistics("tpot", tpots_s)
        | _statistics("itl", _joined([record.itl_s for record in completed]))
        | _statistics("e2el", [record.e2el_s for record in completed])
    )


def _details(result: LoadResult) -> dict[str, list[Any]]:
    """One entry per request sent; latencies that were never measured are 0, as in vLLM."""
    records = result.records
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens if record.status == "completed" else 0 for record in records],
        "ttfts": [record.ttft_s if record.token_times_s else 0.0 for record in records],
        "itls": [record.itl_s.tolist() for record in records],
        "latencies": [record.e2el_s if record.token_times_s else 0.0 for record in records],
        "start_times": [record.sent_s for record in records],
        "queue_times": [record.lateness_s for record in records],
        "statuses": [record.status for record in records],
        "errors": [record.error for record in records],
    }


def _statistics(metric: str, values_s: ArrayLike) -> dict[str, float | None]:
    values_ms = np.asarray(values_s, dtype=np.float64) * 1e3
    if not values_ms.size:
        return {f"{name}_{metric}_ms": None for name in ("mean", "median", "std", "p99", "max")}
    return {
        f"mean_{metric}_ms": float(np.mean(values_ms)),
        f"median_{metric}_ms": float(np.median(values_ms)),
        f"std_{metric}_ms": float(np.std(values_ms)),
        f"p99_{metric}_ms": float(np.percentile(values_ms, 99)),
        f"max_{metric}_ms": float(np.max(values_ms)),
    }


def _joined(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(parts) if parts else np.empty(0)


def _line(label: str, value: float | None, form: str = ".2f") -> str:
    return f"{label:<40} {'-' if value is None else format(value, form):<10}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
