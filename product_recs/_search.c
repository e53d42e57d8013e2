/* The exact search of nbs/00_search.ipynb, which explains it and has the same in NumPy. Plain C, loaded with ctypes, no Python.h.
 *
 * Items are looked at in groups of GROUP, against TILE users at a time. A cheap upper bound of each score is held against the n-th best
 * exact score that the user has so far; only what may be better is scored exactly, in float32, and kept in a heap of n. With AVX-512
 * VNNI the bound comes from 8-bit codes, elsewhere from the float32 product itself. The file includes itself, once for each
 * instruction set. Threads are the caller's: each calls the same function, and takes blocks of users from the counter `next`. */
#ifndef VARIANT

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define X86 1
#endif

#ifdef _WIN32
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

/* What core.compiled asks before it uses this library. KERNELS_ABI changes with every change of a structure or of a
 * signature below, here and in core; SOURCE_DIGEST is that of this file, given by setup.py. */
#define KERNELS_ABI 1
#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST 0
#endif
API int32_t kernels_abi(void) { return KERNELS_ABI; }
API uint64_t kernels_source(void) { return SOURCE_DIGEST; }

#define INLINE static inline __attribute__((always_inline))
#define LANES 16  /* items of a panel */
#define PANELS 3  /* panels of a group */
#define TILE 8    /* users of a tile */


struct search {
    const float *items; int64_t f;             /* (.., f) rows as the caller numbers them */
    const int32_t *order; int64_t panels;      /* (panels*16,) item of each place, -1 beyond the end; panels is a multiple of 3 */
    const int32_t *place; int64_t n_items;     /* (n_items,) place of each item, -1: not searched */
    const uint8_t *codes;                      /* (panels, quads, 16, 4) 8-bit items plus 128, or null */
    const float *reach;                        /* (panels,) length of the longest item from this panel on */
    const float *inverse, *error, *norm;       /* (panels,) inverse of the codes' step; largest length of what they leave out, of what they say */
    const float *users; int64_t m;             /* (m, f) */
    const int64_t *indptr; const int32_t *excluded; /* by user, or null */
    const uint16_t *closed;                    /* (panels,) a bit for each place that nobody gets, or null */
    int64_t n; int32_t *found; float *scores;  /* (m, n) */
    int64_t block;                             /* users that a thread takes at once, a multiple of TILE */
    int64_t *next;
};

static void *aligned(int64_t bytes) { /* 64-byte aligned; the caller frees the pointer before it */
    char *raw = malloc((size_t)bytes + 128);
    if (!raw) return 0;
    char *at = (char *)(((uintptr_t)raw + 128) & ~(uintptr_t)63);
    ((void **)at)[-1] = raw;
    return at;
}
static void release(void *at) { if (at) free(((void **)at)[-1]); }

/* A score and its item as one number: the larger, the better, and of equal scores the lower item. */
typedef uint64_t kept;

INLINE kept keep(float score, int32_t item) {
    uint32_t bits;
    score += 0.0f; /* -0 is 0 */
    memcpy(&bits, &score, 4);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~item;
}
INLINE float score_of(kept one) {
    uint32_t bits = (uint32_t)(one >> 32);
    float score;
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    memcpy(&score, &bits, 4);
    return score;
}

