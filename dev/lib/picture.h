// Pictures: bytes, grids of small pictures, PNG files, and terminals. What it refuses to become: an image
// library. It reads nothing, and its compression knows runs of one byte only.
//
//   Picture                  bytes [height, width, channels], channels 1 (grey) or 3 (RGB)
//   pixels_of                numbers in [-1, 1], a plane for each channel, to such bytes
//   grid_create, grid_put    many pictures of one size in one, each pixel enlarged
//   png_write                a file, which appears when it is whole, with settings as text in it; png_end:
//                            the same for a file that was begun before
//   pictures_show            in any terminal, as half blocks; picture_send: real pixels, where terminal_kind
//                            says that the terminal takes them (Kitty's and iTerm2's protocols)
#ifndef SRDIT_PICTURE_H
#define SRDIT_PICTURE_H
#include "safetensors.h"
#include <sys/ioctl.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

typedef struct {
    uint8_t *pixels;
    int width, height, channels;
} Picture;

// [-1, 1] to a byte, truncated and not rounded, as the reference's scores are made
HOST_DEVICE static uint8_t pixel_of(double x) {
    double v = 255 * (x + 1) / 2;
    return !(v > 0) ? 0 : v > 255 ? 255 : (uint8_t)v;
}

// pixels [n,H,W,C] of planes [n,C,H,W]
static void pixels_of(uint8_t *pixels, const double *planes, int n, int C, int H, int W) {
    size_t plane = (size_t)H * (size_t)W, channels = (size_t)C;
    for (size_t b = 0; b < (size_t)n * channels; b++)
        for (size_t i = 0; i < plane; i++)
            pixels[(b / channels * plane + i) * channels + b % channels] = pixel_of(planes[b * plane + i]);
}

// ----------------------------------------------------------------------------------------------------------
// Grids

// Cells for n pictures of width x height: a rim of `gap` dark pixels around each, each pixel scale x scale.
// The caller frees p.pixels.
typedef struct {
    Picture p;
    int width, height, columns, scale, gap;
} Grid;
static Grid grid_create(int n, int width, int height, int channels, int columns, int scale, int gap) {
    Grid g;
    int rows = (n + columns - 1) / columns;
    g.width = width;
    g.height = height;
    g.columns = columns;
    g.scale = scale;
    g.gap = gap;
    g.p.width = columns * (width * scale + gap) + gap;
    g.p.height = rows * (height * scale + gap) + gap;
    g.p.channels = channels;
    size_t bytes = (size_t)g.p.width * (size_t)g.p.height * (size_t)channels;
    g.p.pixels = (uint8_t *)alloc_zero(bytes, 1);
    memset(g.p.pixels, 40, bytes);
    return g;
}
// Picture i, bytes [height,width,channels], into its cell; cells go row by row.
static void grid_put(Grid *g, int i, const uint8_t *pixels) {
    size_t c = (size_t)g->p.channels;
    int top = i / g->columns * (g->height * g->scale + g->gap) + g->gap;
    int left = i % g->columns * (g->width * g->scale + g->gap) + g->gap;
    for (int y = 0; y < g->height * g->scale; y++)
        for (int x = 0; x < g->width * g->scale; x++)
            memcpy(g->p.pixels + ((size_t)(top + y) * (size_t)g->p.width + (size_t)(left + x)) * c,
                   pixels + ((size_t)(y / g->scale) * (size_t)g->width + (size_t)(x / g->scale)) * c, c);
}
// The grid of all n pictures [n,height,width,channels]
static Grid grid_of_all(const uint8_t *pixels, int n, int width, int height, int channels, int columns,
                        int scale, int gap) {
    Grid g = grid_create(n, width, height, channels, columns, scale, gap);
    size_t size = (size_t)width * (size_t)height * (size_t)channels;
    for (int i = 0; i < n; i++) grid_put(&g, i, pixels + (size_t)i * size);
    return g;
}

