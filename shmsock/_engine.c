/* The C engine: counted references and the way into the stripes, for CPython (limited API).
 *
 * The twin of _engine_py.py, over the same segment and protocol: processes of both kinds may share
 * a segment. Pure C: _table.h has the transitions of a slot, _stripes.h the lock. What is Python's:
 *
 *     _local_lock.h      excludes this process's threads from the engine, for Python code
 *     _objects.h         what an engine and a reference are
 *     _waiting.h         getting into a stripe, and waiting for it
 *     _references.h      counting: address, dereference, finalisers
 *     _transitions.h     the transitions as methods
 *     _accepting.h       accept and create in one call
 *     _reading.h         what the owner does for every event
 *     _writing.h         the write that nothing stands in the way of
 *     _collecting.h      what is written in one turn of the loop, until its end
 *     _broadcast.h       one message to many
 *     _reference_type.h  the reference type
 *     here               the engine's life, and the module
 *
 * _engine_c.py adds what is rare: words for errors, logging, callbacks.
 *
 * The GIL is the local lock. A C function that keeps it runs alone in its process: from the look at
 * the count to give nothing comes between, neither a thread nor a finaliser nor an exception. Only
 * three things let it go: the nap of who waits, a Python body inside `run`, and callbacks, which
 * come after give. Python code that needs the same exclusion over several bytecodes takes
 * `engine.lock`; then everybody here waits for it, without the GIL.
 */
#define _GNU_SOURCE
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "_accepting.h"
#include "_broadcast.h"
#include "_local_lock.h"
#include "_objects.h"
#include "_reading.h"
#include "_reference_type.h"
#include "_references.h"
#include "_stripes.h"
#include "_table.h"
#include "_transitions.h"
#include "_waiting.h"
#include "_writing.h"

/* -- the engine: its life ---------------------------------------------------------------------- */

/* Map the same pages once more, without a descriptor: mremap(2) with an old size of 0.
 *
 * Where that is refused (valgrind knows no such call) we hold the runtime's own mapping. On Python
 * before 3.13 that keeps a descriptor open as long as any reference lives. */
static int
map_again(Engine *self, PyObject *mapping)
{
    if (PyObject_GetBuffer(mapping, &self->view, PyBUF_WRITABLE) < 0)
        return -1;
    self->mapping_bytes = (size_t)self->view.len;
    void *again = mremap(self->view.buf, 0, self->mapping_bytes, MREMAP_MAYMOVE);
    self->mapping = again == MAP_FAILED ? self->view.buf : again;
    if (again != MAP_FAILED)
        PyBuffer_Release(&self->view); /* its obj is NULL from here on */
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
    free(self->collected);
    free(self->pending);
    Py_XDECREF(OBJECT(self->lock));
    if (self->view.obj != NULL)
        PyBuffer_Release(&self->view);
    else if (self->mapping != NULL)
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
    {"accept", (PyCFunction)Engine_accept, METH_VARARGS, NULL},
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
    {"write_to_all", (PyCFunction)Engine_write_to_all, METH_VARARGS, NULL},
    {"begin_turn", (PyCFunction)Engine_begin_turn, METH_NOARGS, NULL},
    {"end_turn", (PyCFunction)Engine_end_turn, METH_NOARGS, NULL},
    {"send_collected", (PyCFunction)Engine_send_collected, METH_O, NULL},
    {"send_all_collected", (PyCFunction)Engine_send_all_collected, METH_NOARGS, NULL},
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

/* -- the module -------------------------------------------------------------------------------- */

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
     "arm(name, signal, times=1): this process signals itself when it comes to that place, for\n"
     "the times-th time from now; then the place is like any other again."},
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