static void sift(kept *heap, int64_t n, int64_t at) { /* the worst is at the root */
    kept moved = heap[at];
    for (int64_t child; (child = 2*at + 1) < n; at = child) {
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (heap[child] >= moved) break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

static void write_sorted(kept *heap, int64_t n, int64_t size, int32_t *found, float *scores) {
    for (int64_t i = size; i < n; i++) { found[i] = -1; scores[i] = -INFINITY; }
    if (size < n) for (int64_t i = size/2 - 1; i >= 0; i--) sift(heap, size, i); /* it was not full, so no heap yet */
    while (size) { /* the worst goes last */
        found[size - 1] = ~(int32_t)(uint32_t)heap[0]; scores[size - 1] = score_of(heap[0]);
        heap[0] = heap[--size];
        sift(heap, size, 0);
    }
}

#if X86
#define VARIANT 3
#define NAME(x) x##_vnni
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")))
#include "_search.c"
#undef VARIANT
#undef NAME
#undef TARGET
#define VARIANT 2
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#include "_search.c"
#undef VARIANT
#undef NAME
#undef TARGET
#define VARIANT 1
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "_search.c"
#undef VARIANT
#undef NAME
#undef TARGET
#endif
#define VARIANT 0
#define NAME(x) x##_plain
#define TARGET
#include "_search.c"

/* the best instruction set of this machine that is allowed: 0 plain, 1 AVX2, 2 AVX-512, 3 with VNNI */
API int search_variant(int at_most) {
#if X86
    __builtin_cpu_init();
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (at_most >= 3 && avx512 && __builtin_cpu_supports("avx512vnni")) return 3;
    if (at_most >= 2 && avx512) return 2;
    if (at_most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* 0: done; 1: no memory. `codes` are used by variant 3 only, and needed there */
API int search_top(const struct search *s, int variant) {
#if X86
    switch (search_variant(variant)) { case 3: return top_vnni(s); case 2: return top_avx512(s); case 1: return top_avx2(s); }
#endif
    return top_plain(s);
}

#else /* ---------------------------------------------------------------- once for each instruction set */

#if VARIANT >= 2
#define W 16 /* floats of a register */
#elif VARIANT == 1
#define W 8
#else
#define W 4
#endif
typedef float NAME(vec) __attribute__((vector_size(W*4)));
#define vec NAME(vec)

/* what a thread knows of the users of its block */
struct NAME(state) {
    kept *heaps;        /* (block, n) */
    int64_t *sizes;            /* (block,) of the heaps */
    uint16_t *blocked;         /* (block, panels) a bit for each place that the user must not get; null: there is none */
    float *limit, *length;     /* (block,) n-th best score so far; length of the user's vector */
    float *packed, *turned;    /* (f, 48) items of the group in hand; (block/8, f, 8) users; not for VNNI */
    int8_t *codes;             /* (block, quads, 4) users, for VNNI like the rest */
    float *inverse, *left;     /* (block,) inverse of the step of the codes; length of what they leave out */
    int32_t *offset;           /* (block,) 128 times the sum of the codes */
    int64_t *going;            /* (block/8,) first users of the tiles that are not done */
};

INLINE TARGET vec NAME(load)(const float *x) { vec v; memcpy(&v, x, sizeof v); return v; }

/* the order of the sum is the same for all instruction sets */
INLINE TARGET float NAME(dot)(const float *x, const float *y, int64_t f) {
    enum { K = 2*LANES/W };
    vec part[K] = {0};
    union { vec v[LANES/W]; float l[LANES]; } all;
    int64_t j = 0;
    for (; j + 2*LANES <= f; j += 2*LANES) for (int k = 0; k < K; k++) part[k] += NAME(load)(x + j + k*W)*NAME(load)(y + j + k*W);
    for (; j + LANES <= f; j += LANES) for (int k = 0; k < K/2; k++) part[k] += NAME(load)(x + j + k*W)*NAME(load)(y + j + k*W);
    for (int k = 0; k < K/2; k++) all.v[k] = part[k] + part[k + K/2];
    for (int step = LANES/2; step; step /= 2) for (int i = 0; i < step; i++) all.l[i] += all.l[i + step];
    float sum = all.l[0];
    for (; j < f; j++) sum += x[j]*y[j];
    return sum;
}

/* score the places of a panel exactly that the bound let through */
static TARGET __attribute__((noinline)) void NAME(look)(const struct search *s, struct NAME(state) *t, int64_t first, int64_t u, int64_t panel, unsigned mask) {
    if (t->blocked) mask &= ~(unsigned)t->blocked[u*s->panels + panel];
    kept *heap = t->heaps + u*s->n;
    const float *x = s->users + (first + u)*s->f;
    for (; mask; mask &= mask - 1) {
        int32_t item = s->order[panel*LANES + __builtin_ctz(mask)];
        if (item < 0) continue;
        kept new = keep(NAME(dot)(x, s->items + (int64_t)item*s->f, s->f), item);
        if (t->sizes[u] < s->n) {
            heap[t->sizes[u]++] = new;
            if (t->sizes[u] < s->n) continue;
            for (int64_t i = s->n/2 - 1; i >= 0; i--) sift(heap, s->n, i);
        } else if (new > heap[0]) {
            heap[0] = new;
            sift(heap, s->n, 0);
        } else continue;
        t->limit[u] = score_of(heap[0]);
    }
}

#if VARIANT == 3
#define ALONE 0 /* so few users are better served item by item, as turning the items would cost more than it saves */

INLINE TARGET void NAME(prepare)(const struct search *s, struct NAME(state) *t, int64_t u, const float *x) {
    const int64_t quads = (s->f + 3)/4;
    float most = 0, left = 0;
    int32_t sum = 0;
    int8_t *code = t->codes + u*quads*4;
    for (int64_t j = 0; j < s->f; j++) most = fabsf(x[j]) > most ? fabsf(x[j]) : most;
    float step = most > 1e-30f ? most/127 : 1, inverse = 1/step;
    for (int64_t j = 0; j < s->f; j++) {
        int c = (int)rintf(x[j]*inverse);
        c = c > 127 ? 127 : c < -127 ? -127 : c;
        float rest = x[j] - (float)c*step;
        code[j] = (int8_t)c; sum += c; left += rest*rest;
    }
    t->inverse[u] = inverse; t->left[u] = sqrtf(left)*1.0001f; t->offset[u] = 128*sum;
}

/* for 8 users: the least sum of codes with which a place of the panel may still come among their best */
INLINE TARGET __m256i NAME(least)(const struct search *s, const struct NAME(state) *t, int64_t u, int64_t panel) {
    __m256 limit = _mm256_loadu_ps(t->limit + u), norm = _mm256_set1_ps(s->norm[panel]);
    limit = _mm256_fnmadd_ps(_mm256_loadu_ps(t->length + u), _mm256_set1_ps(s->error[panel]), limit);
    limit = _mm256_fnmadd_ps(_mm256_loadu_ps(t->left + u), norm, limit);
    limit = _mm256_mul_ps(limit, _mm256_mul_ps(_mm256_loadu_ps(t->inverse + u), _mm256_set1_ps(s->inverse[panel])));
    __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), limit);
    limit = _mm256_sub_ps(limit, _mm256_fmadd_ps(size, _mm256_set1_ps(1e-6f), _mm256_set1_ps(2))); /* the rounding of these lines */
    limit = _mm256_max_ps(_mm256_min_ps(limit, _mm256_set1_ps(1e9f)), _mm256_set1_ps(-1e9f));
    return _mm256_add_epi32(_mm256_cvtps_epi32(limit), _mm256_loadu_si256((const __m256i *)(t->offset + u)));
}

INLINE TARGET void NAME(tile)(const struct search *s, struct NAME(state) *t, int64_t first, int64_t u, const int U, int64_t panel) {
    const int64_t quads = (s->f + 3)/4;
    const uint8_t *y = s->codes + panel*quads*64;
    const int8_t *x = t->codes + u*quads*4;
    __m512i sum[TILE][PANELS];
    for (int a = 0; a < U; a++) for (int b = 0; b < PANELS; b++) sum[a][b] = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; q++) {
        __m512i items[PANELS];
        for (int b = 0; b < PANELS; b++) items[b] = _mm512_loadu_si512(y + (b*quads + q)*64);
        for (int a = 0; a < U; a++) {
            int32_t four;
            memcpy(&four, x + (a*quads + q)*4, 4);
            __m512i user = _mm512_set1_epi32(four);
            for (int b = 0; b < PANELS; b++) sum[a][b] = _mm512_dpbusd_epi32(sum[a][b], items[b], user);
        }
    }
    int32_t least[PANELS][TILE];
    for (int b = 0; b < PANELS; b++) _mm256_storeu_si256((__m256i *)least[b], NAME(least)(s, t, u, panel + b));
    unsigned masks[TILE][PANELS], any = 0;
    for (int a = 0; a < U; a++)
        for (int b = 0; b < PANELS; b++) any |= masks[a][b] = _mm512_cmpge_epi32_mask(sum[a][b], _mm512_set1_epi32(least[b][a]));
    if (any)
        for (int a = 0; a < U; a++) for (int b = 0; b < PANELS; b++) if (masks[a][b]) NAME(look)(s, t, first, u + a, panel + b, masks[a][b]);
}

INLINE TARGET void NAME(turn)(const struct search *s, struct NAME(state) *t, int64_t panel) { (void)s; (void)t; (void)panel; }

#else
#define ALONE 4

#if VARIANT == 2
#define ROWS 8 /* users whose sums fit into the registers */
INLINE TARGET unsigned NAME(mask)(vec sum, float limit) { return _mm512_cmp_ps_mask((__m512)sum, _mm512_set1_ps(limit), _CMP_GE_OQ); }
#elif VARIANT == 1
#define ROWS 4
INLINE TARGET unsigned NAME(mask)(vec sum, float limit) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps((__m256)sum, _mm256_set1_ps(limit), _CMP_GE_OQ)); }
#else
#define ROWS 4
INLINE TARGET unsigned NAME(mask)(vec sum, float limit) {
#ifdef X86
    return (unsigned)_mm_movemask_ps(_mm_cmpge_ps((__m128)sum, _mm_set1_ps(limit)));
#else
    unsigned mask = 0;
    for (int l = 0; l < W; l++) mask |= (unsigned)(sum[l] >= limit) << l;
    return mask;
#endif
}
#endif