// ----------------------------------------------------------------------------------------------------------
// PNG

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
static void little_endian(uint8_t *to, uint32_t x) {
    for (int i = 0; i < 4; i++) to[i] = (uint8_t)(x >> (8 * i));
}
static void png_chunk(FILE *out, const char *type, const uint8_t *data, size_t n) {
    uint8_t size[4], check[4];
    big_endian(size, (uint32_t)n);
    big_endian(check, crc32_of(crc32_of(0, (const uint8_t *)type, 4), data, n));
    fwrite(size, 1, 4, out), fwrite(type, 1, 4, out), fwrite(data, 1, n, out), fwrite(check, 1, 4, out);
}

// Bits of a deflate stream (RFC 1951), lowest first
typedef struct {
    uint8_t *at;
    uint32_t bits;
    int count;
} BitWriter;
static void put_bits(BitWriter *w, uint32_t value, int count) {
    w->bits |= value << w->count, w->count += count;
    for (; w->count >= 8; w->bits >>= 8, w->count -= 8) *w->at++ = (uint8_t)w->bits;
}
static void put_huffman(BitWriter *w, int symbol) {   // the fixed code, whose bits go highest first
    int n = symbol < 144 ? 8 : symbol < 256 ? 9 : symbol < 280 ? 7 : 8;
    uint32_t code = (uint32_t)(symbol < 144   ? 0x30 + symbol
                               : symbol < 256 ? 0x190 + symbol - 144
                               : symbol < 280 ? symbol - 256
                                              : 0xC0 + symbol - 280),
             turned = 0;
    for (int i = 0; i < n; i++) turned |= (code >> i & 1) << (n - 1 - i);
    put_bits(w, turned, n);
}

// zlib's format (RFC 1950) of raw [n]; returns the bytes written to packed, which has room for n + n/8 + 64.
// Runs of one byte, which the difference from the row above gives wherever small pictures are enlarged, are
// the only matches that are looked for.
static size_t zlib_pack(uint8_t *packed, const uint8_t *raw, size_t n) {
    uint32_t a = 1, b = 0;   // Adler-32
    for (size_t i = 0; i < n; i++) {
        a = (a + raw[i]) % 65521;
        b = (b + a) % 65521;
    }
    BitWriter w = {packed + 2, 0, 0};
    packed[0] = 0x78;
    packed[1] = 0x01;
    put_bits(&w, 3, 3);   // one last block with the fixed code
    for (size_t i = 0; i < n;) {
        size_t run = 0;
        while (i && run < 258 && i + run < n && raw[i + run] == raw[i - 1]) run++;
        if (run < 3) {
            put_huffman(&w, raw[i++]);
            continue;
        }
        int extra = 0, length = (int)run - 3;   // groups of four codes with 0, 0, 1, 2, ... extra bits
        while (length >> (extra + 3)) extra++;
        if (run == 258) put_huffman(&w, 285);
        else {
            put_huffman(&w, 257 + 4 * extra + (length >> extra));
            put_bits(&w, (uint32_t)length & ((1u << extra) - 1), extra);
        }
        put_bits(&w, 0, 5);   // distance 1
        i += run;
    }
    put_huffman(&w, 256);
    put_bits(&w, 0, 7);
    big_endian(w.at, b << 16 | a);
    return (size_t)(w.at + 4 - packed);
}

