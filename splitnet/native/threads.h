/* Threads: those with which torch computes. The kernels link no OpenMP of their own: a second one in a process would have a
second pool, whose threads and torch's take each other's cores, and not every compiler has one. Python finds torch's
(splitnet/quant/native.py); without it there is one thread. */

#ifndef SPLITNET_THREADS_H
#define SPLITNET_THREADS_H

#include <stddef.h>

/* Of GCC's interface to OpenMP, which LLVM's and Intel's have, too. */
typedef struct {
    void (*run)(void (*share)(void *), void *given, unsigned threads, unsigned flags); /* GOMP_parallel */
    int (*number)(void);                                                               /* omp_get_thread_num */
    int (*count)(void);                                                                /* omp_get_num_threads */
} Pool;

static Pool pool; /* empty: none */

typedef void (*Task)(const void *job, int64_t part);

typedef struct {
    Task task;
    const void *job;
    int64_t parts;
} Shared;

/* A thread takes neighbours. There may be fewer threads than were asked for. */
static void run_share(void *given) {
    const Shared *shared = given;
    int64_t threads = pool.count(), thread = pool.number();
    for (int64_t part = shared->parts * thread / threads; part < shared->parts * (thread + 1) / threads; part++)
        shared->task(shared->job, part);
}

/* Runs every part of a job, in any order. */
static void run_parts(Task task, const void *job, int64_t parts, int64_t threads) {
    Shared shared = {.task = task, .job = job, .parts = parts};
    if (threads > 1 && pool.run != NULL) {
        pool.run(run_share, &shared, (unsigned)threads, 0);
        return;
    }
    for (int64_t part = 0; part < parts; part++) task(job, part);
}

#endif
