/* Builder: encodes records into one batch as they come, straight into the bytearray that `build` returns. */

#include "codec.h"
#include <string.h>

#define FIRST_BYTES 4096
#define BATCH_BYTES_CEILING (1 << 30) /* batch_length is 32 bits wide */

typedef struct {
    PyObject_HEAD
    PyObject *data; /* bytearray: its length is the room, `used` what is filled; NULL once built */
    Py_ssize_t used, bytes_max;
    int64_t base_timestamp, max_timestamp;
    int32_t count;
    char busy; /* a record is being measured: its buffers are exported, and foreign code may run */
} Builder;

typedef struct {
    const uint8_t *data;
    Py_ssize_t size; /* -1: null */
    Py_buffer view;  /* view.obj is NULL for bytes and None, which need no export */
} Field;

static inline uint64_t zigzag(int64_t v) { return ((uint64_t)v << 1) ^ (uint64_t)(v >> 63); }

static inline Py_ssize_t varint_size(uint64_t v) {
    Py_ssize_t size = 1;
    while (v >= 0x80) { v >>= 7; size++; }
    return size;
}

static inline uint8_t *put_varint(uint8_t *at, int64_t value) {
    uint64_t v = zigzag(value);
    while (v >= 0x80) { *at++ = (uint8_t)(v | 0x80); v >>= 7; }
    *at++ = (uint8_t)v;
    return at;
}

static inline uint8_t *put_field(uint8_t *at, const uint8_t *data, Py_ssize_t size) {
    at = put_varint(at, size);
    if (size > 0) { memcpy(at, data, (size_t)size); at += size; }
    return at;
}

static inline Py_ssize_t field_size(Py_ssize_t size) { return varint_size(zigzag(size)) + (size > 0 ? size : 0); }

static int open_field(PyObject *object, Field *field) {
    field->view.obj = NULL;
    if (PyBytes_CheckExact(object)) {
        field->data = (const uint8_t *)PyBytes_AS_STRING(object);
        field->size = PyBytes_GET_SIZE(object);
    } else if (object == Py_None) {
        field->data = NULL;
        field->size = -1;
    } else {
        if (PyObject_GetBuffer(object, &field->view, PyBUF_SIMPLE) < 0) return -1;
        field->data = field->view.buf;
        field->size = field->view.len;
    }
    if (field->size > BATCH_BYTES_CEILING) {
        PyErr_SetString(PyExc_OverflowError, "a key or value over 1 GiB does not fit a batch");
        if (field->view.obj) PyBuffer_Release(&field->view);
        return -1;
    }
    return 0;
}

static inline void close_field(Field *field) { if (field->view.obj) PyBuffer_Release(&field->view); }

/* Room for `more` bytes. The bytearray is ours alone until `build`. */
static int reserve(Builder *self, Py_ssize_t more) {
    Py_ssize_t room = PyByteArray_GET_SIZE(self->data), needed = self->used + more;
    if (needed <= room) return 0;
    Py_ssize_t wanted = room * 2;
    if (wanted > self->bytes_max) wanted = self->bytes_max;
    if (wanted < needed) wanted = needed;
    return PyByteArray_Resize(self->data, wanted);
}

/* One (name, value) pair of headers. Borrowed references, good while the list is not changed. */
static int header_pair(PyObject *pair, const char **name, Py_ssize_t *name_size, PyObject **value) {
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
        PyErr_SetString(PyExc_TypeError, "a header is a tuple (name, value)");
        return -1;
    }
    if (!PyUnicode_Check(PyTuple_GET_ITEM(pair, 0))) {
        PyErr_SetString(PyExc_TypeError, "the name of a header is str");
        return -1;
    }
    *name = PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(pair, 0), name_size);
    *value = PyTuple_GET_ITEM(pair, 1);
    if (*value != Py_None && !PyBytes_Check(*value)) {
        PyErr_SetString(PyExc_TypeError, "the value of a header is bytes or None");
        return -1;
    }
    return *name == NULL ? -1 : 0;
}

static Py_ssize_t headers_size(PyObject *headers) {
    Py_ssize_t count = PyList_GET_SIZE(headers), size = varint_size(zigzag(count));
    for (Py_ssize_t i = 0; i < count; i++) {
        const char *name;
        Py_ssize_t name_size;
        PyObject *value;
        if (header_pair(PyList_GET_ITEM(headers, i), &name, &name_size, &value) < 0) return -1;
        Py_ssize_t value_size = value == Py_None ? -1 : PyBytes_GET_SIZE(value);
        if (name_size > BATCH_BYTES_CEILING || value_size > BATCH_BYTES_CEILING || size > BATCH_BYTES_CEILING) {
            PyErr_SetString(PyExc_OverflowError, "headers over 1 GiB do not fit a batch");
            return -1;
        }
        size += field_size(name_size) + field_size(value_size);
    }
    return size;
}

