"""What int8 models are made for: which integers a machine's kernels are fast and right with.

===========  ============  =========  ==========================================================================
target       activations   weights    why
===========  ============  =========  ==========================================================================
x86-vnni     uint8         int8       products of uint8 and int8 add up in 32 bits
x86-avx2     uint8         7 bits     the same kernel adds pairs in 16 bits, and int8 weights of 8 bits overflow
arm          int8          int8       dot products of int8 and int8
gpu-qdq      int8, zero 0  int8       TensorRT takes symmetric integers, a pair of its own for every reader, and
                                      biases in float
openvino     uint8         int8       as its own tools make them; 7 bits where this machine would overflow
portable     uint8         7 bits     exact on every x86 CPU, with VNNI or without, and on others too
===========  ============  =========  ==========================================================================

``auto`` asks the kernels of this machine themselves: which are fast, and whether one overflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from modelops.errors import unknown_name

TargetName = Literal["auto", "x86-vnni", "x86-avx2", "arm", "gpu-qdq", "openvino", "portable"]


@dataclass(frozen=True)
class Target:
    """What a method has to know of the kernels that will run its model.

    ``options`` are those of onnxruntime's QDQ writer; ``here`` says whether this machine runs such kernels, so that its
    timings mean something. ``pairs`` says that it takes QuantizeLinear and DequantizeLinear alone, and ``fuses`` that
    it knows onnxruntime's fused operators.
    """

    name: str
    signed: bool = False
    reduced: bool = False
    here: bool = True
    pairs: bool = False
    fuses: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def activations(self) -> str:
        return "int8" if self.signed else "uint8"

    @property
    def exact(self) -> bool:
        """Whether its kernels don't overflow, and this machine's may: what runs here must be computed another way."""
        return not self.reduced and not self.here

    def to_dict(self) -> dict[str, Any]:
        """For manifests: what the integers are like."""
        weights = "int8, 7 bits" if self.reduced else "int8"
        symmetric = bool(self.options.get("ActivationSymmetric"))
        return {"name": self.name, "activations": self.activations, "weights": weights, "symmetric": symmetric}


_TARGETS = {
    target.name: target
    for target in (
        Target("x86-vnni"),
        Target("x86-avx2", reduced=True),
        Target("arm", signed=True),
        Target(
            "gpu-qdq",
            signed=True,
            pairs=True,
            fuses=False,
            options={"ActivationSymmetric": True, "DedicatedQDQPair": True, "QuantizeBias": False},
        ),
        Target("openvino", fuses=False),
        Target("portable", reduced=True),
    )
}


def known(name: str) -> Target | None:
    """What is known of the target without asking this machine's kernels; None for ``auto``."""
    return _TARGETS.get(name)


def resolve(name: str) -> Target:
    """The target of that name, with what this machine's kernels say where it depends on them."""
    from modelops.quantizers import _kernels

    if name == "auto":
        return _of_this_machine(_kernels.probed())
    if name not in _TARGETS:
        raise unknown_name("target", name, ["auto", *_TARGETS])
    target = _TARGETS[name]
    if name == "portable":
        return target
    if name == "openvino":
        # Its kernels are those of the CPU too, but a model is timed where --backend says.
        return replace(target, reduced=_kernels.probed().overflows, here=False)
    return replace(target, here=name == _of_this_machine(_kernels.probed()).name)


def _of_this_machine(kernels: Any) -> Target:
    # Where pairs add up in 16 bits they do so with signed activations too, however fast those looked.
    if kernels.overflows:
        return _TARGETS["x86-avx2"]
    return _TARGETS["arm"] if kernels.signed else _TARGETS["x86-vnni"]
