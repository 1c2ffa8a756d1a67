/* The reference type; what it does is in _references.h, _reading.h and _writing.h. */
#ifndef SHMSOCK_REFERENCE_TYPE_H
#define SHMSOCK_REFERENCE_TYPE_H

#include <Python.h>
#include <structmember.h>

#include "_reading.h"
#include "_references.h"
#include "_writing.h"

static PyObject *
Reference_enter(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    Py_INCREF(self);
    return self;
}

static PyObject *
Reference_exit(Reference *self, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(count))
{
    return Reference_close(self, NULL);
}

static PyObject *
Reference_add_reference(Reference *self, PyObject *Py_UNUSED(ignored))
{
    Engine *engine = self->engine;
    if (engine == NULL || self->open != 1 || engine->foreign || engine->closed) {
        PyObject *nothing = NULL;
        if (engine != NULL)
            nothing = PyObject_CallMethod(OBJECT(engine), "_reference_is_closed", NULL);
        Py_XDECREF(nothing);
        return NULL;
    }
    PyObject *another = new_reference(engine, self->sid);
    if (another != NULL) {
        engine->count[self->sid & SLOT_MASK]++;
        if (engine->pending_length)
            drain(engine);
    }
    return another;
}

static PyObject *
Reference_get_failed(Reference *self, void *Py_UNUSED(closure))
{
    Engine *engine = self->engine;
    if (engine == NULL || (engine->closed && !engine->foreign))
        Py_RETURN_TRUE; /* the runtime was closed under the reference */
    uint32_t slot = (uint32_t)(self->sid & SLOT_MASK);
    return PyBool_FromLong(version_of(&engine->table, slot) != self->sid >> 32);
}

static PyObject *
Reference_get_closed(Reference *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->open != 1);
}

static PyObject *
Reference_repr(Reference *self)
{
    const char *state = "live";
    if (self->open != 1)
        state = "closed";
    else if (version_of(&self->engine->table, (uint32_t)(self->sid & SLOT_MASK)) != self->sid >> 32)
        state = "failed";
    PyObject *name = PyObject_GetAttrString(OBJECT(Py_TYPE(OBJECT(self))), "__name__");
    char version[17];
    PyOS_snprintf(version, sizeof version, "%llx", (unsigned long long)(self->sid >> 32));
    PyObject *text = name == NULL ? NULL
                                  : PyUnicode_FromFormat("<%U sk-%s-%u %s>", name, version,
                                                         (unsigned)(self->sid & SLOT_MASK), state);
    Py_XDECREF(name);
    return text;
}

/* May run anywhere, also inside a stripe or under the local lock: never waits. */
static void
Reference_dealloc(Reference *self)
{
    PyTypeObject *type = Py_TYPE(OBJECT(self));
    Engine *engine = self->engine;
    if (self->weak_references != NULL)
        PyObject_ClearWeakRefs(OBJECT(self));
    if (engine != NULL) {
        if (self->open && !engine->foreign && !engine->closed) {
            PyObject *error, *value, *traceback;
            PyErr_Fetch(&error, &value, &traceback);
            postpone(engine, self->sid);
            drain(engine);
            PyErr_Restore(error, value, traceback);
        }
        self->engine = NULL;
        Py_DECREF(OBJECT(engine));
    }
    if (spares < SPARE_REFERENCES)
        spare[spares++] = self;
    else
        ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef Reference_methods[] = {
    {"close", (PyCFunction)Reference_close, METH_NOARGS,
     "Give the reference back. Again does nothing."},
    {"add_reference", (PyCFunction)Reference_add_reference, METH_NOARGS,
     "Take one more reference; works on a failed socket too.\n\nRaises:\n"
     "    ClosedError: This one was closed."},
    {"write", (PyCFunction)(void (*)(void))Reference_write, METH_FASTCALL,
     "write($self, /, *buffers)\n--\n\nSend the buffers as one whole message; never waits for the "
     "peer.\n\nSee SocketRef.write of the Python engine, its twin."},
    {"recv", (PyCFunction)Reference_recv, METH_O,
     "recv($self, size_bytes, /)\n--\n\nRead what is there, at most so much; see SocketRef.recv, "
     "its twin."},
    {"count_messages", (PyCFunction)Reference_count_messages, METH_O,
     "Add to the statistics of messages read; the owner's to call."},
    {"unwritten_bytes", (PyCFunction)Reference_unwritten_bytes, METH_NOARGS,
     "How much waits for this peer in this process."},
    {"__enter__", (PyCFunction)Reference_enter, METH_NOARGS, "The reference itself."},
    {"__exit__", (PyCFunction)(void (*)(void))Reference_exit, METH_FASTCALL, "Close it."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef Reference_properties[] = {
    {"failed", (getter)Reference_get_failed, NULL,
     "Whether the socket has failed: one read of shared memory.", NULL},
    {"busy", (getter)Reference_get_busy, (setter)Reference_set_busy,
     "Whether the owner is in the middle of a message; see SocketRef.busy, its twin.", NULL},
    {"closed", (getter)Reference_get_closed, NULL, "Whether this reference was given back.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef Reference_members[] = {
    {"id", T_ULONGLONG, offsetof(Reference, sid), READONLY, "The SocketId."},
    {"_engine", T_OBJECT_EX, offsetof(Reference, engine), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Reference, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Reference_slots[] = {
    {Py_tp_doc, "A counted hold on a socket: closed by close(), by with, or by being dropped."},
    {Py_tp_dealloc, Reference_dealloc},
    {Py_tp_repr, Reference_repr},
    {Py_tp_methods, Reference_methods},
    {Py_tp_getset, Reference_properties},
    {Py_tp_members, Reference_members},
    {0, NULL},
};

static PyType_Spec Reference_spec = {
    "shmsock.SocketRef", sizeof(Reference), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, Reference_slots,
};

#endif
