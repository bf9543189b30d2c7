"""JSON lines: texts through the artifact's tokenizer, or arrays by input name; ``label`` is the label."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from modelops.core.component import option
from modelops.core.extras import pip_hint
from modelops.core.tensors import Signature, TensorSpec
from modelops.datasets import Context, Dataset, Sample
from modelops.errors import EnvironmentMissing, InputRefused, UsageError, from_os_error, missing_path, nearest
from modelops.graphs.batches import BatchAxis

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LONGEST_LINE = 64 << 20
_LONGEST_TEXT = 512  # tokens, where neither the model nor its tokenizer says
_TOKENIZER = "tokenizer.json"
_TEXT_KEYS = ("text", "text_pair", "label")


class Jsonl(Dataset):
    """JSON lines: {"text": …, "text_pair": …, "label": …}, or arrays by input name ({"x": [1, 2], "label": 0})."""

    names_inputs = True
    tools = ("tokenizers",)

    max_length: int | None = option(
        default=None,
        help="Tokens to keep of each text; by default what the model or its tokenizer says, or 512.",
        min=1,
    )

    @classmethod
    def reads(cls, path: Path) -> bool:
        return path.suffix in (".jsonl", ".ndjson") and path.is_file()

    def samples(self, path: Path, context: Context, limit: int | None = None) -> Iterator[Sample]:
        encoder: _Encoder | None = None
        for number, (key, record) in enumerate(_records(path)):
            if limit is not None and number >= limit:
                return
            if "text" in record and not context.known:
                raise InputRefused(
                    f"{key}: a text does not tell what the model takes",
                    hint='say it: --input "input_ids:int64[batch,sequence]"',
                )
            if "text" in record and not any(spec.name == "text" for spec in context.signature.inputs):
                encoder = encoder or _Encoder(context, self.max_length)
                yield Sample(encoder.feed(record, key), record.get("label"), key)
            else:
                feed = {name: _array(value, name, key) for name, value in record.items() if name != "label"}
                yield Sample(feed, record.get("label"), key)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", record) of every line that is not blank."""
    if path.exists() and not path.is_file():
        raise InputRefused(f"{path} is not a regular file", hint="give a file")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_lines(file, path), 1):
                if line.strip():
                    yield f"{path}:{number}", _record(line, f"{path}:{number}")
    except FileNotFoundError as error:
        raise missing_path("file", path) from error
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise InputRefused(f"{path} has a line of more than {_LONGEST_LINE} bytes", hint="give one record per line")
        yield line


def _record(line: bytes, key: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{key} is not JSON: {error}", hint="give one JSON object per line") from error
    if not isinstance(record, dict):
        raise InputRefused(f"{key} is a {type(record).__name__}, not an object", hint="give one JSON object per line")
    return record


def _array(value: Any, name: str, key: str) -> Any:
    import numpy as np

    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise InputRefused(f"{key}: {name!r} is no array: {error}", hint="rows need equal lengths") from error
    if array.dtype.hasobject:
        raise InputRefused(f"{key}: {name!r} is no array of numbers or texts", hint="give nested lists of numbers")
    return array


class _Encoder:
    """Texts → the model's inputs."""

    def __init__(self, context: Context, max_length: int | None) -> None:
        self._signature = context.signature
        self._tokenizer = _tokenizer(context)
        fixed = _fixed_length(context.signature)
        if fixed is not None and max_length is not None and max_length > fixed:
            raise UsageError(f"--max-length {max_length} is more than the {fixed} that the model takes")
        own = (self._tokenizer.truncation or {}).get("max_length")
        self._tokenizer.enable_truncation(max_length or fixed or own or _LONGEST_TEXT)
        padding = self._tokenizer.padding or {}
        self._tokenizer.no_padding()
        if fixed is not None:
            self._tokenizer.enable_padding(
                length=fixed, pad_id=padding.get("pad_id", 0), pad_token=padding.get("pad_token", "[PAD]")
            )

    def feed(self, record: Mapping[str, Any], key: str) -> dict[str, Any]:
        for name in record:
            if name not in _TEXT_KEYS:
                guess = nearest(name, _TEXT_KEYS)
                hint = f"did you mean {guess!r}?" if guess else f"a text record holds {', '.join(_TEXT_KEYS)}"
                raise InputRefused(f"{key}: unknown key {name!r}", hint=hint)
        texts = [record["text"], *([record["text_pair"]] if record.get("text_pair") is not None else [])]
        if not all(isinstance(text, str) for text in texts):
            raise InputRefused(f"{key}: the text is not a string", hint='write {"text": "…"}')
        try:
            encoded = self._tokenizer.encode(*texts)
        except Exception as error:  # tokenizers raises plain Exceptions
            raise InputRefused(f"{key} can't be tokenized: {error}", hint="repair or remove the record") from error
        if not encoded.ids:
            raise InputRefused(f"{key}: the text gives no tokens", hint="remove the record")
        return {spec.name: self._values(spec, encoded, key) for spec in self._signature.inputs}

    def _values(self, spec: TensorSpec, encoded: Any, key: str) -> Any:
        import numpy as np

        name = spec.name.lower()
        if "mask" in name:
            return np.array(encoded.attention_mask, dtype=np.int64)
        if "type" in name or "segment" in name:
            return np.array(encoded.type_ids, dtype=np.int64)
        if "position" in name:
            return np.arange(len(encoded.ids), dtype=np.int64)
        if "ids" in name or "token" in name or len(self._signature.inputs) == 1:
            return np.array(encoded.ids, dtype=np.int64)
        raise InputRefused(f"{key}: a text gives no values for the input {spec.name!r}", hint="give arrays instead")


def _tokenizer(context: Context) -> Tokenizer:
    """The artifact's own tokenizer."""
    place = context.directory / _TOKENIZER if context.directory is not None else None
    if place is None or not place.is_file():
        raise InputRefused(
            f"texts need a {_TOKENIZER}, and the artifact has none",
            hint="convert the model from a directory that holds one, or give arrays",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EnvironmentMissing(
            "texts need the package tokenizers, not installed here", hint=pip_hint(["tokenizers"])
        ) from error
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(place))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise InputRefused(f"{place} is not a tokenizer: {error}", hint="make the artifact anew") from error
    return tokenizer


def _fixed_length(signature: Signature) -> int | None:
    """The length that every sequence must have, where the model fixes it."""
    axis = BatchAxis.of(signature)
    for spec in signature.inputs:
        shape = axis.sample_shape(spec)
        if len(shape) == 1 and isinstance(shape[0], int):
            return shape[0]
    return None
