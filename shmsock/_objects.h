/* What an engine and a reference are.
 *
 *     INVARIANT: count[slot] > 0  =>  held[slot, me] == 1, so the slot is not recycled and its
 *                version is v or v + 1. Reading it is all that a second reference costs.
 */
#ifndef SHMSOCK_OBJECTS_H
#define SHMSOCK_OBJECTS_H

#include <Python.h>

#include <semaphore.h>

#include "_local_lock.h"
#include "_table.h"

#define SPARE_REFERENCES 64

typedef struct {
    uint64_t generation; /* 0: not opened */
    sem_t *sem;
} Handle;

/* A small message that leaves at the end of this turn of the loop (_collecting.h). */
typedef struct {
    uint64_t sid;
    PyObject *reference; /* with a socket's first one: kept until they have all left */
    PyObject *message;   /* bytes; NULL: it has left */
    size_t next;         /* of the same socket, counted from 1; 0: none */
} Collected;

typedef struct {
    PyObject_HEAD
    Table table;
    /* A mapping of our own: the runtime may unmap its own under references that still look. */
    char *mapping;
    size_t mapping_bytes;
    Py_buffer view; /* where that cannot be had: its, kept from being unmapped; obj is NULL else */
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
        int kind;   /* of the descriptor: SOCK_STREAM, another, or 0: not asked yet */
        uint32_t collected, collected_bytes; /* how many messages leave at the end of the turn */
        size_t first, last;                  /* of them, in `collected`, counted from 1 */
    } *descriptors;
    /* What leaves at the end of the turn of the loop that `collector` is at; 0: no turn. */
    unsigned long collector;
    Collected *collected;
    size_t collected_length, collected_room, collected_left;
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

#endif
