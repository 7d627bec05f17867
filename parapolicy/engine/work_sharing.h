// Threads that take parts of a caller's work when they run. The caller does not wait for threads that are not running: it
// does the remaining parts itself, and waits only for parts that were taken. Barriers would cost time slices, tens of
// milliseconds per call, when other programs use the processor.
#pragma once
#include <cstdint>

namespace parapolicy __attribute__((visibility("hidden"))) {

constexpr int64_t MOST_PARTS = 8191, MOST_THREADS = 64;

struct Helpers;

// The helpers of one call, for its lifetime. One call at a time has helpers; concurrent calls run alone.
class WorkSharing {
   public:
    explicit WorkSharing(int64_t threads);
    ~WorkSharing();
    WorkSharing(const WorkSharing&) = delete;

  // Calls work(part, thread) once for every part below ``parts``, and returns when all are done. ``thread``: 0 for the
  // caller, below ``threads`` for helpers. With more than MOST_PARTS, the caller does all of them.
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
