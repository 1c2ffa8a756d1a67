/* The C engine: counted references and the way into the stripes, for CPython (limited API).
 *
 * The twin of _engine_py.py, over the same segment and protocol: processes of both kinds may share
 * a segment. _table.h has the transitions, _stripes.h the lock; this file has what is Python's:
 * objects, the count of references, waiting, errors. _engine_c.py adds what is rare.
 *
 *     INVARIANT: count[slot] > 0  =>  held[slot, me] == 1, so the slot is not recycled and its
 *                version is v or v + 1. Reading it is all that a second reference costs.
 *
 * The GIL is the local lock. A C function that keeps it runs alone in its process: from the look at
 * the count to give nothing comes between, neither a thread nor a finaliser nor an exception. Only
 * three things let it go: the nap of who waits, a Python body inside `run`, and callbacks, which
 * come after give. Python code that needs the same exclusion over several bytecodes takes
 * `engine.lock`; then everybody here waits for it, without the GIL.
 *
 * A nap ends in a look at everything anew: another thread may have attached, detached or closed.
 *
 * There is one reference type, and no Python subclass of it: instances of a class statement are
 * garbage-collected objects, whose making and freeing costs as much again as the reference.
 * socket.py puts what a reference can do into the type instead.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "_stripes.h"
#include "_table.h"

#define LOOK_AFTER_NS 50000000ull /* contended for this long a stripe may be stuck */
#define PATIENCE_NS 10000000000ull
#define NAP_FIRST_NS 20000
#define NAP_LAST_NS 1000000
#define SPARE_REFERENCES 64
#define DIRECT_BUFFERS 16 /* of a message that is sent without a detour through writing.py */
#define DIRECT_BYTES 65536
#define TIMED_OUT (-3)
#define RAISED (-4)

#define OBJECT(pointer) ((PyObject *)(pointer))

/* -- the local lock ----------------------------------------------------------------------------- */

/* `held` is read and stored with the GIL; whoever finds it set waits at `raw` without. */
typedef struct {
    PyObject_HEAD
    PyThread_type_lock raw;
    int held;
} LocalLock;

static PyTypeObject *local_lock_type;

static int
local_lock_acquire(LocalLock *self, int blocking)
{
    PyLockStatus got = PyThread_acquire_lock_timed(self->raw, 0, 0);
    while (got != PY_LOCK_ACQUIRED) {
        if (!blocking)
            return 0;
        Py_BEGIN_ALLOW_THREADS
        got = PyThread_acquire_lock_timed(self->raw, -1, 1);
        Py_END_ALLOW_THREADS
        if (got == PY_LOCK_INTR && PyErr_CheckSignals())
            return -1;
    }
    self->held = 1;
    return 1;
}

static void
local_lock_release(LocalLock *self)
{
    self->held = 0;
    PyThread_release_lock(self->raw);
}

static PyObject *
LocalLock_acquire(LocalLock *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"blocking", NULL};
    int blocking = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|p", names, &blocking))
        return NULL;
    int got = local_lock_acquire(self, blocking);
    return got < 0 ? NULL : PyBool_FromLong(got);
}

static PyObject *
LocalLock_release(LocalLock *self, PyObject *Py_UNUSED(ignored))
{
    if (!self->held) {
        PyErr_SetString(PyExc_RuntimeError, "release of a lock that nobody holds");
        return NULL;
    }
    local_lock_release(self);
    Py_RETURN_NONE;
}

static PyObject *
LocalLock_locked(LocalLock *self, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(self->held);
}

static PyObject *
LocalLock_enter(LocalLock *self, PyObject *Py_UNUSED(ignored))
{
    return local_lock_acquire(self, 1) < 0 ? NULL : PyBool_FromLong(1);
}

static PyObject *
LocalLock_exit(LocalLock *self, PyObject *Py_UNUSED(args))
{
    return LocalLock_release(self, NULL);
}

static PyObject *
LocalLock_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs))
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    LocalLock *self = (LocalLock *)alloc(type, 0);
    if (self != NULL && (self->raw = PyThread_allocate_lock()) == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return OBJECT(self);
}

