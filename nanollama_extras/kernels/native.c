/* Kernels for one step of a language model on the CPU, in float32 with packed weights.
 *
 * native.py compiles this file and calls it. It reads the structures and enums from here, where
 * each is declared once. A kernel takes its structure NAME_call, the number of rows (tokens) and of
 * threads. A row's result depends neither on the other rows of a call nor on the threads. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#define NOINLINE __attribute__((noinline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* ---- vectors: LANES floats, as wide as the machine's registers ---- */

#if defined(__AVX512VNNI__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec pick(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return pick(b < a, b, a); }

INLINE int32_t two_words(const int16_t *a) {
    int32_t words;
    memcpy(&words, a, 4);
    return words;
}

INLINE int32_t four_bytes(const int8_t *a) {
    int32_t bytes;
    memcpy(&bytes, a, 4);
    return bytes;
}

/* Operations whose instructions differ between machines:
 *   madd         a * b + c; a machine rounds always once or always twice
 *   accumulate   sum + a * b, rounded as by `madd`; in a loop whose sums fill the registers, GCC
 *                would copy or spill some of them if it chose the instruction
 *   from_half    loads float16 as floats; to_half stores floats as float16
 *   from_bytes   loads int8 as floats; to_bytes stores integers as int8
 *   from_int8    loads int8 as integers
 *   from_float8  loads E4M3 without a sign as floats, times 2^-8: its bits are those of a float16
 *   look_up      for each byte of q, the entry of a table of 16 bytes that it numbers
 *   dot4         adds to each lane the dot product of its 4 weights (unsigned bytes) and the 4
 *                activations (signed bytes) at `a`, which all lanes share
 *   add_pairs    adds to each int16 the dot product of 2 weights and 2 activations: two
 *                instructions where dot4 takes three, for a run of words of weights up to `most`
 *                (254 * most * longest_run < 2^15); 0 where dot4 is one instruction
 *   sum_pairs    adds to each lane its two int16 of add_pairs
 *   from_pairs   loads int8 as int16, two in a lane
 *   dot2         adds to each lane the dot product of its 2 int16 and those at `a`
 *   to_int16     stores integers as int16
 *
 *   TILE     tokens, and
 *   BLOCKS   blocks of 16 rows, whose sums fit into the registers together
 *   ROWS     queries that read keys and values in the same pass */
#if LANES == 16
#define PATH "AVX-512 VNNI"
#define TILE 4
#define BLOCKS 2
#define ROWS 8
INLINE vec madd(vec a, vec b, vec c) {
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE vec from_half(const void *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE void to_half(void *p, vec x) { _mm256_storeu_si256(p, _mm512_cvtps_ph((__m512)x, 0)); }
INLINE vec from_bytes(const void *p) {
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
}
INLINE ivec from_int8(const void *p) { return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
INLINE vec from_float8(const void *p) {
    __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(p));
    return (vec)_mm512_cvtph_ps(_mm256_slli_epi16(wide, 7));
}
INLINE void to_bytes(void *p, ivec x) { _mm_storeu_si128(p, _mm512_cvtepi32_epi8((__m512i)x)); }
INLINE ivec look_up(const void *table, ivec q) {
    return (ivec)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table)), (__m512i)q);
}
INLINE ivec dot4(ivec sum, ivec w, const int8_t *a, int bits) {
    (void)bits;
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(four_bytes(a)));
}
INLINE ivec from_pairs(const void *p) { return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256(p)); }
INLINE ivec dot2(ivec sum, ivec w, const int16_t *a) {
    return (ivec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(two_words(a)));
}
INLINE void to_int16(void *p, ivec x) { _mm256_storeu_si256(p, _mm512_cvtepi32_epi16((__m512i)x)); }

#elif LANES == 8
#ifdef __AVXVNNI__
#define PATH "AVX-VNNI"
#else
#define PATH "AVX2"
#endif
#define TILE 4
#define BLOCKS 1
#define ROWS 6
INLINE vec madd(vec a, vec b, vec c) {
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE vec from_half(const void *p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE void to_half(void *p, vec x) { _mm_storeu_si128(p, _mm256_cvtps_ph((__m256)x, 0)); }
INLINE vec from_bytes(const void *p) {
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}
INLINE ivec from_int8(const void *p) { return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)); }
INLINE vec from_float8(const void *p) {
    return (vec)_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(p)), 7));
}
INLINE ivec look_up(const void *table, ivec q) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(table));
    return (ivec)_mm256_shuffle_epi8(both, (__m256i)q);
}
INLINE ivec from_pairs(const void *p) { return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128(p)); }
#ifdef __AVXVNNI__
INLINE ivec dot4(ivec sum, ivec w, const int8_t *a, int bits) {
    (void)bits;
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w,
                                         _mm256_set1_epi32(four_bytes(a)));
}
INLINE ivec dot2(ivec sum, ivec w, const int16_t *a) {
    return (ivec)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(two_words(a)));
}
#else
#define HAS_PAIRS
INLINE ivec dot4(ivec sum, ivec w, const int8_t *a, int bits) {
    __m256i acts = _mm256_set1_epi32(four_bytes(a)), q = (__m256i)w, low = _mm256_set1_epi16(255);
    /* 16 bits hold the sum of two products of 4-bit weights (2 * 15 * 127), not of 8-bit ones */
    if (bits == 4)
        return sum + (ivec)_mm256_madd_epi16(_mm256_maddubs_epi16(q, acts), _mm256_set1_epi16(1));
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(acts, 8), 8);
    sum += (ivec)_mm256_madd_epi16(_mm256_and_si256(q, low), even);
    return sum + (ivec)_mm256_madd_epi16(_mm256_srli_epi16(q, 8), _mm256_srai_epi16(acts, 8));
}
INLINE int longest_run(int most) { return most < 16 ? 8 : most < 32 ? 4 : most < 64 ? 2 : 0; }
INLINE ivec add_pairs(ivec sum, ivec w, const int8_t *a) {
    __m256i acts = _mm256_set1_epi32(four_bytes(a));
    sum = (ivec)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)w, acts));
    __asm__("" : "+x"(sum)); /* GCC would keep all products of a group, to add them at its end */
    return sum;
}
INLINE ivec sum_pairs(ivec sum, ivec pairs) {
    return sum + (ivec)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1));
}
INLINE ivec dot2(ivec sum, ivec w, const int16_t *a) {
    return sum + (ivec)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(two_words(a)));
}
#endif

#else
#define TILE 4
#define BLOCKS 1
#define ROWS 4
INLINE vec madd(vec a, vec b, vec c) { return a * b + c; }
INLINE vec from_bytes(const void *p) {
    vec x = {0};
    for (int i = 0; i < LANES; i++) x[i] = ((const int8_t *)p)[i];
    return x;
}
#if defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define PATH "NEON dot product"
INLINE vec from_half(const void *p) { return (vec)vcvt_f32_f16(vld1_f16(p)); }
INLINE void to_half(void *p, vec x) { vst1_f16(p, vcvt_f16_f32((float32x4_t)x)); }
INLINE ivec look_up(const void *table, ivec q) {
    return (ivec)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)q);
}
INLINE ivec dot4(ivec sum, ivec w, const int8_t *a, int bits) {
    int8x16_t q = (int8x16_t)w, acts = vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(a)));
    if (bits == 4) return (ivec)vdotq_s32((int32x4_t)sum, q, acts);
    /* weights become signed by subtracting 128; the sum gets 128 (a0 + a1 + a2 + a3) back */
    sum += 128 * (a[0] + a[1] + a[2] + a[3]);
    return (ivec)vdotq_s32((int32x4_t)sum, veorq_s8(q, vdupq_n_s8(-128)), acts);
}
#else
#define PATH "portable C"
INLINE vec from_half(const void *p) {
    ivec h = {0};
    for (int i = 0; i < LANES; i++) h[i] = ((const uint16_t *)p)[i];
    vec x = (vec)((h & 0x7fff) << 13) * 0x1p112f; /* changes the exponent's bias from 15 to 127 */
    x = pick((h & 0x7c00) == 0x7c00, (vec)((ivec)x | 0x7f800000), x); /* infinity, NaN */
    return (vec)((ivec)x | (h & 0x8000) << 16);
}
INLINE void to_half(void *p, vec x) {
    ivec rest = (ivec)x & 0x7fffffff;
    ivec h = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
    /* below 2^-14: adding 0.5 rounds to a multiple of 2^-24, the last place of a subnormal */
    h = (ivec)pick(rest < 0x38800000, (vec)((ivec)((vec)rest + 0.5f) - 0x3f000000), (vec)h);
    h = (ivec)pick(rest >= 0x477ff000, (vec)((ivec){0} + 0x7c00), (vec)h);
    h = (ivec)pick(rest > 0x7f800000, (vec)((ivec){0} + 0x7e00), (vec)h);
    for (int i = 0; i < LANES; i++) ((uint16_t *)p)[i] = h[i] | (((ivec)x)[i] >> 16 & 0x8000);
}
INLINE ivec look_up(const void *table, ivec q) {
    uint8_t *at = (uint8_t *)&q;
    for (int i = 0; i < (int)sizeof q; i++) at[i] = ((const uint8_t *)table)[at[i]];
    return q;
}
INLINE ivec dot4(ivec sum, ivec w, const int8_t *a, int bits) {
    (void)bits;
    for (int j = 0; j < 4; j++) sum += ((w >> (8 * j)) & 255) * a[j];
    return sum;
}
#endif
#endif

#if LANES < 8
INLINE ivec from_int8(const void *bytes) {
    const int8_t *p = bytes;
    ivec x = {0};
    for (int i = 0; i < LANES; i++) x[i] = p[i];
    return x;
}
INLINE vec from_float8(const uint8_t *p) {
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; i++) halves[i] = (uint16_t)(p[i] << 7);
    return from_half(halves);
}
#endif

#if LANES < 8
INLINE ivec from_pairs(const void *bytes) {
    const int8_t *p = bytes;
    ivec x = {0};
    for (int i = 0; i < LANES; i++)
        x[i] = (p[2 * i] & 0xffff) | (int32_t)((uint32_t)p[2 * i + 1] << 16);
    return x;
}
INLINE ivec dot2(ivec sum, ivec w, const int16_t *a) {
    return sum + (w << 16 >> 16) * a[0] + (w >> 16) * a[1];
}
#endif

#ifndef HAS_PAIRS
INLINE int longest_run(int most) {
    (void)most;
    return 0;
}
INLINE ivec add_pairs(ivec sum, ivec w, const int8_t *a) { return dot4(sum, w, a, 4); }
INLINE ivec sum_pairs(ivec sum, ivec pairs) { return sum + pairs; }
#endif

#if LANES < 16
INLINE void to_bytes(int8_t *p, ivec x) {
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)x[i];
}
INLINE void to_int16(int16_t *p, ivec x) {
    for (int i = 0; i < LANES; i++) p[i] = (int16_t)x[i];
}
#endif

INLINE vec accumulate(vec sum, vec a, vec b) {
#if LANES < 8
    return madd(a, b, sum);
#else
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#endif
}

const char *path(void) { return PATH; }

/* ---- threads ---- */

/* A job is a number of pieces. Each thread has a lane of neighbours among them, so that what it
 * prefetches is what it reads next, and claims these one by one before those that are left in other
 * lanes. The caller works until all pieces are claimed, then waits for those that workers have
 * begun. It never waits for a worker to wake up or to get a core, so on a busy machine a job takes
 * as long as with one thread.
 *
 *   ticket   [ end of the lane : 32 bits | next piece : 32 bits ]   one atomic add claims a piece
 */
#define MOST_LANES 64
#define LINE __attribute__((aligned(64))) /* of the caches: what others write is in other lines */
typedef void piece(const void *job, int64_t index);
typedef struct lane {
    uint64_t ticket LINE;
} lane;
static struct pool {
    pthread_mutex_t owner, bed;
    pthread_cond_t alarm;
    int64_t num_workers;
    int64_t num_jobs LINE, num_lanes, num_asleep; /* a lane for each thread of the job */
    piece *run;
    const void *job;
    int64_t is_ahead; /* whether the job belongs to a step ahead */
    int64_t num_done LINE;
    lane lanes[MOST_LANES];
} pool;

#define SPINS 4000 /* about 0.1 ms, after which a worker goes to sleep */
#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() (void)0
#endif

/* The kernel calls of a step, which are run again and again: see `replay` */
typedef void kernel(const void *call, int64_t num_tokens, int64_t num_threads);
typedef struct {
    kernel *run;
    const void *call;
} step;

/* The step ahead, if any. A caller takes it over from `due`, or a worker, which then runs it; from
 * then on it is the caller's again when it is done. See `run_step`. */
enum { NOT_AHEAD, AHEAD_IS_DUE, AHEAD_RUNS, AHEAD_IS_DONE };
static struct ahead {
    pthread_mutex_t owner;
    const void *caller; /* whose step it is */
    const step *steps;
    int64_t num_steps, num_tokens, num_threads;
    int64_t state LINE, is_stopped, worker;
} ahead;
static __thread int64_t is_ahead; /* whether this thread runs it */
static piece multiply_piece;

/* Whether nobody waits for the product that the pool is at. */
static int is_in_vain(void) {
    return pool.is_ahead && pool.run == multiply_piece &&
           __atomic_load_n(&ahead.is_stopped, __ATOMIC_SEQ_CST);
}

/* Do the pieces that can be claimed, those in lane `index` first. */
static void work(int64_t index) {
    int64_t num = __atomic_load_n(&pool.num_lanes, __ATOMIC_SEQ_CST), num_done = 0;
    for (int64_t i = 0; i < num; i++) {
        uint64_t *ticket = &pool.lanes[(index + i) % num].ticket, claimed;
        for (;; num_done++) {
            claimed = __atomic_load_n(ticket, __ATOMIC_SEQ_CST);
            if ((uint32_t)claimed >= claimed >> 32) break;
            claimed = __atomic_fetch_add(ticket, 1, __ATOMIC_SEQ_CST);
            if ((uint32_t)claimed >= claimed >> 32) break;
            if (!is_in_vain()) /* the job stays until this piece is done */
                pool.run(pool.job, (uint32_t)claimed);
        }
    }
    if (num_done) __atomic_fetch_add(&pool.num_done, num_done, __ATOMIC_SEQ_CST);
}

/* Run the step ahead, if it is due, on this worker and those that join. */
static int run_ahead(int64_t worker) {
    int64_t due = AHEAD_IS_DUE;
    if (!__atomic_compare_exchange_n(&ahead.state, &due, AHEAD_RUNS, 0, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST))
        return 0;
    __atomic_store_n(&ahead.worker, worker, __ATOMIC_SEQ_CST);
    is_ahead = 1;
    for (const step *s = ahead.steps; s < ahead.steps + ahead.num_steps; s++)
        if (!__atomic_load_n(&ahead.is_stopped, __ATOMIC_SEQ_CST))
            s->run(s->call, ahead.num_tokens, ahead.num_threads);
    is_ahead = 0;
    __atomic_store_n(&ahead.state, AHEAD_IS_DONE, __ATOMIC_SEQ_CST);
    return 1;
}

static void *worker(void *index) {
    int64_t seen = 0, latest;
    for (int64_t spins = 0;; spins++) {
        latest = __atomic_load_n(&pool.num_jobs, __ATOMIC_SEQ_CST);
        if (latest != seen && run_ahead((intptr_t)index))
            spins = 0;
        else if (latest != seen &&
                 (intptr_t)index < __atomic_load_n(&pool.num_lanes, __ATOMIC_SEQ_CST))
            work((intptr_t)index), spins = 0;
        seen = latest;
        PAUSE();
        if (spins < SPINS && (intptr_t)index < __atomic_load_n(&pool.num_lanes, __ATOMIC_SEQ_CST))
            continue;
        pthread_mutex_lock(&pool.bed);
        __atomic_fetch_add(&pool.num_asleep, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&pool.num_jobs, __ATOMIC_SEQ_CST) == seen)
            pthread_cond_wait(&pool.alarm, &pool.bed);
        __atomic_fetch_sub(&pool.num_asleep, 1, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&pool.bed);
        spins = 0;
    }
    return NULL;
}

static void start_anew(void) {
    pool = (struct pool){.owner = PTHREAD_MUTEX_INITIALIZER,
                         .bed = PTHREAD_MUTEX_INITIALIZER,
                         .alarm = PTHREAD_COND_INITIALIZER};
    ahead = (struct ahead){.owner = PTHREAD_MUTEX_INITIALIZER};
}
__attribute__((constructor)) static void on_load(void) {
    start_anew();
    pthread_atfork(NULL, NULL, start_anew); /* a forked process has no workers yet */
}

/* Tell the workers that there is something to do for so many threads. */
static void ring(int64_t num_threads) {
    __atomic_fetch_add(&pool.num_jobs, 1, __ATOMIC_SEQ_CST);
    int64_t num_spare = pool.num_workers - (num_threads - 1); /* without a lane they sleep on */
    if (__atomic_load_n(&pool.num_asleep, __ATOMIC_SEQ_CST) > num_spare) {
        pthread_mutex_lock(&pool.bed);
        pthread_cond_broadcast(&pool.alarm);
        pthread_mutex_unlock(&pool.bed);
    }
}

/* Call run(job, i) for i = 0 .. num_pieces - 1 on up to num_threads threads; on this thread alone
 * while another caller has the workers. */
