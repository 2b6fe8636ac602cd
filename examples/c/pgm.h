/* Grey images in the PGM format: binary ("P5"), 8 or 16 bits a pixel. */
#ifndef PGM_H
#define PGM_H

#include <stdbool.h>
#include <stddef.h>

/* Reads a file whose size has to be width x height; pixels receives values in [-1, 1], row by row. On failure one
 * sentence is written to stderr. */
bool pgm_read(const char *path, size_t width, size_t height, float *pixels);

/* Writes pixels in [-1, 1], what lies outside is cut off, with 8 bits to "PREFIX-NAME.pgm". */
bool pgm_write(const char *prefix, const char *name, size_t width, size_t height, const float *pixels);

#endif
