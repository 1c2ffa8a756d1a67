"""Acts before the k-th bytecode of protocol code that this thread executes.

``sys.monitoring`` where there is one (3.12), else ``sys.settrace`` with opcode events.

An exception is not raised by the tracer itself: CPython looks for signals and asynchronous
exceptions only at some bytecodes, and code like ``with lock:`` relies on it. So the tracer only
makes one *pending*, at its very end, and the next look of the traced code finds it.
"""

from __future__ import annotations

import collections.abc
import ctypes
import functools
import os
import signal
import sys
import threading
import types
import typing
import weakref

import shmsock

_PACKAGE = os.path.dirname(os.path.abspath(shmsock.__file__))

# What counts as protocol code: a file, or what a file defines under a name.
PROTOCOL = (
    "_engine_common.py",
    "_stripes_py.py",
    "_table_py.py",
    "_engine_py.py",
    "recovery.py",
    "processes.py",
    "semaphores.py",
)
# What an application's call runs through besides.
PUBLIC = (
    *PROTOCOL,
    *(f"{name}.py" for name in ("socket", "writing", "cache", "descriptors", "service", "channel")),
    *(f"{name}.py" for name in ("runtime", "participant", "dispatcher", "store")),
)

_TOOLS = (4, 3, 5)  # of sys.monitoring; hypothesis may have one of them
_MONITORING: typing.Any = getattr(sys, "monitoring", None)

Act = collections.abc.Callable[[], object]


class Tracer:
    """Calls ``act`` before the k-th bytecode, and counts all of them.

    Attributes:
        count: How many protocol bytecodes were about to be executed; from 0 again after ``again``.
        acted: How often ``act`` was called.
    """

    _tool = _TOOLS[0]

    def __init__(self, at: int, act: Act, files: tuple[str, ...] = PROTOCOL) -> None:
        self.count = 0
        self.acted = 0
        self._at = at
        self._act = act
        self._files = files
        self._known: dict[types.CodeType, bool] = {}
        self._thread = threading.get_ident()

    def _counts(self, code: types.CodeType) -> bool:
        known = self._known.get(code)
        if known is None:
            directory, name = os.path.split(code.co_filename)
            known = directory == _PACKAGE and any(
                name == file and code.co_qualname.startswith(prefix)
                for file, _, prefix in (entry.partition(":") for entry in self._files)
            )
            self._known[code] = known
        return known

    def _step(self) -> object:
        self.count += 1
        if self.count != self._at:
            return None
        self.acted += 1
        # The tracer's own bytecodes would be the first to meet what is pending.
        self._off()
        return self._act()

    def again(self, after: int) -> None:
        """Go on, and act once more before the bytecode that is ``after`` from here."""
        self.count, self._at = 0, after
        self._on()

    def __enter__(self) -> Tracer:
        if _MONITORING is not None:
            users = {tool: _MONITORING.get_tool(tool) for tool in _TOOLS}
            Tracer._tool = next(tool for tool, user in users.items() if user in (None, "kills"))
            if users[Tracer._tool]:  # what is raised on the way out may keep it
                _MONITORING.free_tool_id(Tracer._tool)
            _MONITORING.use_tool_id(Tracer._tool, "kills")
            _MONITORING.register_callback(
                Tracer._tool, _MONITORING.events.INSTRUCTION, self._instruction
            )
        self._on()
        return self

    def __exit__(self, *_: object) -> None:
        self._off()
        if _MONITORING is not None:
            _MONITORING.register_callback(Tracer._tool, _MONITORING.events.INSTRUCTION, None)
            _MONITORING.free_tool_id(Tracer._tool)

    def _on(self) -> None:
        if _MONITORING is not None:
            _MONITORING.set_events(Tracer._tool, _MONITORING.events.INSTRUCTION)
            _MONITORING.restart_events()
        else:
            sys.settrace(self._frame)

    @staticmethod
    def _off() -> None:
        if _MONITORING is not None:
            if _MONITORING.get_tool(Tracer._tool) == "kills":  # or it was given back already
                _MONITORING.set_events(Tracer._tool, 0)
        else:
            sys.settrace(None)

    def _instruction(self, code: types.CodeType, offset: int) -> object:
        if not self._counts(code):
            return typing.cast(object, _MONITORING.DISABLE)
        armed = self._step() if threading.get_ident() == self._thread else None  # noqa: F841
        return None  # what is armed goes off when this frame is taken apart

    def _frame(self, frame: types.FrameType, event: str, argument: object) -> typing.Any:
        if not self._counts(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._opcode

    def _opcode(self, frame: types.FrameType, event: str, argument: object) -> typing.Any:
        armed = self._step() if event == "opcode" else None  # noqa: F841 - as above
        return self._opcode


# -- exceptions ---------------------------------------------------------------------------------


class _Armed:
    """Dies with the frame that it is a local of."""


class Pending:
    """Makes an exception pending when whoever has the result of ``set`` lets go of it.

    That is the tracer's frame when it is taken apart: the C function is called by a weak
    reference's callback, no bytecode of the tracer comes after it, so it cannot raise there.
    """

    def __init__(self, kind: str) -> None:
        """``signal``: a real SIGINT to this thread. ``async``: PyThreadState_SetAsyncExc."""
        python = ctypes.PyDLL(None)  # keeps the GIL
        arguments: tuple[object, ...]
        if kind == "signal":
            function = python["raise"]
            function.argtypes = [ctypes.c_int, ctypes.py_object]
            arguments = (int(signal.SIGINT),)
        else:
            function = python["PyThreadState_SetAsyncExc"]
            function.argtypes = [ctypes.c_ulong, ctypes.py_object, ctypes.py_object]
            arguments = (threading.get_ident(), KeyboardInterrupt)
        self._fire: Act = functools.partial(function, *arguments)
        self._armed: weakref.ref[_Armed] | None = None

    def set(self) -> object:
        """The tracer's act."""
        armed = _Armed()
        self._armed = weakref.ref(armed, typing.cast(typing.Any, self._fire))
        return armed
