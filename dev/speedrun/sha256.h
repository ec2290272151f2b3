// SHA-256 (FIPS 180-4), for evidence: which files a run used, what it was built from, that its log is whole.
//
//   sha256_begin, sha256_add, sha256_end     of pieces, one after the other
//   sha256_of_file                           of a file, as it lies on the disk
#ifndef SRDIT_SHA256_H
#define SRDIT_SHA256_H
#include "../lib/base.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

enum { SHA_HEX = 65 };   // 64 digits and the end of the text
typedef struct {
    uint32_t state[8];
    uint8_t block[64];
    uint64_t bytes;
} Sha256;

static uint32_t rotate_right(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha256_block(uint32_t state[8], const uint8_t *p) {
    static const uint32_t K[64] = {
        // fractions of the cube roots of the first 64 primes
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 |
               p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (rotate_right(a, 7) ^ rotate_right(a, 18) ^ a >> 3) + w[i - 7] +
               (rotate_right(b, 17) ^ rotate_right(b, 19) ^ b >> 10);
    }
    memcpy(s, state, sizeof(s));
    for (int i = 0; i < 64; i++) {   // s: a b c d e f g h of the standard
        uint32_t a = s[0], e = s[4];
        uint32_t t1 = s[7] + (rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25)) +
                      ((e & s[5]) ^ (~e & s[6])) + K[i] + w[i];
        uint32_t t2 = (rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22)) +
                      ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof(s[0]));
        s[0] = t1 + t2;
        s[4] += t1;
    }
    for (int i = 0; i < 8; i++) state[i] += s[i];
}

static Sha256 sha256_begin(void) {   // fractions of the square roots of the first 8 primes
    Sha256 h = {
        {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19},
        {0},
        0};
    return h;
}
static void sha256_add(Sha256 *h, const void *data, size_t n) {
    const uint8_t *p = (const uint8_t *)data;
    while (n) {
        size_t at = (size_t)(h->bytes % 64), part = 64 - at < n ? 64 - at : n;
        if (part == 64) sha256_block(h->state, p);
        else {
            memcpy(h->block + at, p, part);
            if (at + part == 64) sha256_block(h->state, h->block);
        }
        h->bytes += part, p += part, n -= part;
    }
}
static void sha256_end(Sha256 *h, char hex[SHA_HEX]) {
    uint64_t bits = 8 * h->bytes;
    uint8_t one = 0x80, zero = 0, length[8];
    for (int i = 0; i < 8; i++) length[i] = (uint8_t)(bits >> (56 - 8 * i));
    sha256_add(h, &one, 1);
    while (h->bytes % 64 != 56) sha256_add(h, &zero, 1);
    sha256_add(h, length, 8);
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08x", h->state[i]);
}

static void sha256_of(char hex[SHA_HEX], const void *data, size_t n) {
    Sha256 h = sha256_begin();
    sha256_add(&h, data, n);
    sha256_end(&h, hex);
}

// Returns the file's bytes; hint: what to do where it cannot be read
static uint64_t sha256_of_file(char hex[SHA_HEX], const char *path, const char *hint) {
    static uint8_t part[1 << 16];
    Sha256 h = sha256_begin();
    FILE *f = fopen(path, "rb");
    if (!f) die("%s: cannot be read: %s; %s", path, strerror(errno), hint);
    for (size_t n; (n = fread(part, 1, sizeof(part), f)) > 0;) sha256_add(&h, part, n);
    if (ferror(f)) die("%s: cannot be read: %s; %s", path, strerror(errno), hint);
    fclose(f);
    uint64_t bytes = h.bytes;
    sha256_end(&h, hex);
    return bytes;
}
#pragma GCC diagnostic pop
#endif
