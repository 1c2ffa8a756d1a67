/* Threads in place of processes, over _stripes.h and _table.h as they are: for ThreadSanitizer.
 *
 * Each thread has a process row of its own, as a process has; what they share is the table and the
 * semaphores. Nobody dies here (the other tests do that); this shows that no two accesses race but
 * through atomics, and that the books balance after.
 *
 * Prints "ok" and the number of transitions; anything else is a failure.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../shmsock/_stripes.h"

enum { SLOTS = 32, PROCESSES = 6, STRIPES = 2, ROUNDS = 20000 };

static Table shared;
static sem_t semaphores[STRIPES];
static uint64_t transitions[PROCESSES];

static void *
column(size_t bytes)
{
    void *made = NULL;
    if (posix_memalign(&made, 64, bytes))
        abort();
    return memset(made, 0, bytes);
}

static void
enter(Table *t, uint32_t stripe)
{
    while (take(t, stripe, generation_of(t, stripe), &semaphores[stripe]) != DONE)
        sched_yield();
}

static void *
churn(void *argument)
{
    Table mine = shared, *t = &mine;
    uint32_t me = (uint32_t)(uintptr_t)argument, random = me * 2654435761u + 1;
    mine.index = me;
    mine.word = 1 << 16 | me;
    mine.row_word = 1 << 8 | LIVE;
    uint8_t held[SLOTS] = {0};
    for (int round = 0; round < ROUNDS; round++) {
        random = random * 1664525 + 1013904223;
        uint32_t slot = random >> 8 & (SLOTS - 1), stripe = slot / t->block;
        uint64_t sid = version_of(t, slot) << 32 | slot;
        NewSocket new = {.owner = mine.word, .peer = "peer", .peer_bytes = 4, .user_data = ""};
        enter(t, stripe);
        int result = NOTHING;
        switch (random >> 24 & 7) {
        case 0:
            result = create(t, stripe, &new) != 0;
            break;
        case 1:
            result = set_failed(t, slot, sid, 5, "failed", 6);
            break;
        case 2:
            result = release_additional_reference(t, slot, sid);
            break;
        case 3:
            result = take_turn(t, slot, sid) ? give_turn(t, slot, sid) : NOTHING;
            break;
        case 4:
            result = set_user_data(t, slot, sid, "data", 4);
            break;
        default:
            if (held[slot]) {
                result = detach(t, slot);
                held[slot] = 0;
            }
            else if (attach(t, slot, sid, 0))
                result = held[slot] = 1;
        }
        give(t, stripe, &semaphores[stripe]);
        transitions[me] += result != NOTHING;
    }
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        if (held[slot]) {
            enter(t, slot / t->block);
            detach(t, slot);
            give(t, slot / t->block, &semaphores[slot / t->block]);
        }
    return NULL;
}

int
main(void)
{
    Table *t = &shared;
    *t = (Table){.slots = SLOTS, .processes = PROCESSES, .stripes = STRIPES};
    t->block = SLOTS / STRIPES;
#define COLUMN(name, count) t->name = column((count) * sizeof *t->name)
    COLUMN(poisoned, 1), COLUMN(row_state, PROCESSES), COLUMN(ctl, STRIPES);
    COLUMN(hint, STRIPES), COLUMN(claims, PROCESSES * STRIPES), COLUMN(versioned_ref, SLOTS);
    COLUMN(owner, SLOTS), COLUMN(heir, SLOTS), COLUMN(writer, SLOTS);
    COLUMN(inode, SLOTS), COLUMN(created_ns, SLOTS);
    COLUMN(read_ns, SLOTS), COLUMN(written_ns, SLOTS), COLUMN(bytes_in, SLOTS);
    COLUMN(messages_in, SLOTS), COLUMN(bytes_out, SLOTS), COLUMN(messages_out, SLOTS);
    COLUMN(state, SLOTS), COLUMN(retired, SLOTS), COLUMN(busy, SLOTS), COLUMN(kind, SLOTS);
    COLUMN(on_owner_death, SLOTS), COLUMN(selector, SLOTS), COLUMN(error_code, SLOTS);
    COLUMN(held, SLOTS * PROCESSES), COLUMN(error_text, SLOTS * ERROR_TEXT_BYTES);
    COLUMN(peer, SLOTS * PEER_BYTES), COLUMN(user_data, SLOTS * 2 * USER_DATA_BYTES);
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        PUT(versioned_ref, slot, 2ull << 32);
    for (uint32_t stripe = 0; stripe < STRIPES; stripe++) {
        PUT(ctl, stripe, 1 << 2);
        sem_init(&semaphores[stripe], 0, 1);
    }
    pthread_t threads[PROCESSES];
    for (uint32_t index = 0; index < PROCESSES; index++) {
        PUT(row_state, index, 1 << 8 | LIVE);
        pthread_create(&threads[index], NULL, churn, (void *)(uintptr_t)index);
    }
    uint64_t sum = 0;
    for (uint32_t index = 0; index < PROCESSES; index++) {
        pthread_join(threads[index], NULL);
        sum += transitions[index];
    }
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        uint64_t vref = GET(versioned_ref, slot);
        int live = GET(state, slot) == LIVE;
        if (attached(t, slot) || (vref & SLOT_MASK) != (uint64_t)live || vref >> 32 & 1) {
            printf("slot %u: vref %llx, state %d\n", slot, (unsigned long long)vref, live);
            return 1;
        }
    }
    printf("ok %llu\n", (unsigned long long)sum);
    return 0;
}
