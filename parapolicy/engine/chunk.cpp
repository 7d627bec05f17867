// See chunk.h.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
#include "chunk.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

namespace parapolicy {
namespace {

typedef std::chrono::steady_clock Clock;
typedef std::vector<float> Floats;

// Whether to stop; called after every round.
class Stop {
  public:
    explicit Stop(const Job& job) : job(job), begin(Clock::now()) {}
    bool operator()() const {
        if (job.stop && job.stop()) return true;
        return job.seconds >= 0 && std::chrono::duration<double>(Clock::now() - begin).count() >= job.seconds;
    }

  private:
    const Job& job;
    const Clock::time_point begin;
};

// The clean estimate u from the network's output at a state x; u may be the same array as output.
void estimate(const Schedule& s, int64_t step, const float* output, const float* x, int64_t size, float* u) {
    const float alpha = s.alpha[step], sigma = s.sigma[step];
    switch (s.prediction) {
        case EPSILON:
#pragma omp simd
            for (int64_t i = 0; i < size; i++) u[i] = (x[i] - sigma * output[i]) / alpha;
            break;
        case SAMPLE:
            std::memmove(u, output, size * sizeof(float));
            break;
        case V_PREDICTION:
#pragma omp simd
            for (int64_t i = 0; i < size; i++) u[i] = alpha * x[i] - sigma * output[i];
            break;
        default:
#pragma omp simd
            for (int64_t i = 0; i < size; i++) u[i] = x[i] - sigma * output[i];
    }
    if (!s.clips) return;
    const float high = static_cast<float>(s.clip), low = -high, overshoot = s.overshoots ? s.overshoot[step] : 0.f;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        const float clean = u[i], bounded = clean < low ? low : clean;  // NaN stays NaN
        const float clipped = bounded > high ? high : bounded;
        u[i] = s.overshoots ? clipped + overshoot * (clean - clipped) : clipped;
    }
}

// u (rows, size) at states x, in calls of at most ``max_rows``.
bool denoise(const Job& job, const float* x, const int64_t* step, const int64_t* element, int64_t rows, float* u) {
    const int64_t size = job.network->length * job.network->channels;
    for (int64_t begin = 0; begin < rows; begin += job.max_rows) {
        const int64_t count = std::min(job.max_rows, rows - begin);
        const float* some = x + begin * size;
        if (compute(*job.network, *job.films, some, step + begin, element + begin, count, u + begin * size,
                    job.threads) >= 0)
            return false;
    }
    for (int64_t r = 0; r < rows; r++, x += size, u += size) {
        estimate(*job.schedule, step[r], u, x, size, u);
        if (!job.free) continue;
        const float *part = job.part + element[r] * size, *free = job.free + element[r] * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) u[i] = u[i] * free[i] + part[i];
    }
    return true;
}

int64_t sequential(const Job& job, const float* noise, int64_t batch, float* x, float* u) {
    const Schedule& s = *job.schedule;
    const int64_t size = job.network->length * job.network->channels, total = batch * size;
    const Stop stop(job);
    Floats now(total), before(total, 0.f);
    std::vector<int64_t> step(batch), element(batch);
    for (int64_t b = 0; b < batch; b++) element[b] = b;
    std::memcpy(x, noise, total * sizeof(float));
    int64_t taken = 0;
    for (bool ends = false; !ends && taken < s.steps;) {
        const int64_t j = taken++;
        std::fill(step.begin(), step.end(), j);
        if (!denoise(job, x, step.data(), element.data(), batch, now.data())) return BEYOND_TABLE;
        if (u)
            for (int64_t b = 0; b < batch; b++)
                std::memcpy(u + (b * s.steps + j) * size, &now[b * size], size * sizeof(float));
        const float *z = noise + taken * total, *past = before.data(), *clean = now.data();
        const float of_state = s.state[j], of_estimate = s.estimate[j], of_noise = s.noise[j];
        const float of_previous = s.previous[j];
        if (s.multistep)
#pragma omp simd
            for (int64_t i = 0; i < total; i++)
                x[i] = of_state * x[i] + ((of_estimate * clean[i] + of_noise * z[i]) + of_previous * past[i]);
        else
#pragma omp simd
            for (int64_t i = 0; i < total; i++)
                x[i] = of_state * x[i] + (of_estimate * clean[i] + of_noise * z[i]);
        std::swap(now, before);
        ends = stop();
    }
    if (taken < s.steps) std::memcpy(x, before.data(), total * sizeof(float));
    if (u)  // steps not reached repeat the last estimate
        for (int64_t b = 0; b < batch; b++)
            for (int64_t j = taken; j < s.steps; j++)
                std::memcpy(u + (b * s.steps + j) * size, &before[b * size], size * sizeof(float));
    return taken;
}

