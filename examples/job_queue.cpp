// job_queue: jobs are keys; who has the lock of a job does it, and takes it away under that lock. A
// worker that dies loses its lock, and another one does the job. On an etcd in memory whose time is
// set by hand, so that nobody waits.
#include <coordination.hpp>
#include <cstdio>

using namespace coordination;
using namespace std::chrono_literals;

const std::string kQueue = "/examples/queue/";

RangeRequest all_jobs() {
  RangeRequest jobs;
  jobs.key = kQueue;
  jobs.range_end = prefix_range_end(kQueue);
  return jobs;
}

// Does what nobody else does, once through the queue.
void work(Coordinator& c, const char* worker) {
  for (const KeyValue& job : c.client().range(all_jobs()).value().kvs) {
    auto lock = c.lock().try_acquire("queue/" + job.key.substr(kQueue.size()), 10s);
    if (!lock) continue;                     // somebody else is at it
    if (!c.client().get(job.key)) continue;  // or has done it since we looked
    std::printf("%s: %s\n", worker, job.value.c_str());
    auto done = lock->remove(job.key);  // refused if the lock was lost: then it is done again
    if (!done) std::printf("%s: %s\n", worker, to_string(done.error().code));
  }
}

int main() try {
  auto etcd = MemoryEtcd::manual_clock();
  CoordinatorOptions options;
  options.transport = etcd;
  options.clock = etcd->clock();
  options.endpoints = {"a:1"};
  auto a = Coordinator::connect(options).value();
  options.endpoints = {"b:1"};
  auto b = Coordinator::connect(options).value();

  for (const char* job : {"1", "2", "3"})
    a.client().put(kQueue + job, std::string("job ") + job).value();

  auto lock = a.lock().acquire("queue/2", 10s).value();  // a begins job 2, and its network dies
  etcd->partition("a:1");
  work(b, "b");
  std::printf("10 s later\n");
  etcd->advance(11s);
  work(b, "b");

  etcd->heal();
  auto late = lock.remove(kQueue + "2");  // a is back, and must not believe that it did the job
  std::printf("a: %s\n", late ? "done" : to_string(late.error().code));
  return a.client().range(all_jobs()).value().kvs.empty() ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("FAILED: %s\n", e.what());
  return 1;
}
