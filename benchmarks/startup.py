"""How long `modelops --help` takes, beside other tools that are installed: the median CPU time over many runs.

    python benchmarks/startup.py [--runs 20] [--most-ms 130]

CPU time (user and system) is compared, since wall time follows whatever else the machine does. The commands take
turns. Every command has one run before, which writes its .pyc files. With --most-ms the exit code is 1 when modelops
takes more than that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

BESIDE = Path(sys.executable).parent
PEERS = ("polygraphy", "optimum-cli", "onnxslim", "onnxsim", "olive", "hf", "torchrun")
RESULTS = Path(__file__).with_name("results")


@dataclass
class Command:
    """One command, and the CPU and wall milliseconds of its runs."""

    name: str
    words: list[str]
    cpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)

    def run(self, *, record: bool = True) -> None:
        started = time.perf_counter()
        process = subprocess.Popen(
            self.words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        shown = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        if process.returncode != 0 or b"sage" not in shown:
            raise SystemExit(f"{' '.join(self.words)} exits with {process.returncode} and shows no usage")
        if record:
            self.cpu_ms.append(1e3 * (usage.ru_utime + usage.ru_stime))
            self.wall_ms.append(1e3 * (time.perf_counter() - started))

    def summary(self) -> dict[str, object]:
        low, _, high = statistics.quantiles(self.cpu_ms, n=4)
        return {
            "command": self.name,
            "cpu_ms": round(statistics.median(self.cpu_ms), 1),
            "cpu_ms_quartiles": [round(low, 1), round(high, 1)],
            "wall_ms": round(statistics.median(self.wall_ms), 1),
            "runs": len(self.cpu_ms),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--most-ms", type=float, help="exit with 1 when modelops --help takes more CPU time")
    parser.add_argument("--alone", action="store_true", help="leave the other tools out")
    options = parser.parse_args()

    commands = [Command("modelops --help", [str(BESIDE / "modelops"), "--help"])]
    commands.append(Command("python -c pass", [sys.executable, "-c", "print('usage: none')"]))
    for name in () if options.alone else PEERS:
        path = BESIDE / name
        found = str(path) if path.exists() else shutil.which(name)
        if found:
            commands.append(Command(f"{name} --help", [found, "--help"]))
    for command in commands:
        command.run(record=False)
    for number in range(max(2, options.runs)):
        for command in commands:
            # The slow ones need fewer runs to be told apart.
            if number < 5 or statistics.median(command.cpu_ms) < 1000:
                command.run()

    rows = sorted((command.summary() for command in commands), key=lambda row: float(str(row["cpu_ms"])))
    print(f"{'command':<20} {'CPU ms':>8} {'quartiles':>17} {'wall ms':>8} {'runs':>5}")
    for row in rows:
        low, high = row["cpu_ms_quartiles"]  # type: ignore[misc]
        print(f"{row['command']:<20} {row['cpu_ms']:>8} {f'{low} to {high}':>17} {row['wall_ms']:>8} {row['runs']:>5}")
    RESULTS.mkdir(exist_ok=True)
    values = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count(), "rows": rows}
    (RESULTS / "startup.json").write_text(json.dumps(values, indent=1) + "\n")

    own = statistics.median(commands[0].cpu_ms)
    if options.most_ms is not None and own > options.most_ms:
        print(f"modelops --help takes {own:.1f} ms, more than {options.most_ms:.1f} ms", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
