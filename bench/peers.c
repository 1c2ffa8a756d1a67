/* Peers in C, without Python: what the same work costs somebody who pays for nothing else.
 *
 * Compiled by bench/native.py when a bench needs it. Each returns nanoseconds for `count` rounds.
 */
#define _GNU_SOURCE
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

static uint64_t
now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A semaphore taken and given, with nobody else at it: the floor for whoever takes a stripe. */
uint64_t
semaphore_pairs(uint64_t count)
{
    sem_t semaphore;
    sem_init(&semaphore, 1, 1);
    uint64_t began = now_ns();
    for (uint64_t i = 0; i < count; i++) {
        sem_wait(&semaphore);
        sem_post(&semaphore);
    }
    uint64_t took = now_ns() - began;
    sem_destroy(&semaphore);
    return took;
}

/* A reference counted in a word that everybody shares, as brpc's Socket does: one more, one less. */
uint64_t
shared_counts(_Atomic uint64_t *word, uint64_t count)
{
    uint64_t began = now_ns();
    for (uint64_t i = 0; i < count; i++) {
        atomic_fetch_add(word, 1);
        atomic_fetch_sub(word, 1);
    }
    return now_ns() - began;
}
