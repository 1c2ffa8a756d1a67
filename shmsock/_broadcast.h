/* One message to many sockets: address, write and release of each, without Python in between.
 *
 * A convenience: whoever is not served here at once is named, and served by Python's own three
 * calls, with all that may be said of an error. So nothing is waited for here but a stripe's nap.
 */
#ifndef SHMSOCK_BROADCAST_H
#define SHMSOCK_BROADCAST_H

#include <Python.h>

#include "_writing.h"

/* Write to one of them: 1 it took it, 0 it is for Python to try, -1 an exception. */
static int
write_to(Engine *self, PyObject *sid, PyObject *message)
{
    PyObject *made = address(self, sid, 0);
    if (made == NULL)
        return -1;
    if (made == Py_None) {
        Py_DECREF(made);
        return 0;
    }
    Reference *reference = (Reference *)made;
    uint32_t slot = (uint32_t)(reference->sid & SLOT_MASK);
    int taken = 0;
    /* What waits in a queue, or has no descriptor here yet, goes the long way. */
    if (self->descriptors[slot].sid == reference->sid && !self->descriptors[slot].queued) {
        PyObject *nothing = Reference_write(reference, &message, 1);
        taken = nothing == NULL ? -1 : 1;
        Py_XDECREF(nothing);
    }
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *nothing = Reference_close(reference, NULL);
    if (type != NULL) {
        if (nothing == NULL)
            PyErr_Clear();
        PyErr_Restore(type, value, traceback);
    }
    else if (nothing == NULL)
        taken = -1;
    Py_XDECREF(nothing);
    Py_DECREF(made);
    return taken;
}

/* write_to_all(sids, message, refusals): the positions of the ids that did not take it. An exception
 * of a class in `refusals` makes one of those; any other is raised, and the rest not written to. */
static PyObject *
Engine_write_to_all(Engine *self, PyObject *args)
{
    PyObject *sids, *message, *refusals;
    if (!PyArg_ParseTuple(args, "O!SO!", &PyList_Type, &sids, &message, &PyTuple_Type, &refusals))
        return NULL;
    PyObject *left = PyList_New(0);
    for (Py_ssize_t at = 0; left != NULL && at < PyList_Size(sids); at++) {
        PyObject *sid = PyList_GetItem(sids, at);
        Py_INCREF(sid);
        int taken = write_to(self, sid, message);
        Py_DECREF(sid);
        if (taken < 0 && !PyErr_ExceptionMatches(refusals))
            Py_CLEAR(left);
        else if (taken <= 0) {
            PyErr_Clear();
            PyObject *place = PyLong_FromSsize_t(at);
            if (place == NULL || PyList_Append(left, place) < 0)
                Py_CLEAR(left);
            Py_XDECREF(place);
        }
    }
    return left;
}

#endif
