// See plan_file.h.
#include "plan_file.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "parapolicy_fused.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace parapolicy {
namespace {

// More than any real policy: products of two of these, and an offset, do not overflow.
constexpr int64_t MOST = 1 << 24, MOST_BYTES = int64_t(1) << 36;
constexpr int64_t LARGE_PAGE = 2 << 20;

uint32_t crc32(const unsigned char* data, int64_t count, uint32_t crc) {
    static const struct Table {
        uint32_t values[256];
        Table() {
            for (uint32_t i = 0; i < 256; i++) {
                values[i] = i;
                for (int k = 0; k < 8; k++) values[i] = values[i] & 1 ? values[i] >> 1 ^ 0xedb88320u : values[i] >> 1;
            }
        }
    } table;
    crc = ~crc;
    for (int64_t i = 0; i < count; i++) crc = table.values[(crc ^ data[i]) & 0xff] ^ crc >> 8;
    return ~crc;
}

// The arrays of a file, one after the other. Once an array does not fit, it and all later ones are null.
class Arrays {
  public:
    Arrays(const char* file, int64_t at, int64_t bytes) : file(file), at(at), bytes(bytes) {}

    template <typename T>
    const T* next(int64_t count, int64_t by = 1, int64_t and_by = 1) {
        at = (at + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        // Each factor is at most MOST; the product of three may overflow.
        if (fail || (count && by && and_by > bytes / count / by) || at + count * by * and_by * size<T>() > bytes) {
            fail = true;
            return nullptr;
        }
        const T* here = reinterpret_cast<const T*>(file + at);
        at += count * by * and_by * size<T>();
        return here;
    }
    bool good() const { return !fail && (at + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT == bytes; }

  private:
    template <typename T>
    static constexpr int64_t size() {
        return sizeof(T);
    }
    const char* file;
    int64_t at, bytes;
    bool fail = false;
};

bool within(int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; }
bool flag(int64_t value) { return within(value, 0, 1); }

bool check_header(const Header& h) {
    const int64_t sizes[] = {h.layers, h.memory, h.length, h.channels, h.film, h.steps, h.obs_steps, h.observed};
    for (int64_t size : sizes)
        if (!within(size, 1, MOST)) return false;
    if (!within(h.weights, 1, MOST_BYTES / 4) || !within(h.values, 1, MOST_BYTES / 4)) return false;
    if (!within(h.precision, FLOAT32, BFLOAT16) || !within(h.prediction, EPSILON, FLOW_PREDICTION)) return false;
    if (!flag(h.multistep) || !flag(h.clips) || !flag(h.overshoots) || !flag(h.modes)) return false;
    if (!within(h.first_action, 0, h.length) || !within(h.action_steps, 1, h.length - h.first_action)) return false;
    if (h.length * h.channels > MOST || h.steps * h.film > MOST_BYTES) return false;
    if (!std::isfinite(h.clip) || !(h.control_hz >= 0) || !std::isfinite(h.control_hz)) return false;
    if (h.nodes == 0) return true;
    const int64_t size = h.length * h.channels;
    if (!within(h.nodes, 1, h.steps) || !within(h.window, 1, h.nodes) || !within(h.most, 1, MOST)) return false;
    return h.own == size || h.own == 1;
}

// Check a buffer of a row's activations that a layer reads or writes, ``width`` channels at a time.
bool check_buffer(const Network& n, int64_t at, int64_t channel, int64_t stride, int64_t length, int64_t width) {
    if (!within(at, 0, n.memory) || !within(channel, 0, MOST) || !within(stride, 1, MOST)) return false;
    if (!within(length, 1, MOST) || !within(width, 1, MOST)) return false;
    // The last position of the last row, for any number of rows.
    return at + length * stride + std::max<int64_t>(0, channel + width - stride) <= n.memory;
}

bool check_layer(const Network& n, const Layer& l, int64_t weights, int64_t values) {
    if (l.kind != CONVOLUTION || l.gelu || l.bias_pitch || l.heads || l.memory || l.seen) return false;  // a UNet
    const bool halves = l.precision == BFLOAT16;
    if (!within(l.precision, FLOAT32, n.precision) || !flag(l.transposed) || !within(l.taps, 1, MOST) || !within(l.stride, 1, MOST)) return false;
    if (!within(l.padding, 0, MOST) || !within(l.outputs, 1, MOST) || !within(l.inputs, 1, MOST)) return false;
    if (!check_buffer(n, l.source, l.source_channel, l.source_stride, l.source_length, l.inputs)) return false;
    if (halves && (l.inputs % 2 || l.source % 2 || l.source_channel % 2 || l.source_stride % 2)) return false;
    if (l.padded != (l.outputs + 15) / 16 * 16 || l.target_channel + l.padded > l.target_stride) return false;
    if (!check_buffer(n, l.target, l.target_channel, l.target_stride, l.target_length, l.padded)) return false;
    if (l.strip != 16 && l.strip != 32 && l.strip != 64) return false;
    if (!within(l.unit, l.strip, l.padded) || l.unit % l.strip || l.padded % l.unit) return false;
    const int64_t words = halves ? l.inputs / 2 : l.inputs;
    if (!within(l.weight, 0, weights) || l.taps > (weights - l.weight) / words / l.padded) return false;
    if (!within(l.bias, 0, values - l.padded)) return false;
    if (!within(l.norm, -1, values) || !within(l.residual, -1, n.memory)) return false;
    if (!within(l.residual_channel, 0, MOST) || !within(l.residual_stride, 0, MOST)) return false;
    if (!within(l.group, 0, l.outputs) || !within(l.film, -1, n.film) || !flag(l.film_scale)) return false;
    if (l.group > 0) {
        if (l.outputs % l.group || (l.unit % l.group && l.unit != l.padded)) return false;
        if (!within(l.norm, 0, values - 2 * l.outputs - 1)) return false;
    }
    if (l.film >= 0 && l.film + l.outputs * (1 + l.film_scale) > n.film) return false;
    if (!flag(l.exact) || !within(l.rounded, FLOAT32, n.precision)) return false;
    return l.residual < 0 ||
           check_buffer(n, l.residual, l.residual_channel, l.residual_stride, l.target_length, l.padded);
}

// Whether all offsets of the network's layers are within its memory, weights and values.
bool check_network(const Network& n, int64_t weights, int64_t values) {
    for (int64_t i = 0; i < n.count; i++)
        if (!check_layer(n, n.layers[i], weights, values)) return false;
    const Layer &first = n.layers[0], &last = n.layers[n.count - 1];
    if (first.source != 0 || first.source_stride < n.channels || first.source_length != n.length) return false;
    if (first.source_channel != 0 || first.source_stride * n.length > n.memory) return false;
    return last.target_channel == 0 && last.target_length == n.length && last.target_stride >= n.channels;
}

bool check_nodes(const Header& h, const Nodes& nodes) {
    for (int64_t k = 0; k < nodes.count; k++)
        if (!within(nodes.steps[k], k ? nodes.steps[k - 1] + 1 : 0, h.steps - 1)) return false;
    return nodes.steps[nodes.count - 1] == h.steps - 1;
}

int32_t read_bytes(const char* path, PlanFile& plan) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
    if (!file) return PARAPOLICY_NO_FILE;
    if (std::fread(&plan.header, 1, sizeof plan.header, file.get()) != sizeof plan.header)
        return std::ferror(file.get()) ? PARAPOLICY_NO_FILE : PARAPOLICY_NO_PLAN;
    const Header& h = plan.header;
    if (std::memcmp(h.magic, MAGIC, sizeof h.magic)) return PARAPOLICY_NO_PLAN;
    if (h.version != VERSION) return PARAPOLICY_OTHER_VERSION;
    if (!within(h.bytes, sizeof h, MOST_BYTES) || h.bytes % ALIGNMENT) return PARAPOLICY_DAMAGED;
    // A damaged size must not ask for more memory than the file has.
    if (std::fseek(file.get(), 0, SEEK_END) || std::ftell(file.get()) != h.bytes) return PARAPOLICY_DAMAGED;
    std::rewind(file.get());
    const int64_t room = (h.bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    plan.memory = {std::aligned_alloc(LARGE_PAGE, room), std::free};
    if (!plan.memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(plan.memory.get(), room, MADV_HUGEPAGE);  // weights are read as one stream; small pages are slower
#endif
    unsigned char* bytes = static_cast<unsigned char*>(plan.memory.get());
    if (std::fread(bytes, 1, h.bytes, file.get()) != static_cast<size_t>(h.bytes)) return PARAPOLICY_NO_FILE;
    std::memcpy(&plan.header, bytes, sizeof plan.header);  // use the header that the checksum covers
    std::memset(bytes + offsetof(Header, checksum), 0, sizeof h.checksum);
    return crc32(bytes, h.bytes, 0) == h.checksum ? PARAPOLICY_OK : PARAPOLICY_DAMAGED;
}

}  // namespace

int32_t read_plan(const char* path, PlanFile& plan) {
    if (const int32_t code = read_bytes(path, plan)) return code;
    const Header& h = plan.header;
    if (!check_header(h)) return PARAPOLICY_DAMAGED;
    Arrays arrays(static_cast<const char*>(plan.memory.get()), sizeof h, h.bytes);
    const int64_t observed = h.obs_steps * h.observed, size = h.length * h.channels;
    const Layer* layers = arrays.next<Layer>(h.layers);
    const float* weights = arrays.next<float>(h.weights);
    const float* values = arrays.next<float>(h.values);
    plan.network = {layers, h.layers, weights, values, h.memory, h.length, h.channels, h.film, h.precision};
    plan.by_step = arrays.next<float>(h.steps, h.film);
    plan.conditions = arrays.next<float>(observed, h.film);
    for (const float** table : {&plan.schedule.state, &plan.schedule.estimate, &plan.schedule.previous,
                                &plan.schedule.noise, &plan.schedule.alpha, &plan.schedule.sigma,
                                &plan.schedule.overshoot})
        *table = arrays.next<float>(h.steps);
    Schedule& s = plan.schedule;
    s.steps = h.steps, s.prediction = h.prediction, s.multistep = h.multistep, s.clips = h.clips;
    s.overshoots = h.overshoots, s.clip = h.clip;
    for (const float** table : {&plan.scale, &plan.offset, &plan.centre}) *table = arrays.next<float>(observed);
    for (const float** table : {&plan.action_scale, &plan.action_offset, &plan.action_centre})
        *table = arrays.next<float>(h.channels);
    if (h.nodes) {
        Nodes& n = plan.nodes;
        n.steps = arrays.next<int64_t>(h.nodes);
        n.modes = h.modes ? arrays.next<float>(size, size) : nullptr;
        n.kappa = arrays.next<float>(h.nodes, h.own), n.kept = arrays.next<float>(h.nodes, h.own);
        n.response = arrays.next<float>(h.nodes, h.nodes, h.own);
        n.first = arrays.next<float>(h.nodes, h.own), n.noise = arrays.next<float>(h.nodes, h.steps, h.own);
        n.sigma = arrays.next<float>(h.nodes), n.interpolation = nullptr;
        n.count = h.nodes, n.own = h.own, n.window = h.window, n.most = h.most;
        n.settle = h.settle, n.state = h.last_state, n.estimate = h.last_estimate, n.last_noise = h.last_noise;
    }
    if (!arrays.good() || !check_network(plan.network, h.weights, h.values)) return PARAPOLICY_DAMAGED;
    if (h.nodes && !check_nodes(h, plan.nodes)) return PARAPOLICY_DAMAGED;
    if (h.nodes && h.modes) {
        plan.transposed = std::make_unique<float[]>(size * size);
        for (int64_t i = 0; i < size; i++)
            for (int64_t j = 0; j < size; j++) plan.transposed[j * size + i] = plan.nodes.modes[i * size + j];
    }
    plan.nodes.transposed = plan.transposed.get();
    return PARAPOLICY_OK;
}

}  // namespace parapolicy
