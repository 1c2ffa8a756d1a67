"""What is said to redis-server and to the hub alike, and how redis-server's answers are recorded.

    python -m tests.redis_cases        # needs a redis-server 7.0; writes redis_7_0.json beside this

The recording is in the repository, so that the comparison needs no redis-server. Each case is the
bytes of one connection; where it stays open, RESET is said last, and answered.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile

RECORDING = pathlib.Path(__file__).with_name("redis_7_0.json")
PASSWORD = "secret"
RESET = b"*1\r\n$5\r\nRESET\r\n"

_LONG = "a" * 100

# One connection a line; "|" ends a command. Read as bytes literals.
_LINES = r"""
PING
PING x
ping "a b"
PING a b
ping "a
ping 'a'b
ping "a"b
ECHO
ECHO "a\\x41\\n\""
ECHO a b
ECHO ''
ECHO "\\n\\r\\t\\b\\a\\x4\\q\\xZZ\\xfF"
ECHO 'a\\'b\\n'
ECHO ab"cd"
ECHO ab"c d"
ECHO a\vb
ECHO \va\fb \f
ECHO a\rb
ECHO a\tb
""
"PING"
FOO a b
FOO
foo a\\r\\nb
FOO LONG LONG c
FOO LONG b c d e f g h i j k
LONGLONGLONG x

  |PING
