/* ferryline.protocol._codec_compiled: see ferryline/protocol/_codec.pyi for what it offers. */

#include "codec.h"

static PyObject *module_crc32c_with(uint32_t (*sum)(uint32_t, const uint8_t *, size_t), PyObject *const *args,
                                    Py_ssize_t count) {
    Py_buffer view;
    unsigned long start = 0;
    if (count != 1 && count != 2) {
        PyErr_SetString(PyExc_TypeError, "crc32c(data, start=0)");
        return NULL;
    }
    if (count == 2) {
        start = PyLong_AsUnsignedLong(args[1]);
        if (start == (unsigned long)-1 && PyErr_Occurred()) return NULL;
    }
    if (PyObject_GetBuffer(args[0], &view, PyBUF_SIMPLE) < 0) return NULL;
    uint32_t crc = sum((uint32_t)start, view.buf, (size_t)view.len);
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(crc);
}

static PyObject *module_crc32c(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return module_crc32c_with(crc32c, args, count);
}

static PyObject *module_crc32c_table(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    return module_crc32c_with(crc32c_table, args, count);
}

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef methods[] = {
    {"crc32c", FAST(module_crc32c), "CRC32C of a buffer, going on from `start`."},
    {"crc32c_table", FAST(module_crc32c_table), "The same without the processor's help; for tests."},
    {"read_header", FAST(read_header), "read_header(data, at, type): the header at `at`, or None."},
    {"walk", FAST(walk), "walk(data, verify, type): positions and headers of all batches in `data`, or None."},
    {"decode_records", FAST(decode_records), "decode_records(batch): its records. Raises ValueError."},
    {"decode_messages", FAST(decode_messages), "decode_messages(batch, type, source, plain). Raises ValueError."},
    {"without_gc", without_gc, METH_O, "Class decorator: the messages of this class are freed by reference counts alone."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ferryline.protocol._codec_compiled",
    .m_doc = "Record batches, compiled.",
    .m_size = -1,
    .m_methods = methods,
};

static int add_type(PyObject *module, const char *name, PyTypeObject *type) {
    if (PyType_Ready(type) < 0) return -1;
    Py_INCREF(type);
    if (PyModule_AddObject(module, name, (PyObject *)type) < 0) {
        Py_DECREF(type);
        return -1;
    }
    return 0;
}

PyMODINIT_FUNC PyInit__codec_compiled(void) {
    crc32c_init();
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL) return NULL;
    if (add_type(module, "Builder", &Builder_Type) < 0 || add_type(module, "Record", &Record_Type) < 0 ||
        add_type(module, "MessageBase", &MessageBase_Type) < 0 ||
        PyModule_AddIntConstant(module, "CODEC_VERSION", CODEC_VERSION) < 0 ||
        PyModule_AddStringConstant(module, "CRC_KIND", crc32c_kind) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
