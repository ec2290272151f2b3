// Random numbers are addressed, not drawn: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011) turns a key and a counter into 128 random bits. The key is the seed; the counter says
// what the number is for: (block of four, sample, step, stream). No state: any thread, any GPU and a resumed
// run see the same numbers at the same place.
//
//   draw4(seed, stream, step, sample, block)     four times 32 bits
//   uniform, fill_normal, permuted               from them: [0, 1), standard normals, a place in a shuffle
#ifndef SRDIT_RANDOM_H
#define SRDIT_RANDOM_H
#include "base.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

typedef struct {
    uint32_t v[4];
} Philox;

HOST_DEVICE static Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;   // the golden ratio and sqrt(3) - 1, as in the paper
        k1 += 0xBB67AE85u;
    }
    Philox out = {{c0, c1, c2, c3}};
    return out;
}

HOST_DEVICE static Philox draw4(uint64_t seed, uint32_t stream, uint32_t step, uint32_t sample,
                                uint32_t block) {
    return philox(seed, block, sample, step, stream);
}

// 24 random bits as a float in [0, 1), exact in float and so the same everywhere
HOST_DEVICE static float uniform_of(uint32_t bits) { return (float)(bits >> 8) * (1.0f / 16777216.0f); }

static float uniform(uint64_t seed, uint32_t stream, uint32_t step, uint32_t sample) {
    return uniform_of(draw4(seed, stream, step, sample, 0).v[0]);
}

// Box-Muller: two uniforms make two independent normals; u in (0, 1] keeps the logarithm finite.
HOST_DEVICE static void normal2(float *z, uint32_t a, uint32_t b) {
    float r = sqrtf(-2.0f * logf((float)((a >> 8) + 1) * (1.0f / 16777216.0f)));
    float angle = 6.28318530718f * uniform_of(b);
    z[0] = r * cosf(angle);
    z[1] = r * sinf(angle);
}

// The n standard normals at (seed, stream, step, sample)
static void fill_normal(real *out, size_t n, uint64_t seed, uint32_t stream, uint32_t step, uint32_t sample) {
    for (size_t i = 0; i < n; i += 4) {
        Philox r = draw4(seed, stream, step, sample, (uint32_t)(i / 4));
        float z[4];
        normal2(z, r.v[0], r.v[1]);
        normal2(z + 2, r.v[2], r.v[3]);
        for (size_t j = i; j < n && j < i + 4; j++) out[j] = z[j - i];
    }
}

// Position i of a random permutation of 0 ... n-1, without storing it: a Feistel network permutes the
// smallest power of four that holds n; what falls outside is sent through again until it falls inside (cycle
// walking).
static uint32_t permuted(uint32_t i, uint32_t n, uint64_t seed, uint32_t stream, uint32_t epoch) {
    int half = 1;
    while (((uint64_t)1 << (2 * half)) < n) half++;
    uint32_t mask = (1u << half) - 1;
    do {
        uint32_t left = i >> half, right = i & mask;
        for (uint32_t round = 0; round < 6; round++) {
            uint32_t f = draw4(seed, stream, epoch, right, round).v[0] & mask, old = right;
            right = left ^ f;
            left = old;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

// The k-th smallest of x[n], counted from 0 (Hoare's quickselect: what holds place k is split around a value
// until nothing is left to split); x is reordered
static uint64_t kth_smallest(uint64_t *x, long n, long k) {
    for (long low = 0, high = n - 1; low < high;) {
        uint64_t pivot = x[k];
        long i = low, j = high;
        while (i <= j) {
            while (x[i] < pivot) i++;
            while (x[j] > pivot) j--;
            if (i > j) break;
            uint64_t swap = x[i];
            x[i++] = x[j];
            x[j--] = swap;
        }
        if (j < k) low = i;
        if (i > k) high = j;
    }
    return x[k];
}
#pragma GCC diagnostic pop
#endif
