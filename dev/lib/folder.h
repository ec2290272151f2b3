// The folder of a run. It holds a checkpoint, pictures and a log, and belongs to one program at a time. A
// command that is typed twice loses nothing: a new run never writes to a folder that holds another one,
// unless it is told to.
//
//   folder_clear    removes what is left of the run that is replaced
//   folder_open     finds or makes the folder that a command means, and locks it until the program ends
//   log_open        log.csv: fresh, or on resume the rows up to a step of the one that is there
//   newest_run      the checkpoint that a command means that names none
#ifndef SRDIT_FOLDER_H
#define SRDIT_FOLDER_H
#include "base.h"
#include <ctype.h>
#include <glob.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

typedef struct {
    char name[PATH_MAX - 64], checkpoint[PATH_MAX], picture[PATH_MAX], log[PATH_MAX];
    char curve[PATH_MAX], track[PATH_MAX];   // loss.png; track.log, of a run of the race
    int lock;                                // a file descriptor
    int replaces;   // 1: it holds another run, which goes once this one has made a step
    int made;       // 1: it was not there before
} Folder;

static void make_folder(const char *path) {   // and those above it
    char part[PATH_MAX];
    struct stat st;
    if (!*path || strlen(path) >= PATH_MAX - 64) die("\"%s\": the folder's name is empty or too long", path);
    for (size_t i = 1; i <= strlen(path) && i < sizeof(part); i++)
        if (path[i] == '/' || !path[i]) {
            memcpy(part, path, i), part[i] = 0;
            if (mkdir(part, 0777) && errno != EEXIST)
                die("%s: the folder cannot be made: %s", part, strerror(errno));
        }
    if (stat(path, &st) || !S_ISDIR(st.st_mode)) die("%s: is not a folder", path);
}

// A descriptor that holds the folder's lock, or -1: another program has it. Where a file system knows no
// locks there is none.
static int folder_lock(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) die("%s: the folder cannot be opened: %s", path, strerror(errno));
    if (!flock(fd, LOCK_EX | LOCK_NB) || errno != EWOULDBLOCK) return fd;
    close(fd);
    return -1;
}

// Makes and locks the folder and names its files; returns 0 if another program has it.
static int folder_take(Folder *f, const char *path) {
    struct stat st;
    f->made = stat(path, &st) != 0;
    make_folder(path);
    snprintf(f->name, sizeof(f->name), "%s", path);
    snprintf(f->checkpoint, sizeof(f->checkpoint), "%s/checkpoint.safetensors", path);
    snprintf(f->picture, sizeof(f->picture), "%s/samples.png", path);
    snprintf(f->log, sizeof(f->log), "%s/log.csv", path);
    snprintf(f->curve, sizeof(f->curve), "%s/loss.png", path);
    snprintf(f->track, sizeof(f->track), "%s/track.log", path);
    f->replaces = 0;
    f->lock = folder_lock(path);
    return f->lock >= 0;
}
static int folder_holds_run(const Folder *f) {   // a link to nothing counts: something will come back there
    struct stat st;
    return !lstat(f->checkpoint, &st) || !lstat(f->picture, &st) || !lstat(f->log, &st) ||
           !lstat(f->curve, &st) || !lstat(f->track, &st);
}
// Is the picture missing, or older than the checkpoint?
static int folder_lacks_picture(const Folder *f) {
    struct stat c, p;
    if (stat(f->checkpoint, &c)) return 0;
    return stat(f->picture, &p) || p.st_mtim.tv_sec < c.st_mtim.tv_sec ||
           (p.st_mtim.tv_sec == c.st_mtim.tv_sec && p.st_mtim.tv_nsec < c.st_mtim.tv_nsec);
}
// out: as the command line has it, NULL where it has none: then a resumed run goes on beside its checkpoint,
// and a new one takes the first of out, out-2, out-3 ... that holds no run. A folder that holds another run
// is refused, unless `overwrite`.
static Folder folder_open(const char *out, const char *resume, int overwrite) {
    Folder f;
    char path[PATH_MAX];
    for (int i = 1; !out && !resume; i++) {
        if (i == 1) snprintf(path, sizeof(path), "out");
        else snprintf(path, sizeof(path), "out-%d", i);
        if (!folder_take(&f, path)) continue;
        f.replaces = folder_holds_run(&f);
        if (!f.replaces || (overwrite && i == 1)) {
            if (i > 1)
                printf("this run goes to %s, since %s holds another\n", path,
                       i == 2 ? "out" : "each before it");
            return f;
        }
        close(f.lock);
    }
    if (!out) {   // the folder of the checkpoint
        const char *slash = strrchr(resume, '/');
        if (snprintf(path, sizeof(path), "%.*s", slash ? (int)(slash - resume) + (slash == resume) : 1,
                     slash ? resume : ".") >= (int)sizeof(path))
            die("%s: the name is too long", resume);
        out = path;
    }
    if (!folder_take(&f, out)) die("%s: another run is writing there; give this one another --out", out);
    f.replaces = folder_holds_run(&f) && !(resume && same_file(resume, f.checkpoint));
    struct stat st;
    int race = !lstat(f.track, &st);   // its evidence would no longer be of what lies beside it
    if (race && (resume || !overwrite))
        die("%s holds a run of the race, which is not gone on with; put this one elsewhere by another "
            "--out%s",
            out, resume ? "" : ", or replace it by --overwrite");
    if (f.replaces && !overwrite)
        die("%s holds %s run; go on with it by --resume %s, put this one elsewhere by another --out, or "
            "replace it by --overwrite",
            out, resume ? "another" : "a", f.checkpoint);
    return f;
}

