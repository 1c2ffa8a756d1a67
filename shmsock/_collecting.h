/* Small messages of one turn of the event loop leave together, at its end, in one sendmsg.
 *
 * `begin_turn` and `end_turn` are the dispatcher's. In between, what its thread writes is kept here,
 * by socket, in the order it was written; the engine holds a reference to each such socket, so that
 * a graceful close comes after the last byte. Nothing shared is touched before a message leaves.
 *
 *     INVARIANT: of one socket's messages none is sent while earlier ones are kept here: what cannot
 *                be kept (long, of another thread, a bytearray) comes after those have left, or
 *                have gone to writing.py's queue, and is queued behind them.
 *
 * If killed: what is kept dies with its process, as what waits in a queue does. No turn is ours.
 */
#ifndef SHMSOCK_COLLECTING_H
#define SHMSOCK_COLLECTING_H

#include <Python.h>

#include <sys/socket.h>

#define COLLECT_MESSAGES 64 /* of one socket: as many as one sendmsg takes here */
#define COLLECT_BYTES 4096  /* a longer message gains nothing by waiting */
#define COLLECT_ROOM 65536  /* of one socket */

/* Whether messages may share a send: one question to the kernel a descriptor. */
static int
is_stream(Engine *self, uint32_t slot)
{
    if (!self->descriptors[slot].kind) {
        int kind = 0;
        socklen_t length = sizeof kind;
        if (getsockopt(self->descriptors[slot].number, SOL_SOCKET, SO_TYPE, &kind, &length) < 0)
            return 0;
        self->descriptors[slot].kind = kind;
    }
    return self->descriptors[slot].kind == SOCK_STREAM;
}

/* A socket's messages and its reference, out of the list; how many there are. */
static Py_ssize_t
uncollect(Engine *self, uint32_t slot, PyObject **messages, PyObject **reference)
{
    Py_ssize_t count = 0;
    size_t at = self->descriptors[slot].first;
    *reference = self->collected[at - 1].reference;
    self->collected[at - 1].reference = NULL;
    for (; at; at = self->collected[at - 1].next) {
        messages[count++] = self->collected[at - 1].message;
        self->collected[at - 1].message = NULL;
    }
    self->descriptors[slot].first = self->descriptors[slot].last = 0;
    self->descriptors[slot].collected = self->descriptors[slot].collected_bytes = 0;
    self->collected_left -= (size_t)count;
    if (!self->collected_left)
        self->collected_length = 0;
    return count;
}

/* Give a socket's messages to writing.py's queue, where they are tried until they are out. */
static int
to_queue(Reference *reference, PyObject *const *messages, Py_ssize_t count)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyObject *all = as_tuple(messages, count), *nothing = NULL;
    if (all != NULL)
        nothing = PyObject_CallMethod(OBJECT(reference->engine), "_take_collected", "OOO",
                                      reference, all, value == NULL ? Py_None : value);
    Py_XDECREF(all);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    Py_XDECREF(nothing);
    return nothing == NULL ? -1 : 0;
}

/* Send what is kept of a socket; 0, or -1 with an exception. Never waits: neither for the stripe nor
 * for another process's turn; then, and in any other thread than the collector's, it is queued. */
static int
leave(Engine *self, uint32_t slot)
{
    PyObject *messages[COLLECT_MESSAGES], *kept;
    Py_ssize_t count = uncollect(self, slot, messages, &kept);
    Reference *reference = (Reference *)kept;
    struct iovec vector[COLLECT_MESSAGES];
    size_t total = 0;
    int result = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        char *bytes;
        Py_ssize_t length = 0;
        PyBytes_AsStringAndSize(messages[i], &bytes, &length);
        vector[i].iov_base = bytes;
        vector[i].iov_len = (size_t)length;
        total += (size_t)length;
    }
    if (!self->closed && !self->foreign) {
        Call call = {.slot = slot, .sid = reference->sid};
        int alone = self->descriptors[slot].sid == reference->sid &&
                    !self->descriptors[slot].queued &&
                    (!self->collector || self->collector == PyThread_get_thread_ident());
        if (alone)
            alone = run_within(self, slot / self->table.block, NULL, body_take_turn, &call, 0);
        if (alone == DONE) {
            PyObject *nothing = send_in_turn(reference, messages, vector, count, total, 1);
            Py_XDECREF(nothing);
            result = nothing == NULL ? -1 : 0;
        }
        else
            result = to_queue(reference, messages, count);
    }
    for (Py_ssize_t i = 0; i < count; i++)
        Py_DECREF(messages[i]);
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *nothing = Reference_close(reference, NULL);
    if (nothing == NULL && result < 0)
        PyErr_Clear();
    else if (nothing == NULL)
        result = -1;
    if (result < 0 && type != NULL)
        PyErr_Restore(type, value, traceback);
    Py_XDECREF(nothing);
    Py_DECREF(kept);
    return result;
}

