/* Products with packed weights on a CPU, on the bytes as they are stored (packed.py has the layout).

   multiply: for each job, y[t, row] = sum over columns of (code - zero) * scale * x[t, column], in
   float32. dequantize: the weights themselves, bit for bit what packed.affine gives.
   Three forms: AVX-512, AVX2 and plain C; which of them the processor has is asked at run time.
   multiply_fast: the same with activations rounded to int8 (int8.h).
   Threads share tiles of rows; no sum depends on how many there are. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EACH _Pragma("GCC unroll 4") /* loops over rows and tokens become straight lines */
enum { ROWS = 4, TOKENS = 4, TILE = 32 };

struct weight {
    const uint32_t *codes;
    const uint16_t *scale, *zero; /* halves; no zero: 1/2 */
    int64_t bits, group;
};

struct job {
    struct weight weight;
    const float *x; /* [tokens, columns] */
    float *y;       /* [tokens, rows], zeros before */
    int64_t tokens;
};

static inline float half_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    float value;
    uint32_t word;
    if (rest >= 0x7c00) word = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x400) word = sign | ((rest << 13) + 0x38000000);
    else { /* too small for an exponent */
        value = (float)rest * 0x1p-24f;
        memcpy(&word, &value, 4);
        word |= sign;
    }
    memcpy(&value, &word, 4);
    return value;
}

/* the planes of a row lie one after the other, the widest first; that one holds the lowest bits */
static inline float one_code(const uint32_t *row, long k, int bits, long blocks)
{
    uint32_t code = 0;
    int low = 0;
    for (int b = 8; b; b >>= 1) {
        if (!(bits & b)) continue;
        const uint32_t word = row[k / 32 * b + k % 32 / (32 / b)];
        code |= (word >> (b * (k % (32 / b))) & ((1u << b) - 1)) << low;
        low += b;
        row += blocks * b;
    }
    return (float)code;
}

/* rows first .. last of a weight: with tokens [n, columns] into [n, rows], or into `dense` themselves */
typedef void (*some_rows)(
    const struct weight *, long columns, long first, long last,
    const float *x, long n_tokens, float *y, long rows, float *dense);

/* column k, which lies in group g, of a few rows and tokens */
static __attribute__((noinline)) void column(
    const struct weight *w, int bits, long columns, long row, int n_rows, long g, long k,
    const float *x, int n_tokens, float *y, long rows, float *dense)
{
    const long blocks = (columns + 31) / 32, groups = (columns + w->group - 1) / w->group;
    for (int r = 0; r < n_rows; r++) {
        const long at = (row + r) * groups + g;
        const float zero = w->zero ? half_to_float(w->zero[at]) : 0.5f;
        const float q = one_code(w->codes + (row + r) * blocks * bits, k, bits, blocks);
        const float v = (q - zero) * half_to_float(w->scale[at]);
        if (dense) dense[(row + r) * columns + k] = v;
        for (int t = 0; t < n_tokens; t++) y[t * rows + row + r] += v * x[t * columns + k];
    }
}

#if defined(__x86_64__)

#define WIDTH 16
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define F __m512
#define I __m512i
#define load _mm512_loadu_ps
#define store _mm512_storeu_ps
#define set1 _mm512_set1_ps
#define half(h) _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(h)))
#define sub _mm512_sub_ps
#define mul _mm512_mul_ps
#define fma _mm512_fmadd_ps
#define total _mm512_reduce_add_ps
#define number _mm512_cvtepi32_ps
#define pick(table, q) _mm512_permutexvar_ps(q, table)
#define BY_TABLE(bits) ((bits) <= 4)

TARGET static inline __attribute__((always_inline)) I first_codes_avx512(int bits)
{
    const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_and_epi32(lane, _mm512_set1_epi32((1 << bits) - 1));
}

