// rlsd.h in C++, and the sizes of its structs in a caller that is older than the library.
#include "rlsd.h"

#include <cstdio>
#include <cstring>
#include <locale>

// 12.345,6 for 12345.6, as where a German program has set its locale.
struct German : std::numpunct<char> {
    char do_thousands_sep() const override { return '.'; }
    char do_decimal_point() const override { return ','; }
    std::string do_grouping() const override { return "\3"; }
};

int main() {
    rlsd_params params;
    if (rlsd_params_init(&params, sizeof params) != RLSD_OK || params.steps != 200 || params.size != sizeof params) return 1;

    // A caller whose struct ends after `steps`: only that much may be written.
    unsigned char small[sizeof params];
    std::memset(small, 0xAB, sizeof small);
    const size_t size = offsetof(rlsd_params, steps) + sizeof params.steps;
    if (rlsd_params_init(reinterpret_cast<rlsd_params *>(small), size) != RLSD_OK || small[size] != 0xAB) return 2;

    if (rlsd_params_init(nullptr, sizeof params) != RLSD_INVALID_ARGUMENT || *rlsd_last_error() == '\0') return 3;

    std::locale::global(std::locale(std::locale(), new German));
    rlsd_engine_options options;
    if (rlsd_engine_options_init(&options, sizeof options) != RLSD_OK) return 4;
    options.size = 70000;
    rlsd_engine *engine = nullptr;
    if (rlsd_engine_open("bundle", &options, &engine) != RLSD_INVALID_ARGUMENT) return 5;
    if (std::strstr(rlsd_last_error(), "70000") == nullptr) return 6;
    std::printf("rlsd %s\n", rlsd_version());
    return 0;
}
