#include "cpu/parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
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
};

// Threads take the next task as they come free: a core that other programs slow down takes fewer.
void work_on(void* region_pointer) {
  Region& region = *static_cast<Region*>(region_pointer);
  for (int64_t i; (i = region.next.fetch_add(1, std::memory_order_relaxed)) < region.count;) {
    region.task(region.context, i);
  }
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp_parallel() {
  const char* forced = std::getenv("VILA2_CPU_POOL");
  if (forced && std::string(forced) == "own") return nullptr;
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

GompParallel gomp_parallel() {
  static const GompParallel found = find_gomp_parallel();
  return found;
}

// Workers that sleep between regions, after a short spin that covers the gap between two operations of a
// layer.
class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) std::thread([this] { serve(); }).detach();
    workers_ = workers;
  }

  void run(Region& region) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      region_ = &region;
      busy_ = workers_;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work_on(&region);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  int workers() const { return workers_; }

 private:
  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < 4096 && generation_.load(std::memory_order_acquire) == seen; ++spin) {
      }
      Region* region;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        region = region_;
      }
      work_on(region);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  Region* region_ = nullptr;
  int workers_ = 0, busy_ = 0;
};

void run_on_own_pool(Region& region, int threads) {
  static std::mutex owner;
  static Pool* pool = nullptr;  // never destroyed: its threads outlive static destructors
  static pid_t pool_process = 0;
  std::unique_lock<std::mutex> lock(owner, std::try_to_lock);
  if (!lock.owns_lock()) return work_on(&region);  // another caller has the workers
  if (!pool || pool_process != getpid() || pool->workers() != threads - 1) {  // threads do not survive a fork
    pool = new Pool(threads - 1);
    pool_process = getpid();
  }
  pool->run(region);
}

}  // namespace

void set_num_threads(int count) { thread_count.store(std::max(1, count)); }
int num_threads() { return thread_count.load(); }
const char* thread_pool() { return gomp_parallel() ? "openmp" : "own"; }

void parallel_for(int64_t count, Task task, const void* context) {
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), count));
  Region region{task, context, count};
  if (threads <= 1) {
    work_on(&region);
  } else if (const GompParallel parallel = gomp_parallel()) {
    // The full team even for fewer tasks: a team of another size would be rebuilt by the runtime.
    parallel(work_on, &region, static_cast<unsigned>(num_threads()), 0);
  } else {
    run_on_own_pool(region, num_threads());
  }
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
