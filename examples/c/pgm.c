#include "pgm.h"

#include <ctype.h>
#include <stdio.h>

/* The next number of the header, 0 if there is none: white space and comments lie between them. */
static unsigned long header_number(FILE *file) {
    unsigned long value = 0;
    int c = getc(file);
    while (isspace(c) || c == '#') {
        if (c == '#')
            while (c != '\n' && c != EOF) c = getc(file);
        c = getc(file);
    }
    for (; isdigit(c) && value < 1000000; c = getc(file)) value = 10 * value + (unsigned long)(c - '0');
    return isspace(c) ? value : 0; /* one white space ends the number, and after the last one come the pixels */
}

static bool read_open(FILE *file, const char *path, size_t width, size_t height, float *pixels) {
    const bool is_pgm = getc(file) == 'P' && getc(file) == '5';
    const unsigned long found_width = is_pgm ? header_number(file) : 0;
    const unsigned long found_height = is_pgm ? header_number(file) : 0;
    const unsigned long top = is_pgm ? header_number(file) : 0;
    if (found_width == 0 || found_height == 0 || top == 0 || top > 65535)
        return fprintf(stderr, "%s is not a binary PGM image (P5)\n", path), false;
    if (found_width != width || found_height != height)
        return fprintf(stderr, "%s is %lu x %lu; it has to be %zu x %zu\n", path, found_width, found_height, width, height),
               false;
    for (size_t i = 0; i < width * height; ++i) {
        int value = getc(file);
        if (top > 255 && value != EOF) {
            const int low = getc(file);
            value = low == EOF ? EOF : 256 * value + low;
        }
        if (value == EOF) return fprintf(stderr, "%s ends after %zu of %zu pixels\n", path, i, width * height), false;
        if ((unsigned long)value > top) return fprintf(stderr, "%s has a pixel of %d above %lu\n", path, value, top), false;
        pixels[i] = 2.0f * (float)value / (float)top - 1.0f;
    }
    return true;
}

bool pgm_read(const char *path, size_t width, size_t height, float *pixels) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) return perror(path), false;
    const bool fine = read_open(file, path, width, height, pixels);
    fclose(file);
    return fine;
}

bool pgm_write(const char *prefix, const char *name, size_t width, size_t height, const float *pixels) {
    char path[4096];
    const int length = snprintf(path, sizeof path, "%s-%s.pgm", prefix, name);
    if (length < 0 || (size_t)length >= sizeof path) return fprintf(stderr, "the path %s... is too long\n", path), false;
    FILE *file = fopen(path, "wb");
    if (file == NULL) return perror(path), false;
    fprintf(file, "P5\n%zu %zu\n255\n", width, height);
    for (size_t i = 0; i < width * height; ++i) {
        const float grey = 127.5f * (pixels[i] + 1.0f);
        putc(grey <= 0.0f ? 0 : grey >= 255.0f ? 255 : (int)(grey + 0.5f), file);
    }
    const bool written = !ferror(file);
    if (fclose(file) != 0 || !written) return perror(path), false; /* a full disk may show only now */
    return true;
}
