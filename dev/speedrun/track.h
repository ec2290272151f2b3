// A run of a track: fixed by the track's rules, timed, scored, and told in one text, track.log, that appears
// whole and ends in its own SHA-256. README.md beside this file has the rules; verify.py reads the logs. This
// is included by train_srdit.c, of whose types it is made, before train_main.
//
//   track_begin      --track NAME: refuses what the track fixes, checks its inputs, sets what it fixes
//   track_settle     after the command line: steps, seed, threads
//   track_warm_up    one step on dummy data, after which the state is what it was, which a hash shows
//   track_end        draws the samples, scores them, writes the log
//
// The clock runs from the first step on real data to the last step's moving average, lines, checkpoints and
// reading the data included; train() stops it.
#ifndef SRDIT_TRACK_H
#define SRDIT_TRACK_H
#include "../lib/scoring.h"
#include "sha256.h"
#include "tracks.h"
#include <sys/resource.h>

// dev/speedrun/sources.c holds them; a program that is built without it finds NULL here.
#ifdef __cplusplus
extern "C" {
#endif
extern const char srdit_sources[] __attribute__((weak)), srdit_sources_end[] __attribute__((weak));
extern const char srdit_flags[] __attribute__((weak));
#ifdef __cplusplus
}
#endif

#ifdef __clang__
#define TRACK_COMPILER __VERSION__
#else
#define TRACK_COMPILER "gcc " __VERSION__
#endif

typedef struct {
    const char *name;
    char *data[1];   // the shard, as the command line would give it
    char data_sha[SHA_HEX], judge_sha[SHA_HEX], state_sha[SHA_HEX], started[32];
    uint64_t data_bytes, judge_bytes;
    double load, process_began;
} Track;

static const char *track_rule(const char *track, const char *rule) {   // NULL: there is none
    for (int i = 0; i < TRACK_RULES; i++)
        if (!strcmp(track_rules[i].track, track) && !strcmp(track_rules[i].rule, rule))
            return track_rules[i].value;
    return NULL;
}
static int track_number(const char *track, const char *rule) {
    const char *value = track_rule(track, rule);
    if (!value) die("track %s has no rule %s (dev/speedrun/tracks.h)", track, rule);
    return (int)text_number(value, track, rule);
}

static int is_word_of(const char *word, const char *list) {   // words with spaces between them
    size_t n = strlen(word);
    for (const char *at = list; at && (at = strstr(at, word)); at += n)
        if ((at == list || at[-1] == ' ') && (!at[n] || at[n] == ' ')) return 1;
    return 0;
}
// May the command line give this setting? may_set names settings, or the groups recipe and sizes.
static int track_allows(const char *track, const char *setting) {
    const char *may = track_rule(track, "may_set"), *const groups[] = {"recipe", "sizes"};
    if (is_word_of(setting, may) || is_word_of(setting, track_rule("*", "always"))) return 1;
    for (int i = 0; i < 2; i++)
        if (is_word_of(groups[i], may) && is_word_of(setting, track_rule("*", groups[i]))) return 1;
    return 0;
}
static void track_check_flags(const char *track, const OptionTable *tables, int argc, char **argv) {
    char flag[FLAG_BYTES];
    for (int at = 1; at < argc; at++)
        for (int k = 0; k < 2; k++)
            for (int i = 0; i < tables[k].count; i++) {
                flag_of(flag, &tables[k].options[i]);
                if (!strcmp(argv[at], flag) && !track_allows(track, tables[k].options[i].name))
                    die("%s: the track %s fixes this; leave the flag out (dev/speedrun/README.md has the "
                        "rules)",
                        flag, track);
            }
}

static void track_input(const Track *k, const char *path, const char *rule, char sha[SHA_HEX],
                        uint64_t *bytes) {
    *bytes = sha256_of_file(sha, path, "data/README.md says how it is made");
    if (strcmp(sha, track_rule(k->name, rule)))
        die("%s: its SHA-256 is %s, but the track %s is run on the file whose SHA-256 is %s", path, sha,
            k->name, track_rule(k->name, rule));
}

