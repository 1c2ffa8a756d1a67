/* The write that nothing stands in the way of: one whole message that the kernel takes at once.
 *
 *     take the turn, send, count, give the turn
 *
 * Everything else is writing.py's: queued messages, a peer that does not read, errors, long
 * messages. It is handed the whole message before anything was sent, or the rest after.
 *
 * CRASH(turn_taken .. turn_given): the turn is found with a dead writer, and the socket is failed,
 * for nobody knows how much of the message is out (DESIGN 10).
 */
#ifndef SHMSOCK_WRITING_H
#define SHMSOCK_WRITING_H

#include <Python.h>

#include <sys/socket.h>
#include <sys/uio.h>

#include "_references.h"
#include "_transitions.h"

#define DIRECT_BUFFERS 16 /* of a message that is sent without a detour through writing.py */
#define DIRECT_BYTES 65536

static PyObject *
as_tuple(PyObject *const *items, Py_ssize_t count)
{
    PyObject *all = PyTuple_New(count);
    for (Py_ssize_t i = 0; all != NULL && i < count; i++) {
        Py_INCREF(items[i]);
        PyTuple_SetItem(all, i, items[i]);
    }
    return all;
}

/* Hand a write to writing.py: something is in the way. */
static PyObject *
write_slowly(Reference *self, PyObject *const *buffers, Py_ssize_t count)
{
    PyObject *all = as_tuple(buffers, count), *nothing = NULL;
    if (all != NULL)
        nothing = PyObject_CallMethod(OBJECT(self->engine), "_write", "OO", self, all);
    Py_XDECREF(all);
    return nothing;
}

/* The turn is ours and the kernel took `sent` bytes, or refused with `code`: writing.py goes on.
 * `whole`: each buffer is a message. */
static PyObject *
write_rest(Reference *self, PyObject *const *buffers, Py_ssize_t count, Py_ssize_t sent, int code,
           int whole)
{
    PyObject *all = as_tuple(buffers, count), *nothing = NULL;
    if (all != NULL)
        nothing = PyObject_CallMethod(OBJECT(self->engine), "_write_rest", "OOnii", self, all, sent,
                                      code, whole);
    Py_XDECREF(all);
    return nothing;
}

/* The turn is ours: send, count so many messages, give it back. The GIL is kept. */
static PyObject *
send_in_turn(Reference *self, PyObject *const *buffers, struct iovec *vector, Py_ssize_t count,
             size_t total, int whole)
{
    Engine *engine = self->engine;
    Table *t = &engine->table;
    uint32_t slot = (uint32_t)(self->sid & SLOT_MASK);
    Call call = {.slot = slot, .sid = self->sid};
    int number = engine->descriptors[slot].number, flags = MSG_DONTWAIT | MSG_NOSIGNAL;
    struct msghdr message = {.msg_iov = vector, .msg_iovlen = (size_t)count};
    ssize_t sent = count == 1 ? send(number, vector[0].iov_base, total, flags) /* is cheaper */
                              : sendmsg(number, &message, flags);
    KP(message_sent);
    if (sent != (ssize_t)total)
        return write_rest(self, buffers, count, sent < 0 ? 0 : sent, sent < 0 ? errno : 0, whole);
    PUT(bytes_out, slot, GET(bytes_out, slot) + total);
    PUT(messages_out, slot, GET(messages_out, slot) + (whole ? (uint64_t)count : 1));
    PUT(written_ns, slot, now_ns());
    KP(message_counted);
    if (run_within(engine, slot / t->block, NULL, body_give_turn, &call, 0) < 0) {
        /* The message is out: what keeps the turn from being given is no error of its writer. */
        PyErr_Clear();
        return PyObject_CallMethod(OBJECT(engine), "_give_turn_later", "K",
                                   (unsigned long long)self->sid);
    }
    Py_RETURN_NONE;
}

#include "_collecting.h"

/* One whole message of bytes objects: take the turn, send, give it back.
 *
 * The GIL is kept over the send, which does not wait: whoever computes in another thread would hold
 * up the turn for a switch interval. Longer messages go the slow way, which lets the GIL go. */
static PyObject *
Reference_write(Reference *self, PyObject *const *buffers, Py_ssize_t count)
{
    Engine *engine = self->engine;
    struct iovec vector[DIRECT_BUFFERS];
    size_t total = 0;
    uint32_t slot = (uint32_t)(self->sid & SLOT_MASK);
    int direct = count >= 1 && count <= DIRECT_BUFFERS && self->open == 1 && !engine->closed &&
                 engine->descriptors[slot].sid == self->sid && !engine->descriptors[slot].queued;
    for (Py_ssize_t i = 0; direct && i < count; i++) {
        char *bytes;
        Py_ssize_t length;
        direct = PyBytes_CheckExact(buffers[i]);
        if (direct && PyBytes_AsStringAndSize(buffers[i], &bytes, &length) == 0) {
            vector[i].iov_base = bytes;
            vector[i].iov_len = (size_t)length;
            total += (size_t)length;
        }
    }
    if (engine->collector || engine->collected_left) {
        int done = collect_or_send(self, buffers, count, direct ? total : 0);
        if (done < 0)
            return NULL;
        if (done)
            Py_RETURN_NONE;
        direct = direct && !engine->descriptors[slot].queued;
    }
    if (!direct || !total || total > engine->direct_bytes)
        return write_slowly(self, buffers, count);
    Call call = {.slot = slot, .sid = self->sid};
    int result = run(engine, body_take_turn, &call);
    if (result < 0)
        return NULL;
    /* The wait for the stripe may have let another thread queue something. */
    if (result != DONE || engine->descriptors[slot].queued ||
        engine->descriptors[slot].sid != self->sid) {
        if (result == DONE && run(engine, body_give_turn, &call) < 0)
            return NULL;
        return write_slowly(self, buffers, count);
    }
    return send_in_turn(self, buffers, vector, count, total, 0);
}

static PyObject *
Engine_set_descriptor(Engine *self, PyObject *args)
{
    PyObject *id;
    int number;
    uint64_t sid;
    if (!PyArg_ParseTuple(args, "Oi", &id, &number) || read_sid(id, &sid) < 0)
        return NULL;
    int64_t slot = slot_of(self, sid);
    if (slot >= 0 && number >= 0) {
        self->descriptors[slot].sid = sid;
        self->descriptors[slot].number = number;
        self->descriptors[slot].queued = 0;
        self->descriptors[slot].kind = 0;
    }
    else if (slot >= 0 && self->descriptors[slot].sid == sid)
        self->descriptors[slot].sid = 0;
    Py_RETURN_NONE;
}

/* Longer messages go the slow way, which refuses those that could not be queued whole. */
static PyObject *
Engine_set_direct_limit(Engine *self, PyObject *number)
{
    size_t bytes = PyLong_AsSize_t(number);
    if (bytes == (size_t)-1 && PyErr_Occurred())
        return NULL;
    self->direct_bytes = bytes < DIRECT_BYTES ? bytes : DIRECT_BYTES;
    Py_RETURN_NONE;
}

static PyObject *
Engine_set_queued(Engine *self, PyObject *args)
{
    PyObject *id;
    int queued;
    uint64_t sid;
    if (!PyArg_ParseTuple(args, "Op", &id, &queued) || read_sid(id, &sid) < 0)
        return NULL;
    int64_t slot = slot_of(self, sid);
    if (slot >= 0 && self->descriptors[slot].sid == sid)
        self->descriptors[slot].queued = queued;
    Py_RETURN_NONE;
}

#endif
