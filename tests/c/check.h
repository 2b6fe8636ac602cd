/* What all programs here that test the library begin with. */
#pragma once

#include "rlsd.h"

#include <stdio.h>
#include <stdlib.h>

/* At once, without what runs at exit: threads may be at work, and a forked child has copies of its parent's buffers. */
#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #condition,     \
                    rlsd_last_error());                                                                      \
            _Exit(1);                                                                                        \
        }                                                                                                    \
    } while (0)
