// Rows in parallel, on the threads that torch already has.
//
// A second pool of threads would fight torch's for the cores (its workers spin for a while after each operation), so
// Python hands over the entry point of the OpenMP runtime that torch has loaded. Without one, plain threads.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

namespace dqt {

constexpr int kMaxParts = 256;

using Region = void (*)(void*);
using Fork = void (*)(Region, void*, unsigned threads, unsigned flags);  // GOMP_parallel
using Query = int (*)();                                                  // omp_get_thread_num, omp_get_num_threads

struct Threads {
  Fork fork = nullptr;
  Query number = nullptr;
  Query team = nullptr;
  int count = 1;
};
extern Threads threads;

// Calls body(begin, end, part) for contiguous ranges that cover [0, total); no range is shorter than `grain`.
template <class Body>
void parallel_for(std::int64_t total, std::int64_t grain, const Body& body) {
  std::int64_t parts = grain > 0 ? total / grain : total;
  if (parts > threads.count) parts = threads.count;
  if (parts > kMaxParts) parts = kMaxParts;
  if (parts <= 1) {
    if (total > 0) body(std::int64_t{0}, total, 0);
    return;
  }
  struct Work {
    const Body* body;
    std::int64_t total, parts;
    void run(std::int64_t part) const {
      (*body)(total * part / parts, total * (part + 1) / parts, static_cast<int>(part));
    }
  };
  Work work{&body, total, parts};
  if (threads.fork) {
    // The runtime may give a smaller team than asked for, so each thread strides through the parts.
    const auto stride = [](void* data) {
      const auto* w = static_cast<const Work*>(data);
      for (std::int64_t part = threads.number(); part < w->parts; part += threads.team()) w->run(part);
    };
    threads.fork(stride, &work, static_cast<unsigned>(parts), 0);
    return;
  }
  std::vector<std::thread> workers;
  std::int64_t part = 1;
  try {
    for (; part < parts; ++part) workers.emplace_back([&work, part] { work.run(part); });
  } catch (...) {  // the system gives no more threads: the rest is done here
  }
  for (; part < parts; ++part) work.run(part);
  work.run(0);
  for (auto& worker : workers) worker.join();
}

}  // namespace dqt
