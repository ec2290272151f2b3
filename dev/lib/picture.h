// Pictures: PNG files, grids of small pictures, and half-block characters in a terminal.
#ifndef SRDIT_PICTURE_H
#define SRDIT_PICTURE_H
#include "safetensors.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

static uint32_t crc32_of(uint32_t crc, const uint8_t *p, size_t n) {   // of PNG and of zip; starts at 0
    static uint32_t table[256];
    if (!table[1])
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
            table[i] = c;
        }
    crc = ~crc;
    for (size_t i = 0; i < n; i++) crc = table[(crc ^ p[i]) & 255] ^ crc >> 8;
    return ~crc;
}

static void big_endian(uint8_t *to, uint32_t x) {
    for (int i = 0; i < 4; i++) to[i] = (uint8_t)(x >> (24 - 8 * i));
}
static void png_chunk(FILE *out, const char *type, const uint8_t *data, size_t n) {
    uint8_t size[4], check[4];
    big_endian(size, (uint32_t)n);
    big_endian(check, crc32_of(crc32_of(0, (const uint8_t *)type, 4), data, n));
    fwrite(size, 1, 4, out), fwrite(type, 1, 4, out), fwrite(data, 1, n, out), fwrite(check, 1, 4, out);
}

// Bits of a deflate stream (RFC 1951), lowest first
typedef struct { uint8_t *at; uint32_t bits; int count; } BitWriter;
static void put_bits(BitWriter *w, uint32_t value, int count) {
    w->bits |= value << w->count, w->count += count;
    for (; w->count >= 8; w->bits >>= 8, w->count -= 8) *w->at++ = (uint8_t)w->bits;
}
static void put_huffman(BitWriter *w, int symbol) {   // the fixed code, whose bits go highest first
    int n = symbol < 144 ? 8 : symbol < 256 ? 9 : symbol < 280 ? 7 : 8;
    uint32_t code = (uint32_t)(symbol < 144 ? 0x30 + symbol : symbol < 256 ? 0x190 + symbol - 144
                               : symbol < 280 ? symbol - 256 : 0xC0 + symbol - 280), turned = 0;
    for (int i = 0; i < n; i++) turned |= (code >> i & 1) << (n - 1 - i);
    put_bits(w, turned, n);
}

// 8-bit grey (channels 1) or RGB (3). Rows are stored as the difference from the row above; runs of one byte,
// which that gives wherever small pictures are enlarged, are the only matches looked for: a page of code, not
// a library.
static void png_write(const char *path, const uint8_t *pixels, int width, int height, int channels,
                      const SafePair *text, int text_count) {
    size_t row = (size_t)width * (size_t)channels, n = (row + 1) * (size_t)height;
    uint8_t *raw = (uint8_t *)alloc_zero(n, 1), *packed = (uint8_t *)alloc_zero(n + n / 8 + 64, 1);
    uint32_t a = 1, b = 0;   // Adler-32
    for (int y = 0; y < height; y++) {
        uint8_t *to = raw + (row + 1) * (size_t)y;
        *to++ = 2;           // filter "up"
        for (size_t i = 0; i < row; i++)
            to[i] = (uint8_t)(pixels[(size_t)y * row + i] - (y ? pixels[((size_t)y - 1) * row + i] : 0));
    }
    for (size_t i = 0; i < n; i++) a = (a + raw[i]) % 65521, b = (b + a) % 65521;
    BitWriter w = {packed + 2, 0, 0};
    packed[0] = 0x78, packed[1] = 0x01;
    put_bits(&w, 3, 3);      // one last block with the fixed code
    for (size_t i = 0; i < n;) {
        size_t run = 0;
        while (i && run < 258 && i + run < n && raw[i + run] == raw[i - 1]) run++;
        if (run < 3) { put_huffman(&w, raw[i++]); continue; }
        int extra = 0, length = (int)run - 3;   // groups of four codes with 0, 0, 1, 2, ... extra bits
        while (length >> (extra + 3)) extra++;
        if (run == 258) put_huffman(&w, 285);
        else {
            put_huffman(&w, 257 + 4 * extra + (length >> extra));
            put_bits(&w, (uint32_t)length & ((1u << extra) - 1), extra);
        }
        put_bits(&w, 0, 5);                             // distance 1
        i += run;
    }
    put_huffman(&w, 256);
    put_bits(&w, 0, 7);
    big_endian(w.at, b << 16 | a), w.at += 4;

    char temporary[PATH_MAX];
    FILE *out = file_begin(temporary, path);
    fwrite("\x89PNG\r\n\x1a\n", 1, 8, out);
    uint8_t head[13] = {0, 0, 0, 0, 0, 0, 0, 0, 8, (uint8_t)(channels == 3 ? 2 : 0), 0, 0, 0};
    big_endian(head, (uint32_t)width), big_endian(head + 4, (uint32_t)height);
    png_chunk(out, "IHDR", head, 13);
    for (int i = 0; i < text_count; i++) {
        char chunk[sizeof(SafePair)];
        int k = snprintf(chunk, sizeof(chunk), "%s%c%s", text[i].key, 0, text[i].value);
        png_chunk(out, "tEXt", (const uint8_t *)chunk, (size_t)k);
    }
    png_chunk(out, "IDAT", packed, (size_t)(w.at - packed));
    png_chunk(out, "IEND", head, 0);
    file_end(out, temporary, path);
    free(raw), free(packed);
}

