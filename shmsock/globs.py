"""Redis's glob patterns over bytes, as regular expressions that an enemy cannot make slow."""

from __future__ import annotations

import functools
import re

_STAR, _ANY, _NEVER = b".*", b".", b"(?!)"
# Compiling costs some microseconds a byte: a pattern of a megabyte would take a worker's minute.
MAX_PATTERN_BYTES = 4096
# Redis gives up on patterns with more stars (those at the end not counted), since CVE-2024-31228.
_MAX_STARS = 1000


def _parse_class(pattern: bytes, at: int) -> tuple[bytes, int]:
    """Read a ``[...]`` from behind its bracket: a regular expression, and where it ended."""
    negated = pattern[at : at + 1] == b"^"
    at += negated
    chosen: set[int] = set()
    while at < len(pattern):
        byte, left = pattern[at], len(pattern) - at
        if byte == 0x5C and left >= 2:  # backslash
            chosen.add(pattern[at + 1])
            at += 2
        elif byte == 0x5D:  # ]
            at += 1
            break
        elif left >= 3 and pattern[at + 1] == 0x2D:  # a-z; the end may be any byte, even ]
            # Redis compares plain chars, and on x86-64 those are signed.
            ends = sorted((end ^ 0x80) - 0x80 for end in (byte, pattern[at + 2]))
            chosen.update(value & 0xFF for value in range(ends[0], ends[1] + 1))
            at += 3
        else:
            chosen.add(byte)
            at += 1
    if negated:
        chosen = set(range(256)) - chosen
    return _one_of(chosen), at


def _one_of(chosen: set[int]) -> bytes:
    if len(chosen) in (0, 256):
        return _ANY if chosen else _NEVER
    # As ranges: the expression stays as long as the pattern was.
    firsts = sorted(byte for byte in chosen if byte - 1 not in chosen)
    lasts = sorted(byte for byte in chosen if byte + 1 not in chosen)
    ranges = zip(firsts, lasts, strict=True)
    return b"[" + b"".join(b"\\x%02x-\\x%02x" % ends for ends in ranges) + b"]"


@functools.lru_cache(maxsize=128)
def parse(pattern: bytes) -> tuple[int | bytes, ...]:
    """Cut a glob into literal bytes (int) and regular expressions; runs of stars are one."""
    elements: list[int | bytes] = []
    at = 0
    while at < len(pattern):
        byte = pattern[at]
        at += 1
        if byte == 0x2A:  # *
            if not elements or elements[-1] is not _STAR:
                elements.append(_STAR)
        elif byte == 0x3F:  # ?
            elements.append(_ANY)
        elif byte == 0x5B:  # [
            element, at = _parse_class(pattern, at)
            elements.append(element)
        else:
            if byte == 0x5C and at < len(pattern):  # backslash; the last byte of all is itself
                byte = pattern[at]
                at += 1
            elements.append(byte)
    return tuple(elements)


@functools.lru_cache(maxsize=128)
def compile_glob(pattern: bytes) -> re.Pattern[bytes]:
    """Translate a glob as Redis matches it (stringmatchlen of 7.0) for use with ``fullmatch``.

    The oddities of the original are kept: an empty name matches the empty pattern alone, not even
    ``*`` (KEYS never asks about a bare ``*``, and neither does ``Groups.names``); ``[a-]`` is a
    range that ends in ``]``; more than 1,000 stars match nothing.

    A pattern may come from an enemy. Between two stars stands a run of fixed length, so the first
    place where it fits is as good as any later one and never needs to be reconsidered: every star
    but the last is atomic, and the cost is at most name times pattern. Atomic groups and not
    possessive quantifiers, which are wrong before CPython 3.11.5 (gh-106052).

    Raises:
        ValueError: The pattern has more than ``MAX_PATTERN_BYTES``.
    """
    if len(pattern) > MAX_PATTERN_BYTES:
        raise ValueError(f"a pattern has at most {MAX_PATTERN_BYTES} bytes, not {len(pattern)}")
    elements = parse(pattern)
    if elements == (_STAR,):
        return re.compile(b".+", re.DOTALL)
    runs = [b""]
    for element in elements:
        if element is _STAR:
            runs.append(b"")
        else:
            runs[-1] += re.escape(bytes((element,))) if isinstance(element, int) else element
    if len(runs) - 1 - (not runs[-1]) > _MAX_STARS:
        return re.compile(_NEVER)
    source = runs[0] + b"".join(b"(?>.*?" + run + b")" for run in runs[1:-1])
    if len(runs) > 1:
        source += _STAR + runs[-1]
    return re.compile(source, re.DOTALL)


def escape_glob(literal: bytes) -> bytes:
    """Make the pattern that matches exactly this name."""
    return re.sub(rb"[*?\[\\]", rb"\\\g<0>", literal)


def literal_prefix(pattern: bytes) -> bytes:
    """What every name that matches begins with."""
    prefix = bytearray()
    for element in parse(pattern):
        if not isinstance(element, int):
            break
        prefix.append(element)
    return bytes(prefix)
