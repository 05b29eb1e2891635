/* Products with activations rounded to int8, 32 at a time to a scale: AVX-512 VNNI.

   The dot product is linear in the code, so each plane of b bits is multiplied by itself. A vector of
   its words holds 8/b codes a byte; the i-th codes of all bytes meet activations laid out in the same
   order, so one shift, one mask and one instruction take 64 products. A lane sums the columns of four
   bytes, which share one scale of the weight and one of the activations. */

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define QUANT 32 /* columns that share a scale of the activations */

struct rounded { /* one row of activations */
    int8_t *x[9];   /* by b: in the order of a plane of b bits, a vector for each place in a byte */
    float *lane[9]; /* by b: scales, one a lane */
    float *sums;    /* of each group of columns, as rounded */
};

static inline long chunk_of(int b) { return 512 / b; } /* columns of a vector of words */

static inline int is_fast(const struct weight *w)
{
    return w->group >= QUANT && (w->group & (w->group - 1)) == 0;
}

VNNI static size_t rounded_size(const struct weight *w, long columns)
{
    const size_t padded = (columns + 511) / 512 * 512;
    size_t size = (columns + w->group - 1) / w->group * 4 + 64;
    for (int b = 1; b <= 8; b *= 2)
        if (w->bits & b) size += padded + padded / (32 / b) * 4 + 128;
    return (size + 63) / 64 * 64;
}

VNNI static struct rounded round_row(const struct weight *w, const float *x, long columns, char *room)
{
    const long padded = (columns + 511) / 512 * 512, groups = (columns + w->group - 1) / w->group;
    struct rounded out;
    for (int b = 1; b <= 8; b *= 2) {
        if (!(w->bits & b)) continue;
        out.x[b] = (int8_t *)room;
        room += padded;
        out.lane[b] = (float *)room;
        room += padded / (32 / b) * 4;
    }
    out.sums = (float *)room;
    for (long g = 0; g < groups; g++) out.sums[g] = 0;
    for (long k = 0; k < padded; k += QUANT) {
        const long n = columns - k < 0 ? 0 : columns - k < QUANT ? columns - k : QUANT;
        float most = 0;
        int32_t q[QUANT] = {0}, total = 0;
        for (long i = 0; i < n; i++) {
            const float size = __builtin_fabsf(x[k + i]);
            most = size > most ? size : most;
        }
        const float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
        for (long i = 0; i < n; i++) total += q[i] = (int32_t)__builtin_rintf(x[k + i] * inverse);
        if (n) out.sums[k / w->group] += scale * total;
        for (int b = 1; b <= 8; b *= 2) {
            if (!(w->bits & b)) continue;
            const long a_byte = 8 / b, a_lane = 32 / b, at = k % chunk_of(b);
            int8_t *to = out.x[b] + k / chunk_of(b) * chunk_of(b);
            for (long i = 0; i < QUANT; i++)
                to[(at + i) % a_byte * 64 + (at + i) / a_byte] = (int8_t)q[i];
            for (long i = 0; i < QUANT; i += a_lane) out.lane[b][(k + i) / a_lane] = scale;
        }
    }
    return out;
}