static int
leave_all(Engine *self)
{
    for (size_t at = 0; at < self->collected_length; at++) {
        Collected *each = &self->collected[at];
        /* A socket's first message is before its others, and takes them all along. */
        if (each->message != NULL && leave(self, (uint32_t)(each->sid & SLOT_MASK)) < 0)
            return -1;
    }
    return 0;
}

/* Keep one message: 0, or -1 with an exception and nothing changed. */
static int
collect(Reference *self, PyObject *const *buffers, Py_ssize_t count, size_t total)
{
    Engine *engine = self->engine;
    uint32_t slot = (uint32_t)(self->sid & SLOT_MASK);
    if (engine->collected_length == engine->collected_room) {
        size_t room = engine->collected_room ? 2 * engine->collected_room : 64;
        Collected *moved = realloc(engine->collected, room * sizeof *moved);
        if (moved == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        engine->collected = moved;
        engine->collected_room = room;
    }
    PyObject *message = count == 1 ? buffers[0] : PyBytes_FromStringAndSize(NULL, (Py_ssize_t)total);
    if (message == NULL)
        return -1;
    if (count == 1)
        Py_INCREF(message);
    for (Py_ssize_t i = 0, at = 0; count > 1 && i < count; i++) {
        Py_ssize_t length = PyBytes_Size(buffers[i]);
        memcpy(PyBytes_AsString(message) + at, PyBytes_AsString(buffers[i]), (size_t)length);
        at += length;
    }
    size_t last = engine->descriptors[slot].last;
    PyObject *reference = NULL;
    if (!last) {
        reference = new_reference(engine, self->sid);
        if (reference == NULL) {
            Py_DECREF(message);
            return -1;
        }
        engine->count[slot]++;
    }
    engine->collected[engine->collected_length++] =
        (Collected){.sid = self->sid, .reference = reference, .message = message};
    engine->collected_left++;
    if (last)
        engine->collected[last - 1].next = engine->collected_length;
    else
        engine->descriptors[slot].first = engine->collected_length;
    engine->descriptors[slot].last = engine->collected_length;
    engine->descriptors[slot].collected++;
    engine->descriptors[slot].collected_bytes += (uint32_t)total;
    return 0;
}

/* Keep a message for the end of the turn: 1. Or see to it that those before it are on their way: 0.
 * -1 with an exception. `total` is 0 where the message is not one that could be sent from here. */
static int
collect_or_send(Reference *self, PyObject *const *buffers, Py_ssize_t count, size_t total)
{
    Engine *engine = self->engine;
    uint32_t slot = (uint32_t)(self->sid & SLOT_MASK);
    if (self->open != 1 || engine->closed || engine->foreign)
        return 0;
    if (total && total <= COLLECT_BYTES && total <= engine->direct_bytes &&
        engine->collector == PyThread_get_thread_ident() &&
        version_of(&engine->table, slot) == self->sid >> 32 && is_stream(engine, slot)) {
        int full = engine->descriptors[slot].collected == COLLECT_MESSAGES ||
                   engine->descriptors[slot].collected_bytes + total > COLLECT_ROOM;
        if (full && leave(engine, slot) < 0)
            return -1;
        if (!engine->descriptors[slot].queued)
            return collect(self, buffers, count, total) < 0 ? -1 : 1;
        return 0;
    }
    return engine->descriptors[slot].first ? leave(engine, slot) : 0;
}

/* -- methods ----------------------------------------------------------------------------------- */

static PyObject *
Engine_begin_turn(Engine *self, PyObject *Py_UNUSED(ignored))
{
    self->collector = PyThread_get_thread_ident();
    Py_RETURN_NONE;
}

static PyObject *
Engine_end_turn(Engine *self, PyObject *Py_UNUSED(ignored))
{
    self->collector = 0;
    if (self->collected_left && leave_all(self) < 0)
        return NULL; /* the others leave at the end of the next turn, or by the timer */
    Py_RETURN_NONE;
}

static PyObject *
Engine_send_collected(Engine *self, PyObject *id)
{
    uint64_t sid;
    if (!self->collected_left)
        Py_RETURN_NONE;
    if (read_sid(id, &sid) < 0)
        return NULL;
    int64_t slot = slot_of(self, sid);
    if (slot >= 0 && self->descriptors[slot].first && leave(self, (uint32_t)slot) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
Engine_send_all_collected(Engine *self, PyObject *Py_UNUSED(ignored))
{
    if (self->collected_left && leave_all(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

#endif
