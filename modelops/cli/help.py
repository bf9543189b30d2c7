"""The root help page, drawn without Typer: its Rich page costs more CPU time than all the rest of the start."""

from __future__ import annotations

from pathlib import Path

from modelops import __version__

_PACKAGE = Path(__file__).resolve().parents[1]
COMMANDS = ("run", "inspect", "diff", "doctor")
_ORDER = ("convert", "simplify", "quantize", "prune", "validate", "bench")


def stage_files() -> dict[str, Path]:
    """The stages that come with modelops, by name, from their files; in the order of a usual chain."""
    files = {file.stem.replace("_", "-"): file for file in (_PACKAGE / "stages").glob("[!_]*.py")}
    rank = {name: place for place, name in enumerate(_ORDER)}
    return dict(sorted(files.items(), key=lambda entry: (rank.get(entry[0], len(rank)), entry[0])))


def page() -> str:
    """The text of ``modelops --help``."""
    lines = [
        "Usage: modelops COMMAND [OPTIONS] ...",
        "",
        "Take a trained model to production, and never be handed a slower or less accurate one without being told.",
        "",
        "Stages",
        *(f"  {name:<10} {_summary(file)}" for name, file in stage_files().items()),
        "",
        "Other commands",
        *(f"  {name:<10} {_summary(_PACKAGE / 'cli' / 'commands' / f'{name}.py')}" for name in COMMANDS),
        "",
        "Options",
        "  --help     Show this page; modelops COMMAND --help shows a command's options.",
        f"  --version  Show the version ({__version__}).",
        "",
        "Exit codes",
        "  0 done   1 a gate failed   2 usage   3 inconclusive   4 input refused   5 a tool failed",
        "  6 time, memory or disk ran out   7 a package or device is missing   70 a bug   130 interrupted",
    ]
    return "\n".join(lines)


def _summary(file: Path) -> str:
    """The first line of a file's docstring, read without importing the file."""
    with open(file, encoding="utf-8") as text:
        line = text.readline().strip().removeprefix('"""').removesuffix('"""')
    name, colon, rest = line.partition(": ")
    return rest if colon and " " not in name else line
