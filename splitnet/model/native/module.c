/* What Python calls: addresses and sizes, which splitnet/model/kernels.py and splitnet/model/compiled_step.py vouch for. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "products.h"
#include "step.h"

/* Takes (weights, scales, rows, products, count, inputs, outputs, threads), the first four as addresses. */
static int read_job(PyObject *const *given, Py_ssize_t count, Job *job) {
    long long numbers[8];
    if (count != 8) {
        PyErr_SetString(PyExc_TypeError, "a kernel takes 8 numbers");
        return 0;
    }
    for (int i = 0; i < 8; i++) {
        numbers[i] = PyLong_AsLongLong(given[i]);
        if (numbers[i] == -1 && PyErr_Occurred()) return 0;
    }
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

static PyObject *multiply_integers(PyObject *const *given, Py_ssize_t count, Kernel plain, Kernel vnni, long tile) {
    Job job;
    Quantised rows;
    if (!read_job(given, count, &job)) return NULL;
    if (!prepare(&job, &rows)) return PyErr_NoMemory();
    int fast = vnni != NULL && has_vnni();
    Py_BEGIN_ALLOW_THREADS
#ifdef HAVE_VNNI
    if (fast) quantise_vnni(&job, &rows);
    else
#endif
        quantise_plainly(&job, &rows);
    run(fast ? vnni : plain, &job, &rows, job.outputs / tile, tile == 1 ? 4 : 1);
    Py_END_ALLOW_THREADS
    free(rows.high);
    Py_RETURN_NONE;
}

#ifndef HAVE_VNNI
#define int8_vnni NULL
#define int4_vnni NULL
#define float32_vnni NULL
#define bfloat16_vnni NULL
#define float16_vnni NULL
#endif

static PyObject *int8(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_integers(given, count, int8_plainly, int8_vnni, 1);
}

static PyObject *int4(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_integers(given, count, int4_plainly, int4_vnni, TILE);
}

static PyObject *int8_of_any_cpu(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_integers(given, count, int8_plainly, NULL, 1);
}

static PyObject *int4_of_any_cpu(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    return multiply_integers(given, count, int4_plainly, NULL, TILE);
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

/* Takes (blocks, how many, hidden, positions, stores, indices, cosines, sines, bytes of a stored number, threads). */
static PyObject *step(PyObject *self, PyObject *const *given, Py_ssize_t count) {
    long long numbers[10];
    if (count != 10) {
        PyErr_SetString(PyExc_TypeError, "a step takes 10 numbers");
        return NULL;
    }
    for (int i = 0; i < 10; i++) {
        numbers[i] = PyLong_AsLongLong(given[i]);
        if (numbers[i] == -1 && PyErr_Occurred()) return NULL;
    }
#ifdef HAVE_VNNI
    if (has_vnni()) {
        Step step = {
            .hidden = (float *)(intptr_t)numbers[2],
            .count = (long)numbers[3],
            .indices = (const int64_t *)(intptr_t)numbers[5],
            .cosines = (const float *)(intptr_t)numbers[6],
            .sines = (const float *)(intptr_t)numbers[7],
            .stores_floats = numbers[8] == 4,
            .threads = (int)numbers[9],
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

static PyMethodDef methods[] = {
    {"int8", (PyCFunction)(void (*)(void))int8, METH_FASTCALL, "Rows times int8 weights."},
    {"int4", (PyCFunction)(void (*)(void))int4, METH_FASTCALL, "Rows times int4 weights."},
    {"float32", (PyCFunction)(void (*)(void))float32, METH_FASTCALL, "Rows times float32 weights."},
    {"bfloat16", (PyCFunction)(void (*)(void))bfloat16, METH_FASTCALL, "Rows times bfloat16 weights."},
    {"float16", (PyCFunction)(void (*)(void))float16, METH_FASTCALL, "Rows times float16 weights."},
    {"int8_of_any_cpu", (PyCFunction)(void (*)(void))int8_of_any_cpu, METH_FASTCALL, "The same by plain loops."},
    {"int4_of_any_cpu", (PyCFunction)(void (*)(void))int4_of_any_cpu, METH_FASTCALL, "The same by plain loops."},
    {"step", (PyCFunction)(void (*)(void))step, METH_FASTCALL, "New positions through blocks."},
    {"is_fast", is_fast, METH_NOARGS, "Whether this CPU has the instructions that the kernels are written for."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_kernels", "Products of a few rows with held weights.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