// The track that the command line names, or NULL; it leaves --track to be read with all other flags.
static Track *track_begin(Run *run, const OptionTable *tables, int argc, char **argv) {
    static Track track;
    Track *k = &track;
    k->name = text_after("--track", argc, argv);
    k->process_began = now_seconds();
    if (!k->name) return NULL;
    if (!srdit_sources || !srdit_flags)
        die("--track: this program was built without its sources, so that its log would be no evidence; "
            "make train_srdit builds one with them");
    if (!strcmp(k->name, "sources")) {
        fwrite(srdit_sources, 1, (size_t)(srdit_sources_end - srdit_sources), stdout);
        check_output_taken();
        _exit(0);   // not exit, as in die
    }
    if (!strcmp(k->name, "*") || !track_rule(k->name, "rank")) {
        char all[256] = "";
        for (int i = 0; i < TRACK_RULES; i++)
            if (!strcmp(track_rules[i].rule, "rank"))
                snprintf(all + strlen(all), sizeof(all) - strlen(all), " %s", track_rules[i].track);
        die("--track %s: there is no such track; there are%s (and \"sources\", which prints what the program "
            "was built from)",
            k->name, all);
    }
    const char *closed = track_rule(k->name, "closed");
    if (closed) die("--track %s: %s", k->name, closed);
    track_check_flags(k->name, tables, argc, argv);
    k->data[0] = (char *)track_rule(k->name, "data");
    track_input(k, k->data[0], "data_sha256", k->data_sha, &k->data_bytes);
    track_input(k, track_rule(k->name, "judge"), "judge_sha256", k->judge_sha, &k->judge_bytes);
    run->model = track_rule(k->name, "model");
    run->data.items = k->data;
    return k;
}

// "name=value ...": what the baseline has where it differs from the preset, and an entry that does not
// say otherwise
static void track_baseline(const char *words, const OptionTable *tables, int argc, char **argv) {
    char name[64], value[TEXT_OF_OPTION], flag[FLAG_BYTES];
    const char *where = "dev/speedrun/tracks.h";
    for (int used; sscanf(words, " %63[a-z_0-9]=%199s%n", name, value, &used) == 2; words += used) {
        int found = 0;
        for (int i = 0; i < 2; i++) {
            int at = option_find(&tables[i], name);
            if (at < 0) continue;
            found = 1;
            flag_of(flag, &tables[i].options[at]);
            if (!text_after(flag, argc, argv)) option_put(&tables[i], at, value, where, name);
        }
        if (!found) die("%s: a baseline names %s, and there is no such setting", where, name);
    }
    if (words[strspn(words, " ")]) die("%s: a baseline has \"%s\", which is no NAME=VALUE", where, words);
}

// After the command line was read. Without --seed the operating system draws one.
static void track_settle(const Track *k, Run *run, const OptionTable *tables, int argc, char **argv) {
    if (track_rule(k->name, "baseline")) track_baseline(track_rule(k->name, "baseline"), tables, argc, argv);
    if (track_rule(k->name, "steps")) run->steps = track_number(k->name, "steps");
    if (track_rule(k->name, "threads")) run->threads = track_number(k->name, "threads");
    if (run->steps < 1) die("--steps %d: a track is run for at least one step", run->steps);
    run->log_every = track_number("*", "log_every");
    run->save_every = (int)1e9;   // at the end only
    run->sample_steps = track_number(k->name, "sample_steps");
    if (text_after("--seed", argc, argv)) return;
    FILE *f = fopen("/dev/urandom", "rb");
    if (!f || fread(&run->seed, 1, 6, f) != 6) die("/dev/urandom: no seed could be drawn; give a --seed");
    fclose(f);
    run->seed &= (1ull << 48) - 1;
}

// SHA-256 of a model's blocks, one after the other
static void track_state(char sha[SHA_HEX], Training *t, real *host) {
    Sha256 h = sha256_begin();
    for (int i = 0; i < 4; i++) {
        t->backend->get_block(host, t->model, saved_blocks[i]);
        sha256_add(&h, host, t->model->table.total * sizeof(real));
    }
    sha256_end(&h, sha);
}