static void
LocalLock_dealloc(LocalLock *self)
{
    PyTypeObject *type = Py_TYPE(OBJECT(self));
    if (self->raw != NULL)
        PyThread_free_lock(self->raw);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef LocalLock_methods[] = {
    {"acquire", (PyCFunction)(void (*)(void))LocalLock_acquire, METH_VARARGS | METH_KEYWORDS, NULL},
    {"release", (PyCFunction)LocalLock_release, METH_NOARGS, NULL},
    {"locked", (PyCFunction)LocalLock_locked, METH_NOARGS, NULL},
    {"__enter__", (PyCFunction)LocalLock_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)LocalLock_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot LocalLock_slots[] = {
    {Py_tp_doc, "Excludes this process's other threads from the engine, over several bytecodes."},
    {Py_tp_new, LocalLock_new},
    {Py_tp_dealloc, LocalLock_dealloc},
    {Py_tp_methods, LocalLock_methods},
    {0, NULL},
};

static PyType_Spec LocalLock_spec = {
    "shmsock._engine.LocalLock", sizeof(LocalLock), 0, Py_TPFLAGS_DEFAULT, LocalLock_slots,
};

/* -- objects ------------------------------------------------------------------------------------ */

typedef struct {
    uint64_t generation; /* 0: not opened */
    sem_t *sem;
} Handle;

typedef struct {
    PyObject_HEAD
    Table table;
    /* A mapping of our own: the runtime may unmap its own under references that still look. */
    char *mapping;
    size_t mapping_bytes;
    int closed;  /* left, fenced, or the runtime was closed */
    int foreign; /* inherited by a forked child: everything is inert */
    LocalLock *lock;
    uint32_t *count; /* references of this process, by slot */
    Handle *handles; /* one a stripe */
    /* What could not be given back at once: one reference of each id. */
    uint64_t *pending;
    size_t pending_length, pending_room;
    /* This process's own duplicate of each socket, for `write`; sid 0: none is known. */
    struct {
        uint64_t sid;
        int number;
        int queued; /* messages wait in writing.py: the next one goes behind them */
    } *descriptors;
    size_t direct_bytes;
    int draining;
    long long next_stripe;
    PyObject *marked; /* ids whose cached descriptor waits for the count to reach 0 */
} Engine;

typedef struct {
    PyObject_HEAD
    Engine *engine;
    uint64_t sid;
    PyObject *weak_references;
    int open; /* 1 open, 0 closed, 2 being closed by a thread that waits */
} Reference;

static PyTypeObject *engine_type, *reference_type;
/* Freed references for the next ones: all of the one size. Guarded by the GIL. */
static Reference *spare[SPARE_REFERENCES];
static int spares;

#define TABLE Table *t = &self->table

static void drain(Engine *self);

/* -- waiting ------------------------------------------------------------------------------------ */

/* Wait until no Python code has the local lock; 0, or -1 with an exception. */
static int
wait_local(Engine *self)
{
    while (self->lock->held) {
        if (local_lock_acquire(self->lock, 1) < 0)
            return -1;
        local_lock_release(self->lock);
    }
    return 0;
}

/* Raise what keeps this process out, in _engine_c.py's words; 0 if nothing does. */
static int
check_participation(Engine *self)
{
    TABLE;
    if (!self->closed && !self->foreign &&
        !atomic_load_explicit(t->poisoned, memory_order_relaxed) &&
        GET(row_state, t->index) == t->row_word)
        return 0;
    PyObject *nothing = PyObject_CallMethod(OBJECT(self), "_check_participation", NULL);
    Py_XDECREF(nothing);
    return nothing == NULL ? -1 : 0;
}

/* The present semaphore of a stripe, opened once a generation: DONE, CONTENDED or RAISED. */
static int
open_semaphore(Engine *self, uint32_t stripe, uint64_t generation, sem_t **found)
{
    Handle *handle = &self->handles[stripe];
    if (handle->generation == generation) {
        *found = handle->sem;
        return DONE;
    }
    for (int spare_burnt = 0;; spare_burnt++) {
        PyObject *path = PyObject_CallMethod(OBJECT(self), "_semaphore_path", "IK", stripe,
                                             (unsigned long long)generation);
        const char *text = path == NULL ? NULL : PyUnicode_AsUTF8AndSize(path, NULL);
        if (text == NULL) {
            Py_XDECREF(path);
            return RAISED;
        }
        sem_t *opened = sem_open(text, 0);
        int code = errno;
        Py_DECREF(path);
        PyObject *nothing = NULL;
        if (spare_burnt) {
            nothing = PyObject_CallMethod(OBJECT(self), "_renew_spare", NULL);
            Py_XDECREF(nothing);
        }
        if (opened != SEM_FAILED) {
            if (handle->generation)
                sem_close(handle->sem);
            handle->generation = generation;
            handle->sem = opened;
            *found = opened;
            return spare_burnt && nothing == NULL ? RAISED : DONE;
        }
        if (spare_burnt && nothing == NULL)
            return RAISED;
        if (code == ENOENT) /* retired between the look at ctl and ours */
            return CONTENDED;
        if (spare_burnt || (code != EMFILE && code != ENFILE)) {
            errno = code;
            PyErr_SetFromErrno(PyExc_OSError);
            return RAISED;
        }
        nothing = PyObject_CallMethod(OBJECT(self), "_burn_spare", NULL);
        Py_XDECREF(nothing);
        if (nothing == NULL)
            return RAISED;
    }
}

/* Try once to be inside: DONE, CONTENDED or RAISED. The GIL is kept from DONE to give. */
static int
try_enter(Engine *self, uint32_t stripe, sem_t **sem)
{
    TABLE;
    if (check_participation(self) < 0)
        return RAISED;
    uint64_t left = atomic_load_explicit(claim_of(t, stripe), memory_order_relaxed);
    if (left) {
        /* A Python body raised inside: WANT is never stored over it, that would hide the break. */
        atomic_store_explicit(claim_of(t, stripe), left | CLAIM_BROKEN, memory_order_release);
        return CONTENDED;
    }
    uint64_t generation = generation_of(t, stripe);
    int result = open_semaphore(self, stripe, generation, sem);
    if (result != DONE)
        return result;
    if (check_participation(self) < 0) /* opening may have let the GIL go */
        return RAISED;
    result = take(t, stripe, generation, *sem);
    /* WHY NOT raise for FENCED: nothing is ours any more. The next try looks first, and raises. */
    return result == FENCED ? CONTENDED : result;
}

typedef struct {
    uint64_t started_ns, looked_ns;
    long nap_ns;
} Patience;

/* After CONTENDED: look for the dead now and then, nap. 0 to try again, TIMED_OUT, RAISED. */
static int
be_patient(Engine *self, uint32_t stripe, Patience *wait, uint64_t patience_ns)
{
    TABLE;
    uint64_t now = now_ns();
    if (!wait->started_ns) {
        wait->started_ns = wait->looked_ns = now;
        wait->nap_ns = NAP_FIRST_NS;
    }
    if (now - wait->looked_ns >= LOOK_AFTER_NS ||
        atomic_load_explicit(claim_of(t, stripe), memory_order_relaxed)) {
        PyObject *nothing = PyObject_CallMethod(OBJECT(self), "_repair", "I", stripe);
        Py_XDECREF(nothing);
        if (nothing == NULL)
            return RAISED;
        wait->looked_ns = now_ns();
    }
    if (now - wait->started_ns >= patience_ns)
        return TIMED_OUT;
    struct timespec nap = {0, wait->nap_ns};
    Py_BEGIN_ALLOW_THREADS
    nanosleep(&nap, NULL);
    Py_END_ALLOW_THREADS
    wait->nap_ns = wait->nap_ns * 2 < NAP_LAST_NS ? wait->nap_ns * 2 : NAP_LAST_NS;
    return PyErr_CheckSignals() ? RAISED : 0;
}

/* Raise StripeTimeoutError in _engine_c.py's words. */
static void
raise_timeout(Engine *self, uint32_t stripe, uint64_t started_ns)
{
    double waited_s = (double)(now_ns() - started_ns) / 1e9;
    Py_XDECREF(PyObject_CallMethod(OBJECT(self), "_timed_out", "Id", stripe, waited_s));
}

/* -- running a transition ----------------------------------------------------------------------- */

typedef struct {
    uint32_t slot;
    uint64_t sid, expected, owner;
    int failed_too;
    int32_t code;
    const char *text;
    size_t length;
    NewSocket new;
    uint64_t made;
} Call;

typedef int (*Body)(Engine *, Call *); /* inside; stores */
typedef int (*Quick)(Engine *, Call *); /* before every try: another result than NOTHING is it */

/* Take the stripe, run the body, give: its bits, TIMED_OUT (told nobody) or RAISED. */
static int
run_within(Engine *self, uint32_t stripe, Quick quick, Body body, Call *call, uint64_t patience_ns)
{
    TABLE;
    Patience wait = {0, 0, 0};
    for (;;) {
        if (self->lock->held && wait_local(self) < 0)
            return RAISED;
        int result = quick == NULL ? NOTHING : quick(self, call);
        if (result == NOTHING) {
            sem_t *sem;
            result = try_enter(self, stripe, &sem);
            if (result == DONE) {
                /* Opening the semaphore may have let others run: look at the count again. */
                result = quick == NULL ? NOTHING : quick(self, call);
                if (result == NOTHING)
                    result = body(self, call);
                give(t, stripe, sem);
            }
        }
        if (result >= 0) {
            if (self->pending_length)
                drain(self);
            return result;
        }
        if (result == CONTENDED)
            result = be_patient(self, stripe, &wait, patience_ns);
        if (result) {
            if (result == TIMED_OUT && patience_ns)
                raise_timeout(self, stripe, wait.started_ns);
            return result == TIMED_OUT && patience_ns ? RAISED : result;
        }
    }
}

static int
run(Engine *self, Body body, Call *call)
{
    return run_within(self, call->slot / self->table.block, NULL, body, call, PATIENCE_NS);
}

/* The slot that a well-formed id names, or -1. */
static int64_t
slot_of(const Engine *self, uint64_t sid)
{
    uint64_t slot = sid & SLOT_MASK;
    if (!sid || sid >> 63 || (sid >> 32 & 1) || slot >= self->table.slots)
        return -1;
    return (int64_t)slot;
}

/* An id from any integer; whatever cannot be one is 0. -1: no integer, exception set. */
static int
read_sid(PyObject *object, uint64_t *sid)
{
    PyObject *number = PyLong_CheckExact(object) ? (Py_INCREF(object), object)
                                                 : PyNumber_Index(object);
    if (number == NULL)
        return -1;
    *sid = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (*sid == (uint64_t)-1 && PyErr_Occurred()) {
        PyErr_Clear(); /* negative or too large: no id, so stale like any other */
        *sid = 0;
    }
    return 0;
}

static PyObject *
as_bits(int result)
{
    return result < 0 ? NULL : PyLong_FromLong(result);
}

/* -- counting references ------------------------------------------------------------------------ */

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

/* -- references --------------------------------------------------------------------------------- */

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

/* -- writing ------------------------------------------------------------------------------------ */

static int body_take_turn(Engine *, Call *);
static int body_give_turn(Engine *, Call *);

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

/* The turn is ours and the kernel took `sent` bytes, or refused with `code`: writing.py goes on. */
static PyObject *
write_rest(Reference *self, PyObject *const *buffers, Py_ssize_t count, Py_ssize_t sent, int code)
{
    PyObject *all = as_tuple(buffers, count), *nothing = NULL;
    if (all != NULL)
        nothing = PyObject_CallMethod(OBJECT(self->engine), "_write_rest", "OOni", self, all, sent,
                                      code);
    Py_XDECREF(all);
    return nothing;
}

/* One whole message of bytes objects, when nothing is in the way: take the turn, send, give it back.
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
    if (!direct || !total || total > engine->direct_bytes)
        return write_slowly(self, buffers, count);
    Table *t = &engine->table;
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
    struct msghdr message = {.msg_iov = vector, .msg_iovlen = (size_t)count};
    ssize_t sent = sendmsg(engine->descriptors[slot].number, &message,
                           MSG_DONTWAIT | MSG_NOSIGNAL);
    KP(message_sent);
    if (sent != (ssize_t)total)
        return write_rest(self, buffers, count, sent < 0 ? 0 : sent, sent < 0 ? errno : 0);
    PUT(bytes_out, slot, GET(bytes_out, slot) + total);
    PUT(messages_out, slot, GET(messages_out, slot) + 1);
    PUT(written_ns, slot, now_ns());
    KP(message_counted);
    if (run_within(engine, slot / t->block, NULL, body_give_turn, &call, 0) < 0) {
        /* The message is out: whatever keeps the turn from being given is no error of its writer. */
        PyErr_Clear();
        return PyObject_CallMethod(OBJECT(engine), "_give_turn_later", "K",
                                   (unsigned long long)self->sid);
    }
    Py_RETURN_NONE;
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
    {"__enter__", (PyCFunction)Reference_enter, METH_NOARGS, "The reference itself."},
    {"__exit__", (PyCFunction)(void (*)(void))Reference_exit, METH_FASTCALL, "Close it."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef Reference_properties[] = {
    {"failed", (getter)Reference_get_failed, NULL,
     "Whether the socket has failed: one read of shared memory.", NULL},
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

/* -- the engine: its transitions ---------------------------------------------------------------- */

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

static PyObject *
Engine_create(Engine *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"owner", "inode", "kind", "on_owner_death", "peer", "user_data",
                            "made",  NULL};
    TABLE;
    Call call = {.new = {.peer = "", .user_data = ""}};
    PyObject *made = Py_None;
    unsigned long long owner, inode = 0;
    Py_ssize_t peer_bytes = 0, user_data_bytes = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K|Kbby#y#O", names, &owner, &inode,
                                     &call.new.kind, &call.new.on_owner_death, &call.new.peer,
                                     &peer_bytes, &call.new.user_data, &user_data_bytes, &made))
        return NULL;
    call.new.owner = owner;
    call.new.inode = inode;
    call.new.peer_bytes = (size_t)peer_bytes;
    call.new.user_data_bytes = (size_t)user_data_bytes;
    /* Reuse goes round over the stripes. One try each, then wait: a stripe in which a live process
     * was stopped is passed over. */
    uint64_t first = (uint64_t)++self->next_stripe;
    for (int patient = 0; patient < 2; patient++)
        for (uint32_t turn = 0; turn < t->stripes; turn++) {
            uint32_t stripe = (uint32_t)((first + turn) % t->stripes);
            if (find_free(t, stripe) < 0)
                continue;
            call.slot = stripe; /* which the body takes for the stripe */
            int result =
                run_within(self, stripe, NULL, body_create, &call, patient ? PATIENCE_NS : 0);
            if (result == RAISED)
                return NULL;
            if (result == DONE) {
                PyObject *sid = PyLong_FromUnsignedLongLong(call.made);
                if (sid != NULL && made != Py_None && PyList_Append(made, sid) < 0)
                    Py_CLEAR(sid);
                if (sid == NULL)
                    end_unknown(self, call.made);
                return sid;
            }
        }
    return PyObject_CallMethod(OBJECT(self), "_table_full", NULL);
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
    PyObject *id;
    const char *data;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(args, "Oy#", &id, &data, &length))
        return NULL;
    return run_on(self, id, body_set_user_data, (Call){.text = data, .length = (size_t)length});
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

