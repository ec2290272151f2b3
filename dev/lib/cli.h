// The command line of the programs: one table describes each setting (its name in files, its flag, its range,
// its help), and drives parsing, the help text and what a checkpoint says. Also Ctrl-C, standard
// streams, threads and how they wait for each other.
//
//   Option, OptionTable      a line of such a table; a table and the struct whose fields it fills
//   options_parse            argv into those fields; a mistake is one sentence with "did you mean"
//   options_print            the lines of --help
//   option_get, option_set   one field as a number, by its table line, range checked
//   option_text, option_put  one field as the text that files and the command line have
#ifndef SRDIT_CLI_H
#define SRDIT_CLI_H
#include "base.h"
#include <signal.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

// ----------------------------------------------------------------------------------------------------------
// Options

enum Kind {
    TEXT,        // const char *
    LIST,        // TextList: all words up to the next flag
    WHOLE,       // int
    SEED,        // uint64_t, a whole number
    NUMBER,      // double
    SWITCH,      // int, set to 1 by --name
    TECHNIQUE,   // int, set to 0 by --no-name
    CHOICE,      // int, the place of the value in the option's words
    SERIES       // Series: numbers with commas between them; none unless given
};
enum { MAX_SERIES = 8 };
typedef struct {
    int count;
    double x[MAX_SERIES];
} Series;
typedef struct {
    char **items;
    int count;
} TextList;
typedef struct {
    const char *name;   // drop_ratio: its flag is --drop-ratio (a technique's --no-drop-ratio)
    enum Kind kind;
    size_t offset;      // of the field in its struct
    double low, high;   // range of a number
    int flags;   // bit 0: decides a tensor's shape, and cannot change when a run goes on; others: its user's
    const char *help;
    double initial;      // what options_reset sets a number to
    const char *words;   // of a choice: "adamw muon"
} Option;
typedef struct {
    const Option *options;
    int count;
    void *fields;
    int *given;
} OptionTable;   // given may be NULL

static void *option_field(const OptionTable *t, int i) { return (char *)t->fields + t->options[i].offset; }

static double option_get(const OptionTable *t, int i) {
    const void *field = option_field(t, i);
    enum Kind kind = t->options[i].kind;
    return kind == NUMBER ? *(const double *)field
           : kind == SEED ? (double)*(const uint64_t *)field
                          : (double)*(const int *)field;
}
// name: what a message calls the setting, a flag or a key of `where`'s metadata
static void option_set(const OptionTable *t, int i, double value, const char *where, const char *name) {
    const Option *o = &t->options[i];
    void *field = option_field(t, i);
    if (!(value >= o->low && value <= o->high) || (o->kind != NUMBER && value != floor(value))) {
        if (o->kind == NUMBER)
            die("%s: %s is %g, which is not a number from %g to %.10g", where, name, value, o->low, o->high);
        die("%s: %s is %.10g, which is not a whole number from %.0f to %.0f", where, name, value, o->low,
            o->high);
    }
    if (o->kind == NUMBER) *(double *)field = value;
    else if (o->kind == SEED) *(uint64_t *)field = (uint64_t)value;
    else *(int *)field = (int)value;
}
static void options_reset(const OptionTable *t) {
    for (int i = 0; i < t->count; i++)
        if (t->options[i].kind == SERIES) ((Series *)option_field(t, i))->count = 0;
        else if (t->options[i].kind != TEXT && t->options[i].kind != LIST)
            option_set(t, i, t->options[i].initial, "the program", t->options[i].name);
}
enum { TEXT_OF_OPTION = 200 };
// The value as text, which option_put reads back bit for bit; a series without numbers is ""
static void option_text(char text[TEXT_OF_OPTION], const OptionTable *t, int i) {
    const Option *o = &t->options[i];
    const Series *s = (const Series *)option_field(t, i);
    text[0] = 0;
    if (o->kind == SERIES)
        for (int k = 0, n = 0; k < s->count; k++)
            n += snprintf(text + n, TEXT_OF_OPTION - (size_t)n, "%s%.17g", k ? "," : "", s->x[k]);
    else if (o->kind == CHOICE) {
        const char *word = o->words;
        for (int k = (int)option_get(t, i); k > 0; k--) word += strcspn(word, " ") + 1;
        snprintf(text, TEXT_OF_OPTION, "%.*s", (int)strcspn(word, " "), word);
    } else snprintf(text, TEXT_OF_OPTION, "%.17g", option_get(t, i));
}
static void option_put(const OptionTable *t, int i, const char *text, const char *where, const char *name) {
    const Option *o = &t->options[i];
    if (o->kind == CHOICE) {
        const char *word = o->words;
        size_t n = strlen(text);
        for (int k = 0; *word; k++, word += strcspn(word, " "), word += *word == ' ')
            if (strcspn(word, " ") == n && !memcmp(word, text, n)) {
                option_set(t, i, k, where, name);
                return;
            }
        die("%s: %s is \"%s\"; there are: %s", where, name, text, o->words);
    }
    if (o->kind != SERIES) {
        option_set(t, i, text_number(text, where, name), where, name);
        return;
    }
    Series s = {0, {0}};
    for (const char *at = text;; at++) {   // past a comma
        char one[32];
        size_t n = strcspn(at, ",");
        if (!n) die("%s: %s is \"%s\", where a number is missing", where, name, text);
        snprintf(one, sizeof(one), "%.*s", (int)n, at);
        double x = text_number(one, where, name);
        if (s.count == MAX_SERIES) die("%s: %s has more than %d numbers", where, name, MAX_SERIES);
        if (!(x >= o->low && x <= o->high))
            die("%s: %s has %g, which is not a number from %g to %g", where, name, x, o->low, o->high);
        s.x[s.count++] = x;
        at += n;
        if (!*at) break;
    }
    *(Series *)option_field(t, i) = s;
}
static int option_find(const OptionTable *t, const char *name) {   // -1: there is none
    for (int i = 0; i < t->count; i++)
        if (!strcmp(t->options[i].name, name)) return i;
    return -1;
}

