// One .npz file, written as a stream: pictures of bytes as the ADM evaluator reads them (guided-diffusion,
// evaluations/), in any number, without holding them in memory; an interrupted file can go on.
//
//   npz_open     PATH.srdit.part, new or with the pictures that an interrupted run of these settings left
//   npz_put      more pictures; each whole one survives whatever happens next
//   npz_close    the archive's directory, and the name PATH
//
// A zip archive with one stored member, arr_0.npy, uint8 [N,H,W,3]. Its header holds the member's size, which
// is known in advance, and, in an extra field with the id "SR", the settings as text. So a part tells by
// itself whether a run may go on in it, and where. The checksum goes back into the header at the end.
#ifndef SRDIT_NPZ_H
#define SRDIT_NPZ_H
#include "picture.h"   // for crc32_of
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

typedef struct {
    NewFile out;
    uint8_t *head;                  // the zip header, with a zero checksum, and the npy header
    size_t head_bytes, zip_bytes;   // of both; of the zip header alone
    uint64_t image_bytes, images, done, member_bytes;
    int wide;       // zip64: 4 GiB or more
    uint32_t crc;   // of the member so far
} Npz;
static uint64_t npz_wide_from = 0xFFFFFFFFu;   // bytes; the tests make it small

static const char npz_member[] = "arr_0.npy";
enum {
    ZIP_NAME = sizeof(npz_member) - 1,
    ZIP_HEAD = 30,
    ZIP_CRC = 14,
    ZIP_ENTRY = 46,
    ZIP_WIDE = 20
};   // bytes

static void put_le(FILE *out, int bytes, uint64_t value) {
    for (int i = 0; i < bytes; i++) fputc((int)(value >> (8 * i) & 255), out);
}

// The fields that the member's header and its entry in the directory share
static void zip_common(FILE *out, const Npz *z, uint32_t crc, size_t extra) {
    uint32_t size = z->wide ? 0xFFFFFFFFu : (uint32_t)z->member_bytes;
    put_le(out, 2, z->wide ? 45 : 20);   // version needed
    put_le(out, 2, 0);                   // flags
    put_le(out, 2, 0);                   // stored, not compressed
    put_le(out, 2, 0);                   // time and date, 1 January 1980: the same bits each time
    put_le(out, 2, 0x21);
    put_le(out, 4, crc);
    put_le(out, 4, size);   // in the file
    put_le(out, 4, size);   // uncompressed
    put_le(out, 2, ZIP_NAME);
    put_le(out, 2, extra);
}

// The extra field with the sizes that do not fit into 32 bits
static void zip_wide_sizes(FILE *out, const Npz *z) {
    if (!z->wide) return;
    put_le(out, 2, 1);   // its id
    put_le(out, 2, ZIP_WIDE - 4);
    put_le(out, 8, z->member_bytes);
    put_le(out, 8, z->member_bytes);
}

__attribute__((noreturn)) static void npz_die(const Npz *z) {
    die("%s: cannot be written: %s; it holds the pictures so far, and the same command goes on with them",
        z->out.temporary, strerror(errno));
}

// Shows the first line that differs between two settings texts, and ends.
__attribute__((noreturn)) static void npz_differs(const Npz *z, const char *there, const char *here) {
    while (*there && *here) {
        size_t a = strcspn(there, "\n"), b = strcspn(here, "\n");
        if (a != b || memcmp(there, here, a))
            die("%s was begun with other settings: %.*s there, %.*s now; delete it to begin anew",
                z->out.temporary, (int)a, there, (int)b, here);
        there += a + (there[a] == '\n');
        here += b + (here[b] == '\n');
    }
    die("%s was begun with other settings; delete it to begin anew", z->out.temporary);
}