// A batch of noise: none of it is data, and none of its draws are those of a step
static void track_dummy(Batch *b, const Config *c, int whole) {
    size_t B = (size_t)b->B, latent = (size_t)latent_of(c), Z = (size_t)c->z_dim, T = (size_t)tokens_of(c);
    size_t kept = (size_t)kept_of(c);
    real *const fields[] = {b->x, b->noise, b->cls, b->noise_cls, b->feats, b->v_before};
    const size_t sizes[] = {B * latent, B * latent, B * Z, B * Z, B * T * Z, latent};
    for (uint32_t i = 0; i < 6; i++) fill_normal(fields[i], sizes[i], UINT64_MAX, i, 0, 0);
    for (size_t i = 0; i < B; i++) b->t[i] = (real)0.5, b->y[i] = 0;
    for (size_t i = 0; i < B * kept; i++) b->ids[i] = (int)(i % kept);
    b->seed = UINT64_MAX;
    b->first = b->step = b->path_drop = 0;
    b->whole = whole;
}

static void track_warm_up(Track *k, Training *t) {
    const Backend *on = t->backend;
    real *host[4], *room = (real *)alloc_zero(t->model->table.total, sizeof(real));
    int most = track_number(k->name, "parameters");
    if (count_trained(&t->model->table) > (size_t)most)
        die("the model has %zu parameters, and the track %s allows %d", count_trained(&t->model->table),
            k->name, most);
    file_probe(t->folder.track);
    for (int i = 0; i < 4; i++) {
        host[i] = (real *)alloc_zero(t->model->table.total, sizeof(real));
        on->get_block(host[i], t->model, saved_blocks[i]);
    }
    char before[SHA_HEX];
    track_state(before, t, room);
    Batch *dummy = batch_create(&t->c, t->run.batch / t->run.accum);
    dummy->on_device = on != &cpu_backend;
    track_dummy(dummy, &t->c, t->run.batch);
    on->zero_gradients(t->model);
    on->forward_backward(t->model, dummy);
    batch_free(dummy);
    on->update(t->model, 1);
    on->read_losses(t->model);
    for (int i = 0; i < 4; i++) on->put_block(t->model, host[i], saved_blocks[i]);
    track_state(k->state_sha, t, room);
    if (strcmp(before, k->state_sha))
        die("the warm-up changed the model, so that no run of a track can begin");
    for (int i = 0; i < 4; i++) free(host[i]);
    free(room);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    strftime(k->started, sizeof(k->started), "%Y-%m-%dT%H:%M:%S", gmtime(&now.tv_sec));
    snprintf(k->started + 19, sizeof(k->started) - 19, ".%03dZ", (int)(now.tv_nsec / 1000000));
    if (getloadavg(&k->load, 1) != 1) k->load = -1;
}

// n samples [n,C,S,S], a class after the other, from the moving average; NULL where Ctrl-C came before
static real *track_samples(const Track *k, const Training *t, int *y, int n) {
    enum { TRACK_PART = 100 };
    size_t latent = (size_t)latent_of(&t->c), Z = (size_t)t->c.z_dim;
    real *out = (real *)alloc_zero((size_t)n * latent, sizeof(real));
    double *x = (double *)alloc_zero(TRACK_PART * latent, sizeof(double));
    double *cls = (double *)alloc_zero(TRACK_PART * Z, sizeof(double));
    Sampling s = sampling_default();
    int whole = 1, solver = solver_of(track_rule(k->name, "sampler"));   // -1: em
    s.steps = track_number(k->name, "sample_steps");
    s.seed = t->run.seed;
    for (int i = 0; i < n; i++) y[i] = i % t->data->K;
    for (int i = 0; i < n && whole; i += TRACK_PART) {
        int part = imin(TRACK_PART, n - i);
        s.first = i;
        sampler_noise(x, cls, &t->c, &s, 0, part);
        whole = solver < 0 ? sample_euler_maruyama(x, cls, t->backend, t->model, &s, y + i, part,
                                                   stop_if_interrupted, NULL)
                           : sample_ode(x, cls, t->backend, t->model, &s, (enum Solver)solver, y + i, part,
                                        stop_if_interrupted, NULL);
        for (size_t j = 0; j < (size_t)part * latent; j++) out[(size_t)i * latent + j] = (real)x[j];
    }
    free(x), free(cls);
    if (whole) return out;
    free(out);
    return NULL;
}