/* -- the engine: references of this process ----------------------------------------------------- */

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

/* Say BROKEN where a Python body raised inside a stripe and nobody took that stripe since. */
static PyObject *
Engine_own_up(Engine *self, PyObject *Py_UNUSED(ignored))
{
    TABLE;
    if (self->closed || self->foreign || self->lock->held ||
        GET(row_state, t->index) != t->row_word)
        Py_RETURN_NONE;
    for (uint32_t stripe = 0; stripe < t->stripes; stripe++) {
        _Atomic uint64_t *claim = claim_of(t, stripe);
        uint64_t left = atomic_load_explicit(claim, memory_order_relaxed);
        if (left)
            atomic_store_explicit(claim, left | CLAIM_BROKEN, memory_order_release);
    }
    Py_RETURN_NONE;
}

/* Run a Python function inside a stripe, under the local lock; recovery's recount. An exception
 * leaves the claim BROKEN: as if we had died in that stripe. */
static PyObject *
Engine_run(Engine *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"stripe", "body", "slot", "argument", "patience_s", NULL};
    TABLE;
    unsigned int stripe;
    long long slot;
    PyObject *body, *argument = Py_None;
    double patience_s = (double)PATIENCE_NS / 1e9;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "IOL|O$d", names, &stripe, &body, &slot,
                                     &argument, &patience_s))
        return NULL;
    if (stripe >= t->stripes) {
        PyErr_SetString(PyExc_IndexError, "no such stripe");
        return NULL;
    }
    Patience wait = {0, 0, 0};
    for (;;) {
        if (local_lock_acquire(self->lock, 1) < 0)
            return NULL;
        sem_t *sem;
        int result = try_enter(self, stripe, &sem);
        if (result == DONE) {
            PyObject *answer = PyObject_CallFunction(body, "LO", slot, argument);
            if (answer != NULL)
                give(t, stripe, sem);
            else
                atomic_fetch_or_explicit(claim_of(t, stripe), CLAIM_BROKEN, memory_order_release);
            local_lock_release(self->lock);
            if (answer != NULL && self->pending_length)
                drain(self);
            return answer;
        }
        local_lock_release(self->lock);
        if (result == CONTENDED)
            result = be_patient(self, stripe, &wait, (uint64_t)(patience_s * 1e9));
        if (result == TIMED_OUT)
            raise_timeout(self, stripe, wait.started_ns);
        if (result)
            return NULL;
    }
}

