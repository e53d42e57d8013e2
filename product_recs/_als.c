/* The row solves of nbs/03_solver.ipynb, which explains them and has the same in NumPy. Plain C, loaded with ctypes, no Python.h.
 *
 * The file includes itself, once for each instruction set; `als_half` and `als_loss` choose at run time. Vectors of 16 floats
 * (GCC and Clang lower them to what the target has) need factor matrices that are 64-byte aligned with a multiple of 16 columns.
 * Threads are the caller's: each calls the same function, and takes chunks of rows from the shared counter `next`. */
#ifndef VARIANT

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

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
#define SHORT 32  /* longest row that is solved exactly */
#define BLOCK 64  /* rows of a block of gathered vectors */
#define AHEAD 12  /* gathered vectors that are asked for early */
#define KEEP (8 << 20) /* bytes of gathered vectors that a thread keeps between the steps of a row */
#define CHUNK 64  /* rows that a thread takes at once */
#define LOST 1e-4f /* of what a float32 number was made of; what is left after such a subtraction has no digits */
#define HEAVY 1e5f /* unobserved weights; beside a heavier cell the residual in float32 does not see the others */
#define LARGE 1e4f /* confidences above are scaled, so that squares of sums of them do not overflow */

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef float v4 __attribute__((vector_size(16)));

struct half {
    const int64_t *indptr; const int32_t *indices; const float *confidence; /* the matrix by rows */
    const int32_t *order; int64_t rows, single;   /* rows to solve; the first `single` are chunks of their own */
    int64_t f; const float *fixed; float *solved; /* (.., f) the other side and this one, in the eigenbasis */
    const float *gram, *regularization;           /* (f,) unobserved weight times eigenvalues; (n,) by row */
    float alpha, unobserved;
    int32_t steps, shortest;                      /* of conjugate gradients; rows up to `shortest` are solved exactly */
    double *loss;                                 /* (n,) for als_loss */
    int64_t *next;
    uint8_t *hard;                                /* (n,) set to 1 where float32 is not enough for a row */
};

static void *aligned(size_t bytes) { /* 64-byte aligned; the caller frees the pointer before it */
    char *raw = malloc(bytes + 128);
    if (!raw) return 0;
    char *at = (char *)(((uintptr_t)raw + 128) & ~(uintptr_t)63);
    ((void **)at)[-1] = raw;
    return at;
}
static void release(void *at) { if (at) free(((void **)at)[-1]); }

static int64_t take(const struct half *h, int64_t *stop) { /* the next chunk of `order`; -1: none is left */
    int64_t at = __atomic_fetch_add(h->next, 1, __ATOMIC_RELAXED);
    int64_t start = at < h->single ? at : h->single + (at - h->single)*CHUNK;
    if (at < 0 || start >= h->rows) return -1;
    *stop = at < h->single ? at + 1 : start + CHUNK < h->rows ? start + CHUNK : h->rows;
    return start;
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VARIANT 2
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#include "_als.c"
#undef VARIANT
#undef NAME
#undef TARGET
#define VARIANT 1
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "_als.c"
#undef VARIANT
#undef NAME
#undef TARGET
#endif
#define VARIANT 0
#define NAME(x) x##_plain
#define TARGET
#include "_als.c"

static int best(int at_most) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (at_most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) return 2;
    if (at_most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* 0: done; 1: no memory. `variant` is the best instruction set allowed: 0 plain, 1 AVX2, 2 AVX-512 */
API int als_half(const struct half *h, int variant) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    switch (best(variant)) { case 2: return half_avx512(h); case 1: return half_avx2(h); }
#endif
    return half_plain(h);
}
API int als_loss(const struct half *h, int variant) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    switch (best(variant)) { case 2: return loss_avx512(h); case 1: return loss_avx2(h); }
#endif
    return loss_plain(h);
}
API int als_variant(int at_most) { return best(at_most); }

#else /* ---------------------------------------------------------------- once for each instruction set */

