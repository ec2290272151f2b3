// The processes of a training on several GPUs, its ranks: who this one is, whether the others are there, and
// how all end together. Numbers of the training never pass here (that is NCCL's): a TCP connection from each
// rank to rank 0 carries the roll call, small records, and the last words of a rank that dies.
//
//   ranks_environment   rank, size and meeting place, as torchrun, srun or mpirun tell them
//   ranks_open          the roll call: returns when all have come; alone (size 1) it does nothing
//   ranks_exchange      a record of each rank to all ranks
//   ranks_first         a number that rank 0 knows
//   ranks_stop          does the training end before this step? The same answer on every rank
//   ranks_close         waits for all and says goodbye
//
// From ranks_open to ranks_close a thread listens. A rank that dies by die() tells the others why; one that
// is killed shows by its closed connection, one that is stopped or cut off by its silence. Each of these ends
// every rank with one sentence that names it, within 30 seconds. But a rank whose training hangs, for a disk
// or a GPU, still gives signs of life, and is waited for.
#ifndef SRDIT_RANKS_H
#define SRDIT_RANKS_H
#include "base.h"
#include "cli.h"
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"

// AHEAD: so many steps may a rank begin before rank 0 has said that they will be made (ranks_stop)
enum { MAX_RANKS = 1024, RECORD_BYTES = 512, AHEAD = 4 };
typedef struct {
    int rank, size, local;             // size 1: alone; local: among those of this machine
    char host[256];                    // where rank 0 is
    int port;                          // MASTER_PORT, which may be its starter's own; the next is ours
    double deadline;                   // seconds that a silent or missing rank is waited for
    int bf16;                          // 1: gradients are added up in bf16
    const char *checkpoint;            // the last one, for last words; NULL: there is none yet
    int (*trouble)(char text[1024]);   // asked now and then: 1 and a sentence, if something is wrong
    // what follows belongs to the connections
    int fd[MAX_RANKS];          // of rank 0: to each rank; of the others: [0]
    char name[MAX_RANKS][64];   // their machines
    double heard[MAX_RANKS];    // when something last came
    char inbox[MAX_RANKS][RECORD_BYTES];
    int filled[MAX_RANKS], left[MAX_RANKS];
    int allowed, ends;          // steps that may be begun; 1: and no more will
    int asked, closing, over;   // 1: this rank has asked for the end; says goodbye; has left
    pthread_t thread;
    pthread_mutex_t lock, send_lock;
    pthread_cond_t changed;
} Ranks;
static Ranks ranks = {.size = 1, .deadline = 25};