/* -- the engine: its life ----------------------------------------------------------------------- */

/* Map the same pages once more, without a descriptor: mremap(2) with an old size of 0. */
static int
map_again(Engine *self, PyObject *mapping)
{
    Py_buffer view;
    if (PyObject_GetBuffer(mapping, &view, PyBUF_WRITABLE) < 0)
        return -1;
    void *again = mremap(view.buf, 0, (size_t)view.len, MREMAP_MAYMOVE);
    int code = errno;
    self->mapping_bytes = (size_t)view.len;
    PyBuffer_Release(&view);
    if (again == MAP_FAILED) {
        errno = code;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    self->mapping = again;
    return 0;
}

/* Point a column at its place in the mapping; -1 if the layout does not have it as we expect. */
static int
find_column(Engine *self, PyObject *offsets, const char *name, size_t bytes, void *where)
{
    PyObject *offset = PyDict_GetItemString(offsets, name);
    size_t at = offset == NULL ? 0 : PyLong_AsSize_t(offset);
    if (offset == NULL || PyErr_Occurred() || at % 8 || at + bytes > self->mapping_bytes) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "the segment has no column %s as the C engine knows it",
                         name);
        return -1;
    }
    *(void **)where = self->mapping + at;
    return 0;
}

static int
find_columns(Engine *self, PyObject *offsets)
{
    TABLE;
    size_t slots = t->slots, processes = t->processes, stripes = t->stripes;
    const struct {
        const char *name;
        size_t bytes;
        void *where;
    } columns[] = {
        {"poisoned", 8, &t->poisoned},
        {"row_state", 8 * processes, &t->row_state},
        {"ctl", 8 * stripes, &t->ctl},
        {"hint", 8 * stripes, &t->hint},
        {"claims", 8 * stripes * processes, &t->claims},
        {"versioned_ref", 8 * slots, &t->versioned_ref},
        {"owner", 8 * slots, &t->owner},
        {"heir", 8 * slots, &t->heir},
        {"writer", 8 * slots, &t->writer},
        {"inode", 8 * slots, &t->inode},
        {"created_ns", 8 * slots, &t->created_ns},
        {"read_ns", 8 * slots, &t->read_ns},
        {"written_ns", 8 * slots, &t->written_ns},
        {"bytes_in", 8 * slots, &t->bytes_in},
        {"messages_in", 8 * slots, &t->messages_in},
        {"bytes_out", 8 * slots, &t->bytes_out},
        {"messages_out", 8 * slots, &t->messages_out},
        {"state", slots, &t->state},
        {"retired", slots, &t->retired},
        {"busy", slots, &t->busy},
        {"kind", slots, &t->kind},
        {"on_owner_death", slots, &t->on_owner_death},
        {"selector", slots, &t->selector},
        {"error_code", 4 * slots, &t->error_code},
        {"held", slots * processes, &t->held},
        {"error_text", ERROR_TEXT_BYTES * slots, &t->error_text},
        {"peer", PEER_BYTES * slots, &t->peer},
        {"user_data", 2 * USER_DATA_BYTES * slots, &t->user_data},
    };
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++)
        if (find_column(self, offsets, columns[i].name, columns[i].bytes, columns[i].where) < 0)
            return -1;
    return 0;
}

