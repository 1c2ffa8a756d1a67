/* Getting into a stripe: the look at who may, the semaphore, the nap, and running what is inside.
 *
 * take() in _stripes.h tries once. Here is what it does not know: that a process may have been
 * fenced, which handle is the present generation's, and how long to wait for whom. The GIL is kept
 * from DONE to give; it is let go in the nap, and while a semaphore is opened. So a nap ends in a
 * look at everything anew: another thread may have attached, detached or closed.
 *
 * CRASH: all kill points are in _stripes.h and _table.h; nothing here is shared. An exception
 * inside is possible only in Engine_run, whose body is Python: the claim becomes BROKEN, as if we
 * had died.
 */
#ifndef SHMSOCK_WAITING_H
#define SHMSOCK_WAITING_H

#include <Python.h>

#include <errno.h>

#include "_objects.h"
#include "_stripes.h"

#define LOOK_AFTER_NS 50000000ull /* contended for this long a stripe may be stuck */
#define PATIENCE_NS 10000000000ull
#define NAP_FIRST_NS 20000
#define NAP_LAST_NS 1000000
#define TIMED_OUT (-3)
#define RAISED (-4)

/* -- waiting ----------------------------------------------------------------------------------- */

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

/* -- running a transition ---------------------------------------------------------------------- */

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
    /* Before the local lock: a thread that the fork left behind may have it. */
    if (self->foreign && check_participation(self) < 0)
        return RAISED;
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

/* -- Python code inside, for recovery ---------------------------------------------------------- */

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
    if (self->foreign && check_participation(self) < 0)
        return NULL;
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

#endif
