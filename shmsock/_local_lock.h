/* The lock that Python code takes to keep this process's other threads out of the engine.
 *
 * C code needs none: the GIL is its lock (_engine.c). Python code that needs the same exclusion
 * over several bytecodes takes `engine.lock`; `held` is read and stored with the GIL, so asking
 * costs C code one load, and whoever finds it set waits at `raw` without the GIL.
 */
#ifndef SHMSOCK_LOCAL_LOCK_H
#define SHMSOCK_LOCAL_LOCK_H

#include <Python.h>

#define OBJECT(pointer) ((PyObject *)(pointer))

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

#endif
