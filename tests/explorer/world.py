"""A few simulated processes with their threads, of which exactly one runs at any time.

Each thread is a greenlet that runs the real code. Before every access to what is shared it calls
``World.step``, and the plan of this run decides: go on, let another thread go on instead, kill a
process, raise in the thread, or fence a process that lives. A killed thread is never resumed: no
``finally`` of it runs as long as the world is looked at.
"""

from __future__ import annotations

import collections.abc
import contextlib
import typing

import greenlet

from shmsock.layout import LIVE, REAPING, SLOT_MASK, Layout
from shmsock.processes import FIRST_ROW

from . import memory
from .participants import ENDED, NAPS, READY, WAITS, Bounds, Process, Thread, Violation

Action = tuple[typing.Any, ...]
Consider = collections.abc.Callable[[Thread, int, bool, bool], None]
Choose = collections.abc.Callable[[list[Thread], list[Thread], int], None]
STEP_LIMIT = 6000


class World:
    """All that one schedule runs in; reset before each."""

    def __init__(self, layout: Layout, engine_module: typing.Any) -> None:
        self.layout, self.module = layout, engine_module
        self.direct = True  # nothing is a step: setting up, and checking at the end
        self.over = False
        self.log: list[str] | None = None
        # What the explorer is asked: before an access, and when whoever ran is blocked.
        self.consider: Consider = lambda thread, number, quiet, raisable: None
        self.choose: Choose = lambda ready, napping, number: None
        self.memory = memory.Memory(self, layout)
        self.main = greenlet.getcurrent()
        self.begin({}, 0, Bounds())

    def begin(self, plan: dict[int, Action], prefix: int, bounds: Bounds) -> None:
        """An empty world for one schedule: ``prefix`` decisions are made by the plan."""
        self.plan, self.prefix = plan, prefix
        self.switches, self.kills = bounds.switches, bounds.kills
        self.raises, self.fences = bounds.raises, bounds.fences
        self.memory.reset()
        self.direct, self.over, self.pruned = True, False, False
        self.closes = False  # whether who is fenced has lost the lock file's number, too
        self.found = ""
        self.count = self.progress = 0
        self.names: dict[tuple[int, int], memory.Semaphore] = {}
        self.bytes: dict[int, int] = {}
        self.numbers: dict[int, int] = {}  # descriptors of P0, and whose each is
        self.inside: list[list[Thread]] = [[] for _ in range(self.layout.stripes)]
        self.processes: list[Process] = []
        self.threads: list[Thread] = []
        self.recycled = [0] * self.layout.slots
        self.tried = {"kill": 0, "raise": 0, "fence": 0}
        self._shared_hash: int | None = None
        for stripe in range(self.layout.stripes):
            for generation in range(1, 4):
                place = stripe, generation
                self.names[place] = memory.Semaphore(self, place, int(generation == 1))

    def add_process(self, threads: int = 1, *, registered: bool = True) -> Process:
        """One more participant, registered already unless it wants to do that itself."""
        process = Process(self, len(self.processes), self.module, threads)
        self.processes.append(process)
        self.current = process.idle
        if registered:  # as Processes.register leaves it; that itself is explored elsewhere
            row = process.index
            self.memory.raw.row_state[row] = 1 << 8 | LIVE
            self.bytes[FIRST_ROW + row] = process.number
            process.lock_file._held.add(FIRST_ROW + row)
            process.join(row, 1)
        return process

    def add_thread(self, process: Process, program: collections.abc.Callable[[], None]) -> None:
        """A thread that will run a program."""
        thread = Thread(len(self.threads), process, f"P{process.number}")
        if process.shared:
            thread.name += "ab"[len(process.threads)]
        process.threads.append(thread)
        self.threads.append(thread)

        def run() -> None:
            program()
            thread.status = ENDED

        thread.greenlet = greenlet.greenlet(run)

    # -- running --------------------------------------------------------------------------------

    def run(self) -> None:
        """Run every thread to its end, or to the point where this schedule is known already."""
        self.direct = False
        try:
            while not self.pruned:
                thread = self._next()
                if thread is None:
                    return
                self.current = thread
                thread.greenlet.switch()
                if self.found:
                    raise Violation(self.found)
        finally:
            self.direct = True

    def end(self) -> None:
        """Dispose of what was killed or not run to its end."""
        self.over, self.direct = True, False
        for process in self.processes:
            if process.engine is not None:
                process.engine.closed = True
        for thread in self.threads:
            if not thread.greenlet.dead:
                with contextlib.suppress(BaseException):  # nobody looks at it any more
                    thread.greenlet.throw()

    def _next(self) -> Thread | None:
        """Whose turn it is when nobody has to be interrupted for it."""
        running = [t for t in self.threads if not t.dead and t.status != ENDED]
        if not running:
            return None
        ready: list[Thread] = []
        napping: list[Thread] = []
        for thread in running:
            if thread.status == READY:
                ready.append(thread)
            elif thread.status == NAPS:
                (ready if thread.napped_at != self.progress else napping).append(thread)
            elif thread.waits_for.owner is None:
                ready.append(thread)
            elif thread.timed:
                napping.append(thread)
        if not ready:
            if not napping:
                where = ", ".join(thread.name for thread in running)
                self.violation(f"deadlock: nobody of {where} can ever go on")
            napping.sort(key=lambda thread: thread.naps)  # time passes
            ready, napping = napping[:1], napping[1:]
        number = self.count
        self.count += 1
        if number < self.prefix:
            action = self.plan.get(number)
            if action is not None:
                self.switches -= action[2]
                return self.threads[action[1]]
        else:
            self.choose(ready, napping, number)
            if self.pruned:
                return None
        return ready[0]

    def enabled(self, thread: Thread) -> bool:
        """Whether a thread that does not run now could."""
        if thread.dead or thread.status == ENDED:
            return False
        return thread.status != WAITS or thread.waits_for.owner is None

    def step(self, what: str, quiet: bool = False, raisable: bool = True) -> None:
        """An access follows: what the plan says happens before it."""
        if self.over:
            raise greenlet.GreenletExit
        thread = self.current
        thread.digest = hash((thread.digest, what))
        number = self.count
        self.count = number + 1
        if number < self.prefix:
            action = self.plan.get(number)
            if action is not None:
                self._act(thread, action)
        elif number > STEP_LIMIT:
            self.violation("runs for ever")
        else:
            self.consider(thread, number, quiet, raisable)
            if self.pruned:
                self.main.switch()
        if self.log is not None:
            self.log.append(f"{number:4d} {thread.name} {what}")

    def _act(self, thread: Thread, action: Action) -> None:
        kind = action[0]
        if kind == "to":
            self.switches -= 1
            other = self.threads[action[1]]
            if action[2] or other.process is thread.process:
                self.drain_own(thread.process)
            self.current = other
            other.greenlet.switch()
        elif kind == "kill":
            self.kills -= 1
            self.kill(self.processes[action[1]])
            if thread.dead:
                self.main.switch()
        elif kind == "fence":
            self.fences -= 1
            self.fence(self.processes[action[1]])
        else:
            self.raises -= 1
            self.tried["raise"] += 1
            if self.log is not None:
                self.log.append(f"     {thread.name} KeyboardInterrupt")
            raise KeyboardInterrupt

    def kill(self, process: Process) -> None:
        """SIGKILL: its store buffer drains, its bytes are free, nothing of it ever runs again."""
        self.tried["kill"] += 1
        self.drain_own(process)
        process.alive = False
        process.was_busy = bool(self.memory.raw.busy.any())
        for thread in process.threads:
            thread.dead = True
            for inside in self.inside:
                if thread in inside:
                    inside.remove(thread)
        for byte in [byte for byte, owner in self.bytes.items() if owner == process.number]:
            del self.bytes[byte]
        self.progress += 1
        self.kernel_changed()
        if self.log is not None:
            self.log.append(f"     P{process.number} is killed")

    def fence(self, process: Process) -> None:
        """Foreign code closed its lock file, and somebody noticed: it counts as dead and lives."""
        self.tried["fence"] += 1
        process.fenced, process.lock_file.lost = True, self.closes
        self.bytes.pop(FIRST_ROW + process.index, None)
        row = self.memory.raw.row_state
        row[process.index] = int(row[process.index]) & ~0xFF | REAPING
        self.progress += 1
        self.touched()
        if self.log is not None:
            self.log.append(f"     P{process.number} loses its byte and is fenced")

    def can_be_fenced(self, process: Process) -> bool:
        """It is in no stripe; nor does it repair, when that would be another's from here on."""
        repairs = any(self.bytes.get(byte) == process.number for byte in range(FIRST_ROW))
        return not self.is_inside(process) and not (self.closes and repairs)

    def is_inside(self, process: Process) -> bool:
        """Whether a thread of a process is inside any stripe."""
        return any(thread.process is process for inside in self.inside for thread in inside)

    # -- what the accesses do -------------------------------------------------------------------

    def saw(self, value: object, key: object = None) -> None:
        """The running thread has learnt something: its state depends on it."""
        thread = self.current
        thread.digest = hash((thread.digest, value))
        if self.log is not None and not self.direct and self.log:
            self.log[-1] += f"{'' if key is None else f'[{key}]'} -> {value!r}"

    def say(self, text: str) -> None:
        """For the log."""
        if self.log:
            self.log[-1] += text

    def store(self, words: memory.Words, key: int, value: int) -> None:
        """One store, which may linger."""
        name = words.name
        process = self.current.process
        if process.pending is not None:
            self.drain_own(process)
        if name == "claims":
            if memory.lingers(name, value) and not self.direct:
                process.pending = (key, value)
                self._shared_hash = None
                return
            if memory.is_progress(words.view[key], value):
                self.progress += 1
        elif name in ("ctl", "row_state"):
            self.progress += 1
        elif name == "state":
            self._life(key, words.view[key], value)
        words.view[key] = value
        self._shared_hash = None

    def _life(self, slot: int, old: int, new: int) -> None:
        """INVARIANT: a slot ends its life while nobody is attached."""
        if new == 2 and old != 2:
            holders = [i for i, held in enumerate(self.memory.raw.held[slot]) if held]
            if holders:
                self.violation(f"slot {slot} is recycled while {holders} are attached")
        if new == 0 and old != 0:
            self.recycled[slot] += 1

    def drain_own(self, process: Process | None = None) -> None:
        """A process's store buffer drains."""
        process = process or self.current.process
        if process.pending is not None:
            key, value = process.pending
            process.pending = None
            self.memory.raw.claims.reshape(-1)[key] = value
            self._shared_hash = None

    def own_claim(self, key: int, value: int) -> int:
        """A process sees its own store at once."""
        pending = self.current.process.pending
        return pending[1] if pending is not None and pending[0] == key else value

    def enter_kernel(self, what: str, quiet: bool = False) -> None:
        """A system call or a locked instruction: a step, and the store buffer drains."""
        if not self.direct:
            self.step(what, quiet)
        if self.current.process.pending is not None:
            self.drain_own()

    def barrier(self) -> None:
        """membarrier: everybody's store buffer drains."""
        if not self.direct:
            self.step("membarrier")
        for process in self.processes:
            self.drain_own(process)

    def touched(self) -> None:
        """Memory changed."""
        self._shared_hash = None

    kernel_changed = touched

    def nap(self) -> None:
        """Others may go on; nobody hurries."""
        thread = self.current
        thread.naps += 1
        thread.clock_s += memory.NAP_S
        if self.direct:
            if thread.naps > 1000:
                self.violation("naps for ever")
            return
        self.step("nap", True)
        self.drain_own()
        thread.status, thread.napped_at = NAPS, self.progress
        self.main.switch()
        thread.status = READY

    def wait_for_lock(self, lock: memory.Lock, timed: bool) -> bool:
        """Let the others go on until a lock is free; false if it never was and time passed."""
        thread = self.current
        self.drain_own()
        thread.status, thread.waits_for, thread.timed = WAITS, lock, timed
        self.main.switch()
        thread.status = READY
        return lock.owner is None

    def enter(self, stripe: int) -> bool:
        """INVARIANT: one at most is inside a stripe; false if it is ourselves already."""
        inside = self.inside[stripe]
        if self.current in inside:
            return False
        if inside and not self.over:
            who = " and ".join(thread.name for thread in (*inside, self.current))
            self.violation(f"{who} are inside stripe {stripe} at once")
        inside.append(self.current)
        return True

    def leave(self, stripe: int) -> None:
        """Outside again."""
        if self.current in self.inside[stripe]:
            self.inside[stripe].remove(self.current)

    def violation(self, text: str) -> typing.NoReturn:
        """A promise was broken: nothing runs any more, also no handler of this."""
        self.found = text
        if greenlet.getcurrent() is not self.main:
            self.over = True
            self.main.switch()
        raise Violation(text)

    # -- one number for a state -----------------------------------------------------------------

    def shared_hash(self) -> int:
        """Memory, semaphores, lock bytes and store buffers."""
        if self._shared_hash is None:
            self._shared_hash = hash(
                (
                    self.memory.digest(),
                    tuple((place, each.value) for place, each in sorted(self.names.items())),
                    tuple(sorted(self.bytes.items())),
                    tuple(process.pending for process in self.processes),
                )
            )
        return self._shared_hash

    def threads_hash(self, without: Process | None = None) -> int:
        """Where every thread is, and what brought it there."""
        seen: list[typing.Any] = []
        for thread in self.threads:
            if thread.dead or thread.process is without:
                seen.append(None)
            else:
                rested = thread.status == NAPS and thread.napped_at != self.progress
                seen.append((thread.digest, thread.status, rested))
        for process in self.processes:
            seen.append((process.alive, process.fenced, process.left, process.was_busy))
            if process.shared and process.alive and process is not without:
                seen.append(process.counts())
        return hash(tuple(seen))

    # -- for programs and checks ----------------------------------------------------------------

    def peek(self, sid: int) -> tuple[int, int, int]:
        """Version, nref and state of an id's slot, as they are: not an access."""
        slot = sid & SLOT_MASK
        word = int(self.memory.raw.versioned_ref[slot])
        return word >> 32, word & SLOT_MASK, int(self.memory.raw.state[slot])
