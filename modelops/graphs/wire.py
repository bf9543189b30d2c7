"""ONNX files read without their weights: large ``raw_data`` stays in the file and is remembered as a span.

A protobuf parser copies every byte of a file into memory. :func:`skeleton` copies all but the large tensors, and puts
a random token where each of them was; the parser then sees a small, complete message, and whatever it makes of it
(fields given twice, messages merged) applies to the tokens as it would have to the weights.
"""

from __future__ import annotations

import secrets
from typing import Final

#: Tensors below this size are cheaper to parse than to remember.
LARGE: Final = 16 * 1024
#: Nested messages on the way to a tensor: onnx.proto's field numbers, by message.
_INSIDE: Final[dict[str, dict[int, str]]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
_RAW_DATA: Final = 9
_DEEPEST: Final = 100  # what protobuf itself allows


class Malformed(ValueError):
    """The bytes are no protobuf message; the text says where."""


def skeleton(data: memoryview) -> tuple[bytes, dict[bytes, tuple[int, int]]]:
    """The message without its large tensors, and for each token put in their place the (offset, length) of the bytes.

    Raises Malformed when the message is cut short or garbled on the way to a tensor.
    """
    nonce = secrets.token_bytes(24)
    spans: dict[bytes, tuple[int, int]] = {}
    pieces: list[memoryview | bytes] = []
    _copy(data, 0, len(data), "Model", 0, nonce, spans, pieces)
    return b"".join(pieces), spans


def _copy(
    data: memoryview,
    start: int,
    end: int,
    message: str,
    depth: int,
    nonce: bytes,
    spans: dict[bytes, tuple[int, int]],
    pieces: list[memoryview | bytes],
) -> int:
    """Append the message's skeleton to ``pieces``; its length."""
    if depth > _DEEPEST:
        raise Malformed(f"messages are nested more than {_DEEPEST} deep")
    inside, written, position, kept = _INSIDE[message], 0, start, start
    while position < end:
        field_start = position
        tag, position = _varint(data, position, end)
        wire, number = tag & 7, tag >> 3
        if wire != 2:
            position = _skip(data, position, end, wire)
            continue
        length, position = _varint(data, position, end)
        body, position = position, position + length
        if position > end:
            raise Malformed(f"field {number} of {message} at byte {field_start} ends {position - end} bytes too late")
        if length < LARGE:
            continue
        if message == "Tensor" and number == _RAW_DATA:
            token = nonce + len(spans).to_bytes(8, "little")
            spans[token] = (body, length)
            inner: list[memoryview | bytes] = [token]
            size = len(token)
        elif number in inside:
            inner = []
            size = _copy(data, body, position, inside[number], depth + 1, nonce, spans, inner)
        else:
            continue
        head = _encode(tag) + _encode(size)
        pieces += [data[kept:field_start], head, *inner]
        written += field_start - kept + len(head) + size
        kept = position
    pieces.append(data[kept:end])
    return written + end - kept


def _skip(data: memoryview, position: int, end: int, wire: int) -> int:
    if wire == 0:
        return _varint(data, position, end)[1]
    if wire not in (1, 5):
        raise Malformed(f"wire type {wire} at byte {position} does not occur in ONNX files")
    position += 8 if wire == 1 else 4
    if position > end:
        raise Malformed(f"a number at byte {position} is cut short")
    return position


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise Malformed(f"a number at byte {position} is too long")
    raise Malformed(f"a number at byte {position} is cut short")


def _encode(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
