// The test framework of the native tests: expectations that are counted, and a closing line.
#pragma once

#include <cstdio>

namespace {

int passed = 0;
int failed = 0;

void expect(bool condition, const char *what) {
    if (condition) {
        ++passed;
    } else {
        ++failed;
        std::printf("FAILED: %s\n", what);
    }
}

int report() {
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}

} // namespace
