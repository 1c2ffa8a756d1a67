/* The transitions as methods: Python's arguments in, the bits of what happened out.
 *
 * Each reads its arguments before it takes the stripe, for nothing may fail inside. What is stored,
 * and in which order, is in _table.h.
 */
#ifndef SHMSOCK_TRANSITIONS_H
#define SHMSOCK_TRANSITIONS_H

#include <Python.h>

#include "_waiting.h"

static int
body_create(Engine *self, Call *call)
{
    call->made = create(&self->table, call->slot, &call->new);
    return call->made ? DONE : NOTHING;
}

static int
body_set_failed(Engine *self, Call *call)
{
    return set_failed(&self->table, call->slot, call->sid, call->code, call->text, call->length);
}

/* An error took the new id from its caller: nobody else will ever end that socket. */
static void
end_unknown(Engine *self, uint64_t sid)
{
    const char *why = "creation was interrupted";
    Call call = {.slot = (uint32_t)(sid & SLOT_MASK), .sid = sid, .code = ECANCELED, .text = why,
                 .length = strlen(why)};
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    run(self, body_set_failed, &call);
    PyErr_Restore(type, value, traceback);
}

/* Put a socket into a slot of any stripe: DONE, NOTHING if the table is full, or RAISED.
 *
 * Reuse goes round over the stripes. One try each, then wait: a stripe in which a live process was
 * stopped is passed over. */
static int
create_anywhere(Engine *self, Call *call)
{
    TABLE;
    uint64_t first = (uint64_t)++self->next_stripe;
    for (int patient = 0; patient < 2; patient++)
        for (uint32_t turn = 0; turn < t->stripes; turn++) {
            uint32_t stripe = (uint32_t)((first + turn) % t->stripes);
            if (find_free(t, stripe) < 0)
                continue;
            call->slot = stripe; /* which the body takes for the stripe */
            int result =
                run_within(self, stripe, NULL, body_create, call, patient ? PATIENCE_NS : 0);
            if (result == RAISED || result == DONE)
                return result;
        }
    return NOTHING;
}

static PyObject *
Engine_create(Engine *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"owner", "inode", "kind", "on_owner_death", "peer", "user_data",
                            "made",  NULL};
    Call call = {.new = {.peer = "", .user_data = ""}};
    PyObject *made = Py_None, *peer = NULL, *user_data = NULL;
    unsigned long long owner, inode = 0;
    /* WHY NOT "y#": what 3.13 compiles of it does not run on 3.11. */
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K|KbbSSO", names, &owner, &inode,
                                     &call.new.kind, &call.new.on_owner_death, &peer, &user_data,
                                     &made))
        return NULL;
    call.new.owner = owner;
    call.new.inode = inode;
    if (peer != NULL) {
        call.new.peer = PyBytes_AsString(peer);
        call.new.peer_bytes = (size_t)PyBytes_Size(peer);
    }
    if (user_data != NULL) {
        call.new.user_data = PyBytes_AsString(user_data);
        call.new.user_data_bytes = (size_t)PyBytes_Size(user_data);
    }
    int result = create_anywhere(self, &call);
    if (result == RAISED)
        return NULL;
    if (result == NOTHING)
        return PyObject_CallMethod(OBJECT(self), "_table_full", NULL);
    PyObject *sid = PyLong_FromUnsignedLongLong(call.made);
    if (sid != NULL && made != Py_None && PyList_Append(made, sid) < 0)
        Py_CLEAR(sid);
    if (sid == NULL)
        end_unknown(self, call.made);
    return sid;
}

static PyObject *
Engine_set_failed(Engine *self, PyObject *args)
{
    PyObject *id, *number, *text;
    uint64_t sid;
    if (!PyArg_ParseTuple(args, "OOU", &id, &number, &text) || read_sid(id, &sid) < 0)
        return NULL;
    if ((number = PyNumber_Index(number)) == NULL)
        return NULL;
    int overflow;
    long code = PyLong_AsLongAndOverflow(number, &overflow);
    if (overflow || code < INT32_MIN || code > INT32_MAX) { /* said here, not inside the stripe */
        PyErr_Format(PyExc_ValueError, "error code %S does not fit 32 bits", number);
        Py_DECREF(number);
        return NULL;
    }
    Py_DECREF(number);
    int64_t slot = slot_of(self, sid);
    if (slot < 0 || version_of(&self->table, (uint32_t)slot) != sid >> 32)
        return PyLong_FromLong(NOTHING);
    PyObject *raw = PyUnicode_AsEncodedString(text, "utf-8", "replace");
    Call call = {.slot = (uint32_t)slot, .sid = sid, .code = (int32_t)code};
    char *bytes;
    Py_ssize_t length;
    if (raw == NULL || PyBytes_AsStringAndSize(raw, &bytes, &length) < 0) {
        Py_XDECREF(raw);
        return NULL;
    }
    call.text = bytes;
    call.length = (size_t)length;
    int result = run(self, body_set_failed, &call);
    Py_DECREF(raw);
    return as_bits(result);
}

