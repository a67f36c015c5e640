/* CRC32C (Castagnoli): with the processor's instruction where there is one, found at run time, else by table.
 *
 * The x86 instruction takes a new operand every cycle and answers after three, so long buffers are summed in three
 * streams side by side, which are then joined: the sum of A|B is shift(sum(A), |B|) ^ sum(B), and the shift over a fixed
 * number of bytes is four look-ups in tables made at start. */

#include "codec.h"
#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* reflected */
#define LONG 4096
#define SHORT 256

static uint32_t table[8][256];
const char *crc32c_kind = "table";
static uint32_t (*chosen)(uint32_t, const uint8_t *, size_t) = crc32c_table;

static inline uint64_t load_u64(const uint8_t *at) {
    uint64_t v;
    memcpy(&v, at, 8);
    return v;
}

uint32_t crc32c_table(uint32_t crc, const uint8_t *data, size_t size) {
    crc = ~crc;
    while (size >= 8) { /* byte by byte from memory: the same on every byte order */
        uint32_t low = crc ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24);
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
              table[3][data[4]] ^ table[2][data[5]] ^ table[1][data[6]] ^ table[0][data[7]];
        data += 8;
        size -= 8;
    }
    while (size--) crc = table[0][(crc ^ *data++) & 255] ^ crc >> 8;
    return ~crc;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>

static uint32_t shift_long[4][256], shift_short[4][256];

/* The CRC register after `bytes` zero bytes, as a function of what it was before: linear, so 32 one-bit results say all. */
static void make_shift(uint32_t shift[4][256], size_t bytes) {
    uint32_t of_bit[32];
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        for (size_t i = 0; i < bytes; i++) crc = table[0][crc & 255] ^ crc >> 8;
        of_bit[bit] = crc;
    }
    for (int byte = 0; byte < 4; byte++)
        for (int value = 0; value < 256; value++) {
            uint32_t crc = 0;
            for (int bit = 0; bit < 8; bit++)
                if (value >> bit & 1) crc ^= of_bit[byte * 8 + bit];
            shift[byte][value] = crc;
        }
}

static inline uint32_t shifted(const uint32_t shift[4][256], uint32_t crc) {
    return shift[0][crc & 255] ^ shift[1][crc >> 8 & 255] ^ shift[2][crc >> 16 & 255] ^ shift[3][crc >> 24];
}

__attribute__((target("sse4.2"))) static inline uint64_t three_streams(uint64_t crc, const uint8_t *data, size_t each,
                                                                       const uint32_t shift[4][256]) {
    uint64_t second = 0, third = 0;
    for (const uint8_t *end = data + each; data < end; data += 8) {
        crc = _mm_crc32_u64(crc, load_u64(data));
        second = _mm_crc32_u64(second, load_u64(data + each));
        third = _mm_crc32_u64(third, load_u64(data + 2 * each));
    }
    crc = shifted(shift, (uint32_t)crc) ^ second;
    return shifted(shift, (uint32_t)crc) ^ third;
}

__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(uint32_t start, const uint8_t *data, size_t size) {
    uint64_t crc = (uint32_t)~start;
    while (size >= 3 * LONG) {
        crc = three_streams(crc, data, LONG, shift_long);
        data += 3 * LONG;
        size -= 3 * LONG;
    }
    while (size >= 3 * SHORT) {
        crc = three_streams(crc, data, SHORT, shift_short);
        data += 3 * SHORT;
        size -= 3 * SHORT;
    }
    while (size >= 8) {
        crc = _mm_crc32_u64(crc, load_u64(data));
        data += 8;
        size -= 8;
    }
    while (size--) crc = _mm_crc32_u8((uint32_t)crc, *data++);
    return ~(uint32_t)crc;
}

static void choose(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2")) {
        make_shift(shift_long, LONG);
        make_shift(shift_short, SHORT);
        chosen = crc32c_sse42;
        crc32c_kind = "sse4.2";
    }
}

#elif defined(__aarch64__) && defined(__GNUC__) && (defined(__linux__) || defined(__APPLE__)) && !defined(__AARCH64EB__)
#if defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
static int has_crc(void) { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#else
static int has_crc(void) { return 1; } /* every 64-bit Apple processor */
#endif

static uint32_t crc32c_armv8(uint32_t crc, const uint8_t *data, size_t size) {
    crc = ~crc;
    while (size >= 8) {
        __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(load_u64(data)));
        data += 8;
        size -= 8;
    }
    while (size--) {
        __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"((uint32_t)*data));
        data++;
    }
    return ~crc;
}

static void choose(void) {
    if (has_crc()) {
        chosen = crc32c_armv8;
        crc32c_kind = "armv8";
    }
}

#else
static void choose(void) {}
#endif

void crc32c_init(void) {
    for (int value = 0; value < 256; value++) {
        uint32_t crc = (uint32_t)value;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
        table[0][value] = crc;
    }
    for (int value = 0; value < 256; value++)
        for (int slice = 1; slice < 8; slice++)
            table[slice][value] = table[0][table[slice - 1][value] & 255] ^ table[slice - 1][value] >> 8;
    choose();
}

uint32_t crc32c(uint32_t crc, const uint8_t *data, size_t size) { return chosen(crc, data, size); }