// out += table * values, where the table has one number, or one per value.
void add_product(float* out, const float* table, int64_t own, const float* values, int64_t size) {
    if (own == 1) {
        const float factor = table[0];
#pragma omp simd
        for (int64_t i = 0; i < size; i++) out[i] += factor * values[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) out[i] += table[i] * values[i];
    }
}

// (rows, size) times a matrix (size, size); a copy if the matrix is null.
void turn(const float* values, const float* matrix, int64_t rows, int64_t size, float* out) {
    if (!matrix) {
        std::memcpy(out, values, rows * size * sizeof(float));
        return;
    }
    std::memset(out, 0, rows * size * sizeof(float));
    for (int64_t r = 0; r < rows; r++, values += size, out += size) {
        int64_t k = 0;
        for (; k + 4 <= size; k += 4) {  // four at once: fewer loads and stores of the sums
            const float a = values[k], b = values[k + 1], c = values[k + 2], d = values[k + 3];
            const float *of_a = matrix + k * size, *of_b = of_a + size, *of_c = of_b + size, *of_d = of_c + size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++)
                out[i] += (a * of_a[i] + b * of_b[i]) + (c * of_c[i] + d * of_d[i]);
        }
        for (; k < size; k++) add_product(out, values + k, 1, matrix + k * size, size);
    }
}

// One sample's states and estimates at the nodes, in modes.
class Path {
  public:
    Path(const Job& job, const Nodes& nodes, int64_t element)
        : job(job), n(nodes), element(element), size(job.network->length * job.network->channels),
          pending(n.count, true), asked(n.count, false), free(n.count * size), v(n.count * size),
          v_asked(n.count * size), d(n.count * size), last_noise(size), final(size, 0.f) {}

    // Compute the states driven by noise alone.
    void begin(const float* noise, int64_t batch) {
        const int64_t steps = job.schedule->steps;
        Floats plain((steps + 1) * size), z((steps + 1) * size);
        for (int64_t j = 0; j <= steps; j++)
            std::memcpy(&plain[j * size], noise + (j * batch + element) * size, size * sizeof(float));
        std::copy(plain.end() - size, plain.end(), last_noise.begin());
        turn(plain.data(), n.modes, steps + 1, size, z.data());
        for (int64_t k = 0; k < n.count; k++) {
            float* out = &free[k * size];
            std::fill(out, out + size, 0.f);
            for (int64_t j = 0; j < n.steps[k]; j++)
                add_product(out, n.noise + (k * steps + j) * n.own, n.own, &z[(j + 1) * size], size);
            add_product(out, n.first + k * n.own, n.own, z.data(), size);
        }
        v = free;
    }

    bool live() const { return std::find(pending.begin(), pending.end(), true) != pending.end(); }

    // Take the estimates u (chosen, size) at the chosen nodes, in the network's own numbers.
    void take(const std::vector<int64_t>& chosen, const float* u) {
        Floats turned(size);
        for (size_t i = 0; i < chosen.size(); i++) {
            const int64_t k = chosen[i];
            turn(u + i * size, n.modes, 1, size, turned.data());
            for (int64_t m = 0; m < size; m++)
                d[k * size + m] = turned[m] - n.kappa[at(k, m)] * v[k * size + m];
            std::copy(&v[k * size], &v[k * size] + size, &v_asked[k * size]);
            asked[k] = true;
        }
        evaluations += chosen.size();
        rounds++;
        hold();
        update();
    }

    // The estimates u (steps, size) of every step.
    void interpolate(float* u) const {
        const int64_t steps = job.schedule->steps;
        Floats all(steps * size, 0.f);
        for (int64_t j = 0; j < steps; j++)
            for (int64_t k = 0; k < n.count; k++) {
                const float* weight = n.interpolation + (j * n.count + k) * n.own;
                const bool far = std::all_of(weight, weight + n.own, [](float w) { return w == 0; });
                if (!far) add_product(&all[j * size], weight, n.own, &d[k * size], size);
            }
        turn(all.data(), n.transposed, steps, size, u);
    }

    // The nodes to ask next: the first pending ones.
    std::vector<int64_t> choose() const {
        std::vector<int64_t> chosen;
        for (int64_t k = 0; k < n.count && static_cast<int64_t>(chosen.size()) < n.window; k++)
            if (pending[k]) chosen.push_back(k);
        return chosen;
    }

    const Job& job;
    const Nodes& n;
    const int64_t element, size;
    std::vector<bool> pending, asked;
    Floats free, v, v_asked, d, last_noise, final;
    int64_t rounds = 0, evaluations = 0;
    float residual = 0.f;

  private:
    // Index in a table of the entry for node k and number m of a sample.
    int64_t at(int64_t k, int64_t m) const { return n.own == 1 ? k : k * n.own + m; }

    // Nodes that were not asked yet hold the mean of the last node that was.
    void hold() {
        int64_t last = n.count - 1;
        while (!asked[last]) last--;
        for (int64_t k = 0; k < n.count; k++)
            if (!asked[k])
                for (int64_t m = 0; m < size; m++)
                    d[k * size + m] = n.kept[at(k, m)] * (d[last * size + m] / n.kept[at(last, m)]);
    }