/* sums of the 16 numbers of each of four vectors */
INLINE TARGET v4 NAME(sum4)(v16 a, v16 b, v16 c, v16 d) {
    union { v16 v; v4 q[4]; } ua = {a}, ub = {b}, uc = {c}, ud = {d};
    v4 a4 = (ua.q[0] + ua.q[1]) + (ua.q[2] + ua.q[3]), b4 = (ub.q[0] + ub.q[1]) + (ub.q[2] + ub.q[3]);
    v4 c4 = (uc.q[0] + uc.q[1]) + (uc.q[2] + uc.q[3]), d4 = (ud.q[0] + ud.q[1]) + (ud.q[2] + ud.q[3]);
#if defined(__clang__) || __GNUC__ >= 12
    v4 ab = __builtin_shufflevector(a4, b4, 0, 4, 1, 5) + __builtin_shufflevector(a4, b4, 2, 6, 3, 7);
    v4 cd = __builtin_shufflevector(c4, d4, 0, 4, 1, 5) + __builtin_shufflevector(c4, d4, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#else
    return (v4){(a4[0] + a4[2]) + (a4[1] + a4[3]), (b4[0] + b4[2]) + (b4[1] + b4[3]), (c4[0] + c4[2]) + (c4[1] + c4[3]), (d4[0] + d4[2]) + (d4[1] + d4[3])};
#endif
}
INLINE TARGET float NAME(sum)(v16 a) { v16 zero = {0}; return NAME(sum4)(a, zero, zero, zero)[0]; }

INLINE TARGET void NAME(ask)(const struct half *h, const int F, int64_t at) {
    const char *y = (const char *)(h->fixed + (int64_t)h->indices[at]*h->f);
    for (int j = 0; j < F; j++) __builtin_prefetch(y + 64*j);
}

/* out += sum over the row's vectors y of (e c + g (c - unobserved) (y . x)) y; the vectors are gathered into `kept`;
 * e and g bring the scale of the row with them */
INLINE TARGET void NAME(pass)(const struct half *h, const int F, int64_t s, int64_t m, float e, float g, const v16 *x, v16 *out, v16 *kept, int gather) {
    const int keep = m*h->f*4 <= KEEP;
    for (int64_t b = 0; b < m; b += BLOCK) {
        int n = m - b < BLOCK ? (int)(m - b) : BLOCK, n4 = (n + 3) & ~3;
        v16 *q = kept + (keep ? b*F : 0);
        float first[BLOCK] __attribute__((aligned(16))), second[BLOCK] __attribute__((aligned(16)));
        for (int i = 0; i < n; i++) {
            float c = h->alpha*h->confidence[s + b + i];
            first[i] = e*c; second[i] = g*(c - h->unobserved);
        }
        for (int i = n; i < n4; i++) first[i] = second[i] = 0;
        if (gather || !keep) {
            for (int i = 0; i < n; i++) {
                if (b + i + AHEAD < m) NAME(ask)(h, F, s + b + i + AHEAD);
                const v16 *y = (const v16 *)(h->fixed + (int64_t)h->indices[s + b + i]*h->f);
                for (int j = 0; j < F; j++) q[i*F + j] = y[j];
            }
            for (int i = n*F; i < n4*F; i++) q[i] = (v16){0};
        }
        for (int i = 0; i < n4; i += 4) {
            const v16 *q0 = q + i*F, *q1 = q0 + F, *q2 = q1 + F, *q3 = q2 + F;
            v16 d0 = {0}, d1 = {0}, d2 = {0}, d3 = {0};
            for (int j = 0; j < F; j++) { v16 t = x[j]; d0 += q0[j]*t; d1 += q1[j]*t; d2 += q2[j]*t; d3 += q3[j]*t; }
            v4 t = *(v4 *)(first + i) + *(v4 *)(second + i)*NAME(sum4)(d0, d1, d2, d3);
            float t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3];
            for (int j = 0; j < F; j++) out[j] += (q0[j]*t0 + q1[j]*t1) + (q2[j]*t2 + q3[j]*t3);
        }
    }
}

/* the largest confidence of a row */
INLINE TARGET float NAME(heaviest)(const struct half *h, int64_t s, int64_t m) {
    float most = 0;
    for (int64_t i = s; i < s + m; i++) most = h->confidence[i] > most ? h->confidence[i] : most;
    return h->alpha*most;
}

/* a few steps of conjugate gradients from where the row is, preconditioned by the diagonal that all rows share;
 * 1/a lies between the extreme eigenvalues, so that steps of very different lengths tell that the row is ill conditioned */
