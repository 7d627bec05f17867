// Threads that take parts of a caller's work when they run. The caller never waits for one that does not: it does what
// is left itself, and waits only for parts under way. Barriers would cost time slices where others use the processor,
// too, tens of milliseconds a call.
#pragma once
#include <cstdint>

namespace parapolicy __attribute__((visibility("hidden"))) {

constexpr int64_t MOST_PARTS = 8191, MOST_THREADS = 64;

struct Helpers;

// Of one call, for as long as it lives. One call at a time has helpers; others, meanwhile, run alone.
class WorkSharing {
   public:
    explicit WorkSharing(int64_t threads);
    ~WorkSharing();
    WorkSharing(const WorkSharing&) = delete;

    // work(part, thread) for every part below ``parts``, each once; returns when all are done. ``thread``: 0 for the
    // caller, and below ``threads``. More than MOST_PARTS are all the caller's.
    template <class Work>
    void run(int64_t parts, const Work& work) {
        if (helpers_ == nullptr || parts == 1 || parts > MOST_PARTS)
            for (int64_t part = 0; part < parts; part++) work(part, 0);
        else
            share(parts, call<Work>, &work);
    }

   private:
    typedef void (*Function)(const void* work, int64_t part, int64_t thread);
    template <class Work>
    static void call(const void* work, int64_t part, int64_t thread) {
        (*static_cast<const Work*>(work))(part, thread);
    }
    void share(int64_t parts, Function function, const void* work);
    Helpers* helpers_;
};

}  // namespace parapolicy
