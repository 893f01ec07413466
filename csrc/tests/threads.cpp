// Tests of parallel_for: every index once, in order, by ranks that exist; waiting; giving up.
#include "../cpu/threads.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "tests.h"

namespace fastattn {
namespace tests {
namespace {

template <class Body>
void loop(int threads, int64_t count, Body body) {
  parallel_for(
      threads, count, [](void* context, int64_t i, int rank) { (*static_cast<Body*>(context))(i, rank); }, &body);
}

void test_every_index_once(int threads, int64_t count) {
  std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
  std::vector<int64_t> last(static_cast<size_t>(threads), -1);  // each rank's own
  loop(threads, count, [&](int64_t i, int rank) {
    CHECK(rank >= 0 && rank < threads, "rank %d of %d", rank, threads);
    CHECK(i > last[static_cast<size_t>(rank)], "index %d comes late", int(i));
    last[static_cast<size_t>(rank)] = i;
    ++visits[static_cast<size_t>(i)];
  });
  for (const auto& n : visits) CHECK(n == 1, "visited %d times", int(n));
}

// Sums that are not atomic: only the waiting makes them right, and ThreadSanitizer content.
void test_waiting(int threads) {
  constexpr int64_t kCount = 100;
  int32_t turn = 0;
  int64_t sum = 0;
  loop(threads, kCount, [&](int64_t i, int) {
    wait_until(&turn, int32_t(i));
    sum = sum * 3 % 1000003 + i;
    __atomic_store_n(&turn, int32_t(i) + 1, __ATOMIC_RELEASE);
  });
  int64_t expected = 0;
  for (int64_t i = 0; i < kCount; ++i) expected = expected * 3 % 1000003 + i;
  CHECK(sum == expected, "%d threads out of order", threads);
}

void test_giving_up(int threads) {
  constexpr int64_t kCount = 1 << 20;
  std::atomic<int64_t> done{0};
  {
    Interruption interruption([] { return true; });
    loop(threads, kCount, [&](int64_t, int) {
      ++done;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    CHECK(interruption.happened() && done > 0 && done < kCount, "%d of the indices were done", int(done));
    const int64_t before = done;
    loop(threads, kCount, [&](int64_t, int) { ++done; });
    CHECK(done == before, "a later loop went on");
  }
  done = 0;
  loop(threads, 1000, [&](int64_t, int) { ++done; });
  CHECK(done == 1000, "after an interruption %d of 1000", int(done));
  {
    Interruption interruption([] { return false; });
    loop(threads, 1000, [&](int64_t, int) { ++done; });
    CHECK(!interruption.happened() && done == 2000, "nobody asked to give up");
  }
}

}  // namespace

void test_threads() {
  for (int threads : {1, 2, 3, 8}) {
    for (int64_t count : {0, 1, 2, 7, 1000}) test_every_index_once(threads, count);
    test_waiting(threads);
    test_giving_up(threads);
  }
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) callers.emplace_back([] { test_every_index_once(2, 500); });
  for (std::thread& caller : callers) caller.join();
}

}  // namespace tests
}  // namespace fastattn
