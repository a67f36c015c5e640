/* Headers of batches, without their records: what a broker does with each batch that it takes, hands on or reads.
 *
 * Nothing is raised for bad bytes: None means "look again, slowly", and the Python code then says what is wrong. So both
 * codecs refuse the same bytes with the same words. */

#include "codec.h"

#define RECORDS_MAX 1000000
#define CODECS 5 /* none, gzip, snappy, lz4, zstd */

/* 1 when the header at `at` is one that `read_header` of records.py would take. */
static int is_header(const uint8_t *at, Py_ssize_t left) {
    if (left < HEADER_BYTES || at[16] != 2) return 0;
    int32_t length = (int32_t)get_u32(at + 8), count = (int32_t)get_u32(at + 57), last = (int32_t)get_u32(at + 23);
    return length >= HEADER_BYTES - 12 && length <= INT32_MAX - 12 && count > 0 && count <= RECORDS_MAX &&
           last == count - 1 && (int64_t)get_u64(at) >= 0 && (get_u16(at + CRC_FROM) & 7) < CODECS;
}

static PyObject *make_header(PyObject *type, const uint8_t *at) {
    PyObject *fields[12];
    fields[0] = PyLong_FromLongLong((int64_t)get_u64(at));
    fields[1] = PyLong_FromLong((int32_t)get_u32(at + 8) + 12L);
    fields[2] = PyLong_FromLong((int32_t)get_u32(at + 12));
    fields[3] = PyLong_FromUnsignedLong(get_u32(at + 17));
    fields[4] = PyLong_FromLong((int16_t)get_u16(at + 21));
    fields[5] = PyLong_FromLong((int32_t)get_u32(at + 23));
    fields[6] = PyLong_FromLongLong((int64_t)get_u64(at + 27));
    fields[7] = PyLong_FromLongLong((int64_t)get_u64(at + 35));
    fields[8] = PyLong_FromLongLong((int64_t)get_u64(at + 43));
    fields[9] = PyLong_FromLong((int16_t)get_u16(at + 51));
    fields[10] = PyLong_FromLong((int32_t)get_u32(at + 53));
    fields[11] = PyLong_FromLong((int32_t)get_u32(at + 57));
    PyObject *header = NULL;
    int whole = 1;
    for (int i = 0; i < 12; i++) whole = whole && fields[i] != NULL;
    if (whole) header = PyObject_Vectorcall(type, fields, 12, NULL);
    for (int i = 0; i < 12; i++) Py_XDECREF(fields[i]);
    return header;
}

/* read_header(data, at, type): the header at `at`, or None. */
PyObject *read_header(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Py_buffer view;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "read_header(data, at, type)");
        return NULL;
    }
    Py_ssize_t at = PyLong_AsSsize_t(args[1]);
    if (at == -1 && PyErr_Occurred()) return NULL;
    if (PyObject_GetBuffer(args[0], &view, PyBUF_SIMPLE) < 0) return NULL;
    PyObject *header = Py_None;
    if (at >= 0 && at <= view.len && is_header((const uint8_t *)view.buf + at, view.len - at))
        header = make_header(args[2], (const uint8_t *)view.buf + at);
    else
        Py_INCREF(Py_None);
    PyBuffer_Release(&view);
    return header;
}

/* walk(data, verify, type): [(position, header)] of batches that lie back to back in all of `data`, or None. */
PyObject *walk(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Py_buffer view;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "walk(data, verify, type)");
        return NULL;
    }
    int verify = PyObject_IsTrue(args[1]);
    if (verify < 0 || PyObject_GetBuffer(args[0], &view, PyBUF_SIMPLE) < 0) return NULL;
    const uint8_t *data = view.buf;
    Py_ssize_t at = 0, end = view.len;
    PyObject *found = PyList_New(0);
    while (found != NULL && at < end) {
        Py_ssize_t size = end - at < HEADER_BYTES ? 0 : (Py_ssize_t)(int32_t)get_u32(data + at + 8) + 12;
        if (!is_header(data + at, end - at) || size > end - at ||
            (verify && crc32c(0, data + at + CRC_FROM, (size_t)(size - CRC_FROM)) != get_u32(data + at + 17))) {
            Py_DECREF(found);
            PyBuffer_Release(&view);
            Py_RETURN_NONE;
        }
        PyObject *header = make_header(args[2], data + at);
        PyObject *pair = header == NULL ? NULL : Py_BuildValue("(nN)", at, header);
        if (pair == NULL || PyList_Append(found, pair) < 0) Py_CLEAR(found);
        Py_XDECREF(pair);
        at += size;
    }
    PyBuffer_Release(&view);
    return found;
}