INLINE TARGET void NAME(prepare)(const struct search *s, struct NAME(state) *t, int64_t u, const float *x) {
    float *to = t->turned + u/TILE*s->f*TILE + u%TILE;
    for (int64_t j = 0; j < s->f; j++) to[j*TILE] = x[j];
}

/* the items of a group, one number of all of them after the other */
INLINE TARGET void NAME(turn)(const struct search *s, struct NAME(state) *t, int64_t panel) {
    for (int i = 0; i < PANELS*LANES; i++) {
        int32_t item = s->order[panel*LANES + i];
        const float *y = s->items + (int64_t)(item < 0 ? 0 : item)*s->f;
        for (int64_t j = 0; j < s->f; j++) t->packed[j*PANELS*LANES + i] = y[j];
    }
}

INLINE TARGET void NAME(tile)(const struct search *s, struct NAME(state) *t, int64_t first, int64_t u, const int U, int64_t panel) {
    const float *x = t->turned + u*s->f;
    const float rounding = 2.4e-7f*(float)(s->f + 8);
    for (int a = 0; a < U; a += ROWS)
        for (int b = 0; b < PANELS*LANES; b += 3*W) {
            vec sum[ROWS][3];
            for (int i = 0; i < ROWS; i++) for (int k = 0; k < 3; k++) sum[i][k] = (vec){0};
            const float *y = t->packed + b;
            for (int64_t j = 0; j < s->f; j++) {
                vec items[3];
                for (int k = 0; k < 3; k++) items[k] = *(const vec *)(y + j*PANELS*LANES + k*W);
                for (int i = 0; i < ROWS; i++) for (int k = 0; k < 3; k++) sum[i][k] += items[k]*x[j*TILE + a + i];
            }
            for (int i = 0; i < ROWS && a + i < U; i++)
                for (int k = 0; k < 3; k++) {
                    int at = b + k*W;
                    unsigned mask = NAME(mask)(sum[i][k], t->limit[u + a + i] - t->length[u + a + i]*rounding*s->reach[panel + at/LANES]);
                    if (mask) NAME(look)(s, t, first, u + a + i, panel + at/LANES, mask << at%LANES);
                }
        }
}
#undef ROWS
#endif

