"""Demands on the operators of a graph, as a user writes them: ``Attention>=6``, ``"*Attention==12"``, ``IsNaN==0``."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

from modelops.core.report import Check, Verdict
from modelops.errors import UsageError

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


@dataclass(frozen=True)
class Demand:
    """How many nodes of the operators that ``pattern`` matches there shall be; a domain may be left out."""

    pattern: str
    comparison: str
    count: int

    @classmethod
    def parse(cls, text: str) -> Demand:
        """The demand that a user writes; UsageError when it is none."""
        found = re.fullmatch(r"\s*([A-Za-z_][\w.:*?]*|\*[\w.:*?]*)\s*(>=|<=|==|=|>|<)\s*(\d+)\s*", text)
        if not found:
            raise UsageError(
                f"--expect can't be {text!r}", hint='write operator and number, such as --expect "Attention>=6"'
            )
        pattern, comparison, count = found.groups()
        return cls(pattern, "==" if comparison == "=" else comparison, int(count))

    def check(self, operators: Mapping[str, int]) -> Check:
        """Whether a graph with these operators meets it."""
        counted = {
            name: count
            for name, count in operators.items()
            if fnmatch.fnmatchcase(name, self.pattern) or fnmatch.fnmatchcase(name.rpartition(":")[2], self.pattern)
        }
        total = sum(counted.values())
        text = f"{total} nodes of {self.pattern}"
        if len(counted) > 1 or (counted and self.pattern not in counted):
            text += f" ({', '.join(f'{count} {name}' for name, count in sorted(counted.items()))})"
        verdict: Verdict = "pass" if _OPERATORS[self.comparison](total, self.count) else "fail"
        return Check(f"expect.{self.pattern}", verdict, text, total, f"{self.comparison} {self.count}")
