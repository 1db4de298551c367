"""`make bench`: run every CPU benchmark, print one table."""

import json
import subprocess
import sys

from rich.console import Console
from rich.table import Table

SCRIPTS = ("telemetry_cost", "decision_time", "decision_round_trip", "knobs_share", "simulator_speed", "ablation")


def main() -> int:
    table = Table()
    for column in ("benchmark", "figure", "goal", "ok", "more"):
        table.add_column(column, overflow="fold")
    status = 0
    common = {"name", "figure", "goal", "ok", "seed", "machine", "version"}
    for script in SCRIPTS:
        print(f"{script} ...", file=sys.stderr)
        run = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{script}", *sys.argv[1:]],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            table.add_row(script, "-", "-", "failed", f"exit status {run.returncode}")
            status = 1
            continue
        result = json.loads(run.stdout.splitlines()[-1])
        more = ", ".join(f"{key} {value}" for key, value in result.items() if key not in common)
        table.add_row(result["name"], str(result["figure"]), result["goal"], "yes" if result["ok"] else "NO", more)
        table.caption = f"{result['machine']}; seed {result['seed']}; Pacer {result['version']}"
    Console().print(table)
    return status


if __name__ == "__main__":
    sys.exit(main())
