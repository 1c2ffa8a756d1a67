/* Taking a stripe and giving it back (DESIGN 5); the twin of _stripes_py.py. Pure C.
 *
 *     take   g = generation(ctl[s])                 give   post the semaphore
 *            claims[p,s] = (g, WANT)                       claims[p,s] = 0
 *            trywait; contended: claims[p,s] = 0
 *            claims[p,s] = (g, OWN)
 *            generation(ctl[s]) == g, my row LIVE ? inside : claims[p,s] = 0
 *
 * Whoever calls this keeps the GIL from here to give: no bytecode, finaliser or exception comes
 * between, and no other process waits for a thread of ours that waits for the GIL.
 *
 * Why compiler fences suffice for WANT and OWN on every architecture: recovery issues
 * membarrier(GLOBAL_EXPEDITED) between storing the next generation and looking at claims, and every
 * participant is registered for it, so our fence is executed for us, then. A process that died has
 * drained its stores on the way into the kernel.
 */
#ifndef SHMSOCK_STRIPES_H
#define SHMSOCK_STRIPES_H

#include <semaphore.h>

#include "_table.h"

static inline _Atomic uint64_t *
claim_of(Table *t, uint32_t stripe)
{
    return &t->claims[(size_t)t->index * t->stripes + stripe];
}

static inline uint64_t
generation_of(const Table *t, uint32_t stripe)
{
    return GET(ctl, stripe) >> 2;
}

/* Take the stripe whose present semaphore is `sem`: DONE, CONTENDED, or FENCED. Never waits. */
static inline int
take(Table *t, uint32_t stripe, uint64_t generation, sem_t *sem)
{
    _Atomic uint64_t *claim = claim_of(t, stripe);
    KP(before_want);
    atomic_store_explicit(claim, generation << 2 | CLAIM_WANT, memory_order_relaxed);
    atomic_signal_fence(memory_order_seq_cst); /* ORDER: WANT before the token */
    KP(want_stored);
    if (sem_trywait(sem)) {
        atomic_store_explicit(claim, 0, memory_order_release);
        KP(withdrawn);
        return CONTENDED;
    }
    KP(token_taken);
    atomic_store_explicit(claim, generation << 2 | CLAIM_OWN, memory_order_relaxed);
    /* ORDER: OWN before the generation; partner: barrier() in Recovery.retire. */
    atomic_signal_fence(memory_order_seq_cst);
    KP(own_stored);
    /* ORDER: acquire; partner: the store of ctl that opened this generation: what the recount
     * before it stored is visible. What the last one inside stored came with its token. */
    if (atomic_load_explicit(&t->ctl[stripe], memory_order_acquire) >> 2 != generation) {
        /* Retired meanwhile: the token is worthless, never post it. */
        atomic_store_explicit(claim, 0, memory_order_release);
        KP(withdrawn);
        return CONTENDED;
    }
    if (atomic_load_explicit(&t->row_state[t->index], memory_order_relaxed) != t->row_word) {
        /* Fenced, with a good token: post it, or the stripe would be stuck with no claim. */
        sem_post(sem);
        atomic_store_explicit(claim, 0, memory_order_release);
        return FENCED;
    }
    KP(inside);
    return DONE;
}

/* ORDER: post, then clear. The other way round a kill between would leave a taken token that no
 * claim speaks of. */
static inline void
give(Table *t, uint32_t stripe, sem_t *sem)
{
    KP(before_post);
    sem_post(sem);
    KP(posted);
    atomic_store_explicit(claim_of(t, stripe), 0, memory_order_release);
    KP(given);
}

#endif
