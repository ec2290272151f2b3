// A picture of a training's loss, for whoever has no Python: what log.csv holds, over the steps. What it
// refuses to become: a plotting library (dev/plot.py draws everything else).
//
//   curve_write     loss.png from log.csv: black the loss, blue its part of denoising; each label is what
//                   stands at its line
#ifndef SRDIT_CURVE_H
#define SRDIT_CURVE_H
#include "picture.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

enum { CURVE_WIDTH = 480, CURVE_HEIGHT = 240, CURVE_LEFT = 60, CURVE_RIM = 20, GLYPH = 2, CURVES = 2 };

static void curve_dot(Picture *p, int x, int y, uint32_t rgb) {
    if (x < 0 || y < 0 || x >= p->width || y >= p->height) return;
    for (int k = 0; k < 3; k++)
        p->pixels[((size_t)y * (size_t)p->width + (size_t)x) * 3 + (size_t)k] =
            (uint8_t)(rgb >> (16 - 8 * k));
}

// A number whose upper right corner is x, y: each sign 3 x 5 dots, an octal digit a row
static void curve_number(Picture *p, int x, int y, double number) {
    static const char signs[] = "0123456789-.";
    static const uint16_t dots[] = {075557, 026227, 071747, 071717, 055711, 074717,
                                    074757, 071111, 075757, 075717, 000700, 000002};
    char text[32];
    int n = snprintf(text, sizeof(text), fabs(number) < 1000 ? "%.3g" : "%.0f", number);
    for (int i = 0; i < n; i++)
        for (int d = 0; d < 15 * GLYPH * GLYPH; d++) {
            const char *sign = strchr(signs, text[i]);
            int row = d / (3 * GLYPH * GLYPH), at = d % (3 * GLYPH * GLYPH);
            int column = at % (3 * GLYPH), line = row * GLYPH + at / (3 * GLYPH);
            if (sign && dots[sign - signs] >> (3 * (4 - row) + 2 - column / GLYPH) & 1)
                curve_dot(p, x - (n - i) * 4 * GLYPH + column, y + line, 0x606060);
        }
}

// rows[n][1 + CURVES]: step, loss, denoise of each line of the log; returns n, the caller frees
static int curve_read(double (**rows)[1 + CURVES], const char *log) {
    char line[1024];
    int n = 0, room = 0;
    FILE *f = fopen(log, "r");
    if (!f && errno != ENOENT)
        die("%s: cannot be read, so that its curve was not drawn: %s", log, strerror(errno));
    *rows = NULL;
    while (f && fgets(line, sizeof(line), f)) {
        if (n == room) {
            double(*more)[1 + CURVES] =
                (double(*)[1 + CURVES]) realloc(*rows, (size_t)(room = 2 * room + 64) * sizeof(**rows));
            if (!more) die("out of memory for the curve of %s", log);
            *rows = more;
        }
        double *r = (*rows)[n];
        n += sscanf(line, "%lf,%lf,%lf", r, r + 1, r + 2) == 1 + CURVES && fabs(r[1] + r[2]) < INFINITY;
    }
    if (f && ferror(f)) die("%s: cannot be read, so that its curve was not drawn: %s", log, strerror(errno));
    if (f) fclose(f);
    return n;
}

static void curve_write(const char *path, const char *log) {
    double(*rows)[1 + CURVES], low = INFINITY, high = -INFINITY;
    int n = curve_read(&rows, log), right = CURVE_WIDTH - CURVE_RIM, bottom = CURVE_HEIGHT - CURVE_RIM;
    for (int i = 0; i < n; i++)
        for (int k = 1; k <= CURVES; k++) low = fmin(low, rows[i][k]), high = fmax(high, rows[i][k]);
    if (n < 2 || !(high > low)) {   // nothing that a curve could show
        free(rows);
        return;
    }
    Picture p = {(uint8_t *)alloc_zero(3 * CURVE_WIDTH * CURVE_HEIGHT, 1), CURVE_WIDTH, CURVE_HEIGHT, 3};
    memset(p.pixels, 255, 3 * CURVE_WIDTH * CURVE_HEIGHT);
    double scale = (bottom - CURVE_RIM) / (high - low), first = rows[0][0], last = rows[n - 1][0];
    for (int i = 0; i <= 4; i++) {
        int y = CURVE_RIM + i * (bottom - CURVE_RIM) / 4;
        for (int x = CURVE_LEFT; x <= right; x++) curve_dot(&p, x, y, 0xdddddd);
        curve_number(&p, CURVE_LEFT - 4, y - 5, high - (y - CURVE_RIM) / scale);
    }
    curve_number(&p, CURVE_LEFT + 8, bottom + 5, first);
    curve_number(&p, right, bottom + 5, last);
    for (int k = CURVES; k >= 1; k--)   // the loss last, on top
        for (int x = CURVE_LEFT, i = 0, before = -1; x <= right; x++) {
            double step = first + (last - first) * (x - CURVE_LEFT) / (right - CURVE_LEFT);
            while (i + 2 < n && rows[i + 1][0] < step) i++;
            double part = (step - rows[i][0]) / (rows[i + 1][0] - rows[i][0]);
            int y = (int)(CURVE_RIM + scale * (high - rows[i][k] - part * (rows[i + 1][k] - rows[i][k])));
            for (int at = before < 0 ? y : imin(y, before); at <= imax(y, before); at++)
                for (int d = 0; d < 2; d++) curve_dot(&p, x, at + d, k == 1 ? 0x000000 : 0x4080d0);
            before = y;
        }
    SafePair text[3] = {pair_text("Software", "SR-DiT in C"), pair_number("first loss", rows[0][1]),
                        pair_number("last loss", rows[n - 1][1])};
    png_write(path, &p, text, 3);
    free(p.pixels), free(rows);
}
#pragma GCC diagnostic pop
#endif