/* can an item from this panel on come among the best of one of the users of a tile? */
INLINE TARGET int NAME(goes_on)(const struct search *s, const struct NAME(state) *t, int64_t u, int64_t panel) {
    const float reach = s->reach[panel]*(1 + 2.4e-7f*(float)(s->f + 8));
    int going = 0;
    for (int i = 0; i < TILE; i++) going |= t->length[u + i]*reach >= t->limit[u + i];
    return going;
}

/* somebody whose vector is zero: all scores are equal, so the first items that are allowed */
static TARGET void NAME(nothing)(const struct search *s, struct NAME(state) *t, int64_t first, int64_t u) {
    const int64_t from = s->excluded ? s->indptr[first + u] : 0, to = s->excluded ? s->indptr[first + u + 1] : 0;
    for (int64_t item = 0; item < s->n_items && t->sizes[u] < s->n; item++) {
        const int32_t at = s->place[item];
        int allowed = at >= 0 && !(s->closed && s->closed[at/LANES] >> at%LANES & 1);
        for (int64_t i = from; allowed && i < to; i++) allowed = s->excluded[i] != item;
        if (allowed) t->heaps[u*s->n + t->sizes[u]++] = keep(0, (int32_t)item);
    }
    for (int64_t i = t->sizes[u]/2 - 1; i >= 0; i--) sift(t->heaps + u*s->n, t->sizes[u], i);
    t->limit[u] = INFINITY;
}

