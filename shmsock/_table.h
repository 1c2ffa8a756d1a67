/* The columns of one segment and the transitions of a slot. Pure C: no Python, no system calls.
 *
 * The twin of _table_py.py. What is true is stored once, by one absolute store: version, state,
 * retired, owner, writer, held. nref is derived: every transition ends in settle(), which stores
 * additional + count(held). Whoever finds a stripe half-changed stores the same formula again.
 *
 * Every function here that stores runs inside its slot's stripe (_stripes.h), so the stores of two
 * processes never race. What others read without the stripe is an _Atomic word, and its order is
 * said beside the store, with its partner:
 *
 *     versioned_ref   release in set_failed: error_code and error_text come before the odd version;
 *                     partner: SocketIO.error_of, which reads the version and then the error
 *     state           release for LIVE in create: everything about the socket comes before;
 *                     partner: Engine.status, Runtime.sockets
 *     selector        release in set_user_data: the buffer comes before the flip;
 *                     partner: SocketIO.user_data, which reads selector, buffer, selector
 */
#ifndef SHMSOCK_TABLE_H
#define SHMSOCK_TABLE_H

#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* As in layout.py. */
enum { FREE = 0, LIVE = 1, RECYCLING = 2 };
enum { CLAIM_WANT = 1, CLAIM_OWN = 2, CLAIM_BROKEN = 3 };
#define SLOT_MASK 0xFFFFFFFFull
#define VERSION_LIMIT (1ull << 31)
#define ERROR_TEXT_BYTES 96
#define PEER_BYTES 64
#define USER_DATA_BYTES 64

/* What a transition did, as bits; negative: it was not done. */
enum { NOTHING = 0, DONE = 1, RECYCLED = 2, DETACHED = 4, CONTENDED = -1, FENCED = -2 };

/* -- kill points: places where a test lets a process die, or stop ------------------------------ */

#define KILL_POINTS(X)                                                                             \
    X(before_want) X(want_stored) X(token_taken) X(own_stored) X(inside) X(before_post)            \
    X(posted) X(given) X(withdrawn)                                                                \
    X(create_meta) X(create_owner) X(create_vref) X(create_live)                                   \
    X(attach_held) X(detach_held) X(fail_error) X(fail_version) X(release_retired)                 \
    X(turn_taken) X(message_sent) X(message_counted) X(turn_given)                                 \
    X(owner_cleared) X(owner_changed) X(offered) X(offer_withdrawn) X(heir_cleared) X(inherited)   \
    X(data_filled) X(data_flipped) X(settled)                                                      \
    X(recycle_begun) X(recycle_odd) X(recycle_retired) X(recycle_version) X(recycle_cleared)       \
    X(recycle_free)

enum {
    KP_none,
#define X(name) KP_##name,
    KILL_POINTS(X)
#undef X
        KP_count
};

static int armed_point; /* in production always KP_none: one well-predicted compare */
static int armed_signal, armed_times;

static inline void
kill_point(int point)
{
    if (__builtin_expect(armed_point == point, 0) && !--armed_times) {
        armed_point = KP_none;
        kill(getpid(), armed_signal);
    }
}
#define KP(name) kill_point(KP_##name)

/* -- the columns ------------------------------------------------------------------------------- */

typedef struct {
    uint32_t slots, processes, stripes, block;
    uint32_t index;    /* our row */
    uint64_t word;     /* epoch << 16 | index: us in owner and writer */
    uint64_t row_word; /* epoch << 8 | LIVE: our row_state as long as nobody fenced us */
    _Atomic uint64_t *poisoned;
    _Atomic uint64_t *row_state, *ctl, *hint, *claims;
    _Atomic uint64_t *versioned_ref, *owner, *heir, *writer, *inode;
    _Atomic uint64_t *created_ns, *read_ns, *written_ns;
    _Atomic uint64_t *bytes_in, *messages_in, *bytes_out, *messages_out;
    _Atomic uint8_t *state, *retired, *busy, *kind, *on_owner_death, *selector;
    _Atomic int32_t *error_code;
    uint8_t *held; /* [slot][process], 0 or 1 */
    char *error_text, *peer, *user_data;
} Table;

