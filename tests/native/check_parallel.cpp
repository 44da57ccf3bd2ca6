// What Python cannot make happen to csrc/cpu/parallel.cpp: tasks that fail. Run by test_threads.py; says what
// is wrong and ends with 1.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

using vila2::cpu::parallel_for;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (!condition) ++failures, std::fprintf(stderr, "not so: %s\n", what);
}

// Every task runs, once.
bool all_run(int64_t count) {
  std::vector<std::atomic<int>> ran(static_cast<size_t>(count));
  parallel_for(count, [&](int64_t i) { ran[static_cast<size_t>(i)].fetch_add(1); });
  for (const auto& times : ran) {
    if (times.load() != 1) return false;
  }
  return true;
}

template <class Error, class Body>
bool throws(int64_t count, const Body& body) {
  try {
    parallel_for(count, body);
  } catch (const Error&) {
    return true;
  }
  return false;
}

void check_failing_tasks(int threads) {
  vila2::cpu::set_num_threads(threads);
  for (int64_t bad = 0; bad < 200; ++bad) {
    // A task in the middle, so that now the caller and now a worker meets it.
    expect(throws<std::bad_alloc>(200,
                                  [&](int64_t i) {
                                    if (i == bad) throw std::bad_alloc();
                                  }),
           "one task's exception reaches the caller");
    expect(all_run(50), "the next region runs whole");
  }
  expect(throws<std::runtime_error>(64, [](int64_t) { throw std::runtime_error("all"); }),
         "one of many exceptions reaches the caller");
  const auto too_much = [](int64_t) { vila2::cpu::thread_scratch(int64_t{1} << 61); };
  expect(throws<std::exception>(64, too_much), "scratch that nobody has is an exception");
  expect(vila2::cpu::thread_scratch(100) != nullptr && all_run(64), "and scratch of another size is there");
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 4}) check_failing_tasks(threads);
  // Callers beside each other, some of whose tasks fail: the one without the pool works alone.
  vila2::cpu::set_num_threads(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&wrong, c] {
      for (int i = 0; i < 100; ++i) {
        if (c % 2 ? !all_run(40) : !throws<int>(40, [](int64_t k) {
              if (k == 7) throw 7;
            }))
          ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  expect(wrong.load() == 0, "callers side by side do not disturb each other");
  return failures ? 1 : 0;
}
