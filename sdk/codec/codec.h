/* The compiled codec of record batches: what the files of this folder share. The format is described in
 * ferryline/protocol/records.py; ferryline/protocol/_codec_python.py does the same without a compiler.
 *
 * Rules of this folder:
 *  - The interpreter lock is held throughout, so nobody changes a buffer under our eyes.
 *  - No byte is read before it was compared with the end of its buffer; lengths are compared by subtraction, never by
 *    adding to a pointer what an attacker chose.
 *  - Nothing is allocated by a count that the sender merely claims. */

#ifndef FERRYLINE_CODEC_H
#define FERRYLINE_CODEC_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <structmember.h>

/* Raise with every change of what the Python side may rely on; it takes a module of another version for absent. */
#define CODEC_VERSION 1

#define HEADER_BYTES 61
#define CRC_FROM 21
#define RECORD_BYTES_MIN 7 /* length, attributes, two deltas, two lengths, header count: one byte each */
#define TIMESTAMP_IS_MAX 0x08 /* attribute: every record has the batch's greatest timestamp */

static inline void put_u32(uint8_t *at, uint32_t v) {
    at[0] = (uint8_t)(v >> 24); at[1] = (uint8_t)(v >> 16); at[2] = (uint8_t)(v >> 8); at[3] = (uint8_t)v;
}
static inline void put_u64(uint8_t *at, uint64_t v) { put_u32(at, (uint32_t)(v >> 32)); put_u32(at + 4, (uint32_t)v); }
static inline void put_u16(uint8_t *at, uint16_t v) { at[0] = (uint8_t)(v >> 8); at[1] = (uint8_t)v; }
static inline uint32_t get_u32(const uint8_t *at) {
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}
static inline uint64_t get_u64(const uint8_t *at) { return (uint64_t)get_u32(at) << 32 | get_u32(at + 4); }
static inline uint16_t get_u16(const uint8_t *at) { return (uint16_t)(at[0] << 8 | at[1]); }

/* crc32c.c */
void crc32c_init(void);
uint32_t crc32c(uint32_t crc, const uint8_t *data, size_t size);
uint32_t crc32c_table(uint32_t crc, const uint8_t *data, size_t size);
extern const char *crc32c_kind;

/* builder.c */
extern PyTypeObject Builder_Type;

/* records.c */
extern PyTypeObject Record_Type, MessageBase_Type;
PyObject *decode_records(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *decode_messages(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *without_gc(PyObject *module, PyObject *type);

/* headers.c */
PyObject *read_header(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *walk(PyObject *module, PyObject *const *args, Py_ssize_t count);

#endif