#define GET(column, at) atomic_load_explicit(&t->column[at], memory_order_relaxed)
#define PUT(column, at, value) atomic_store_explicit(&t->column[at], (value), memory_order_relaxed)
#define PUT_LAST(column, at, value)                                                                \
    atomic_store_explicit(&t->column[at], (value), memory_order_release)

typedef struct {
    uint64_t owner, inode;
    uint8_t kind, on_owner_death;
    const char *peer, *user_data;
    size_t peer_bytes, user_data_bytes;
} NewSocket;

/* -- small things ------------------------------------------------------------------------------ */

static inline uint64_t
now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); /* vDSO: no system call */
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void
put_text(char *where, size_t room, const char *text, size_t length)
{
    if (length > room)
        length = room;
    memcpy(where, text, length);
    memset(where + length, 0, room - length);
}

static inline uint64_t
version_of(const Table *t, uint32_t slot)
{
    return GET(versioned_ref, slot) >> 32;
}

/* The even version that follows a failed one: 31 bits, never 0. */
static inline uint64_t
recycled_version(uint64_t version)
{
    uint64_t following = (version + 1) & (VERSION_LIMIT - 1);
    return following ? following : 2;
}

/* How many processes are attached. A byte is 0 or 1, so eight are summed by one multiplication. */
static inline uint32_t
attached(const Table *t, uint32_t slot)
{
    const uint8_t *row = t->held + (size_t)slot * t->processes;
    uint32_t n = t->processes, at = 0, sum = 0;
    for (; at + 8 <= n; at += 8) {
        uint64_t bytes;
        memcpy(&bytes, row + at, 8);
        sum += (uint32_t)(((bytes & 0x0101010101010101u) * 0x0101010101010101u) >> 56);
    }
    for (; at < n; at++)
        sum += row[at] & 1;
    return sum;
}

static inline int
is_live(const Table *t, uint32_t slot, uint64_t sid)
{
    return GET(state, slot) == LIVE && version_of(t, slot) == sid >> 32;
}

/* -- the transitions --------------------------------------------------------------------------- */

/* End a life. ORDER: RECYCLING first, FREE last; any prefix is finished by recount, which calls the
 * Python twin. A released socket goes through the odd version before `retired` is cleared, so that
 * "even and retired" means not begun and "even and not retired" means moved on. */
static inline void
recycle(Table *t, uint32_t slot)
{
    PUT(state, slot, RECYCLING);
    KP(recycle_begun);
    uint64_t version = version_of(t, slot);
    if (!(version & 1) && GET(retired, slot)) {
        version += 1;
        PUT_LAST(versioned_ref, slot, version << 32);
        KP(recycle_odd);
    }
    PUT_LAST(retired, slot, 0);
    KP(recycle_retired);
    if (version & 1)
        PUT_LAST(versioned_ref, slot, recycled_version(version) << 32);
    KP(recycle_version);
    PUT(owner, slot, 0);
    PUT(heir, slot, 0);
    PUT(writer, slot, 0);
    PUT(busy, slot, 0);
    PUT(inode, slot, 0);
    KP(recycle_cleared);
    PUT_LAST(state, slot, FREE);
    KP(recycle_free);
}

/* Store nref by the formula; recycle at 0.
 * INVARIANT: nref = additional + attached, additional = version even and not retired. */
static inline int
settle(Table *t, uint32_t slot)
{
    uint64_t version = version_of(t, slot);
    uint64_t additional = !(version & 1) && !GET(retired, slot);
    uint64_t nref = additional + attached(t, slot);
    PUT(versioned_ref, slot, version << 32 | nref);
    KP(settled);
    if (nref)
        return DONE;
    recycle(t, slot);
    return DONE | RECYCLED;
}

