/* Decoding: a whole batch into records, or straight into the consumer's messages, in one pass.
 *
 * Record and MessageBase share their layout and differ in the names of their attributes. Neither takes part in garbage
 * collection: they refer to bytes, headers, the shared source and the parsed value, none of which refers back. */

#include "codec.h"
#include <stddef.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    PyObject *key, *value; /* bytes or None */
    PyObject *headers;     /* list of (str, bytes or None); NULL: none */
    PyObject *source;      /* messages: what they share; NULL in records */
    PyObject *parsed;      /* messages: the value as the application sees it; NULL until it asks */
    long long offset, timestamp;
} Record;

typedef struct {
    const uint8_t *at, *end;
    const char *wrong; /* what is not as it should be; NULL: nothing so far */
} Cursor;

/* A zigzag varint of at most 64 bits. */
static inline int64_t get_varint_slow(Cursor *in) {
    uint64_t value = 0;
    for (int shift = 0; shift <= 63; shift += 7) {
        if (in->at >= in->end) { in->wrong = "a number is cut off"; return 0; }
        uint8_t byte = *in->at++;
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) return (int64_t)(value >> 1) ^ -(int64_t)(value & 1);
    }
    in->wrong = "a number has more than 64 bits";
    return 0;
}

static inline int64_t get_varint(Cursor *in) {
    if (in->at < in->end && *in->at < 0x80) {
        uint8_t byte = *in->at++;
        return (int64_t)(byte >> 1) ^ -(int64_t)(byte & 1);
    }
    return get_varint_slow(in);
}

/* Bytes behind their length; None for a negative one. NULL: `wrong` or an exception is set. */
static inline PyObject *get_bytes(Cursor *in) {
    int64_t size = get_varint(in);
    if (in->wrong) return NULL;
    if (size < 0) { Py_INCREF(Py_None); return Py_None; }
    if (size > in->end - in->at) { in->wrong = "a field is longer than its batch"; return NULL; }
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)in->at, (Py_ssize_t)size);
    in->at += size;
    return bytes;
}

static PyObject *get_headers(Cursor *in, int64_t count) {
    PyObject *headers = PyList_New(0);
    if (headers == NULL) return NULL;
    while (count--) {
        int64_t size = get_varint(in);
        if (!in->wrong && (size < 0 || size > in->end - in->at)) in->wrong = "the name of a header does not fit";
        if (in->wrong) break;
        PyObject *name = PyUnicode_DecodeUTF8((const char *)in->at, (Py_ssize_t)size, NULL);
        if (name == NULL) {
            if (PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) {
                PyErr_Clear();
                in->wrong = "the name of a header is no UTF-8";
            }
            break;
        }
        in->at += size;
        PyObject *value = get_bytes(in);
        PyObject *pair = value == NULL ? NULL : PyTuple_Pack(2, name, value);
        int failed = pair == NULL || PyList_Append(headers, pair) < 0;
        Py_DECREF(name);
        Py_XDECREF(value);
        Py_XDECREF(pair);
        if (failed) break;
    }
    if (count >= 0) { Py_DECREF(headers); return NULL; }
    return headers;
}

/* The next record, which must have this offset. NULL: `wrong` or an exception is set. */
static Record *get_record(Cursor *in, PyTypeObject *type, long long base, long long delta, int64_t base_timestamp,
                          int64_t max_timestamp, int is_max) {
    int64_t length = get_varint(in);
    if (in->wrong) return NULL;
    const uint8_t *start = in->at;
    if (length < RECORD_BYTES_MIN - 1 || length > in->end - in->at) { in->wrong = "the length of a record"; return NULL; }
    get_varint(in); /* attributes: none are defined; the other codec takes this byte for a number */
    int64_t ts_delta = get_varint(in);
    int64_t offset_delta = get_varint(in);
    if (in->wrong) return NULL;
    if (offset_delta != delta) { in->wrong = "offsets do not follow each other"; return NULL; }
    Record *record = (Record *)type->tp_alloc(type, 0);
    if (record == NULL) return NULL;
    record->offset = base + delta;
    record->timestamp = is_max ? max_timestamp : (int64_t)((uint64_t)base_timestamp + (uint64_t)ts_delta);
    if ((record->key = get_bytes(in)) == NULL || (record->value = get_bytes(in)) == NULL) goto failed;
    int64_t headers = get_varint(in);
    if (in->wrong) goto failed;
    if (headers < 0) { in->wrong = "a negative number of headers"; goto failed; }
    if (headers > 0 && (record->headers = get_headers(in, headers)) == NULL) goto failed;
    if (in->at - start != length) { in->wrong = "a record is not as long as it says"; goto failed; }
    return record;
failed:
    Py_DECREF(record);
    return NULL;
}