static int
Engine_init(Engine *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"mapping", "offsets", "slots", "processes",
                            "stripes", "index",   "epoch", NULL};
    TABLE;
    PyObject *mapping, *offsets;
    unsigned long long epoch;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO!IIIIK", names, &mapping, &PyDict_Type,
                                     &offsets, &t->slots, &t->processes, &t->stripes, &t->index,
                                     &epoch))
        return -1;
    if (self->mapping != NULL) {
        PyErr_SetString(PyExc_TypeError, "an engine is made once");
        return -1;
    }
    if (!t->stripes || t->slots % t->stripes || t->index >= t->processes) {
        PyErr_SetString(PyExc_ValueError, "no segment has these sizes");
        return -1;
    }
    t->block = t->slots / t->stripes;
    t->word = epoch << 16 | t->index;
    t->row_word = epoch << 8 | LIVE;
    if (map_again(self, mapping) < 0)
        return -1;
    if (find_columns(self, offsets) < 0)
        return -1;
    self->count = calloc(t->slots, sizeof *self->count);
    self->handles = calloc(t->stripes, sizeof *self->handles);
    self->descriptors = calloc(t->slots, sizeof *self->descriptors);
    self->marked = PySet_New(NULL);
    self->lock = (LocalLock *)PyObject_CallNoArgs(OBJECT(local_lock_type));
    if (self->count == NULL || self->handles == NULL || self->descriptors == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (self->marked == NULL || self->lock == NULL)
        return -1;
    self->next_stripe = 7 * (long long)t->index;
    /* All at once: after an unlink their names are gone, or are another runtime's. */
    for (uint32_t stripe = 0; stripe < t->stripes; stripe++) {
        sem_t *sem;
        if (open_semaphore(self, stripe, generation_of(t, stripe), &sem) == RAISED)
            return -1;
    }
    return 0;
}

