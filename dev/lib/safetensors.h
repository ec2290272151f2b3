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
#include <signal.h>
#include <sys/mman.h>

enum Dtype { BOOL, U8, I8, F16, BF16, I16, U16, F32, I32, U32, F64, I64, U64, DTYPES };
static const struct {
    const char *name;
    int bytes;
} dtypes[DTYPES] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F16", 2}, {"BF16", 2}, {"I16", 2}, {"U16", 2},
                    {"F32", 4},  {"I32", 4}, {"U32", 4}, {"F64", 8}, {"I64", 8},  {"U64", 8}};
static int is_floating(enum Dtype type) { return type == F16 || type == BF16 || type == F32 || type == F64; }
static int is_integer(enum Dtype type) { return type != BOOL && !is_floating(type); }

enum { MAX_DIMS = 8 };
typedef struct {
    char *name;
    enum Dtype type;
    const char *dtype;   // its name
    int ndim;
    uint64_t shape[MAX_DIMS];
    uint64_t begin, end;   // bytes, from the start of the data
} SafeTensor;

typedef struct SafeFile {
    char *path;
    struct SafeFile *next;       // of all that are open
    const uint8_t *map, *data;   // the whole file, and its data
    size_t size;
    dev_t device;   // which file it is, whatever has its name by now
    ino_t inode;
    SafeTensor *tensors;   // in order of their names
    int count;
    char **keys, **values;   // __metadata__
    int metadata_count;
} SafeFile;

// A half as a float: its exponent and fraction, moved to a float's places, make 2^-112 of it, subnormal or
// not.
HOST_DEVICE static inline float half_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, top = half >= 0x8000 ? 0x80000000u : 0;
    float x;
    memcpy(&x, &bits, 4);
    x *= 5192296858534827628530496329220096.0f;   // 2^112
    memcpy(&bits, &x, 4);
    bits |= top | ((half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0);   // infinity, NaN
    memcpy(&x, &bits, 4);
    return x;
}
static inline float bf16_to_float(uint16_t half) {   // the upper half of a float
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Element i of an array of the given type, as a double
static double element(const void *data, enum Dtype type, size_t i) {
    const uint8_t *p = (const uint8_t *)data + i * (size_t)dtypes[type].bytes;
    uint64_t u = 0;
    for (int k = 0; k < dtypes[type].bytes; k++) u |= (uint64_t)p[k] << (8 * k);
    float single;
    double wide;
    uint32_t low = (uint32_t)u;
    switch (type) {
        case I8: return (int8_t)u;
        case I16: return (int16_t)u;
        case I32: return (int32_t)u;
        case I64: return (double)(int64_t)u;
        case F16: return half_to_float((uint16_t)u);
        case BF16: return bf16_to_float((uint16_t)u);
        case F32: memcpy(&single, &low, 4); return single;
        case F64: memcpy(&wide, &u, 8); return wide;
        default: return (double)u;   // unsigned
    }
}

// out[n] = elements first ... first+n of an array of the given type, times scale plus offset. The type is
// decided once; each loop runs at the speed of memory. Elements need not be aligned.
static void elements_read(real *out, const void *data, enum Dtype type, size_t first, size_t n, double scale,
                          double offset) {
#define CONVERT(stored, value)                                                                               \
    for (size_t i = 0; i < n; i++) {                                                                         \
        stored x;                                                                                            \
        memcpy(&x, (const uint8_t *)data + (first + i) * sizeof(stored), sizeof(stored));                    \
        out[i] = (real)(value);                                                                              \
    }                                                                                                        \
    break
    switch (type) {
        case BOOL:
        case U8: CONVERT(uint8_t, x);
        case I8: CONVERT(int8_t, x);
        case I16: CONVERT(int16_t, x);
        case U16: CONVERT(uint16_t, x);
        case I32: CONVERT(int32_t, x);
        case U32: CONVERT(uint32_t, x);
        case I64: CONVERT(int64_t, x);
        case U64: CONVERT(uint64_t, x);
        case F16: CONVERT(uint16_t, half_to_float(x));
        case BF16: CONVERT(uint16_t, bf16_to_float(x));
        case F32: CONVERT(float, x);
        case F64: CONVERT(double, x);
        case DTYPES: break;
    }
#undef CONVERT
    if (scale == 1 && offset == 0) return;
    for (size_t i = 0; i < n; i++) out[i] = (real)((double)out[i] * scale + offset);
}

// ----------------------------------------------------------------------------------------------------------
// Text: metadata is UTF-8

// Bytes of the character at s, 1 to 4, or 0 where there is no valid one (RFC 3629: shortest form, no
// surrogates)
static int utf8_bytes(const char *s, const char *end) {
    const uint8_t *p = (const uint8_t *)s;
    long left = end - s;
    if (left < 1) return 0;
    if (p[0] < 0x80) return 1;
    int n = p[0] < 0xC2 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : p[0] < 0xF5 ? 4 : 0;
    if (!n || left < n) return 0;
    for (int i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F)) return 0;
    if ((p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F)) return 0;
    return n;
}