static uint8_t *put_headers(uint8_t *at, PyObject *headers) {
    Py_ssize_t count = PyList_GET_SIZE(headers);
    at = put_varint(at, count);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = PyList_GET_ITEM(headers, i), *value = PyTuple_GET_ITEM(pair, 1);
        Py_ssize_t name_size;
        const char *name = PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(pair, 0), &name_size); /* cached by headers_size */
        at = put_field(at, (const uint8_t *)name, name_size);
        at = value == Py_None ? put_varint(at, -1)
                              : put_field(at, (const uint8_t *)PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value));
    }
    return at;
}

/* 1: appended, 0: the batch is full, -1: an exception is set and nothing was appended. */
static int append_fields(Builder *self, int64_t timestamp, Field *key, Field *value, PyObject *headers) {
    int64_t base = self->count ? self->base_timestamp : timestamp;
    int64_t ts_delta = (int64_t)((uint64_t)timestamp - (uint64_t)base);
    Py_ssize_t headers_bytes = headers == NULL || PyList_GET_SIZE(headers) == 0 ? 1 : headers_size(headers);
    if (headers_bytes < 0) return -1;
    Py_ssize_t body = 1 + varint_size(zigzag(ts_delta)) + varint_size(zigzag(self->count)) + field_size(key->size) +
                      field_size(value->size) + headers_bytes;
    Py_ssize_t whole = body + varint_size(zigzag(body));
    if (self->count && self->used + whole >= self->bytes_max) return 0; /* full at it, as the other codec */
    if (self->used + whole > BATCH_BYTES_CEILING || self->count == INT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a batch holds at most 1 GiB");
        return -1;
    }
    if (reserve(self, whole) < 0) return -1;
    uint8_t *at = (uint8_t *)PyByteArray_AS_STRING(self->data) + self->used;
    at = put_varint(at, body);
    *at++ = 0; /* attributes */
    at = put_varint(at, ts_delta);
    at = put_varint(at, self->count);
    at = put_field(at, key->data, key->size);
    at = put_field(at, value->data, value->size);
    if (headers_bytes == 1) *at++ = 0; else at = put_headers(at, headers);
    self->used += whole;
    assert(at == (uint8_t *)PyByteArray_AS_STRING(self->data) + self->used);
    if (!self->count) self->base_timestamp = self->max_timestamp = timestamp;
    if (timestamp > self->max_timestamp) self->max_timestamp = timestamp;
    self->count++;
    return 1;
}

static int append_record(Builder *self, PyObject *timestamp, PyObject *key, PyObject *value, PyObject *headers) {
    Field k, v;
    if (self->data == NULL || self->busy) {
        PyErr_SetString(PyExc_ValueError, "the builder is spent");
        return -1;
    }
    if (!PyLong_Check(timestamp)) {
        PyErr_SetString(PyExc_TypeError, "timestamp is an int");
        return -1;
    }
    int64_t when = PyLong_AsLongLong(timestamp);
    if (when == -1 && PyErr_Occurred()) return -1;
    if (!PyList_CheckExact(headers)) {
        PyErr_SetString(PyExc_TypeError, "headers are a list");
        return -1;
    }
    self->busy = 1;
    int outcome = -1;
    if (open_field(key, &k) == 0) {
        if (open_field(value, &v) == 0) {
            outcome = append_fields(self, when, &k, &v, headers);
            close_field(&v);
        }
        close_field(&k);
    }
    self->busy = 0;
    return outcome;
}

static PyObject *Builder_append(Builder *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "append(timestamp_ms, key, value, headers)");
        return NULL;
    }
    int outcome = append_record(self, args[0], args[1], args[2], args[3]);
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