static int
Engine_traverse(Engine *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(OBJECT(self)));
    Py_VISIT(self->marked);
    return 0;
}

static int
Engine_clear(Engine *self)
{
    Py_CLEAR(self->marked);
    self->closed = 1; /* what is still called from here on finds nothing to do */
    return 0;
}

static void
Engine_dealloc(Engine *self)
{
    PyTypeObject *type = Py_TYPE(OBJECT(self));
    PyObject_GC_UnTrack(self);
    Engine_clear(self);
    for (uint32_t stripe = 0; self->handles != NULL && stripe < self->table.stripes; stripe++)
        if (self->handles[stripe].generation)
            sem_close(self->handles[stripe].sem);
    free(self->handles);
    free(self->count);
    free(self->descriptors);
    free(self->pending);
    Py_XDECREF(OBJECT(self->lock));
    if (self->mapping != NULL)
        munmap(self->mapping, self->mapping_bytes);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *
Engine_get_word(Engine *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->table.word);
}

static PyObject *
Engine_get_row_word(Engine *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->table.row_word);
}

static PyObject *
Engine_get_index(Engine *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(self->table.index);
}

static PyObject *
Engine_get_flag(Engine *self, void *which)
{
    return PyBool_FromLong(which == NULL ? self->closed : self->foreign);
}