static void share_out(piece *run, const void *job, int64_t num_pieces, int64_t num_threads) {
    if (num_threads < 2 || num_pieces < 2 || pthread_mutex_trylock(&pool.owner)) {
        for (int64_t i = 0; i < num_pieces; i++) run(job, i);
        return;
    }
    pthread_t thread;
    num_threads = MIN(num_threads, MOST_LANES);
    while (pool.num_workers < num_threads - 1 &&
           !pthread_create(&thread, NULL, worker, (void *)(intptr_t)(pool.num_workers + 1))) {
        pthread_detach(thread);
        pool.num_workers++;
    }
    pool.run = run, pool.job = job, pool.is_ahead = is_ahead;
    __atomic_store_n(&pool.num_done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&pool.num_lanes, num_threads, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < num_threads; i++) {
        uint64_t first = num_pieces * i / num_threads, end = num_pieces * (i + 1) / num_threads;
        __atomic_store_n(&pool.lanes[i].ticket, end << 32 | first, __ATOMIC_RELEASE);
    }
    ring(num_threads);
    work(0);
    for (int64_t i = 0; __atomic_load_n(&pool.num_done, __ATOMIC_SEQ_CST) < num_pieces; i++)
        if (i < SPINS)
            PAUSE();
        else
            sched_yield();
    pthread_mutex_unlock(&pool.owner);
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t four_ints __attribute__((vector_size(16), aligned(4), may_alias));
INLINE float sum_of(vec x) {
    four sum = *(four *)&x;
    for (int i = 1; i < LANES / 4; i++) sum += ((four *)&x)[i];
    return sum[0] + sum[1] + (sum[2] + sum[3]);
}
INLINE float largest_of(vec x) {
    four most = *(four *)&x;
    for (int i = 1; i < LANES / 4; i++) {
        four other = ((four *)&x)[i];
        four_ints mask = most > other;
        most = (four)((mask & (four_ints)most) | (~mask & (four_ints)other));
    }
    return MAX(MAX(most[0], most[1]), MAX(most[2], most[3]));
}

/* 1.5 * 2^23: adding it to a float rounds the float to an integer, which is then in the low bits */
#define ROUNDER 12582912.0f

/* exp(x) within 3 units in the last place for x up to 88; 0 below -87, NaN for NaN.
 * x = n ln 2 + r with |r| <= ln(2) / 2; exp(r) is computed by its Taylor polynomial. */
INLINE vec exp_up_to_88(vec x) {
    vec shifted = madd(x, splat(1.44269504f), splat(ROUNDER)), n = shifted - ROUNDER;
    vec r = madd(n, splat(-1.42860677e-6f), madd(n, splat(-0.693145752f), x));
    vec p = splat(1.0f / 720);
    p = madd(p, r, splat(1.0f / 120));
    p = madd(p, r, splat(1.0f / 24));
    p = madd(p, r, splat(1.0f / 6));
    p = madd(p, r, splat(0.5f));
    p = madd(p, r, splat(1.0f));
    p = madd(p, r, splat(1.0f));
    return pick(x < -87.0f, splat(0), (vec)((ivec)p + ((ivec)shifted << 23)));
}
INLINE vec exp_of(vec x) { return exp_up_to_88(pick(x > 88.0f, splat(88.0f), x)); }

/* 1 / rms(x) of x (n); n is a multiple of 16 */
INLINE float rms_factor(const float *x, int64_t n, float eps) {
    vec sum = {0};
    for (int64_t i = 0; i < n; i += LANES) sum = madd(load(x + i), load(x + i), sum);
    return 1.0f / sqrtf(sum_of(sum) / n + eps);
}

/* ---- linear: y = W operand + bias + residual ---- */

enum { PACKED, IN_FLOAT32, IN_FLOAT16, IN_BFLOAT16 }; /* what a matrix consists of */

typedef struct {
    const uint8_t *blocks;
    const float *bias; /* (rows), or NULL */
    int64_t rows, cols;
    int32_t bits, group, has_offset, is_float, block_bytes;
    int32_t fine;          /* which scales have 8 bits; COARSE for none */
    float unit;            /* the factor of a fine matrix */
    int32_t centre;        /* what its codes or levels are above their numbers */
    const uint8_t *levels; /* its 16 levels, of which codes are numbers, or NULL */
    int32_t floats; /* PACKED, or the type of a matrix of floats, for which blocks alone count */
} matrix;

/* Scales of fine matrices, besides one in float16 for each `group` of columns: none; none, but an
 * offset in float16; of 32 columns, an integer; of 32, two integers, of which one is a minimum's,
 * with another float16 for the minima; of 16, an integer; of 16, one of 4 bits and a minimum of 4
 * bits, with another float16 for the minima; of 16, an E4M3 without a sign, and no float16 */
enum { COARSE, ONE_SCALE, ONE_OFFSET, SCALES_32, MINS_32, SCALES_16, SCALES_MINS, SCALES_FLOAT };

/* The operand: x, rms_norm(x), an activation of gate and up, or (RELU2, GELU) one of x alone */
enum { PLAIN, NORM, SWIGLU, GEGLU, REGLU2, CLAMPED_SWIGLU, RELU2, GELU, XIELU };

typedef struct {
    const matrix *parts; /* all are multiplied with the same operand; outputs stand side by side */
    int64_t num_parts;
    const float *x;        /* (N, cols), or gate | up (N, 2 cols) */
    const float *norm;     /* (cols) */
    const float *residual; /* as out, or NULL */
    float *out;            /* (N, rows of all parts) */
    int64_t before;
    float eps, alpha_p, alpha_n, beta, least;                   /* the last four of xIELU */
    int64_t num_tokens, cols, num_rows, num_blocks, num_pieces; /* from here on set by `linear` */
    uint8_t *acts;
} linear_call;

/* Activations become int8, with a scale for each group of 32 columns. Tokens are taken in tiles of
 * T; the groups of a tile follow each other:
 *
 *   int8 a (T, 32) | scale (T) | scale * sum(a) (T) | the same of each half of the group (2, T)
 *   | int32 -8 * sum(a) (T) | int32 -sum(a) of each half (2, T)
 */
#define GROUP_BYTES 60 /* for each token */

INLINE int tile_size(int64_t tokens_left) {
    return tokens_left >= TILE ? TILE : tokens_left >= 2 ? 2 : 1;
}

/* Write x, 32 columns of token t of a tile, to its group */
INLINE void quantize_group(const vec *x, uint8_t *group, int64_t T, int64_t t) {
    vec sizes = {0};
    for (int i = 0; i < 32 / LANES; i++) sizes = larger((vec)((ivec)x[i] & 0x7fffffff), sizes);
    float most = largest_of(sizes), inverse = most > 1e-35f ? 127.0f / most : 0, sums[2] = {0};
    int8_t *a = (int8_t *)group + 32 * t;
    for (int i = 0; i < 32 / LANES; i++) {
        vec q = x[i] * inverse + ROUNDER;
        to_bytes(a + i * LANES, (ivec)q - (ivec)splat(ROUNDER));
        sums[i * LANES / 16] += sum_of(q - ROUNDER);
    }
    float sum = sums[0] + sums[1]; /* NaN if any x is NaN or infinite; passed on */
    float scale = isnan(sum) ? sum : most / 127.0f, *s = (float *)(group + 32 * T) + t;
    for (int h = 0; h < 2; h++) ((int32_t *)s)[(5 + h) * T] = isnan(sum) ? 0 : -(int32_t)sums[h];
    s[0] = scale;
    s[T] = scale * sum;
    s[2 * T] = scale * sums[0];
    s[3 * T] = scale * sums[1];
    ((int32_t *)s)[4 * T] = isnan(sum) ? 0 : -8 * (int32_t)sum;
}

/* 0.5 x (1 + tanh(y)) = x / (1 + exp(-2 y)), y = sqrt(2 / pi) (x + 0.044715 x^3) */
INLINE vec gelu(vec x) { return x / (1.0f + exp_of(x * (-1.59576912f - 0.0713548163f * x * x))); }

/* LANES columns of one token's operand, before any norm */
INLINE vec activated(const linear_call *in, int64_t token, int64_t col) {
    int gated = in->before >= SWIGLU && in->before <= CLAMPED_SWIGLU;
    const float *at = in->x + token * (in->cols << gated) + col;
    vec x = load(at), up = load(at + (gated ? in->cols : 0));
    switch (in->before) {
    case SWIGLU: return x / (1.0f + exp_of(-x)) * up;
    case GEGLU: return gelu(x) * up;
    case REGLU2: return larger((vec){0}, x) * x * up;
    case CLAMPED_SWIGLU: /* as in gpt-oss */
        x = smaller(x, splat(7.0f)), up = larger(splat(-7.0f), smaller(up, splat(7.0f)));
        return x / (1.0f + exp_of(x * -1.702f)) * (up + 1.0f);
    case RELU2: return larger((vec){0}, x) * x;
    case GELU: return gelu(x);
    case XIELU: /* as in Apertus */
        up = exp_of(smaller(splat(in->least), x)) - 1.0f - x;
        return pick(x > 0.0f, x * x * in->alpha_p, up * in->alpha_n) + x * in->beta;
    default: return x;
    }
}

/* LANES columns of one token's operand */
INLINE vec operand(const linear_call *in, int64_t token, int64_t col, float factor) {
    vec x = activated(in, token, col);
    if (in->norm) x = x * factor * load(in->norm + col);
    return x;
}

/* 1 / rms of a token's operand */
INLINE float norm_factor(const linear_call *in, int64_t token) {
    if (in->before == NORM) return rms_factor(in->x + token * in->cols, in->cols, in->eps);
    vec sum = {0};
    for (int64_t i = 0; i < in->cols; i += LANES) {
        vec x = activated(in, token, i);
        sum = madd(x, x, sum);
    }
    return 1.0f / sqrtf(sum_of(sum) / in->cols + in->eps);
}

/* Quantize a piece of all tokens' groups */
static void quantize_piece(const void *job, int64_t piece) {
    const linear_call *in = job;
    int64_t num_groups = in->cols / 32, total = in->num_tokens * num_groups;
    int64_t i = total * piece / in->num_pieces, stop = total * (piece + 1) / in->num_pieces;
    for (int64_t token = i / num_groups, g = i % num_groups; i < stop; token++, g = 0) {
        int64_t start = token / TILE * TILE, T;
        for (; token >= start + (T = tile_size(in->num_tokens - start)); start += T) {}
        float factor = in->norm ? norm_factor(in, token) : 1;
        for (; g < num_groups && i < stop; g++, i++) {
            vec x[32 / LANES];
            for (int c = 0; c < 32 / LANES; c++)
                x[c] = operand(in, token, 32 * g + c * LANES, factor);
            uint8_t *group = in->acts + (start * num_groups + g * T) * GROUP_BYTES;
            quantize_group(x, group, T, token - start);
        }
    }
}

#define AHEAD 8192 /* bytes to prefetch ahead; 4 to 16 KB are equally good */

/* Prefetch what is AHEAD of p. Weights that are read `once` in a step do not take the place in the
 * caches of what the program needs between two steps. */
INLINE void fetch(const uint8_t *p, int once) {
    if (once)
        __builtin_prefetch(p + AHEAD, 0, 0);
    else
        __builtin_prefetch(p + AHEAD);
}

/* The values of 4-bit floats, doubled, plus 12 */
static const uint8_t float4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* Before a loop over the words of a group: on AVX2, GCC would otherwise keep its sums in memory.
 * With 4 lanes, portable C would take minutes to compile, and NEON has not been measured. */
#if LANES >= 8
#define UNROLLED _Pragma("GCC unroll 8")
#else
#define UNROLLED
#endif

#define VECS (16 / LANES) /* vectors that hold the 16 rows of a block */

/* out (B VECS, T) = B blocks of rows times T tokens. After inlining, all arguments but the pointers
 * and num_groups are constants. A vector of weights is multiplied with all tokens before the next
 * one is loaded, so that no addition waits for the one before it. */
INLINE void multiply(int64_t num_groups, const uint8_t *block, const uint8_t *tile, vec *out, int B,
                     int T, int bits, int group, int has_offset, int is_float) {
    const int num_words = group * bits / 32, centred = bits == 4 && !has_offset;
    const int in_pairs = bits == 4 && !is_float && longest_run(15) >= group / 4;
    const int block_bytes = 2 * group * bits + 32 + 32 * has_offset;
    const int64_t next_block = num_groups * block_bytes;
    vec y[BLOCKS * VECS][TILE];
    for (int v = 0; v < B * VECS; v++)
        for (int t = 0; t < T; t++) y[v][t] = (vec){0};
    for (int64_t g = 0; g < num_groups; g++, block += block_bytes) {
        const int8_t *a = (const int8_t *)tile + g * group / 32 * GROUP_BYTES * T;
        const float *s = (const float *)(a + 32 * T), *sums = s + (group == 32 ? 1 : 2 + g % 2) * T;
        ivec dot[BLOCKS * VECS][TILE], pairs[BLOCKS * VECS][TILE] = {{{0}}};
        for (int t = 0; t < T; t++)
            for (int v = 0; v < B * VECS; v++)
                dot[v][t] = (ivec){0} + (centred ? ((const int32_t *)s)[4 * T + t] : 0);
        for (int t = 0; t < T && is_float; t++) /* centred by 12, not by 8 */
            for (int v = 0; v < B * VECS; v++) dot[v][t] += dot[v][t] / 2;
        for (int b = 0; b < B; b++)
            for (int i = 0; i < block_bytes; i += 64) fetch(block + b * next_block + i, T == 1);
        a += g * group % 32; /* weight groups may be shorter than those of activations */
        UNROLLED
        for (int i = 0; i < num_words; i++) {
            ivec w[BLOCKS * VECS];
            for (int v = 0; v < B * VECS; v++)
                w[v] = ((const ivec *)(block + v / VECS * next_block + 64 * i))[v % VECS];
            for (int half = 0; half < (bits == 4 ? 2 : 1); half++)
                for (int t = 0; t < T; t++)
                    for (int v = 0; v < B * VECS; v++) {
                        ivec q = w[v];
                        if (bits == 4) q = w[v] >> 4 * half & 0x0f0f0f0f;
                        if (is_float) q = look_up(float4, q);
                        const int8_t *acts = a + 32 * t + 4 * i + 16 * half;
                        if (in_pairs)
                            pairs[v][t] = add_pairs(pairs[v][t], q, acts);
                        else
                            dot[v][t] = dot4(dot[v][t], q, acts, bits);
                    }
        }
        for (int v = 0; v < B * VECS && in_pairs; v++)
            for (int t = 0; t < T; t++) dot[v][t] = sum_pairs(dot[v][t], pairs[v][t]);
        for (int v = 0; v < B * VECS; v++) {
            const uint8_t *scales = block + v / VECS * next_block + 2 * group * bits;
            scales += v % VECS * LANES * 2;
            vec scale = from_half(scales), offset = {0};
            if (has_offset) offset = from_half(scales + 32);
            if (bits == 8) offset = madd(scale, splat(-128), offset);
            for (int t = 0; t < T; t++) {
                y[v][t] = madd(__builtin_convertvector(dot[v][t], vec), scale * s[t], y[v][t]);
                if (!centred) y[v][t] = madd(offset, splat(sums[t]), y[v][t]);
            }
        }
    }
    for (int v = 0; v < B * VECS; v++)
        for (int t = 0; t < T; t++) out[v * T + t] = y[v][t];
}

/* Word i, which is the codes of columns 4i .. 4i + 3, of 16 rows x 32 columns:
 *
 *   6 bits   [ words 0 .. 7: four low bits, as below | words 0 .. 3: two high bits | words 4 .. 7 ]
 *   5 bits   [ words 0 .. 7: four low bits, as below | words 0 .. 7: the high bit ]
 *   4 bits   [ words 0, 4 | words 1, 5 | words 2, 6 | words 3, 7 ]   64 bytes each
 *   3 bits   [ words 0 .. 3: two low bits | words 4 .. 7 | words 0 .. 7: the high bit ]
 *   2 bits   [ words 0 .. 3 | words 4 .. 7 ]
 *   8 bits   [ word 0 | word 1 | .. | word 7 ]   as `widen_codes` makes them
 */
INLINE ivec code_word(const uint8_t *codes, int v, int bits, int i) {
    const ivec *words = (const ivec *)codes + v;
    if (bits == 8) return words[i * VECS];
    if (bits >= 4) {
        ivec low = words[i % 4 * VECS] >> 4 * (i / 4) & 0x0f0f0f0f;
        if (bits == 4) return low;
        ivec high = words[(bits == 5 ? 4 : 4 + i / 4) * VECS];
        if (bits == 5) return low | ((i < 4 ? high << (4 - i) : high >> (i - 4)) & 0x10101010);
        return low | ((i % 4 < 2 ? high << (4 - i % 4 * 2) : high >> (i % 4 * 2 - 4)) & 0x30303030);
    }
    ivec low = words[i / 4 * VECS] >> 2 * (i % 4) & 0x03030303, high = words[2 * VECS];
    if (bits == 2) return low;
    return low | ((i < 2 ? high << (2 - i) : high >> (i - 2)) & 0x04040404);
}

INLINE int num_scales_of(int fine) { /* of 8 bits, for 32 columns */
    return fine < SCALES_32 ? 0 : fine == SCALES_32 ? 1 : 2;
}

/* `multiply` for a fine matrix and one block of rows. A block of 16 rows x `wide` columns:
 *
 *   [ codes | 8-bit scales (16) for each 16 or 32 columns | float16 scales (16) | those of minima ]
 *
 * Minima's 8-bit scales stand behind each of the others. With `bits` 8, codes are those that
 * `widen_codes` has made of the matrix's, of `code_bits`. */
INLINE void multiply_fine(const matrix *m, const uint8_t *block, const uint8_t *codes,
                          const uint8_t *tile, vec *out, int T, int bits, int wide, int fine,
                          int centre, int code_bits) {
    const int num_groups = wide / 32, dot_bits = centre > 64 ? 8 : 4, code_bytes = 64 * bits;
    const int in_halves = fine >= SCALES_16, num_scales = num_scales_of(fine);
    const int stored_bytes = num_groups * 64 * (bits == 8 ? m->bits : bits);
    const int has_table = bits < 8 && centre >= 64, ahead = m->block_bytes;
    const int longest =
        centre >= 64 ? 0 : longest_run((1 << code_bits) - 1); /* levels may be 127 */
    const int run = in_halves ? MIN(longest, 4) : longest;
    vec y[VECS][TILE];
    for (int v = 0; v < VECS; v++)
        for (int t = 0; t < T; t++) y[v][t] = (vec){0};
    for (int64_t col = 0; col < m->cols; col += wide, block += m->block_bytes) {
        vec sum[VECS][TILE], minima[VECS][TILE];
        for (int v = 0; v < VECS; v++)
            for (int t = 0; t < T; t++) sum[v][t] = minima[v][t] = (vec){0};
        const uint8_t *scales = block + stored_bytes;
        if (bits < 8) codes = block;
        for (int g = 0; g < num_groups; g++, codes += code_bytes, scales += 16 * num_scales) {
            const int8_t *a = (const int8_t *)tile + (col / 32 + g) * GROUP_BYTES * T;
            const float *s = (const float *)(a + 32 * T);
            ivec dot[VECS][TILE], pairs[VECS][TILE] = {{{0}}};
            vec part[VECS][TILE];
            for (int i = 0; i < ahead / num_groups && bits < 8; i += 64) fetch(codes + i, T == 1);
            for (int v = 0; v < VECS; v++)
                for (int t = 0; t < T; t++) part[v][t] = (vec){0};
            UNROLLED
            for (int h = 0; h < 2; h++) {
                for (int v = 0; v < VECS; v++)
                    for (int t = 0; t < T; t++) {
                        if (in_halves || h == 0) dot[v][t] = (ivec){0};
                        if (centre) dot[v][t] += centre * ((const int32_t *)s)[(5 + h) * T + t];
                    }
                UNROLLED
                for (int i = 4 * h; i < 4 * h + 4; i++)
                    for (int v = 0; v < VECS; v++) {
                        ivec q = code_word(codes, v, bits, i);
                        if (has_table) q = look_up(m->levels, q);
                        for (int t = 0; t < T; t++) {
                            const int8_t *acts = a + 32 * t + 4 * i;
                            if (!run) {
                                dot[v][t] = dot4(dot[v][t], q, acts, dot_bits);
                                continue;
                            }
                            pairs[v][t] = add_pairs(pairs[v][t], q, acts);
                            if ((i + 1) % run) continue;
                            dot[v][t] = sum_pairs(dot[v][t], pairs[v][t]);
                            pairs[v][t] = (ivec){0};
                        }
                    }
                for (int v = 0; v < VECS && in_halves; v++) {
                    const uint8_t *at = scales + 16 * h + v * LANES;
                    ivec both = from_int8(at);
                    vec scale = __builtin_convertvector(both & 15, vec), least;
                    least = __builtin_convertvector(both >> 4 & 15, vec);
                    if (fine == SCALES_16) scale = from_bytes(at);
                    if (fine == SCALES_FLOAT) scale = from_float8(at);
                    for (int t = 0; t < T; t++) {
                        vec product = __builtin_convertvector(dot[v][t], vec);
                        part[v][t] = madd(product, scale, part[v][t]);
                        if (fine == SCALES_MINS)
                            minima[v][t] = madd(least, splat(s[(2 + h) * T + t]), minima[v][t]);
                    }
                }
            }
            for (int v = 0; v < VECS; v++) {
                vec scale = splat(1), least = {0};
                if (fine == SCALES_32 || fine == MINS_32) scale = from_bytes(scales + v * LANES);
                if (fine == MINS_32) least = from_bytes(scales + 16 + v * LANES);
                for (int t = 0; t < T; t++) {
                    if (!in_halves) part[v][t] = __builtin_convertvector(dot[v][t], vec);
                    if (fine == SCALES_32 || fine == MINS_32) part[v][t] *= scale;
                    sum[v][t] = madd(part[v][t], splat(s[t]), sum[v][t]);
                    if (fine == MINS_32) minima[v][t] = madd(least, splat(s[T + t]), minima[v][t]);
                    if (fine == ONE_OFFSET) minima[v][t] -= s[T + t];
                }
            }
        }
        for (int v = 0; v < VECS; v++) {
            const uint8_t *halves = scales + v * LANES * 2;
            vec scale = splat(1), least = {0};
            if (fine != SCALES_FLOAT) scale = from_half(halves);
            const int has_minima = fine == SCALES_MINS || fine == MINS_32 || fine == ONE_OFFSET;
            if (has_minima) least = from_half(halves + 32);
            for (int t = 0; t < T; t++) {
                y[v][t] = madd(sum[v][t], scale, y[v][t]);
                if (has_minima) y[v][t] = madd(minima[v][t], -least, y[v][t]);
            }
        }
    }
    for (int v = 0; v < VECS; v++)
        for (int t = 0; t < T; t++) out[v * T + t] = y[v][t] * m->unit;
}

/* Scales, centre, bits and columns of a block */
#define EVERY_FINE(FINE, T) \
    FINE(T, ONE_SCALE, 128, 4, 32) \
    FINE(T, ONE_SCALE, 16, 5, 32) \
    FINE(T, ONE_SCALE, 1, 2, 64) \
    FINE(T, ONE_SCALE, 8, 4, 128) \
    FINE(T, ONE_OFFSET, 0, 4, 64) \
    FINE(T, ONE_OFFSET, 0, 4, 128) \
    FINE(T, ONE_OFFSET, 0, 5, 32) \
    FINE(T, SCALES_32, 128, 4, 256) \
    FINE(T, MINS_32, 0, 4, 256) \
    FINE(T, MINS_32, 0, 5, 256) \
    FINE(T, SCALES_16, 64, 3, 256) \
    FINE(T, SCALES_16, 32, 6, 256) \
    FINE(T, SCALES_MINS, 0, 2, 256) \
    FINE(T, SCALES_FLOAT, 64, 4, 64)
#define IS_KIND(KIND, CENTRE, BITS, WIDE) \
    (m->fine == KIND && m->centre == CENTRE && m->bits == BITS && m->group == WIDE)
#define STORED(T, KIND, CENTRE, BITS, WIDE) \
    if (IS_KIND(KIND, CENTRE, BITS, WIDE)) \
        multiply_fine(m, block, block, tile, y, T, BITS, WIDE, KIND, CENTRE, BITS);
#define WIDENED(T, KIND, CENTRE, BITS, WIDE) \
    if (IS_KIND(KIND, CENTRE, BITS, WIDE)) \
        multiply_fine(m, block, codes, tile, y, T, 8, WIDE, KIND, CENTRE, BITS);
static void multiply_fine_tile(const matrix *m, const uint8_t *block, const uint8_t *codes,
                               const uint8_t *tile, vec *y, int num_tokens) {
    if (num_tokens == TILE && codes) {
        EVERY_FINE(WIDENED, TILE)
    } else if (num_tokens == 1) {
        EVERY_FINE(STORED, 1)
    } else if (num_tokens == 2) {
        EVERY_FINE(STORED, 2)
    } else {
        EVERY_FINE(STORED, TILE)
    }
}

/* Codes of a block of rows, or their levels, as bytes: (cols / 32, 8 words, 16 rows) */
#define WIDEN(BITS) \
    if (m->bits == BITS) \
        for (int i = 0; i < 8 * VECS; i++) to[i] = code_word(codes, i % VECS, BITS, i / VECS);
static void widen_codes(const matrix *m, const uint8_t *block, uint8_t *out) {
    for (int64_t col = 0; col < m->cols; col += 32, out += 512) {
        const uint8_t *codes = block + col % m->group * 2 * m->bits;
        ivec *to = (ivec *)out;
        WIDEN(2)
        WIDEN(3)
        WIDEN(4)
        WIDEN(5)
        WIDEN(6)
        for (int i = 0; i < 8 * VECS && m->levels; i++) to[i] = look_up(m->levels, to[i]);
        if ((col + 32) % m->group == 0) block += m->block_bytes;
    }
}

/* Columns of one row of a block of a fine matrix, times the factor */
static void gather_fine(const matrix *m, const uint8_t *block, int64_t lane, float factor,
                        float *out) {
    int num_groups = m->group / 32, num_scales = num_scales_of(m->fine);
    const uint8_t *scales = block + num_groups * 64 * m->bits;
    const uint8_t *halves = scales + num_groups * num_scales * 16 + lane / LANES * LANES * 2;
    float d = 1, d_min = 0;
    if (m->fine != SCALES_FLOAT) d = from_half(halves)[lane % LANES];
    if (m->fine == SCALES_MINS || m->fine == MINS_32 || m->fine == ONE_OFFSET)
        d_min = from_half(halves + 32)[lane % LANES];
    for (int j = 0; j < m->group; j++) {
        const uint8_t *codes = block + j / 32 * 64 * m->bits;
        ivec word = code_word(codes, lane / LANES, m->bits, j % 32 / 4);
        int q = ((const uint8_t *)&word)[lane % LANES * 4 + j % 4];
        const uint8_t *at = scales + j / 32 * num_scales * 16;
        float scale = d * m->unit, least = 0;
        if (m->fine >= SCALES_16 && j % 32 >= 16) at += 16;
        if (m->fine == SCALES_FLOAT)
            scale *= from_float8(at + lane / LANES * LANES)[lane % LANES];
        else if (m->fine == SCALES_MINS)
            least = d_min * (at[lane] >> 4), scale *= at[lane] & 15;
        else if (num_scales)
            scale *= (int8_t)at[lane];
        if (m->fine == MINS_32) least = d_min * at[16 + lane];
        if (m->fine == ONE_OFFSET) least = -d_min;
        out[j] = (((m->levels ? m->levels[q] : q) - m->centre) * scale - least) * factor;
    }
}

#define FORMAT(B, T, BITS, GROUP, OFFSET, FLOAT) \
    if (m->bits == BITS && m->group == GROUP && m->has_offset == OFFSET && m->is_float == FLOAT) \
    multiply(m->cols / GROUP, block, tile, y, B, T, BITS, GROUP, OFFSET, FLOAT)
#define FORMATS(B, T) \
    if (num_blocks == B && num_tokens == T) { \
        FORMAT(B, T, 4, 32, 0, 0); \
        FORMAT(B, T, 4, 32, 1, 0); \
        FORMAT(B, T, 8, 32, 0, 0); \
        FORMAT(B, T, 8, 32, 1, 0); \
        FORMAT(B, T, 8, 16, 0, 0); \
        FORMAT(B, T, 8, 16, 1, 0); \
        FORMAT(B, T, 4, 32, 0, 1); \
        return; \
    }
static void multiply_tile(const matrix *m, const uint8_t *block, const uint8_t *tile, vec *y,
                          int num_blocks, int num_tokens) {
    FORMATS(1, 1);
    FORMATS(1, 2);
#if TILE > 2
    FORMATS(1, TILE);
#endif
#if BLOCKS == 2
    FORMATS(2, 1);
    FORMATS(2, 2);
    FORMATS(2, TILE);
#endif
}

/* Store LANES rows of one token, from `row` on */
INLINE void finish_rows(const matrix *m, int64_t row, vec y, const float *residual, float *out) {
    if (row + LANES <= m->rows) {
        if (m->bias) y += load(m->bias + row);
        if (residual) y = load(residual) + y;
        store(out, y);
    } else {
        for (int64_t i = 0; row + i < m->rows; i++) {
            float one = y[i] + (m->bias ? m->bias[row + i] : 0);
            out[i] = residual ? residual[i] + one : one;
        }
    }
}

/* A piece is a run of blocks, multiplied with all tokens, as many at a time as fit into a cache */
static void multiply_piece(const void *job, int64_t piece) {
    const linear_call *c = job;
    int64_t token_bytes = c->cols / 32 * GROUP_BYTES, last = c->num_blocks * (piece + 1);
    int64_t chunk = MAX(TILE, (512 << 10) / token_bytes / TILE * TILE);
    uint8_t *wide = NULL; /* the codes of a block, if they are multiplied with many tokens */
    for (int64_t from = 0; from < c->num_tokens; from += chunk) {
        const matrix *m = c->parts;
        int64_t first_block = 0, first_row = 0, stop = MIN(c->num_tokens, from + chunk), B;
        for (int64_t i = c->num_blocks * piece / c->num_pieces; i < last / c->num_pieces; i += B) {
            for (; (i - first_block) * 16 >= m->rows; m++) {
                first_block += (m->rows + 15) / 16;
                first_row += m->rows;
            }
            int64_t row = (i - first_block) * 16, left = (m->rows - row + 15) / 16;
            const uint8_t *block = m->blocks + row / 16 * (m->cols / m->group) * m->block_bytes;
            B = MIN(BLOCKS, MIN(left, last / c->num_pieces - i));
            if (m->fine || c->num_tokens == 1)
                B = 1; /* memory delivers one stream faster than two */
            int is_widened = m->fine && stop - from >= 2 * TILE;
            if (is_widened) {
                if (!wide) wide = malloc(16 * c->cols);
                widen_codes(m, block, wide);
            }
            for (int64_t start = from, T; start < stop; start += T) {
                vec y[BLOCKS * VECS * TILE];
                const uint8_t *tile = c->acts + start * token_bytes;
                T = tile_size(c->num_tokens - start);
                if (m->fine)
                    multiply_fine_tile(m, block, is_widened ? wide : NULL, tile, y, T);
                else
                    multiply_tile(m, block, tile, y, B, T);
                for (int64_t n = 0; n < B * VECS * T; n++) {
                    int64_t r = row + n / T * LANES, token = start + n % T;
                    int64_t at = token * c->num_rows + first_row + r;
                    finish_rows(m, r, y[n], c->residual ? c->residual + at : NULL, c->out + at);
                }
            }
        }
    }
    free(wide);
}

#define PIECES 4 /* for each thread, so that others can take over from a thread that is held up */

/* A matrix that is read once is cut finer: the threads then end at nearly the same time. */
INLINE int64_t product_pieces(const linear_call *c, int64_t num_threads) {
    return MIN(c->num_blocks, (c->num_tokens == 1 ? 2 : 1) * PIECES * num_threads);
}

static void multiply_packed(linear_call c, int64_t num_threads) {
    int64_t num_groups = c.num_tokens * c.cols / 32;
    c.acts = malloc(num_groups * GROUP_BYTES);
    c.num_pieces = num_groups < 128 ? 1 : MIN(num_groups / 64, PIECES * num_threads);
    share_out(quantize_piece, &c, c.num_pieces, num_threads);
    c.num_pieces = product_pieces(&c, num_threads);
    share_out(multiply_piece, &c, c.num_pieces, num_threads);
    free(c.acts);
}

/* ---- matrices of floats ----
 *
 * A block is 32 rows, read from front to back, two columns at a time:
 *
 *   float32, float16   [ column 0 of 32 rows | column 1 of 32 rows ] ..
 *   bfloat16           [ columns 0 and 1 of row 0 | of row 1 | .. | of row 31 ] ..
 *
 * Sums are float32 and add their products in the order of the columns, whatever else is computed.
 * The operand is float32, in tiles of T tokens: (cols, T). Of many tokens' products with a block,
 * DEPTH columns are added at a time: their weights, made float32 once, stay in a cache.
 *
 *   FLOAT_TILE   tokens, and
 *   FLOAT_PART   vectors of a block's rows, whose sums fit into the registers together */
#define FLOAT_ROWS 32
#define FLOAT_VECS (FLOAT_ROWS / LANES)
#define FLOAT_TOKENS (40 * FLOAT_TILE)
#define DEPTH 128
#if LANES == 16
#define FLOAT_TILE 12
#define FLOAT_PART 2
#elif defined(__aarch64__)
#define FLOAT_TILE 6
#define FLOAT_PART 4
#else
#define FLOAT_TILE 6
#define FLOAT_PART 2
#endif

INLINE int64_t float_tile(int64_t tokens_left) {
    if (tokens_left >= FLOAT_TILE) return FLOAT_TILE;
    if (FLOAT_TILE > 8 && tokens_left >= 8) return 8;
    return tokens_left >= 4 ? 4 : tokens_left >= 2 ? 2 : 1;
}
INLINE int64_t float_bytes(int64_t kind) { return kind == IN_FLOAT32 ? 4 : 2; }

/* Vector v of the rows' weights in two columns, as floats */
INLINE void widen(const uint8_t *w, int v, int kind, vec *even, vec *odd) {
    const float *x = (const float *)w + v * LANES;
    const uint16_t *half = (const uint16_t *)w + v * LANES;
    if (kind == IN_BFLOAT16) {
        ivec pair = ((const ivec *)w)[v];
        *even = (vec)(pair << 16), *odd = (vec)(pair & -65536);
    } else if (kind == IN_FLOAT16) {
        *even = from_half(half), *odd = from_half(half + FLOAT_ROWS);
    } else {
        *even = load(x), *odd = load(x + FLOAT_ROWS);
    }
}

/* Add the products of some columns of a block with a tile of T tokens to y (T, FLOAT_VECS), V
 * vectors from the first one on. After inlining, kind, T and V are constants. */
INLINE void add_products(const uint8_t *w, const float *x, int64_t num_cols, vec *y, int kind,
                         int T, int first, int V) {
    const int num_bytes = 2 * FLOAT_ROWS * (kind == IN_FLOAT32 ? 4 : 2);
    vec sum[FLOAT_TILE][FLOAT_VECS];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) sum[t][v] = y[t * FLOAT_VECS + first + v];
    for (int64_t c = 0; c < num_cols; c += 2, w += num_bytes, x += 2 * T) {
        vec even[FLOAT_VECS], odd[FLOAT_VECS];
        for (int i = 0; i < num_bytes && T == 1; i += 64) fetch(w + i, T == 1);
        for (int v = 0; v < V; v++) widen(w, first + v, kind, even + v, odd + v);
        for (int t = 0; t < T; t++)
            for (int v = 0; v < V; v++) sum[t][v] = madd(splat(x[t]), even[v], sum[t][v]);
        for (int t = 0; t < T; t++)
            for (int v = 0; v < V; v++) sum[t][v] = madd(splat(x[T + t]), odd[v], sum[t][v]);
    }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) y[t * FLOAT_VECS + first + v] = sum[t][v];
}

