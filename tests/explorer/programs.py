"""What the threads of the scenarios do: public methods of an engine and of recovery alone."""

from __future__ import annotations

from shmsock.processes import FIRST_ROW

from .scene import SID, Actor, Program

NEIGHBOUR = SID | 1  # where there is a second slot


# -- a socket -----------------------------------------------------------------------------------


def hold(actor: Actor) -> None:
    """Take a reference, use it, give it back."""
    actor.address(SID)
    actor.use()
    actor.close()


def hold_failed_too(actor: Actor) -> None:
    """As ``hold``, also when it has failed."""
    actor.address(SID, True)
    actor.use()
    actor.close()


def drop(actor: Actor) -> None:
    """Take a reference and let a finaliser give it back."""
    actor.address(SID)
    actor.use()
    actor.rest()
    actor.references.clear()


def fail(actor: Actor) -> None:
    """Fail the socket."""
    actor.set_failed(SID)


def release(actor: Actor) -> None:
    """Let it end when the last one lets go."""
    actor.do("release_additional_reference", SID)


def renew(actor: Actor) -> None:
    """End the socket, and make one in what may be its slot."""
    actor.set_failed(SID)
    actor.create()


def hold_either(actor: Actor) -> None:
    """Use the first life or the second of a slot."""
    for sid in (SID, SID + (2 << 32)):
        actor.address(sid)
        actor.use()
        actor.close()


def turn(actor: Actor) -> None:
    """Write, if it is our turn."""
    world, me = actor.world, actor.process
    if actor.do("take_turn", SID):
        writer = int(world.memory.raw.writer[0])
        if writer != me.engine.word and not me.fenced and world.peek(SID)[0] == SID >> 32:
            world.violation(f"P{me.index} has the turn, but the writer is {writer:#x}")
        actor.do("give_turn", SID)


def take_over(actor: Actor) -> None:
    """Become the owner, as the receiver of a hand-over does."""
    first = actor.world.processes[0].engine.word
    if actor.do("change_owner", SID, first, actor.process.engine.word):
        actor.scene.winners.append((-1, actor.process.index))


def drop_inside(actor: Actor) -> None:
    """A finaliser runs inside the stripe: it must wait for nothing, and be made good later."""
    actor.address(SID)

    def body(slot: int, _: object) -> int:
        actor.references.clear()
        return 1

    actor.do("run", 0, body, 0)


def hold_two(actor: Actor) -> None:
    """Hold a neighbour of the slot that is worked on."""
    actor.address(NEIGHBOUR)
    actor.address(SID)
    actor.use()
    if actor.references:
        actor.call(actor.references.pop().close)
    actor.use()
    actor.close()


def serve(actor: Actor) -> None:
    """Own the socket and be busy for a while, without the stripe."""
    cells = actor.world.memory.cells
    for busy in (1, 0):
        actor.call(cells.busy.__setitem__, 0, busy)


def adopt(actor: Actor) -> None:
    """Become the owner of a socket whose owner has died."""
    first = actor.world.processes[0]
    actor.tick()
    if not first.alive and actor.do("change_owner", SID, first.word, actor.process.engine.word):
        actor.scene.winners.append((-1, actor.process.index))


# -- a hand-over ---------------------------------------------------------------------------------


def read(actor: Actor) -> None:
    """Read a request, as the owner: nobody else may do that at the same time."""
    others = [each for each in actor.scene.actors if each.reads and each.process.alive]
    if others:
        who = others[0].process.index
        actor.world.violation(f"P{actor.process.index} and P{who} read one socket")
    actor.reads = True
    cells = actor.world.memory.cells

    def request() -> None:
        cells.busy[0] = 1
        actor.half_read = True
        cells.bytes_in[0] = cells.bytes_in[0] + 1

    actor.call(request)
    actor.half_read = False
    actor.call(cells.busy.__setitem__, 0, 0)
    if actor.interrupted:
        actor.call(cells.busy.__setitem__, 0, 0)
    actor.reads = False


def _owns(actor: Actor) -> bool:
    engine, cells = actor.process.engine, actor.world.memory.cells
    return bool(actor.call(lambda: engine.is_live(SID) and cells.owner[0] == engine.word))


def _has_read(actor: Actor) -> int:
    """How often the socket was read: every owner counts on."""
    bytes_in = actor.world.memory.cells.bytes_in
    while (count := actor.call(bytes_in.__getitem__, 0)) is None:
        pass
    return int(count)