enum { FLAG_BYTES = 80, MAX_TABLES = 4, MAX_OPTIONS = 256 };
static void flag_of(char flag[FLAG_BYTES], const Option *o) {
    snprintf(flag, FLAG_BYTES, "--%s%s", o->kind == TECHNIQUE ? "no-" : "", o->name);
    for (char *s = flag; *s; s++)
        if (*s == '_') *s = '-';
}

// The flag that shares most letters with what was typed, at its beginning and its end; "" if none is near
static void flag_near(char near[FLAG_BYTES], const char *typed, const OptionTable *tables, int count) {
    char flag[FLAG_BYTES];
    size_t most = 4, m = strlen(typed);
    near[0] = 0;
    for (int k = 0; k < count; k++)
        for (int i = 0; i < tables[k].count; i++) {
            flag_of(flag, &tables[k].options[i]);
            size_t same = 0, back = 0, n = strlen(flag);
            while (same < n && flag[same] == typed[same]) same++;
            while (back < n && back < m && flag[n - 1 - back] == typed[m - 1 - back]) back++;
            if (same + back > most) most = same + back, memcpy(near, flag, n + 1);
        }
}

// The words of the command line with each --flag=value made two; good to the program's end. behind_equals: of
// each word 1 if it is such a value
static char **split_kept, *behind_equals;   // reachable to the end, for leak checkers
static char **split_words(int *argc, char **argv) {
    char **words = split_kept = (char **)alloc_zero(2 * (size_t)*argc + 1, sizeof(char *));
    char *values = behind_equals = (char *)alloc_zero(2 * (size_t)*argc + 1, 1);
    int n = 0;
    for (int i = 0; i < *argc; i++) {
        char *value = i && !strncmp(argv[i], "--", 2) ? strchr(argv[i], '=') : NULL;
        words[n++] = value ? strndup(argv[i], (size_t)(value - argv[i])) : argv[i];
        if (value) values[n] = 1, words[n++] = value + 1;
    }
    *argc = n;
    return words;
}

// Reads the words from argv[at] on that belong to option i, whose flag stands at argv[at]; returns the last's
// place.
static int option_read(const OptionTable *t, int i, int at, int argc, char **argv) {
    const Option *o = &t->options[i];
    const char *flag = argv[at];
    void *field = option_field(t, i);
    if (t->given) t->given[i] = 1;
    if (o->kind == SWITCH || o->kind == TECHNIQUE) {
        if (argv == split_kept && behind_equals[at + 1])
            die("%s=%s: this flag takes no value; write %s alone", flag, argv[at + 1], flag);
        *(int *)field = o->kind == SWITCH;
        return at;
    }
    if (at + 1 >= argc || !strncmp(argv[at + 1], "--", 2)) die("%s needs a value: %s", flag, o->help);
    if (o->kind == LIST) {
        TextList *list = (TextList *)field;
        list->items = &argv[at + 1], list->count = 0;
        while (at + 1 < argc && strncmp(argv[at + 1], "--", 2)) at++, list->count++;
        return at;
    }
    if (o->kind == TEXT) *(const char **)field = argv[at + 1];
    else option_put(t, i, argv[at + 1], "command line", flag);
    return at + 1;
}

// The command line into the tables' fields. The one word that may stand without a flag goes to *word (NULL:
// none may).
static void options_parse(const OptionTable *tables, int count, const char **word, int argc, char **argv) {
    char seen[MAX_TABLES][MAX_OPTIONS] = {{0}};
    for (int at = 1; at < argc; at++) {
        char flag[FLAG_BYTES];
        int done = 0;
        for (int k = 0; k < count && !done; k++)
            for (int i = 0; i < tables[k].count && !done; i++) {
                flag_of(flag, &tables[k].options[i]);
                if (strcmp(argv[at], flag)) continue;
                if (seen[k][i]++) die("%s is given twice; once is enough", flag);
                at = option_read(&tables[k], i, at, argc, argv);
                done = 1;
            }
        if (done) continue;
        if (word && argv[at][0] != '-') {
            if (*word) die("%s and %s are given; one is enough", *word, argv[at]);
            *word = argv[at];
            continue;
        }
        flag_near(flag, argv[at], tables, count);
        die("unknown argument %s%s%s%s (--help lists all)", argv[at], *flag ? "; did you mean " : "", flag,
            *flag ? "?" : "");
    }
}