/* The first slot from `from` to before `to` whose state is FREE, or -1; eight states a look. */
static inline int64_t
first_free(const Table *t, uint32_t from, uint32_t to)
{
    for (uint32_t slot = from; slot < to;) {
        if (slot % 8 == 0 && slot + 8 <= to) {
            const _Atomic uint64_t *eight = (const _Atomic uint64_t *)(t->state + slot);
            uint64_t states = atomic_load_explicit(eight, memory_order_relaxed);
            if (!((states - 0x0101010101010101u) & ~states & 0x8080808080808080u)) {
                slot += 8; /* no byte of it is 0 */
                continue;
            }
        }
        if (GET(state, slot) == FREE)
            return slot;
        slot++;
    }
    return -1;
}

/* The first free slot of a stripe from its hint on, or -1; takes nothing: look again inside. */
static inline int64_t
find_free(const Table *t, uint32_t stripe)
{
    uint32_t begin = stripe * t->block;
    uint32_t hint = begin + (uint32_t)(GET(hint, stripe) % t->block);
    int64_t found = first_free(t, hint, begin + t->block);
    return found >= 0 ? found : first_free(t, begin, hint);
}

/* Put a socket into a free slot; its id, or 0. */
static inline uint64_t
create(Table *t, uint32_t stripe, const NewSocket *new)
{
    int64_t found = find_free(t, stripe);
    if (found < 0)
        return 0;
    uint32_t slot = (uint32_t)found;
    PUT(retired, slot, 0);
    PUT(busy, slot, 0);
    PUT(selector, slot, 0);
    PUT(error_code, slot, 0);
    PUT(writer, slot, 0);
    PUT(heir, slot, 0);
    PUT(kind, slot, new->kind);
    PUT(on_owner_death, slot, new->on_owner_death);
    PUT(inode, slot, new->inode);
    PUT(created_ns, slot, now_ns());
    PUT(read_ns, slot, 0);
    PUT(written_ns, slot, 0);
    PUT(bytes_in, slot, 0);
    PUT(messages_in, slot, 0);
    PUT(bytes_out, slot, 0);
    PUT(messages_out, slot, 0);
    put_text(t->error_text + (size_t)slot * ERROR_TEXT_BYTES, ERROR_TEXT_BYTES, "", 0);
    put_text(t->peer + (size_t)slot * PEER_BYTES, PEER_BYTES, new->peer, new->peer_bytes);
    put_text(t->user_data + (size_t)slot * 2 * USER_DATA_BYTES, USER_DATA_BYTES, new->user_data,
             new->user_data_bytes);
    KP(create_meta);
    PUT(owner, slot, new->owner);
    KP(create_owner);
    uint64_t version = version_of(t, slot);
    PUT(versioned_ref, slot, version << 32 | 1);
    KP(create_vref);
    PUT_LAST(state, slot, LIVE); /* ORDER: last; before it the slot is as free as it was */
    KP(create_live);
    PUT(hint, stripe, slot % t->block + 1);
    return version << 32 | slot;
}

static inline int
attach(Table *t, uint32_t slot, uint64_t sid, int failed_too)
{
    uint64_t seen = version_of(t, slot), version = sid >> 32;
    if (GET(state, slot) != LIVE)
        return NOTHING;
    if (seen != version && !(failed_too && seen == version + 1))
        return NOTHING;
    t->held[(size_t)slot * t->processes + t->index] = 1;
    KP(attach_held);
    return settle(t, slot);
}

static inline int
detach(Table *t, uint32_t slot)
{
    t->held[(size_t)slot * t->processes + t->index] = 0;
    KP(detach_held);
    return settle(t, slot) | DETACHED;
}