static int
Engine_set_flag(Engine *self, PyObject *value, void *which)
{
    int flag = value == NULL ? 0 : PyObject_IsTrue(value);
    if (flag >= 0)
        *(which == NULL ? &self->closed : &self->foreign) = flag;
    return flag < 0 ? -1 : 0;
}

static PyMethodDef Engine_methods[] = {
    {"address", (PyCFunction)(void (*)(void))Engine_address, METH_FASTCALL,
     "address(sid)\n--\n\nTurn an id into a usable socket, or None once it has failed.\n\n"
     "See Runtime.address; this is its C twin."},
    {"create", (PyCFunction)(void (*)(void))Engine_create, METH_VARARGS | METH_KEYWORDS, NULL},
    {"set_failed", (PyCFunction)Engine_set_failed, METH_VARARGS, NULL},
    {"release_additional_reference", (PyCFunction)Engine_release_additional_reference, METH_O,
     NULL},
    {"take_turn", (PyCFunction)Engine_take_turn, METH_O, NULL},
    {"give_turn", (PyCFunction)Engine_give_turn, METH_O, NULL},
    {"change_owner", (PyCFunction)Engine_change_owner, METH_VARARGS, NULL},
    {"offer", (PyCFunction)Engine_offer, METH_VARARGS, NULL},
    {"withdraw", (PyCFunction)Engine_withdraw, METH_VARARGS, NULL},
    {"inherit", (PyCFunction)Engine_inherit, METH_O, NULL},
    {"set_user_data", (PyCFunction)Engine_set_user_data, METH_VARARGS, NULL},
    {"set_descriptor", (PyCFunction)Engine_set_descriptor, METH_VARARGS, NULL},
    {"set_direct_limit", (PyCFunction)Engine_set_direct_limit, METH_O, NULL},
    {"set_queued", (PyCFunction)Engine_set_queued, METH_VARARGS, NULL},
    {"is_live", (PyCFunction)Engine_is_live, METH_O, NULL},
    {"count", (PyCFunction)Engine_count, METH_O, NULL},
    {"held_slots", (PyCFunction)Engine_held_slots, METH_NOARGS, NULL},
    {"detach_all", (PyCFunction)Engine_detach_all, METH_NOARGS, NULL},
    {"drain", (PyCFunction)Engine_drain, METH_NOARGS, NULL},
    {"own_up", (PyCFunction)Engine_own_up, METH_NOARGS, NULL},
    {"run", (PyCFunction)(void (*)(void))Engine_run, METH_VARARGS | METH_KEYWORDS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef Engine_properties[] = {
    {"word", (getter)Engine_get_word, NULL, NULL, NULL},
    {"row_word", (getter)Engine_get_row_word, NULL, NULL, NULL},
    {"index", (getter)Engine_get_index, NULL, NULL, NULL},
    {"closed", (getter)Engine_get_flag, (setter)Engine_set_flag, NULL, NULL},
    {"foreign", (getter)Engine_get_flag, (setter)Engine_set_flag, NULL, "foreign"},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef Engine_members[] = {
    {"lock", T_OBJECT_EX, offsetof(Engine, lock), READONLY, NULL},
    {"marked", T_OBJECT_EX, offsetof(Engine, marked), READONLY, NULL},
    {"_next_stripe", T_LONGLONG, offsetof(Engine, next_stripe), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Engine_slots[] = {
    {Py_tp_doc, "One process's hands on the slot table; see _engine_py.Engine, its twin."},
    {Py_tp_init, Engine_init},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_traverse, Engine_traverse},
    {Py_tp_clear, Engine_clear},
    {Py_tp_dealloc, Engine_dealloc},
    {Py_tp_methods, Engine_methods},
    {Py_tp_getset, Engine_properties},
    {Py_tp_members, Engine_members},
    {0, NULL},
};

static PyType_Spec Engine_spec = {
    "shmsock._engine.Engine", sizeof(Engine), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, Engine_slots,
};

/* -- the module --------------------------------------------------------------------------------- */

static const char *const point_names[] = {
    "none",
#define X(name) #name,
    KILL_POINTS(X)
#undef X
};

static PyObject *
kill_points(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    PyObject *names = PyList_New(0);
    for (int point = KP_none + 1; names != NULL && point < KP_count; point++) {
        PyObject *name = PyUnicode_FromString(point_names[point]);
        if (name == NULL || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *
arm(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *name;
    int number, times = 1;
    if (!PyArg_ParseTuple(args, "si|i", &name, &number, &times))
        return NULL;
    for (int point = 0; point < KP_count; point++)
        if (!strcmp(point_names[point], name)) {
            armed_signal = number;
            armed_times = times;
            armed_point = point;
            Py_RETURN_NONE;
        }
    PyErr_Format(PyExc_ValueError, "no kill point is named %s", name);
    return NULL;
}

static PyMethodDef module_methods[] = {
    {"kill_points", kill_points, METH_NOARGS, "The names of the places where a test may kill."},
    {"arm", arm, METH_VARARGS,
     "arm(name, signal, times=1): this process signals itself when it comes to that place, for the\n"
     "times-th time from now; then the place is like any other again."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "shmsock._engine", "The C engine; _engine_c has the rest of it.", -1,
    module_methods, NULL, NULL, NULL, NULL,
};

static PyTypeObject *
add_type(PyObject *made, PyType_Spec *spec, const char *name)
{
    PyObject *type = PyType_FromSpec(spec);
    if (type == NULL || PyModule_AddObjectRef(made, name, type) < 0) {
        Py_XDECREF(type);
        return NULL;
    }
    return (PyTypeObject *)type; /* kept for ever: the types are static in spirit */
}

PyMODINIT_FUNC
PyInit__engine(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made == NULL || (local_lock_type = add_type(made, &LocalLock_spec, "LocalLock")) == NULL ||
        (reference_type = add_type(made, &Reference_spec, "Reference")) == NULL ||
        (engine_type = add_type(made, &Engine_spec, "Engine")) == NULL) {
        Py_XDECREF(made);
        return NULL;
    }
    return made;
}