    // Update the states, the sample, and the pending nodes.
    void update() {
        v = free;
        for (int64_t k = 0; k < n.count; k++)
            for (int64_t i = 0; i <= k; i++)
                add_product(&v[k * size], n.response + (k * n.count + i) * n.own, n.own, &d[i * size], size);
        const float a = static_cast<float>(n.state), b = static_cast<float>(n.estimate);
        const float s = static_cast<float>(n.last_noise), settle = static_cast<float>(n.settle);
        const int64_t last = n.count - 1;
        Floats turned(size), sample(size);
        for (int64_t m = 0; m < size; m++) {
            const float state = v[last * size + m];
            turned[m] = a * state + b * (d[last * size + m] + n.kappa[at(last, m)] * state);
        }
        turn(turned.data(), n.transposed, 1, size, sample.data());
        double squares = 0;
        for (int64_t m = 0; m < size; m++) {
            sample[m] += s * last_noise[m];
            const double change = sample[m] - final[m];
            squares += change * change;
        }
        residual = static_cast<float>(std::sqrt(squares / size));
        final.swap(sample);
        for (int64_t k = 0; k < n.count; k++) {
            bool moved = false;
            for (int64_t m = 0; m < size; m++)
                moved |= std::fabs(v[k * size + m] - v_asked[k * size + m]) > settle * n.sigma[k];
            pending[k] = (moved || !asked[k]) && rounds < n.most;
        }
    }
};

int64_t collocation(const Job& job, const Nodes& nodes, const float* noise, int64_t batch, float* x, float* u,
                    const Costs& costs) {
    const int64_t size = job.network->length * job.network->channels;
    const Stop stop(job);
    std::vector<Path> paths;
    paths.reserve(batch);
    for (int64_t b = 0; b < batch; b++) paths.emplace_back(job, nodes, b), paths.back().begin(noise, batch);
    Floats states(batch * nodes.window * size), answers(states.size());
    std::vector<int64_t> step(batch * nodes.window), element(step.size());
    std::vector<std::vector<int64_t>> chosen(batch);
    for (bool ends = false; !ends;) {
        int64_t rows = 0;
        for (Path& path : paths) {
            chosen[path.element] = path.choose();
            for (int64_t k : chosen[path.element]) {
                turn(&path.v[k * size], nodes.transposed, 1, size, &states[rows * size]);
                step[rows] = nodes.steps[k], element[rows] = path.element;
                rows++;
            }
        }
        if (!denoise(job, states.data(), step.data(), element.data(), rows, answers.data())) return BEYOND_TABLE;
        const float* answer = answers.data();
        bool live = false;
        for (Path& path : paths) {
            const std::vector<int64_t>& mine = chosen[path.element];
            if (!mine.empty()) path.take(mine, answer);
            answer += mine.size() * size;
            live |= path.live();
        }
        ends = stop() || !live;
    }
    for (const Path& path : paths) {
        const int64_t b = path.element;
        std::copy(path.final.begin(), path.final.end(), x + b * size);
        if (u) path.interpolate(u + b * job.schedule->steps * size);
        costs.rounds[b] = path.rounds, costs.evaluations[b] = path.evaluations;
        costs.residual[b] = path.residual, costs.complete[b] = !path.live();
    }
    return 0;
}

}  // namespace
}  // namespace parapolicy

// Exceptions must not leave the library.
template <typename Function>
static int64_t guarded(Function function) {
    try {
        return function();
    } catch (const std::bad_alloc&) {
        return parapolicy::NO_MEMORY;
    } catch (const std::length_error&) {
        return parapolicy::NO_MEMORY;
    }
}

extern "C" void parapolicy_film_values(const float* weights, const float* conditions, int64_t inputs, int64_t films,
                                       int64_t batch, float* values) {
    std::memset(values, 0, batch * films * sizeof(float));
    for (int64_t i = 0; i < batch * inputs; i++) {
        const float x = conditions[i], e = std::exp(std::min(x, 20.f)), n = e * (e + 2.f);
        const float mish = x * (n / (n + 2.f));  // x tanh(log(1 + e^x))
        parapolicy::add_product(values + i / inputs * films, &mish, 1, weights + i % inputs * films, films);
    }
}

extern "C" int64_t parapolicy_sequential(const parapolicy::Job* job, const float* noise, int64_t batch, float* x,
                                         float* u) {
    return guarded([&] { return parapolicy::sequential(*job, noise, batch, x, u); });
}

extern "C" int64_t parapolicy_collocation(const parapolicy::Job* job, const parapolicy::Nodes* nodes,
                                          const float* noise, int64_t batch, float* x, float* u,
                                          const parapolicy::Costs* costs) {
    return guarded([&] { return parapolicy::collocation(*job, *nodes, noise, batch, x, u, *costs); });
}
