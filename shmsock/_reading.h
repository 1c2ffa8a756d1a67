/* What the owner does for every event: read what is there, and say how far it is with it.
 *
 * No stripe: only the owner stores here. Everything out of the ordinary (the descriptor is not
 * known yet, the runtime was closed) is socket.py's, which _engine_c.py calls.
 */
#ifndef SHMSOCK_READING_H
#define SHMSOCK_READING_H

#include <Python.h>

#include <sys/socket.h>

#include "_references.h"
#include "_writing.h"

#define READ_BYTES 65536

/* What is read goes through here, so that the object which is made of it has its final size.
 * Guarded by the GIL, which is kept over a recv that does not wait. */
static char read_buffer[READ_BYTES];

static int
refuse_closed(Reference *self)
{
    if (self->engine != NULL && !self->engine->closed)
        return 0;
    PyObject *nothing = NULL;
    if (self->engine != NULL)
        nothing = PyObject_CallMethod(OBJECT(self->engine), "_runtime_is_closed", NULL);
    Py_XDECREF(nothing);
    return -1;
}

static PyObject *
Reference_recv(Reference *self, PyObject *size)
{
    Engine *engine = self->engine;
    Py_ssize_t wanted = PyLong_AsSsize_t(size);
    if (wanted == -1 && PyErr_Occurred())
        return NULL;
    uint32_t slot = (uint32_t)(self->sid & SLOT_MASK);
    if (wanted < 0 || wanted > READ_BYTES || self->open != 1 || engine->closed ||
        engine->descriptors[slot].sid != self->sid)
        return PyObject_CallMethod(OBJECT(engine), "_recv", "On", self, wanted);
    ssize_t got = recv(engine->descriptors[slot].number, read_buffer, (size_t)wanted, MSG_DONTWAIT);
    if (got < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Table *t = &engine->table;
    PUT(bytes_in, slot, GET(bytes_in, slot) + (uint64_t)got);
    PUT(read_ns, slot, now_ns());
    return PyBytes_FromStringAndSize(read_buffer, got);
}

static PyObject *
Reference_get_busy(Reference *self, void *Py_UNUSED(closure))
{
    if (refuse_closed(self) < 0)
        return NULL;
    Table *t = &self->engine->table;
    return PyBool_FromLong(GET(busy, (uint32_t)(self->sid & SLOT_MASK)));
}

static int
Reference_set_busy(Reference *self, PyObject *value, void *Py_UNUSED(closure))
{
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "busy cannot be deleted");
        return -1;
    }
    int busy = PyObject_IsTrue(value);
    if (busy < 0 || refuse_closed(self) < 0)
        return -1;
    Table *t = &self->engine->table;
    uint32_t slot = (uint32_t)(self->sid & SLOT_MASK);
    if (!busy && self->engine->collected_left && leave_all(self->engine) < 0)
        return -1; /* idle is: every answer is out, and what was said to others before it */
    PUT(busy, slot, (uint8_t)busy);
    return 0;
}

static PyObject *
Reference_count_messages(Reference *self, PyObject *number)
{
    unsigned long long count = PyLong_AsUnsignedLongLong(number);
    if ((count == (unsigned long long)-1 && PyErr_Occurred()) || refuse_closed(self) < 0)
        return NULL;
    Table *t = &self->engine->table;
    uint32_t slot = (uint32_t)(self->sid & SLOT_MASK);
    PUT(messages_in, slot, GET(messages_in, slot) + count);
    Py_RETURN_NONE;
}

static PyObject *
Reference_unwritten_bytes(Reference *self, PyObject *Py_UNUSED(ignored))
{
    Engine *engine = self->engine;
    uint32_t slot = (uint32_t)(self->sid & SLOT_MASK);
    if (engine->collected_left && leave_all(engine) < 0)
        return NULL;
    if (engine->descriptors[slot].sid == self->sid && !engine->descriptors[slot].queued)
        return PyLong_FromLong(0);
    return PyObject_CallMethod(OBJECT(engine), "_unwritten_bytes", "K",
                               (unsigned long long)self->sid);
}

#endif
