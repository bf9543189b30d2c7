"""What every reader of models does with every resource bomb: how it ends, how long it takes, how much memory.

    python benchmarks/bombs.py [--all] [--reader NAME ...] [--bomb NAME ...]

Each bomb is given as a bare file and inside an artifact that is right in every digest. Without --all, the bombs are
those that a single message can hold in a few forms; with it, every hostile model of the tests. Two models, which look
harmless and cost what their inputs say, come last: they must end within their stage's own limit. The exit code is 1
when anything but those two does not end with exit 4 or 6 within 60 s and 8 GiB, or leaves a file or a process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "safety"), str(ROOT / "tests" / "graphs")]

import data_bombs  # noqa: E402
import hostile_models as hostile  # noqa: E402
from under_watch import READERS, Seen, forged, watch, words  # noqa: E402

RESULTS = Path(__file__).with_name("results")
USUAL = (
    "constant of 10 GB", "expand to 10 GB", "constant concat doubling", "concat doubling of an input",
    "doubling functions", "recursive functions", "loop of 2^62 turns", "loop of 2^62 turns over an input",
)  # fmt: skip
DEEP = "3000-deep message"
BY_DATA = {"memory by its data": data_bombs.allocation, "time by its data": data_bombs.endless}
LONGEST = 420.0


def content(name: str) -> bytes:
    if name == DEEP:
        return hostile.deep_message()
    return BY_DATA[name]() if name in BY_DATA else hostile.BOMBS[name]().SerializeToString()


def harmless(folder: Path) -> Path:
    node = hostile.helper.make_node("Relu", ["x"], ["y"])
    return forged(hostile.model([node]).SerializeToString(), folder / "harmless")


def row(name: str, form: str, reader: str, seen: Seen) -> dict[str, object]:
    values = asdict(seen)
    said = next((line for line in seen.output.splitlines() if line.startswith("error: ")), "")
    del values["output"]
    return {"bomb": name, "form": form, "reader": reader, **values, "said": said[:300], "problems": seen.problems()}


def run(names: list[str], readers: list[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="modelops-bombs-") as place:
        os.environ["MODELOPS_CACHE"] = str(Path(place) / "cache")
        good = harmless(Path(place))
        for name in names:
            forms = ("file",) if name == DEEP or name in BY_DATA else ("file", "artifact")
            for form in forms:
                for number, reader in enumerate(readers):
                    folder = Path(place) / f"{len(rows)}-{number}"
                    folder.mkdir()
                    bomb = folder / "bomb.onnx"
                    if form == "file":
                        bomb.write_bytes(content(name))
                    else:
                        bomb = forged(content(name), folder / "bomb")
                    seen = watch(words(reader, bomb, good, folder / "out"), folder, longest=LONGEST)
                    rows.append(row(name, form, reader, seen))
                    show(rows[-1])
    return rows


def show(one: dict[str, object]) -> None:
    problems = "" if one["bomb"] in BY_DATA else "; ".join(map(str, one["problems"]))  # type: ignore[call-overload]
    print(
        f"{one['bomb']!s:<34} {one['form']!s:<9} {one['reader']!s:<22} exit {one['code']!s:<4} "
        f"{one['seconds']:6.1f} s {float(str(one['peak_bytes'])) / 2**20:7.0f} MiB  {problems}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every hostile model of the tests")
    parser.add_argument("--reader", action="append", choices=list(READERS), help="this reader only; repeatable")
    parser.add_argument("--bomb", action="append", help="this bomb only; repeatable")
    options = parser.parse_args()
    names = options.bomb or [*(hostile.BOMBS if options.all else USUAL), DEEP, *BY_DATA]
    rows = run(names, options.reader or list(READERS))
    static = [one for one in rows if one["bomb"] not in BY_DATA]
    broken = [one for one in static if one["problems"]]
    for title, part in (("bombs", static), ("by their data", [one for one in rows if one["bomb"] in BY_DATA])):
        if part:
            codes = Counter(one["code"] for one in part)
            slowest = max(float(str(one["seconds"])) for one in part)
            largest = max(int(str(one["peak_bytes"])) for one in part)
            print(
                f"{title}: {len(part)} commands; exit codes {dict(codes)}; "
                f"at most {slowest:.1f} s and {largest / 2**30:.2f} GiB"
            )
    print(f"promises broken: {len(broken)}")
    RESULTS.mkdir(exist_ok=True)
    machine = {"platform": platform.platform(), "cpus": os.cpu_count()}
    (RESULTS / "bombs.json").write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
