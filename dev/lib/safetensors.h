// safetensors: 8 bytes of header length, a JSON header, raw little-endian data. The reader trusts nothing: a
// file is mapped only if every byte of it is accounted for; whatever is wrong with it is one sentence that
// names the file and the tensor, and the end.
//
//   safe_open, safe_close, safe_find, safe_data, safe_metadata     a mapped file, its tensors and metadata
//   safe_read            a tensor of any number type as `real`
//   safe_write           a list of tensors and metadata to a file, which appears when it is whole
#ifndef SRDIT_SAFETENSORS_H
#define SRDIT_SAFETENSORS_H
#include "base.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs
#include <ctype.h>
#include <sys/mman.h>

enum { MAX_DIMS = 8 };
typedef struct {
    char *name;
    char dtype[8];
    int ndim;
    uint64_t shape[MAX_DIMS];
    uint64_t begin, end;   // bytes, from the start of the data
} SafeTensor;

typedef struct {
    char *path;
    const uint8_t *map, *data;   // the whole file, and its data
    size_t size;
    SafeTensor *tensors;   // in order of their names
    int count;
    char **keys, **values;   // __metadata__
    int metadata_count;
} SafeFile;

static int dtype_bytes(const char *dtype) {
    static const char *const names[] = {"BOOL", "U8",  "I8",  "F16", "BF16", "I16", "U16",
                                        "F32",  "I32", "U32", "F64", "I64",  "U64"};
    static const int bytes[] = {1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8};
    for (size_t i = 0; i < sizeof(bytes) / sizeof(bytes[0]); i++)
        if (!strcmp(dtype, names[i])) return bytes[i];
    return 0;
}

// Element i of an array of the given dtype, as a double
static double element(const void *data, const char *dtype, size_t i) {
    const uint8_t *p = (const uint8_t *)data + i * (size_t)dtype_bytes(dtype);
    int b = dtype_bytes(dtype), is_signed = dtype[0] == 'I';
    if (!strcmp(dtype, "F64")) {
        double x;
        memcpy(&x, p, 8);
        return x;
    }
    if (!strcmp(dtype, "F32")) {
        float x;
        memcpy(&x, p, 4);
        return x;
    }
    if (!strcmp(dtype, "BF16")) {   // the upper half of a float
        uint32_t bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    if (!strcmp(dtype, "F16")) {
        int h = p[0] | p[1] << 8, e = h >> 10 & 31, m = h & 1023;
        double x = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
        return h >> 15 ? -x : x;
    }
    uint64_t u = 0;
    for (int j = 0; j < b; j++) u |= (uint64_t)p[j] << (8 * j);
    if (is_signed && b < 8 && u >> (8 * b - 1)) u |= ~(uint64_t)0 << (8 * b);
    return is_signed ? (double)(int64_t)u : (double)u;
}

// The JSON of a header is a small part of JSON: objects, strings, lists of whole numbers.
typedef struct {
    const char *p, *end, *path;
} Json;

__attribute__((noreturn)) static void json_die(const Json *j, const char *what) {
    die("%s: the header is not valid: %s", j->path, what);
}
static int json_accept(Json *j, char c) {
    while (j->p < j->end && strchr(" \t\r\n", *j->p) && *j->p) j->p++;
    if (j->p >= j->end || *j->p != c || !c) return 0;   // c = 0 skips blanks only
    j->p++;
    return 1;
}
static void json_expect(Json *j, char c) {
    char what[32];
    snprintf(what, sizeof(what), "'%c' expected", c);
    if (!json_accept(j, c)) json_die(j, what);
}
static char *json_string(Json *j) {
    json_expect(j, '"');
    const char *start = j->p;
    while (j->p < j->end && *j->p != '"') j->p += *j->p == '\\' ? 2 : 1;
    if (j->p >= j->end) json_die(j, "a string does not end");
    char *out = (char *)alloc_zero((size_t)(j->p - start) + 1, 1), *to = out;
    for (const char *s = start; s < j->p; s++) {
        if ((unsigned char)*s < 32) json_die(j, "a control character stands in a string");
        if (*s != '\\') {
            *to++ = *s;
            continue;
        }
        static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
        const char *at = strchr(from, *++s);
        if (at && *at) {
            *to++ = into[at - from];
            continue;
        }
        unsigned code = 0;
        if (*s != 'u' || s + 4 >= j->p) json_die(j, "unknown escape in a string");
        for (int k = 0; k < 4; k++) {
            int ch = tolower((unsigned char)*++s);
            if (!isxdigit(ch)) json_die(j, "unknown escape in a string");
            code = code * 16 + (unsigned)(ch <= '9' ? ch - '0' : ch - 'a' + 10);
        }
        if (!code) json_die(j, "a string holds a zero character");
        if (code < 0x80) *to++ = (char)code;   // UTF-8, one to three bytes
        else {
            if (code < 0x800) *to++ = (char)(0xC0 | code >> 6);
            else *to++ = (char)(0xE0 | code >> 12), *to++ = (char)(0x80 | (code >> 6 & 63));
            *to++ = (char)(0x80 | (code & 63));
        }
    }
    if (memchr(start, 0, (size_t)(j->p - start))) json_die(j, "a string holds a zero character");
    j->p++;
    return out;
}
static uint64_t json_whole(Json *j) {
    json_accept(j, 0);   // skips blanks only
    uint64_t n = 0;
    const char *start = j->p;
    for (; j->p < j->end && isdigit((unsigned char)*j->p); j->p++) {
        n = n * 10 + (uint64_t)(*j->p - '0');
        if (n >> 56) json_die(j, "a number is too large");
    }
    if (j->p == start) json_die(j, "a whole number, 0 or more, expected");
    return n;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const SafeTensor *)a)->name, ((const SafeTensor *)b)->name);
}
static int by_begin(const void *a, const void *b) {
    const SafeTensor *s = (const SafeTensor *)a, *t = (const SafeTensor *)b;
    return s->begin != t->begin ? (s->begin < t->begin ? -1 : 1) : s->end < t->end ? -1 : s->end > t->end;
}

