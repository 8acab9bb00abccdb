/* The Python functions. They take addresses and sizes, whose validity splitnet/quant/native.py and
splitnet/blocks/fast/native_step.py guarantee. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000 /* one wheel works with this Python and all later ones */
#include <Python.h>

#include "converted.h"
#include "paths.h"
#include "step.h"

static const Path *path = &plain; /* the path in use */

static int read_numbers(PyObject *const *given, Py_ssize_t count, long long *numbers, int wanted) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "%d numbers are wanted, %zd are given", wanted, count);
        return 0;
    }
    for (int i = 0; i < wanted; i++) {
        numbers[i] = PyLong_AsLongLong(given[i]);
        if (numbers[i] == -1 && PyErr_Occurred()) return 0;
    }
    return 1;
}

/* Takes (weights, rows, products, count, inputs, outputs, threads), the first three as addresses. */
static int read_job(PyObject *const *given, Py_ssize_t count, Job *job) {
    long long numbers[7];
    if (!read_numbers(given, count, numbers, 7)) return 0;
    *job = (Job){
        .weights = (const void *)(intptr_t)numbers[0],
        .rows = (const float *)(intptr_t)numbers[1],
        .products = (float *)(intptr_t)numbers[2],
        .count = (int64_t)numbers[3],
        .inputs = (int64_t)numbers[4],
        .outputs = (int64_t)numbers[5],
        .threads = (int)numbers[6],
    };
    return 1;
}