// z->head: what stands before the first picture
static void npz_head(Npz *z, int H, int W, const char *settings) {
    char npy[256];
    int used =
        snprintf(npy, sizeof(npy), "{'descr': '|u1', 'fortran_order': False, 'shape': (%llu, %d, %d, 3), }",
                 (unsigned long long)z->images, H, W);
    int padded = (10 + used + 1 + 63) / 64 * 64 - 10;   // with its 10 bytes of magic and length: whole 64s
    memset(npy + used, ' ', (size_t)(padded - used));
    npy[padded - 1] = '\n';
    z->member_bytes = 10 + (uint64_t)padded + z->images * z->image_bytes;
    z->wide = z->member_bytes >= npz_wide_from;

    size_t text = strlen(settings);
    FILE *head = open_memstream((char **)&z->head, &z->head_bytes);
    if (!head || text > 30000) die("%s: no room for its header", z->out.path);
    put_le(head, 4, 0x04034b50);
    zip_common(head, z, 0, (z->wide ? ZIP_WIDE : 0) + 4 + text);
    fputs(npz_member, head);
    zip_wide_sizes(head, z);
    put_le(head, 2, 'S' | 'R' << 8);
    put_le(head, 2, text);
    fputs(settings, head);
    fflush(head);
    z->zip_bytes = z->head_bytes;
    fwrite("\x93NUMPY\x01\x00", 1, 8, head);
    put_le(head, 2, (uint64_t)padded);
    fwrite(npy, 1, (size_t)padded, head);
    fclose(head);
    z->crc = crc32_of(0, z->head + z->zip_bytes, z->head_bytes - z->zip_bytes);
}

// Ends with the reason why there[have], a file's first bytes, is not what this run could go on in.
__attribute__((noreturn)) static void npz_refuse(const Npz *z, char *there, size_t have,
                                                 const char *settings) {
    const uint8_t *byte = (const uint8_t *)there;
    size_t at = ZIP_HEAD + ZIP_NAME, extra = have > at ? byte[28] | (size_t)byte[29] << 8 : 0;
    int ours = have > at + 4 && !memcmp(there, "PK", 2) && !memcmp(there + ZIP_HEAD, npz_member, ZIP_NAME);
    if (ours && extra >= ZIP_WIDE && at + extra <= have && byte[at] == 1) {   // sizes of zip64
        extra -= ZIP_WIDE;
        at += ZIP_WIDE;
    }
    if (!ours || extra < 4 || at + extra > have || there[at] != 'S')
        die("%s: is not a part of an .npz of this program; delete it to begin anew", z->out.temporary);
    there[at + extra] = 0;
    npz_differs(z, there + at + 4, settings);
}

// Counts the whole pictures in the file and takes them into the checksum; ends where it is not ours.
static void npz_resume(Npz *z, uint64_t size, const char *settings) {
    enum { PIECE = 1 << 20 };   // a header is much shorter
    char *there = (char *)alloc_zero(PIECE + 1, 1);
    size_t have = fread(there, 1, 65535, z->out.file), head = have < z->head_bytes ? have : z->head_bytes;
    if (ferror(z->out.file)) die("%s: cannot be read: %s", z->out.temporary, strerror(errno));
    if (have > ZIP_CRC + 4) memset(there + ZIP_CRC, 0, 4);   // the end may have been begun already
    if (memcmp(there, z->head, head)) npz_refuse(z, there, have, settings);
    if (have < z->head_bytes) {   // a beginning of a header is nobody's work
        free(there);
        return;
    }
    z->done = (size - z->head_bytes) / z->image_bytes;
    if (z->done > z->images) z->done = z->images;
    fseeko(z->out.file, (off_t)z->head_bytes, SEEK_SET);
    for (uint64_t left = z->done * z->image_bytes; left;) {
        size_t k = left < (uint64_t)PIECE ? (size_t)left : (size_t)PIECE;
        if (fread(there, 1, k, z->out.file) != k)
            die("%s: cannot be read: %s", z->out.temporary, strerror(errno));
        z->crc = crc32_of(z->crc, (const uint8_t *)there, k);
        left -= k;
    }
    free(there);
}