/* Fail a socket. ORDER: error before version: who sees the odd version finds the error. */
static inline int
set_failed(Table *t, uint32_t slot, uint64_t sid, int32_t code, const char *text, size_t length)
{
    if (!is_live(t, slot, sid))
        return NOTHING;
    PUT(error_code, slot, code);
    put_text(t->error_text + (size_t)slot * ERROR_TEXT_BYTES, ERROR_TEXT_BYTES, text, length);
    KP(fail_error);
    uint64_t nref = GET(versioned_ref, slot) & SLOT_MASK;
    PUT_LAST(versioned_ref, slot, ((sid >> 32) + 1) << 32 | nref);
    KP(fail_version);
    return settle(t, slot);
}

static inline int
release_additional_reference(Table *t, uint32_t slot, uint64_t sid)
{
    if (!is_live(t, slot, sid) || GET(retired, slot))
        return NOTHING;
    PUT(retired, slot, 1);
    KP(release_retired);
    return settle(t, slot);
}

static inline int
take_turn(Table *t, uint32_t slot, uint64_t sid)
{
    if (!is_live(t, slot, sid) || GET(writer, slot))
        return NOTHING;
    PUT(writer, slot, t->word);
    KP(turn_taken);
    return DONE;
}

static inline int
give_turn(Table *t, uint32_t slot, uint64_t sid)
{
    if (!is_live(t, slot, sid) || GET(writer, slot) != t->word)
        return NOTHING;
    PUT(writer, slot, 0);
    KP(turn_given);
    return DONE;
}

static inline int
change_owner(Table *t, uint32_t slot, uint64_t sid, uint64_t expected, uint64_t owner)
{
    if (!is_live(t, slot, sid) || GET(owner, slot) != expected || GET(busy, slot))
        return NOTHING;
    PUT(heir, slot, 0); /* whatever the old owner had offered */
    KP(owner_cleared);
    PUT(owner, slot, owner);
    KP(owner_changed);
    return DONE;
}

/* Offer an idle socket of ours: from here to withdraw or the heir's inherit nobody may read it. */
static inline int
offer(Table *t, uint32_t slot, uint64_t sid, uint64_t heir)
{
    if (!is_live(t, slot, sid) || GET(owner, slot) != t->word)
        return NOTHING;
    if (GET(busy, slot) || GET(retired, slot))
        return NOTHING;
    PUT(heir, slot, heir);
    KP(offered);
    return DONE;
}

static inline int
withdraw(Table *t, uint32_t slot, uint64_t sid, uint64_t heir)
{
    if (!is_live(t, slot, sid) || GET(owner, slot) != t->word || GET(heir, slot) != heir)
        return NOTHING;
    PUT(heir, slot, 0);
    KP(offer_withdrawn);
    return DONE;
}

/* Become the owner of what was offered to us. ORDER: the heir before the owner: killed in between,
 * nobody was offered anything; after both, the owner is dead and the socket an orphan. */
static inline int
inherit(Table *t, uint32_t slot, uint64_t sid)
{
    if (!is_live(t, slot, sid) || GET(heir, slot) != t->word || GET(busy, slot))
        return NOTHING;
    PUT(heir, slot, 0);
    KP(heir_cleared);
    PUT(owner, slot, t->word);
    KP(inherited);
    return DONE;
}

/* The low bit of the selector selects; the others count, so that a reader sees two changes. */
static inline int
set_user_data(Table *t, uint32_t slot, uint64_t sid, const char *data, size_t length)
{
    if (!is_live(t, slot, sid))
        return NOTHING;
    uint8_t following = (uint8_t)(GET(selector, slot) + 1);
    char *buffers = t->user_data + (size_t)slot * 2 * USER_DATA_BYTES;
    put_text(buffers + (following & 1) * USER_DATA_BYTES, USER_DATA_BYTES, data, length);
    KP(data_filled);
    PUT_LAST(selector, slot, following);
    KP(data_flipped);
    return DONE;
}

#endif
