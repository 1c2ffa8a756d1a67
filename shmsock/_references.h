/* Counted references: address, dereference, and what a finaliser may do.
 *
 * A slot is attached with the first reference of this process and detached with the last; all
 * others are a number in this process's memory. `quick` looks at that number with the GIL, before
 * every try of the stripe, so that of two threads that begin together one attaches and the other
 * counts.
 *
 * Whatever gives a reference back may run anywhere: in a finaliser, in a callback of another one.
 * So what cannot be had at once is remembered in `pending`, and the next one here, or the timer,
 * gives it back.
 *
 * There is one reference type, and no Python subclass of it: instances of a class statement are
 * garbage-collected objects, whose making and freeing costs as much again as the reference.
 * socket.py puts what a reference can do into the type instead.
 */
#ifndef SHMSOCK_REFERENCES_H
#define SHMSOCK_REFERENCES_H

#include <Python.h>
#include <structmember.h>

#include "_waiting.h"

/* -- counting references ----------------------------------------------------------------------- */

static int
attach_again(Engine *self, Call *call)
{
    uint32_t *count = &self->count[call->slot];
    if (!*count)
        return NOTHING;
    uint64_t seen = version_of(&self->table, call->slot), version = call->sid >> 32;
    if (seen != version && !(call->failed_too && seen == version + 1))
        return RECYCLED; /* an older life than the one we hold: gone */
    ++*count;
    return DONE;
}

static int
attach_first(Engine *self, Call *call)
{
    int result = attach(&self->table, call->slot, call->sid, call->failed_too);
    if (result)
        self->count[call->slot] = 1;
    return result;
}

static int
detach_one(Engine *self, Call *call)
{
    uint32_t *count = &self->count[call->slot];
    if (*count == 1)
        return NOTHING;
    if (*count)
        --*count;
    return DONE;
}

static int
detach_last(Engine *self, Call *call)
{
    self->count[call->slot] = 0;
    return detach(&self->table, call->slot);
}

/* The count of an id reached 0: its number may be closed, or the slot was recycled by us. */
static int
after_detach(Engine *self, uint64_t sid, int result)
{
    if (!(result & DETACHED))
        return 0;
    if (!(result & RECYCLED)) {
        if (!PySet_Size(self->marked))
            return 0;
        PyObject *number = PyLong_FromUnsignedLongLong(sid);
        int marked = number == NULL ? -1 : PySet_Contains(self->marked, number);
        Py_XDECREF(number);
        if (marked <= 0)
            return marked;
    }
    PyObject *nothing = PyObject_CallMethod(OBJECT(self), "_let_go", "Ki",
                                            (unsigned long long)sid, (result & RECYCLED) != 0);
    Py_XDECREF(nothing);
    return nothing == NULL ? -1 : 0;
}

/* Remember a reference that cannot be given back now. */
static void
postpone(Engine *self, uint64_t sid)
{
    if (self->pending_length == self->pending_room) {
        size_t room = self->pending_room ? 2 * self->pending_room : 16;
        uint64_t *moved = realloc(self->pending, room * sizeof *moved);
        if (moved == NULL)
            return; /* held until this process ends: no memory is no reason to corrupt */
        self->pending = moved;
        self->pending_room = room;
    }
    self->pending[self->pending_length++] = sid;
}

/* Give one reference back without waiting: 1 done, 0 not now, -1 raised after it was done. */
static int
give_back(Engine *self, uint64_t sid)
{
    TABLE;
    Call call = {.slot = (uint32_t)(sid & SLOT_MASK), .sid = sid};
    if (self->lock->held)
        return 0;
    int result = detach_one(self, &call);
    if (result == NOTHING) {
        sem_t *sem;
        uint32_t stripe = call.slot / t->block;
        result = try_enter(self, stripe, &sem);
        if (result == DONE) {
            result = detach_one(self, &call);
            if (result == NOTHING)
                result = detach_last(self, &call);
            give(t, stripe, sem);
        }
        if (result == RAISED) {
            /* Not a participant any more, or no descriptor to open the semaphore with. */
            PyErr_Clear();
            return self->closed || self->foreign;
        }
        if (result == CONTENDED)
            return 0;
    }
    return after_detach(self, sid, result) < 0 ? -1 : 1;
}

/* Give back what finalisers dropped; what cannot be had now stays. Callbacks may come back here. */
static void
drain(Engine *self)
{
    if (self->draining)
        return;
    self->draining = 1;
    for (size_t left = self->pending_length; left && self->pending_length; left--) {
        uint64_t sid = self->pending[0];
        memmove(self->pending, self->pending + 1, --self->pending_length * sizeof *self->pending);
        int done = give_back(self, sid);
        if (!done)
            postpone(self, sid);
        else if (done < 0)
            PyErr_WriteUnraisable(OBJECT(self)); /* of a callback: the reference is back */
    }
    self->draining = 0;
}

/* The stripe was refused, with an exception: 0 if it was dealt with, RAISED if it goes on to the
 * caller, who still has the reference. */
