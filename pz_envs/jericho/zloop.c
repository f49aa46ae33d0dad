/* A faster main loop for Jericho's interpreter, working on the interpreter's own variables.
 *
 * Jericho runs one opcode at a time through several calls each. This loop executes the opcodes that
 * make up a parser's work (arithmetic, branches, loads, the object tree, calls) in place and hands
 * every other one, and every case that the interpreter would report as an error, to the
 * interpreter's own run_opcode. Memory, stack and registers are the interpreter's, so the state
 * after a command is the one it would have reached; tests compare the two byte for byte.
 *
 * Opcodes follow the Z-Machine Standards Document 1.1. Versions 3, 4, 5 and 8.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "zdecode.h"

/* Filled in from Python; the order of fields is part of the contract with zloop.py. */
typedef struct {
    byte **memory;
    byte **pc;
    word **sp;
    word **fp;
    word *stack;
    byte *next_opcode;
    word *frame_count;
    int *halted;
    int *changes[4];
    char *world;
    void (*run_opcode)(byte);
    byte (*get_next_opcode)(void);
    void (*set_next_action)(const char *);
    void (*update_special_ram)(void);
    void (*update_ram_diff)(void);
    char *(*get_screen)(void);
    char *(*clean_observation)(char *);
    void (*clear_screen)(void);
    void (*set_random)(long, int, int);
    short (*get_score)(void);
    int (*get_moves)(void);
    int (*game_over)(void);
    int (*victory)(void);
    int (*world_changed)(void);
    void (*clean_world_objs)(void *);
    void (*get_special_ram)(byte *);
    /* The remembered state. */
    const byte *saved_memory;
    const byte *saved_stack;
    size_t memory_size;
    size_t stack_size;
    byte *saved_pc;
    word *saved_sp;
    word *saved_fp;
    long random_a;
    int random_interval;
    int random_counter;
    int score;
    int moves;
    struct decoded *decoded;
    byte *tree; /* room for the objects, then for the special memory, in whole words */
    size_t objects_size;
    size_t world_size;
    size_t object_count; /* objects that Jericho knows, and number 0 */
    size_t raw_start; /* where the object table is, when Jericho does not know the story */
    size_t raw_size;
    word saved_frame_count;
    byte saved_opcode;
} engine;

#define WORD(a) ((word)(m[(word)(a)] << 8 | m[(word)((a) + 1)]))
#define SET(a, v) (m[(word)(a)] = (byte)((v) >> 8), m[(word)((a) + 1)] = (byte)(v))
#define SWAP(w) ((word)((w) >> 8 | (w) << 8))
/* Operand k of the instruction; reading the stack takes from it. */
#define FETCH(x, k)                                              \
    do {                                                         \
        const unsigned kind_ = ip->kind[k];                      \
        const char *base_ = kind_ == STACK ? (char *)sp : base[kind_]; \
        word w_;                                                 \
        memcpy(&w_, base_ + ip->offset[k], 2);                   \
        w_ = kind_ == GLOBAL ? SWAP(w_) : w_;                    \
        x = kind_ == CONSTANT ? ip->value[k] : w_;               \
        sp += kind_ == STACK;                                    \
    } while (0)
#define STORE(v)                                                 \
    do {                                                         \
        const unsigned kind_ = ip->store_kind;                   \
        word w_ = (word)(v);                                     \
        w_ = kind_ == GLOBAL ? SWAP(w_) : w_;                    \
        sp -= kind_ == STACK;                                    \
        memcpy((kind_ == STACK ? (char *)sp : base[kind_]) + ip->store_offset, &w_, 2); \
    } while (0)
/* A variable named by an operand: the top of the stack is read and written in place. */
#define GLOBAL_AT(n) ((word)(globals + 2 * ((n) - 16)))
#define PEEK(n) ((n) < 16 ? *((n) ? fp - (n) : sp) : WORD(GLOBAL_AT(n)))
#define POKE(n, v)                                               \
    do {                                                         \
        word p_ = (word)(v);                                     \
        if ((n) < 16) *((n) ? fp - (n) : sp) = p_;               \
        else SET(GLOBAL_AT(n), p_);                              \
    } while (0)
#define GO(i)                                                    \
    do {                                                         \
        ip = (i);                                                \
        top = sp;                                                \
        goto *ip->go;                                            \
    } while (0)