\n\nPING
POST / HTTP/1.1
post x
Host: x
HOST: x
HELLO
HELLO 1
HELLO 4
HELLO x
HELLO 03
HELLO +3
HELLO " 3"
HELLO 99999999999999999999
HELLO 2 3
HELLO 2
HELLO 3
HELLO 3|HELLO 2|PING
HELLO 2 AUTH
HELLO 2 AUTH default
HELLO 2 AUTH a b
HELLO 2 AUTH default x
HELLO 2 SETNAME
HELLO 3 SETNAME "a b"
HELLO 3 SETNAME ab|CLIENT GETNAME
HELLO 3 SETNAME zz FOO|CLIENT GETNAME
HELLO 3 setname zz auth default x|CLIENT GETNAME
HELLO 2 FOO
AUTH x
AUTH
AUTH default x
AUTH foo x
AUTH a b c
SELECT
SELECT 1
SELECT 15
SELECT 16
SELECT -1
SELECT x
SELECT +1
SELECT 01
SELECT -0
SELECT " 1"
SELECT 2147483648
SELECT 99999999999999999999
SELECT 1 2
COMMAND FOO
COMMAND COUNT x
COMMAND LIST FILTERBY MODULE x
COMMAND LIST FILTERBY PATTERN ping
COMMAND LIST FILTERBY PATTERN PIN?
COMMAND LIST FILTERBY PATTERN
COMMAND LIST FILTERBY X y
COMMAND LIST FILTERBY ACLCAT foo
COMMAND LIST FOO
COMMAND INFO ping foo
COMMAND INFO subscribe unsubscribe psubscribe punsubscribe publish
COMMAND INFO hello auth select echo quit reset info
COMMAND INFO client|id client|list client|info client|kill client|reply client|setname client|nope
COMMAND INFO client|no-evict client|getname client|help ping|x
COMMAND INFO command|count command|docs command|info command|list command|help
COMMAND INFO config|get config|help pubsub|channels pubsub|numsub pubsub|numpat pubsub|help
HELLO 3|COMMAND INFO ping foo client|id
COMMAND DOCS foo
HELLO 3|COMMAND DOCS foo
CONFIG
CONFIG FOO
CONFIG GET
CONFIG GET save
CONFIG GET SAVE
CONFIG GET appendonly
CONFIG GET databases
CONFIG GET nothing
CONFIG GET data?ases
CONFIG GET sav[d-f]
HELLO 3|CONFIG GET save|CONFIG GET nothing
SUBSCRIBE
PSUBSCRIBE
SUBSCRIBE a b a
SUBSCRIBE ""
SUBSCRIBE a|FOO x|PING|PING x|PING x y|UNSUBSCRIBE|PING
SUBSCRIBE a|ECHO x|SELECT 1|PUBLISH a x|CLIENT ID|CLIENT|CLIENT FOO
SUBSCRIBE a|INFO|HELLO 3|AUTH x|CONFIG GET save
SUBSCRIBE a|SUBSCRIBE b a|UNSUBSCRIBE zz|PUNSUBSCRIBE|UNSUBSCRIBE a a b|PING
PSUBSCRIBE x|UNSUBSCRIBE|PING|SUBSCRIBE q|PUNSUBSCRIBE x
UNSUBSCRIBE
UNSUBSCRIBE a b
PUNSUBSCRIBE
PUNSUBSCRIBE a
PSUBSCRIBE a* b|PUBLISH x y|QUIT
SUBSCRIBE a|RESET|PUBLISH a y
HELLO 3|UNSUBSCRIBE|PUNSUBSCRIBE x|CLIENT GETNAME|PING
HELLO 3|SUBSCRIBE a b|PSUBSCRIBE *|PUBLISH a hi|PING|UNSUBSCRIBE a|PING x|PUBLISH a again
HELLO 3|SUBSCRIBE a|PING|PUBLISH a x|PING y|PUBLISH a z
HELLO 3|SUBSCRIBE a|PUBLISH a x|HELLO 2|PING|HELLO 3
HELLO 3|SUBSCRIBE a|PSUBSCRIBE a|HELLO 2|HELLO 3|UNSUBSCRIBE a|PUNSUBSCRIBE a|PUBLISH a x
HELLO 3|PSUBSCRIBE n[e-f]ws|PUBLISH news 1|PUBLISH nows 2|PUBLISH nEws 3
HELLO 3|PSUBSCRIBE h\\*llo|PUBLISH h*llo 1|PUBLISH hello 2
HELLO 3|PSUBSCRIBE "h\\\\*llo"|PUBLISH h*llo 1|PUBLISH hello 2
HELLO 3|PSUBSCRIBE ""|PUBLISH "" 1|PUBLISH a 2
HELLO 3|PSUBSCRIBE *|PUBLISH "" 1
HELLO 3|SUBSCRIBE ""|PUBLISH "" ""
HELLO 3|SUBSCRIBE a*|PUBLISH a* 1|PUBLISH ab 2
PUBLISH
PUBLISH a
PUBLISH a b
PUBLISH a b c
PUBSUB
PUBSUB FOO
PUBSUB CHANNELS a b
PUBSUB CHANNELS
PUBSUB CHANNELS *
PUBSUB NUMSUB
PUBSUB NUMSUB a b
PUBSUB NUMPAT
PUBSUB NUMPAT x
HELLO 3|SUBSCRIBE abc|PUBSUB CHANNELS|PUBSUB NUMSUB abc x
HELLO 3|SUBSCRIBE abc|PUBSUB CHANNELS a*|PUBSUB CHANNELS b*|PUBSUB CHANNELS [
HELLO 3|PSUBSCRIBE a b|PUBSUB CHANNELS|PUBSUB NUMPAT|PUNSUBSCRIBE a|PUBSUB NUMPAT
CLIENT
CLIENT FOO
client foo
CLIENT ID
CLIENT ID x
CLIENT GETNAME
CLIENT GETNAME x
HELLO 3|CLIENT GETNAME
CLIENT SETNAME foo|CLIENT GETNAME|CLIENT SETNAME ""|CLIENT GETNAME
CLIENT SETNAME
CLIENT SETNAME "a b"
CLIENT SETNAME "a\\x80b"|CLIENT GETNAME
CLIENT SETNAME "a\\nb"
CLIENT INFO x
CLIENT NO-EVICT
CLIENT NO-EVICT on
CLIENT NO-EVICT OFF
CLIENT NO-EVICT foo
CLIENT REPLY
CLIENT REPLY on
CLIENT REPLY foo
CLIENT REPLY off|PING|PING|CLIENT REPLY on|PING
CLIENT REPLY skip|PING|PING x
CLIENT REPLY skip|CLIENT REPLY skip|PING|PING x
CLIENT REPLY skip|CLIENT REPLY ON|PING
CLIENT REPLY skip|CLIENT REPLY OFF|PING|CLIENT REPLY ON
CLIENT REPLY SKIP|FOO|PING
CLIENT REPLY SKIP||PING|PING x
CLIENT REPLY OFF|CLIENT REPLY SKIP|PING|PING
CLIENT REPLY OFF|SUBSCRIBE a|UNSUBSCRIBE
CLIENT REPLY OFF|RESET|PING
HELLO 3|CLIENT REPLY OFF|SUBSCRIBE a|PUBLISH a x
HELLO 3|CLIENT REPLY SKIP|SUBSCRIBE a|PUBLISH a x
CLIENT KILL
CLIENT KILL 1.2.3.4:5
CLIENT KILL ID
CLIENT KILL ID x
CLIENT KILL ID 0
CLIENT KILL ID -5
CLIENT KILL ID 99999999
CLIENT KILL ID 99999999 FOO
CLIENT KILL ID x FOO
CLIENT KILL ID 5 ID 6
CLIENT KILL ADDR 1.2.3.4:5
CLIENT KILL LADDR 1.2.3.4:5
CLIENT KILL TYPE foo
CLIENT KILL TYPE pubsub
CLIENT KILL TYPE master
CLIENT KILL TYPE replica
CLIENT KILL TYPE slave
CLIENT KILL SKIPME foo
CLIENT KILL ID 1 SKIPME
CLIENT KILL USER foo
CLIENT KILL USER default
CLIENT KILL FOO bar
CLIENT KILL a b c
CLIENT KILL SKIPME no|PING
CLIENT KILL TYPE normal SKIPME no|PING
CLIENT LIST TYPE pubsub
CLIENT LIST TYPE foo
CLIENT LIST TYPE
CLIENT LIST ID 99999998 99999999
CLIENT LIST ID
CLIENT LIST ID x
CLIENT LIST FOO
HELLO 3|CLIENT LIST TYPE pubsub
QUIT|PING
QUIT x
QUIT x y
RESET
RESET x
SELECT 3|CLIENT SETNAME x|RESET|CLIENT GETNAME
INFO nothing
INFO nothing nowhere
HELLO 3|INFO nothing
"""

_RAW = [
    b"*0\r\nPING\r\n",
    b"*-1\r\nPING\r\n",
    b"*-5\r\nPING\r\n",
    b"*abc\r\n",
    b"*\r\nPING\r\n",
    b"*1 \r\n$4\r\nPING\r\n",
    b"*+1\r\n$4\r\nPING\r\n",
    b"*01\r\n$4\r\nPING\r\n",
    b"*-0\r\n",
    b"*1\n$4\r\nPING\r\n",
    b"*99999999999999999999\r\n",
    b"*9223372036854775808\r\n",
    b"*1\r\nPING\r\n",
    b"*1\r\n\r\n$4\r\nPING\r\n",
    b"*1\r\n\xff\r\n",
    b"*1\r\n$-1\r\n",
    b"*1\r\n$abc\r\n",
    b"*1\r\n$\r\n",
    b"*1\r\n$04\r\nPING\r\n",
    b"*1\r\n$999999999999\r\n",
    b"*1\r\n*1\r\n$4\r\nPING\r\n",
    b"*2\r\n$4\r\nECHO\r\n*0\r\n",
    *(
        b"*2\r\n$4\r\nECHO\r\n" + other
        for other in (
            b":5\r\n",
            b"+OK\r\n",
            b"-no\r\n",
            b"_\r\n",
            b"#t\r\n",
            b",1.5\r\n",
            b"(12\r\n",
            b"=5\r\ntxt:a\r\n",
            b"~1\r\n",
            b"%1\r\n",
            b"|1\r\n",
            b">1\r\n",
            b"!3\r\nabc\r\n",
        )
    ),
    b"+OK\r\n",
    b":1\r\n",
    b"$4\r\nPING\r\n",
    b"%1\r\n",
    b">9999999\r\n",
    b"*1\r\n$4\r\nPINGxxPING\r\n",
    b"*1\rx$4\rxPING\r\n*1\r\n$4\r\nPING\r\n",
    b"*1\r\n$0\r\n\r\n",
    b"*2\r\n$6\r\nFOO\x00XX\r\n$3\r\na\x00b\r\n",
    b"*2\r\n$6\r\nFOO\r\nX\r\n$4\r\na\r\nb\r\n",
    b"*2\r\n$4\r\nECHO\r\n$6\r\n*1\r\n$4\r\n",
    b"*2\r\n$4\r\nECHO\r\n$9\r\n*1234567\x00\r\n",
    b"*1\r\n$4\r\nPING\r\nPING\r\n*1\r\n$4\r\nPING\r\n \r\nPING a\r\n*0\r\nPING\n",
    b"PING\r\n*1\r\n$4\r\nPING\r\n*1\r\n:1\r\nPING\r\n",
    b"*3\r\n$9\r\nSUBSCRIBE\r\n$0\r\n\r\n$1\r\nb\r\nPUBSUB\r\n",
    b"\x00" * 100_000,
    b"a" * 100_000,
    b"*" + b"1" * 100_000,
    b"*1\r\n$" + b"1" * 100_000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n" * 3,
    b"ECHO " + b"a" * 60000 + b"\r\n",
    b"*2\r\n$4\r\nECHO\r\n$70000\r\n" + b"x" * 70000 + b"\r\n",
]

_PROTECTED_LINES = r"""
PING
FOO
CLIENT FOO
CLIENT ID
CLIENT
SUBSCRIBE a
QUIT
RESET
AUTH x
AUTH secret|PING
AUTH default secret|PING
AUTH foo secret
AUTH a b c
AUTH secret|AUTH x|PING
AUTH secret|RESET|PING
HELLO
HELLO 3
HELLO 9
HELLO 3 AUTH default x
HELLO 3 AUTH foo secret
HELLO 3 AUTH default secret
HELLO 3 SETNAME a
HELLO 3 SETNAME "a b"
HELLO 3 FOO
HELLO 3 SETNAME x AUTH default secret|CLIENT GETNAME
"""

_PROTECTED_RAW = [
    b"*11\r\n$4\r\nPING\r\n",
    b"*2\r\n$4\r\nECHO\r\n$16385\r\n",
    b"*2\r\n$4\r\nECHO\r\n$2\r\nab\r\n",
    b"AUTH secret\r\n*11\r\n" + b"$1\r\na\r\n" * 11,
    b"AUTH secret\r\n*2\r\n$4\r\nECHO\r\n$16385\r\n" + b"x" * 16385 + b"\r\n",
    b"AUTH secret\r\nRESET\r\n*11\r\n",
]


def _parsed(lines: str) -> list[bytes]:
    cases = []
    for line in lines.split("\n")[1:-1]:
        raw = line.replace("LONG", _LONG).encode("latin-1").decode("unicode_escape")
        said = raw.encode("latin-1")
        # A bar inside a word is part of it, as in client|id.
        cases.append(re.sub(rb"(?<![a-z])\||\|(?![a-z])", b"\r\n", said) + b"\r\n")
    return cases


OPEN_CASES = _parsed(_LINES) + _RAW
# What was not answered yet is not answered any more: it depends on the packets.
OPEN_CASES_WHOLE = [b"PING\r\nPOST x\r\nPING\r\n"]
PROTECTED_CASES = _parsed(_PROTECTED_LINES) + _PROTECTED_RAW


def normal(said: bytes) -> bytes:
    """An answer without what differs from server to server: ids, the exact version.

    Long runs of one byte are shortened, to keep the recording small.
    """
    said = re.sub(rb"\$\d+\r\n7\.0\.\d+\r\n", b"$5\r\n7.0.0\r\n", said)
    said = re.sub(rb"(\$2\r\nid\r\n):\d+", rb"\1:1", said)
    said = re.sub(rb"^:\d{2,}\r\n", b":1\r\n", said)
    return re.sub(rb"(.)\1{200,}", lambda run: b"%s{%d}" % (run[1], len(run[0])), said)


class RedisServer:
    """A redis-server of our own, on a unix socket."""

    def __init__(self, *options: str) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.path = f"{self._directory.name}/redis"
        program = shutil.which("redis-server")
        assert program, "redis-server is not installed"
        words = [program, "--port", "0", "--unixsocket", self.path, "--save", ""]
        self._process = subprocess.Popen([*words, *options], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if b"now ready to accept" in line:
                break

    def ask(self, said: bytes) -> tuple[bytes, bool]:
        """Its answer on a connection of its own, and whether it stayed open."""
        # The end of a stream is noticed after what came before it was answered. Redis keeps a
        # client whose answers are off open when it should close it: so nothing here waits.
        answer = self._exchange(said + RESET)
        return (
            (answer[: -len(b"+RESET\r\n")], True)
            if answer.endswith(b"+RESET\r\n")
            else (self._exchange(said), False)
        )

    def _exchange(self, said: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(self.path)
            answer = b""
            try:
                client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                while part := client.recv(1 << 16):
                    answer += part
            except (BrokenPipeError, ConnectionResetError):
                pass
            return answer

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()
        self._directory.cleanup()


def record() -> dict[str, list[tuple[str, bool]]]:
    """What redis-server says to all cases."""
    recorded = {}
    for kind, cases, options in (
        ("open", OPEN_CASES + OPEN_CASES_WHOLE, ()),
        ("protected", PROTECTED_CASES, ("--requirepass", PASSWORD)),
    ):
        server = RedisServer(*options)
        try:
            answers = [server.ask(case) for case in cases]
        finally:
            server.close()
        recorded[kind] = [(normal(said).decode("latin-1"), stays) for said, stays in answers]
    return recorded


if __name__ == "__main__":
    RECORDING.write_text(json.dumps(record(), indent=0) + "\n")