// "name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, the three keys in any order
static SafeTensor json_tensor(Json *j, char *name) {
    SafeTensor t;
    memset(&t, 0, sizeof(t));
    t.name = name;
    int seen = 0;
    json_expect(j, '{');
    do {
        char *key = json_string(j);
        json_expect(j, ':');
        int what = !strcmp(key, "dtype") ? 1 : !strcmp(key, "shape") ? 2 : 4 * !strcmp(key, "data_offsets");
        if (!what || seen & what)
            die("%s: tensor %s: its entry has an unknown or repeated key, %s", j->path, name, key);
        seen |= what;
        free(key);
        if (what == 1) {
            char *dtype = json_string(j);
            if (!dtype_bytes(dtype)) die("%s: tensor %s: unknown dtype %s", j->path, name, dtype);
            snprintf(t.dtype, sizeof(t.dtype), "%s", dtype);
            free(dtype);
            continue;
        }
        uint64_t list[MAX_DIMS];
        int n = 0;
        json_expect(j, '[');
        if (!json_accept(j, ']')) {
            do {
                if (n == MAX_DIMS) die("%s: tensor %s: more than %d dimensions", j->path, name, MAX_DIMS);
                list[n++] = json_whole(j);
            } while (json_accept(j, ','));
            json_expect(j, ']');
        }
        if (what == 2) memcpy(t.shape, list, sizeof(list[0]) * (size_t)n), t.ndim = n;
        else if (n != 2) die("%s: tensor %s: data_offsets needs two numbers", j->path, name);
        else t.begin = list[0], t.end = list[1];
    } while (json_accept(j, ','));
    json_expect(j, '}');
    if (seen != 7) die("%s: tensor %s: dtype, shape or data_offsets is missing", j->path, name);
    return t;
}

static size_t safe_elements(const SafeTensor *t) {
    size_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= (size_t)t->shape[i];
    return n;
}

