"""Tables of any schema, whose values come from random bytes: dates of any year, decimals of any length, text that is
not UTF-8."""

import pyarrow as pa
from hypothesis import strategies as st

ARROW_TYPES = st.recursive(
    st.sampled_from(
        [
            *(pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.string(), pa.large_string()),
            *(pa.binary(), pa.large_binary(), pa.date32(), pa.date64(), pa.time32("s"), pa.time64("ns"), pa.null()),
            *(pa.timestamp("ns", tz="UTC"), pa.timestamp("s", tz="+07:30"), pa.timestamp("us"), pa.duration("ns")),
            *(pa.decimal128(38, 9), pa.decimal256(76, 0), pa.dictionary(pa.int32(), pa.string()), pa.string_view()),
        ]
    ),
    lambda inner: st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        inner.map(lambda kind: pa.map_(pa.string(), kind)),
        st.lists(st.tuples(st.sampled_from("abc"), inner), min_size=1, max_size=3).map(pa.struct),
    ),
    max_leaves=4,
)


@st.composite
def arrow_tables(draw: st.DrawFn, names: st.SearchStrategy[str]) -> pa.Table:
    """Up to three columns, which may have one name, of up to three rows."""
    fields = draw(st.lists(st.tuples(names, ARROW_TYPES), max_size=3))
    num_rows = draw(st.integers(0, 3))
    return pa.Table.from_arrays(
        [_array(kind, num_rows, draw) for _, kind in fields], names=[name for name, _ in fields]
    )


def _array(kind: pa.DataType, size: int, draw: st.DrawFn) -> pa.Array:
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        arrays = [_array(field.type, size, draw) for field in fields]
        return pa.StructArray.from_arrays(arrays, fields=fields) if size else pa.array([], kind)
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_decimal(kind) or pa.types.is_primitive(kind):
        width = max(kind.bit_width // 8, 1)
        content = draw(st.binary(min_size=width * size, max_size=width * size))
        return pa.Array.from_buffers(kind, size, [None, pa.py_buffer(content)])
    if pa.types.is_string(kind):
        texts = [draw(st.binary(max_size=3)) for _ in range(size)]
        return pa.Array.from_buffers(kind, size, pa.array(texts, pa.binary()).buffers())
    return pa.nulls(size, kind)
