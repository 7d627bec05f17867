#include "work_sharing.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <mutex>
#include <system_error>
#include <thread>

namespace parapolicy {
namespace {

typedef std::chrono::steady_clock Clock;
constexpr std::chrono::microseconds SPINNING(300);  // time without work after which a helper sleeps
constexpr std::chrono::seconds SLEEPING(2);         // time without a call after which it ends
// A ticket: number of the work << 32 | its helpers << 26 | its parts << 13 | the next part. The number keeps a helper
// with an outdated ticket from taking a part of later work.
constexpr int PART_BITS = 13, HELPER_BITS = 6;
constexpr uint64_t PART_MASK = (1 << PART_BITS) - 1, HELPER_MASK = (1 << HELPER_BITS) - 1;
static_assert(MOST_PARTS <= int64_t(PART_MASK) && MOST_THREADS - 1 <= int64_t(HELPER_MASK));

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

struct Helpers {
    std::mutex busy;  // held by the call that uses the helpers
    int64_t wanted = 0;  // helpers of that call
    uint64_t number = 0;
    alignas(128) std::atomic<uint64_t> ticket{0};
    alignas(128) std::atomic<int64_t> done{0};
    // Written before a ticket is published, read by threads that took a part with it, and not changed before that is done.
    void (*function)(const void*, int64_t, int64_t) = nullptr;
    const void* work = nullptr;
    alignas(128) std::atomic<int64_t> calls{0};
    std::mutex sleep;
    std::condition_variable wake;
    std::atomic<int64_t> sleeping{0}, count{0};  // written under ``sleep``

    // Do a part of the present work; false: there is none for this thread.
    bool take(uint64_t thread) {
        uint64_t t = ticket.load(std::memory_order_acquire);
        do {
            const uint64_t parts = t >> PART_BITS & PART_MASK, helpers = t >> 2 * PART_BITS & HELPER_MASK;
            if ((t & PART_MASK) >= parts || thread > helpers) return false;
        } while (!ticket.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel, std::memory_order_acquire));
        function(work, t & PART_MASK, thread);
        done.fetch_add(1, std::memory_order_release);
        return true;
    }

    void help(int64_t thread) {
        for (;;) {
            const int64_t seen = calls.load();
            Clock::time_point since = Clock::now();
            for (bool idle = false; !idle;) {
                bool took = false;
                for (int i = 0; i < 1000 && !took; i++) {
                    took = take(thread);
                    if (!took) pause();
                }
                if (!took) std::this_thread::yield();  // the caller may be waiting for this core
                const Clock::time_point now = Clock::now();
                if (took) since = now;
                idle = now - since > SPINNING;
            }
            std::unique_lock<std::mutex> lock(sleep);
            sleeping++;
            const bool called = wake.wait_for(lock, SLEEPING, [&] { return calls.load() != seen; });
            sleeping--;
            if (!called && thread == count) {  // helpers end from the last, so that numbers stay consecutive
                count--;
                return;
            }
        }
    }

    void begin(int64_t threads) {
        wanted = threads - 1;
        calls++;
        if (sleeping == 0 && count >= wanted) return;
        std::unique_lock<std::mutex> lock(sleep, std::try_to_lock);  // do not wait: a helper may hold it and not be running
        if (!lock) return;
        wake.notify_all();
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
        try {
            for (; count < wanted; count++) std::thread(&Helpers::help, this, count + 1).detach();
        } catch (const std::system_error&) {  // the system allows no more threads
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
};

namespace {

// Never destroyed: helpers may outlive the program's statics. A forked process has no helpers and starts new ones.
std::atomic<Helpers*> helpers{nullptr};

Helpers* find_helpers() {
    static const bool registered = [] {
        helpers = new Helpers;
        pthread_atfork(nullptr, nullptr, [] { helpers = new Helpers; });
        return true;
    }();
    (void)registered;
    return helpers;
}

}  // namespace

WorkSharing::WorkSharing(int64_t threads) : helpers_(nullptr) {
    if (threads <= 1) return;
    Helpers* found = find_helpers();
    if (!found->busy.try_lock()) return;
    helpers_ = found;
    found->begin(std::min(threads, MOST_THREADS));
}

WorkSharing::~WorkSharing() {
    if (helpers_) helpers_->busy.unlock();
}

void WorkSharing::share(int64_t parts, Function function, const void* work) {
    Helpers& h = *helpers_;
    h.function = function, h.work = work;
    h.done.store(0, std::memory_order_relaxed);
    h.ticket.store(++h.number << 32 | uint64_t(h.wanted) << 2 * PART_BITS | uint64_t(parts) << PART_BITS,
                   std::memory_order_release);
    while (h.take(0)) {
    }
    for (int spins = 0; h.done.load(std::memory_order_acquire) < parts; spins++)
        spins < 1000 ? pause() : std::this_thread::yield();
}

}  // namespace parapolicy
