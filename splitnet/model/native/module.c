/* What Python calls: addresses and sizes, which splitnet/model/kernels.py and splitnet/model/compiled_step.py vouch for. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "converted.h"
#include "grouped.h"
#include "products.h"
#include "step.h"

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

/* Takes (weights, scales, rows, products, count, inputs, outputs, threads), the first four as addresses. */
static int read_job(PyObject *const *given, Py_ssize_t count, Job *job) {
    long long numbers[8];
    if (!read_numbers(given, count, numbers, 8)) return 0;
    *job = (Job){
        .weights = (const void *)(intptr_t)numbers[0],
        .scales = (const uint16_t *)(intptr_t)numbers[1],
        .rows = (const float *)(intptr_t)numbers[2],
        .products = (float *)(intptr_t)numbers[3],
        .count = (long)numbers[4],
        .inputs = (long)numbers[5],
        .outputs = (long)numbers[6],
        .threads = (int)numbers[7],
    };
    return 1;
}

static void quantise(const Job *job, const Quantised *rows, int fast) {
#ifdef HAVE_VNNI
    if (fast) {
        quantise_vnni(job, rows);
        return;
    }
#endif
    (void)fast;
    quantise_plainly(job, rows);
}

static PyObject *multiply_int8(PyObject *const *given, Py_ssize_t count, Kernel vnni) {
    Job job;
    Quantised rows;
    if (!read_job(given, count, &job)) return NULL;
    if (!prepare(&job, &rows)) return PyErr_NoMemory();
    int fast = vnni != NULL && has_vnni();
    Py_BEGIN_ALLOW_THREADS
    quantise(&job, &rows, fast);
    run(fast ? vnni : int8_plainly, &job, &rows, job.outputs, 4);
    Py_END_ALLOW_THREADS
    free(rows.high);
    Py_RETURN_NONE;
}
#ifndef HAVE_VNNI
#define int8_vnni NULL
#define float32_vnni NULL
#define bfloat16_vnni NULL
#define float16_vnni NULL
#endif

static PyObject *int8(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_int8(given, count, int8_vnni);
}

static PyObject *int8_of_any_cpu(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_int8(given, count, NULL);
}

/* Takes (description, tiles, rows, products, count, numbers from row to row, from product to product, experts or 0, how
many experts there are, threads, whether by plain loops). */
static PyObject *grouped(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[11];
    if (!read_numbers(given, count, numbers, 11)) return NULL;
    const Grouped *weight = (const Grouped *)(intptr_t)numbers[0];
    const uint8_t *tiles = (const uint8_t *)(intptr_t)numbers[1];
    GroupedJob job = {
        .weight = weight,
        .rows = (const float *)(intptr_t)numbers[2],
        .products = (float *)(intptr_t)numbers[3],
        .count = (long)numbers[4],
        .stride = (long)numbers[5],
        .pitch = (long)numbers[6],
        .threads = (int)numbers[9],
    };
    const int64_t *experts = (const int64_t *)(intptr_t)numbers[7];
    int plainly = (int)numbers[10] || !has_vnni() || weight->code == ANY, many = 1;
    Run one = {.tiles = tiles, .row = 0, .count = job.count}, *runs = &one;
    Quantised rows = {.high = NULL};
    if (experts != NULL) {
        runs = malloc((job.count + 1) * sizeof(Run));
        if (runs == NULL) return PyErr_NoMemory();
        int64_t expert_bytes = parts_of(weight->outputs, TILE) * weight->tile_bytes;
        many = find_runs(tiles, expert_bytes, experts, (long)numbers[8], job.count, runs);
        if (!many && job.count) {
            free(runs);
            PyErr_Format(PyExc_IndexError, "there are %lld experts, and a row is for another", numbers[8]);
            return NULL;
        }
    }
#ifdef HAVE_VNNI
    if (!plainly && taken_by(weight) != AS_FLOATS) {
        Job room = {.count = job.count, .inputs = 2 * job.stride};
        if (!prepare(&room, &rows)) {
            if (runs != &one) free(runs);
            return PyErr_NoMemory();
        }
        Py_BEGIN_ALLOW_THREADS
        take_rows(taken_by(weight), job.rows, job.count, job.stride, &rows);
        Py_END_ALLOW_THREADS
    }
#endif
    Py_BEGIN_ALLOW_THREADS
    run_grouped(&job, &rows, runs, many, plainly);
    Py_END_ALLOW_THREADS
    free(rows.high);
    if (runs != &one) free(runs);
    Py_RETURN_NONE;
}