#define FLOATS(KIND, TOKENS, PART) \
    if (kind == KIND && T == TOKENS) \
        for (int v = 0; v < FLOAT_VECS; v += PART) \
            add_products(w, x, num_cols, y, KIND, TOKENS, v, PART);
#define FLOAT_KINDS(TOKENS, PART) \
    FLOATS(IN_FLOAT32, TOKENS, PART) \
    FLOATS(IN_FLOAT16, TOKENS, PART) \
    FLOATS(IN_BFLOAT16, TOKENS, PART)
static void add_tile(const uint8_t *w, const float *x, int64_t num_cols, vec *y, int kind, int T) {
    FLOAT_KINDS(1, FLOAT_VECS)
    FLOAT_KINDS(2, FLOAT_PART)
    FLOAT_KINDS(4, FLOAT_PART)
    FLOAT_KINDS(FLOAT_TILE, FLOAT_PART)
#if FLOAT_TILE > 8
    FLOAT_KINDS(8, FLOAT_PART)
#endif
}

/* y (num_tokens, FLOAT_VECS) = a block times tokens, whose tiles are at x */
static void multiply_float_block(const matrix *m, const uint8_t *block, const float *x,
                                 int64_t num_tokens, vec *y) {
    float wide[DEPTH * FLOAT_ROWS] __attribute__((aligned(64)));
    int64_t depth = num_tokens == 1 ? m->cols : DEPTH;
    memset(y, 0, num_tokens * FLOAT_ROWS * sizeof(float));
    for (int64_t col = 0; col < m->cols; col += depth) {
        int64_t num_cols = MIN(depth, m->cols - col), kind = m->floats;
        const uint8_t *w = block + col * FLOAT_ROWS * float_bytes(kind);
        if (num_tokens > FLOAT_TILE && kind != IN_FLOAT32) {
            for (int64_t c = 0; c < num_cols; c += 2)
                for (int v = 0; v < FLOAT_VECS; v++) {
                    vec columns[2];
                    widen(w + c * FLOAT_ROWS * 2, v, kind, columns, columns + 1);
                    for (int i = 0; i < 2; i++)
                        store(wide + (c + i) * FLOAT_ROWS + v * LANES, columns[i]);
                }
            w = (const uint8_t *)wide, kind = IN_FLOAT32;
        }
        for (int64_t t = 0, T; t < num_tokens; t += T) {
            T = float_tile(num_tokens - t);
            add_tile(w, x + t * m->cols + col * T, num_cols, y + t * FLOAT_VECS, kind, T);
        }
    }
}