INLINE TARGET int NAME(conjugate)(const struct half *h, const int F, int64_t row, int64_t s, int64_t m, v16 *work, v16 *kept) {
    v16 *x = (v16 *)(h->solved + row*h->f), *base = work, *r = work + F, *p = work + 2*F, *ap = work + 3*F, *z = work + 4*F;
    const v16 *gram = (const v16 *)h->gram;
    const float most = NAME(heaviest)(h, s, m), scale = most > LARGE ? ldexpf(1, -ilogbf(most)) : 1; /* the solution stays the same */
    if (h->shortest == SHORT && most > HEAVY*h->unobserved) return 1; /* the solution itself is wanted */
    v16 total = {0}, zero = {0};
    for (int j = 0; j < F; j++) {
        base[j] = scale*(gram[j] + h->regularization[row]);
        if (scale < 1) for (int k = 0; k < 16; k++) base[j][k] = base[j][k] > 1e-35f ? base[j][k] : 1e-35f;
        r[j] = -base[j]*x[j];
    }
    NAME(pass)(h, F, s, m, scale, -scale, x, r, kept, 1);
    for (int j = 0; j < F; j++) { p[j] = r[j]/base[j]; total += r[j]*p[j]; }
    float rz = NAME(sum)(total), least = 1e-14f*rz, longest = 0, shortest = INFINITY;
    if (!(rz < INFINITY)) return 1;
    for (int step = 0; step < h->steps && rz > least && rz > 1e-30f; step++) {
        for (int j = 0; j < F; j++) ap[j] = base[j]*p[j];
        NAME(pass)(h, F, s, m, 0, scale, p, ap, kept, 0);
        total = zero;
        for (int j = 0; j < F; j++) total += p[j]*ap[j];
        float pap = NAME(sum)(total), a = rz/pap;
        if (!(pap > 0 && a > 0 && a < INFINITY)) return 1;
        longest = a > longest ? a : longest; shortest = a < shortest ? a : shortest;
        total = zero;
        for (int j = 0; j < F; j++) { x[j] += a*p[j]; r[j] -= a*ap[j]; z[j] = r[j]/base[j]; total += r[j]*z[j]; }
        float next = NAME(sum)(total), beta = next/rz;
        for (int j = 0; j < F; j++) p[j] = z[j] + beta*p[j];
        rz = next;
    }
    return !(rz < INFINITY) || shortest < LOST*longest;
}

/* the exact solution through the m x m system (Woodbury), by Gauss-Jordan; it needs no pivots (symmetric quasi-definite) */
INLINE TARGET int NAME(exact)(const struct half *h, const int F, int64_t row, int64_t s, int m, const v16 *scale, v16 *kept) {
    const int m4 = (m + 3) & ~3, M = m > 16 ? 2 : 1;
    v16 K[SHORT*2], g[2], *x = (v16 *)(h->solved + row*h->f), zero = {0};
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float *G = (float *)g, size[SHORT], norm[SHORT];
    g[0] = g[1] = zero;
    for (int i = 0; i < m*M; i++) K[i] = zero;
    for (int i = 0; i < m; i++) {
        const v16 *y = (const v16 *)(h->fixed + (int64_t)h->indices[s + i]*h->f);
        for (int j = 0; j < F; j++) kept[i*F + j] = y[j]*scale[j];
    }
    for (int i = m*F; i < m4*F; i++) kept[i] = zero;
    for (int i = 0; i < m; i++) {
        const v16 *a = kept + i*F;
        for (int k = i & ~3; k < m; k += 4) {
            const v16 *q0 = kept + k*F, *q1 = q0 + F, *q2 = q1 + F, *q3 = q2 + F;
            v16 d0 = zero, d1 = zero, d2 = zero, d3 = zero;
            for (int j = 0; j < F; j++) { v16 t = a[j]; d0 += q0[j]*t; d1 += q1[j]*t; d2 += q2[j]*t; d3 += q3[j]*t; }
            *(v4 *)((float *)(K + i*M) + k) = NAME(sum4)(d0, d1, d2, d3);
        }
        float c = h->alpha*h->confidence[s + i], d = c - h->unobserved;
        if (fabsf(d) < 1e-6f) d = d < 0 ? -1e-6f : 1e-6f;
        norm[i] = sqrtf(((float *)(K + i*M))[i]);
        size[i] = fabsf(1/d) + ((float *)(K + i*M))[i];
        ((float *)(K + i*M))[i] += 1/d;
        G[i] = c/d;
    }
    for (int k = 0; k < m; k++) {
        v16 *at = K + k*M; /* what lies left of the diagonal was never made: it would be zero by now */
        at[0] = (v16)((i16)at[0] & (lane >= k));
        if (M > 1) at[1] = (v16)((i16)at[1] & (lane + 16 >= k));
        if (!(fabsf(((float *)at)[k]) > LOST*size[k] && size[k] < INFINITY)) return 1;
        const float inverse = 1/((float *)at)[k], gk = G[k];
        for (int i = 0; i < m; i++) {
            if (i == k) continue;
            float t = (i < k ? ((float *)(K + i*M))[k] : ((float *)at)[i])*inverse;
            G[i] -= t*gk;
            if (k < 16) K[i*M] -= t*at[0];
            if (M > 1) K[i*M + 1] -= t*at[1];
        }
    }
    float mass = 0;
    v16 length = zero;
    for (int j = 0; j < F; j++) x[j] = zero;
    for (int i = 0; i < m; i++) {
        float t = G[i]/((float *)(K + i*M))[i];
        mass += fabsf(t)*norm[i]; /* what x would be if nothing cancelled */
        for (int j = 0; j < F; j++) x[j] += kept[i*F + j]*t;
    }
    for (int j = 0; j < F; j++) { length += x[j]*x[j]; x[j] *= scale[j]; }
    return !(sqrtf(NAME(sum)(length)) > LOST*mass) && mass > 0;
}