/* Takes (description, tiles, indices of outputs or 0: all, how many, floats, threads). */
static PyObject *dequantised(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[6];
    if (!read_numbers(given, count, numbers, 6)) return NULL;
    const Grouped *weight = (const Grouped *)(intptr_t)numbers[0];
    const uint8_t *tiles = (const uint8_t *)(intptr_t)numbers[1];
    const int64_t *indices = (const int64_t *)(intptr_t)numbers[2];
    long many = (long)numbers[3], step = indices == NULL ? TILE : 1;
    float *floats = (float *)(intptr_t)numbers[4];
    int threads = numbers[5] < 1 ? 1 : (int)numbers[5];
    for (long i = 0; indices != NULL && i < many; i++)
        if (indices[i] < 0 || indices[i] >= weight->outputs) {
            PyErr_Format(PyExc_IndexError, "there are %lld outputs, and %lld is asked for", (long long)weight->outputs,
                         (long long)indices[i]);
            return NULL;
        }
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long i = 0; i < many; i += step) {
        long output = indices == NULL ? i : indices[i], left = many - i;
        const uint8_t *tile = tiles + output / TILE * weight->tile_bytes;
        dequantise(weight, tile, output % TILE, left < step ? left : step, floats + i * weight->inputs);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Takes (description, tiles, how many outputs, numbers, whether they are bfloat16, threads). */
static PyObject *converted(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[6];
    if (!read_numbers(given, count, numbers, 6)) return NULL;
    const Grouped *weight = (const Grouped *)(intptr_t)numbers[0];
    if (numbers[4] && (!has_bfloats() || weight->code == ANY)) {
        PyErr_SetString(PyExc_NotImplementedError, "these weights cannot be made bfloat16 on this CPU");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    convert_tiles(weight, (const uint8_t *)(intptr_t)numbers[1], (long)numbers[2], (int)numbers[4],
                  (void *)(intptr_t)numbers[3], numbers[5] < 1 ? 1 : (int)numbers[5]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *multiply_floats(PyObject *const *given, Py_ssize_t count, Kernel vnni) {
    Job job;
    if (!read_job(given, count, &job)) return NULL;
    if (vnni == NULL || !has_vnni()) {
        PyErr_SetString(PyExc_NotImplementedError, "there are no kernels for floats for this CPU");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    run(vnni, &job, NULL, job.outputs, 4);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *float32(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_floats(given, count, float32_vnni);
}

static PyObject *bfloat16(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_floats(given, count, bfloat16_vnni);
}

static PyObject *float16(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_floats(given, count, float16_vnni);
}

/* Takes (blocks, how many, hidden, positions, stores, indices, cosines, sines, numbers of a head that they turn, whether
those stand side by side that are turned together, bytes of a stored number, threads). */
static PyObject *step(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[12];
    if (!read_numbers(given, count, numbers, 12)) return NULL;
#ifdef HAVE_VNNI
    if (has_vnni()) {
        Step step = {
            .hidden = (float *)(intptr_t)numbers[2],
            .count = (long)numbers[3],
            .indices = (const int64_t *)(intptr_t)numbers[5],
            .cosines = (const float *)(intptr_t)numbers[6],
            .sines = (const float *)(intptr_t)numbers[7],
            .turned = (long)numbers[8],
            .adjacent = (int)numbers[9],
            .stores_floats = numbers[10] == 4,
            .threads = (int)numbers[11],
        };
        int enough;
        Py_BEGIN_ALLOW_THREADS
        enough = run_blocks((const Block *)(intptr_t)numbers[0], (long)numbers[1], (const Store *)(intptr_t)numbers[4], &step);
        Py_END_ALLOW_THREADS
        if (!enough) return PyErr_NoMemory();
        Py_RETURN_NONE;
    }
#endif
    PyErr_SetString(PyExc_NotImplementedError, "there are no compiled steps for this CPU");
    return NULL;
}

static PyObject *is_fast(PyObject *self, PyObject *unused) { return PyBool_FromLong(has_vnni()); }

static PyObject *has_bfloat16(PyObject *self, PyObject *unused) { return PyBool_FromLong(has_bfloats()); }

static PyMethodDef methods[] = {
    {"int8", (PyCFunction)(void (*)(void))int8, METH_FASTCALL, "Rows times int8 weights."},
    {"grouped", (PyCFunction)(void (*)(void))grouped, METH_FASTCALL, "Rows times weights in the codes of a checkpoint."},
    {"dequantised", (PyCFunction)(void (*)(void))dequantised, METH_FASTCALL, "Such weights as floats."},
    {"converted", (PyCFunction)(void (*)(void))converted, METH_FASTCALL, "All of such weights, as floats or bfloat16."},
    {"float32", (PyCFunction)(void (*)(void))float32, METH_FASTCALL, "Rows times float32 weights."},
    {"bfloat16", (PyCFunction)(void (*)(void))bfloat16, METH_FASTCALL, "Rows times bfloat16 weights."},
    {"float16", (PyCFunction)(void (*)(void))float16, METH_FASTCALL, "Rows times float16 weights."},
    {"int8_of_any_cpu", (PyCFunction)(void (*)(void))int8_of_any_cpu, METH_FASTCALL, "The same by plain loops."},
    {"step", (PyCFunction)(void (*)(void))step, METH_FASTCALL, "New positions through blocks."},
    {"is_fast", is_fast, METH_NOARGS, "Whether this CPU has the instructions that the kernels are written for."},
    {"has_bfloat16", has_bfloat16, METH_NOARGS, "Whether it multiplies bfloat16, for which E4M3 lies in another order."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_kernels", "Products of a few rows with held weights.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void) {
    make_tables();
    return PyModule_Create(&module);
}
