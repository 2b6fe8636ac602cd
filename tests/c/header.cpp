// rlsd.h in C++, and the sizes of its structs in a caller that is older than the library.
#include "rlsd.h"

#include <cstdio>
#include <cstring>

int main() {
    rlsd_params params;
    if (rlsd_params_init(&params, sizeof params) != RLSD_OK || params.steps != 200 || params.size != sizeof params) return 1;

    // A caller whose struct ends after `steps`: only that much may be written.
    unsigned char small[sizeof params];
    std::memset(small, 0xAB, sizeof small);
    const size_t size = offsetof(rlsd_params, steps) + sizeof params.steps;
    if (rlsd_params_init(reinterpret_cast<rlsd_params *>(small), size) != RLSD_OK || small[size] != 0xAB) return 2;

    if (rlsd_params_init(nullptr, sizeof params) != RLSD_INVALID_ARGUMENT || *rlsd_last_error() == '\0') return 3;
    std::printf("rlsd %s\n", rlsd_version());
    return 0;
}
