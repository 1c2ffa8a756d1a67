"""The version, alone, so that building needs no import of numpy."""

VERSION = "0.1.0"