// [-1, 1] to a byte, truncated and not rounded, as the reference's scores are made
static uint8_t pixel_of(double x) {
    double v = 255 * (x + 1) / 2;
    return !(v > 0) ? 0 : v > 255 ? 255 : (uint8_t)v;
}

// n images [n,C,S,S] of pixels in [-1,1], C = 1 or 3, in a grid, each pixel enlarged to scale x scale. The
// caller frees.
typedef struct { uint8_t *pixels; int width, height, channels; } Picture;
static Picture picture_grid(const double *x, int n, int C, int S, int columns, int scale, int gap) {
    int rows = (n + columns - 1) / columns, cell = S * scale + gap;
    Picture p = {NULL, columns * cell + gap, rows * cell + gap, C};
    p.pixels = (uint8_t *)alloc_zero((size_t)p.width * (size_t)p.height, (size_t)C);
    memset(p.pixels, 40, (size_t)p.width * (size_t)p.height * (size_t)C);
    for (int i = 0; i < n; i++)
        for (int y = 0; y < S * scale; y++)
            for (int z = 0; z < S * scale; z++)
                for (int ch = 0; ch < C; ch++) {
                    size_t at = (size_t)(i / columns * cell + gap + y) * (size_t)p.width +
                                (size_t)(i % columns * cell + gap + z);
                    p.pixels[at * (size_t)C + (size_t)ch] =
                        pixel_of(x[(((size_t)i * C + ch) * S + y / scale) * S + z / scale]);
                }
    return p;
}

// Two pixels a character: the upper half block's foreground and its background
static void picture_show(const Picture *p) {
    for (int y = 0; y < p->height; y += 2) {
        for (int x = 0; x < p->width; x++) {
            int rgb[2][3] = {{0}}, n = p->channels;
            for (int half = 0; half < 2; half++)
                for (int ch = 0; ch < 3; ch++) {
                    size_t at = (size_t)(y + half) * (size_t)p->width + (size_t)x;
                    if (y + half < p->height)
                        rgb[half][ch] = p->pixels[at * (size_t)n + (size_t)(n == 3 ? ch : 0)];
                }
            printf("\x1b[38;2;%d;%d;%dm\x1b[48;2;%d;%d;%dm\xe2\x96\x80", rgb[0][0], rgb[0][1], rgb[0][2],
                   rgb[1][0], rgb[1][1], rgb[1][2]);
        }
        printf("\x1b[0m\n");
    }
}
#pragma GCC diagnostic pop
#endif