// ----------------------------------------------------------------------------------------------------------
// The log

// "key value", where a value that came from outside stays on its line
__attribute__((format(printf, 3, 4))) static void track_say(FILE *f, const char *key, const char *format,
                                                            ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    for (char *s = text; *s; s++)
        if ((unsigned char)*s < 32 || *s == 127) *s = '?';
    fprintf(f, "%s %s\n", key, text);
}
// The first line of a file that begins with `key`, after a colon if there is one; "unknown"
static void track_line_of(char text[256], const char *path, const char *key) {
    char line[256] = "";
    FILE *f = fopen(path, "r");
    snprintf(text, 256, "unknown");
    while (f && fgets(line, sizeof(line), f)) {
        const char *from = strchr(line, ':');
        if (strncmp(line, key, strlen(key))) continue;
        from = from ? from + 1 : line;
        from += strspn(from, " \t");
        snprintf(text, 256, "%.*s", (int)strcspn(from, "\n"), from);
        break;
    }
    if (f) fclose(f);
}

static void track_say_run(FILE *f, const Track *k, const Training *t) {
    char text[4096] = "";
    struct rusage used;
    memset(&used, 0, sizeof(used));
    getrusage(RUSAGE_SELF, &used);
    glob_t gpus;
    memset(&gpus, 0, sizeof(gpus));
    glob("/proc/driver/nvidia/gpus/*/information", 0, NULL, &gpus);
    for (int i = 0; i < t->run.word_count; i++) {   // a space within a word would make two of it
        size_t n = strlen(text);
        snprintf(text + n, sizeof(text) - n, "%s%s", i ? " " : "", t->run.words[i]);
        for (char *s = text + n + (i > 0); *s; s++)
            if (*s == ' ') *s = '?';
    }
    track_say(f, "track", "%s", k->name);
    track_say(f, "command", "%s", text);
    track_say(f, "seed", "%llu", (unsigned long long)t->run.seed);
    track_say(f, "started", "%s", k->started);
    track_line_of(text, "/proc/sys/kernel/random/boot_id", "");   // the same in all runs of one sitting
    track_say(f, "boot", "%s", text);
    track_line_of(text, "/proc/cpuinfo", "model name");
    track_say(f, "processor", "%s", text);
    track_say(f, "processors", "%d", omp_get_num_procs());
    track_say(f, "device", "%s", t->backend->name);
    track_line_of(text, gpus.gl_pathc ? gpus.gl_pathv[0] : "", "Model");
    track_say(f, "accelerator", "%s", t->backend == &cpu_backend ? "none" : text);
    globfree(&gpus);
    track_say(f, "threads", "%d", omp_get_max_threads());
    track_say(f, "load", "%.2f", k->load);
    track_say(f, "compiler", "%s", TRACK_COMPILER);
    track_say(f, "flags", "%s", srdit_flags);
    track_say(f, "state_before_training", "%s", k->state_sha);
    track_say(f, "clock_seconds", "%.17g", t->log.clock);
    track_say(f, "process_seconds", "%.17g", now_seconds() - k->process_began);
    track_say(f, "processor_seconds", "%.17g",
              (double)used.ru_utime.tv_sec + 1e-6 * (double)used.ru_utime.tv_usec +
                  (double)used.ru_stime.tv_sec + 1e-6 * (double)used.ru_stime.tv_usec);
    track_say(f, "samples_seen", "%.0f", (double)t->step * t->run.batch);
    track_say(f, "parameters", "%zu", count_trained(&t->model->table));
    track_say(f, "planned_bytes", "%zu", t->model->parameter_bytes + t->model->activation_bytes);
    track_say(f, "peak_bytes", "%.0f", 1024.0 * (double)used.ru_maxrss);
}