static PyObject *Builder_extend(Builder *self, PyObject *rows) {
    Py_ssize_t taken = 0;
    PyObject *fast = PySequence_Fast(rows, "records are a sequence of tuples");
    if (fast == NULL) return NULL;
    for (; taken < PySequence_Fast_GET_SIZE(fast); taken++) {
        PyObject *row = PySequence_Fast_GET_ITEM(fast, taken);
        if (!PyTuple_CheckExact(row) || PyTuple_GET_SIZE(row) != 4) {
            PyErr_SetString(PyExc_TypeError, "a record is a tuple (timestamp_ms, key, value, headers)");
            Py_DECREF(fast);
            return NULL;
        }
        Py_INCREF(row); /* a foreign buffer's export could change the list */
        int outcome = append_record(self, PyTuple_GET_ITEM(row, 0), PyTuple_GET_ITEM(row, 1), PyTuple_GET_ITEM(row, 2),
                                    PyTuple_GET_ITEM(row, 3));
        Py_DECREF(row);
        if (outcome < 0) { Py_DECREF(fast); return NULL; }
        if (outcome == 0) break;
    }
    Py_DECREF(fast);
    return PyLong_FromSsize_t(taken);
}

static PyObject *Builder_size(Builder *self, PyObject *unused) {
    (void)unused;
    return PyLong_FromSsize_t(self->used);
}

static PyObject *Builder_build(Builder *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "build(producer_id, producer_epoch, base_sequence)");
        return NULL;
    }
    long long producer_id = PyLong_AsLongLong(args[0]);
    if (producer_id == -1 && PyErr_Occurred()) return NULL;
    long producer_epoch = PyLong_AsLong(args[1]);
    if (producer_epoch == -1 && PyErr_Occurred()) return NULL;
    long base_sequence = PyLong_AsLong(args[2]);
    if (base_sequence == -1 && PyErr_Occurred()) return NULL;
    if (producer_epoch < INT16_MIN || producer_epoch > INT16_MAX || base_sequence < INT32_MIN || base_sequence > INT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "producer_epoch or base_sequence is out of range");
        return NULL;
    }
    if (self->data == NULL || self->busy) {
        PyErr_SetString(PyExc_ValueError, "the builder is spent");
        return NULL;
    }
    if (PyByteArray_Resize(self->data, self->used) < 0) return NULL;
    uint8_t *at = (uint8_t *)PyByteArray_AS_STRING(self->data);
    put_u64(at, 0);                                /* base offset */
    put_u32(at + 8, (uint32_t)(self->used - 12));  /* batch length */
    put_u32(at + 12, (uint32_t)-1);                /* epoch */
    at[16] = 2;                                    /* magic */
    put_u16(at + 21, 0);                           /* attributes */
    put_u32(at + 23, (uint32_t)(self->count - 1)); /* last offset delta */
    put_u64(at + 27, (uint64_t)self->base_timestamp);
    put_u64(at + 35, (uint64_t)self->max_timestamp);
    put_u64(at + 43, (uint64_t)producer_id);
    put_u16(at + 51, (uint16_t)producer_epoch);
    put_u32(at + 53, (uint32_t)base_sequence);
    put_u32(at + 57, (uint32_t)self->count);
    put_u32(at + 17, crc32c(0, at + CRC_FROM, (size_t)(self->used - CRC_FROM)));
    PyObject *data = self->data;
    self->data = NULL;
    return data;
}

static int Builder_init(Builder *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"bytes_max", NULL};
    Py_ssize_t bytes_max;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n", names, &bytes_max)) return -1;
    if (self->data != NULL || self->count) {
        PyErr_SetString(PyExc_ValueError, "the builder is in use");
        return -1;
    }
    self->bytes_max = bytes_max < BATCH_BYTES_CEILING ? bytes_max : BATCH_BYTES_CEILING;
    self->used = HEADER_BYTES;
    self->data = PyByteArray_FromStringAndSize(NULL, FIRST_BYTES);
    return self->data == NULL ? -1 : 0;
}

static void Builder_dealloc(Builder *self) {
    Py_CLEAR(self->data);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef builder_methods[] = {
    {"append", (PyCFunction)(void (*)(void))Builder_append, METH_FASTCALL, "Add one record; False: the batch is full."},
    {"extend", (PyCFunction)Builder_extend, METH_O, "Add records until the batch is full; how many were added."},
    {"size", (PyCFunction)Builder_size, METH_NOARGS, "Bytes of the batch so far."},
    {"build", (PyCFunction)(void (*)(void))Builder_build, METH_FASTCALL, "The encoded batch. The builder is spent."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef builder_members[] = {
    {"count", T_INT, offsetof(Builder, count), READONLY, "Records so far."},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject Builder_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ferryline.protocol._codec_compiled.Builder",
    .tp_basicsize = sizeof(Builder),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = PyType_GenericNew, /* until __init__ it counts as spent */
    .tp_init = (initproc)Builder_init,
    .tp_dealloc = (destructor)Builder_dealloc,
    .tp_methods = builder_methods,
    .tp_members = builder_members,
    .tp_doc = "Encodes records into one batch as they come.",
};