static int
give_back_later(Engine *self, uint64_t sid)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyObject *later = PyObject_CallMethod(OBJECT(self), "_gives_back_later", "O", value);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    if (later == NULL) /* no refusal but an interruption: raised anew */
        return RAISED;
    if (PyObject_IsTrue(later))
        postpone(self, sid);
    Py_DECREF(later);
    return 0;
}

/* Give one reference back, waiting for the stripe if it is the last: 0, or an exception: RAISED if
 * it is still held, -1 if it is back and a callback raised. */
static int
dereference(Engine *self, uint64_t sid)
{
    Call call = {.slot = (uint32_t)(sid & SLOT_MASK), .sid = sid};
    if (self->foreign || self->closed)
        return 0;
    int result = self->lock->held ? NOTHING : detach_one(self, &call);
    if (result == NOTHING) {
        result = run_within(self, call.slot / self->table.block, detach_one, detach_last, &call,
                            PATIENCE_NS);
        if (result < 0)
            return give_back_later(self, sid);
    }
    else if (self->pending_length)
        drain(self);
    return after_detach(self, sid, result);
}

/* -- references -------------------------------------------------------------------------------- */

static PyObject *
new_reference(Engine *self, uint64_t sid)
{
    PyTypeObject *type = reference_type;
    Reference *made;
    if (spares) {
        made = spare[--spares];
        PyObject_Init(OBJECT(made), type);
    }
    else {
        made = (Reference *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
        if (made == NULL)
            return NULL;
    }
    Py_INCREF(OBJECT(self));
    made->engine = self;
    made->sid = sid;
    made->weak_references = NULL;
    made->open = 1;
    return OBJECT(made);
}

/* Addressing: an id into a reference, or None. `failed_too` takes failed sockets as well. */
static PyObject *
address(Engine *self, PyObject *id, int failed_too)
{
    TABLE;
    uint64_t sid;
    if (read_sid(id, &sid) < 0)
        return NULL;
    if ((self->closed || self->foreign ||
         atomic_load_explicit(t->poisoned, memory_order_relaxed)) &&
        check_participation(self) < 0)
        return NULL;
    int64_t slot = slot_of(self, sid);
    if (slot < 0)
        Py_RETURN_NONE;
    uint64_t seen = version_of(t, (uint32_t)slot);
    if (seen != sid >> 32 && !(failed_too && seen == (sid >> 32) + 1))
        Py_RETURN_NONE;
    /* ORDER: the object first: once it counts, nothing may fail. */
    PyObject *made = new_reference(self, sid);
    if (made == NULL)
        return NULL;
    Call call = {.slot = (uint32_t)slot, .sid = sid, .failed_too = failed_too};
    int result = self->lock->held ? NOTHING : attach_again(self, &call);
    if (result == NOTHING)
        result = run_within(self, (uint32_t)slot / t->block, attach_again, attach_first, &call,
                            PATIENCE_NS);
    else if (self->pending_length)
        drain(self);
    if (result == DONE)
        return made;
    ((Reference *)made)->open = 0; /* it never counted */
    Py_DECREF(made);
    if (result < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
Reference_close(Reference *self, PyObject *Py_UNUSED(ignored))
{
    if (self->open == 1) {
        self->open = 2; /* another thread that closes meanwhile has nothing left to do */
        int result = dereference(self->engine, self->sid);
        self->open = result == RAISED;
        if (result < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
Engine_address(Engine *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 1 && count != 2) {
        PyErr_SetString(PyExc_TypeError, "address(sid, failed_too=False)");
        return NULL;
    }
    int failed_too = count == 2 ? PyObject_IsTrue(args[1]) : 0;
    return failed_too < 0 ? NULL : address(self, args[0], failed_too);
}

/* -- the engine: references of this process ---------------------------------------------------- */

static PyObject *
Engine_count(Engine *self, PyObject *number)
{
    unsigned long slot = PyLong_AsUnsignedLong(number);
    if (slot == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLong(slot < self->table.slots ? self->count[slot] : 0);
}

static PyObject *
Engine_held_slots(Engine *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *slots = PyList_New(0);
    for (uint32_t slot = 0; slots != NULL && slot < self->table.slots; slot++)
        if (self->count[slot]) {
            PyObject *number = PyLong_FromUnsignedLong(slot);
            if (number == NULL || PyList_Append(slots, number) < 0)
                Py_CLEAR(slots);
            Py_XDECREF(number);
        }
    return slots;
}

static PyObject *
Engine_detach_all(Engine *self, PyObject *Py_UNUSED(ignored))
{
    TABLE;
    for (uint32_t slot = 0; slot < t->slots; slot++)
        while (self->count[slot]) {
            uint32_t before = self->count[slot];
            uint64_t version = version_of(t, slot) & ~1ull;
            if (dereference(self, version << 32 | slot) < 0)
                return NULL;
            if (self->closed || self->foreign || self->count[slot] >= before)
                break; /* refused: whoever reaps us gives it back */
        }
    Py_RETURN_NONE;
}

static PyObject *
Engine_drain(Engine *self, PyObject *Py_UNUSED(ignored))
{
    if (!self->closed && !self->foreign)
        drain(self);
    Py_RETURN_NONE;
}

#endif