/* A piece is a run of blocks */
static void float_piece(const void *job, int64_t piece) {
    const linear_call *c = job;
    const matrix *m = c->parts;
    vec y[FLOAT_TOKENS * FLOAT_VECS] __attribute__((aligned(64)));
    int64_t first_block = 0, first_row = 0, last = c->num_blocks * (piece + 1) / c->num_pieces;
    for (int64_t i = c->num_blocks * piece / c->num_pieces; i < last; i++) {
        for (; (i - first_block) * FLOAT_ROWS >= m->rows; m++) {
            first_block += (m->rows + FLOAT_ROWS - 1) / FLOAT_ROWS;
            first_row += m->rows;
        }
        int64_t row = (i - first_block) * FLOAT_ROWS;
        const uint8_t *block = m->blocks + row * m->cols * float_bytes(m->floats);
        for (int64_t from = 0; from < c->num_tokens; from += FLOAT_TOKENS) {
            int64_t num = MIN(FLOAT_TOKENS, c->num_tokens - from);
            multiply_float_block(m, block, (const float *)c->acts + from * c->cols, num, y);
            for (int64_t n = 0; n < num * FLOAT_VECS; n++) {
                int64_t r = row + n % FLOAT_VECS * LANES;
                int64_t at = (from + n / FLOAT_VECS) * c->num_rows + first_row + r;
                if (r < m->rows)
                    finish_rows(m, r, y[n], c->residual ? c->residual + at : NULL, c->out + at);
            }
        }
    }
}

/* Write a piece of all tokens' operands into their tiles, 32 columns or the rest at a time */
static void spread_piece(const void *job, int64_t piece) {
    const linear_call *in = job;
    int64_t num_groups = (in->cols + 31) / 32, total = in->num_tokens * num_groups;
    int64_t i = total * piece / in->num_pieces, stop = total * (piece + 1) / in->num_pieces;
    for (int64_t token = i / num_groups, g = i % num_groups; i < stop; token++, g = 0) {
        int64_t start = token / FLOAT_TILE * FLOAT_TILE, T;
        for (; token >= start + (T = float_tile(in->num_tokens - start)); start += T) {}
        float factor = in->norm ? norm_factor(in, token) : 1;
        float *tile = (float *)in->acts + start * in->cols + token - start;
        for (; g < num_groups && i < stop; g++, i++)
            for (int64_t col = 32 * g; col < MIN(in->cols, 32 * g + 32); col += LANES) {
                vec x = operand(in, token, col, factor);
                for (int l = 0; l < LANES; l++) tile[(col + l) * T] = x[l];
            }
    }
}

static void multiply_floats(linear_call c, int64_t num_threads) {
    int64_t num_floats = c.num_tokens * c.cols;
    int is_ready = c.num_tokens == 1 && c.before == PLAIN && !c.norm;
    c.acts = is_ready ? (uint8_t *)c.x : malloc(num_floats * sizeof(float));
    c.num_pieces = num_floats < 4096 ? 1 : MIN(num_floats / 2048, PIECES * num_threads);
    if (!is_ready) share_out(spread_piece, &c, c.num_pieces, num_threads);
    c.num_pieces = product_pieces(&c, num_threads);
    share_out(float_piece, &c, c.num_pieces, num_threads);
    if (!is_ready) free(c.acts);
}

typedef struct {
    const uint8_t *rows; /* (num_rows, cols) */
    uint8_t *out;        /* a block for each 32 of them, filled up with zeros */
    int64_t num_rows, cols, floats;
} lay_floats_call;

#define TRANSPOSE(TYPE) \
    for (int64_t w = 0; w < width; w += 16) \
        for (int64_t r = 0; r < num_rows; r++) \
            for (int64_t i = w; i < MIN(width, w + 16); i++) \
    ((TYPE *)out)[i * FLOAT_ROWS + r] = ((const TYPE *)rows)[r * width + i]

static void lay_piece(const void *job, int64_t block) {
    const lay_floats_call *c = job;
    int64_t row_bytes = c->cols * float_bytes(c->floats), first = block * FLOAT_ROWS;
    int64_t num_rows = MIN(FLOAT_ROWS, c->num_rows - first), width = row_bytes / 4;
    const uint8_t *rows = c->rows + first * row_bytes;
    uint8_t *out = c->out + first * row_bytes;
    if (num_rows < FLOAT_ROWS) memset(out, 0, FLOAT_ROWS * row_bytes);
    if (c->floats == IN_FLOAT16) {
        width = c->cols;
        TRANSPOSE(uint16_t);
    } else {
        TRANSPOSE(uint32_t); /* bfloat16: two columns */
    }
}

/* Copy n blocks of rows into the layout drawn above */
void lay_floats(const void *call, int64_t n, int64_t num_threads) {
    share_out(lay_piece, call, n, num_threads);
}

/* Runs of packed matrices, and of those of floats, one after another */
void linear(const void *call, int64_t num_tokens, int64_t num_threads) {
    linear_call c = *(const linear_call *)call;
    const matrix *m = c.parts, *end = m + c.num_parts;
    c.num_tokens = num_tokens, c.cols = m->cols;
    for (const matrix *part = m; part < end; part++) c.num_rows += part->rows;
    while (m < end) {
        int64_t num_rows = 0, block_rows = m->floats ? FLOAT_ROWS : 16;
        c.parts = m, c.num_blocks = 0;
        for (; m < end && !m->floats == !c.parts->floats; m++) {
            num_rows += m->rows;
            c.num_blocks += (m->rows + block_rows - 1) / block_rows;
        }
        c.num_parts = m - c.parts;
        if (c.parts->floats)
            multiply_floats(c, num_threads);
        else
            multiply_packed(c, num_threads);
        c.out += num_rows;
        if (c.residual) c.residual += num_rows;
    }
}

/* ---- rows of GGUF's blocks, laid out for the kernels ---- */

typedef struct {
    const uint8_t *rows; /* (num_rows, cols / wide, bytes of a block) */
    uint8_t *out;        /* (num_rows / 16, cols / wide, block_bytes), as `multiply` reads them */
    int64_t num_rows, cols, type;
} lay_blocks_call;

enum { OF_Q4_0, OF_Q4_1, OF_Q5_0, OF_Q5_1, OF_Q8_0, OF_Q4_K, OF_Q5_K, OF_Q6_K };

/* A block of a row: the words of its lane in a block of 16 rows, as many for 32 columns as a code
 * has bits (see `multiply` and `code_word`), scales of 8 bits and float16 scales */
typedef struct gguf_block {
    uint32_t words[64];
    uint8_t scales[16];
    const uint8_t *halves;
} gguf_block;

static const struct gguf_type {
    int wide, num_bytes, bits, num_scales, num_halves;
} gguf_types[] = {
    [OF_Q4_0] = {32, 18, 4, 0, 1},    [OF_Q4_1] = {32, 20, 4, 0, 2},
    [OF_Q5_0] = {32, 22, 5, 0, 1},    [OF_Q5_1] = {32, 24, 5, 0, 2},
    [OF_Q8_0] = {32, 34, 8, 0, 1},    [OF_Q4_K] = {256, 144, 4, 16, 2},
    [OF_Q5_K] = {256, 176, 5, 16, 2}, [OF_Q6_K] = {256, 210, 6, 16, 1},
};

INLINE uint32_t word_at(const uint8_t *bytes, int i) {
    uint32_t word;
    memcpy(&word, bytes + 4 * i, 4);
    return word;
}

/* The words of 32 columns, whose codes have their low 4 bits in 32 bytes, `shift` bits up, and the
 * other 1 or 2 bits likewise in `high` */
INLINE void lay_codes(const uint8_t *low, int shift, const uint8_t *high, int high_shift, int bits,
                      uint32_t *words) {
    uint32_t nibbles = 0x0f0f0f0f, mask = bits == 5 ? 0x01010101 : 0x03030303;
    for (int i = 0; i < 4; i++)
        words[i] = (word_at(low, i) >> shift & nibbles) | (word_at(low, i + 4) >> shift & nibbles)
                                                              << 4;
    for (int i = 4; i < bits; i++) words[i] = 0;
    for (int i = 0; i < 8 && bits == 5; i++)
        words[4] |= (word_at(high, i) >> high_shift & mask) << i;
    for (int i = 0; i < 8 && bits == 6; i++)
        words[4 + i / 4] |= (word_at(high, i) >> high_shift & mask) << i % 4 * 2;
}

/* Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c */
INLINE void read_block(const uint8_t *b, int type, gguf_block *out) {
    uint32_t *words = out->words;
    out->halves = b;
    if (type == OF_Q4_0 || type == OF_Q4_1 || type == OF_Q5_0 || type == OF_Q5_1) {
        int is_five = type >= OF_Q5_0, has_offset = type == OF_Q4_1 || type == OF_Q5_1;
        const uint8_t *high = b + 2 + 2 * has_offset;
        memcpy(words, high + 4 * is_five, 16);
        words[4] = 0;
        for (int i = 0; i < 8 && is_five; i++) /* a byte for each of 4 bits */
            words[4] |= ((word_at(high, 0) >> 4 * i & 15) * 0x00204081 & 0x01010101) << i;
    } else if (type == OF_Q8_0) {
        for (int i = 0; i < 8; i++) words[i] = word_at(b + 2, i) ^ 0x80808080;
    } else if (type == OF_Q6_K) {
        for (int g = 0; g < 8; g++)
            lay_codes(b + g / 4 * 64 + g % 2 * 32, g % 4 / 2 * 4, b + 128 + g / 4 * 32, g % 4 * 2,
                      6, words + 6 * g);
        memcpy(out->scales, b + 192, 16);
        out->halves = b + 208;
    } else {
        int bits = type == OF_Q5_K ? 5 : 4;
        const uint8_t *s = b + 4, *high = b + 16, *low = b + (bits == 5 ? 48 : 16);
        for (int i = 0; i < 4; i++) { /* scales and minima of 6 bits */
            out->scales[2 * i] = s[i] & 63, out->scales[2 * i + 1] = s[4 + i] & 63;
            out->scales[8 + 2 * i] = (s[8 + i] & 15) | (s[i] >> 6) << 4;
            out->scales[9 + 2 * i] = s[8 + i] >> 4 | (s[4 + i] >> 6) << 4;
        }
        for (int g = 0; g < 8; g++)
            lay_codes(low + g / 2 * 32, g % 2 * 4, high, g, bits, words + bits * g);
    }
}

#define LAY(TYPE, NUM_WORDS) \
    if (c->type == TYPE) { \
        read_block(from, TYPE, &b); \
        for (int i = 0; i < NUM_WORDS; i++) memcpy(out + 64 * i + 4 * lane, b.words + i, 4); \
    }

/* A piece is 16 rows */
static void lay_blocks_piece(const void *job, int64_t piece) {
    const lay_blocks_call *c = job;
    const struct gguf_type *k = gguf_types + c->type;
    int64_t first = 16 * piece, num_wide = c->cols / k->wide, num_codes = 2 * k->wide * k->bits;
    int64_t block_bytes = num_codes + 16 * k->num_scales + 32 * k->num_halves;
    uint8_t *out = c->out + piece * num_wide * block_bytes;
    if (first + 16 > c->num_rows) memset(out, 0, num_wide * block_bytes);
    for (int64_t w = 0; w < num_wide; w++, out += block_bytes)
        for (int64_t lane = 0; lane < MIN(16, c->num_rows - first); lane++) {
            const uint8_t *from = c->rows + ((first + lane) * num_wide + w) * k->num_bytes;
            gguf_block b;
            LAY(OF_Q4_0, 4)
            LAY(OF_Q4_1, 4)
            LAY(OF_Q5_0, 5)
            LAY(OF_Q5_1, 5)
            LAY(OF_Q8_0, 8)
            LAY(OF_Q4_K, 32)
            LAY(OF_Q5_K, 40)
            LAY(OF_Q6_K, 48)
            uint8_t *at = out + num_codes;
            for (int i = 0; i < k->num_scales; i++) at[16 * i + lane] = b.scales[i];
            at += 16 * k->num_scales + 2 * lane;
            for (int i = 0; i < k->num_halves; i++) memcpy(at + 32 * i, b.halves + 2 * i, 2);
        }
}

/* Lay n blocks of 16 rows out; what is beyond the last row are zeros */
void lay_blocks(const void *call, int64_t n, int64_t num_threads) {
    share_out(lay_blocks_piece, call, n, num_threads);
}

typedef struct {
    const matrix *m;
    const int64_t *ids;
    float *out, factor;
} gather_call;

static void gather_floats(const gather_call *c, int64_t n) {
    const matrix *m = c->m;
    int64_t pair_bytes = 2 * FLOAT_ROWS * float_bytes(m->floats);
    for (int64_t i = 0; i < n * m->cols; i += 2) {
        int64_t id = c->ids[i / m->cols], lane = id % FLOAT_ROWS;
        const uint8_t *block = m->blocks + id / FLOAT_ROWS * m->cols / 2 * pair_bytes;
        vec even, odd;
        widen(block + i % m->cols / 2 * pair_bytes, lane / LANES, m->floats, &even, &odd);
        c->out[i] = even[lane % LANES] * c->factor, c->out[i + 1] = odd[lane % LANES] * c->factor;
    }
}

/* out (n, cols) = rows `ids` (n) of a matrix, times the factor */
void gather(const void *call, int64_t n, int64_t num_threads) {
    (void)num_threads;
    const gather_call *c = call;
    const matrix *m = c->m;
    if (m->floats) {
        gather_floats(c, n);
        return;
    }
    int64_t num_groups = m->cols / m->group, half = m->group / 2;
    int64_t num_bytes = m->group * m->bits / 8;
    for (int64_t i = 0; i < n * num_groups; i++) {
        int64_t id = c->ids[i / num_groups], lane = id % 16;
        const uint8_t *block = m->blocks + (id / 16 * num_groups + i % num_groups) * m->block_bytes;
        if (m->fine) {
            gather_fine(m, block, lane, c->factor, c->out + i * m->group);
            continue;
        }
        const uint8_t *scales = block + 16 * num_bytes + lane / LANES * LANES * 2;
        float scale = from_half(scales)[lane % LANES], offset = 0, *y = c->out + i * m->group;
        if (m->has_offset) offset = from_half(scales + 32)[lane % LANES];
        int zero = m->bits == 8 ? 128 : m->has_offset ? 0 : m->is_float ? 12 : 8;
        for (int64_t j = 0; j < num_bytes; j++) {
            uint8_t q = block[j / 4 * 64 + 4 * lane + j % 4];
            int low = m->bits == 8 ? q : q & 15, high = q >> 4;
            if (m->is_float) low = float4[low], high = float4[high];
            y[j] = ((low - zero) * scale + offset) * c->factor;
            if (m->bits == 4) y[j + half] = ((high - zero) * scale + offset) * c->factor;
        }
    }
}

typedef struct {
    const float *x, *weight, *bias, *residual;
    float *out;
    int64_t cols;       /* a multiple of 16 */
    int64_t num_parts;  /* of a row, each of `cols` and normed by itself; 0 stands for 1 */
    int64_t is_centred; /* whether the mean is subtracted, as in LayerNorm */
    float eps;
} norm_call;

static void norm_piece(const void *job, int64_t token) {
    const norm_call *c = job;
    const float *x = c->x + token * c->cols;
    vec sum = {0}, squares = {0}, mean = {0};
    for (int64_t i = 0; i < c->cols && c->is_centred; i += LANES) sum += load(x + i);
    if (c->is_centred) mean = splat(sum_of(sum) / c->cols);
    for (int64_t i = 0; i < c->cols; i += LANES) {
        vec centred = load(x + i) - mean;
        squares = madd(centred, centred, squares);
    }
    float factor = 1.0f / sqrtf(sum_of(squares) / c->cols + c->eps);
    for (int64_t i = 0; i < c->cols; i += LANES) {
        vec y = (load(x + i) - mean) * factor * load(c->weight + i);
        if (c->bias) y += load(c->bias + i);
        if (c->residual) y = load(c->residual + token * c->cols + i) + y;
        store(c->out + token * c->cols + i, y);
    }
}

/* out = norm(x) + residual, all (n, num_parts cols) */
void norm(const void *call, int64_t n, int64_t num_threads) {
    share_out(norm_piece, call, n * MAX(1, ((const norm_call *)call)->num_parts), num_threads);
}

/* ---- a mixture of experts ---- */

/* Weights from scores: a softmax; each score's sigmoid; for each choice, a softmax of those within
 * `jitter` of it */
enum { SOFTMAX, SIGMOID, SPARSEMIXER };

typedef struct {
    /* of each expert, then of the shared one; NULL for an expert that is left out */
    const matrix *const *gate_ups, *const *downs;
    const float *x, *gate, *bias;        /* (N, C); (E, C); (E) or NULL */
    const float *shared_gate, *residual; /* (C); (N, C); NULL for none */
    const float *routed;                 /* (N, C): the router's input; NULL for x */
    const float *correction; /* (E), added to weights for the choice alone; NULL for none */
    const float *scales;     /* (E), of the chosen experts' weights; NULL for none */
    float *out;              /* (N, C) */
    int64_t num_parts, num_experts, num_used, num_shared, is_renormalized, before, cols;
    int64_t scoring, num_groups, groups_used; /* experts are chosen in the best groups only */
    int64_t group_best;          /* so many of a group's experts decide how good it is */
    int64_t scales_input;        /* an expert's input has the weight, not its output */
    float factor, least, jitter; /* of the weights; added to their sum */
    float *weights; /* (N, E + 1), set by `experts`: each token's weight for each expert */
} experts_call;

INLINE float dot(const float *x, const float *y, int64_t n) {
    vec sum = {0};
    for (int64_t i = 0; i < n; i += LANES) sum = madd(load(x + i), load(y + i), sum);
    return sum_of(sum);
}

