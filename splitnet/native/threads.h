/* Threads: the kernels use torch's threads. They link no OpenMP themselves, because a second OpenMP in a process would have
a second pool, whose threads and torch's would compete for cores, and because not every compiler has OpenMP. Python finds
torch's OpenMP (splitnet/quant/native.py); without it the kernels use one thread. */

#ifndef SPLITNET_THREADS_H
#define SPLITNET_THREADS_H

#include <stddef.h>

/* Functions of GCC's interface to OpenMP, which LLVM's and Intel's OpenMP also have. */
typedef struct {
    void (*run)(void (*share)(void *), void *given, unsigned threads, unsigned flags); /* GOMP_parallel */
    int (*number)(void);                                                               /* omp_get_thread_num */
    int (*count)(void);                                                                /* omp_get_num_threads */
} Pool;

static Pool pool; /* empty: there is no pool */

typedef void (*Task)(const void *job, int64_t part);

typedef struct {
    Task task;
    const void *job;
    int64_t parts;
} Shared;

/* Each thread takes neighbouring parts. The pool may have fewer threads than requested. */
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
