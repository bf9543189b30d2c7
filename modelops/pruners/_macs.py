"""The products of a network: nodes that multiply and add, and the axes that say how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelops.pruners._axes import Place
from modelops.pruners._network import Network

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Product:
    """A node that multiplies and adds: a number times the sizes of axes that may be cut."""

    node: ir.Node
    places: tuple[Place, ...]
    sizes: tuple[int, ...]
    rest: int

    @property
    def macs(self) -> int:
        return math.prod(self.sizes) * self.rest


def products(network: Network) -> list[Product]:
    """Every convolution and matrix product of the main graph, for the run in which shapes were seen."""
    found = []
    for node in network.nodes:
        shape = network.shape(node.outputs[0]) if node.outputs else None
        weight = network.shape(node.inputs[1]) if len(node.inputs) > 1 else None
        if shape is None or weight is None:
            continue
        made = [Place(node.outputs[0], k) for k in range(len(shape))]
        if node.op_type == "Conv":
            per_pixel = math.prod(weight[2:])
            found.append(_product(node, made, shape, [_input(network, node, 1, 1)], (weight[1],), per_pixel))
        elif node.op_type == "ConvTranspose":
            pixels = network.shape(node.inputs[0]) or ()
            given = [Place(_value(node, 0), k) for k in range(len(pixels))]
            per_pixel = math.prod(weight[2:])
            found.append(_product(node, given, pixels, [_input(network, node, 1, 1)], (weight[1],), per_pixel))
        elif node.op_type in ("MatMul", "Gemm"):
            inner = 0 if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) else -1
            before = network.shape(node.inputs[0])
            if before:
                k = inner % len(before)
                found.append(_product(node, made, shape, [_input(network, node, 0, k)], (before[k],), 1))
        elif node.op_type in ("Attention", "MultiHeadAttention"):
            queries = network.shape(node.inputs[0]) or ()
            given = [Place(_value(node, 0), k) for k in range(len(queries))]
            # Queries times keys, and weights times values; of keys, their number counts.
            found.append(_product(node, given, queries, [_input(network, node, 1, len(weight) - 2)], (weight[-2],), 2))
    return found


def _product(
    node: ir.Node, made: list[Place], shape: tuple[int, ...], inner: list[Place], sizes: tuple[int, ...], rest: int
) -> Product:
    return Product(node, (*made, *inner), (*shape, *sizes), rest)


def _value(node: ir.Node, number: int) -> ir.Value:
    value = node.inputs[number]
    assert value is not None
    return value


def _input(network: Network, node: ir.Node, number: int, axis: int) -> Place:
    value = _value(node, number)
    return Place(value, axis, (node, number) if network.weight(value) else None)
