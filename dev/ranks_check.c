// dev/lib/ranks.h without a training (dev/test_ranks.py): says who it is, answers the roll call, exchanges a
// record, and then does what its argument says: end well, die, kill (itself), hang, count (until interrupted).
#include "lib/ranks.h"

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "end";
    ranks_environment(&ranks);
    if (!strcmp(what, "who")) {
        printf("%d %d %d %s %d\n", ranks.rank, ranks.size, ranks.local, ranks.host, ranks.port);
        return 0;
    }
    ranks_open();
    catch_interrupts(ranks.size > 1);
    static int all[MAX_RANKS];
    for (int turn = 0; turn < 3; turn++) {
        int mine = 100 * ranks.rank + turn;
        ranks_exchange(all, &mine, sizeof(mine));
        for (int i = 0; i < ranks.size; i++)
            if (all[i] != 100 * i + turn) die("the record of rank %d is %d", i, all[i]);
    }
    int step = 0;
    if (!strcmp(what, "die")) die("no luck");
    if (!strcmp(what, "kill")) raise(SIGKILL);
    if (!strcmp(what, "hang")) raise(SIGSTOP);
    if (!strcmp(what, "wait")) sleep(60);
    for (int last = strcmp(what, "count") ? 10 : 1 << 30; step < last && !ranks_stop(step); step++)
        usleep((useconds_t)(10000 * (1 + ranks.rank % 2)));
    fprintf(stderr, "rank %d: %d steps\n", ranks.rank, step);
    ranks_close();
    return 0;
}
