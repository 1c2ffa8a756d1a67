"""The parser of commands: any cut of a stream, any damage to it, and what a header may cost."""

from __future__ import annotations

import itertools
import tracemalloc
import typing

import hiredis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import resp


def parse(*chunks: bytes, **options: object) -> tuple[list[resp.Command], bytes | None, bool]:
    """The commands without the empty ones, the error that ended them, whether nothing is left."""
    parser = resp.CommandParser(**options)  # type: ignore[arg-type]
    commands: list[resp.Command] = []
    try:
        for chunk in chunks:
            parser.feed(chunk)
            while batch := parser.batch():
                commands += filter(None, batch)
    except resp.ProtocolError as error:
        return commands, error.reply, False
    return commands, None, parser.idle()


def packed(*arguments: bytes) -> bytes:
    """A command as clients send it."""
    words: typing.Any = arguments  # annotated as a tuple of one
    return bytes(hiredis.pack_command(words))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """``data`` in pieces."""
    edges = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


# Among them what could be taken for RESP, quotes and blanks.
ARGUMENTS = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [
            b"",
            b"PING",
            b"*1\r\n",
            b"$4\r\n",
            b"*9999999",
            b">99999999",
            b"+OK\r\n",
            b"\0",
            b'"',
            b"'",
        ]
    ),
)
ARRAYS = st.lists(ARGUMENTS, min_size=1, max_size=5)
WORDS = st.lists(
    st.text("abcXYZ019-_:*$+|", min_size=1, max_size=8).map(str.encode), min_size=1, max_size=4
).filter(lambda words: not words[0].startswith(b"*"))


def as_array(arguments: list[bytes]) -> tuple[bytes, list[bytes]]:
    return packed(*arguments), arguments


def as_line(words: list[bytes]) -> tuple[bytes, list[bytes]]:
    return b" ".join(words) + b"\r\n", words


def as_quoted(words: list[bytes]) -> tuple[bytes, list[bytes]]:
    return b" ".join(b'"%s"' % word for word in words) + b"\n", words


STREAMS = st.lists(
    st.one_of(
        ARRAYS.map(as_array),
        WORDS.map(as_line),
        WORDS.map(as_quoted),
        st.sampled_from([(b"*0\r\n", []), (b"\r\n", []), (b"*-1\r\n", [])]),
    ),
    max_size=8,
)
PLACES = st.lists(st.integers(0, 1000), max_size=12)


@settings(deadline=None)
@given(STREAMS, PLACES)
def test_any_cut_of_a_stream_gives_its_commands(
    stream: list[tuple[bytes, list[bytes]]], places: list[int]
) -> None:
    data = b"".join(encoded for encoded, _ in stream)
    expected = [command for _, command in stream if command]
    assert parse(data) == (expected, None, True)
    assert parse(*cut(data, places)) == (expected, None, True)


@settings(deadline=None)
@given(STREAMS)
def test_a_stream_byte_by_byte_gives_its_commands(stream: list[tuple[bytes, list[bytes]]]) -> None:
    data = b"".join(encoded for encoded, _ in stream)
    expected = [command for _, command in stream if command]
    assert parse(*[bytes((byte,)) for byte in data]) == (expected, None, True)


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 1000),
        st.integers(0, 3),
        st.sampled_from([bytes((byte,)) for byte in b"\r\n\0$*:+-_#,(=~%>|!0123456789\"' aP\\"]),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, mutations: list[tuple[int, int, bytes]]) -> bytes:
    for place, removed, added in mutations:
        at = place % (len(data) + 1)
        data = data[:at] + added + data[at + removed :]
    return data


@settings(max_examples=300, deadline=None)
@given(STREAMS, MUTATIONS, PLACES)
def test_damage_gives_the_same_commands_and_the_same_error_however_it_is_cut(
    stream: list[tuple[bytes, list[bytes]]],
    mutations: list[tuple[int, int, bytes]],
    places: list[int],
) -> None:
    data = mutated(b"".join(encoded for encoded, _ in stream), mutations)
    outcome = parse(data)
    assert parse(*cut(data, places)) == outcome
    for command in outcome[0]:
        assert {type(argument) for argument in command} == {bytes}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), PLACES)
def test_noise_raises_nothing_but_the_protocol_error(data: bytes, places: list[int]) -> None:
    assert parse(*cut(data, places)) == parse(data)


# What made hiredis's reading differ from redis-server's.
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"*0\r\n$4\r\n$4\r\n\r\n*0\r\n", [[b"$4"], [b"$4"]]),
        (b"*1\r\n$1\r\na\r\n|0\r\n", [[b"a"], [b"|0"]]),
        (b"*1\r\n$1\r\na\r\n%0\r\n", [[b"a"], [b"%0"]]),
        (b"*1\r\n$1\r\na\r\n$", [[b"a"]]),
        (b"*1\rx$4\rxPING\r\n", [[b"PING"]]),
        (b"*1\r\n$4\r\nPINGxx*1\r\n$1\r\na\r\n", [[b"PING"], [b"a"]]),
        (b"*2\r\n$4\r\nECHO\r\n$6\r\n*1\r\n$4\r\n", [[b"ECHO", b"*1\r\n$4"]]),
    ],
)
def test_hiredis_is_not_believed_where_redis_reads_otherwise(
    data: bytes, expected: list[resp.Command]
) -> None:
    assert parse(data)[:2] == (expected, None)
    assert parse(*[bytes((byte,)) for byte in data])[:2] == (expected, None)


def test_what_a_dollar_at_the_end_of_a_chunk_began_is_not_lost() -> None:
    assert parse(b"*0\r\n$", b"4\r\n") == ([[b"$4"]], None, True)