/* All records of a batch that begins at data[0] and is not compressed. `size` bytes belong to it. */
static PyObject *get_batch(const uint8_t *data, Py_ssize_t size, PyTypeObject *type, PyObject *source, int plain) {
    if (size < HEADER_BYTES) {
        PyErr_SetString(PyExc_ValueError, "a batch has a header");
        return NULL;
    }
    Cursor in = {data + HEADER_BYTES, data + size, NULL};
    long long base = (long long)get_u64(data);
    int64_t base_timestamp = (int64_t)get_u64(data + 27), max_timestamp = (int64_t)get_u64(data + 35);
    int is_max = (get_u16(data + CRC_FROM) & TIMESTAMP_IS_MAX) != 0;
    int32_t count = (int32_t)get_u32(data + 57);
    if (count < 0 || count > (size - HEADER_BYTES) / RECORD_BYTES_MIN || base < 0 || base > INT64_MAX - count) {
        PyErr_SetString(PyExc_ValueError, "more records than fit");
        return NULL;
    }
    PyObject *records = PyList_New(count);
    if (records == NULL) return NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        Record *record = get_record(&in, type, base, i, base_timestamp, max_timestamp, is_max);
        if (record == NULL) {
            if (in.wrong) PyErr_Format(PyExc_ValueError, "record %zd: %s", i, in.wrong);
            Py_DECREF(records);
            return NULL;
        }
        if (source != NULL) {
            Py_INCREF(source);
            record->source = source;
            if (plain) {
                Py_INCREF(record->value);
                record->parsed = record->value;
            }
        }
        PyList_SET_ITEM(records, i, (PyObject *)record);
    }
    if (in.at != in.end) {
        PyErr_SetString(PyExc_ValueError, "bytes behind the last record");
        Py_DECREF(records);
        return NULL;
    }
    return records;
}

PyObject *decode_records(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Py_buffer view;
    if (count != 1) {
        PyErr_SetString(PyExc_TypeError, "decode_records(batch)");
        return NULL;
    }
    if (PyObject_GetBuffer(args[0], &view, PyBUF_SIMPLE) < 0) return NULL;
    PyObject *records = get_batch(view.buf, view.len, &Record_Type, NULL, 0);
    PyBuffer_Release(&view);
    return records;
}

static void Message_dealloc(Record *self);

PyObject *decode_messages(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Py_buffer view;
    if (count != 4 || !PyType_Check(args[1]) || !PyType_IsSubtype((PyTypeObject *)args[1], &MessageBase_Type)) {
        PyErr_SetString(PyExc_TypeError, "decode_messages(batch, a subclass of MessageBase, source, plain)");
        return NULL;
    }
    PyTypeObject *type = (PyTypeObject *)args[1];
    if (type->tp_dealloc != (destructor)Message_dealloc) {
        PyErr_SetString(PyExc_TypeError, "the subclass of MessageBase was not made with without_gc");
        return NULL;
    }
    int plain = PyObject_IsTrue(args[3]);
    if (plain < 0 || PyObject_GetBuffer(args[0], &view, PyBUF_SIMPLE) < 0) return NULL;
    PyObject *messages = get_batch(view.buf, view.len, type, args[2], plain);
    PyBuffer_Release(&view);
    return messages;
}