#define FIND(where) find(d, m, dynamic, (where), labels, &&other, &&stop)
#define NEXT()                                                   \
    do {                                                         \
        if (!ip->next) goto link;                           \
        GO(ip->next);                                            \
    } while (0)
#define STORE_NEXT(v)                                            \
    do {                                                         \
        STORE(v);                                                \
        NEXT();                                                  \
    } while (0)
#define BRANCH_NEXT(condition)                                   \
    do {                                                         \
        insn *to_ = ip->sense == ((condition) != 0) ? ip->jump : ip->next; \
        if (to_) GO(to_);                                        \
        taken = ip->sense == ((condition) != 0);                 \
        goto branch;                                             \
    } while (0)

#define X2(l) &&l, &&l
#define X4(l) X2(l), X2(l)
#define X8(l) X4(l), X4(l)

static void run(engine *e) {
    static const void *const labels[4][32] = {
        {&&other, &&je, &&jl, &&jg, &&dec_chk, &&inc_chk, &&jin, &&test,
         &&or, &&and, &&test_attr, &&other, &&other, &&store, &&other, &&loadw,
         &&loadb, &&get_prop, &&get_prop_addr, &&other, &&add, &&sub, &&mul, &&other,
         &&other, &&call_s, &&call_n, X4(other), &&other},
        {&&jz, &&get_sibling, &&get_child, &&get_parent, &&get_prop_len, &&inc, &&dec, &&other,
         &&call_s, X2(other), &&ret, &&jump, &&other, &&load, &&call_n, X8(other), X8(other)},
        {&&rtrue, &&rfalse, X4(other), X2(other), &&ret_popped, X4(other), X2(other), &&other,
         X8(other), X8(other)},
        {&&call_s, &&storew, &&storeb, X4(other), &&other, &&push, &&pull, X4(other), X2(other),
         X8(other), &&other, &&call_n, X4(other), X2(other)}};
    byte *const m = *e->memory;
    word *const stack = e->stack;
    struct decoded *const d = e->decoded;
    const byte version = m[0];
    const word globals = (word)(m[0x0c] << 8 | m[0x0d]);
    const word objects = (word)(m[0x0a] << 8 | m[0x0b]);
    const word dynamic = (word)(m[0x0e] << 8 | m[0x0f]);
    const int old = version <= 3;
    const unsigned scale = old ? 1 : version <= 5 ? 2 : 3;
    const word highest = old ? 255 : 2000;
    const word entry = old ? 9 : 14;
    const word tree = (word)(objects + (old ? 62 - 9 : 126 - 14));
    const word link = old ? 4 : 6; /* parent, then sibling, then child */
    const word mask = old ? 0x1f : 0x3f;
    word *sp = *e->sp, *fp = *e->fp, *top = sp;
    char *base[3] = {(char *)stack, (char *)fp, (char *)m + globals};
    insn *ip = FIND((uint32_t)(*e->pc - m) - 1);
    word frames = *e->frame_count, a, b, c, result = 0, at;
    int taken, thrown;
    byte size;
    goto *ip->go;

    /* Two operands. */
je:
    FETCH(a, 0);
    FETCH(b, 1);
    result = a == b;
    for (int k = 2; k < ip->count; k++) {
        FETCH(b, k);
        result |= a == b;
    }
    BRANCH_NEXT(result);
jl:
    FETCH(a, 0);
    FETCH(b, 1);
    BRANCH_NEXT((int16_t)a < (int16_t)b);
jg:
    FETCH(a, 0);
    FETCH(b, 1);
    BRANCH_NEXT((int16_t)a > (int16_t)b);
dec_chk:
    FETCH(a, 0);
    FETCH(b, 1);
    result = (word)(PEEK(a) - 1);
    POKE(a, result);
    BRANCH_NEXT((int16_t)result < (int16_t)b);
inc_chk:
    FETCH(a, 0);
    FETCH(b, 1);
    result = (word)(PEEK(a) + 1);
    POKE(a, result);
    BRANCH_NEXT((int16_t)result > (int16_t)b);
jin:
    FETCH(a, 0);
    FETCH(b, 1);
    if (a == 0 || a > highest) goto other;
    at = (word)(tree + a * entry + link);
    result = old ? m[at] : WORD(at);
    BRANCH_NEXT(result == b);
test:
    FETCH(a, 0);
    FETCH(b, 1);
    BRANCH_NEXT((a & b) == b);
or:
    FETCH(a, 0);
    FETCH(b, 1);
    STORE_NEXT(a | b);
and:
    FETCH(a, 0);
    FETCH(b, 1);
    STORE_NEXT(a & b);
test_attr:
    FETCH(a, 0);
    FETCH(b, 1);
    if (a == 0 || a > highest || b > (old ? 31 : 47)) goto other;
    at = (word)(tree + a * entry + (b >> 3));
    BRANCH_NEXT(m[at] & (0x80 >> (b & 7)));
store:
    FETCH(a, 0);
    FETCH(b, 1);
    POKE(a, b);
    NEXT();
loadw:
    FETCH(a, 0);
    FETCH(b, 1);
    at = (word)(a + 2 * b);
    STORE_NEXT(WORD(at));
loadb:
    FETCH(a, 0);
    FETCH(b, 1);
    STORE_NEXT(m[(word)(a + b)]);
get_prop:
get_prop_addr:
    FETCH(a, 0);
    FETCH(b, 1);
    if (a == 0 || a > highest || b == 0) goto other;
    at = (word)(tree + a * entry + (old ? 7 : 12));
    at = WORD(at);
    at = (word)(at + 1 + 2 * m[at]);
    while (((size = m[at]) & mask) > b) {
        at++;
        if (old) at = (word)(at + (size >> 5) + 1);
        else if (!(size & 0x80)) at = (word)(at + (size >> 6) + 1);
        else at = (word)(at + 1 + ((m[at] & 0x3f) ? m[at] & 0x3f : 64));
    }
    if ((ip->op & 31) == 0x12) {
        if ((size & mask) != b) STORE_NEXT(0);
        STORE_NEXT(at + (!old && (size & 0x80) ? 2 : 1));
    }
    if ((size & mask) != b) {
        at = (word)(objects + 2 * (b - 1));
        STORE_NEXT(WORD(at));
    }
    at++;
    STORE_NEXT(size & (old ? 0xe0 : 0xc0) ? WORD(at) : m[at]);
add:
    FETCH(a, 0);
    FETCH(b, 1);
    STORE_NEXT(a + b);
sub:
    FETCH(a, 0);
    FETCH(b, 1);
    STORE_NEXT(a - b);
mul:
    FETCH(a, 0);
    FETCH(b, 1);
    STORE_NEXT((unsigned)a * b);

    /* One operand. */
jz:
    FETCH(a, 0);
    BRANCH_NEXT(a == 0);
get_sibling:
    FETCH(a, 0);
    if (a == 0 || a > highest) goto other;
    at = (word)(tree + a * entry + link + (old ? 1 : 2));
    result = old ? m[at] : WORD(at);
    STORE(result);
    BRANCH_NEXT(result);
get_child:
    FETCH(a, 0);
    if (a == 0 || a > highest) goto other;
    at = (word)(tree + a * entry + link + (old ? 2 : 4));
    result = old ? m[at] : WORD(at);
    STORE(result);
    BRANCH_NEXT(result);
get_parent:
    FETCH(a, 0);
    if (a == 0 || a > highest) goto other;
    at = (word)(tree + a * entry + link);
    result = old ? m[at] : WORD(at);
    STORE_NEXT(result);
get_prop_len:
    FETCH(a, 0);
    if (a == 0) goto other;
    size = m[(word)(a - 1)];
    if (old) STORE_NEXT((size >> 5) + 1);
    if (!(size & 0x80)) STORE_NEXT((size >> 6) + 1);
    STORE_NEXT((size & 0x3f) ? size & 0x3f : 64);
inc:
    FETCH(a, 0);
    POKE(a, PEEK(a) + 1);
    NEXT();
dec:
    FETCH(a, 0);
    POKE(a, PEEK(a) - 1);
    NEXT();
ret:
    FETCH(result, 0);
    goto leave;
jump:
    if (ip->jump) GO(ip->jump);
    {
        const int fixed = ip->kind[0] == CONSTANT;
        insn *from = ip, *to;
        FETCH(a, 0);
        to = FIND((uint32_t)((int32_t)ip->after + (int16_t)a - 2));
        if (fixed && to != &d->foreign) from->jump = to;
        GO(to);
    }
load:
    FETCH(a, 0);
    result = PEEK(a);
    STORE_NEXT(result);

    /* No operand. */
rtrue:
    result = 1;
    goto leave;
rfalse:
    result = 0;
    goto leave;
ret_popped:
    result = *sp++;
    goto leave;

    /* Any number of operands. */
storew: {
    unsigned where;
    FETCH(a, 0);
    FETCH(b, 1);
    FETCH(c, 2);
    where = (word)(a + 2 * b);
    if (where < 64 || where + 1 >= dynamic) goto other;
    SET(where, c);
    NEXT();
}
storeb: {
    unsigned where;
    FETCH(a, 0);
    FETCH(b, 1);
    FETCH(c, 2);
    where = (word)(a + b);
    if (where < 64 || where >= dynamic) goto other;
    m[where] = (byte)c;
    NEXT();
}
push:
    FETCH(a, 0);
    if (sp - stack < 2) goto other;
    *--sp = a;
    NEXT();
pull:
    FETCH(a, 0);
    result = *sp++;
    POKE(a, result);
    NEXT();

    /* Calls: the result is stored or thrown away. */
call_s:
    thrown = 0;
    goto enter;
call_n:
    thrown = 1;
enter: {
    word arguments[4] = {0, 0, 0, 0};
    uint32_t routine, from = ip->after - (thrown ? 0 : 1);
    byte locals;
    const int n = ip->count;
    insn *caller = ip;
    for (int k = 0; k < n; k++) FETCH(arguments[k], k);
    if (arguments[0] == 0) {
        if (thrown) NEXT();
        STORE_NEXT(0);
    }
    routine = (uint32_t)arguments[0] << scale;
    locals = m[routine++];
    if (locals > 15 || sp - stack < 32) goto other;
    *--sp = (word)(from >> 9);
    *--sp = (word)(from & 0x1ff);
    *--sp = (word)(fp - stack - 1);
    *--sp = (word)((n - 1) | thrown << 12 | locals << 8);
    fp = sp;
    base[LOCAL] = (char *)fp;
    frames++;
    for (int k = 1; k <= locals; k++) {
        word initial = 0;
        if (version <= 4) {
            initial = (word)(m[routine] << 8 | m[routine + 1]);
            routine += 2;
        }
        *--sp = k < n ? arguments[k] : initial;
    }
    if (!caller->jump) {
        insn *to = FIND(routine);
        if (caller->kind[0] == CONSTANT && to != &d->foreign) caller->jump = to;
        GO(to);
    }
    GO(caller->jump);
}
leave: {
    const word kind = *fp >> 12;
    uint32_t to;
    /* Other kinds belong to interrupts, which run in the interpreter's own loop. */
    if (kind > 1) goto other;
    sp = fp + 1;
    frames--;
    fp = stack + 1 + *sp++;
    base[LOCAL] = (char *)fp;
    to = *sp++;
    to |= (uint32_t)*sp++ << 9;
    if (kind == 0) {
        const byte variable = m[to++];
        if (variable == 0) *--sp = result;
        else POKE(variable, result);
    }
    GO(FIND(to));
}

link: {
    insn *to = FIND(ip->after);
    if (to != &d->foreign) ip->next = to;
    GO(to);
}
branch:
    if (!taken) goto link;
    if (ip->target <= 1) {
        result = (word)ip->target;
        goto leave;
    }
    {
        insn *to = FIND(ip->target);
        if (to != &d->foreign) ip->jump = to;
        GO(to);
    }

other:
    *e->pc = m + ip->at;
    *e->sp = top;
    *e->fp = fp;
    *e->frame_count = frames;
    e->run_opcode(ip->op);
    if (*e->halted > 0) {
        *e->next_opcode = e->get_next_opcode();
        return;
    }
    sp = *e->sp;
    fp = *e->fp;
    base[LOCAL] = (char *)fp;
    frames = *e->frame_count;
    GO(FIND((uint32_t)(*e->pc - m)));

stop:
    *e->pc = m + ip->at;
    *e->sp = sp;
    *e->fp = fp;
    *e->frame_count = frames;
    *e->next_opcode = ip->op;
}