/* A transition of one socket; also of one that has failed: who was fenced is told so first. */
static PyObject *
run_on(Engine *self, PyObject *id, Body body, Call call)
{
    if (read_sid(id, &call.sid) < 0)
        return NULL;
    int64_t slot = slot_of(self, call.sid);
    if (slot < 0)
        return PyLong_FromLong(NOTHING);
    call.slot = (uint32_t)slot;
    return as_bits(run(self, body, &call));
}

static int
body_release(Engine *self, Call *call)
{
    return release_additional_reference(&self->table, call->slot, call->sid);
}

static PyObject *
Engine_release_additional_reference(Engine *self, PyObject *id)
{
    uint64_t sid;
    if (read_sid(id, &sid) < 0)
        return NULL;
    int64_t slot = slot_of(self, sid);
    if (slot < 0 || version_of(&self->table, (uint32_t)slot) != sid >> 32)
        return PyLong_FromLong(NOTHING);
    return run_on(self, id, body_release, (Call){0});
}

static int
body_take_turn(Engine *self, Call *call)
{
    return take_turn(&self->table, call->slot, call->sid);
}

static PyObject *
Engine_take_turn(Engine *self, PyObject *id)
{
    return run_on(self, id, body_take_turn, (Call){0});
}

static int
body_give_turn(Engine *self, Call *call)
{
    return give_turn(&self->table, call->slot, call->sid);
}

static PyObject *
Engine_give_turn(Engine *self, PyObject *id)
{
    return run_on(self, id, body_give_turn, (Call){0});
}

static int
body_change_owner(Engine *self, Call *call)
{
    return change_owner(&self->table, call->slot, call->sid, call->expected, call->owner);
}

static PyObject *
Engine_change_owner(Engine *self, PyObject *args)
{
    PyObject *id;
    unsigned long long expected, owner;
    if (!PyArg_ParseTuple(args, "OKK", &id, &expected, &owner))
        return NULL;
    return run_on(self, id, body_change_owner, (Call){.expected = expected, .owner = owner});
}

static int
body_offer(Engine *self, Call *call)
{
    return offer(&self->table, call->slot, call->sid, call->owner);
}

static PyObject *
Engine_offer(Engine *self, PyObject *args)
{
    PyObject *id;
    unsigned long long heir;
    if (!PyArg_ParseTuple(args, "OK", &id, &heir))
        return NULL;
    return run_on(self, id, body_offer, (Call){.owner = heir});
}

static int
body_withdraw(Engine *self, Call *call)
{
    return withdraw(&self->table, call->slot, call->sid, call->owner);
}

static PyObject *
Engine_withdraw(Engine *self, PyObject *args)
{
    PyObject *id;
    unsigned long long heir;
    if (!PyArg_ParseTuple(args, "OK", &id, &heir))
        return NULL;
    return run_on(self, id, body_withdraw, (Call){.owner = heir});
}

static int
body_inherit(Engine *self, Call *call)
{
    return inherit(&self->table, call->slot, call->sid);
}

static PyObject *
Engine_inherit(Engine *self, PyObject *id)
{
    return run_on(self, id, body_inherit, (Call){0});
}

static int
body_set_user_data(Engine *self, Call *call)
{
    return set_user_data(&self->table, call->slot, call->sid, call->text, call->length);
}

static PyObject *
Engine_set_user_data(Engine *self, PyObject *args)
{
    PyObject *id, *data;
    if (!PyArg_ParseTuple(args, "OS", &id, &data))
        return NULL;
    return run_on(self, id, body_set_user_data,
                  (Call){.text = PyBytes_AsString(data), .length = (size_t)PyBytes_Size(data)});
}

static PyObject *
Engine_is_live(Engine *self, PyObject *id)
{
    uint64_t sid;
    if (read_sid(id, &sid) < 0)
        return NULL;
    int64_t slot = slot_of(self, sid);
    return PyBool_FromLong(slot >= 0 && is_live(&self->table, (uint32_t)slot, sid));
}

#endif
