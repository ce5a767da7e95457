"""Shards as Parquet tables, which `datasets.load_dataset` and pyarrow read, one row for each latent. No torch.

Latents differ in shape, so an array is a flat list beside its shape (C, h, w): row["mean"].reshape(row["shape"]). The
features are declared in the schema as the datasets library does it. pyarrow is imported where it is needed: encoding
to the other formats does without.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdvae.errors import ConfigError, LatentFileError
from sdvae.latents.header import TENSOR_NAMES, ArrayItem, LatentHeader, parse_header

if TYPE_CHECKING:
    import pyarrow

__all__ = ["check_installed", "file_name", "is_file_name", "read_headers", "read_items", "to_bytes"]

_ROW_GROUP = 100  # rows: what a reader of single rows has to load
_FACTS = {  # beside the arrays; a number is None for a shift_factor that the VAE does not have
    "key": "string",
    "image_width": "int32",
    "image_height": "int32",
    "source_width": "int32",
    "source_height": "int32",
    "source_digest": "string",
    "vae_digest": "string",
    "scaling_factor": "float64",
    "shift_factor": "float64",
}
_HEADER = "sdvae"


def check_installed() -> None:
    """Raises: ConfigError where pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError("format parquet needs pyarrow, which is not installed: pip install pyarrow") from error


def file_name(number: int, part: str = "") -> str:
    """The name of a shard, counted from 0: part-000000.parquet, or of a part of a run part-2-of-8-000000.parquet."""
    return f"part-{part}{part and '-'}{number:06d}.parquet"


def is_file_name(name: str) -> bool:
    """Whether `file_name` gives this name to some shard."""
    return re.fullmatch(r"part-(\d+-of-\d+-)?\d{6,}\.parquet", name) is not None


def to_bytes(items: Sequence[ArrayItem]) -> bytes:
    """The shard, rows in the order of the items, which all have the same space and dtype."""
    import pyarrow.parquet as pq

    names = TENSOR_NAMES[items[0][0].space]
    schema = _schema(names, items[0][0].latent_dtype)
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        schema,
        use_dictionary=["source_digest", "vae_digest"],
        write_statistics=list(_FACTS),
        compression={name: "none" if name in names else "zstd" for name in schema.names},  # latents do not shrink
    ) as writer:
        for start in range(0, len(items), _ROW_GROUP):
            writer.write_table(_table(items[start : start + _ROW_GROUP], names, schema))
    return buffer.getvalue()


def read_headers(path: Path) -> list[LatentHeader]:
    """What the latents of a shard say of themselves, without reading their arrays. Raises: LatentFileError."""
    headers = []
    for table in _row_groups(path, [_HEADER]):
        headers += [parse_header(text, path) for text in table[_HEADER].to_pylist()]
    return headers


def read_items(path: Path) -> Iterator[ArrayItem]:
    """Headers and arrays, one by one. Raises: LatentFileError, also where a column contradicts the header."""
    for table in _row_groups(path, None):
        facts = {name: table[name].to_pylist() if name in table.column_names else None for name in _FACTS}
        shapes = table["shape"].to_pylist()
        for row, text in enumerate(table[_HEADER].to_pylist()):
            header = parse_header(text, path)
            for name, expected in _facts(header).items():
                if (column := facts[name]) is None or column[row] != expected:
                    found = "is missing" if column is None else f"has {column[row]!r}; its header says {expected!r}"
                    raise LatentFileError(
                        f"{path}: damaged latent file: row of {header.source.key!r}: the column {name} {found}"
                    )
            try:
                arrays = {
                    name: table[name][row].values.to_numpy(zero_copy_only=False).reshape(shapes[row]).copy()
                    for name in TENSOR_NAMES[header.space]
                }
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise LatentFileError(f"{path}: damaged latent file: row of {header.source.key!r}: {error}") from error
            yield header, arrays


def _row_groups(path: Path, columns: list[str] | None) -> Iterator[pyarrow.Table]:
    check_installed()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if _HEADER not in file.schema_arrow.names:
                raise LatentFileError(f"{path}: a Parquet file, but no latents of sdvae (no column '{_HEADER}')")
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise LatentFileError(f"{path}: cannot be read as a shard of latents: {error}") from error


def _table(items: Sequence[ArrayItem], names: Sequence[str], schema: pyarrow.Schema) -> pyarrow.Table:
    import pyarrow as pa

    facts = [_facts(header) for header, _ in items]
    columns = {name: [row[name] for row in facts] for name in _FACTS}
    columns["shape"] = [list(arrays[names[0]].shape) for _, arrays in items]
    columns[_HEADER] = [json.dumps(header.to_json()) for header, _ in items]
    arrays = {name: pa.array(column, schema.field(name).type) for name, column in columns.items()}
    for name in names:
        flat = [item[name].reshape(-1) for _, item in items]
        offsets = pa.array(np.cumsum([0, *(len(values) for values in flat)]), pa.int32())
        values = pa.array(np.concatenate(flat), schema.field(name).type.value_type)
        arrays[name] = pa.ListArray.from_arrays(offsets, values)
    return pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema)


def _facts(header: LatentHeader) -> dict[str, Any]:
    return {
        # Parquet takes UTF-8 only: a name that holds none is complete in the header.
        "key": header.source.key.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
        "image_width": header.image.width,
        "image_height": header.image.height,
        "source_width": header.source.width,
        "source_height": header.source.height,
        "source_digest": header.source.digest,
        "vae_digest": header.vae.digest,
        "scaling_factor": header.vae.scaling_factor,
        "shift_factor": header.vae.shift_factor,
    }


def _schema(names: Sequence[str], dtype: str) -> pyarrow.Schema:
    import pyarrow as pa

    number = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    text = {"string": pa.string(), "int32": pa.int32(), "float64": pa.float64()}
    fields = [(name, text[kind]) for name, kind in _FACTS.items()]
    fields += [("shape", pa.list_(pa.int32(), 3)), *((name, pa.list_(number)) for name in names)]
    fields += [(_HEADER, pa.string())]
    features = {name: {"dtype": kind, "_type": "Value"} for name, kind in _FACTS.items()}
    features["shape"] = _sequence("int32", 3)
    features |= {name: _sequence(dtype, -1) for name in names}
    features[_HEADER] = {"dtype": "string", "_type": "Value"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _sequence(dtype: str, length: int) -> dict[str, Any]:
    """A list as `datasets` declares it, under the name that versions before 4 know too."""
    return {"feature": {"dtype": dtype, "_type": "Value"}, "length": length, "_type": "Sequence"}