// Lines of --help for the options of one kind or of all others; numbers with their value in brackets
static void options_print(const OptionTable *t, int techniques, int width) {
    for (int i = 0; i < t->count; i++) {
        const Option *o = &t->options[i];
        char flag[FLAG_BYTES];
        if ((o->kind == TECHNIQUE) != techniques) continue;
        flag_of(flag, o);
        printf("  %-*s %s", width, flag, o->help);
        if (o->kind == WHOLE || o->kind == SEED || o->kind == NUMBER) printf(" [%.10g]", option_get(t, i));
        if (o->kind == CHOICE || (o->kind == SERIES && ((const Series *)option_field(t, i))->count)) {
            char text[TEXT_OF_OPTION];
            option_text(text, t, i);
            printf(" [%s]", text);
        }
        printf("\n");
    }
}

static int wants_help(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) return 1;
    return 0;
}

// The text that follows a flag, wherever it stands; NULL: it does not stand there
static const char *text_after(const char *flag, int argc, char **argv) {
    const char *text = NULL;
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], flag)) {
            if (text) die("%s is given twice; once is enough", flag);
            text = argv[i + 1];
        }
    return text;
}

// ----------------------------------------------------------------------------------------------------------
// Ctrl-C, threads

// 1 after the first Ctrl-C, SIGTERM or SIGHUP
static volatile sig_atomic_t interrupted;
static void on_interrupt(int signal) { (void)signal, interrupted = 1; }
// The second Ctrl-C ends the program, unless it was started as one of several ranks: torchrun sends its
// processes a Ctrl-C that the terminal has sent them already, and in the end a signal that nobody catches.
// Signals that were ignored when the program began (by nohup, say) stay so. A reader of our output that ends
// must not end a training: what is lost then is said at the end.
static void catch_interrupts(int one_of_several) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action, before;
    memset(&action, 0, sizeof(action));
    action.sa_handler = on_interrupt;
    action.sa_flags = one_of_several ? 0 : (int)SA_RESETHAND;
    for (int i = 0; i < 3; i++) {
        sigaction(signals[i], NULL, &before);
        if (before.sa_handler != SIG_IGN) sigaction(signals[i], &action, NULL);
    }
    signal(SIGPIPE, SIG_IGN);
}

// From here on a Ctrl-C ends the program at once.
static void release_interrupts(void) {
    struct sigaction now;
    if (!sigaction(SIGINT, NULL, &now) && now.sa_handler == on_interrupt) signal(SIGINT, SIG_DFL);
}

// A standard stream that was closed would be given, as its number, to the next file that is opened, and text
// would go into that. A file that grows past `ulimit -f` is an error to be told of, not a death by signal.
static void guard_streams(void) {
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) _exit(1);
    signal(SIGXFSZ, SIG_IGN);
}

// The program's last act: was all that it said taken?
static void check_output_taken(void) {
    if (fflush(stdout) || ferror(stdout)) die("standard output: %s", strerror(errno));
}

// Word for a shell: as it is, or in quotes
static void print_word(const char *word) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./=,:+@%";
    if (*word && !word[strspn(word, plain)]) {
        fputs(word, stdout);
        return;
    }
    putchar('\'');
    for (; *word; word++)
        if (*word == '\'') fputs("'\\''", stdout);
        else putchar(*word);
    putchar('\'');
}

// threads: 0 for what OpenMP chooses. More than a few for each processor only wait for each other. Returns
// how many it will be, or 0.
static int use_threads(int threads) {
    int most = 4 * omp_get_num_procs();
    if (threads > most) printf("--threads %d: %d, which is four for each processor here\n", threads, most);
    if (threads) omp_set_num_threads(imin(threads, most));
    return imin(threads, most);
}

// OpenMP's threads wait for each other by spinning for long, which on a machine that has anything else to do
// costs a multiple of what it saves; falling asleep at once makes a step half as long again (measured in
// dev/README.md). gcc's library can spin for some microseconds first. clang's counts in milliseconds: it may
// spin for one, unless the machine has been crowded. Both read their setting before main, so the program
// starts anew.
static void wait_calmly(char **argv) {
#ifdef _OPENMP
#ifdef __clang__
    double load;   // the mean number of programs that ran in the last minute
    int room = getloadavg(&load, 1) == 1 && load < 1.5 * omp_get_num_procs();
    if (getenv("OMP_WAIT_POLICY") || getenv("KMP_BLOCKTIME") || setenv("KMP_BLOCKTIME", room ? "1" : "0", 1))
        return;
#else
    if (getenv("OMP_WAIT_POLICY") || setenv("OMP_WAIT_POLICY", "passive", 1)) return;
    setenv("GOMP_SPINCOUNT", "500", 0);
#endif
    execv("/proc/self/exe", argv);   // where there is no such file, it spins
#else
    (void)argv;
#endif
}
#pragma GCC diagnostic pop
#endif
