"""Products made easier to quantize, without a word to the method that will do it.

For every activation that products with weights read, three things are tried in numpy on samples of it; each stays only
where it lowers the error on samples that it was not fitted on::

    migration      columns of the activation that stand out are divided by a factor, and the rows of the weights are
                   multiplied with it (Xiao et al. 2023, *SmoothQuant*); how strongly is searched for at every site
    outliers       a few columns that stand out most are taken out, and multiplied in float (Dettmers et al. 2022,
                   *LLM.int8()*, with columns that are known beforehand): the others get a finer range
    compensation   weights are rounded so that the errors of the rows cancel on the samples (_rounding.compensated)
    bias           the mean error of every output is taken off a bias that is there already

The graph that comes out is a float graph: what was migrated in it computes the same as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.ahead import ahead
from modelops.core.blas import one_blas_thread
from modelops.quantizers import _biases
from modelops.quantizers._captures import Batch, Capture
from modelops.quantizers._folding import Place, fold, multiply, place_of, replace_input, take_out
from modelops.quantizers._histograms import Range
from modelops.quantizers._memory import Memory
from modelops.quantizers._rounding import Scheme, activations, compensated, decibels, nearest, static_range
from modelops.quantizers._weights import Product

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# How much of the spread of an activation goes into the weights, in powers of both.
_STRENGTHS = (0.35, 0.5, 0.6, 0.7, 0.8, 1.0)
_NEAR = (0.5, 0.7)
# Of so many rows one is enough to choose a strength by, and so many columns.
_ROUGH = 4
_ROUGH_COLUMNS = 4096
# A node more for every inference must save this share of the error; what is folded, hardly any.
_WORTH: dict[Place, float] = {"multiply": 0.1, "normalization": 0.02, "values": 0.02}
_ANY = 0.01
# The most rows of a matrix that are compensated: the work grows with their third power.
_COMPENSATED = 2048
# What more columns in float have to take off the error of fewer.
_MORE = 0.15
# Columns that may be multiplied in float: a hundredth of a wide product.
_OUTLIERS = (4, 8, 16)
# What the float columns take off the error, at least, and the error below which a site is left as it is.
_OUTLIERS_WORTH, _GOOD_ENOUGH = 0.5, 10**-3.4


@dataclass(frozen=True)
class Improve:
    """What may be tried."""

    migrate: bool = True
    outliers: bool = True
    compensate: bool = True
    correct_bias: bool = True

    @property
    def anything(self) -> bool:
        return self.migrate or self.outliers or self.compensate or self.correct_bias


@dataclass
class Site:
    """An activation and the products that read it, side by side as one matrix."""

    value: ir.Value
    products: list[Product]

    @property
    def name(self) -> str:
        return str(self.value.name)

    def matrix(self) -> NDArray[Any]:
        import numpy as np

        return np.concatenate([product.matrix() for product in self.products], axis=1)

    @property
    def alone(self) -> bool:
        """Whether no other node reads these weights."""
        nodes = {id(product.node) for product in self.products}
        nodes |= {id(node) for product in self.products for node in product.turns if set(_read(node)) <= nodes}
        return all(id(node) in nodes for product in self.products for node in product.weight.consumers())


@dataclass(frozen=True)
class Found:
    """What is best at a site: error power over signal power before and after, and how it is reached."""

    before: float
    after: float
    strength: float = 0.0
    factors: NDArray[Any] | None = None
    weights: NDArray[Any] | None = None
    shift: NDArray[Any] | None = None
    found: Range | None = None
    outliers: NDArray[Any] | None = None


def _read(node: ir.Node) -> Iterator[int]:
    """The nodes that read what a node gives; one more where the model gives it out."""
    for value in node.outputs:
        yield from (id(reader) for reader in value.consumers())
        if value.is_graph_output():
            yield -1


def sites(products: Sequence[Product]) -> list[Site]:
    """The products by what they read, in the order of the graph; those whose weights others read too are left out."""
    found: dict[str, Site] = {}
    for product in products:
        value = product.node.inputs[0]
        if value is not None and value.name is not None:
            found.setdefault(value.name, Site(value, [])).products.append(product)
    return [site for site in found.values() if site.alone]


def search(site: Site, capture: Capture, scheme: Scheme, improve: Improve) -> Found:
    """The best that was found for the site, judged on held-out batches."""
    import numpy as np

    weights = site.matrix()
    ones = np.ones(len(weights), dtype=np.float32)
    judge = _Judge(capture, weights, scheme)
    first = judge.error(ones, nearest(weights, scheme))
    best = Found(first, first)
    place = place_of(site.value, [product.node for product in site.products])
    # With one scale for a whole matrix, columns that are scaled would no longer fit the grid that they share.
    if improve.migrate and (scheme.per_channel or place != "values"):
        best = _migrated(best, judge, weights, _WORTH[place])
    if improve.outliers and best.after > _GOOD_ENOUGH:
        best = _apart(best, judge, weights, _NEAR if improve.migrate else (0.0,))
    factors = ones if best.factors is None else best.factors
    scaled = _scaled(weights, factors)
    if improve.compensate and scheme.per_channel and len(weights) <= _COMPENSATED:
        rounded = compensated(scaled, judge.moments(factors), scheme)
        error = judge.error(factors, rounded, outliers=best.outliers)
        if error < (1 - _ANY) * best.after:
            best = replace(best, after=error, weights=rounded)
    if improve.correct_bias and all(_biases.shiftable(product) for product in site.products):
        rounded = nearest(scaled, scheme) if best.weights is None else best.weights
        shift = judge.shift(factors, rounded, best.outliers)
        error = judge.error(factors, rounded, shift, best.outliers)
        if error < (1 - _ANY) * best.after:
            best = replace(best, after=error, shift=shift)
    return replace(best, found=judge.range(factors))


def _scaled(weights: NDArray[Any], factors: NDArray[Any]) -> NDArray[Any]:
    """The rows of the weights divided by the factors; zeros where a column is taken out."""
    import numpy as np

    column = factors[:, None]
    return np.asarray(np.divide(weights, column, out=np.zeros_like(weights), where=column != 0))


def _factors(judge: _Judge, weights: NDArray[Any], strength: float, outliers: NDArray[Any] | None) -> NDArray[Any]:
    """The factors of this strength, around 1; zero for outliers."""
    import numpy as np

    from_rows = np.maximum(np.abs(judge.capture.low()), np.abs(judge.capture.high()))
    from_weights = np.abs(weights).max(axis=1)
    alive = (from_rows > 0) & (from_weights > 0)
    factors = np.ones(len(weights), dtype=np.float32)
    if outliers is not None:
        alive[outliers] = False
        factors[outliers] = 0
    if strength and alive.any():
        factors[alive] = from_weights[alive] ** (1 - strength) / from_rows[alive] ** strength
        factors[alive] /= np.exp(np.log(factors[alive]).mean())
    return factors


def _apart(best: Found, judge: _Judge, weights: NDArray[Any], strengths: Sequence[float]) -> Found:
    """The fewest columns in float that take enough off the error; none where none do."""
    import numpy as np

    rough, scheme = judge.rough(), judge.scheme
    ones = np.ones(len(weights), dtype=np.float32)
    factors = ones if best.factors is None else best.factors
    least = rough.error(factors, nearest(_scaled(rough.weights, factors), scheme))
    found = best
    energy = sum((batch.rows**2).sum(axis=0) for batch in judge.capture.fitting)
    order = np.argsort(-np.sqrt(energy) * np.abs(weights).max(axis=1), kind="stable")
    for count in _OUTLIERS:
        if count > len(weights) // 8:
            break
        outliers = np.sort(order[:count])
        for strength in strengths:
            factors = _factors(judge, weights, strength, outliers)
            error = rough.error(factors, nearest(_scaled(rough.weights, factors), scheme), outliers=outliers)
            if error < (1 - _MORE) * least:
                least = error
                found = replace(best, strength=strength, factors=factors, outliers=outliers)
    if found.outliers is None or found.factors is None:
        return best
    error = judge.error(found.factors, nearest(_scaled(weights, found.factors), scheme), outliers=found.outliers)
    return replace(found, after=error) if error < (1 - _OUTLIERS_WORTH) * best.after else best


def _migrated(best: Found, judge: _Judge, weights: NDArray[Any], worth: float) -> Found:
    """The strength of least error, where it is worth its price."""
    rough = judge.rough()

    def error_of(one: _Judge, factors: NDArray[Any]) -> float:
        return one.error(factors, nearest(one.weights / factors[:, None], one.scheme))

    tried = {strength: _factors(judge, weights, strength, None) for strength in _STRENGTHS}
    strength = min(tried, key=lambda one: error_of(rough, tried[one]))
    found = replace(best, after=error_of(judge, tried[strength]), strength=strength, factors=tried[strength])
    return found if found.after < (1 - worth) * best.after else best


class _Judge:
    """The error of one site on the batches that judge."""

    def __init__(self, capture: Capture, weights: NDArray[Any], scheme: Scheme) -> None:
        self.capture, self.weights, self.scheme = capture, weights, scheme
        self._ranges: dict[bytes, Range | None] = {}
        self._exact = [batch.rows @ weights for batch in capture.judging]
        self._power = sum(float((exact**2).sum()) for exact in self._exact) or 1.0

    def rough(self) -> _Judge:
        """One that judges by fewer rows and columns, and by a rule that takes less time, to choose among many."""
        slow = self.scheme.rule in ("auto", "entropy")
        scheme = replace(self.scheme, rule="mse") if slow else self.scheme
        step = -(-self.weights.shape[1] // _ROUGH_COLUMNS)
        return _Judge(self.capture.thinned(_ROUGH), self.weights[:, ::step], scheme)

    def range(self, factors: NDArray[Any]) -> Range | None:
        """The range of the rows times ``factors``, found once."""
        key = factors.tobytes()
        if key not in self._ranges:
            self._ranges[key] = static_range(self.capture, factors, self.scheme)
        return self._ranges[key]

    def error(
        self,
        factors: NDArray[Any],
        rounded: NDArray[Any],
        shift: NDArray[Any] | None = None,
        outliers: NDArray[Any] | None = None,
    ) -> float:
        """Power of the error over that of the exact products."""
        noise = 0.0
        made = self._made(self.capture.judging, factors, rounded, outliers)
        for exact, product in zip(self._exact, made, strict=True):
            difference = exact - product if shift is None else exact - product - shift
            noise += float((difference**2).sum())
        return noise / self._power

    def shift(self, factors: NDArray[Any], rounded: NDArray[Any], outliers: NDArray[Any] | None) -> NDArray[Any]:
        """The mean error of every column on the batches that fit: the product of the mean rows is the mean product."""
        import numpy as np

        found, fitting = self.range(factors), self.capture.fitting
        exact, made = np.zeros(len(self.weights)), np.zeros(len(self.weights))
        for batch in fitting:
            exact += batch.rows.sum(axis=0, dtype=np.float64)
            made += activations(batch, factors, found).sum(axis=0, dtype=np.float64)
        error = exact @ self.weights - made @ rounded
        if outliers is not None:
            error -= exact[outliers] @ self.weights[outliers]
        count = sum(len(batch.rows) for batch in fitting)
        return np.asarray(error / max(count, 1), dtype=np.float32)

    def moments(self, factors: NDArray[Any]) -> NDArray[Any]:
        """XᵀX of the rows that fit."""
        import numpy as np

        rows = np.concatenate([batch.rows * factors for batch in self.capture.fitting])
        return np.asarray(rows.T @ rows)

    def _made(
        self, batches: Sequence[Batch], factors: NDArray[Any], rounded: NDArray[Any], outliers: NDArray[Any] | None
    ) -> Iterator[NDArray[Any]]:
        found = self.range(factors)
        for batch in batches:
            made = activations(batch, factors, found) @ rounded
            yield made if outliers is None else made + batch.rows[:, outliers] @ self.weights[outliers]


def improved(source: Path, names: Sequence[str], scheme: Scheme, improve: Improve, memory: Memory) -> Improved:
    """The model with products that are easier to quantize; ``names`` are of the nodes that will be."""
    from modelops.graphs import files
    from modelops.quantizers._captures import captured
    from modelops.quantizers._weights import cleaned, products, read

    model, wanted = read(source), set(names)
    found = {site.name: site for site in sites([p for p in products(model.graph) if p.name in wanted])}
    seen = memory.extents(found)
    columns = {name: len(site.matrix()) for name, site in found.items() if seen[name].finite}
    captures = captured(memory.model, columns, seen, memory.feeds, memory.scratch)
    results = dict(_side_by_side(found, captures, scheme, improve))
    table, ranges = [], {}
    for name, result in results.items():
        line, tensor = apply(model.graph, found[name], result)
        table.append(line)
        if result.found is not None and result.factors is not None:
            ranges[tensor] = result.found
    target = memory.scratch / "improved.onnx"
    files.save(cleaned(model), target)
    return Improved(target, table, ranges)


# Each holds the weights of its site a few times.
_MOST_WORKERS = 8


def _side_by_side(
    sites: Mapping[str, Site], captures: Iterable[tuple[str, Capture]], scheme: Scheme, improve: Improve
) -> Iterator[tuple[str, Found]]:
    """What is best at every site."""

    def one(named: tuple[str, Capture]) -> tuple[str, Found]:
        return named[0], search(sites[named[0]], named[1], scheme, improve)

    with one_blas_thread():
        yield from ahead(one, captures, _MOST_WORKERS)


@dataclass(frozen=True)
class Improved:
    """A model with its products improved: what was done at every site, and the ranges of what was scaled."""

    model: Path
    table: list[dict[str, Any]]
    ranges: dict[str, Range]

    @property
    def note(self) -> str:
        changed = [line for line in self.table if line["after_db"] > line["before_db"]]
        if not changed:
            return ""
        gain = sum(line["after_db"] - line["before_db"] for line in changed) / len(changed)
        return (
            f"{len(changed)} of {len(self.table)} groups of weighted nodes were made easier to quantize, which takes "
            f"{gain:.1f} dB off their errors on held-out samples"
        )


def apply(graph: ir.Graph, site: Site, found: Found) -> tuple[dict[str, Any], str]:
    """Change the graph as was found best; (a line of the table, the tensor that the products read now)."""
    import numpy as np

    weights, exact, start = found.weights, site.matrix(), 0
    if weights is None and found.factors is not None:
        weights = _scaled(exact, found.factors)
    readers = [product.node for product in site.products]
    for product in site.products:
        stop = start + product.shape[1]
        if weights is not None:
            part = weights[:, start:stop]
            replace_input(graph, product.node, 1, part.T if product.stored else part)
        if found.shift is not None:
            _biases.add(graph, product, found.shift[start:stop])
        start = stop
    place = None
    if found.outliers is not None:
        assert found.factors is not None
        parts = np.split(exact[found.outliers], np.cumsum([p.shape[1] for p in site.products])[:-1], axis=1)
        take_out(graph, site.value, readers, found.outliers, parts)
        place = multiply(graph, site.value, readers, found.factors)
    elif found.factors is not None:
        place = fold(graph, site.value, readers, found.factors)
    line = {
        "input": site.name,
        "nodes": [product.name for product in site.products],
        "before_db": decibels(found.before),
        "after_db": decibels(found.after),
        "strength": found.strength,
        "float_columns": 0 if found.outliers is None else len(found.outliers),
        "factors": place,
        "compensated": found.weights is not None,
        "bias_corrected": found.shift is not None,
    }
    return line, str(readers[0].inputs[0].name)