/* Takes (description, tiles, rows, products, count, distance between rows, distance between products, experts or 0, number
of experts, threads, whether to use the plain loops). */
static PyObject *grouped(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[11];
    if (!read_numbers(given, count, numbers, 11)) return NULL;
    const Grouped *weight = (const Grouped *)(intptr_t)numbers[0];
    const uint8_t *tiles = (const uint8_t *)(intptr_t)numbers[1];
    GroupedJob job = {
        .weight = weight,
        .rows = (const float *)(intptr_t)numbers[2],
        .products = (float *)(intptr_t)numbers[3],
        .count = (int64_t)numbers[4],
        .stride = (int64_t)numbers[5],
        .pitch = (int64_t)numbers[6],
        .threads = (int)numbers[9],
    };
    const int64_t *experts = (const int64_t *)(intptr_t)numbers[7];
    GroupedKernel kernel = kernel_of(numbers[10] ? &plain : path, weight);
    int many = 1, enough;
    Run one = {.tiles = tiles, .row = 0, .count = job.count}, *runs = &one;
    Quantised rows;
    if (experts != NULL) {
        runs = malloc((job.count + 1) * sizeof(Run));
        if (runs == NULL) return PyErr_NoMemory();
        int64_t expert_bytes = parts_of(weight->outputs, TILE) * weight->tile_bytes;
        many = find_runs(tiles, expert_bytes, experts, (int64_t)numbers[8], job.count, runs);
        if (!many && job.count) {
            free(runs);
            PyErr_Format(PyExc_IndexError, "there are %lld experts, and a row is for another", numbers[8]);
            return NULL;
        }
    }
    Py_BEGIN_ALLOW_THREADS
    enough = take(path, kernel, &job, &rows);
    if (enough) run_tiles(kernel, &job, &rows, runs, many);
    Py_END_ALLOW_THREADS
    free(rows.high);
    if (runs != &one) free(runs);
    if (!enough) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

typedef struct {
    const Grouped *weight;
    const uint8_t *tiles;
    const int64_t *indices;
    int64_t many;
    float *floats;
} Dequantised;

static void dequantise_some(const void *given, int64_t part) {
    const Dequantised *job = given;
    const Grouped *weight = job->weight;
    const int64_t step = job->indices == NULL ? TILE : 1, first = part * step, left = job->many - first;
    const int64_t output = job->indices == NULL ? first : job->indices[part];
    const uint8_t *tile = job->tiles + output / TILE * weight->tile_bytes;
    path->dequantise(weight, tile, output % TILE, left < step ? left : step, job->floats + first * weight->inputs);
}

/* Takes (description, tiles, indices of outputs or 0 for all, their number, floats, threads). */
static PyObject *dequantised(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[6];
    if (!read_numbers(given, count, numbers, 6)) return NULL;
    const Grouped *weight = (const Grouped *)(intptr_t)numbers[0];
    const uint8_t *tiles = (const uint8_t *)(intptr_t)numbers[1];
    const int64_t *indices = (const int64_t *)(intptr_t)numbers[2];
    const int64_t many = (int64_t)numbers[3];
    Dequantised job = {weight, tiles, indices, many, (float *)(intptr_t)numbers[4]};
    for (int64_t i = 0; indices != NULL && i < many; i++)
        if (indices[i] < 0 || indices[i] >= weight->outputs) {
            PyErr_Format(PyExc_IndexError, "there are %lld outputs, and %lld is asked for", (long long)weight->outputs,
                         (long long)indices[i]);
            return NULL;
        }
    Py_BEGIN_ALLOW_THREADS
    run_parts(dequantise_some, &job, indices == NULL ? parts_of(many, TILE) : many, (int64_t)numbers[5]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Takes (description, tiles, number of outputs, numbers, whether they are bfloat16, threads). */
static PyObject *converted(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[6];
    if (!read_numbers(given, count, numbers, 6)) return NULL;
    const Grouped *weight = (const Grouped *)(intptr_t)numbers[0];
    if (numbers[4] && (path->bfloats == NULL || weight->code == ANY)) {
        PyErr_SetString(PyExc_NotImplementedError, "these weights cannot be made bfloat16 on this CPU");
        return NULL;
    }
    Conversion job = {
        .path = path,
        .weight = weight,
        .tiles = (const uint8_t *)(intptr_t)numbers[1],
        .outputs = (int64_t)numbers[2],
        .bfloats = (int)numbers[4],
        .to = (void *)(intptr_t)numbers[3],
    };
    Py_BEGIN_ALLOW_THREADS
    convert_tiles(&job, (int)numbers[5]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *multiply_floats(PyObject *const *given, Py_ssize_t count, enum kind kind) {
    Job job;
    if (!read_job(given, count, &job)) return NULL;
    if (path->floats[kind] == NULL) {
        PyErr_Format(PyExc_NotImplementedError, "there are no kernels for floats among those for %s", path->name);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    run(path->floats[kind], &job, NULL, job.outputs, BLOCK);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Rows of weights that a list names, gathered into blocks. The result of a row is that of the product with all weights if
its place there is in a whole block. */
typedef struct {
    const Job *job;
    Kernel kernel;
    const int64_t *indices;
    int64_t pitch; /* bytes of a row */
    char *blocks;  /* room for a block, by part */
    int64_t parts;
} Listed;

static void multiply_some_listed(const void *given, int64_t part) {
    const Listed *all = given;
    const int64_t count = all->job->outputs, share = parts_of(parts_of(count, BLOCK), all->parts) * BLOCK;
    const int64_t stop = (part + 1) * share < count ? (part + 1) * share : count, lines = parts_of(all->pitch, VECTOR);
    const char *weights = all->job->weights;
    char *block = all->blocks + part * BLOCK * all->pitch;
    float products[BLOCK];
    for (int64_t i = part * share; i < stop; i += BLOCK) {
        const int64_t many = stop - i < BLOCK ? stop - i : BLOCK;
        for (int64_t o = 0; o < BLOCK; o++) {
            if (i + o + 2 * BLOCK < stop) fetch(weights + all->indices[i + o + 2 * BLOCK] * all->pitch, lines, VECTOR);
            memcpy(block + o * all->pitch, weights + all->indices[i + (o < many ? o : 0)] * all->pitch, all->pitch);
        }
        Job some = {block, all->job->rows, products, 1, all->job->inputs, BLOCK, 1};
        all->kernel(&some, NULL, 0, BLOCK);
        memcpy(all->job->products + i, products, many * sizeof(float));
    }
}

/* Takes (weights, row, products, an `enum kind`, inputs, number of indices, threads, indices of outputs, number
of outputs). */
static PyObject *listed(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[9];
    if (!read_numbers(given, count, numbers, 9)) return NULL;
    Job job;
    if (!read_job(given, 7, &job)) return NULL;
    const enum kind kind = (enum kind)numbers[3];
    const int64_t parts = job.threads < 1 ? 1 : job.threads, pitch = job.inputs * (kind == FLOAT32 ? 4 : 2);
    if (path->floats[kind] == NULL) {
        PyErr_Format(PyExc_NotImplementedError, "there are no kernels for floats among those for %s", path->name);
        return NULL;
    }
    const int64_t *indices = (const int64_t *)(intptr_t)numbers[7];
    for (int64_t i = 0; i < job.outputs; i++)
        if (indices[i] < 0 || indices[i] >= numbers[8]) {
            PyErr_Format(PyExc_IndexError, "there are %lld outputs, and %lld is asked for", numbers[8], (long long)indices[i]);
            return NULL;
        }
    char *blocks = malloc(parts * BLOCK * pitch + 1);
    if (blocks == NULL) return PyErr_NoMemory();
    Listed all = {&job, path->floats[kind], indices, pitch, blocks, parts};
    Py_BEGIN_ALLOW_THREADS
    run_parts(multiply_some_listed, &all, parts, parts);
    Py_END_ALLOW_THREADS
    free(blocks);
    Py_RETURN_NONE;
}

static PyObject *float32(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_floats(given, count, FLOAT32);
}

static PyObject *bfloat16(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_floats(given, count, BFLOAT16);
}

static PyObject *float16(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_floats(given, count, FLOAT16);
}

/* Takes (blocks, their number, hidden, positions, stores, indices, cosines, sines, half of the rotated numbers of a head,
the order of pairs, bytes of a number that blocks compute with, threads, bits of a stored number of keys and of values, or 0
for the blocks' type). */
static PyObject *step(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[14];
    if (!read_numbers(given, count, numbers, 14)) return NULL;
#ifdef HAVE_VNNI
    if (has_vnni()) {
        Step step = {
            .hidden = (float *)(intptr_t)numbers[2],
            .count = (int64_t)numbers[3],
            .indices = (const int64_t *)(intptr_t)numbers[5],
            .cosines = (const float *)(intptr_t)numbers[6],
            .sines = (const float *)(intptr_t)numbers[7],
            .half = (int64_t)numbers[8],
            .order = (int)numbers[9],
            .stores_floats = numbers[10] == 4,
            .threads = (int)numbers[11],
            .keys_as = stored_by(numbers[12], numbers[10] == 4),
            .values_as = stored_by(numbers[13], numbers[10] == 4),
        };
        int enough;
        Py_BEGIN_ALLOW_THREADS
        enough = run_blocks((const Block *)(intptr_t)numbers[0], (int64_t)numbers[1], (const Store *)(intptr_t)numbers[4], &step);
        Py_END_ALLOW_THREADS
        if (!enough) return PyErr_NoMemory();
        Py_RETURN_NONE;
    }
#endif
    PyErr_SetString(PyExc_NotImplementedError, "there are no compiled steps for this CPU");
    return NULL;
}

/* The names of all paths, best first, and whether this CPU has the instructions of each. */
static PyObject *list_paths(PyObject *self, PyObject *unused) {
    PyObject *found = PyList_New(PATHS);
    for (int i = 0; found != NULL && i < PATHS; i++) {
        PyObject *one = Py_BuildValue("(sO)", paths[i]->name, paths[i]->is_here() ? Py_True : Py_False);
        if (one == NULL) Py_CLEAR(found);
        else PyList_SetItem(found, i, one);
    }
    return found;
}

static PyObject *use(PyObject *self, PyObject *name) {
    const char *wished = PyUnicode_AsUTF8AndSize(name, NULL);
    if (wished == NULL) return NULL;
    for (int i = 0; i < PATHS; i++)
        if (strcmp(paths[i]->name, wished) == 0 && paths[i]->is_here()) {
            path = paths[i];
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "this CPU has no kernels named %R", name);
}

static PyObject *in_use(PyObject *self, PyObject *unused) { return PyUnicode_FromString(path->name); }

/* Takes an `enum hint` and the bytes ahead. */
static PyObject *prefetch(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[2];
    if (!read_numbers(given, count, numbers, 2)) return NULL;
    hint = (int)numbers[0], ahead = (int64_t)numbers[1];
    Py_RETURN_NONE;
}

static PyObject *has_steps(PyObject *self, PyObject *unused) { return PyBool_FromLong(is_avx512(path)); }

static PyObject *has_bfloat16(PyObject *self, PyObject *unused) { return PyBool_FromLong(path->bfloats != NULL); }

/* Takes the addresses of the three functions of a `Pool`, or three zeros for one thread. */
static PyObject *use_threads(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[3];
    if (!read_numbers(given, count, numbers, 3)) return NULL;
    pool.run = (void (*)(void (*)(void *), void *, unsigned, unsigned))(intptr_t)numbers[0];
    pool.number = (int (*)(void))(intptr_t)numbers[1];
    pool.count = (int (*)(void))(intptr_t)numbers[2];
    Py_RETURN_NONE;
}

static PyObject *has_threads(PyObject *self, PyObject *unused) { return PyBool_FromLong(pool.run != NULL); }

static PyMethodDef methods[] = {
    {"grouped", (PyCFunction)(void (*)(void))grouped, METH_FASTCALL, "Rows times weights in the codes of a checkpoint."},
    {"dequantised", (PyCFunction)(void (*)(void))dequantised, METH_FASTCALL, "Such weights as floats."},
    {"converted", (PyCFunction)(void (*)(void))converted, METH_FASTCALL, "All of such weights, as floats or bfloat16."},
    {"float32", (PyCFunction)(void (*)(void))float32, METH_FASTCALL, "Rows times float32 weights."},
    {"bfloat16", (PyCFunction)(void (*)(void))bfloat16, METH_FASTCALL, "Rows times bfloat16 weights."},
    {"float16", (PyCFunction)(void (*)(void))float16, METH_FASTCALL, "Rows times float16 weights."},
    {"listed", (PyCFunction)(void (*)(void))listed, METH_FASTCALL, "A row times some outputs of weights of floats."},
    {"run_steps", (PyCFunction)(void (*)(void))step, METH_FASTCALL, "Runs new positions through blocks."},
    {"paths", list_paths, METH_NOARGS, "Names of all paths, best first, and whether this CPU has the instructions of each path."},
    {"use", use, METH_O, "Chooses the path of this name."},
    {"in_use", in_use, METH_NOARGS, "The name of the path that is used."},
    {"prefetch", (PyCFunction)(void (*)(void))prefetch, METH_FASTCALL, "Chooses how weights are prefetched."},
    {"use_threads", (PyCFunction)(void (*)(void))use_threads, METH_FASTCALL, "Chooses the functions that run threads."},
    {"has_threads", has_threads, METH_NOARGS, "Whether there may be more than one thread."},
    {"has_steps", has_steps, METH_NOARGS, "Whether there are compiled steps for the path in use."},
    {"has_bfloat16", has_bfloat16, METH_NOARGS, "Whether the path in use multiplies bfloat16, for which E4M3 is stored in another order."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_kernels", "Products of a few rows with held weights.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void) {
    make_tables();
    int best = 0;
    while (!paths[best]->is_here()) best++;
    path = paths[best];
    return PyModule_Create(&module);
}
