// The parts of the interface that do not compute, and every status of a rejected call.
#include "flamingo_cpu.h"
#include "flamingo_pointwise.h"

#include <cstring>
#include <initializer_list>

#include "expect.h"

namespace {

flamingo_media_attention_params valid_params() {
    static float q = 1, k = 1, v = 1, out;
    static const int32_t first = 0, last = 0;
    flamingo_media_attention_params p{};
    p.q.data = &q, p.k.data = &k, p.v.data = &v, p.out.data = &out;
    p.first = &first, p.last = &last;
    p.rows = p.tokens = p.media = p.latents = p.heads = p.kv_heads = p.head_dim = 1;
    p.scale = 1;
    p.execution.dtype = FLAMINGO_FLOAT32;
    p.execution.threads = 1;
    p.execution.instruction_set = FLAMINGO_PORTABLE;
    return p;
}

template <typename Change> int32_t status_after(Change change) {
    flamingo_media_attention_params p = valid_params();
    change(p);
    return flamingo_media_attention_forward(&p);
}

} // namespace

int main() {
    using Params = flamingo_media_attention_params;
    expect(flamingo_abi_version() == FLAMINGO_ABI_VERSION, "the ABI version is the header's");
    expect(std::strlen(flamingo_version()) > 0, "there is a version");
    expect(std::strstr(flamingo_build_flags(), "portable"), "the build flags name the kernels");

    expect(flamingo_sizeof("flamingo_tensor") == sizeof(flamingo_tensor), "size of a struct");
    expect(flamingo_sizeof("flamingo_layer_norm_params") == sizeof(flamingo_layer_norm_params),
           "size of a struct of another header");
    expect(flamingo_sizeof("flamingo_ten") == -1 && flamingo_sizeof("") == -1,
           "an unknown struct has no size");

    const uint32_t detected = flamingo_detected_instruction_sets();
    const uint32_t usable = flamingo_usable_instruction_sets();
    expect(detected & FLAMINGO_PORTABLE, "portable code always runs");
    expect((usable & ~detected) == 0, "only detected instruction sets are usable");
    expect(std::strcmp(flamingo_instruction_set_name(0), "portable") == 0, "bit 0 is portable");
    expect(flamingo_instruction_set_name(4) == nullptr, "there are four instruction sets");

    expect(status_after([](Params &) {}) == FLAMINGO_OK, "a valid call");
    expect(status_after([](Params &p) { p.tokens = -1; }) == FLAMINGO_NEGATIVE_SIZE, "size -1");
    expect(status_after([](Params &p) { p.q.data = nullptr; }) == FLAMINGO_NULL_POINTER,
           "q missing");
    expect(status_after([](Params &p) { p.v.data = nullptr; }) == FLAMINGO_NULL_POINTER,
           "v missing");
    const Params without_gradients = valid_params();
    expect(flamingo_media_attention_backward(&without_gradients) == FLAMINGO_NULL_POINTER,
           "a backward without gradients to write");
    expect(status_after([](Params &p) { p.last = nullptr; }) == FLAMINGO_NULL_POINTER,
           "last missing");
    expect(status_after([](Params &p) { p.media = 0, p.k.data = p.v.data = nullptr; }) ==
               FLAMINGO_OK,
           "no media needs no keys");
    expect(status_after([](Params &p) { p.heads = 3, p.kv_heads = 2; }) ==
               FLAMINGO_HEADS_NOT_DIVISIBLE,
           "3 query heads over 2 key/value heads");
    expect(status_after([](Params &p) { p.kv_heads = 0; }) == FLAMINGO_HEADS_NOT_DIVISIBLE,
           "no key/value head");
    expect(status_after([](Params &p) { p.execution.dtype = 9; }) == FLAMINGO_UNKNOWN_DTYPE,
           "dtype 9");
    expect(status_after([](Params &p) { p.execution.threads = 0; }) == FLAMINGO_NO_THREADS,
           "0 threads");
    for (const int32_t set : {0, FLAMINGO_PORTABLE | FLAMINGO_AVX2, 1 << 4}) {
        expect(status_after([set](Params &p) { p.execution.instruction_set = set; }) ==
                   FLAMINGO_INSTRUCTION_SET_UNUSABLE,
               "an instruction set that is none");
    }
    for (int32_t status = FLAMINGO_OK; status <= FLAMINGO_UNKNOWN_ACTIVATION; ++status) {
        expect(std::strcmp(flamingo_status_message(status), "unknown status") != 0,
               "every status has a message");
    }
    flamingo_execution execution{};
    execution.dtype = FLAMINGO_FLOAT32, execution.threads = 1;
    execution.instruction_set = FLAMINGO_PORTABLE;
    expect(flamingo_multiply_add_rate(&execution, 0.01) > 1e8, "a ceiling above 0.1 GFLOP/s");
    return report();
}