// p into a file just begun, as an 8-bit PNG with the pairs as text chunks; then the file is ended. Rows are
// stored as the difference from the row above.
static void png_end(NewFile *file, const Picture *p, const SafePair *pairs, int pair_count) {
    size_t row = (size_t)p->width * (size_t)p->channels, n = (row + 1) * (size_t)p->height;
    uint8_t *raw = (uint8_t *)alloc_zero(n, 1), *packed = (uint8_t *)alloc_zero(n + n / 8 + 64, 1);
    for (int y = 0; y < p->height; y++) {
        const uint8_t *from = p->pixels + (size_t)y * row;
        uint8_t *to = raw + (row + 1) * (size_t)y;
        *to++ = 2;   // filter "up"
        for (size_t i = 0; i < row; i++) to[i] = (uint8_t)(from[i] - (y ? (from - row)[i] : 0));
    }
    size_t bytes = zlib_pack(packed, raw, n);

    FILE *out = file->file;
    fwrite("\x89PNG\r\n\x1a\n", 1, 8, out);
    uint8_t head[13] = {0};   // width, height, bits, kind of colour, and three methods, 0
    big_endian(head, (uint32_t)p->width);
    big_endian(head + 4, (uint32_t)p->height);
    head[8] = 8;
    head[9] = p->channels == 3 ? 2 : 0;
    png_chunk(out, "IHDR", head, 13);
    for (int i = 0; i < pair_count; i++) {
        char chunk[sizeof(SafePair)];
        int k = snprintf(chunk, sizeof(chunk), "%s%c%s", pairs[i].key, 0, pairs[i].value);
        png_chunk(out, "tEXt", (const uint8_t *)chunk, (size_t)k);
    }
    png_chunk(out, "IDAT", packed, bytes);
    png_chunk(out, "IEND", head, 0);
    file_end(file);
    free(raw);
    free(packed);
}
static void png_write(const char *path, const Picture *p, const SafePair *pairs, int pair_count) {
    NewFile file = file_begin(path);
    png_end(&file, p, pairs, pair_count);
}

// ----------------------------------------------------------------------------------------------------------
// Terminals: Kitty's and iTerm2's protocols show real pixels, half blocks work everywhere else.

enum Terminal { HALF_BLOCKS, KITTY, ITERM };
static int env_has(const char *name, const char *part) {
    const char *value = getenv(name);
    return value && strstr(value, part);
}
static enum Terminal terminal_kind(void) {
    if (!isatty(STDOUT_FILENO) || getenv("TMUX")) return HALF_BLOCKS;   // tmux passes neither on
    if (getenv("KITTY_WINDOW_ID") || getenv("KONSOLE_VERSION") || env_has("TERM", "kitty") ||
        env_has("TERM", "ghostty"))
        return KITTY;
    if (env_has("TERM_PROGRAM", "iTerm") || env_has("TERM_PROGRAM", "WezTerm") ||
        env_has("LC_TERMINAL", "iTerm"))
        return ITERM;
    return HALF_BLOCKS;
}
static int terminal_columns(void) {
    struct winsize w;
    if (!ioctl(STDOUT_FILENO, TIOCGWINSZ, &w) && w.ws_col > 3) return w.ws_col;
    return 100;
}

// Channel k of pixel i as RGB: grey is its own red, green and blue.
static uint8_t rgb_of(const Picture *p, size_t i, int k) {
    return p->pixels[i * (size_t)p->channels + (size_t)(p->channels == 3 ? k : 0)];
}

// The caller frees.
static char *base64(const uint8_t *p, size_t n) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *out = (char *)alloc_zero((n + 2) / 3 * 4 + 1, 1), *to = out;
    for (size_t i = 0; i < n; i += 3) {
        uint32_t bits =
            (uint32_t)p[i] << 16 | (i + 1 < n ? (uint32_t)p[i + 1] << 8 : 0) | (i + 2 < n ? p[i + 2] : 0u);
        for (int k = 0; k < 4; k++) *to++ = i + (size_t)k > n ? '=' : digits[bits >> (18 - 6 * k) & 63];
    }
    return out;
}

// Kitty takes raw pixels, in pieces of at most 4096 characters; m=1: another follows.
static void kitty_send(const Picture *p) {
    size_t bytes = (size_t)p->width * (size_t)p->height * 3;
    uint8_t *raw = (uint8_t *)alloc_zero(bytes, 1);
    for (size_t i = 0; i < bytes; i++) raw[i] = rgb_of(p, i / 3, (int)(i % 3));
    char *text = base64(raw, bytes);
    size_t length = strlen(text);
    for (size_t at = 0; at < length; at += 4096) {
        int more = at + 4096 < length;
        if (at) printf("\x1b_Gm=%d;", more);
        else printf("\x1b_Ga=T,f=24,s=%d,v=%d,m=%d;", p->width, p->height, more);
        printf("%.4096s\x1b\\", text + at);
    }
    printf("\n");
    free(text);
    free(raw);
}