#define MAX_BEST 8 /* most of a group's experts that decide how good it is */
#define ROUTES 4   /* pieces that a token's scores are computed in */
static void route_piece(const void *job, int64_t piece) {
    const experts_call *c = job;
    int64_t token = piece / ROUTES, E = c->num_experts;
    const float *x = (c->routed ? c->routed : c->x) + token * c->cols;
    for (int64_t e = E * (piece % ROUTES) / ROUTES; e < E * (piece % ROUTES + 1) / ROUTES; e++)
        c->weights[token * (E + 1) + e] =
            dot(x, c->gate + e * c->cols, c->cols) + (c->bias ? c->bias[e] : 0);
}

/* The index of the largest of x (n), of equal ones the first; -1 if there is none above -inf */
INLINE int64_t largest_at(const float *x, int64_t n) {
    int64_t best = -1;
    for (int64_t e = 0; e < n; e++)
        if (x[e] > (best < 0 ? -INFINITY : x[best])) best = e;
    return best;
}

/* Set the ranks (E) of experts outside the best groups to -inf; `sums` (E) is scratch */
static void choose_groups(const experts_call *c, float *ranks, float *sums) {
    int64_t G = c->num_groups, size = c->num_experts / G;
    float kept[MAX_BEST];
    for (int64_t g = 0; g < G; g++) {
        float *group = ranks + g * size;
        int64_t places[MAX_BEST], num = 0, at;
        for (sums[g] = 0; num < c->group_best && (at = largest_at(group, size)) >= 0; num++) {
            places[num] = at, kept[num] = group[at], sums[g] += group[at], group[at] = -INFINITY;
        }
        while (num--) group[places[num]] = kept[num];
    }
    for (int64_t i = 0, g; i < c->groups_used && (g = largest_at(sums, G)) >= 0; i++)
        sums[g] = -INFINITY;
    for (int64_t g = 0; g < G; g++)
        for (int64_t e = 0; e < size && sums[g] != -INFINITY; e++) ranks[g * size + e] = -INFINITY;
}

/* A choice's weight by sparsemixer (https://arxiv.org/abs/2409.12136): the softmax of the scores
 * left that are as good as it, within the jitter */
INLINE float mixer_weight(const experts_call *c, const float *scores, const float *left,
                          int64_t best) {
    float sum = 0, most = left[best];
    for (int64_t e = 0; e < c->num_experts; e++)
        if (most - left[e] <= 2 * c->jitter * MAX(fabsf(scores[e]), most))
            sum += expf(left[e] - most);
    return 1 / sum;
}

/* A token's scores `weights` (E) -> its weights, 0 for all but the num_used experts that rank
 * highest. Of equal ones the first counts. `ranks` (3, E) is scratch. */
static void choose_experts(const experts_call *c, float *weights, const float *x, float *ranks) {
    int64_t E = c->num_experts;
    float most = weights[0], sum = 0, chosen = c->least, *used = ranks + E, *sums = used + E;
    for (int64_t e = 1; e < E; e++) most = MAX(most, weights[e]);
    for (int64_t e = 0; e < E; e++) {
        float score = weights[e];
        ranks[e] = score;
        if (c->scoring == SOFTMAX) weights[e] = expf(score - most);
        if (c->scoring == SIGMOID) weights[e] = 1 / (1 + expf(-score));
        sum += weights[e], used[e] = 0;
    }
    float total = c->scoring == SOFTMAX ? sum : 1;
    for (int64_t e = 0; e < E && (c->correction || c->num_groups > 1); e++)
        ranks[e] = weights[e] / total + (c->correction ? c->correction[e] : 0);
    if (c->num_groups > 1) choose_groups(c, ranks, sums);
    for (int64_t i = 0, best; i < c->num_used && (best = largest_at(ranks, E)) >= 0; i++) {
        used[best] = weights[best];
        if (c->scoring == SPARSEMIXER) used[best] = mixer_weight(c, weights, ranks, best);
        chosen += used[best] / total, ranks[best] = -INFINITY;
    }
    total *= c->is_renormalized ? chosen : 1;
    if (isnan(sum)) total = sum; /* passes NaN on */
    for (int64_t e = 0; e < E; e++)
        weights[e] = used[e] / total * c->factor * (c->scales ? c->scales[e] : 1);
    weights[E] = c->num_shared;
    if (c->shared_gate) weights[E] = 1 / (1 + expf(-dot(x, c->shared_gate, c->cols)));
}

/* out = residual + the weighted outputs of each token's experts, added in the experts' order */
void experts(const void *call, int64_t n, int64_t num_threads) {
    experts_call c = *(const experts_call *)call;
    int64_t E = c.num_experts, C = c.cols, num_all = E + c.num_shared, width = 0;
    for (int64_t e = 0; e < num_all; e++)
        if (c.gate_ups[e]) width = MAX(width, c.num_parts * c.gate_ups[e]->rows);
    float *x = malloc(n * C * sizeof(float)), *y = malloc(n * C * sizeof(float));
    float *hidden = malloc(n * width * sizeof(float));
    int64_t *tokens = malloc(n * sizeof(int64_t));
    float *ranks = malloc(3 * E * sizeof(float));
    c.weights = malloc(n * (E + 1) * sizeof(float));
    share_out(route_piece, &c, n * ROUTES, num_threads);
    for (int64_t t = 0; t < n; t++) choose_experts(&c, c.weights + t * (E + 1), c.x + t * C, ranks);
    if (c.residual)
        memcpy(c.out, c.residual, n * C * sizeof(float));
    else
        memset(c.out, 0, n * C * sizeof(float));
    for (int64_t e = 0; e < num_all; e++) {
        int64_t num = 0, scales_input = c.scales_input && e < E;
        for (int64_t t = 0; t < n; t++) {
            float weight = c.weights[t * (E + 1) + e];
            if (weight == 0 || !c.gate_ups[e]) continue;
            for (int64_t d = 0; d < C; d++)
                x[num * C + d] = c.x[t * C + d] * (scales_input ? weight : 1);
            tokens[num++] = t;
        }
        linear_call up = {.parts = c.gate_ups[e], .num_parts = c.num_parts, .x = x, .out = hidden};
        linear_call down = {
            .parts = c.downs[e], .num_parts = 1, .x = hidden, .out = y, .before = c.before};
        if (num) linear(&up, num, num_threads), linear(&down, num, num_threads);
        for (int64_t i = 0; i < num; i++) {
            float *out = c.out + tokens[i] * C, weight = c.weights[tokens[i] * (E + 1) + e];
            if (scales_input) weight = 1;
            for (int64_t d = 0; d < C; d += LANES)
                store(out + d, load(out + d) + load(y + i * C + d) * weight);
        }
    }
    free(x), free(y), free(hidden), free(tokens), free(ranks), free(c.weights);
}

/* ---- attention ---- */

/* A strip holds one sequence's keys and values, (2, L, Hkv, blocks of 16 positions). A block is
 *
 *   of keys     (D, 16) elements, so that each lane is a position
 *   of values   (16, D) elements, as are keys whose first `value_dim` elements are the value: then
 *               there is no other plane, and queries and keys are rotated already
 *
 * In a block of 8 bits, what is added up lies in pairs: keys are (D / 2, 16, 2) elements, values
 * (8, D, 2) of pairs of positions. It ends with its scales, (D / group, 16) float16.
 * Position p is in block p / 16; in a ring, where later positions replace earlier ones, it is in
 * block (p / 16) % ring.
 */
enum { FLOAT32, FLOAT16, Q8 };
#define CHUNK 128 /* keys of one softmax; the results of chunks are merged in their order */
#define MAX_RUN 8 /* tasks that read a chunk while it is in a cache */
#define MAX_D 576
#define NOTHING -1e30f /* stands for the largest of no scores */

/* `num_new` tokens of a sequence: positions `start`.. of its strip, rows `row`.. of the call;
 * if it is whole, each token sees those after it, too */
typedef struct {
    char *strip;
    int64_t num_blocks, start, num_new, row, is_whole;
} span;

/* The norm of queries and keys: of each head, of all heads together, of each head after RoPE */
enum { HEAD, FULL, AFTER_ROPE };

typedef struct {
    const float *qkv, *cos, *sin, *q_scale, *q_norm, *k_norm, *sinks;
    const span *spans; /* the last one is followed by one without tokens */
    float *out;        /* (N, H D) */
    int64_t norms, layer, n_layers, n_heads, n_kv_heads, head_dim, value_dim, window, ring, kind;
    int64_t block_bytes;
    int64_t norms_values;      /* values are divided by their root mean square */
    int64_t is_reader;         /* qkv has queries only: keys and values are in the strip already */
    float eps, scale, softcap; /* a scale of 0 stands for 1 / sqrt(D) */
    float *q;                  /* (N, H, D), rotated and scaled; from here on set by `attention` */
    float *partials;           /* results of each chunk of each task, if threads share tasks */
    int64_t num_chunks;        /* chunks that threads cut a task into, or 1 */
    int64_t run;               /* chunks of a task in a piece, or tasks in a piece */
    int64_t num_tasks;
} attention_call;

INLINE int64_t scale_group(int64_t D) { return D % 32 ? D : 32; }
INLINE int has_one_plane(const attention_call *c) { return c->value_dim < c->head_dim; }

INLINE char *blocks_of(const attention_call *c, const span *s, int64_t is_value, int64_t head) {
    int64_t plane = is_value && !has_one_plane(c);
    int64_t strip = (plane * c->n_layers + c->layer) * c->n_kv_heads + head;
    return s->strip + strip * s->num_blocks * c->block_bytes;
}

/* y = head h of x (.., D), normed if there is a norm (by `factor` unless that is 0), rotated to the
 * token's position, scaled */
INLINE void rotate_head(const attention_call *c, const float *x, int64_t h, const float *norm,
                        float factor, int64_t token, float scale, float *restrict y) {
    int64_t D = c->head_dim, half = D / 2;
    const float *cos = c->cos + token * half, *sin = c->sin + token * half;
    x += h * D;
    if (norm && c->norms == FULL) norm += h * D;
    if (!factor) factor = norm ? rms_factor(x, D, c->eps) : 1;
    for (int64_t d = 0; d < half; d++) {
        float a = x[d] * factor, b = x[d + half] * factor;
        if (norm && c->norms != AFTER_ROPE) a *= norm[d], b *= norm[d + half];
        y[d] = (a * cos[d] - b * sin[d]) * scale;
        y[d + half] = (b * cos[d] + a * sin[d]) * scale;
    }
    for (int64_t d = 0; d < D && norm && c->norms == AFTER_ROPE; d++) y[d] *= norm[d];
}

/* Store x (D) of one position in its block */
INLINE void store_position(const attention_call *c, const float *x, char *block, int64_t lane,
                           int is_value) {
    int64_t D = c->head_dim, group = scale_group(D), step = is_value ? 1 : 16;
    int64_t first = is_value ? lane * D : lane;
    uint16_t half[LANES];
    for (int64_t d = 0; d < D; d += LANES) {
        vec part = load(x + d);
        if (c->kind == FLOAT16) to_half(half, part);
        for (int64_t i = 0; i < LANES && c->kind != Q8; i++)
            if (c->kind == FLOAT16)
                ((uint16_t *)block)[first + (d + i) * step] = half[i];
            else
                ((float *)block)[first + (d + i) * step] = part[i];
    }
    for (int64_t g = 0; g < D / group && c->kind == Q8; g++) {
        float most = 0;
        for (int64_t d = g * group; d < (g + 1) * group; d++) most = MAX(most, fabsf(x[d]));
        float inverse = most > 0 ? 127.0f / most : 0;
        to_half(half, splat(most / 127.0f));
        ((uint16_t *)(block + 16 * D))[g * 16 + lane] = half[0];
        for (int64_t d = g * group; d < (g + 1) * group; d++) {
            int64_t pair = is_value ? lane / 2 * D + d : d / 2 * 16 + lane;
            int64_t at = 2 * pair + (is_value ? lane : d) % 2;
            ((int8_t *)block)[at] = (int8_t)lrintf(x[d] * inverse);
        }
    }
}

/* Bring the line at p from memory into the second cache. */
INLINE void fetch_soon(const char *p) { __builtin_prefetch(p, 0, 2); }

/* LANES floats of a block, from element `at` on */
INLINE vec elements(const char *block, int64_t at, int kind) {
    if (kind == FLOAT32) return load((const float *)block + at);
    return from_half((const uint16_t *)block + at);
}

/* LANES elements of the value of position i of a block, from column d on */
INLINE vec value_part(const char *block, int64_t D, int64_t i, int64_t d, int kind) {
    if (kind != Q8) return elements(block, i * D + d, kind);
    ivec pairs = from_pairs(block + i / 2 * 2 * D + 2 * d);
    return __builtin_convertvector(i % 2 ? pairs >> 16 : pairs << 16 >> 16, vec);
}

/* Up to ROWS queries of one sequence and one key/value head; query r sees keys from[r] .. to[r] */
typedef struct {
    const span *s;
    int64_t head, first_row, num_rows, first_chunk, end;
    int32_t from[ROWS], to[ROWS];
} task;

/* The result of R queries over some keys: the largest score m, the sum l of exp(score - m), and the
 * sum y of the values, each times its exp(score - m): m (ROWS) | l (ROWS) | y (ROWS, D) */
#define PARTIAL(D) (ROWS * (2 + (D)))

/* dot (R, VECS) = scores of a block's keys for queries q (R, D), if keys lie as values do */
INLINE void score_rows(const attention_call *c, const float *q, const char *block, vec (*dot)[VECS],
                       int R, int kind) {
    int64_t D = c->head_dim, group = kind == Q8 ? scale_group(D) : D;
    for (int64_t i = 0; i < 16; i++) {
        vec sum[ROWS], part[ROWS];
        for (int r = 0; r < R; r++) sum[r] = (vec){0};
        for (int64_t g = 0; g < D; g += group) {
            for (int r = 0; r < R; r++) part[r] = (vec){0};
            for (int64_t d = g; d < g + group; d += LANES) {
                vec key = value_part(block, D, i, d, kind);
                for (int r = 0; r < R; r++) part[r] = madd(load(q + r * D + d), key, part[r]);
            }
            const char *scales = block + 16 * D + g / group * 32;
            float scale = kind == Q8 ? from_half(scales + i / LANES * LANES * 2)[i % LANES] : 1;
            for (int r = 0; r < R; r++) sum[r] = madd(part[r], splat(scale), sum[r]);
        }
        for (int r = 0; r < R; r++) dot[r][i / LANES][i % LANES] = sum_of(sum[r]);
    }
}

/* dot (R, VECS) = scores of a block's keys for queries q (D, ROWS). Meanwhile, what is at `next` is
 * fetched: as many bytes as the keys take. */
INLINE void score_lanes(const attention_call *c, const float *q, const char *block,
                        const char *next, vec (*dot)[VECS], int R, int kind) {
    for (int64_t d = 0; d < c->head_dim; d++) {
        vec key[VECS];
        for (int v = 0; v < VECS; v++) key[v] = elements(block, 16 * d + v * LANES, kind);
        fetch_soon(next + d * 16 * (kind == FLOAT32 ? 4 : 2));
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++)
                dot[r][v] = accumulate(dot[r][v], splat(q[d * ROWS + r]), key[v]);
    }
}

/* The same of keys of 8 bits, for queries (D / 2, ROWS) of pairs of int16 with their units */
INLINE void score_pairs(const attention_call *c, const float *tile, const char *block,
                        const char *next, vec (*dot)[VECS], int R) {
    int64_t D = c->head_dim, group = scale_group(D);
    const int16_t *q = (const int16_t *)tile;
    for (int64_t g = 0; g < D; g += group) {
        ivec part[ROWS][VECS], key[VECS];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++) part[r][v] = (ivec){0};
        for (int64_t d = g; d < g + group; d += 4) {
            fetch_soon(next + d * 16);
            for (int64_t i = d; i < d + 4; i += 2) {
                for (int v = 0; v < VECS; v++) key[v] = from_pairs(block + 16 * i + 2 * v * LANES);
                for (int r = 0; r < R; r++)
                    for (int v = 0; v < VECS; v++)
                        part[r][v] = dot2(part[r][v], key[v], q + (i * ROWS + 2 * r));
            }
        }
        const char *scales = block + 16 * D + g / group * 32;
        for (int v = 0; v < VECS; v++) {
            vec scale = from_half(scales + v * LANES * 2);
            for (int r = 0; r < R; r++)
                dot[r][v] = madd(__builtin_convertvector(part[r][v], vec), scale, dot[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECS; v++) dot[r][v] *= tile[D * ROWS + r];
}

/* p (R, CHUNK) = products of a tile of queries and `num_keys` keys. Meanwhile, what is at `next` is
 * fetched. */
INLINE void score(const attention_call *c, const float *q, const char *keys, const char *next,
                  int64_t num_keys, float *p, int R, int kind) {
    for (int64_t k = 0; k < num_keys; k += 16) {
        int64_t at = k / 16 * c->block_bytes;
        vec dot[ROWS][VECS];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++) dot[r][v] = (vec){0};
        if (has_one_plane(c))
            score_rows(c, q, keys + at, dot, R, kind);
        else if (kind == Q8)
            score_pairs(c, q, keys + at, next + at, dot, R);
        else
            score_lanes(c, q, keys + at, next + at, dot, R, kind);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECS; v++) store(p + r * CHUNK + k + v * LANES, dot[r][v]);
    }
}

/* p (R, CHUNK) = exp(score - m) of the scores of `num_keys` keys from `first` on, but 0 for a key
 * that a query does not see; m (R), the largest score; l (R), the sum of p */
static void softmax(const attention_call *c, const task *t, int64_t first, int64_t num_keys,
                    float *p, float *m, float *l) {
    ivec lanes = {0};
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    for (int64_t r = 0; r < t->num_rows; r++, p += CHUNK) {
        const int sees_all = t->from[r] <= first && t->to[r] >= first + CHUNK;
        vec most = splat(NOTHING), sum = {0};
        for (int64_t k = 0; k < num_keys; k += LANES) {
            vec x = load(p + k);
            if (c->softcap) /* c tanh(x / c) */
                x = c->softcap - 2 * c->softcap / (1.0f + exp_of(x * (2 / c->softcap)));
            if (!sees_all) {
                ivec place = lanes + (int32_t)(first + k);
                x = pick((place >= t->from[r]) & (place < t->to[r]), x, splat(-INFINITY));
            }
            most = larger(most, x);
            store(p + k, x);
        }
        m[r] = largest_of(most);
        for (int64_t k = 0; k < num_keys; k += LANES) {
            vec weight = exp_up_to_88(load(p + k) - m[r]);
            store(p + k, weight);
            sum += weight;
        }
        l[r] = sum_of(sum);
    }
}

/* y (R, D), V vectors from column d on, = p (R, CHUNK) times the values of `num_keys` positions.
 * Meanwhile, what is at `next` is fetched: about as many bytes as the values take. */
