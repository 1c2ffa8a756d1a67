"""The map of the segment: ids, versions, and where the columns lie."""

from __future__ import annotations

import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmsock
from shmsock import layout
from shmsock.layout import (
    ALIGN_BYTES,
    PAGE_BYTES,
    Layout,
    format_socket_id,
    make_socket_id,
    parse_socket_id,
    recycled_version,
)

versions = st.integers(1, (1 << 30) - 1).map(lambda half: 2 * half)
slots = st.integers(0, (1 << 32) - 1)
layouts = st.builds(Layout.fit, st.integers(1, 5000), st.integers(1, 200), st.integers(1, 100))


def test_socket_id_is_version_over_slot() -> None:
    assert make_socket_id(0x5F3A2C10, 17) == 0x5F3A2C10_00000011
    assert format_socket_id(0x5F3A2C10_00000011) == "sk-5f3a2c10-17"
    assert parse_socket_id("sk-5f3a2c10-17") == 0x5F3A2C10_00000011


@given(versions, slots)
def test_id_survives_text_and_decimal(version: int, slot: int) -> None:
    sid = make_socket_id(version, slot)
    assert 0 < sid < 1 << 63
    assert (sid >> 32, sid & 0xFFFFFFFF) == (version, slot)
    assert parse_socket_id(format_socket_id(sid)) == sid
    assert parse_socket_id(format_socket_id(sid).upper().replace("SK-", "sk-")) == sid
    assert parse_socket_id(f" {sid}\n") == sid
    assert format_socket_id(typing.cast(int, np.uint64(sid))) == format_socket_id(sid)


@given(st.text() | st.from_regex(r"sk-[0-9a-fx_-]{0,12}-[0-9_]{0,12}", fullmatch=True))
def test_any_text_is_an_id_below_2_63_or_a_value_error(text: str) -> None:
    try:
        sid = parse_socket_id(text)
    except ValueError:
        return
    assert 0 <= sid < 1 << 63
    assert parse_socket_id(format_socket_id(sid)) == sid


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "sk-", "sk-5", "sk-5-", "sk--5", "sk--5-1", "sk-g-3", "sk-0x1f-3", "sk-1_0-3",
        "sk-1-1_0", "sk-1-+3", "sk-1-2-3", "sk-\u0663-3", "sk-1-\u0663", "sk-1-\u00b2", "\u0663",
        "\u00b2", "-1", "+5", "1.0",
        "1e5", "0x10", "1_0", "sk-80000000-0", "sk-123456789-1", "sk-1-4294967296", "SK-2-1",
        "9223372036854775808", "99999999999999999999999", "sk-2-1 2", "sk- 2-1",
    ],
)  # fmt: skip
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a SocketId"):
        parse_socket_id(text)


@given(versions)
def test_following_version_is_even_positive_and_in_31_bits(version: int) -> None:
    following = recycled_version(version + 1)
    assert following % 2 == 0
    assert 2 <= following < layout.VERSION_LIMIT
    assert following == version + 2 or version == layout.VERSION_LIMIT - 2


def test_versions_wrap_past_zero_to_two() -> None:
    assert recycled_version(layout.VERSION_LIMIT - 1) == 2
    assert recycled_version(layout.VERSION_LIMIT - 3) == layout.VERSION_LIMIT - 2


@given(layouts)
def test_columns_are_aligned_disjoint_and_inside(sizes: Layout) -> None:
    columns, total_bytes = sizes.columns()
    end = max(PAGE_BYTES, layout.ADDRESS_OFFSET + layout.ADDRESS_BYTES)
    for column in columns:
        assert column.offset % ALIGN_BYTES == 0
        assert column.offset >= end
        end = column.offset + int(np.prod(column.shape)) * np.dtype(column.dtype).itemsize
    assert end <= total_bytes
    assert total_bytes % PAGE_BYTES == 0
    assert len({column.name for column in columns}) == len(columns)


def test_header_words_end_before_the_control_address() -> None:
    assert 8 * len(layout.HEADER_WORDS) <= layout.ADDRESS_OFFSET
    assert layout.HEADER_WORDS[-1] == "init_done"


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 12))
def test_fit_gives_whole_blocks_of_at_least_the_slots_asked_for(count: int, stripes: int) -> None:
    sizes = Layout.fit(count, 1, stripes)
    assert sizes.slots >= count
    assert sizes.slots - count < sizes.stripes <= stripes
    assert sizes.block * sizes.stripes == sizes.slots


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((0, 1, 1), "slots"),
        (((1 << 24) + 1, 1, 1), "slots"),
        ((8, 0, 1), "processes"),
        ((8, (1 << 15) + 1, 1), "processes"),
        ((8, 1, 0), "stripes"),
        ((1 << 13, 1, 1 << 13), "stripes"),
        ((9, 1, 2), "multiple of stripes"),
    ],
)
def test_impossible_sizes_are_refused_by_name(sizes: tuple[int, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Layout(*sizes)


def test_shared_names_agree_with_the_public_ones() -> None:
    assert shmsock.KIND_NAMES is layout.KIND_NAMES
    assert shmsock.INVALID_SOCKET_ID == 0