/* columns k .. k + 16 of one plane, the first one's bits lowest; bits above the code are rubbish */
TARGET static inline __attribute__((always_inline)) I plane_avx512(const uint32_t *plane, long k, int b)
{
    const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (b == 8) return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(plane + k / 4)));
    if (b == 4) {
        const I pair = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)(plane + k / 8)));
        const I word = _mm512_permutexvar_epi32(_mm512_srli_epi32(lane, 3), pair);
        return _mm512_srlv_epi32(word, _mm512_slli_epi32(_mm512_and_epi32(lane, _mm512_set1_epi32(7)), 2));
    }
    if (b == 2) return _mm512_srlv_epi32(_mm512_set1_epi32(plane[k / 16]), _mm512_slli_epi32(lane, 1));
    return _mm512_srlv_epi32(_mm512_set1_epi32(plane[k / 32] >> (k & 16)), lane);
}

TARGET static inline __attribute__((always_inline)) I codes_avx512(const uint32_t *row, long k, int bits, long blocks)
{
    I code = _mm512_setzero_si512();
    int low = 0;
    for (int b = 8; b; b >>= 1) {
        if (!(bits & b)) continue;
        const I part = plane_avx512(row, k, b);
        if (low == 0) code = part;
        else /* what lies below `low` is kept, the rest is the shifted part: one instruction */
            code = _mm512_ternarylogic_epi32(
                _mm512_set1_epi32((1 << low) - 1), code, _mm512_slli_epi32(part, low), 0xca);
        low += b;
        row += blocks * b;
    }
    return BY_TABLE(bits) ? code : _mm512_and_epi32(code, _mm512_set1_epi32((1 << bits) - 1));
}

#include "rows.h"

#define WIDTH 8
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define F __m256
#define I __m256i
#define load _mm256_loadu_ps
#define store _mm256_storeu_ps
#define set1 _mm256_set1_ps
#define half(h) _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(h)))
#define sub _mm256_sub_ps
#define mul _mm256_mul_ps
#define fma _mm256_fmadd_ps
#define total total_avx2
#define number _mm256_cvtepi32_ps
#define pick(table, q) _mm256_permutevar8x32_ps(table, q)
#define BY_TABLE(bits) ((bits) <= 3)

TARGET static inline __attribute__((always_inline)) float total_avx2(F v)
{
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

TARGET static inline __attribute__((always_inline)) I first_codes_avx2(int bits)
{
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_si256(lane, _mm256_set1_epi32((1 << bits) - 1));
}

TARGET static inline __attribute__((always_inline)) I plane_avx2(const uint32_t *plane, long k, int b)
{
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    if (b == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(plane + k / 4)));
    if (b == 4) return _mm256_srlv_epi32(_mm256_set1_epi32(plane[k / 8]), _mm256_slli_epi32(lane, 2));
    if (b == 2)
        return _mm256_srlv_epi32(_mm256_set1_epi32(plane[k / 16] >> (2 * (k & 8))), _mm256_slli_epi32(lane, 1));
    return _mm256_srlv_epi32(_mm256_set1_epi32(plane[k / 32] >> (k & 24)), lane);
}

TARGET static inline __attribute__((always_inline)) I codes_avx2(const uint32_t *row, long k, int bits, long blocks)
{
    I code = _mm256_setzero_si256();
    int low = 0;
    for (int b = 8; b; b >>= 1) {
        if (!(bits & b)) continue;
        const I part = plane_avx2(row, k, b), mask = _mm256_set1_epi32((1 << b) - 1);
        code = _mm256_or_si256(code, _mm256_slli_epi32(_mm256_and_si256(part, mask), low));
        low += b;
        row += blocks * b;
    }
    return code;
}

#include "rows.h"

#include "int8.h"

#endif

