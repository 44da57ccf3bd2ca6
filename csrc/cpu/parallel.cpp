#include "cpu/parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace vila2::cpu {
namespace {

std::atomic<int> thread_count{std::max(1, static_cast<int>(std::thread::hardware_concurrency()))};

struct Region {
  Task task;
  const void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<bool> has_failed{false};
  std::exception_ptr failure = nullptr;  // of the task that failed first; the caller's to throw
};

// Threads take the next task as they come free: a core that other programs slow down takes fewer. A task may
// run out of memory (thread_scratch): no exception leaves a worker, and none passes the caller before the
// workers have let go of its region. The tasks that nobody has begun then stay undone.
void work_on(Region& region) noexcept {
  try {
    for (int64_t i; (i = region.next.fetch_add(1, std::memory_order_relaxed)) < region.count;) {
      region.task(region.context, i);
    }
  } catch (...) {
    if (!region.has_failed.exchange(true)) region.failure = std::current_exception();
    region.next.store(region.count, std::memory_order_relaxed);
  }
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Workers that join a region if they get a core in time: the caller waits for those that have joined, never
// for those that have not, so a core that another program holds delays nobody.
class Pool {
 public:
  explicit Pool(int workers) {
    threads_.reserve(static_cast<size_t>(workers));
    try {
      for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { serve(); });
    } catch (...) {  // the system gives no more threads
      stop();
      throw;
    }
  }
  ~Pool() { stop(); }

  void run(Region& region) {
    region_.store(&region);
    call();
    work_on(region);
    // In the one order of these operations, a worker that joins after this finds no region, and one that
    // joined before it is counted.
    region_.store(nullptr);
    for (int spin = 0; joined_.load() > 0; ++spin) {
      if (spin < kSpins) {
        relax();
      } else {
        std::this_thread::yield();  // the worker may be waiting for this very core
      }
    }
  }

  int workers() const { return static_cast<int>(threads_.size()); }

 private:
  static constexpr int kSpins = 2000;

  void call() {
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
  }

  void stop() {
    is_ending_.store(true);
    call();
    for (std::thread& thread : threads_) thread.join();
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      // Long enough to last from one operation of a layer to the next, short enough to leave an idle core
      // idle.
      for (int spin = 0; spin < kSpins && generation_.load() == seen; ++spin) relax();
      if (generation_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      seen = generation_.load();
      if (is_ending_.load()) return;
      joined_.fetch_add(1);
      if (Region* region = region_.load()) work_on(*region);
      joined_.fetch_sub(1);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  // On lines of their own: workers spin on the first while the others change.
  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<Region*> region_{nullptr};
  std::atomic<int> joined_{0}, sleepers_{0};
  std::atomic<bool> is_ending_{false};
};

void run_on_pool(Region& region, int threads) {
  static std::mutex owner;
  static Pool* pool = nullptr;  // the last is never destroyed: its threads outlive static destructors
  static pid_t pool_process = 0;
  std::unique_lock<std::mutex> lock(owner, std::try_to_lock);
  if (!lock.owns_lock()) return work_on(region);         // another caller has the workers
  if (pool && pool_process != getpid()) pool = nullptr;  // its threads did not survive a fork: none to join
  if (!pool || pool->workers() != threads - 1) {
    delete pool;
    pool = nullptr;
    pool = new Pool(threads - 1);
    pool_process = getpid();
  }
  pool->run(region);
}

}  // namespace

void set_num_threads(int count) { thread_count.store(std::max(1, count)); }
int num_threads() { return thread_count.load(); }

void parallel_for(int64_t count, Task task, const void* context) {
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), count));
  Region region{task, context, count};
  if (threads <= 1) {
    work_on(region);
  } else {
    run_on_pool(region, num_threads());
  }
  if (region.failure) std::rethrow_exception(region.failure);
}

float* thread_scratch(int64_t count) {
  thread_local std::vector<float> buffer;
  constexpr int64_t kLine = 64 / sizeof(float);
  if (static_cast<int64_t>(buffer.size()) < count + kLine) buffer.resize(static_cast<size_t>(count + kLine));
  void* start = buffer.data();
  size_t space = buffer.size() * sizeof(float);
  return static_cast<float*>(std::align(64, static_cast<size_t>(count) * sizeof(float), start, space));
}

}  // namespace vila2::cpu