// A copy in `size` bytes, cut before the first character that does not fit
static void copy_text(char *to, size_t size, const char *from) {
    const char *end = from + strlen(from);
    size_t used = 0;
    for (int n; (n = utf8_bytes(from, end)) && used + (size_t)n < size; used += (size_t)n, from += n)
        memcpy(to + used, from, (size_t)n);
    to[used] = 0;
}

// ----------------------------------------------------------------------------------------------------------
// Reading

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
// The four digits after the u at *s, which is left at the last of them
static unsigned json_hex(Json *j, const char **s) {
    unsigned code = 0;
    if (**s != 'u' || *s + 4 >= j->p) json_die(j, "unknown escape in a string");
    for (int k = 0; k < 4; k++) {
        int digit = tolower((unsigned char)*++*s);
        if (!isxdigit(digit)) json_die(j, "unknown escape in a string");
        code = code * 16 + (unsigned)(digit <= '9' ? digit - '0' : digit - 'a' + 10);
    }
    return code;
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
        unsigned code = json_hex(j, &s);
        if (code >= 0xD800 && code < 0xDC00 && s + 2 < j->p && s[1] == '\\' && s[2] == 'u') {   // a pair
            s += 2;
            unsigned low = json_hex(j, &s);
            if (low < 0xDC00 || low > 0xDFFF) json_die(j, "a lone surrogate stands in a string");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        } else if (code >= 0xD800 && code < 0xE000) json_die(j, "a lone surrogate stands in a string");
        if (!code) json_die(j, "a string holds a zero character");
        int n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
        static const uint8_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
        for (int i = 0; i < n; i++)
            *to++ = (char)(i ? 0x80 | (code >> (6 * (n - 1 - i)) & 63) : lead[n] | code >> (6 * (n - 1)));
    }
    for (const char *s = out; s < to;) {
        int n = utf8_bytes(s, to);
        if (!n) json_die(j, "a string is not UTF-8");
        s += n;
    }
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
            int type = 0;
            while (type < DTYPES && strcmp(dtypes[type].name, dtype)) type++;
            if (type == DTYPES) die("%s: tensor %s: unknown dtype %s", j->path, name, dtype);
            t.type = (enum Dtype)type;
            t.dtype = dtypes[type].name;
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

// Pages of a mapped file that is cut short afterwards are gone: the signal that reading one gives ends the
// program with the file's name. Only what is safe in a signal handler is called.
static SafeFile *safe_files;   // all that are open
static void say(const char *text) {
    if (write(STDERR_FILENO, text, strlen(text)) < 0) _exit(1);
}
static void on_lost_page(int signal, siginfo_t *info, void *context) {
    const uint8_t *at = (const uint8_t *)info->si_addr;
    const SafeFile *f = safe_files;
    (void)signal, (void)context;
    while (f && !(at >= f->map && at < f->map + f->size)) f = f->next;
    say("\nerror: ");
    say(f ? f->path : "a mapped file");
    say(": it could not be read any more: it was cut short, or its disk failed; all files written so far are "
        "whole\n");
    _exit(1);
}