static void rows_plain(
    const struct weight *w, long columns, long first, long last,
    const float *x, long n_tokens, float *y, long rows, float *dense)
{
    const long blocks = (columns + 31) / 32, groups = (columns + w->group - 1) / w->group;
    for (long row = first; row < last; row++)
        for (long block = 0; block < blocks; block++) {
            const long k = block * 32, n = columns - k < 32 ? columns - k : 32;
            const uint32_t *plane = w->codes + row * blocks * w->bits;
            uint32_t q[32] = {0};
            float v[32];
            for (int b = 8, low = 0; b; b >>= 1) {
                if (!(w->bits & b)) continue;
                for (int i = 0; i < 32; i++)
                    q[i] |= (plane[block * b + i / (32 / b)] >> (b * (i % (32 / b))) & ((1u << b) - 1)) << low;
                low += b;
                plane += blocks * b;
            }
            for (long i = 0; i < n;) {
                const long g = (k + i) / w->group, at = row * groups + g;
                const long end = (g + 1) * w->group - k < n ? (g + 1) * w->group - k : n;
                const float scale = half_to_float(w->scale[at]);
                const float zero = w->zero ? half_to_float(w->zero[at]) : 0.5f;
                for (; i < end; i++) v[i] = ((float)q[i] - zero) * scale;
            }
            if (dense) memcpy(dense + row * columns + k, v, n * sizeof *v);
            for (long t = 0; t < n_tokens; t++) {
                float sum = 0;
                for (long i = 0; i < n; i++) sum += v[i] * x[t * columns + k + i];
                y[t * rows + row] += sum;
            }
        }
}

/* 1 where activations rounded to int8 can be multiplied */
int fast(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

/* 2: AVX-512, 1: AVX2, 0: plain C */
int best(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
    return 0;
}

static some_rows form(int which, int bits)
{
#if defined(__x86_64__)
    if (which == 2) return forms_avx512[bits];
    if (which == 1) return forms_avx2[bits];
#endif
    return rows_plain;
}

void multiply(const struct job *jobs, int64_t n, int64_t rows, int64_t columns, int which)
{
    const int64_t tiles = (rows + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n * tiles; i++) {
        const struct job *job = jobs + i / tiles;
        const int64_t first = i % tiles * TILE, last = first + TILE < rows ? first + TILE : rows;
        form(which, job->weight.bits)(
            &job->weight, columns, first, last, job->x, job->tokens, job->y, rows, 0);
    }
}

/* with activations rounded to int8; 0 where that cannot be: no such instructions, an odd group, no room */
int multiply_fast(const struct job *jobs, int64_t n, int64_t rows, int64_t columns)
{
#if defined(__x86_64__)
    int64_t tokens = 0;
    size_t most = 0;
    for (int64_t j = 0; j < n; j++) {
        if (!is_fast(&jobs[j].weight)) return 0;
        const size_t size = rounded_size(&jobs[j].weight, columns);
        most = size > most ? size : most;
        tokens += jobs[j].tokens;
    }
    char *room = fast() ? aligned_alloc(64, most * tokens + 64) : 0;
    struct rounded *x = room ? malloc(sizeof *x * tokens + 1) : 0;
    const struct job **of = x ? malloc(sizeof *of * tokens + 1) : 0;
    int64_t *start = of ? malloc(sizeof *start * n + 1) : 0;
    if (start) {
        for (int64_t j = 0, t = 0; j < n; t += jobs[j++].tokens) {
            start[j] = t;
            for (int64_t i = 0; i < jobs[j].tokens; i++) of[t + i] = jobs + j;
        }
#pragma omp parallel for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            const float *from = of[t]->x + (t - start[of[t] - jobs]) * columns;
            x[t] = round_row(&of[t]->weight, from, columns, room + t * most);
        }
        const int64_t tiles = (rows + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < n * tiles; i++) {
            const struct job *job = jobs + i / tiles;
            const int64_t first = i % tiles * TILE, last = first + TILE < rows ? first + TILE : rows;
            rows_vnni(
                &job->weight, columns, first, last, x + start[i / tiles], job->tokens, job->y, rows);
        }
    }
    const int done = start != 0;
    free(start);
    free(of);
    free(x);
    free(room);
    return done;
#else
    return 0;
#endif
}

void dequantize(const struct weight *w, int64_t rows, int64_t columns, float *dense, int which)
{
    const some_rows run = form(which, w->bits);
    const int64_t tiles = (rows + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t first = i * TILE, last = first + TILE < rows ? first + TILE : rows;
        run(w, columns, first, last, 0, 0, 0, rows, dense);
    }
}
