"""Rows of Arrow tables: Parquet files, and what `datasets` loads. Both give the values that JSON would."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from rlhf.errors import DataError
from rlhf.orchestrator.data.files import Row, Source, read_bytes, too_long
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.progress import Progress
from rlhf.orchestrator.data.values import plain
from rlhf.types import Json

if TYPE_CHECKING:
    import pyarrow

MAX_BATCH_ROWS = 128
BATCH_BYTES = 16 * 2**20
CONVERSION_ERRORS = (ValueError, LookupError, ArithmeticError, TypeError, NotImplementedError, RecursionError)
"""What Arrow raises for a value that Python does not have, e.g. a date after the year 9999."""


def read_parquet(source: Source, problems: Problems) -> Iterator[Row]:
    """Parquet. A row's place is its number, from 1."""
    # Imported here because it takes half a second, and only Parquet needs it.
    import pyarrow.parquet  # noqa: PLC0415

    try:
        content = source.path if source.path.suffix != ".gz" else io.BytesIO(read_bytes(source))
        with pyarrow.parquet.ParquetFile(content) as file:
            total = max(file.metadata.num_rows, 1)
            refuse_repeated_fields(file.schema_arrow, source.label)
            size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
            num_rows = max(min(BATCH_BYTES * total // max(size, 1), MAX_BATCH_ROWS), 1)
            yield from rows_of(file.iter_batches(batch_size=num_rows), source, problems, total)
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, *CONVERSION_ERRORS) as error:
        no_footer = any(sign in str(error) for sign in ("footer", "file size is"))
        reason = "no footer" if no_footer else first_line(error)
        raise DataError(f"{source.label}: damaged file ({reason}).") from error


def rows_of(
    batches: "Iterable[pyarrow.RecordBatch]", source: Source, problems: Problems, num_rows: int
) -> Iterator[Row]:
    """The good rows of a table. A value that no row may hold goes to `problems`."""
    progress = Progress(f"reading {source.label}", num_rows, "rows")
    number = 0
    for batch in batches:
        for values in _values(batch, source.max_row_bytes):
            number += 1
            where = f"{source.label}:{number}"
            try:
                if isinstance(values, ValueError):
                    raise values
                yield Row(file=source.label, where=where, values={name: plain(v, name) for name, v in values.items()})
            except ValueError as error:
                problems.add_row(source.label, where, f"{error}.")
        progress.reach(number)


def refuse_repeated_fields(schema: "pyarrow.Schema", label: str) -> None:
    """Raise DataError naming every column, and every field of a column's objects, that is there twice."""
    repeated = _repeated("", [schema.field(index) for index in range(len(schema.names))])
    if repeated:
        names = [json.dumps(name, ensure_ascii=False) for name in repeated]
        raise DataError([f"{label}: column {name} is there twice." for name in names])


def first_line(error: BaseException) -> str:
    """What a library says is wrong, in one line."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _repeated(path: str, fields: "list[pyarrow.Field]") -> list[str]:
    names = [field.name for field in fields]
    found = [f"{path}{name}" for name in dict.fromkeys(names) if names.count(name) > 1]
    for field in fields:
        kind = field.type
        inner = [kind.field(index) for index in range(kind.num_fields)]
        found += _repeated(f"{path}{field.name}.", inner)
    return found


def _values(batch: "pyarrow.RecordBatch", max_row_bytes: int) -> Iterator[Mapping[str, object] | ValueError]:
    """The rows of a batch as Python objects, or what is wrong with each. All at once where no row can be too long."""
    batch = _decoded(batch)
    if batch.nbytes <= max_row_bytes:
        try:
            rows = batch.to_pylist(maps_as_pydicts="strict")
        except CONVERSION_ERRORS:
            pass  # one by one, to find the row
        else:
            yield from rows
            return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        yield ValueError(too_long(max_row_bytes)) if row.nbytes > max_row_bytes else _one(row)


def _decoded(batch: "pyarrow.RecordBatch") -> "pyarrow.RecordBatch":
    """Columns stored as numbers of a list of values, as the values: else a row would seem to hold all of the list.
    Short floats as the numbers that were written: 0.1 in 32 bits is 0.1, not 0.10000000149."""
    import pyarrow  # noqa: PLC0415

    plain_columns = [
        array.dictionary_decode() if pyarrow.types.is_dictionary(array.type) else array for array in batch.columns
    ]
    short = (pyarrow.float16(), pyarrow.float32())
    arrays = [
        pyarrow.array(_written(array), pyarrow.float64()) if array.type in short else array for array in plain_columns
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _written(array: "pyarrow.Array") -> list[float | None]:
    given = array.to_numpy(zero_copy_only=False)
    return [float(str(given[index])) if array[index].is_valid else None for index in range(len(array))]


def _one(row: "pyarrow.RecordBatch") -> Mapping[str, Json] | ValueError:
    """A batch of one row as Python objects."""
    values = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            (values[name],) = column.to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError:
            return ValueError(f"{name} holds text that is not UTF-8")
        except CONVERSION_ERRORS as error:
            return ValueError(f"{name} cannot be read ({first_line(error)})")
    return values