static void Record_dealloc(Record *self) {
    Py_XDECREF(self->key);
    Py_XDECREF(self->value);
    Py_XDECREF(self->headers);
    Py_XDECREF(self->source);
    Py_XDECREF(self->parsed);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Instances of the Python subclass hold a reference to it. */
static void Message_dealloc(Record *self) {
    PyTypeObject *type = Py_TYPE(self);
    Record_dealloc(self);
    Py_DECREF(type);
}

/* A class made in Python takes part in garbage collection whatever its base does: a million messages would each be
 * tracked and visited. What one refers to cannot refer back, so reference counts free them all. */
PyObject *without_gc(PyObject *module, PyObject *class) {
    (void)module;
    PyTypeObject *type = (PyTypeObject *)class;
    if (!PyType_Check(class) || type->tp_base != &MessageBase_Type || type->tp_basicsize != MessageBase_Type.tp_basicsize ||
        !(type->tp_flags & Py_TPFLAGS_HEAPTYPE)) {
        PyErr_SetString(PyExc_TypeError, "without_gc is for a class with base MessageBase and empty __slots__");
        return NULL;
    }
    type->tp_flags &= ~(Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE);
    type->tp_traverse = NULL;
    type->tp_clear = NULL;
    type->tp_free = PyObject_Free;
    type->tp_dealloc = (destructor)Message_dealloc;
    PyType_Modified(type);
    Py_INCREF(class);
    return class;
}

static PyObject *Record_headers(Record *self, void *unused) {
    (void)unused;
    if (self->headers == NULL) return PyList_New(0);
    Py_INCREF(self->headers);
    return self->headers;
}

static PyObject *Message_value(Record *self, void *unused) {
    (void)unused;
    if (self->parsed == NULL) {
        PyObject *parsed = PyObject_CallMethod((PyObject *)self, "_parse", NULL);
        if (parsed == NULL) return NULL;
        Py_XSETREF(self->parsed, parsed); /* the parser may have asked for the value, too */
    }
    Py_INCREF(self->parsed);
    return self->parsed;
}

static PyObject *Record_repr(Record *self) {
    return PyUnicode_FromFormat("Record(%lld key=%R value=%R)", self->offset, self->key, self->value);
}

static PyMemberDef record_members[] = {
    {"offset", T_LONGLONG, offsetof(Record, offset), READONLY, NULL},
    {"timestamp", T_LONGLONG, offsetof(Record, timestamp), READONLY, "ms since the Unix epoch"},
    {"key", T_OBJECT_EX, offsetof(Record, key), READONLY, NULL},
    {"value", T_OBJECT_EX, offsetof(Record, value), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};
static PyGetSetDef record_getters[] = {
    {"headers", (getter)Record_headers, NULL, "(name, value) pairs", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject Record_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ferryline.protocol._codec_compiled.Record",
    .tp_basicsize = sizeof(Record),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)Record_dealloc,
    .tp_members = record_members,
    .tp_getset = record_getters,
    .tp_repr = (reprfunc)Record_repr,
    .tp_doc = "One decoded record.",
};

static PyMemberDef message_members[] = {
    {"offset", T_LONGLONG, offsetof(Record, offset), READONLY, NULL},
    {"timestamp_ms", T_LONGLONG, offsetof(Record, timestamp), READONLY, "ms since the Unix epoch"},
    {"key", T_OBJECT_EX, offsetof(Record, key), READONLY, NULL},
    {"raw", T_OBJECT_EX, offsetof(Record, value), READONLY, "The value as it was sent."},
    {"_source", T_OBJECT_EX, offsetof(Record, source), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};
static PyGetSetDef message_getters[] = {
    {"value", (getter)Message_value, NULL, "The value as the consumer's type, parsed at the first access.", NULL},
    {"_pairs", (getter)Record_headers, NULL, "(name, value) pairs of the headers", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* Instances come from decode_messages only: every one has all its fields. */
static PyObject *Message_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args;
    (void)kwargs;
    PyErr_Format(PyExc_TypeError, "%s objects come from a consumer", type->tp_name);
    return NULL;
}

PyTypeObject MessageBase_Type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "ferryline.protocol._codec_compiled.MessageBase",
    .tp_basicsize = sizeof(Record),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = Message_new,
    .tp_dealloc = (destructor)Record_dealloc,
    .tp_members = message_members,
    .tp_getset = message_getters,
    .tp_doc = "What a message holds; subclasses say what it means.",
};