@pytest.mark.parametrize(
    "header",
    [
        b"*1048576\r\n",
        b"*1000000\r\n",
        b"*4294967295\r\n",
        b"*1\r\n*999999999\r\n",
        b"*1\r\n>999999999\r\n",
        b"*1\r\n~999999999\r\n",
        b"*1\r\n%999999999\r\n",
        b"*1\r\n|999999999\r\n",
        b"*9999\r\n" * 9,
        b"$67000000\r\n",
        b"*1\r\n$67000000\r\n",
    ],
)
@pytest.mark.parametrize("cut_at", [0, 2, 7, 11])
def test_a_header_allocates_nothing(header: bytes, cut_at: int) -> None:
    tracemalloc.start()
    try:
        parse(header[:cut_at], header[cut_at:])
        parse(b"PING\r\n" + header)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


def test_more_arguments_than_redis_ever_takes_are_refused() -> None:
    error = b"-ERR Protocol error: invalid multibulk length\r\n"
    assert parse(b"*1048577\r\n") == ([], error, False)
    assert parse(b"*1048576\r\n") == ([], None, False)


def test_a_command_of_many_arguments_is_taken() -> None:
    arguments = [b"%d" % number for number in range(30_000)]
    data = packed(*arguments)
    assert parse(data) == ([arguments], None, True)
    assert parse(*cut(data, list(range(0, len(data), 4096)))) == ([arguments], None, True)


def test_a_command_over_the_limit_is_refused_by_its_header() -> None:
    error = b"-ERR Protocol error: invalid bulk length\r\n"
    assert parse(b"*2\r\n$4\r\nECHO\r\n$981\r\n", max_message_bytes=1000)[1] == error
    assert parse(b"*2\r\n$4\r\nECHO\r\n$980\r\n", max_message_bytes=1000)[1] is None
    many = b"*100\r\n" + b"$20\r\n%s\r\n" % (b"x" * 20) * 100
    assert parse(many, max_message_bytes=1000)[1] == error
    assert parse(many[:900], many[900:], max_message_bytes=1000)[1] == error


def test_a_large_message_in_small_chunks_is_not_parsed_again_with_each() -> None:
    payload = bytes(range(256)) * 4096
    data = packed(b"PUBLISH", b"a", payload)
    parser = resp.CommandParser()
    for at in range(0, len(data) - 1, 1000):
        parser.feed(data[at : min(at + 1000, len(data) - 1)])
        assert parser.batch() == []
    assert not parser.idle()
    parser.feed(data[-1:])
    assert parser.batch() == [[b"PUBLISH", b"a", payload]]
    assert parser.idle()


def test_lines_have_a_limit_whether_they_end_or_not() -> None:
    error = b"-ERR Protocol error: too big inline request\r\n"
    longest = b"a" * (resp.MAX_INLINE_BYTES - 1)
    assert parse(longest + b"\r\n") == ([[longest]], None, True)
    assert parse(longest + b"aa\r\n") == ([], error, False)
    assert parse(longest + b"aa") == ([], error, False)
    assert parse(b"PING\r\n" + longest + b"aa\r\n") == ([[b"PING"]], error, False)


def test_the_commands_before_an_error_are_given_out_first() -> None:
    error = b"-ERR Protocol error: expected '$', got ':'\r\n"
    assert parse(b"PING\r\n*1\r\n$4\r\nPING\r\n*1\r\n:1\r\n") == ([[b"PING"]] * 2, error, False)


def test_limits_are_lifted_in_mid_stream() -> None:
    parser = resp.CommandParser(restricted=True)
    parser.feed(b"AUTH x\r\n" + packed(*[b"a"] * 11) + b"PING\r\nPING\r\n")
    assert parser.batch() == [[b"AUTH", b"x"]]
    parser.restricted = False
    assert parser.batch() == [[b"a"] * 11]
    assert parser.batch() == [[b"PING"], [b"PING"]]
    assert parser.batch() == []
    assert parser.idle()


def test_limits_hold_until_they_are_lifted() -> None:
    many = packed(*[b"a"] * 11)
    error = b"-ERR Protocol error: unauthenticated multibulk length\r\n"
    assert parse(b"PING\r\n" + many, restricted=True) == ([[b"PING"]], error, False)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", []),
        (b" \t a  b ", [b"a", b"b"]),
        (b'"a b" c', [b"a b", b"c"]),
        (b'a"b c"', [b"ab c"]),
        (b'"\\x41\\n\\q\\x4"', [b"A\nqx4"]),
        (b"'a\\'b\\n'", [b"a'b\\n"]),
        (b'""', [b""]),
        (b'"a', None),
        (b"'a'b", None),
        (b'"\\', None),
        (b"a\vb \va", [b"a\vb", b"a"]),
    ],
)
def test_inline_quoting(line: bytes, words: list[bytes] | None) -> None:
    assert resp.split_inline(line) == words


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"0", 0),
        (b"-1", -1),
        (b"9223372036854775807", (1 << 63) - 1),
        (b"9223372036854775808", None),
        (b"-9223372036854775808", -(1 << 63)),
        (b"+1", None),
        (b"01", None),
        (b"-0", None),
        (b" 1", None),
        (b"1\n", None),
        (b"", None),
    ],
)
def test_integers_are_strict(raw: bytes, value: int | None) -> None:
    assert resp.strict_integer(raw) == value


def test_an_error_is_one_line() -> None:
    assert resp.error(b"ERR a\r\nb\n") == b"-ERR a  b\r\n"