def _withdraw(actor: Actor) -> None:
    """End an offer to P1; if it still stood, nobody else has had the socket."""
    heir = actor.world.processes[1].word
    while (withdrawn := actor.do("withdraw", SID, heir)) is None:
        pass
    actor.remember(withdrawn)
    if withdrawn and _has_read(actor) != actor.books[0]:
        actor.world.violation("an offer was withdrawn, but another has had the socket since")


def give(actor: Actor) -> None:
    """Read, offer the socket to P1, and withdraw that; read on if it is still ours."""
    read(actor)
    actor.remember(_has_read(actor))
    actor.do("offer", SID, actor.world.processes[1].word)
    _withdraw(actor)
    if _owns(actor):
        read(actor)


def give_and_tick(actor: Actor) -> None:
    """As ``give``, and repair: the heir may have died."""
    give(actor)
    actor.tick()


def offer(actor: Actor) -> None:
    """Offer the socket to P1; whoever reads it in this process must have ended before."""
    actor.scene.offering = True  # known before the first step, so the same in every schedule
    before = [each for each in actor.scene.acts(actor.process) if each.half_read]
    done = actor.do("offer", SID, actor.world.processes[1].word)
    if done and any(each.half_read for each in before):
        actor.world.violation("a socket was offered while a request was half read")


def offer_and_look(actor: Actor) -> None:
    """Offer the socket to P1 and leave it so, unless P1 has died."""
    actor.remember(_has_read(actor))
    offer(actor)
    actor.tick()
    living = actor.call(actor.process.processes.live_words)
    if actor.world.processes[1].word not in living:
        _withdraw(actor)


def inherit(actor: Actor) -> None:
    """Take what was offered, and read it."""
    actor.do("inherit", SID)
    if _owns(actor):
        read(actor)


def place(actor: Actor) -> None:
    """As the host: what P1 had when it died is P0's again."""
    giver, heir = actor.world.processes[:2]
    actor.tick()
    if not heir.alive and giver.alive:
        actor.do("change_owner", SID, heir.word, giver.word)


# -- repair -------------------------------------------------------------------------------------


def ticking(program: Program) -> Program:
    """A program after which the timer looks: it mends what a second exception may leave."""

    def run(actor: Actor) -> None:
        program(actor)
        actor.tick()

    return run


def repair(actor: Actor) -> None:
    """What the timer does, and then an ordinary operation."""
    actor.tick()
    actor.address(SID)
    actor.close()


def suspect(actor: Actor) -> None:
    """Retire a stripe in which nobody died: a wrong suspicion."""
    recovery = actor.process.recovery

    def retire() -> None:
        with recovery.arbitrated(1.0) as arbiter:
            if arbiter:
                recovery.retire(0)

    actor.call(retire)


def suspect_and_hold(actor: Actor) -> None:
    """As ``suspect``, and go on there."""
    suspect(actor)
    hold(actor)


def visit(actor: Actor) -> None:
    """Take and give."""
    actor.do("run", 0, lambda *_: 1, -1)


def register(actor: Actor) -> None:
    """Join while others reap, perhaps in the row of the dead."""
    process, world = actor.process, actor.world

    def join() -> None:
        index, epoch = process.processes.register("client")
        raw = world.memory.raw
        if raw.claims[index].any() or raw.held[:, index].any():
            world.violation(f"row {index} was given out, but is not clean")
        process.join(index, epoch)

    actor.call(join)
    hold(actor)


def leave(actor: Actor) -> None:
    """Leave with references, as Runtime.close does: be reaped, by oneself or by others."""
    process = actor.process
    actor.address(SID)
    actor.references.clear()
    actor.rest()
    process.engine.detach_all()
    with process.engine.lock:
        process.engine.closed = True
    with process.recovery.arbitrated(0.2) as arbiter:
        if arbiter:
            process.recovery.reap(process.index)
    process.left = True
    process.lock_file.drop(FIRST_ROW + process.index)


def forget_handles(actor: Actor) -> None:
    """What the timer does with the semaphores of earlier generations."""
    process, cells = actor.process, actor.world.memory.cells
    actor.rest()
    with process.engine.lock:
        for stripe, control in enumerate(cells.ctl):
            process.semaphores.forget_retired(stripe, control >> 2)