/* Give a command (it ends in a newline) and return the reply, as Jericho's step does. */
const char *zloop_step(engine *e, const char *command) {
    char *text;
    for (int i = 0; i < 4; i++) *e->changes[i] = 0;
    e->update_special_ram();
    e->set_next_action(command);
    e->run_opcode(*e->next_opcode);
    *e->next_opcode = e->get_next_opcode();
    run(e);
    e->update_ram_diff();
    text = e->clean_observation(e->get_screen());
    strcpy(e->world, text);
    e->clear_screen();
    return e->world;
}

/* Return to the remembered state. */
void zloop_restore(engine *e) {
    memcpy(*e->memory, e->saved_memory, e->memory_size);
    memcpy(e->stack, e->saved_stack, e->stack_size);
    e->set_random(e->random_a, e->random_interval, e->random_counter);
    *e->pc = e->saved_pc;
    *e->sp = e->saved_sp;
    *e->fp = e->saved_fp;
    *e->next_opcode = e->saved_opcode;
    *e->frame_count = e->saved_frame_count;
}

/* Jericho's object, as its clean-up of noise expects it; names and properties never change. */
typedef struct {
    unsigned num;
    char name[64];
    int parent, sibling, child;
    byte attributes[4];
    byte properties[16];
} object;

/* Write the world into its buffer: the object tree without Jericho's noise, and special memory. */
void zloop_world(engine *e) {
    const byte *m = *e->memory;
    const int old = m[0] <= 3;
    const byte *at = m + (m[0x0a] << 8 | m[0x0b]) + (old ? 62 : 126);
    object *objects = (object *)e->tree;
    memset(e->tree, 0, e->world_size);
    if (e->raw_size) {
        memcpy(e->tree, m + e->raw_start, e->raw_size);
        return;
    }
    for (size_t i = 1; i < e->object_count; i++, at += old ? 9 : 14) {
        object *o = objects + i;
        o->num = (unsigned)i;
        memcpy(o->attributes, at, 4);
        if (old) {
            o->parent = at[4];
            o->sibling = at[5];
            o->child = at[6];
        } else {
            o->parent = at[6] << 8 | at[7];
            o->sibling = at[8] << 8 | at[9];
            o->child = at[10] << 8 | at[11];
        }
    }
    e->clean_world_objs(e->tree);
    e->get_special_ram(e->tree + e->objects_size);
}