INLINE void weigh_columns(const attention_call *c, const float *p, const char *values,
                          const char *next, int64_t num_keys, int64_t d, float *y, int R, int V,
                          int kind) {
    int64_t D = c->head_dim;
    vec sum[ROWS][2], value[2];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = (vec){0};
    for (int64_t first = 0; first < num_keys; first += 16) {
        const char *block = values + first / 16 * c->block_bytes;
        for (int64_t k = first; k < MIN(first + 16, num_keys); k++) {
            int64_t at = k % 16 * D + d;
            for (int v = 0; v < V; v++) value[v] = elements(block, at + v * LANES, kind);
            fetch_soon(next), next += V * LANES * (kind == FLOAT32 ? 4 : 2);
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++)
                    sum[r][v] = accumulate(sum[r][v], splat(p[r * CHUNK + k]), value[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(y + r * D + d + v * LANES, sum[r][v]);
}
INLINE void weigh(const attention_call *c, const float *p, const char *values, const char *next,
                  int64_t num_keys, float *y, int R, int kind) {
    int64_t d = 0, bytes = num_keys * (kind == FLOAT32 ? 4 : 2);
    for (; d + 2 * LANES <= c->value_dim; d += 2 * LANES)
        weigh_columns(c, p, values, next + d * bytes, num_keys, d, y, R, 2, kind);
    if (d < c->value_dim) weigh_columns(c, p, values, next + d * bytes, num_keys, d, y, R, 1, kind);
}

/* The largest scale of group g of the values that a query sees, positions from .. to of a chunk;
 * factors (num_keys) = scales as parts of it, times 32767, and 0 for the others */
INLINE float scale_factors(const attention_call *c, const char *values, int64_t g, int64_t from,
                           int64_t to, int64_t num_keys, float *factors) {
    vec most = {0};
    ivec lanes = {0};
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    for (int64_t k = 0; k < num_keys; k += LANES) {
        const char *scales = values + k / 16 * c->block_bytes + 16 * c->head_dim + g * 32;
        ivec place = lanes + (int32_t)k, seen = (place >= (int32_t)from) & (place < (int32_t)to);
        vec scale = pick(seen, from_half(scales + k % 16 * 2), (vec){0});
        most = larger(scale, most);
        store(factors + k, scale);
    }
    float largest = largest_of(most), inverse = largest > 0 ? 32767.0f / largest : 0;
    for (int64_t k = 0; k < num_keys; k += LANES) store(factors + k, load(factors + k) * inverse);
    return largest;
}

/* `weigh` for values of 8 bits: weights times scales become int16, of the largest scale */
INLINE void weigh_pairs(const attention_call *c, const task *t, const float *p, const char *values,
                        const char *next, int64_t first, int64_t num_keys, float *y, int R) {
    int64_t D = c->head_dim, group = scale_group(D), num_pairs = (num_keys + 1) / 2;
    int16_t weights[ROWS * CHUNK];
    int64_t seen_from = 0, seen_to = 0;
    float factors[CHUNK], unit[ROWS] = {0};
    for (int64_t d = 0; d < c->value_dim; d += 2 * LANES) {
        const int two = d + 2 * LANES <= c->value_dim;
        ivec sum[ROWS][2];
        for (int r = 0; r < R && d % group == 0; r++) {
            int64_t from = MAX(0, t->from[r] - first), to = MIN(num_keys, t->to[r] - first);
            if (r && from == seen_from && to == seen_to)
                unit[r] = unit[r - 1];
            else
                unit[r] = scale_factors(c, values, d / group, from, to, num_keys, factors) / 32767;
            seen_from = from, seen_to = to;
            for (int64_t k = 0; k < num_keys; k += LANES) {
                vec w = madd(load(p + r * CHUNK + k), load(factors + k), splat(ROUNDER));
                to_int16(weights + r * CHUNK + k, (ivec)w - (ivec)splat(ROUNDER));
            }
        }
        for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = (ivec){0};
        for (int64_t i = 0; i < num_pairs; i += 8) {
            const char *block = values + i / 8 * c->block_bytes + 2 * d;
            for (int64_t k = i; k < MIN(num_pairs, i + 8); k++, block += 2 * D, next += 4 * LANES) {
                ivec v = from_pairs(block), v2 = {0};
                if (two) v2 = from_pairs(block + 2 * LANES);
                fetch_soon(next);
                for (int r = 0; r < R; r++) {
                    sum[r][0] = dot2(sum[r][0], v, weights + r * CHUNK + 2 * k);
                    sum[r][1] = dot2(sum[r][1], v2, weights + r * CHUNK + 2 * k);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            store(y + r * D + d, __builtin_convertvector(sum[r][0], vec) * unit[r]);
            if (two)
                store(y + r * D + d + LANES, __builtin_convertvector(sum[r][1], vec) * unit[r]);
        }
    }
}

/* The loops over a tile of R rows are functions of their own: inlined into one, they would share
 * registers with all that surrounds them. */
#define KERNELS(R, KIND) \
    static NOINLINE void score_##R##_##KIND(const attention_call *c, const float *q, \
                                            const char *keys, const char *next, int64_t num_keys, \
                                            float *p) { \
        score(c, q, keys, next, num_keys, p, R, KIND); \
    } \
    static NOINLINE void weigh_##R##_##KIND(const attention_call *c, const task *t, \
                                            const float *p, const char *values, const char *next, \
                                            int64_t first, int64_t num_keys, float *y) { \
        if (KIND == Q8) \
            weigh_pairs(c, t, p, values, next, first, num_keys, y, R); \
        else \
            weigh(c, p, values, next, num_keys, y, R, KIND); \
    }
#define ATTEND(R, KIND) \
    if (num_rows == R && c->kind == KIND) { \
        score_##R##_##KIND(c, q, keys, values, num_keys, p); \
        softmax(c, t, first, num_keys, p, out, out + ROWS); \
        weigh_##R##_##KIND(c, t, p, values, next, first, num_keys, out + 2 * ROWS); \
        return; \
    }
#define EACH_KIND(DO, R) DO(R, FLOAT32) DO(R, FLOAT16) DO(R, Q8)
#define UP_TO_4_ROWS(DO) EACH_KIND(DO, 1) EACH_KIND(DO, 2) EACH_KIND(DO, 3) EACH_KIND(DO, 4)
#if ROWS == 8
#define EACH_SIZE(DO) UP_TO_4_ROWS(DO) EACH_KIND(DO, 6) EACH_KIND(DO, 8)
#elif ROWS == 6
#define EACH_SIZE(DO) UP_TO_4_ROWS(DO) EACH_KIND(DO, 6)
#else
#define EACH_SIZE(DO) UP_TO_4_ROWS(DO)
#endif
EACH_SIZE(KERNELS)

static void attend_chunk(const attention_call *c, const task *t, const float *q, int64_t chunk,
                         float *out) {
    float p[ROWS * CHUNK];
    int64_t first = chunk * CHUNK, num_keys = MIN(t->end - first, CHUNK);
    int64_t at = first / 16 % c->ring * c->block_bytes;
    const char *keys = blocks_of(c, t->s, 0, t->head), *next = keys;
    const char *values = blocks_of(c, t->s, 1, t->head) + at;
    int is_last = first + num_keys == t->end;
    next += (is_last ? first : first + CHUNK) / 16 % c->ring * c->block_bytes;
    keys += at;
    int num_rows = t->num_rows + (t->num_rows == 5 || t->num_rows == 7);
    EACH_SIZE(ATTEND)
}

/* The result over no keys; with sinks, over the sink's score with a value of 0 */
INLINE void clear(const attention_call *c, const task *t, float *sum) {
    int64_t heads = c->n_heads / c->n_kv_heads;
    memset(sum, 0, PARTIAL(c->head_dim) * sizeof(float));
    for (int r = 0; r < ROWS; r++) {
        sum[r] = c->sinks ? c->sinks[t->head * heads + (t->first_row + r) % heads] : NOTHING;
        if (c->sinks) sum[ROWS + r] = 1;
    }
}

/* Add the result of a chunk to `sum` (https://arxiv.org/abs/2112.05682) */
INLINE void merge(const task *t, float *sum, const float *chunk, int64_t D) {
    for (int r = 0; r < t->num_rows; r++) {
        float m = MAX(sum[r], chunk[r]), *y = sum + 2 * ROWS + r * D;
        float old = exp_of(splat(sum[r] - m))[0], new = exp_of(splat(chunk[r] - m))[0];
        sum[r] = m;
        sum[ROWS + r] = sum[ROWS + r] * old + chunk[ROWS + r] * new;
        for (int64_t d = 0; d < D; d += LANES)
            store(y + d, load(y + d) * old + load(chunk + 2 * ROWS + r * D + d) * new);
    }
}

static task find_task(const attention_call *c, int64_t index) {
    int64_t heads = c->n_heads / c->n_kv_heads, num_tiles;
    task t = {.s = c->spans};
    for (;; t.s++) {
        num_tiles = (t.s->num_new * heads + ROWS - 1) / ROWS;
        if (index < num_tiles * c->n_kv_heads) break;
        index -= num_tiles * c->n_kv_heads;
    }
    t.head = index / num_tiles;
    t.first_row = index % num_tiles * ROWS;
    t.num_rows = MIN(ROWS, t.s->num_new * heads - t.first_row);
    for (int r = 0; r < ROWS; r++) {
        t.end = t.s->start + (t.first_row + MIN(r, t.num_rows - 1)) / heads + 1;
        t.from[r] = c->window > 0 ? MAX(0, t.end - c->window) : 0;
        if (c->window < 0) t.from[r] = (t.end - 1) / -c->window * -c->window; /* a chunk's first */
        if (t.s->is_whole) t.end = t.s->start + t.s->num_new;
        t.to[r] = t.end;
    }
    t.first_chunk = t.from[0] / CHUNK;
    return t;
}

/* The place of row r of a task among all tokens' heads (N, H) */
INLINE int64_t place(const attention_call *c, const task *t, int64_t r) {
    int64_t heads = c->n_heads / c->n_kv_heads, row = t->first_row + r;
    int64_t token = t->s->row + row / heads;
    return token * c->n_heads + t->head * heads + row % heads;
}

INLINE void finish(const attention_call *c, const task *t, const float *sum) {
    int64_t D = c->head_dim;
    for (int64_t r = 0; r < t->num_rows; r++) {
        float *out = c->out + place(c, t, r) * c->value_dim;
        for (int64_t d = 0; d < c->value_dim; d += LANES)
            store(out + d, load(sum + 2 * ROWS + r * D + d) / sum[ROWS + r]);
    }
}

/* A piece is a token: its queries go to q, its keys and values to the strip */
static void place_piece(const void *job, int64_t piece) {
    const attention_call *c = job;
    int64_t H = c->n_heads, Hkv = c->n_kv_heads, D = c->head_dim;
    const span *s = c->spans;
    for (; piece >= s->num_new; s++) piece -= s->num_new;
    int64_t token = s->row + piece, at = s->start + piece;
    int64_t block = at / 16 % c->ring * c->block_bytes;
    int64_t num_new = c->is_reader ? 0 : (has_one_plane(c) ? 1 : 2) * Hkv;
    const float *x = c->qkv + token * (H + num_new) * D;
    const float *keys = x + H * D;
    float scale = c->scale * (c->q_scale ? c->q_scale[token] : 1), of_q = 0, of_k = 0;
    if (has_one_plane(c)) {
        for (int64_t i = 0; i < H * D; i++) c->q[token * H * D + i] = x[i] * scale;
        for (int64_t h = 0; h < Hkv; h++)
            store_position(c, keys + h * D, blocks_of(c, s, 0, h) + block, at % 16, 1);
        return;
    }
    if (c->norms == FULL)
        of_q = rms_factor(x, H * D, c->eps), of_k = rms_factor(keys, Hkv * D, c->eps);
    for (int64_t h = 0; h < H; h++)
        rotate_head(c, x, h, c->q_norm, of_q, token, scale, c->q + (token * H + h) * D);
    for (int64_t h = 0; h < Hkv && !c->is_reader; h++) {
        float key[MAX_D], value[MAX_D];
        rotate_head(c, keys, h, c->k_norm, of_k, token, 1, key);
        store_position(c, key, blocks_of(c, s, 0, h) + block, at % 16, 0);
        const float *v = x + (H + Hkv + h) * D;
        float factor = c->norms_values ? rms_factor(v, D, c->eps) : 1;
        for (int64_t d = 0; d < D && c->norms_values; d++) value[d] = v[d] * factor;
        v = c->norms_values ? value : v;
        store_position(c, v, blocks_of(c, s, 1, h) + block, at % 16, 1);
    }
}

/* Queries of a task as `score` reads them. The last query pads the tile.
 *
 *   of keys in floats   (D, ROWS)
 *   of keys of 8 bits   (D / 2, ROWS, 2) int16, then the unit of each (ROWS)
 *   of keys that lie as values do   (ROWS, D) */
#define QUERIES(D) (ROWS * ((D) + 1))
static void lay_queries(const attention_call *c, const task *t, float *tile) {
    int64_t D = c->head_dim;
    for (int64_t r = 0; r < ROWS; r++) {
        const float *q = c->q + place(c, t, MIN(r, t->num_rows - 1)) * D;
        float most = 0, sum = 0;
        for (int64_t d = 0; d < D; d++) most = MAX(most, fabsf(q[d])), sum += q[d] * 0;
        float inverse = most > 0 ? 32767.0f / most : 0;
        for (int64_t d = 0; d < D; d++)
            if (has_one_plane(c))
                tile[r * D + d] = q[d];
            else if (c->kind == Q8)
                ((int16_t *)tile)[(d / 2 * ROWS + r) * 2 + d % 2] = (int16_t)lrintf(q[d] * inverse);
            else
                tile[d * ROWS + r] = q[d];
        if (c->kind == Q8 && !has_one_plane(c))
            tile[D * ROWS + r] = most / 32767.0f + sum; /* NaN if any is NaN or infinite */
    }
}

/* A piece is a run of chunks of a task */
static void attend_run(const void *job, int64_t piece) {
    const attention_call *c = job;
    float tile[QUERIES(MAX_D)];
    int64_t num_runs = (c->num_chunks + c->run - 1) / c->run, index = piece / num_runs;
    task t = find_task(c, index);
    int64_t first = piece % num_runs * c->run, stop = MIN(first + c->run, c->num_chunks);
    lay_queries(c, &t, tile);
    for (int64_t i = MAX(first, t.first_chunk); i < stop && i * CHUNK < t.end; i++)
        attend_chunk(c, &t, tile, i,
                     c->partials + (index * c->num_chunks + i) * PARTIAL(c->head_dim));
}

/* A piece is a run of tasks. Those of one head read each chunk one after another. */
static void attend_tasks(const void *job, int64_t piece) {
    const attention_call *c = job;
    int64_t D = c->head_dim, first = piece * c->run, num = MIN(c->run, c->num_tasks - first);
    int64_t chunk = INT64_MAX, end = 0;
    float one[PARTIAL(MAX_D)], *tiles = malloc(num * (QUERIES(D) + PARTIAL(D)) * sizeof(float));
    float *sums = tiles + num * QUERIES(D);
    task tasks[MAX_RUN];
    for (int64_t i = 0; i < num; i++) {
        tasks[i] = find_task(c, first + i);
        lay_queries(c, tasks + i, tiles + i * QUERIES(D));
        clear(c, tasks + i, sums + i * PARTIAL(D));
        chunk = MIN(chunk, tasks[i].first_chunk), end = MAX(end, tasks[i].end);
    }
    for (; chunk * CHUNK < end; chunk++)
        for (int64_t i = 0; i < num; i++) {
            if (chunk < tasks[i].first_chunk || chunk * CHUNK >= tasks[i].end) continue;
            attend_chunk(c, tasks + i, tiles + i * QUERIES(D), chunk, one);
            merge(tasks + i, sums + i * PARTIAL(D), one, D);
        }
    for (int64_t i = 0; i < num; i++) finish(c, tasks + i, sums + i * PARTIAL(D));
    free(tiles);
}

static void merge_piece(const void *job, int64_t piece) {
    const attention_call *c = job;
    float sum[PARTIAL(MAX_D)];
    task t = find_task(c, piece);
    clear(c, &t, sum);
    for (int64_t chunk = t.first_chunk; chunk * CHUNK < t.end; chunk++)
        merge(&t, sum, c->partials + (piece * c->num_chunks + chunk) * PARTIAL(c->head_dim),
              c->head_dim);
    finish(c, &t, sum);
}

/* Rotate queries and keys, store keys and values, attend. If there are fewer tasks than threads can
 * share, threads share the tasks' chunks; the arithmetic is the same. */
void attention(const void *call, int64_t num_tokens, int64_t num_threads) {
    attention_call c = *(const attention_call *)call;
    if (!c.scale) c.scale = 1.0f / sqrtf(c.head_dim);
    c.num_chunks = 1;
    int64_t num_new = 0, num_chunks = 1, num_pieces;
    c.num_tasks = 0;
    for (const span *s = c.spans; s->num_new; s++) {
        num_new += s->num_new;
        c.num_tasks += (s->num_new * (c.n_heads / c.n_kv_heads) + ROWS - 1) / ROWS * c.n_kv_heads;
        num_chunks = MAX(num_chunks, (s->start + s->num_new - 1) / CHUNK + 1);
    }
    if (c.num_tasks < 2 * num_threads) c.num_chunks = num_chunks;
    int64_t row_bytes = c.n_heads * c.value_dim * sizeof(float);
    for (int64_t row = num_new; row < num_tokens; row++) /* rows that pad the batch */
        memset((char *)c.out + row * row_bytes, 0, row_bytes);
    c.q = malloc(num_tokens * c.n_heads * c.head_dim * sizeof(float));
    share_out(place_piece, &c, num_new, num_new < 4 ? 1 : num_threads);
    num_pieces = 2 * PIECES * num_threads;
    if (c.num_chunks > 1) {
        c.partials = malloc(c.num_tasks * num_chunks * PARTIAL(c.head_dim) * sizeof(float));
        c.run = MAX(1, c.num_tasks * num_chunks / num_pieces);
        num_pieces = (num_chunks + c.run - 1) / c.run * c.num_tasks;
        share_out(attend_run, &c, num_pieces, num_threads);
        share_out(merge_piece, &c, c.num_tasks, num_threads);
    } else {
        c.run = MAX(1, MIN(MAX_RUN, c.num_tasks / num_pieces));
        share_out(attend_tasks, &c, (c.num_tasks + c.run - 1) / c.run, num_threads);
    }
    free(c.q);
    free(c.partials);
}

/* ---- latent attention ---- */

/* Rows of `out` (n, out_stride) = m times rows of x (n, stride), on this thread */
static void multiply_head(const matrix *m, const float *x, int64_t stride, float *out,
                          int64_t out_stride, int64_t n) {
    float *from = malloc(n * m->cols * sizeof(float)), *to = malloc(n * m->rows * sizeof(float));
    for (int64_t t = 0; t < n; t++)
        memcpy(from + t * m->cols, x + t * stride, m->cols * sizeof(float));
    linear_call call = {.parts = m, .num_parts = 1, .x = from, .out = to};
    linear(&call, n, 1);
    for (int64_t t = 0; t < n; t++)
        memcpy(out + t * out_stride, to + t * m->rows, m->rows * sizeof(float));
    free(from), free(to);
}

typedef struct {
    const matrix *parts; /* of each head */
    const float *x;      /* (N, H, cols) */
    float *out;          /* (N, H, rows) */
    int64_t num_heads;
    int64_t n; /* set by `head_linear` */
} head_linear_call;

static void head_linear_piece(const void *job, int64_t h) {
    const head_linear_call *c = job;
    const matrix *m = c->parts + h;
    multiply_head(m, c->x + h * m->cols, c->num_heads * m->cols, c->out + h * m->rows,
                  c->num_heads * m->rows, c->n);
}

/* Each head's matrix times its own columns of x */
void head_linear(const void *call, int64_t n, int64_t num_threads) {
    head_linear_call c = *(const head_linear_call *)call;
    c.n = n;
    share_out(head_linear_piece, &c, c.num_heads, num_threads);
}

typedef struct {
    const matrix *parts;           /* of each head, (latent, nope) */
    const float *q, *kv;           /* (N, H, nope + rope), (N, latent + rope) */
    const float *norm, *cos, *sin; /* (latent), (N, D / 2) each */
    float *out;                    /* (N, H + 1, D), D = latent + rope: queries, then the key */
    int64_t num_heads, nope, rope, latent;
    float eps;
    int64_t n; /* set by `latent_heads` */
} latent_heads_call;

/* A piece is a head, whose queries it makes into queries to latents; the last one is the key */
static void latent_heads_piece(const void *job, int64_t h) {
    const latent_heads_call *c = job;
    int64_t H = c->num_heads, D = c->latent + c->rope, half = c->rope / 2,
            width = c->nope + c->rope;
    if (h < H)
        multiply_head(c->parts + h, c->q + h * width, H * width, c->out + h * D, (H + 1) * D, c->n);
    for (int64_t t = 0; t < c->n; t++) {
        const float *x = h < H ? c->q + (t * H + h) * width + c->nope : c->kv + t * D + c->latent;
        const float *cos = c->cos + t * (D / 2), *sin = c->sin + t * (D / 2);
        float *y = c->out + (t * (H + 1) + h) * D, factor = 1;
        if (h == H) factor = rms_factor(c->kv + t * D, c->latent, c->eps);
        for (int64_t d = 0; d < c->latent && h == H; d++)
            y[d] = c->kv[t * D + d] * factor * c->norm[d];
        for (int64_t d = 0; d < half; d++) {
            y[c->latent + d] = x[d] * cos[d] - x[d + half] * sin[d];
            y[c->latent + d + half] = x[d + half] * cos[d] + x[d] * sin[d];
        }
    }
}

/* Queries to latents, and the keys: latents, normed, and one rotated key for all heads */
void latent_heads(const void *call, int64_t n, int64_t num_threads) {
    latent_heads_call c = *(const latent_heads_call *)call;
    c.n = n;
    share_out(latent_heads_piece, &c, c.num_heads + 1, num_threads);
}

/* ---- layers with a state ---- */

/* `num_new` tokens of a sequence, rows `row`.. of the call; `state` has those of all layers */
typedef struct {
    float *state;
    int64_t num_new, row;
} state_span;

#define MAX_TAPS 8
#define CONV_BLOCK 64 /* channels of a piece */

/* y[t] = sum of weight[j] x[t - taps + 1 + j] over taps j, for each channel of a sequence.
 * The state has the last taps - 1 inputs, the oldest first. An input may be a product of two. */
typedef struct {
    const float *x, *times;     /* (N, stride) each */
    const float *weight, *bias; /* (taps, channels), (channels) */
    const float *gate;          /* (N, stride): multiplies y */
    const state_span *spans;
    float *out; /* (N, channels) */
    int64_t stride, channels, taps, first, with_silu;
} conv_job;

static void conv_piece(const void *job, int64_t piece) {
    const conv_job *j = job;
    int64_t num_blocks = (j->channels + CONV_BLOCK - 1) / CONV_BLOCK, last = j->taps - 1;
    const state_span *s = j->spans + piece / num_blocks;
    int64_t start = piece % num_blocks * CONV_BLOCK, stop = MIN(j->channels, start + CONV_BLOCK);
    for (int64_t c = start; c < stop; c += LANES) {
        vec past[MAX_TAPS];
        float *tail = s->state + j->first + c;
        for (int64_t i = 0; i < last; i++) past[i] = load(tail + i * j->channels);
        for (int64_t t = 0; t < s->num_new; t++) {
            int64_t at = (s->row + t) * j->stride + c;
            past[last] = load(j->x + at);
            if (j->times) past[last] *= load(j->times + at);
            vec y = j->bias ? load(j->bias + c) : (vec){0};
            for (int64_t i = 0; i <= last; i++)
                y = madd(load(j->weight + i * j->channels + c), past[i], y);
            if (j->with_silu) y = y / (1.0f + exp_of(-y));
            if (j->gate) y *= load(j->gate + at);
            store(j->out + (s->row + t) * j->channels + c, y);
            for (int64_t i = 0; i < last; i++) past[i] = past[i + 1];
        }
        for (int64_t i = 0; i < last; i++) store(tail + i * j->channels, past[i]);
    }
}

static int64_t count_spans(const state_span *spans) {
    int64_t num = 0;
    while (spans[num].num_new) num++;
    return num;
}

static void convolve(const conv_job *j, int64_t num_threads) {
    int64_t num_blocks = (j->channels + CONV_BLOCK - 1) / CONV_BLOCK;
    share_out(conv_piece, j, count_spans(j->spans) * num_blocks, num_threads);
}

typedef struct {
    const float *x, *conv, *bias; /* (N, 3 C): B | C | x; (taps, C); (C) or NULL */
    const state_span *spans;      /* the last one is followed by one without tokens */
    float *out;                   /* (N, C) */
    int64_t cols, taps, first;
} short_conv_call;

/* out = C conv(B x) */
void short_conv(const void *call, int64_t n, int64_t num_threads) {
    (void)n;
    const short_conv_call *c = call;
    conv_job j = {.x = c->x + 2 * c->cols, .times = c->x, .gate = c->x + c->cols, .out = c->out};
    j.weight = c->conv, j.bias = c->bias, j.spans = c->spans, j.stride = 3 * c->cols;
    j.channels = c->cols, j.taps = c->taps, j.first = c->first;
    convolve(&j, num_threads);
}

/* A state: the convolution's, then for each value head a matrix S in blocks of 16 of its columns,
 * (Hv, value width / 16, key width, 16), so that a block stays in the first cache. */
typedef struct {
    const float *x, *ba;      /* (N, width): q | k | v | z, of which q | k | v convolved; b | a */
    const float *conv, *norm; /* (taps, columns of q | k | v), (value width) */
    const float *A, *dt_bias; /* (Hv) each */
    const state_span *spans;  /* the last one is followed by one without tokens */
    float *out;               /* (N, Hv value width) */
    int64_t taps, k_heads, v_heads, k_dim, v_dim, first, is_tiled;
    float eps, most; /* of beta */
    float *mixed;    /* (N, columns of q | k | v), convolved; from here on set by `delta_net` */
    float *factors;  /* (N, 2 Hk + 2 Hv): of q, of k, exp(g), beta */
    int64_t channels, width;
} delta_net_call;

INLINE int64_t row_of(const state_span *s, int64_t token) {
    for (; token >= s->num_new; s++) token -= s->num_new;
    return s->row + token;
}

/* A piece is a token: lengths of q and k become factors, a and b become exp(g) and beta */
static void factor_piece(const void *job, int64_t piece) {
    const delta_net_call *c = job;
    int64_t row = row_of(c->spans, piece), Hk = c->k_heads, Hv = c->v_heads, D = c->k_dim;
    const float *q = c->mixed + row * c->channels, *k = q + Hk * D;
    const float *b = c->ba + row * 2 * Hv, *a = b + Hv;
    float *f = c->factors + row * 2 * (Hk + Hv);
    for (int64_t h = 0; h < Hk; h++) {
        f[h] = 1.0f / sqrtf(dot(q + h * D, q + h * D, D) + 1e-6f) / sqrtf(D);
        f[Hk + h] = 1.0f / sqrtf(dot(k + h * D, k + h * D, D) + 1e-6f);
    }
    for (int64_t h = 0; h < Hv; h++) {
        float y = a[h] + c->dt_bias[h], softplus = y > 20 ? y : log1pf(expf(y));
        f[2 * Hk + h] = expf(c->A[h] * softplus);
        f[2 * Hk + Hv + h] = c->most / (1.0f + expf(-b[h]));
    }
}

/* A piece is a value head of a sequence: its tokens one after another, 16 columns of S at a time */
static void recur_piece(const void *job, int64_t piece) {
    const delta_net_call *c = job;
    int64_t Hk = c->k_heads, Hv = c->v_heads, D = c->k_dim, E = c->v_dim;
    const state_span *s = c->spans + piece / Hv;
    int64_t h = piece % Hv, kh = c->is_tiled ? h % Hk : h / (Hv / Hk);
    float *head = s->state + c->first + (c->taps - 1) * c->channels + h * D * E;
    for (int64_t col = 0; col < E; col += 16)
        for (int64_t t = 0; t < s->num_new; t++) {
            const float *q = c->mixed + (s->row + t) * c->channels + kh * D, *k = q + Hk * D;
            const float *v = c->mixed + (s->row + t) * c->channels + 2 * Hk * D + h * E + col;
            const float *f = c->factors + (s->row + t) * 2 * (Hk + Hv);
            float of_q = f[kh], of_k = f[Hk + kh], decay = f[2 * Hk + h], beta = f[2 * Hk + Hv + h];
            float *S = head + col * D, *out = c->out + ((s->row + t) * Hv + h) * E + col;
            vec sum[4][VECS] = {0}, change[VECS];
            for (int64_t i = 0; i < D; i += 4)
                for (int u = 0; u < 4; u++)
                    for (int w = 0; w < VECS; w++)
                        sum[u][w] =
                            madd(splat(k[i + u]), load(S + 16 * (i + u) + w * LANES), sum[u][w]);
            for (int w = 0; w < VECS; w++) {
                vec known = sum[0][w] + sum[1][w] + (sum[2][w] + sum[3][w]);
                change[w] = (load(v + w * LANES) - known * (of_k * decay)) * (beta * of_k);
            }
            memset(sum, 0, sizeof sum);
            for (int64_t i = 0; i < D; i += 4)
                for (int u = 0; u < 4; u++)
                    for (int w = 0; w < VECS; w++) {
                        float *at = S + 16 * (i + u) + w * LANES;
                        vec new = madd(splat(k[i + u]), change[w], load(at) * decay);
                        store(at, new);
                        sum[u][w] = madd(splat(q[i + u]), new, sum[u][w]);
                    }
            for (int w = 0; w < VECS; w++)
                store(out + w * LANES, (sum[0][w] + sum[1][w] + (sum[2][w] + sum[3][w])) * of_q);
        }
}

/* A piece is a token: out = norm(out) silu(z), each head by itself */
static void gated_norm_piece(const void *job, int64_t piece) {
    const delta_net_call *c = job;
    int64_t row = row_of(c->spans, piece), E = c->v_dim;
    const float *z = c->x + row * c->width + c->channels;
    float *out = c->out + row * c->v_heads * E;
    for (int64_t h = 0; h < c->v_heads; h++, out += E, z += E) {
        float factor = rms_factor(out, E, c->eps);
        for (int64_t i = 0; i < E; i += LANES) {
            vec gate = load(z + i);
            gate = gate / (1.0f + exp_of(-gate));
            store(out + i, load(out + i) * factor * load(c->norm + i) * gate);
        }
    }
}

/* Gated delta nets (https://arxiv.org/abs/2412.06464), token by token, so that a text's results do
 * not depend on how it is cut into calls */
void delta_net(const void *call, int64_t n, int64_t num_threads) {
    delta_net_call c = *(const delta_net_call *)call;
    int64_t num_spans = count_spans(c.spans), num_tokens = 0;
    for (int64_t i = 0; i < num_spans; i++) num_tokens += c.spans[i].num_new;
    c.channels = 2 * c.k_heads * c.k_dim + c.v_heads * c.v_dim;
    c.width = c.channels + c.v_heads * c.v_dim;
    c.mixed = malloc(n * c.channels * sizeof(float));
    c.factors = malloc(n * 2 * (c.k_heads + c.v_heads) * sizeof(float));
    conv_job j = {.x = c.x, .weight = c.conv, .spans = c.spans, .out = c.mixed, .with_silu = 1};
    j.stride = c.width, j.channels = c.channels, j.taps = c.taps, j.first = c.first;
    convolve(&j, num_threads);
    share_out(factor_piece, &c, num_tokens, num_threads);
    share_out(recur_piece, &c, num_spans * c.v_heads, num_threads);
    share_out(gated_norm_piece, &c, num_tokens, num_threads);
    free(c.mixed), free(c.factors);
}

/* A state: the convolution's, then for each head a matrix S in blocks of 16 of its columns,
 * (heads, head width / 16, d_state, 16), so that a block stays in the first cache. */
typedef struct {
    const float *x;           /* (N, stride): z | x | B | C | dt, of which x | B | C convolved */
    const float *conv, *bias; /* (taps, columns of x | B | C), one for each or NULL */
    const float *A, *D, *dt_bias; /* (heads) each */
    const float *norm;            /* (heads head_dim), or NULL */
    const state_span *spans;      /* the last one is followed by one without tokens */
    float *out;                   /* (N, heads head_dim) */
    int64_t heads, head_dim, groups, d_state, taps, first;
    int64_t is_gated; /* the norm sees the output times its gate */
    float eps, dt_min, dt_max;
    float *mixed;   /* (N, columns of x | B | C), convolved; from here on set by `mamba2` */
    float *factors; /* (N, 2 heads): exp(dt A), dt */
    int64_t channels, stride;
} mamba2_call;

/* A piece is a token: the steps of its heads */
static void step_piece(const void *job, int64_t piece) {
    const mamba2_call *c = job;
    int64_t row = row_of(c->spans, piece), H = c->heads;
    const float *dt = c->x + (row + 1) * c->stride - H;
    float *f = c->factors + row * 2 * H;
    for (int64_t h = 0; h < H; h++) {
        float y = dt[h] + c->dt_bias[h], softplus = y > 20 ? y : log1pf(expf(y));
        f[H + h] = fminf(fmaxf(softplus, c->dt_min), c->dt_max);
        f[h] = expf(c->A[h] * f[H + h]);
    }
}

/* A piece is a head of a sequence: its tokens one after another, 16 columns of S at a time */
static void mamba_piece(const void *job, int64_t piece) {
    const mamba2_call *c = job;
    int64_t H = c->heads, P = c->head_dim, N = c->d_state;
    const state_span *s = c->spans + piece / H;
    int64_t h = piece % H, group = h / (H / c->groups);
    float *head = s->state + c->first + (c->taps - 1) * c->channels + h * N * P;
    for (int64_t col = 0; col < P; col += 16)
        for (int64_t t = 0; t < s->num_new; t++) {
            int64_t row = s->row + t;
            const float *x = c->mixed + row * c->channels + h * P + col;
            const float *B = c->mixed + row * c->channels + H * P + group * N;
            const float *C = B + c->groups * N, *f = c->factors + row * 2 * H;
            float decay = f[h], dt = f[H + h], *S = head + col * N;
            float *out = c->out + row * H * P + h * P + col;
            vec sum[4][VECS] = {0}, step[VECS];
            for (int w = 0; w < VECS; w++) step[w] = load(x + w * LANES) * dt;
            for (int64_t i = 0; i < N; i += 4)
                for (int u = 0; u < 4; u++)
                    for (int w = 0; w < VECS; w++) {
                        float *at = S + 16 * (i + u) + w * LANES;
                        vec new = madd(splat(B[i + u]), step[w], load(at) * decay);
                        store(at, new);
                        sum[u][w] = madd(splat(C[i + u]), new, sum[u][w]);
                    }
            for (int w = 0; w < VECS; w++) {
                vec y = sum[0][w] + sum[1][w] + (sum[2][w] + sum[3][w]);
                store(out + w * LANES, madd(load(x + w * LANES), splat(c->D[h]), y));
            }
        }
}

/* A piece is a token: out = norm(out silu(z)), norm(out) silu(z) or out silu(z), in groups */
static void gate_piece(const void *job, int64_t piece) {
    const mamba2_call *c = job;
    int64_t row = row_of(c->spans, piece), inner = c->heads * c->head_dim, size = inner / c->groups;
    const float *z = c->x + row * c->stride;
    float *out = c->out + row * inner;
    for (int64_t g = 0; g < inner; g += size) {
        float factor = c->norm && !c->is_gated ? rms_factor(out + g, size, c->eps) : 1;
        for (int64_t i = g; i < g + size; i += LANES) {
            vec gate = load(z + i);
            store(out + i, load(out + i) * factor * (gate / (1.0f + exp_of(-gate))));
        }
        factor = c->norm && c->is_gated ? rms_factor(out + g, size, c->eps) : 1;
        for (int64_t i = g; c->norm && i < g + size; i += LANES)
            store(out + i, load(out + i) * factor * load(c->norm + i));
    }
}

/* Mamba2 (https://arxiv.org/abs/2405.21060), token by token, so that a text's results do not depend
 * on how it is cut into calls */
void mamba2(const void *call, int64_t n, int64_t num_threads) {
    mamba2_call c = *(const mamba2_call *)call;
    int64_t num_spans = count_spans(c.spans), num_tokens = 0, inner = c.heads * c.head_dim;
    for (int64_t i = 0; i < num_spans; i++) num_tokens += c.spans[i].num_new;
    c.channels = inner + 2 * c.groups * c.d_state;
    c.stride = inner + c.channels + c.heads;
    c.mixed = malloc(n * c.channels * sizeof(float));
    c.factors = malloc(n * 2 * c.heads * sizeof(float));
    conv_job j = {.x = c.x + inner, .weight = c.conv, .bias = c.bias, .spans = c.spans};
    j.out = c.mixed, j.with_silu = 1, j.stride = c.stride, j.channels = c.channels;
    j.taps = c.taps, j.first = c.first;
    convolve(&j, num_threads);
    share_out(step_piece, &c, num_tokens, num_threads);
    share_out(mamba_piece, &c, num_spans * c.heads, num_threads);
    share_out(gate_piece, &c, num_tokens, num_threads);
    free(c.mixed), free(c.factors);
}

typedef struct {
    const float *x, *weight; /* (n, cols), (rows, cols) */
    float *out;              /* (n, rows) */
    int64_t cols, rows;      /* cols: a multiple of 16 */
    int64_t num_tokens;      /* n, set by `few_rows` */
} few_rows_call;

#define FEW 64
#define FEW_TOKENS 4

/* The products of FEW rows with up to FEW_TOKENS tokens, which share each number that is loaded.
 * Each sum is that of `dot`. The next piece needs the same rows. */
static void few_rows_piece(const void *job, int64_t piece) {
    const few_rows_call *c = job;
    int64_t num_groups = (c->num_tokens + FEW_TOKENS - 1) / FEW_TOKENS, cols = c->cols;
    int64_t token = piece % num_groups * FEW_TOKENS, first = piece / num_groups * FEW;
    const float *x = c->x + token * cols;
    float *out = c->out + token * c->rows;
    for (int64_t i = first; i < MIN(c->rows, first + FEW); i++) {
        const float *w = c->weight + i * cols;
        if (token + FEW_TOKENS > c->num_tokens) {
            for (int64_t t = 0; t < c->num_tokens - token; t++)
                out[t * c->rows + i] = dot(x + t * cols, w, cols);
            continue;
        }
        vec sums[FEW_TOKENS] = {{0}};
        for (int64_t j = 0; j < cols; j += LANES)
            for (int t = 0; t < FEW_TOKENS; t++)
                sums[t] = madd(load(x + t * cols + j), load(w + j), sums[t]);
        for (int t = 0; t < FEW_TOKENS; t++) out[t * c->rows + i] = sum_of(sums[t]);
    }
}

/* out = x weight^T, for a float matrix of few rows */
void few_rows(const void *call, int64_t n, int64_t num_threads) {
    few_rows_call c = *(const few_rows_call *)call;
    c.num_tokens = n;
    int64_t num_groups = (n + FEW_TOKENS - 1) / FEW_TOKENS;
    share_out(few_rows_piece, &c, num_groups * ((c.rows + FEW - 1) / FEW), num_threads);
}

typedef struct {
    const float *x, *gate; /* (n, cols) each */
    float *out;
    int64_t cols; /* a multiple of 16 */
} sigmoid_gate_call;

static void sigmoid_gate_piece(const void *job, int64_t token) {
    const sigmoid_gate_call *c = job;
    for (int64_t i = token * c->cols; i < (token + 1) * c->cols; i += LANES)
        store(c->out + i, load(c->x + i) / (1.0f + exp_of(-load(c->gate + i))));
}

/* out = x sigmoid(gate) */
void sigmoid_gate(const void *call, int64_t n, int64_t num_threads) {
    share_out(sigmoid_gate_piece, call, n, n < 4 ? 1 : num_threads);
}

typedef struct {
    const float *x, *times; /* (n, cols); (n, stride), or NULL for ones */
    float *out;             /* (n, cols) */
    int64_t cols, stride;   /* cols: a multiple of 16 */
    int64_t before;         /* PLAIN or GELU */
    float factor;
} product_call;

static void product_piece(const void *job, int64_t token) {
    const product_call *c = job;
    const float *x = c->x + token * c->cols;
    for (int64_t i = 0; i < c->cols; i += LANES) {
        vec y = load(x + i);
        if (c->before == GELU) y = gelu(y);
        if (c->times) y *= load(c->times + token * c->stride + i);
        store(c->out + token * c->cols + i, y * c->factor);
    }
}

/* out = x, or GELU of x, times `times` and the factor */
void product(const void *call, int64_t n, int64_t num_threads) {
    share_out(product_piece, call, n, n < 4 ? 1 : num_threads);
}

/* ---- several streams (AltUp, https://arxiv.org/abs/2301.13310) ---- */

#define MOST_STREAMS 8

/* tanh of the router's scores of a token: router (num, cols) on x / rms(x) */
static void route_streams(const float *x, const float *router, int64_t num, int64_t cols, float eps,
                          float *routed) {
    float factor = rms_factor(x, cols, eps);
    for (int64_t i = 0; i < num; i++) {
        float score = dot(x, router + i * cols, cols) * factor;
        routed[i] = 1.0f - 2.0f / (1.0f + exp_of(splat(2.0f * score))[0]);
    }
}

typedef struct {
    const float *x; /* num_streams times (n, cols); from one to the next are `stride` numbers */
    const float *router;                       /* (num_streams, cols) */
    const float *coefs;                        /* (num_streams^2, num_streams) */
    float *out;                                /* as x */
    int64_t cols, stride, num_streams, active; /* cols: a multiple of 16 */
    float eps;
} altup_predict_call;

static void predict_piece(const void *job, int64_t token) {
    const altup_predict_call *c = job;
    const float *x = c->x + token * c->cols;
    float *out = c->out + token * c->cols, routed[MOST_STREAMS];
    int64_t num = c->num_streams;
    route_streams(x + c->active * c->stride, c->router, num, c->cols, c->eps, routed);
    for (int64_t i = 0; i < num; i++) {
        float weights[MOST_STREAMS];
        for (int64_t j = 0; j < num; j++) {
            const float *coefs = c->coefs + (i * num + j) * num;
            weights[j] = 0;
            for (int64_t k = 0; k < num; k++) weights[j] += coefs[k] * routed[k];
        }
        for (int64_t at = 0; at < c->cols; at += LANES) {
            vec y = load(x + i * c->stride + at);
            for (int64_t j = 0; j < num; j++)
                y = madd(load(x + j * c->stride + at), splat(weights[j]), y);
            store(out + i * c->stride + at, y);
        }
    }
}

/* out = x + coefs(router(the active stream)) x, for each token */
void altup_predict(const void *call, int64_t n, int64_t num_threads) {
    share_out(predict_piece, call, n, n < 4 ? 1 : num_threads);
}

typedef struct {
    const float *predicted;      /* num_streams times (n, cols), `stride` numbers apart */
    const float *x;              /* (n, cols): the active one as a layer computed it */
    const float *router, *coefs; /* (num_streams, cols); (num_streams, num_streams) */
    const float *scale;          /* (cols), or NULL */
    float *corrected;            /* as predicted */
    float *out;                  /* (n, cols): the active one of these, times the scale */
    int64_t cols, stride, num_streams, active; /* cols: a multiple of 16 */
    float eps;
} altup_correct_call;

static void correct_piece(const void *job, int64_t token) {
    const altup_correct_call *c = job;
    const float *x = c->x + token * c->cols, *predicted = c->predicted + token * c->cols;
    const float *active = predicted + c->active * c->stride;
    float *out = c->out + token * c->cols, routed[MOST_STREAMS];
    route_streams(x, c->router, c->num_streams, c->cols, c->eps, routed);
    for (int64_t i = 0; i < c->num_streams; i++) {
        float weight = 1.0f, *corrected = c->corrected + token * c->cols + i * c->stride;
        for (int64_t k = 0; k < c->num_streams; k++)
            weight += c->coefs[i * c->num_streams + k] * routed[k];
        for (int64_t at = 0; at < c->cols; at += LANES) {
            vec y = load(predicted + i * c->stride + at);
            y = madd(load(x + at) - load(active + at), splat(weight), y);
            store(corrected + at, y);
            if (c->scale) y *= load(c->scale + at);
            if (i == c->active) store(out + at, y);
        }
    }
}

/* corrected = predicted + (1 + coefs(router(x))) (x - the active prediction), for each token */
void altup_correct(const void *call, int64_t n, int64_t num_threads) {
    share_out(correct_piece, call, n, n < 4 ? 1 : num_threads);
}

typedef struct {
    const float *x, *like, *residual; /* (n, cols) each; the residual may be NULL */
    float *out;                       /* (n, cols) */
    int64_t cols;                     /* a multiple of 16 */
    float least, factor;              /* the least mean square of x */
} match_scale_call;

static void match_piece(const void *job, int64_t token) {
    const match_scale_call *c = job;
    const float *x = c->x + token * c->cols, *like = c->like + token * c->cols;
    float square = dot(x, x, c->cols) / c->cols;
    float scale = sqrtf(dot(like, like, c->cols) / c->cols) / sqrtf(MAX(square, c->least));
    for (int64_t i = 0; i < c->cols; i += LANES) {
        vec y = load(x + i) * scale;
        if (c->residual) y = load(c->residual + token * c->cols + i) + y;
        store(c->out + token * c->cols + i, y * c->factor);
    }
}

/* out = (residual + x with the mean square of `like`) times the factor */
void match_scale(const void *call, int64_t n, int64_t num_threads) {
    share_out(match_piece, call, n, n < 4 ? 1 : num_threads);
}

typedef struct {
    float *out;   /* (n, 2 cols): gates, then others */
    int64_t cols; /* a multiple of 16 */
    float factor;
} cut_gates_call;

static void cut_piece(const void *job, int64_t token) {
    const cut_gates_call *c = job;
    float *x = c->out + token * 2 * c->cols;
    vec sum = {0}, squares = {0};
    for (int64_t i = 0; i < c->cols; i += LANES) sum += load(x + i);
    vec mean = splat(sum_of(sum) / c->cols);
    for (int64_t i = 0; i < c->cols; i += LANES) {
        vec centred = load(x + i) - mean;
        squares = madd(centred, centred, squares);
    }
    vec cutoff = splat(sqrtf(sum_of(squares) / c->cols) * c->factor), zero = {0};
    for (int64_t i = 0; i < c->cols; i += LANES) {
        vec y = load(x + i) - mean - cutoff;
        store(x + i, pick(y < 0.0f, zero, y));
    }
}

/* Gates become what they have above mean + factor * deviation, or 0 */
void cut_gates(const void *call, int64_t n, int64_t num_threads) {
    share_out(cut_piece, call, n, n < 4 ? 1 : num_threads);
}

/* ---- a step ---- */

/* The number of rows is not in a kernel's structure, so that a step of the model can be recorded as
 * a list of calls and run again when the tensors hold other rows. */
void replay(const step *steps, int64_t num_steps, int64_t num_tokens, int64_t num_threads) {
    for (const step *s = steps; s < steps + num_steps; s++)
        s->run(s->call, num_tokens, num_threads);
}

/* ---- a step ahead ---- */

typedef struct {
    void *to;
    const void *source;
    int64_t num_bytes;
} move;

/* A step with one token of each sequence, and what makes the next one of it */
typedef struct {
    const step *steps;
    int64_t num_steps, num_tokens, num_threads;
    int64_t *ids;      /* (N) */
    span *spans;       /* (N) */
    linear_call *head; /* the last of the steps */
    float *next_out;   /* for its scores */
    const move *moves; /* of the rotations to the next positions */
    int64_t num_moves;
} decode_step;

/* The index of the largest score, of equal ones the first */
static int64_t likeliest(const float *x, int64_t num) {
    vec most = splat(-INFINITY);
    int64_t i = 0, at = 0;
    for (; i + LANES <= num; i += LANES) most = larger(load(x + i), most);
    float largest = largest_of(most);
    for (; i < num; i++) largest = MAX(largest, x[i]);
    while (at < num - 1 && x[at] != largest) at++;
    return at;
}

/* Have a worker run the step after this one with the likeliest tokens. */
static int64_t begin_ahead(const decode_step *d) {
    pthread_mutex_lock(&ahead.owner);
    int64_t is_free = !ahead.caller, num_scores = d->head->parts->rows;
    for (int64_t i = 0; i < d->num_tokens && is_free; i++) {
        d->ids[i] = likeliest(d->head->out + i * num_scores, num_scores);
        d->spans[i].start++;
    }
    for (const move *m = d->moves; m < d->moves + d->num_moves && is_free; m++)
        memcpy(m->to, m->source, m->num_bytes);
    if (is_free) {
        d->head->out = d->next_out;
        ahead.caller = d, ahead.steps = d->steps, ahead.num_steps = d->num_steps;
        ahead.num_tokens = d->num_tokens, ahead.num_threads = d->num_threads;
        ahead.is_stopped = 0;
        __atomic_store_n(&ahead.state, AHEAD_IS_DUE, __ATOMIC_SEQ_CST);
        ring(d->num_threads);
    }
    pthread_mutex_unlock(&ahead.owner);
    return is_free;
}

enum { AHEAD_RAN, AHEAD_WAITED, AHEAD_BEGAN }; /* bits of the results below */

/* Take part in the caller's step ahead until it is done. With NULL, stop that of any caller. */
static int64_t end_ahead(const decode_step *d) {
    pthread_mutex_lock(&ahead.owner);
    int64_t result = 0, due = AHEAD_IS_DUE, seen = 0, latest;
    if (ahead.caller && (!d || ahead.caller == d)) {
        if (!__atomic_compare_exchange_n(&ahead.state, &due, NOT_AHEAD, 0, __ATOMIC_SEQ_CST,
                                         __ATOMIC_SEQ_CST)) {
            if (!d) __atomic_store_n(&ahead.is_stopped, 1, __ATOMIC_SEQ_CST);
            result = 1 << AHEAD_RAN;
            for (int64_t i = 0; __atomic_load_n(&ahead.state, __ATOMIC_SEQ_CST) != AHEAD_IS_DONE;
                 i++) {
                latest = __atomic_load_n(&pool.num_jobs, __ATOMIC_SEQ_CST);
                if (latest != seen) work(__atomic_load_n(&ahead.worker, __ATOMIC_SEQ_CST)), i = 0;
                seen = latest;
                if (i < SPINS)
                    PAUSE();
                else
                    sched_yield(), result |= 1 << AHEAD_WAITED;
            }
            __atomic_store_n(&ahead.state, NOT_AHEAD, __ATOMIC_SEQ_CST);
        }
        ahead.caller = NULL;
    }
    pthread_mutex_unlock(&ahead.owner);
    return result;
}

void stop_ahead(void) { end_ahead(NULL); }

/* Run a step or, if it was begun as the one ahead, take its result; then begin the one after it, if
 * it `goes_on`. Python takes a tenth of a small model's time to choose the next tokens, and has
 * the scores meanwhile: those of the step ahead are written elsewhere. When the caller comes for
 * them, it is one of the step's threads. If it comes with another token, the step is stopped and
 * run as usual; keys and values that it has written are written again. */
int64_t run_step(const decode_step *d, int64_t is_begun, int64_t goes_on) {
    int64_t result = is_begun ? end_ahead(d) : 0;
    if (!result) replay(d->steps, d->num_steps, d->num_tokens, d->num_threads);
    if (goes_on && begin_ahead(d)) result |= 1 << AHEAD_BEGAN;
    return result;
}

typedef struct {
    const uint8_t *bytes;
    int64_t num_bytes, num_pieces, total;
} read_job;

static void read_piece(const void *job, int64_t piece) {
    read_job *c = (read_job *)job;
    ivec sum[4] = {{0}};
    int64_t lines = c->num_bytes / 256;
    for (int64_t i = lines * piece / c->num_pieces; i < lines * (piece + 1) / c->num_pieces; i++)
        for (int j = 0; j < 64 / LANES; j++) sum[j % 4] += ((const ivec *)(c->bytes + 256 * i))[j];
    sum[0] += sum[1] + sum[2] + sum[3];
    int64_t total = 0;
    for (int j = 0; j < LANES; j++) total += sum[0][j];
    __atomic_fetch_add(&c->total, total, __ATOMIC_SEQ_CST);
}

/* A checksum of a buffer: any one changed byte changes it, and so does the order of bytes. Each
 * step of FNV-1a, here with words of 64 bits in 8 lanes and a rotation, can be undone. */
int64_t checksum(const uint8_t *bytes, int64_t num_bytes) {
    uint64_t lanes[8], found = num_bytes;
    for (int j = 0; j < 8; j++) lanes[j] = 0xcbf29ce484222325 + j;
    for (int64_t i = 0; i < num_bytes; i += 64) {
        uint64_t words[8] = {0};
        if (num_bytes - i >= 64)
            memcpy(words, bytes + i, 64);
        else
            memcpy(words, bytes + i, num_bytes - i);
        for (int j = 0; j < 8; j++) {
            uint64_t h = (lanes[j] ^ words[j]) * 0x100000001b3;
            lanes[j] = h << 29 | h >> 35;
        }
    }
    for (int j = 0; j < 8; j++) found = (found ^ lanes[j]) * 0x100000001b3, found ^= found >> 29;
    return found;
}

/* Read a buffer once. The sum keeps compilers from leaving the reads out. */
int64_t read_all(const uint8_t *bytes, int64_t num_bytes, int64_t num_threads) {
    read_job c = {bytes, num_bytes, PIECES * num_threads, 0};
    share_out(read_piece, &c, c.num_pieces, num_threads);
    return c.total;
}

enum { SUMS = 12 }; /* enough that none waits for its last one */
typedef struct {
    int64_t num_rounds, num_pieces, total;
} multiply_job;

static void multiply_all_piece(const void *job, int64_t piece) {
    multiply_job *c = (multiply_job *)job;
    ivec sum[SUMS] = {{0}}, w = sum[0] + (int32_t)piece;
    int8_t acts[4 * SUMS];
    for (int i = 0; i < 4 * SUMS; i++) acts[i] = piece + i; /* no two sums are one for compilers */
    for (int64_t i = 0; i < c->num_rounds; i++)
        for (int j = 0; j < SUMS; j++) sum[j] = dot4(sum[j], w, acts + 4 * j, 8);
    int64_t total = 0;
    for (int j = 0; j < SUMS; j++) total += sum[j][0];
    __atomic_fetch_add(&c->total, total, __ATOMIC_SEQ_CST);
}

/* Multiply int8 numbers in registers and add them up, as fast as it goes -> multiply-adds done.
 * The sum in `total` keeps compilers from leaving them out. */
int64_t multiply_all(int64_t *total, int64_t num_rounds, int64_t num_threads) {
    multiply_job c = {num_rounds, PIECES * num_threads, 0};
    share_out(multiply_all_piece, &c, c.num_pieces, num_threads);
    *total = c.total;
    return num_rounds * c.num_pieces * SUMS * LANES * 4;
}
