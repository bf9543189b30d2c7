"""An exported graph made fit to be published: names, dimensions and weights as they were asked for, and no remarks."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelops.core.tensors import TensorSpec
from modelops.stages._causes import FrozenDimension, OtherOpset
from modelops.stages._eager import INNER
from modelops.stages._shapes import Envelope
from modelops.stages._tree import unique

if TYPE_CHECKING:
    import onnx_ir

OUTSIDE = "modelops_"
"""Inputs and outputs of a graph to be published may be called by this and their number, as "modelops_output_0"."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def named(
    model: onnx_ir.Model,
    envelope: Envelope,
    outputs: Mapping[str, Sequence[int | str | None]],
    opset: int | None,
) -> onnx_ir.Model:
    """The model with the inputs, outputs, dimensions and weights named as they were asked for.

    Raises FrozenDimension where a dimension that must vary is fixed or tied to another one, OtherOpset where another
    one was asked for.
    """
    obtained = model.opset_imports.get("", 0)
    if opset is not None and obtained != opset:
        raise OtherOpset(f"opset {opset} was asked for, the exporter wrote {obtained}")
    publish_names(model, [spec.name for spec in envelope.specs], list(outputs))
    _complete_inputs(model, envelope.specs)
    renamed = _dimensions(model, envelope)
    _rename_dimensions(model, renamed)
    for value, spec in zip(model.graph.inputs, envelope.specs, strict=True):
        value.shape = _shape(spec.shape)
    for value, dims in zip(model.graph.outputs, outputs.values(), strict=True):
        known = (
            list(value.shape.dims) if value.shape is not None and len(value.shape) == len(dims) else [None] * len(dims)
        )
        value.shape = _shape(
            [_output_dim(value.name, axis, *pair) for axis, pair in enumerate(zip(dims, known, strict=True))]
        )
    _rename_weights(model)
    _trim_metadata(model)
    return model


def publish_names(model: onnx_ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give inputs and outputs their names, each output a value of its own, and nothing inside one of these names."""
    import onnx_ir

    graph = model.graph
    numbered = {f"{OUTSIDE}input_{number}": name for number, name in enumerate(inputs)}
    seen: set[int] = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for number, value in enumerate(list(graph.outputs)):
        if id(value) in seen:
            node = onnx_ir.node("Identity", [value])
            graph.append(node)
            copy = node.outputs[0]
            copy.shape, copy.type = value.shape, value.type
            graph.outputs[number] = copy
        seen.add(id(graph.outputs[number]))
    outside = {id(value) for value in (*graph.inputs, *graph.outputs)}
    inside = [value for value in _values_of(model) if id(value) not in outside]
    taken = {str(value.name) for value in inside} | set(inputs) | set(outputs)
    for value in inside:
        if value.name in inputs or value.name in outputs:
            (value.name,) = unique([f"{value.name}_inside"], taken)
            taken.add(value.name)
    for value in graph.inputs:
        value.name = numbered.get(str(value.name), value.name)
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name


def _values_of(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    """Every value in the main graph and the graphs inside of its nodes."""
    found = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        found += node.outputs
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH":
                found += [*attribute.as_graph().inputs, *attribute.as_graph().initializers.values()]
    return found


def _complete_inputs(model: onnx_ir.Model, specs: Sequence[TensorSpec]) -> None:
    """Put back inputs that the exporter left out because nothing depends on them: callers give them all the same."""
    import onnx_ir

    found = {value.name: value for value in model.graph.inputs}
    values = [found.get(spec.name) or _input(spec) for spec in specs]
    if len(values) != len(found) or list(found) != [spec.name for spec in specs]:
        model.graph.inputs.clear()
        model.graph.inputs.extend(values)
    assert all(isinstance(value, onnx_ir.Value) for value in values)


def _input(spec: TensorSpec) -> onnx_ir.Value:
    import onnx_ir

    dtype = onnx_ir.DataType.from_numpy(_numpy(spec.dtype))
    return onnx_ir.Value(name=spec.name, shape=_shape(spec.shape), type=onnx_ir.TensorType(dtype))


def _numpy(dtype: str) -> Any:
    import numpy as np

    return np.dtype(dtype)


def _shape(dims: Sequence[int | str | None]) -> onnx_ir.Shape:
    import onnx_ir

    return onnx_ir.Shape(list(dims))


def _dimensions(model: onnx_ir.Model, envelope: Envelope) -> dict[str, str]:
    """By the exporter's symbol: the name of the dimension; raises FrozenDimension."""
    found: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, envelope.specs, strict=True):
        for axis, name in envelope.axes.get(spec.name, {}).items():
            dim = value.shape[axis]
            if isinstance(dim, int):
                raise FrozenDimension(f"dimension {name!r} of input {spec.name!r} came out fixed at {dim}")
            symbol = dim.value or name
            if not re.fullmatch(r"\w+", symbol):
                raise FrozenDimension(f"dimension {name!r} of input {spec.name!r} must be {symbol}")
            if found.setdefault(symbol, name) != name:
                raise FrozenDimension(f"dimensions {found[symbol]!r} and {name!r} must be equal")
    return found


def _rename_dimensions(model: onnx_ir.Model, renamed: Mapping[str, str]) -> None:
    """Use the names wherever the exporter's symbols stand, also inside expressions."""
    import onnx_ir

    changes = {symbol: name for symbol, name in renamed.items() if symbol != name}
    if not changes:
        return
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in sorted(changes)))
    for body in (model.graph, *model.functions.values()):
        for node in body.all_nodes():
            for value in node.outputs:
                if value.shape is not None and not value.shape.is_static():
                    value.shape = onnx_ir.Shape(
                        [
                            pattern.sub(lambda m: changes[m[0]], dim.value)
                            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value
                            else dim
                            for dim in value.shape
                        ]
                    )


def _output_dim(name: str | None, axis: int, dim: int | str | None, exported: Any) -> int | str:
    """An output's dimension: as observed, else as the exporter derived it, else a name of its own."""
    if isinstance(dim, str):
        return dim
    symbol = getattr(exported, "value", None)
    if symbol:  # what was the same at every size tried may still depend on values
        return str(symbol)
    return dim if isinstance(dim, int) else f"{name}_dim{axis}"


def _rename_weights(model: onnx_ir.Model) -> None:
    """Call weights as the user's module does, without the wrapper's prefix."""
    prefix = f"{INNER}."
    values = [value for value in model.graph.initializers.values() if (value.name or "").startswith(prefix)]
    taken = {value.name for value in model.graph.initializers.values()} | {
        value.name for node in model.graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None
    }
    taken |= {value.name for value in model.graph.inputs}
    for value in values:
        (name,) = unique([str(value.name).removeprefix(prefix)], [str(other) for other in taken])
        taken.add(name)
        value.name = name


def _trim_metadata(model: onnx_ir.Model) -> None:
    """Of what the exporter notes about itself, keep where in the user's module each node comes from."""
    bodies = [model.graph, *model.functions.values()]
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for body in bodies:
        body.metadata_props.clear()
        for node in body.all_nodes():
            scopes = _scopes(node.metadata_props.get(_SCOPES, ""))
            node.metadata_props.clear()
            if scopes:
                node.metadata_props[_SCOPES] = scopes
            values += node.outputs
    for value in values:
        value.metadata_props.clear()


def _scopes(text: str) -> str:
    """The modules around a node by their names in the user's module, such as "['', 'encoder', 'encoder.layer.0']"."""
    try:
        names = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):
        return ""
    own = [name.removeprefix(f"{INNER}.") for name in names if name not in ("", INNER)]
    return str(["", *own]) if own else ""