/* the best of a block of users */
INLINE TARGET void NAME(users)(const struct search *s, struct NAME(state) *t, int64_t first, int64_t count) {
    for (int64_t u = count; u%TILE; u++) { t->limit[u] = INFINITY; t->length[u] = 0; t->inverse[u] = 1; } /* nobody: no item is good enough */
    for (int64_t u = 0; u < count; u++) {
        const float *x = s->users + (first + u)*s->f;
        NAME(prepare)(s, t, u, x);
        t->length[u] = sqrtf(NAME(dot)(x, x, s->f))*1.0001f;
        t->limit[u] = -INFINITY;
        t->sizes[u] = 0;
        if (t->length[u] == 0) { NAME(nothing)(s, t, first, u); continue; }
        if (!t->blocked) continue;
        uint16_t *blocked = t->blocked + u*s->panels;
        if (s->closed) memcpy(blocked, s->closed, s->panels*sizeof *blocked);
        else memset(blocked, 0, s->panels*sizeof *blocked);
        if (!s->excluded) continue;
        for (int64_t i = s->indptr[first + u]; i < s->indptr[first + u + 1]; i++) {
            int64_t item = s->excluded[i];
            int32_t at = item >= 0 && item < s->n_items ? s->place[item] : -1;
            if (at >= 0) blocked[at/LANES] |= (uint16_t)(1 << at%LANES);
        }
    }
    int64_t tiles = (count + TILE - 1)/TILE;
    for (int64_t i = 0; i < tiles; i++) t->going[i] = i*TILE;
    for (int64_t panel = 0; panel < s->panels; panel += PANELS) {
        int64_t left = 0;
        for (int64_t i = 0; i < tiles; i++) if (NAME(goes_on)(s, t, t->going[i], panel)) t->going[left++] = t->going[i];
        if (!(tiles = left)) break;
        if (count <= ALONE) {
            for (int64_t u = 0; u < count; u++) if (t->limit[u] < INFINITY) for (int b = 0; b < PANELS; b++) NAME(look)(s, t, first, u, panel + b, 0xffff);
            continue;
        }
        NAME(turn)(s, t, panel);
        if (count == 1) NAME(tile)(s, t, first, 0, 1, panel);
        else for (int64_t i = 0; i < tiles; i++) NAME(tile)(s, t, first, t->going[i], TILE, panel);
    }
    for (int64_t u = 0; u < count; u++) write_sorted(t->heaps + u*s->n, s->n, t->sizes[u], s->found + (first + u)*s->n, s->scores + (first + u)*s->n);
}

static TARGET int NAME(top)(const struct search *s) {
    const int64_t block = s->block, quads = (s->f + 3)/4;
    struct NAME(state) t = {0};
    t.heaps = aligned(block*s->n*sizeof *t.heaps);
    t.sizes = aligned(block*sizeof *t.sizes);
    t.going = aligned(block/TILE*sizeof *t.going);
    t.limit = aligned(5*block*sizeof(float));
    if (s->excluded || s->closed) t.blocked = aligned(block*s->panels*sizeof *t.blocked);
#if VARIANT == 3
    t.codes = aligned(block*quads*4);
    int missing = !t.codes;
#else
    (void)quads;
    t.packed = aligned(s->f*PANELS*LANES*sizeof(float));
    t.turned = aligned(block*s->f*sizeof(float));
    int missing = !t.packed || !t.turned;
#endif
    missing |= !t.heaps || !t.sizes || !t.going || !t.limit || ((s->excluded || s->closed) && !t.blocked);
    if (!missing) {
        memset(t.limit, 0, 5*block*sizeof(float));
        if (t.codes) memset(t.codes, 0, block*quads*4);
        if (t.turned) memset(t.turned, 0, block*s->f*sizeof(float));
        t.length = t.limit + block; t.inverse = t.limit + 2*block; t.left = t.limit + 3*block; t.offset = (int32_t *)(t.limit + 4*block);
        for (int64_t first; (first = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)*block) < s->m && first >= 0;)
            NAME(users)(s, &t, first, s->m - first < block ? s->m - first : block);
    }
    release(t.heaps); release(t.sizes); release(t.going); release(t.limit); release(t.blocked); release(t.codes); release(t.packed); release(t.turned);
    return missing;
}
#undef ALONE
#undef vec
#undef W
#endif