// The first name of a SLURM list of hosts: "gpu[07-09,11],a1" begins with gpu07
static void first_host(char *out, size_t room, const char *list) {
    size_t head = strcspn(list, "[,"), digits = list[head] == '[' ? strcspn(list + head + 1, "-,]") : 0;
    snprintf(out, room, "%.*s%.*s", (int)head, list, (int)digits, digits ? list + head + 1 : "");
}
static int environment_number(const char *name, int low, int high) {
    const char *text = getenv(name);
    char *end;
    long x = text ? strtol(text, &end, 10) : 0;
    if (!text || end == text || *end || x < low || x > high)
        die("%s is \"%s\" in the environment: it must be a whole number from %d to %d", name,
            text ? text : "", low, high);
    return (int)x;
}
// Who this process is, by the first of the three starters that has left its variables. Without any, alone.
static void ranks_environment(Ranks *r) {
    static const char *const names[3][3] = {
        {"WORLD_SIZE", "RANK", "LOCAL_RANK"},
        {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"},
        {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"}};   // (sbatch without srun has no step)
    int by = 0;
    while (by < 3 && !getenv(names[by][0])) by++;
    if (by == 3) return;
    r->size = environment_number(names[by][0], 1, MAX_RANKS);
    if (r->size == 1) return;
    r->rank = environment_number(names[by][1], 0, r->size - 1);
    r->local = environment_number(names[by][2], 0, r->size - 1);
    const char *address = getenv("MASTER_ADDR"), *list = getenv("SLURM_STEP_NODELIST");
    const char *here = getenv("OMPI_COMM_WORLD_LOCAL_SIZE"), *job = getenv("PMIX_NAMESPACE");
    if (address) snprintf(r->host, sizeof(r->host), "%s", address);
    else if (by == 2 && list) first_host(r->host, sizeof(r->host), list);
    else if (by == 1 && here && atoi(here) == r->size) snprintf(r->host, sizeof(r->host), "127.0.0.1");
    else
        die("where rank 0 is must be told by MASTER_ADDR%s",
            by == 1 ? ": mpirun -x MASTER_ADDR=HOST ..." : "");
    // without MASTER_PORT one that two jobs on a machine hardly share
    if (by == 2 && getenv("SLURM_JOB_ID")) job = getenv("SLURM_JOB_ID");
    uint32_t hash = 0;
    for (const char *s = by && job ? job : ""; *s; s++) hash = hash * 31 + (unsigned char)*s;
    r->port = getenv("MASTER_PORT") || !by ? environment_number("MASTER_PORT", 1024, 65534)
                                           : 20000 + (int)(hash % 6000) * 2;
    if (getenv("RANKS_DEADLINE")) r->deadline = environment_number("RANKS_DEADLINE", 1, 86400);
}

// ----------------------------------------------------------------------------------------------------------
// What passes on a connection

enum Message { HELLO = 1, WELCOME, RECORD, BEAT, LAST_WORDS, ASK_END, ALLOWED, ENDS, GOODBYE };
typedef struct {
    uint32_t magic, kind;
    int32_t from, number;          // number: of ALLOWED, ENDS a step; of HELLO the size
    char body[RECORD_BYTES * 2];   // always sent whole, so that no length need be believed
} Frame;
enum { RANKS_MAGIC = 0x53524454 };

// 1 if all of it was sent: a short write goes on where it ended
static int ranks_send(int fd, enum Message kind, int number, const void *body, size_t bytes) {
    Frame f;
    memset(&f, 0, sizeof(f));
    f.magic = RANKS_MAGIC, f.kind = kind, f.from = ranks.rank, f.number = number;
    if (bytes) memcpy(f.body, body, bytes);
    pthread_mutex_lock(&ranks.send_lock);
    size_t done = 0;
    for (ssize_t n = 1; done < sizeof(f) && n > 0; done += n > 0 ? (size_t)n : 0) do
            n = send(fd, (char *)&f + done, sizeof(f) - done, MSG_NOSIGNAL);
        while (n < 0 && errno == EINTR);
    pthread_mutex_unlock(&ranks.send_lock);
    return done == sizeof(f);
}
// 1 if a whole frame of ours came, within 10 s of its first byte
static int ranks_receive(int fd, Frame *f) {
    size_t done = 0;
    double end = INFINITY;
    for (ssize_t n = 1; done < sizeof(*f) && n > 0 && now_seconds() < end; done += n > 0 ? (size_t)n : 0) {
        do n = recv(fd, (char *)f + done, sizeof(*f) - done, 0);
        while (n < 0 && errno == EINTR);
        if (!done) end = now_seconds() + 10;
    }
    if (done < sizeof(*f)) return 0;
    f->body[sizeof(f->body) - 1] = 0;
    int text = f->kind == HELLO || f->kind == WELCOME || f->kind == LAST_WORDS;   // for the terminal
    for (unsigned char *c = (unsigned char *)f->body; text && *c; c++)
        if (*c < ' ' || *c == 127) *c = ' ';
    return f->magic == RANKS_MAGIC && f->from >= 0 && f->from < MAX_RANKS;
}
static void ranks_send_all(enum Message kind, int number, const void *body, size_t bytes) {
    for (int i = 0; i < MAX_RANKS && i < (ranks.rank ? 1 : ranks.size); i++)
        if (ranks.fd[i] > 0 && !ranks.left[i]) ranks_send(ranks.fd[i], kind, number, body, bytes);
}
static void ranks_timeout(int fd, double seconds) {   // of a read or a write
    struct timeval t = {(time_t)seconds, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof(t));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof(t));
}

// ----------------------------------------------------------------------------------------------------------
// Endings. The first thread that comes here ends the process; another waits for that.

static int ranks_ending;
static void ranks_last_words(const char *text) {
    if (__atomic_exchange_n(&ranks_ending, 1, __ATOMIC_SEQ_CST))
        for (;;) pause();
    if (ranks.over) return;
    ranks_send_all(LAST_WORDS, 0, text, strnlen(text, RECORD_BYTES * 2 - 1));
    usleep(200000);   // a connection closed at once could take the words with it
}
// What die() says first: the words of this rank go to the others
static void ranks_die(const char *text) {
    char words[RECORD_BYTES * 2];
    snprintf(words, sizeof(words), "rank %d: %s", ranks.rank, text);
    ranks_last_words(words);
}
// The end because of another rank. from: where the words came from, which need not hear them again
__attribute__((noreturn)) static void ranks_end(const char *words, int from) {
    ranks.left[from] = 1;
    ranks_last_words(words);
    fflush(stdout);
    fprintf(stderr, "error: %s%s%s\n", words, ranks.checkpoint ? "; the last checkpoint is " : "",
            ranks.checkpoint ? ranks.checkpoint : "");
    fflush(stderr);
    _exit(1);
}

// Before an error that another rank's end may have caused: the listening thread hears of that meanwhile,
// and its sentence, which names the rank, ends this process first.
static void ranks_hear_first(void) {
    if (ranks.size > 1) sleep(3);
}

static void ranks_handle(int from, const Frame *f) {
    pthread_mutex_lock(&ranks.lock);
    ranks.heard[from] = now_seconds();
    if (f->kind == RECORD) {
        int rank = ranks.rank ? f->number : from;   // rank 0 sends each rank's on
        if (rank >= 0 && rank < ranks.size) {
            memcpy(ranks.inbox[rank], f->body, RECORD_BYTES);
            ranks.filled[rank] = 1;
        }
    }
    if (f->kind == ALLOWED) ranks.allowed = f->number;
    if (f->kind == ENDS) ranks.allowed = f->number, ranks.ends = 1;
    if (f->kind == ASK_END) interrupted = 1;
    if (f->kind == GOODBYE) ranks.left[from] = 1;
    pthread_cond_broadcast(&ranks.changed);
    pthread_mutex_unlock(&ranks.lock);
    if (f->kind == LAST_WORDS) ranks_end(f->body, from);
}
// The thread: hears what comes, sends a sign of life every second, and looks for silence
static void *ranks_listen(void *unused) {
    struct pollfd set[MAX_RANKS];
    int count = ranks.rank ? 1 : ranks.size;
    double beat = 0, turn = now_seconds();
    char words[RECORD_BYTES * 2];
    while (!__atomic_load_n(&ranks.over, __ATOMIC_SEQ_CST)) {
        for (int i = 0; i < count; i++) {
            set[i].fd = ranks.fd[i] > 0 && !ranks.left[i] ? ranks.fd[i] : -1;
            set[i].events = POLLIN;
            set[i].revents = 0;
        }
        poll(set, (nfds_t)count, 100);
        double now = now_seconds();
        if (now - turn > 5)   // this whole process was asleep: hear first what came meanwhile
            for (int i = 0; i < count; i++) ranks.heard[i] = now;
        turn = now;
        for (int i = 0; i < count; i++) {
            Frame f;
            if (set[i].fd < 0) continue;
            int whole = set[i].revents ? ranks_receive(set[i].fd, &f) : 1;
            if (!whole && ranks.closing) f.kind = GOODBYE, whole = 1;
            if (set[i].revents && whole) ranks_handle(i, &f);
            if (!whole) snprintf(words, sizeof(words), "rank %d on %s has died", i, ranks.name[i]);
            else if (now - ranks.heard[i] > ranks.deadline)
                snprintf(words, sizeof(words), "rank %d on %s has said nothing for %.0f s", i, ranks.name[i],
                         now - ranks.heard[i]);
            else continue;
            if (!ranks.left[i]) ranks_end(words, i);
        }
        if (now - beat < 1) continue;
        beat = now;
        ranks_send_all(BEAT, 0, NULL, 0);
        char text[1024];
        if (ranks.trouble && ranks.trouble(text)) die("%s", text);
    }
    return unused;
}

// ----------------------------------------------------------------------------------------------------------
// The roll call

static void ranks_hear(int i, int fd, const Frame *f) {
    ranks.fd[i] = fd, ranks.heard[i] = now_seconds();
    snprintf(ranks.name[i], sizeof(ranks.name[i]), "%.60s", f->body);
    ranks_timeout(fd, 10);
}
// Rank 0 waits for all the others.
static void ranks_await(double end) {
    struct sockaddr_in6 any;
    int port = ranks.port + 1, on = 1, off = 0, missing = ranks.size - 1;
    int all = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&any, 0, sizeof(any));
    any.sin6_family = AF_INET6, any.sin6_port = htons((uint16_t)port), any.sin6_addr = in6addr_any;
    socklen_t bytes = sizeof(any);
    if (all >= 0) setsockopt(all, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
    else {   // a machine without IPv6
        struct sockaddr_in *old = (struct sockaddr_in *)&any;
        all = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        memset(&any, 0, sizeof(any));
        old->sin_family = AF_INET, old->sin_port = htons((uint16_t)port), bytes = sizeof(*old);
    }
    setsockopt(all, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(all, (struct sockaddr *)&any, bytes) || listen(all, MAX_RANKS))
        die("port %d, where the ranks meet, cannot be had: %s; is another training running? Another "
            "MASTER_PORT helps",
            port, strerror(errno));
    for (double beat = 0; missing;) {
        struct pollfd one = {all, POLLIN, 0};
        double left = end - now_seconds();
        if (now_seconds() - beat > 1) ranks_send_all(BEAT, 0, NULL, 0), beat = now_seconds();
        if (left <= 0) {
            int first = 1;
            while (ranks.fd[first] > 0) first++;
            die("rank %d has not come within %.0f s%s", first, ranks.deadline,
                missing > 1 ? ", and others have not" : "");
        }
        if (poll(&one, 1, left < 1 ? (int)(left * 1000) + 1 : 1000) <= 0) continue;
        int fd = accept4(all, NULL, NULL, SOCK_CLOEXEC);
        Frame f;
        if (fd < 0) continue;
        ranks_timeout(fd, 2);
        if (!ranks_receive(fd, &f) || f.kind != HELLO) {   // not one of ours
            close(fd);
            continue;
        }
        if (f.number != ranks.size || f.from == 0 || f.from >= ranks.size || ranks.fd[f.from] > 0) {
            ranks.left[0] = 0, ranks.fd[0] = fd;   // to be told as well
            die(f.number != ranks.size ? "rank %d was started as one of %d ranks, and rank 0 as one of %d"
                                       : "there are two processes that say they are rank %d (of %d ranks)",
                f.from, f.number, ranks.size);
        }
        ranks_hear(f.from, fd, &f);
        missing--;
    }
    close(all);
    ranks.fd[0] = 0;
    char name[64] = "";
    gethostname(name, sizeof(name) - 1);
    ranks_send_all(WELCOME, 0, name, sizeof(name));
}
// The others ask for rank 0 until it answers; what else may listen at that port does not count.
static void ranks_call(double end) {
    char port[16], name[64] = "";
    struct addrinfo hints, *found = NULL;
    memset(&hints, 0, sizeof(hints));
    hints.ai_socktype = SOCK_STREAM;
    snprintf(port, sizeof(port), "%d", ranks.port + 1);
    gethostname(name, sizeof(name) - 1);
    int error = 0;
    for (;; usleep(100000)) {
        if (now_seconds() > end)
            die("rank 0 has not answered at %s, port %s, within %.0f s%s%s", ranks.host, port, ranks.deadline,
                error ? ": " : "", error ? gai_strerror(error) : "");
        if ((error = getaddrinfo(ranks.host, port, &hints, &found))) continue;
        for (struct addrinfo *a = found; a; a = a->ai_next) {
            Frame f;
            int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
            if (fd < 0) continue;
            double left = end + 3 - now_seconds();
            ranks_timeout(fd, left > 3 ? left : 3);
            if (!connect(fd, a->ai_addr, a->ai_addrlen) &&
                ranks_send(fd, HELLO, ranks.size, name, sizeof(name)) && ranks_receive(fd, &f)) {
                while (f.kind == BEAT && ranks_receive(fd, &f)) {}   // rank 0 is there, and waits for others
                if (f.kind == LAST_WORDS) ranks.over = 1, ranks_end(f.body, 0);
                if (f.kind == WELCOME) {
                    ranks_hear(0, fd, &f);
                    freeaddrinfo(found);
                    return;
                }
            }
            close(fd);
        }
        freeaddrinfo(found);
    }
}
// After ranks_environment
static void ranks_open(void) {
    if (ranks.size == 1) return;
    pthread_mutex_init(&ranks.lock, NULL), pthread_mutex_init(&ranks.send_lock, NULL);
    pthread_cond_init(&ranks.changed, NULL);
    before_death = ranks_die;
    double end = now_seconds() + ranks.deadline;
    if (ranks.rank) ranks_call(end);
    else ranks_await(end);
    if (pthread_create(&ranks.thread, NULL, ranks_listen, NULL))
        die("the thread that listens to the other ranks cannot be started");
    // every rank's line in one place, rank 0's terminal; what the others would print it prints too
    int null = ranks.rank ? open("/dev/null", O_WRONLY | O_CLOEXEC) : -1;
    if (ranks.rank && (null < 0 || dup2(null, STDOUT_FILENO) < 0)) die("/dev/null cannot be opened");
    if (null >= 0) close(null);
}

// all[size][bytes]: each rank's record `mine`, of at most RECORD_BYTES. Returns when all have given theirs.
static void ranks_exchange(void *all, const void *mine, size_t bytes) {
    char record[RECORD_BYTES] = "";
    memcpy(record, mine, bytes);
    memcpy((char *)all + (size_t)ranks.rank * bytes, mine, bytes);
    if (ranks.size == 1) return;
    if (ranks.rank) ranks_send_all(RECORD, 0, record, sizeof(record));
    for (int i = 0; i < ranks.size; i++) {
        pthread_mutex_lock(&ranks.lock);
        while (i != ranks.rank && !ranks.filled[i]) pthread_cond_wait(&ranks.changed, &ranks.lock);
        if (i != ranks.rank) memcpy((char *)all + (size_t)i * bytes, ranks.inbox[i], bytes);
        pthread_mutex_unlock(&ranks.lock);
    }
    pthread_mutex_lock(&ranks.lock);   // nobody sends the next record before it has all of these
    memset(ranks.filled, 0, sizeof(ranks.filled));
    pthread_mutex_unlock(&ranks.lock);
    for (int i = 0; i < ranks.size && !ranks.rank; i++) {
        memset(record, 0, sizeof(record));
        memcpy(record, (char *)all + (size_t)i * bytes, bytes);
        ranks_send_all(RECORD, i, record, sizeof(record));
    }
}

// What rank 0 says, on every rank
static int ranks_first(int own) {
    static int all[MAX_RANKS];
    ranks_exchange(all, &own, sizeof(own));
    return all[0];
}

// Rank 0's text, on every rank; what has no room is cut off
static void ranks_first_text(char *text, size_t room) {
    static char all[MAX_RANKS][RECORD_BYTES];
    char own[RECORD_BYTES] = "";
    memcpy(own, text, strnlen(text, sizeof(own) - 1));
    ranks_exchange(all, own, sizeof(own));
    if (ranks.rank) snprintf(text, room, "%s", all[0]);
}

// 1: the training ends before step `step` (from 0), since some rank was interrupted. Ranks notice a signal at
// different steps, so rank 0 decides: it allows steps a few ahead, and the last one allowed is the last made.
static int ranks_stop(int step) {
    if (ranks.size == 1) return interrupted;
    if (ranks.rank == 0) {
        if (interrupted && !ranks.ends) ranks.ends = 1, ranks_send_all(ENDS, ranks.allowed, NULL, 0);
        else if (!ranks.ends && step + AHEAD > ranks.allowed)
            ranks_send_all(ALLOWED, ranks.allowed = step + AHEAD, NULL, 0);
        return step >= ranks.allowed;
    }
    if (interrupted && !ranks.asked) ranks.asked = 1, ranks_send_all(ASK_END, 0, NULL, 0);
    pthread_mutex_lock(&ranks.lock);
    while (step >= ranks.allowed && !ranks.ends) pthread_cond_wait(&ranks.changed, &ranks.lock);
    int stop = step >= ranks.allowed;
    if (stop) interrupted = 1;
    pthread_mutex_unlock(&ranks.lock);
    return stop;
}

static void ranks_close(void) {
    static char all[MAX_RANKS];
    if (ranks.size == 1) return;
    ranks_exchange(all, "", 1);   // until here a closed connection is a death
    before_death = NULL;
    // Rank 0 closes the connections when all have said goodbye, and the others wait for that: who closes one
    // with something unread in it makes the other side lose what it has not read yet.
    if (ranks.rank) ranks.closing = 1, ranks_send_all(GOODBYE, 0, NULL, 0);
    for (int i = ranks.rank ? 0 : 1; i < (ranks.rank ? 1 : ranks.size); i++) {
        pthread_mutex_lock(&ranks.lock);
        while (!ranks.left[i]) pthread_cond_wait(&ranks.changed, &ranks.lock);
        pthread_mutex_unlock(&ranks.lock);
    }
    __atomic_store_n(&ranks.over, 1, __ATOMIC_SEQ_CST);
    pthread_join(ranks.thread, NULL);
    for (int i = 0; i < (ranks.rank ? 1 : ranks.size); i++)
        if (ranks.fd[i] > 0) close(ranks.fd[i]);
}
#pragma GCC diagnostic pop
#endif