// iTerm2 takes a file, for which a Windows bitmap will do: blue first, and rows of a multiple of 4 bytes.
static void iterm_send(const Picture *p) {
    enum { HEAD = 54 };
    size_t width = (size_t)p->width, row = (width * 3 + 3) / 4 * 4, bytes = HEAD + row * (size_t)p->height;
    uint8_t *file = (uint8_t *)alloc_zero(bytes, 1);
    memcpy(file, "BM", 2);
    little_endian(file + 2, (uint32_t)bytes);
    little_endian(file + 10, HEAD);        // where the pixels begin
    little_endian(file + 14, HEAD - 14);   // the second header's size
    little_endian(file + 18, (uint32_t)p->width);
    little_endian(file + 22, (uint32_t)-p->height);   // negative: rows from the top
    little_endian(file + 26, 1 | 24 << 16);           // planes, bits of a pixel
    little_endian(file + 34, (uint32_t)(bytes - HEAD));
    for (size_t i = 0; i < width * (size_t)p->height; i++)
        for (int k = 0; k < 3; k++)
            file[HEAD + i / width * row + i % width * 3 + (size_t)(2 - k)] = rgb_of(p, i, k);
    char *text = base64(file, bytes);
    printf("\x1b]1337;File=inline=1;size=%zu:%s\a\n", bytes, text);
    free(text);
    free(file);
}

static void picture_send(const Picture *p, enum Terminal kind) {
    if (kind == KITTY) kitty_send(p);
    else iterm_send(p);
}

// Two pixels a character: the upper half block's foreground and its background
static void picture_show(const Picture *p) {
    for (int y = 0; y < p->height; y += 2) {
        for (int x = 0; x < p->width; x++) {
            int rgb[2][3] = {{0}};
            for (int half = 0; half < 2 && y + half < p->height; half++)
                for (int k = 0; k < 3; k++)
                    rgb[half][k] = rgb_of(p, (size_t)(y + half) * (size_t)p->width + (size_t)x, k);
            printf("\x1b[38;2;%d;%d;%dm\x1b[48;2;%d;%d;%dm\xe2\x96\x80", rgb[0][0], rgb[0][1], rgb[0][2],
                   rgb[1][0], rgb[1][1], rgb[1][2]);
        }
        printf("\x1b[0m\n");
    }
}

// small [h,w,C], h = H / shrink, w = W / shrink: each pixel the mean of shrink x shrink of pixels [H,W,C]
static void shrink_into(uint8_t *small, const uint8_t *pixels, int w, int h, int W, int C, int shrink) {
    for (int k = 0; k < w * h * C; k++) {
        int sum = 0, top = k / C / w * shrink, left = k / C % w * shrink;
        for (int y = top; y < top + shrink; y++)
            for (int x = left; x < left + shrink; x++)
                sum += pixels[((size_t)y * (size_t)W + (size_t)x) * (size_t)C + (size_t)(k % C)];
        small[k] = (uint8_t)(sum / (shrink * shrink));
    }
}

// Pictures [n,H,W,channels] as half blocks: small ones pixel by pixel, large ones shrunk to at most 64
// columns. As many stand in a line as fit, at most `columns`. Returns the lines printed.
static int pictures_show(const uint8_t *pixels, int n, int H, int W, int channels, int columns) {
    int shrink = (W + 63) / 64, w = imax(1, W / shrink), h = imax(1, H / shrink);
    size_t size = (size_t)H * (size_t)W * (size_t)channels;
    columns = imax(1, imin(columns, (terminal_columns() - 1) / (w + 1)));
    Grid g = grid_create(n, w, h, channels, columns, 1, 1);
    uint8_t *small = (uint8_t *)alloc_zero((size_t)w * (size_t)h, (size_t)channels);
    for (int i = 0; i < n; i++) {
        shrink_into(small, pixels + (size_t)i * size, w, h, W, channels, shrink);
        grid_put(&g, i, small);
    }
    picture_show(&g.p);
    free(small);
    free(g.p.pixels);
    return (g.p.height + 1) / 2;
}
#pragma GCC diagnostic pop
#endif
