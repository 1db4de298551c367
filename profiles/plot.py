"""The picture of a comparison: budget, TBT against its SLO, and the queue, over time, a column a run."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq

mpl.use("Agg")
from matplotlib import pyplot as plt

IN_SLO, LATE, BUDGET, QUEUE = "#2a78b8", "#d1495b", "#333333", "#8a6fb0"


def plot_runs(runs: dict[str, Path], tbt_slo_s: float, out: Path) -> None:
    """Draw each run's `telemetry.parquet` into one PNG."""
    figure, axes = plt.subplots(3, len(runs), figsize=(4.6 * len(runs), 7.5), sharex=True, sharey="row", squeeze=False)
    for column, (label, path) in enumerate(runs.items()):
        table = pq.read_table(path)
        time_s = np.array(table["time_s"])
        budget, tbt, queue = axes[:, column]
        budget.set_title(label)
        budget.step(time_s, table["budget_tokens"], where="post", color=BUDGET, lw=1.2)
        gaps_ms = [1e3 * gap for gaps in table["tbt_s"].to_pylist() for gap in gaps]
        when_s = np.repeat(time_s, [len(gaps) for gaps in table["tbt_s"].to_pylist()])
        late = np.array(gaps_ms) > 1e3 * tbt_slo_s
        for mask, colour in ((~late, IN_SLO), (late, LATE)):
            tbt.scatter(when_s[mask], np.array(gaps_ms)[mask], s=3, color=colour, lw=0)
        tbt.axhline(1e3 * tbt_slo_s, color=LATE, lw=1, ls="--")
        tbt.set_title(f"P99 {np.percentile(gaps_ms, 99):.0f} ms", fontsize=9)
        queue.fill_between(time_s, table["waiting_prompt_tokens"], color=QUEUE, alpha=0.6, lw=0)
        queue.set_xlabel("time (s)")
    for axis, text in zip(axes[:, 0], ("token budget", "TBT (ms), dashed: SLO", "prompt tokens waiting"), strict=True):
        axis.set_ylabel(text)
    axes[0, 0].set_yscale("log", base=2)
    axes[1, 0].set_yscale("log")
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plt.close(figure)
