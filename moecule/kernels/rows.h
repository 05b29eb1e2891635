/* The product of some rows of packed codes with some tokens, for one instruction set.

   The file that includes this defines WIDTH (floats in a vector), NAME(x), TARGET, the types F and I,
   and: load, store, set1, half (one half everywhere), sub, mul, fma, total (of a vector);
   NAME(codes)(words, k, bits, blocks): columns k .. k + WIDTH of a row; number(I): as floats;
   BY_TABLE(bits): whether the levels of a group fit in a vector. Then NAME(first_codes)(bits) are the
   codes of its entries, and pick(table, I) reads it, whatever stands above the bits of a code.
   A weight is (code - zero) * scale in float32, rounded after each step, as everywhere in moecule. */

TARGET static inline __attribute__((always_inline)) void NAME(tile)(
    const struct weight *w, int bits, long columns, long row, int n_rows,
    const float *x, int n_tokens, float *y, long rows, float *dense)
{
    const long blocks = (columns + 31) / 32, groups = (columns + w->group - 1) / w->group;
    F sums[ROWS][TOKENS], table[ROWS], zero[ROWS], scale[ROWS];
    EACH
    for (int r = 0; r < n_rows; r++)
        EACH
        for (int t = 0; t < n_tokens; t++) sums[r][t] = set1(0);
    for (long g = 0; g < groups; g++) {
        const long end = (g + 1) * w->group < columns ? (g + 1) * w->group : columns;
        EACH
        for (int r = 0; r < n_rows; r++) {
            const long at = (row + r) * groups + g;
            scale[r] = half(w->scale[at]);
            zero[r] = w->zero ? half(w->zero[at]) : set1(0.5f);
            if (BY_TABLE(bits)) table[r] = mul(sub(number(NAME(first_codes)(bits)), zero[r]), scale[r]);
        }
        long k = g * w->group; /* words hold WIDTH columns from multiples of WIDTH on */
        for (; k < end && k % WIDTH; k++) column(w, bits, columns, row, n_rows, g, k, x, n_tokens, y, rows, dense);
        for (; k + WIDTH <= end; k += WIDTH)
            EACH
            for (int r = 0; r < n_rows; r++) {
                const I q = NAME(codes)(w->codes + (row + r) * blocks * bits, k, bits, blocks);
                const F v = BY_TABLE(bits) ? pick(table[r], q) : mul(sub(number(q), zero[r]), scale[r]);
                if (dense) store(dense + (row + r) * columns + k, v);
                EACH
                for (int t = 0; t < n_tokens; t++)
                    sums[r][t] = fma(v, load(x + t * columns + k), sums[r][t]);
            }
        for (; k < end; k++) column(w, bits, columns, row, n_rows, g, k, x, n_tokens, y, rows, dense);
    }
    EACH
    for (int r = 0; r < n_rows; r++)
        EACH
        for (int t = 0; t < n_tokens; t++) y[t * rows + row + r] += total(sums[r][t]);
}

/* widths, rows and tokens known when compiling make straight lines of the loops over them */
#define RUN(b, m, n) NAME(tile)(w, b, columns, row, m, x + t * columns, n, y + t * rows, rows, 0)
#define OF_WIDTH(name, b)                                                  \
    TARGET static void name(                                               \
        const struct weight *w, long columns, long first, long last,       \
        const float *x, long n_tokens, float *y, long rows, float *dense)  \
    {                                                                      \
        for (long row = first; dense && row < last; row++)                 \
            NAME(tile)(w, b, columns, row, 1, 0, 0, 0, rows, dense);       \
        for (long t = 0; t < n_tokens;) {                                  \
            const int many = n_tokens - t >= TOKENS;                       \
            long row = first;                                              \
            for (; many && row + ROWS <= last; row += ROWS) RUN(b, ROWS, TOKENS); \
            for (; !many && row + ROWS <= last; row += ROWS) RUN(b, ROWS, 1); \
            const long next = t + (many ? TOKENS : 1);                     \
            for (const long few = row; t < next; t++)                      \
                for (row = few; row < last; row++) RUN(b, 1, 1);           \
        }                                                                  \
    }
OF_WIDTH(NAME(rows1), 1)
OF_WIDTH(NAME(rows2), 2)
OF_WIDTH(NAME(rows3), 3)
OF_WIDTH(NAME(rows4), 4)
OF_WIDTH(NAME(rows5), 5)
OF_WIDTH(NAME(rows6), 6)
OF_WIDTH(NAME(rows7), 7)
OF_WIDTH(NAME(rows8), 8)
#undef RUN
#undef OF_WIDTH

static const some_rows NAME(forms)[] = {
    0, NAME(rows1), NAME(rows2), NAME(rows3), NAME(rows4),
    NAME(rows5), NAME(rows6), NAME(rows7), NAME(rows8),
};

/* for the next instruction set */
#undef WIDTH
#undef NAME
#undef TARGET
#undef F
#undef I
#undef load
#undef store
#undef set1
#undef half
#undef sub
#undef mul
#undef fma
#undef total
#undef number
#undef pick
#undef BY_TABLE