static void track_say_settings(FILE *f, const Track *k, const Training *t) {
    OptionTable config = config_table((Config *)&t->c);
    track_say(f, "model", "%s", t->run.model);
    track_say(f, "steps", "%d", t->run.steps);
    track_say(f, "batch", "%d", t->run.batch);
    track_say(f, "accum", "%d", t->run.accum);
    const char *fixed[] = {"pictures", "sampler", "sample_steps"};
    for (int i = 0; i < 3; i++) track_say(f, fixed[i], "%s", track_rule(k->name, fixed[i]));
    for (int i = 0; i < config.count; i++) {
        char text[TEXT_OF_OPTION];
        option_text(text, &config, i);
        if (!unsaid(&config, i)) track_say(f, config.options[i].name, "%s", text);
    }
}

// log.csv as it is, since it was written by this run, line by line
static void track_copy_lines(FILE *to, const char *path) {
    FILE *f = fopen(path, "r");
    char line[1024];
    if (!f) die("%s: cannot be read: %s", path, strerror(errno));
    while (fgets(line, sizeof(line), f)) fputs(line, to);
    if (ferror(f)) die("%s: cannot be read: %s", path, strerror(errno));
    fclose(f);
}

static void track_write(const Track *k, Training *t, const Scores *scores) {
    char *text = NULL, sha[SHA_HEX];
    size_t size = 0, source_bytes = (size_t)(srdit_sources_end - srdit_sources);
    FILE *f = open_memstream(&text, &size);
    if (!f) die("out of memory for the log");
    fprintf(f, "srdit-track-1\n\n[run]\n");
    track_say_run(f, k, t);
    fprintf(f, "\n[inputs]\n");
    track_say(f, "data", "%s %.0f %s", k->data[0], (double)k->data_bytes, k->data_sha);
    track_say(f, "judge", "%s %.0f %s", track_rule(k->name, "judge"), (double)k->judge_bytes, k->judge_sha);
    fprintf(f, "\n[settings]\n");
    track_say_settings(f, k, t);
    fprintf(f, "\n[steps]\n");
    track_copy_lines(f, t->folder.log);
    fprintf(f, "\n[scores]\n");
    for (int i = 0; i < SCORES; i++) track_say(f, score_rows[i].name, "%.17g", ((const double *)scores)[i]);
    sha256_of(sha, srdit_sources, source_bytes);
    fprintf(f, "\n[sources]\n%zu %s\n", source_bytes, sha);
    fwrite(srdit_sources, 1, source_bytes, f);
    fprintf(f, "\n[end]\nsha256 ");
    if (fflush(f)) die("out of memory for the log");
    sha256_of(sha, text, size);   // of all before these digits
    fprintf(f, "%s\n", sha);
    if (fclose(f)) die("out of memory for the log");
    NewFile file = file_begin(t->folder.track);
    fwrite(text, 1, size, file.file);
    file_end(&file);
    free(text);
}

// status: how the training ended; returns the program's exit status
static int track_end(const Track *k, Training *t, int status) {
    int n = track_number(k->name, "pictures");
    int *y = (int *)alloc_zero((size_t)n, sizeof(int));
    real *x = status || interrupted ? NULL : track_samples(k, t, y, n);
    if (!x) {
        fflush(stdout);
        fprintf(stderr,
                "error: the run of track %s did not end as its rules say, so it does not count, and no "
                "track.log was written; a track cannot be gone on with: begin it anew\n",
                k->name);
        free(y);
        return status ? status : 130;
    }
    Scoring *scoring = scoring_open(k->data[0], track_rule(k->name, "judge"));
    Scores scores = scores_of(scoring, "the samples", x, y, (size_t)n, 0);
    scoring_close(scoring);
    free(y);
    track_write(k, t, &scores);
    const char *metric = track_rule(k->name, "metric");
    for (int i = 0; i < SCORES; i++)
        if (!strcmp(score_rows[i].name, metric))
            printf("track %s: %s %.5f (target: %s) after %d steps, %.0f samples seen, %.2f s on the clock\n",
                   k->name, metric, ((const double *)&scores)[i], track_rule(k->name, "target"), t->step,
                   (double)t->step * t->run.batch, t->log.clock);
    printf("%s: the evidence; dev/speedrun/verify.py reads it\n", t->folder.track);
    return 0;
}
#endif