static SafeFile *safe_open(const char *path) {
    SafeFile *f = (SafeFile *)alloc_zero(1, sizeof(SafeFile));
    f->path = strdup(path);
    int fd = open(path, O_RDONLY | O_NONBLOCK);   // a FIFO would wait for its writer
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) die("%s: cannot be opened: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s: is not a file", path);
    f->size = (size_t)st.st_size;
    if (f->size < 8) die("%s: is not a safetensors file: it has only %zu bytes", path, f->size);
    f->map = (const uint8_t *)mmap(NULL, f->size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (f->map == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    uint64_t length = 0;
    for (int i = 0; i < 8; i++) length |= (uint64_t)f->map[i] << (8 * i);
    if (length > 100000000 || length > f->size - 8)
        die("%s: the header claims %.0f bytes: not a safetensors file, or a truncated one", path,
            (double)length);
    Json j = {(const char *)f->map + 8, (const char *)f->map + 8 + length, path};
    f->data = f->map + 8 + length;
    if (!length || *j.p != '{') json_die(&j, "it does not begin with '{'");
    json_expect(&j, '{');
    int room = 0, has_metadata = 0, more = !json_accept(&j, '}');
    while (more) {
        char *name = json_string(&j);
        json_expect(&j, ':');
        if (!strcmp(name, "__metadata__")) {
            if (has_metadata++) json_die(&j, "__metadata__ stands twice");
            free(name);
            json_expect(&j, '{');
            int inner = !json_accept(&j, '}');
            for (int have = 0; inner; f->metadata_count++) {
                if (f->metadata_count == have) {
                    have = 2 * have + 16;
                    f->keys = (char **)realloc(f->keys, sizeof(char *) * (size_t)have);
                    f->values = (char **)realloc(f->values, sizeof(char *) * (size_t)have);
                    if (!f->keys || !f->values) die("%s: out of memory for its metadata", path);
                }
                f->keys[f->metadata_count] = json_string(&j);
                json_expect(&j, ':');
                f->values[f->metadata_count] = json_string(&j);
                inner = json_accept(&j, ',');
                if (!inner) json_expect(&j, '}');
            }
        } else {
            if (f->count == room) {
                room = 2 * room + 64;
                f->tensors = (SafeTensor *)realloc(f->tensors, sizeof(SafeTensor) * (size_t)room);
                if (!f->tensors) die("%s: out of memory for %d tensors", path, room);
            }
            f->tensors[f->count++] = json_tensor(&j, name);
        }
        more = json_accept(&j, ',');
        if (!more) json_expect(&j, '}');
    }
    json_accept(&j, 0);
    if (j.p != j.end) json_die(&j, "something follows its closing '}'");

    uint64_t data_bytes = f->size - 8 - length, at = 0;
    if (f->count) qsort(f->tensors, (size_t)f->count, sizeof(SafeTensor), by_begin);
    for (int i = 0; i < f->count; i++) {
        SafeTensor *t = &f->tensors[i];
        uint64_t bytes = (uint64_t)dtype_bytes(t->dtype);
        for (int d = 0; d < t->ndim; d++)
            if (__builtin_mul_overflow(bytes, t->shape[d], &bytes))
                die("%s: tensor %s: its shape overflows", path, t->name);
        if (t->begin > t->end || t->end > data_bytes)
            die("%s: tensor %s: its data lies outside the file, which may be truncated", path, t->name);
        if (t->end - t->begin != bytes)
            die("%s: tensor %s: its shape needs %.0f bytes but its data has %.0f", path, t->name,
                (double)bytes, (double)(t->end - t->begin));
        if (t->begin != at)
            die("%s: tensor %s: its data %s", path, t->name,
                t->begin < at ? "overlaps another's" : "leaves a hole before it");
        at = t->end;
    }
    if (at != data_bytes) die("%s: %.0f bytes follow the last tensor", path, (double)(data_bytes - at));
    if (f->count) qsort(f->tensors, (size_t)f->count, sizeof(SafeTensor), by_name);
    for (int i = 1; i < f->count; i++)
        if (!strcmp(f->tensors[i - 1].name, f->tensors[i].name))
            die("%s: tensor %s: stands twice in the header", path, f->tensors[i].name);
    for (int i = 0; i < f->metadata_count; i++)
        for (int k = 0; k < i; k++)
            if (!strcmp(f->keys[i], f->keys[k])) die("%s: metadata key %s stands twice", path, f->keys[i]);
    return f;
}

static void safe_close(SafeFile *f) {
    for (int i = 0; i < f->count; i++) free(f->tensors[i].name);
    for (int i = 0; i < f->metadata_count; i++) free(f->keys[i]), free(f->values[i]);
    munmap((void *)f->map, f->size);
    free(f->tensors), free(f->keys), free(f->values), free(f->path), free(f);
}

static const SafeTensor *safe_find(const SafeFile *f, const char *name) {
    SafeTensor key;
    key.name = (char *)name;
    if (!f->count) return NULL;
    return (const SafeTensor *)bsearch(&key, f->tensors, (size_t)f->count, sizeof(SafeTensor), by_name);
}
static const void *safe_data(const SafeFile *f, const SafeTensor *t) { return f->data + t->begin; }

static const char *safe_metadata(const SafeFile *f, const char *key) {
    for (int i = 0; i < f->metadata_count; i++)
        if (!strcmp(f->keys[i], key)) return f->values[i];
    return NULL;
}
// The same for a whole number in a range; `otherwise` where the key is absent
static double safe_whole(const SafeFile *f, const char *key, double low, double high, double otherwise) {
    const char *text = safe_metadata(f, key);
    double x = text ? text_number(text, f->path, key) : otherwise;
    if (!(x >= low && x <= high) || x != floor(x))
        die("%s: %s is %g, which is not a whole number from %.0f to %.0f", f->path, key, x, low, high);
    return x;
}
static double safe_number(const SafeFile *f, const char *key, double otherwise) {
    const char *text = safe_metadata(f, key);
    return text ? text_number(text, f->path, key) : otherwise;
}

// All elements of a tensor as `real`
static void safe_read(real *out, const SafeFile *f, const SafeTensor *t) {
    size_t n = safe_elements(t);
    if (!strcmp(t->dtype, sizeof(real) == 4 ? "F32" : "F64")) memcpy(out, safe_data(f, t), n * sizeof(real));
    else
        for (size_t i = 0; i < n; i++) out[i] = (real)element(safe_data(f, t), t->dtype, i);
}

// A list of things to write
typedef struct {
    char name[96];
    const char *dtype;
    int ndim;
    int shape[4];
    const void *data;
} SafeItem;
typedef struct {
    char key[64];
    char value[512];
} SafePair;

static void json_print(FILE *out, const char *s) {
    fputc('"', out);
    for (; *s; s++)
        if (*s == '"' || *s == '\\') fprintf(out, "\\%c", *s);
        else if ((unsigned char)*s < 32) fprintf(out, "\\u%04x", *s);
        else fputc(*s, out);
    fputc('"', out);
}

static void safe_write(const char *path, const SafePair *pairs, int pair_count, const SafeItem *items,
                       int count) {
    char temporary[PATH_MAX], *header = NULL;
    size_t length = 0;
    FILE *text = open_memstream(&header, &length);
    if (!text) die("%s: out of memory for its header", path);
    fprintf(text, "{\"__metadata__\":{");
    for (int i = 0; i < pair_count; i++) {
        if (i) fputc(',', text);
        json_print(text, pairs[i].key), fputc(':', text), json_print(text, pairs[i].value);
    }
    fputc('}', text);
    size_t at = 0;
    size_t *bytes = (size_t *)alloc_zero((size_t)count, sizeof(size_t));
    for (int i = 0; i < count; i++) {
        fputc(',', text), json_print(text, items[i].name);
        fprintf(text, ":{\"dtype\":\"%s\",\"shape\":[", items[i].dtype);
        bytes[i] = (size_t)dtype_bytes(items[i].dtype);
        for (int d = 0; d < items[i].ndim; d++) {
            fprintf(text, "%s%d", d ? "," : "", items[i].shape[d]);
            bytes[i] *= (size_t)items[i].shape[d];
        }
        fprintf(text, "],\"data_offsets\":[%zu,%zu]}", at, at + bytes[i]);
        at += bytes[i];
    }
    fputc('}', text);
    while ((fflush(text), length % 8)) fputc(' ', text);   // the data starts at a multiple of 8 bytes
    fclose(text);

    FILE *out = file_begin(temporary, path);
    uint8_t size8[8];
    for (int i = 0; i < 8; i++) size8[i] = (uint8_t)((uint64_t)length >> (8 * i));
    fwrite(size8, 1, 8, out);
    fwrite(header, 1, length, out);
    for (int i = 0; i < count && !ferror(out); i++) fwrite(items[i].data, 1, bytes[i], out);
    file_end(out, temporary, path);
    free(bytes), free(header);
}
static const char *real_dtype(void) { return sizeof(real) == 4 ? "F32" : "F64"; }

static SafePair pair_text(const char *key, const char *value) {
    SafePair p;
    snprintf(p.key, sizeof(p.key), "%s", key), snprintf(p.value, sizeof(p.value), "%s", value);
    return p;
}
static SafePair pair_number(const char *key, double value) {
    SafePair p = pair_text(key, "");
    snprintf(p.value, sizeof(p.value), "%.17g", value);
    return p;
}
#pragma GCC diagnostic pop
#endif