VNNI static inline __attribute__((always_inline)) void plane_vnni(
    const struct weight *w, int b, int low, const uint32_t *plane, long stride, long columns, long row,
    int n_rows, const struct rounded *x, int n_tokens, float *y, long rows)
{
    const long words = (columns + 31) / 32 * b, groups = (columns + w->group - 1) / w->group;
    const long chunk = 512 / b, per = w->group < chunk ? chunk / w->group : 1;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i mask = _mm512_set1_epi8((char)((1 << b) - 1));
    /* which of a chunk's groups a lane is in: both are powers of two */
    const __m512i group = _mm512_srli_epi32(
        lane, per == 1 ? 31 : __builtin_ctzl((unsigned long)w->group) - __builtin_ctzl(32 / (unsigned long)b));
    __m512 sums[ROWS][TOKENS];
    EACH
    for (int r = 0; r < n_rows; r++)
        EACH
        for (int t = 0; t < n_tokens; t++) sums[r][t] = _mm512_setzero_ps();
    for (long c = 0; c * 16 < words; c++) {
        const long left = words - c * 16, first = c * chunk / w->group, have = groups - first;
        const __mmask16 there = left >= 16 ? 0xffff : (1u << left) - 1;
        const __mmask16 some = (1u << (have < per ? have : per)) - 1;
        EACH
        for (int r = 0; r < n_rows; r++) {
            const __m512i codes = _mm512_maskz_loadu_epi32(there, plane + (row + r) * stride + c * 16);
            const __m512 halves = _mm512_cvtph_ps(
                _mm256_maskz_loadu_epi16(some, w->scale + (row + r) * groups + first));
            const __m512 scale = _mm512_permutexvar_ps(group, halves);
            __m512i dot[TOKENS];
            EACH
            for (int t = 0; t < n_tokens; t++) dot[t] = _mm512_setzero_si512();
            _Pragma("GCC unroll 8")
            for (int i = 0; i < 8 / b; i++) {
                const __m512i u = _mm512_and_si512(_mm512_srli_epi32(codes, b * i), mask);
                EACH
                for (int t = 0; t < n_tokens; t++)
                    dot[t] = _mm512_dpbusd_epi32(dot[t], u, _mm512_loadu_si512(x[t].x[b] + c * chunk + i * 64));
            }
            EACH
            for (int t = 0; t < n_tokens; t++) {
                const __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[t]), _mm512_loadu_ps(x[t].lane[b] + c * 16));
                sums[r][t] = _mm512_fmadd_ps(f, scale, sums[r][t]);
            }
        }
    }
    EACH
    for (int r = 0; r < n_rows; r++)
        EACH
        for (int t = 0; t < n_tokens; t++)
            y[t * rows + row + r] += (float)(1 << low) * _mm512_reduce_add_ps(sums[r][t]);
}

#define RUN(b, m, n) plane_vnni(w, b, low, plane, stride, columns, row, m, x + t, n, y + t * rows, rows)
#define OF_PLANE(b)                                                                               \
    VNNI static void plane##b(                                                                    \
        const struct weight *w, int low, const uint32_t *plane, long stride, long columns,        \
        long first, long last, const struct rounded *x, long n_tokens, float *y, long rows)       \
    {                                                                                             \
        for (long t = 0; t < n_tokens;) {                                                         \
            const int many = n_tokens - t >= TOKENS;                                              \
            const long next = t + (many ? TOKENS : 1);                                            \
            long row = first;                                                                     \
            for (; many && row + ROWS <= last; row += ROWS) RUN(b, ROWS, TOKENS);                 \
            for (; !many && row + ROWS <= last; row += ROWS) RUN(b, ROWS, 1);                     \
            for (const long few = row; t < next; t++)                                             \
                for (row = few; row < last; row++) RUN(b, 1, 1);                                  \
        }                                                                                         \
    }
OF_PLANE(1)
OF_PLANE(2)
OF_PLANE(4)
OF_PLANE(8)
#undef RUN
#undef OF_PLANE

/* what the zero points take off: zero * scale * the group's sum */
VNNI static float zeros_vnni(const struct weight *w, long groups, long row, const float *sums)
{
    __m512 all = _mm512_setzero_ps();
    for (long g = 0; g < groups; g += 16) {
        const __mmask16 some = groups - g >= 16 ? 0xffff : (1u << (groups - g)) - 1;
        const __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, w->scale + row * groups + g));
        const __m512 zero = w->zero
            ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, w->zero + row * groups + g))
            : _mm512_set1_ps(0.5f);
        all = _mm512_fmadd_ps(_mm512_mul_ps(scale, zero), _mm512_maskz_loadu_ps(some, sums + g), all);
    }
    return _mm512_reduce_add_ps(all);
}

VNNI static void rows_vnni(
    const struct weight *w, long columns, long first, long last,
    const struct rounded *x, long n_tokens, float *y, long rows)
{
    const long blocks = (columns + 31) / 32, stride = blocks * w->bits;
    const long groups = (columns + w->group - 1) / w->group;
    const uint32_t *plane = w->codes;
    int low = 0;
    for (int b = 8; b; b /= 2) {
        if (!(w->bits & b)) continue;
        (b == 8 ? plane8 : b == 4 ? plane4 : b == 2 ? plane2 : plane1)(
            w, low, plane, stride, columns, first, last, x, n_tokens, y, rows);
        low += b;
        plane += blocks * b;
    }
    for (long t = 0; t < n_tokens; t++)
        for (long row = first; row < last; row++)
            y[t * rows + row] -= zeros_vnni(w, groups, row, x[t].sums);
}