// Opens PATH.srdit.part for n pictures H x W and returns how many of them it has already. settings: lines
// "key: value", at most 30000 characters; a part that was begun with others is refused.
static uint64_t npz_open(Npz *z, const char *path, uint64_t n, int H, int W, const char *settings) {
    memset(z, 0, sizeof(*z));
    z->images = n;
    z->image_bytes = (uint64_t)H * (uint64_t)W * 3;
    part_open(&z->out, path);
    npz_head(z, H, W, settings);
    struct stat st;
    int fd = fileno(z->out.file);
    if (fstat(fd, &st)) npz_die(z);
    if (S_ISREG(st.st_mode) && st.st_size) npz_resume(z, (uint64_t)st.st_size, settings);

    int good = 1;
    if (!z->done)
        good = !fseeko(z->out.file, 0, SEEK_SET) &&
               fwrite(z->head, 1, z->head_bytes, z->out.file) == z->head_bytes && !fflush(z->out.file);
    off_t end = (off_t)(z->head_bytes + z->done * z->image_bytes);
    if (good && S_ISREG(st.st_mode)) good = !ftruncate(fd, end);   // what follows the last whole picture goes
    if (!good || fseeko(z->out.file, end, SEEK_SET)) npz_die(z);
    return z->done;
}

// n more pictures, [n,H,W,channels]; grey becomes RGB
static void npz_put(Npz *z, const uint8_t *pixels, size_t n, int channels) {
    uint8_t *rgb = (uint8_t *)alloc_zero(n, (size_t)z->image_bytes);
    size_t count = n * (size_t)z->image_bytes;
    for (size_t i = 0; i < count; i++) rgb[i] = channels == 3 ? pixels[i] : pixels[i / 3];
    if (fwrite(rgb, 1, count, z->out.file) != count || fflush(z->out.file)) npz_die(z);
    z->crc = crc32_of(z->crc, rgb, count);
    z->done += n;
    free(rgb);
}

// What zip64 puts between the directory, of `bytes` at `at`, and the archive's end
static void zip_wide_end(FILE *out, uint64_t bytes, uint64_t at) {
    put_le(out, 4, 0x06064b50);
    put_le(out, 8, 44);   // bytes of this record that follow
    put_le(out, 2, 45);   // version that made it, version needed
    put_le(out, 2, 45);
    put_le(out, 4, 0);   // two numbers of disks
    put_le(out, 4, 0);
    put_le(out, 8, 1);   // members on this disk, and in all
    put_le(out, 8, 1);
    put_le(out, 8, bytes);
    put_le(out, 8, at);
    put_le(out, 4, 0x07064b50);   // and where this record lies
    put_le(out, 4, 0);
    put_le(out, 8, at + bytes);
    put_le(out, 4, 1);
}

static void npz_close(Npz *z) {
    FILE *out = z->out.file;
    uint64_t at = z->zip_bytes + z->member_bytes, bytes = ZIP_ENTRY + ZIP_NAME + (z->wide ? ZIP_WIDE : 0);
    put_le(out, 4, 0x02014b50);          // the directory's only entry
    put_le(out, 2, z->wide ? 45 : 20);   // version that made it
    zip_common(out, z, z->crc, z->wide ? ZIP_WIDE : 0);
    put_le(out, 2, 0);   // bytes of a comment
    put_le(out, 2, 0);   // disk
    put_le(out, 2, 0);   // attributes, internal and external
    put_le(out, 4, 0);
    put_le(out, 4, 0);   // where the member begins
    fputs(npz_member, out);
    zip_wide_sizes(out, z);
    if (z->wide) zip_wide_end(out, bytes, at);
    put_le(out, 4, 0x06054b50);   // the archive's end
    put_le(out, 4, 0);            // two numbers of disks
    put_le(out, 2, 1);            // members on this disk, and in all
    put_le(out, 2, 1);
    put_le(out, 4, bytes);
    put_le(out, 4, z->wide ? 0xFFFFFFFFu : at);
    put_le(out, 2, 0);   // bytes of a comment
    if (fflush(out) || fseeko(out, ZIP_CRC, SEEK_SET)) npz_die(z);
    put_le(out, 4, z->crc);
    errno = file_finish(&z->out);
    if (errno) npz_die(z);
    free(z->head);
}
#pragma GCC diagnostic pop
#endif