static SafeFile *safe_open(const char *path) {
    SafeFile *f = (SafeFile *)alloc_zero(1, sizeof(SafeFile));
    f->path = strdup(path);
    if (!f->path) die("out of memory");
    int fd = open(path, O_RDONLY | O_NONBLOCK);   // a FIFO would wait for its writer
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) die("%s: cannot be opened: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s: is not a file", path);
    f->size = (size_t)st.st_size;
    f->device = st.st_dev;
    f->inode = st.st_ino;
    if (f->size < 8) die("%s: is not a safetensors file: it has only %zu bytes", path, f->size);
    f->map = (const uint8_t *)mmap(NULL, f->size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (f->map == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_lost_page;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, NULL);
    f->next = safe_files;
    safe_files = f;
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
                for (char *v = f->values[f->metadata_count]; *v; v++)   // it will be printed
                    if ((unsigned char)*v < 32 || *v == 127) *v = '?';
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
        uint64_t bytes = (uint64_t)dtypes[t->type].bytes;
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
    SafeFile **at = &safe_files;
    while (*at != f) at = &(*at)->next;
    *at = f->next;
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
    elements_read(out, safe_data(f, t), t->type, 0, safe_elements(t), 1, 0);
}

// A list of things to write
typedef struct {
    char name[96];
    enum Dtype type;
    int ndim, shape[4];
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

static size_t item_bytes(const SafeItem *item) {
    size_t bytes = (size_t)dtypes[item->type].bytes;
    for (int d = 0; d < item->ndim; d++) bytes *= (size_t)item->shape[d];
    return bytes;
}

// A file with its header; the items' data follow in their order, by the caller, and file_end ends it.
static NewFile safe_begin(const char *path, const SafePair *pairs, int pair_count, const SafeItem *items,
                          int count) {
    char *header = NULL;
    size_t length = 0, at = 0;
    FILE *text = open_memstream(&header, &length);
    if (!text) die("%s: out of memory for its header", path);
    fprintf(text, "{\"__metadata__\":{");
    for (int i = 0; i < pair_count; i++) {
        if (i) fputc(',', text);
        json_print(text, pairs[i].key), fputc(':', text), json_print(text, pairs[i].value);
    }
    fputc('}', text);
    for (int i = 0; i < count; i++) {
        size_t end = at + item_bytes(&items[i]);
        fputc(',', text), json_print(text, items[i].name);
        fprintf(text, ":{\"dtype\":\"%s\",\"shape\":[", dtypes[items[i].type].name);
        for (int d = 0; d < items[i].ndim; d++) fprintf(text, "%s%d", d ? "," : "", items[i].shape[d]);
        fprintf(text, "],\"data_offsets\":[%zu,%zu]}", at, end);
        at = end;
    }
    fputc('}', text);
    while ((fflush(text), length % 8)) fputc(' ', text);   // the data starts at a multiple of 8 bytes
    fclose(text);

    NewFile out = file_begin(path);
    uint8_t size8[8];
    for (int i = 0; i < 8; i++) size8[i] = (uint8_t)((uint64_t)length >> (8 * i));
    fwrite(size8, 1, 8, out.file);
    fwrite(header, 1, length, out.file);
    free(header);
    return out;
}
// The same with the items' data, on the disk: what is missing is its name.
static NewFile safe_fill(const char *path, const SafePair *pairs, int pair_count, const SafeItem *items,
                         int count) {
    NewFile out = safe_begin(path, pairs, pair_count, items, count);
    for (int i = 0; i < count && !ferror(out.file); i++)
        fwrite(items[i].data, 1, item_bytes(&items[i]), out.file);
    int error = file_flush(&out);
    if (error) file_failed(&out, error);
    return out;
}
static void safe_write(const char *path, const SafePair *pairs, int pair_count, const SafeItem *items,
                       int count) {
    NewFile out = safe_fill(path, pairs, pair_count, items, count);
    file_end(&out);
}
static enum Dtype real_dtype(void) { return sizeof(real) == 4 ? F32 : F64; }

static SafePair pair_text(const char *key, const char *value) {
    SafePair p;
    copy_text(p.key, sizeof(p.key), key);
    copy_text(p.value, sizeof(p.value), value);
    return p;
}
static SafePair pair_number(const char *key, double value) {
    SafePair p = pair_text(key, "");
    snprintf(p.value, sizeof(p.value), "%.17g", value);
    return p;
}
#pragma GCC diagnostic pop
#endif
