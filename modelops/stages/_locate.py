"""Names the node to blame where two models differ: every node is judged alone, on what the reference feeds it.

Two views of the same two runs::

    cumulative   how far a value is off with all that went wrong before it: a curve
    isolated     how far it is off when the nodes that make it read the reference's values: causes, without victims

The values that are furthest off in isolation are then put into the reference, one at a time: the one that harms the
outputs most is to blame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelops.core.progress import progress
from modelops.errors import ModelOpsError
from modelops.graphs import matching
from modelops.graphs.lean import opened
from modelops.graphs.matching import noise
from modelops.graphs.pieces import Pieces

_SHORTLIST = 8
_BAND_BYTES = 128 << 20
_WEIGHT_BYTES = 512 << 20
_IN_MEMORY = 256 << 20
_OVERRIDABLE_BYTES = 1 << 30  # of a reference that is held whole to see what one wrong value does to its outputs
_AROUND = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"})  # not what a node is called after
_CURVE = 400  # points that are kept of it


@dataclass(frozen=True)
class Suspect:
    """A node, or the few nodes between matched values, that gives something else on the reference's inputs.

    ``isolated`` is noise over signal of its own error, ``effect`` the same of the model's outputs when it alone is
    wrong, ``cumulative`` what the value is off by in the whole model; None where unknown, infinite where shapes or NaN
    differ or it does not run, as ``problem`` tells. ``nodes`` are all nodes that make ``output`` of ``inputs``.
    """

    node: str
    op: str
    output: str
    reference: str
    inputs: tuple[str, ...]
    nodes: tuple[str, ...]
    isolated: float
    effect: float | None = None
    cumulative: float | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, errors in dB of signal to noise (null: identical, or infinitely far off, see ``problem``)."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("node", "op", "output", "reference")}
        values |= {"inputs": list(self.inputs), "nodes": list(self.nodes), "problem": self.problem}
        for name in ("isolated", "effect", "cumulative"):
            values[f"{name}_sqnr"] = sqnr(getattr(self, name))
        return values


@dataclass(frozen=True)
class Located:
    """Who is to blame, most first; ``curve`` holds (node, output, noise over signal) in the order of the graph."""

    suspects: tuple[Suspect, ...]
    curve: tuple[tuple[str, str, float], ...]
    matched: int
    nodes: int
    differs: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        kept = self.curve[:: max(1, math.ceil(len(self.curve) / _CURVE))]
        return {
            "suspects": [suspect.to_dict() for suspect in self.suspects],
            "curve": [{"node": n, "output": o, "sqnr": sqnr(error)} for n, o, error in kept],
            "matched_values": self.matched,
            "nodes": self.nodes,
            "values_that_differ": self.differs,
            "notes": list(self.notes),
        }

    def sentence(self) -> str:
        """The first node to blame, in words."""
        if not self.suspects:
            return "every node gives what the reference gives when it runs alone and unoptimised"
        first = self.suspects[0]
        more = f" (with {', '.join(n for n in first.nodes if n != first.node)})" if 1 < len(first.nodes) <= 6 else ""
        if len(first.nodes) > 6:
            more = f" (one of {len(first.nodes)} nodes that no value in between is known for)"
        harm = "" if first.effect is None else f"; alone it leaves the outputs at {_db(first.effect)}"
        alone = first.problem or f"{_db(first.isolated)} on the reference's inputs"
        return f"first to blame: node {first.node!r} ({first.op}){more}, output {first.output!r}: {alone}{harm}"


@dataclass
class _Store:
    """Arrays by name; beyond a bound they lie on the disk."""

    folder: Path
    held: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    size: int = 0

    def put(self, name: str, array: Any) -> None:
        import numpy as np

        if self.size + array.nbytes <= _IN_MEMORY or array.dtype.kind == "O":
            self.held[name] = array
            self.size += array.nbytes
        else:
            self.files[name] = self.folder / f"value{len(self.files)}.npy"
            np.save(self.files[name], array, allow_pickle=False)

    def __contains__(self, name: object) -> bool:
        return name in self.held or name in self.files

    def __getitem__(self, name: str) -> Any:
        import numpy as np

        return self.held[name] if name in self.held else np.load(self.files[name], mmap_mode="r", allow_pickle=False)

    def __iter__(self) -> Iterator[str]:
        return iter((*self.held, *self.files))

    def all(self) -> dict[str, Any]:
        """Every array, those on the disk mapped."""
        return {name: self[name] for name in self}


class Locator:
    """Two models side by side, on one feed. Use it in a ``with`` block; ``run`` does the work, ``repro`` saves it."""

    def __init__(
        self, reference: Path, candidate: Path, feed: Mapping[str, Any], scratch: Path, *, loose: bool, threads: int = 1
    ) -> None:
        self._paths, self._feed, self._scratch = (reference, candidate), feed, scratch
        self._loose, self._threads = loose, threads
        self._shortlist = 2 * _SHORTLIST if loose else _SHORTLIST  # quantized nodes are all off by something
        self._stack = ExitStack()
        self._notes: list[str] = []
        self._cumulative: dict[str, float] = {}
        self._dtypes: dict[str, Any] = {}
        self._made: dict[str, Any] = {}
        self._segments: dict[str, list[int]] = {}

    def __enter__(self) -> Locator:
        from modelops.graphs.describe import signature_of

        leans = [self._stack.enter_context(opened(path)) for path in self._paths]
        self.reference, self.candidate = (Pieces(lean, threads=self._threads) for lean in leans)
        self._before, self._after = (self._fitted(signature_of(lean.proto)) for lean in leans)
        self._values = _Store(self._scratch)
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _fitted(self, signature: Any) -> dict[str, Any]:
        """The feed in the dtypes that a model declares; by position where its inputs have other names."""
        import numpy as np

        from modelops.graphs.arrays import numpy_dtype

        names = list(self._feed)
        found = {}
        for place, spec in enumerate(signature.inputs):
            name = spec.name if spec.name in self._feed else names[place]
            array, wanted = np.asarray(self._feed[name]), numpy_dtype(spec.dtype)
            found[spec.name] = array.astype(wanted) if wanted.kind != "O" and array.dtype != wanted else array
        return found

    def run(self) -> Located:
        """Judge every node alone, and name the ones to blame."""
        pairs = matching.by_name(self.candidate, self.reference)
        enough = matching.share_matched(self.candidate, pairs) >= matching.ENOUGH
        self._trace_reference(set(pairs.values()) if enough else set(self.reference.producer))
        own = self._trace_candidate(pairs, keep=not enough)
        if not enough:
            found = matching.by_content(
                self.candidate, self.reference, own.all(), self._values.all(), pairs, loose=self._loose
            )
            pairs = matching.with_quantized(self.candidate, found)
            pairs = matching.without_fused(self.candidate, self.reference, pairs)
            for name in own:
                if name in pairs and pairs[name] in self._values:
                    self._cumulative[name] = noise(self._values[pairs[name]], own[name])
            self._notes.append("names tell too little: values were matched by what they hold, and by operators")
        for c, r in matching.quantized_weights(self.candidate, self.reference, pairs).items():
            pairs[c] = r
            if r not in self._values:
                self._values.put(r, self.reference.weight(r))
        self.pairs = {c: r for c, r in pairs.items() if r in self._values and self._same_kind(c, r)}
        errors = self._isolated()
        suspects = self._ranked(errors)
        order = self.candidate.producer
        curve = [
            (self.candidate.nodes[order[name]].name, name, error)
            for name, error in sorted(self._cumulative.items(), key=lambda item: order.get(item[0], -1))
            if name in self.pairs and name in order
        ]
        wrong = sum(error > 0 for error, _ in errors.values())
        return Located(tuple(suspects), tuple(curve), len(errors), len(self.candidate.nodes), wrong, tuple(self._notes))

    def _trace_reference(self, wanted: set[str]) -> None:
        wanted |= set(self.reference.outputs)
        for name, value in self._before.items():
            self._values.put(name, value)
        progress("locating: the reference's values")
        for band in self.reference.trace(self._before, wanted):
            for name, value in band.items():
                if hasattr(value, "dtype"):
                    self._values.put(name, value)

    def _trace_candidate(self, pairs: Mapping[str, str], *, keep: bool) -> _Store:
        """The cumulative errors, and the candidate's own values where they are asked for."""
        folder = self._scratch / "own"
        folder.mkdir(exist_ok=True)
        own = _Store(folder)
        wanted = set(self.candidate.producer) if keep else set(pairs)
        progress("locating: the model's values")
        self._dtypes = {name: value.dtype for name, value in self._after.items()}
        try:
            for band in self.candidate.trace(self._after, wanted):
                for name, value in band.items():
                    if not hasattr(value, "dtype"):
                        continue
                    self._dtypes[name] = value.dtype
                    if pairs.get(name) in self._values:
                        self._cumulative[name] = noise(self._values[pairs[name]], value)
                    if keep:
                        own.put(name, value)
        except ModelOpsError as error:
            self._notes.append(f"the model itself does not run to its end: {error.message}")
        return own

    def _same_kind(self, mine: str, theirs: str) -> bool:
        known, other = self._dtypes.get(mine), self._values[theirs].dtype
        return known is None or (known.kind == "f") == (other.kind == "f")

    def _fed(self, name: str) -> Any:
        """The reference's value in the dtype that the candidate's nodes read."""
        value = self._values[self.pairs[name]]
        wanted = self._dtypes.get(name, value.dtype)
        return value if value.dtype == wanted else value.astype(wanted)

    def _isolated(self) -> dict[str, tuple[float, str]]:
        """Value → (noise over signal, problem) of every matched value, made of the reference's values alone."""
        boundary = frozenset(self.pairs)
        wanted = matching.targets(self.candidate, self.pairs)
        self._segments = {name: self.candidate.segment(name, boundary) for name in wanted}
        found: dict[str, tuple[float, str]] = {}
        for number, band in enumerate(self._bands(wanted)):
            progress("locating: every node alone", number)
            self._judge_band(band, boundary, found)
        return found

    def _bands(self, wanted: Sequence[str]) -> Iterator[list[str]]:
        band: list[str] = []
        size = weights = 0
        for name in wanted:
            nodes = self._segments[name]
            here = self._values[self.pairs[name]].nbytes + sum(
                self._values[self.pairs[read]].nbytes for read in self._reads(nodes)
            )
            heavy = self.candidate.weight_bytes(nodes)
            if band and (size + here > _BAND_BYTES or weights + heavy > _WEIGHT_BYTES):
                yield band
                band, size, weights = [], 0, 0
            band.append(name)
            size, weights = size + here, weights + heavy
        if band:
            yield band

    def _reads(self, nodes: Sequence[int]) -> list[str]:
        """The values of the boundary that these nodes read."""
        names = dict.fromkeys(name for index in nodes for name in self.candidate.nodes[index].inputs)
        return [name for name in names if name in self.pairs]

    def _judge_band(self, band: list[str], boundary: frozenset[str], found: dict[str, tuple[float, str]]) -> None:
        nodes = sorted({index for name in band for index in self._segments[name]})
        feed = {name: self._fed(name) for name in self._reads(nodes)}
        try:
            made = self.candidate.run(nodes, feed, band, cut=boundary)
        except ModelOpsError as failure:
            if len(band) == 1:
                found[band[0]] = (math.inf, f"does not run on the reference's inputs: {failure.message[:300]}")
                return
            for half in (band[: len(band) // 2], band[len(band) // 2 :]):
                self._judge_band(half, boundary, found)
            return
        for name, value in made.items():
            wanted = self._values[self.pairs[name]]
            error = noise(wanted, value)
            problem = ""
            if math.isinf(error):
                problem = "other elements are NaN or infinite, or the reference is zero"
                if wanted.shape != value.shape:
                    problem = f"shape {list(value.shape)} where the reference has {list(wanted.shape)}"
            found[name] = (error, problem)
            if error > 0:
                self._keep(name, error, value)

    def _keep(self, name: str, error: float, value: Any) -> None:
        """Hold on to the values that are furthest off."""
        self._made[name] = (error, value)
        if len(self._made) > 2 * self._shortlist:  # values that are equally far off may change places
            del self._made[min(self._made, key=lambda key: self._made[key][0])]

    def _ranked(self, errors: Mapping[str, tuple[float, str]]) -> list[Suspect]:
        """The suspects, the one that harms the outputs most first."""
        listed = sorted((name for name in errors if errors[name][0] > 0), key=lambda name: -errors[name][0])
        chosen = [self._suspect(name, *errors[name]) for name in listed[: self._shortlist]]
        if len(chosen) > 1:
            chosen = self._with_effects(chosen)
        judged = any(suspect.effect is not None for suspect in chosen)

        def harm(suspect: Suspect) -> float:
            return suspect.isolated if not judged else suspect.effect or 0.0

        return sorted(chosen, key=lambda s: (-harm(s), -s.isolated, self.candidate.producer[s.output]))

    def _suspect(self, name: str, error: float, problem: str) -> Suspect:
        nodes = [self.candidate.nodes[index] for index in self._segments[name]]
        made_by = self.reference.producer.get(self.pairs[name], -1)
        wanted = self.reference.nodes[made_by].op if made_by >= 0 else ""
        maker = self.candidate.nodes[self.candidate.producer[name]]
        real = [node for node in nodes if node.op not in _AROUND] or [maker]
        main = maker if maker.op == wanted else next((n for n in nodes if wanted and n.op.startswith(wanted)), real[-1])
        reads = tuple(self._reads([node.index for node in nodes]))
        if [node.op for node in nodes] == ["QuantizeLinear", "DequantizeLinear"] and reads:
            due = self._values[self.pairs[name]]
            main = matching.wrong_half(self.candidate, nodes, self._fed(reads[0]), due) or main
        names, off = tuple(node.name for node in nodes), self._cumulative.get(name)
        return Suspect(main.name, main.op, name, self.pairs[name], reads, names, error, None, off, problem)

    def _with_effects(self, suspects: list[Suspect]) -> list[Suspect]:
        """The same, with what each alone does to the reference's outputs."""
        reference = self.reference
        if reference.weight_bytes(range(len(reference.nodes))) > _OVERRIDABLE_BYTES:
            self._notes.append("the reference is too large to see what each node does to its outputs")
            return suspects
        replaceable = {*reference.producer, *reference.weights}
        names = list(dict.fromkeys(s.reference for s in suspects if s.reference in replaceable))
        dtypes = {name: self._values[name].dtype for name in names}
        try:
            model = reference.overridden(names, self._before, dtypes)
        except ModelOpsError as error:
            self._notes.append(f"what each node does to the outputs is not known: {error.message[:200]}")
            return suspects
        found = []
        for suspect in suspects:
            value = self._made[suspect.output][1] if suspect.output in self._made else None
            known = suspect.reference in names or suspect.reference in reference.inputs
            if value is None and not math.isinf(suspect.isolated):
                found.append(suspect)
                continue
            if value is None or not known or value.shape != self._values[suspect.reference].shape:
                found.append(replace(suspect, effect=math.inf))
                continue
            try:
                outputs = model.run(suspect.reference, value)
                effect = max((noise(self._values[n], array) for n, array in outputs.items()), default=0.0)
            except ModelOpsError:
                effect = math.inf
            found.append(replace(suspect, effect=effect))
        return found

    def repro(self, suspect: Suspect) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """The nodes to blame as a model of their own, its inputs, and the outputs that the reference gives for them."""
        from onnx import helper

        nodes = self._segments[suspect.output]
        feed = {name: self._fed(name) for name in self._reads(nodes)}
        model = self.candidate.piece(nodes, feed, [suspect.output])
        made = self._made.get(suspect.output)
        expected = self._values[suspect.reference]
        dtype = made[1].dtype if made is not None else self._dtypes.get(suspect.output, expected.dtype)
        kind = helper.np_dtype_to_tensor_dtype(dtype)
        shape = made[1].shape if made is not None else None
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info(suspect.output, kind, shape))
        return model, feed, {suspect.output: expected.astype(dtype)}


def sqnr(error: float | None) -> float | None:
    """Noise over signal as dB; None for none, and for what no figure tells."""
    if error is None or error == 0 or not math.isfinite(error):
        return None
    return -20 * math.log10(error)


def _db(error: float) -> str:
    if error == 0:
        return "no difference"
    return f"{-20 * math.log10(error):.3g} dB" if math.isfinite(error) else "no comparable values"
