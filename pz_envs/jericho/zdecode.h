/* Z-machine instructions, decoded once and linked to each other as they are met.
 *
 * Only what zloop.c executes itself is decoded in full; the rest keeps its offset and opcode. Code
 * lies above the dynamic memory and never changes, so what is decoded stays valid for a story.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t byte;
typedef uint16_t word;

enum { CONSTANT, LOCAL, GLOBAL, STACK };

typedef struct insn {
    const void *go;          /* where run() executes it */
    struct insn *next;       /* the instruction after it, once known */
    struct insn *jump;       /* where its branch goes, once known */
    uint32_t at;             /* offset of its first byte after the opcode */
    uint32_t after;          /* offset of the following instruction */
    uint32_t target;         /* offset its branch goes to; 0 or 1: returns that */
    word value[4];           /* of constant operands */
    int16_t offset[4];       /* bytes from the locals, the globals or the top of the stack */
    byte kind[4];
    int16_t store_offset;
    byte store_kind;
    byte sense;              /* the branch is taken when the condition is this */
    byte count;              /* of operands */
    byte op;
} insn;

enum { CHUNK = 1024, CHUNKS = 24, SLOTS = 1 << 15 };

struct decoded {
    insn *chunks[CHUNKS];
    unsigned used;
    insn *slots[SLOTS];
    insn foreign; /* the last instruction that could not be kept */
};

struct decoded *zloop_open(void) { return calloc(1, sizeof(struct decoded)); }

void zloop_close(struct decoded *d) {
    for (int i = 0; d && i < CHUNKS; i++) free(d->chunks[i]);
    free(d);
}

/* What follows an opcode's operands, by opcode as `form << 5 | number`. */
enum { TWO, ONE, ZERO, MANY };
enum { NOTHING, STORES, BRANCHES, BOTH, UNKNOWN };

static const byte tails[4][32] = {
    [TWO] = {UNKNOWN, BRANCHES, BRANCHES, BRANCHES, BRANCHES, BRANCHES, BRANCHES, BRANCHES,
             STORES, STORES, BRANCHES, UNKNOWN, UNKNOWN, NOTHING, UNKNOWN, STORES,
             STORES, STORES, STORES, UNKNOWN, STORES, STORES, STORES, UNKNOWN,
             UNKNOWN, STORES, NOTHING, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN},
    [ONE] = {BRANCHES, BOTH, BOTH, STORES, STORES, NOTHING, NOTHING, UNKNOWN,
             STORES, UNKNOWN, UNKNOWN, NOTHING, NOTHING, UNKNOWN, STORES, NOTHING},
    [ZERO] = {NOTHING, NOTHING, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN,
              NOTHING, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN},
    [MANY] = {STORES, NOTHING, NOTHING, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN,
              NOTHING, NOTHING, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN,
              UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN,
              UNKNOWN, NOTHING, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN}};

static void place(byte variable, byte *kind, int16_t *offset) {
    *kind = variable == 0 ? STACK : variable < 16 ? LOCAL : GLOBAL;
    *offset = (int16_t)(variable == 0 ? 0 : variable < 16 ? -2 * variable : 2 * (variable - 16));
}

/* Decode the instruction at `start` into `i`; its label is labels[form][number]. */
static void decode(const byte *m, uint32_t start, insn *i, const void *const labels[4][32],
                   const void *other, const void *stop) {
    const byte *pc = m + start;
    const byte op = *pc++;
    int form, number, tail, n = 0;
    memset(i, 0, sizeof *i);
    i->op = op;
    i->at = start + 1;
    i->go = op == 228 || op == 246 ? stop : other;
    if (op < 0x80) {
        form = TWO;
        number = op & 31;
    } else if (op < 0xb0) {
        form = ONE;
        number = op & 15;
    } else if (op < 0xc0) {
        form = ZERO;
        number = op & 15;
    } else {
        form = op < 0xe0 ? TWO : MANY;
        number = op & 31;
    }
    tail = tails[form][number];
    if (tail == UNKNOWN || i->go == stop) return;
    if (m[0] < 5 && ((form == TWO && number == 26) || (form == ONE && number == 15))) return;
    if (m[0] < 4 && ((form == TWO && number == 25) || (form == ONE && number == 8))) return;

    byte kinds[4] = {3, 3, 3, 3};
    if (op < 0x80) {
        kinds[0] = op & 0x40 ? 2 : 1;
        kinds[1] = op & 0x20 ? 2 : 1;
    } else if (op < 0xb0) {
        kinds[0] = op >> 4 & 3;
    } else if (op >= 0xc0) {
        for (int k = 0; k < 4; k++) kinds[k] = *pc >> (6 - 2 * k) & 3;
        pc++;
    }
    for (; n < 4 && kinds[n] != 3; n++) {
        if (kinds[n] == 2) {
            place(*pc++, &i->kind[n], &i->offset[n]);
        } else if (kinds[n] == 1) {
            i->value[n] = *pc++;
        } else {
            i->value[n] = (word)(pc[0] << 8 | pc[1]);
            pc += 2;
        }
    }
    i->count = (byte)n;
    /* The interpreter reads what a short list left from before; so let it. */
    if ((form == TWO && n < 2) || (form == MANY && n < (number == 1 || number == 2 ? 3 : 1))) return;
    if (form == MANY && (number == 8 || number == 9) && n != 1) return;
    if (tail == STORES || tail == BOTH) place(*pc++, &i->store_kind, &i->store_offset);
    if (tail == BRANCHES || tail == BOTH) {
        byte how = *pc++;
        word distance = how & 0x3f;
        if (!(how & 0x40)) {
            if (distance & 0x20) distance |= 0xc0;
            distance = (word)(distance << 8 | *pc++);
        }
        i->sense = how >> 7;
        i->target = distance <= 1 ? distance : (uint32_t)(pc - m + (int16_t)distance - 2);
    }
    i->after = (uint32_t)(pc - m);
    i->go = labels[form][number];
}

/* Return the decoded instruction at `offset`; one that cannot be kept is left to the interpreter. */
static insn *find(struct decoded *d, const byte *m, uint32_t dynamic, uint32_t offset,
                  const void *const labels[4][32], const void *other, const void *stop) {
    unsigned slot = (offset * 2654435761u) >> 17;
    for (; d->slots[slot]; slot = (slot + 1) % SLOTS)
        if (d->slots[slot]->at == offset + 1) return d->slots[slot];
    if (offset >= dynamic && d->used < CHUNK * CHUNKS) {
        insn **chunk = &d->chunks[d->used / CHUNK];
        if (!*chunk) *chunk = malloc(CHUNK * sizeof(insn));
        if (*chunk) {
            insn *i = d->slots[slot] = &(*chunk)[d->used++ % CHUNK];
            decode(m, offset, i, labels, other, stop);
            return i;
        }
    }
    decode(m, offset, &d->foreign, labels, other, stop);
    if (d->foreign.go != stop) d->foreign.go = other;
    return &d->foreign;
}