/* Hash the world, the score and the ending into two words. */
void zloop_identity(engine *e, uint64_t identity[2]) {
    uint64_t one = 0x9e3779b97f4a7c15u, two = 0xc2b2ae3d27d4eb4fu, piece;
    zloop_world(e);
    for (size_t i = 0; i < e->world_size; i += 8) {
        memcpy(&piece, e->tree + i, 8);
        one = (one ^ piece) * 0xff51afd7ed558ccdu;
        one ^= one >> 32;
        two = (two + piece) * 0xc4ceb9fe1a85ec53u;
        two ^= two >> 29;
    }
    piece = (uint64_t)(uint16_t)e->get_score() << 1 | (e->game_over() > 0 || e->victory() > 0);
    identity[0] = (one ^ piece) * 0xff51afd7ed558ccdu;
    identity[1] = (two + piece) * 0xc4ceb9fe1a85ec53u;
}

enum { CHANGED = 1, REFUSED = 2 };

/* Try commands from the remembered state, each ending in a newline and a NUL, and return to it.
 *
 * For each, outcomes gets CHANGED when Jericho would call it valid (the world, the score or the
 * ending changed and nothing was taken on the way), REFUSED when it did nothing and took no turn,
 * or 0; replies gets a hash of the reply (FNV-1a), worlds the world's where it is CHANGED. Returns
 * how many were tried: fewer than count when one stopped the interpreter, which is then as that
 * command left it.
 */
int zloop_try(engine *e, const char *commands, int count, byte *outcomes, uint64_t *replies,
              uint64_t (*worlds)[2]) {
    for (int i = 0; i < count; i++, commands += strlen(commands) + 1) {
        uint64_t hash = 14695981039346656037u;
        const char *reply = zloop_step(e, commands);
        for (const char *c = reply; *c; c++) hash = (hash ^ (byte)*c) * 1099511628211u;
        if (*e->halted > 0) return i;
        replies[i] = hash;
        outcomes[i] = 0;
        if (e->get_score() != e->score || e->world_changed() || e->game_over() > 0 ||
            e->victory() > 0) {
            if (!strstr(reply, "(Taken)")) {
                outcomes[i] = CHANGED;
                zloop_identity(e, worlds[i]);
            }
        } else if (e->get_moves() == e->moves) {
            outcomes[i] = REFUSED;
        }
        zloop_restore(e);
    }
    return count;
}