INLINE TARGET void NAME(rows)(const struct half *h, const int F, v16 *work, v16 *kept) {
    float known = -1;
    v16 *scale = work + 5*F;
    for (int64_t start, stop; (start = take(h, &stop)) >= 0;) {
        for (int64_t k = start; k < stop; k++) {
            int64_t row = h->order[k], s = h->indptr[row], m = h->indptr[row + 1] - s;
            if (k + 1 < stop) { /* the vectors of the next row are on their way while this one is solved */
                int64_t from = h->indptr[h->order[k + 1]], to = h->indptr[h->order[k + 1] + 1];
                for (int64_t i = from; i < to && i < from + AHEAD; i++) NAME(ask)(h, F, i);
            }
            if (!m) memset(h->solved + row*h->f, 0, h->f*sizeof(float));
            else if (m > h->shortest) h->hard[row] = NAME(conjugate)(h, F, row, s, m, work, kept);
            else {
                if (h->regularization[row] != known) {
                    known = h->regularization[row];
                    for (int j = 0; j < (int)h->f; j++) ((float *)scale)[j] = 1/sqrtf(h->gram[j] + known);
                }
                h->hard[row] = NAME(exact)(h, F, row, s, (int)m, scale, kept);
            }
        }
    }
}

static TARGET int NAME(half)(const struct half *h) {
    int64_t longest = SHORT + 3, most = KEEP/4/h->f;
    for (int64_t k = 0; k < h->rows; k++) {
        int64_t m = h->indptr[h->order[k] + 1] - h->indptr[h->order[k]];
        if (m <= most && m > longest) longest = m;
    }
    if (longest < BLOCK) longest = BLOCK;
    v16 *work = aligned((size_t)h->f*4*6), *kept = aligned((size_t)(longest + 4)*h->f*4);
    int missing = !work || !kept;
    if (!missing) switch (h->f/16) { /* a number that is known here is unrolled there */
        case 1: NAME(rows)(h, 1, work, kept); break;
        case 2: NAME(rows)(h, 2, work, kept); break;
        case 4: NAME(rows)(h, 4, work, kept); break;
        case 8: NAME(rows)(h, 8, work, kept); break;
        case 16: NAME(rows)(h, 16, work, kept); break;
        default: NAME(rows)(h, (int)(h->f/16), work, kept);
    }
    release(work); release(kept);
    return missing;
}

/* by row: the observed cells' part of the loss */
static TARGET int NAME(loss)(const struct half *h) {
    const int F = (int)(h->f/16);
    for (int64_t start, stop; (start = take(h, &stop)) >= 0;)
        for (int64_t k = start; k < stop; k++) {
            int64_t row = h->order[k];
            const v16 *x = (const v16 *)(h->solved + row*h->f);
            double sum = 0;
            for (int64_t i = h->indptr[row]; i < h->indptr[row + 1]; i++) {
                const v16 *y = (const v16 *)(h->fixed + (int64_t)h->indices[i]*h->f);
                v16 d = {0};
                for (int j = 0; j < F; j++) d += x[j]*y[j];
                double p = NAME(sum)(d), c = h->alpha*h->confidence[i];
                sum += c*(1 - p)*(1 - p) - h->unobserved*p*p;
            }
            h->loss[row] = sum;
        }
    return 0;
}
#endif