// The run that the folder holds goes: its pictures and its logs first, so that they never stand beside
// another's checkpoint. (What ./sample made of it is the user's, and stays.)
static void folder_clear(Folder *f) {
    const char *const gone[] = {f->picture, f->curve, f->track, f->log};
    for (int i = 0; i < 4 && f->replaces; i++)
        if (unlink(gone[i]) && errno != ENOENT) die("%s: cannot be removed: %s", gone[i], strerror(errno));
    f->replaces = 0;
}

// log.csv with its head, or on resume the rows up to `step` of the one that is there, which is replaced when
// the new one is whole
static FILE *log_open(const char *path, const char *head, int step) {
    char line[1024];
    FILE *old = step ? fopen(path, "r") : NULL;
    if (step && !old && errno != ENOENT) die("%s: cannot be read: %s", path, strerror(errno));
    NewFile fresh = file_begin(path);
    fprintf(fresh.file, "%s\n", head);
    while (old && fgets(line, sizeof(line), old))
        if (isdigit((unsigned char)line[0]) && atoi(line) <= step && strchr(line, '\n'))
            fputs(line, fresh.file);
    if (old && ferror(old)) {
        int error = errno;
        file_abandon(&fresh);
        die("%s: cannot be read: %s", path, strerror(error));
    }
    if (old) fclose(old);
    file_end(&fresh);
    FILE *log = fopen(path, "a");
    if (!log) die("%s: cannot be written: %s", path, strerror(errno));
    return log;
}

// The checkpoint that was written last of those in out, out-2, out-3, ..., where runs go that are given no
// folder; 0: there is none.
static int newest_run(char path[PATH_MAX]) {
    glob_t found;
    struct stat st;
    struct timespec latest = {0, 0};
    path[0] = 0;
    memset(&found, 0, sizeof(found));
    glob("out/checkpoint.safetensors", 0, NULL, &found);
    glob("out-[0-9]*/checkpoint.safetensors", GLOB_APPEND, NULL, &found);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        if (stat(found.gl_pathv[i], &st) || !S_ISREG(st.st_mode)) continue;
        struct timespec t = st.st_mtim;
        int older = t.tv_sec != latest.tv_sec ? t.tv_sec < latest.tv_sec : t.tv_nsec < latest.tv_nsec;
        if (*path && older) continue;
        if (snprintf(path, PATH_MAX, "%s", found.gl_pathv[i]) < PATH_MAX) latest = t;
    }
    globfree(&found);
    return *path != 0;
}
#pragma GCC diagnostic pop
#endif
