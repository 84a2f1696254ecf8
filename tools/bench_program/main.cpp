// bench_worker CONTENDER WORK URL SECONDS N [CA]: does one work in a process of its own, and
// prints its figures, "name value" a line. tools/bench runs it, and a program in Go like it.
#include <dlfcn.h>
#include <openssl/ssl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <new>
#include <thread>

#include "worker.hpp"

namespace {
std::atomic<bool> counting{false};
std::atomic<long> allocations{0}, handshakes{0};
}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  if (counting.load(std::memory_order_relaxed)) ++allocations;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

// In front of OpenSSL's: one for each connection that begins with a handshake.
extern "C" SSL* SSL_new(SSL_CTX* context) {
  static const auto next = reinterpret_cast<SSL* (*)(SSL_CTX*)>(dlsym(RTLD_NEXT, "SSL_new"));
  ++handshakes;
  return next(context);
}

namespace bench {
namespace {

using SteadyClock = std::chrono::steady_clock;
using std::chrono::milliseconds;

double seconds_since(SteadyClock::time_point start) {
  return std::chrono::duration<double>(SteadyClock::now() - start).count();
}
void sleep_for(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}
double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto of = [](const timeval& t) { return double(t.tv_sec) + double(t.tv_usec) / 1e6; };
  return of(usage.ru_utime) + of(usage.ru_stime);
}
double status_number(const std::string& name) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.compare(0, name.size() + 1, name + ":") == 0) {
      return std::stod(line.substr(name.size() + 1));
    }
  }
  return 0;
}

void say(const char* name, double value) { std::printf("%s %.6g\n", name, value); }
void say_times(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double p) {
    return 1e6 * seconds.at(static_cast<std::size_t>(p * double(seconds.size())));
  };
  say("p50", at(0.5));
  say("p99", at(0.99));
}

using Call = std::function<void(Seat&)>;

void say_allocations(const Call& call, Seat& seat) {
  constexpr int kCalls = 50;
  counting = true;
  for (int i = 0; i < kCalls; ++i) call(seat);
  counting = false;
  say("allocations", double(allocations) / kCalls);
}

/// As many calls as can be made, by n threads.
void calls(const Job& job, const Contender& contender, const Call& call) {
  std::vector<std::unique_ptr<Seat>> seats;
  for (int i = 0; i < job.n; ++i) {
    seats.push_back(contender.sharing(i));
    if (job.work == "get") seats.back()->put();
    for (int k = 0; k < 5; ++k) call(*seats.back());
  }
  std::vector<std::vector<double>> times(seats.size());
  const long handshakes_before = handshakes;
  const double cpu = cpu_seconds();
  const auto start = SteadyClock::now();
  const auto work = [&](std::size_t i) {
    do {
      const auto begin = SteadyClock::now();
      call(*seats[i]);
      times[i].push_back(seconds_since(begin));
    } while (seconds_since(start) < job.seconds);
  };
  std::vector<std::thread> threads;
  for (std::size_t i = 1; i < seats.size(); ++i) threads.emplace_back(work, i);
  work(0);
  for (auto& thread : threads) thread.join();
  const double took = seconds_since(start), used = cpu_seconds() - cpu;
  std::vector<double> all;
  for (const auto& some : times) all.insert(all.end(), some.begin(), some.end());
  const auto n = double(all.size());
  say("rate", n / took);
  say("cpu", 1e6 * used / n);
  say("handshakes", double(handshakes - handshakes_before) / n);
  say_times(std::move(all));
  if (job.n == 1) say_allocations(call, *seats[0]);
}

void get(const Job& job, const Contender& contender) {
  calls(job, contender, [](Seat& seat) { seat.get(); });
}
void put(const Job& job, const Contender& contender) {
  calls(job, contender, [](Seat& seat) { seat.put(); });
}
void lock(const Job& job, const Contender& contender) {
  calls(job, contender, [](Seat& seat) {
    seat.lock();
    seat.unlock();
  });
}
/// From nothing to the first answer, and to nothing again.
void connect(const Job& job, const Contender& contender) {
  calls(job, contender, [&](Seat&) { contender.alone(1)->put(); });
}

/// How often a second a lock has another owner than before, among n that want it.
void handover(const Job& job, const Contender& contender) {
  std::vector<std::unique_ptr<Seat>> seats;
  for (int i = 0; i < job.n; ++i) seats.push_back(contender.alone(i));
  std::atomic<bool> stop{false};
  std::atomic<int> handovers{0}, acquired{0}, last{-1};
  const auto contend = [&](int me) {
    auto& seat = *seats[static_cast<std::size_t>(me)];
    while (!stop) {
      seat.lock();
      ++acquired;
      if (last.exchange(me) != me) ++handovers;
      seat.unlock();
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < job.n; ++i) threads.emplace_back(contend, i);
  sleep_for(job.seconds / 4);  // all of them are there
  const int handovers_before = handovers, acquired_before = acquired;
  const long handshakes_before = handshakes;
  const auto start = SteadyClock::now();
  do {
    sleep_for(job.seconds);
  } while (acquired < acquired_before + 3);
  say("rate", (handovers - handovers_before) / seconds_since(start));
  say("handshakes", double(handshakes - handshakes_before) / (acquired - acquired_before));
  stop = true;
  for (auto& thread : threads) thread.join();
}

/// From unlock() to the return of a lock() that has waited for n ms.
void waiter(const Job& job, const Contender& contender) {
  const auto holder = contender.alone(0), waiting = contender.alone(1);
  std::vector<double> times;
  const auto begin = SteadyClock::now();
  do {
    holder->lock();
    SteadyClock::time_point got;
    std::thread thread([&] {
      waiting->lock();
      got = SteadyClock::now();
      waiting->unlock();
    });
    std::this_thread::sleep_for(milliseconds(job.n));
    const auto start = SteadyClock::now();
    holder->unlock();
    thread.join();
    times.push_back(std::chrono::duration<double>(got - start).count());
  } while (times.size() < 3 || seconds_since(begin) < job.seconds);
  say_times(std::move(times));
}

/// Events, counted; the time of the last.
class Arrivals {
 public:
  void add() {
    const auto now = SteadyClock::now();
    std::lock_guard<std::mutex> hold(mutex_);
    ++count_;
    last_ = now;
    changed_.notify_all();
  }
  /// The time at which there were `count`, if that was within the limit.
  SteadyClock::time_point wait(int count, double seconds = 60) {
    std::unique_lock<std::mutex> hold(mutex_);
    if (!changed_.wait_for(hold, std::chrono::duration<double>(seconds),
                           [&] { return count_ >= count; })) {
      throw std::runtime_error("events are missing");
    }
    return last_;
  }
  int count() {
    std::lock_guard<std::mutex> hold(mutex_);
    return count_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_{0};
  SteadyClock::time_point last_;
};

/// From put() to the event, in another thread, beside n - 1 other watches.
void event(const Job& job, const Contender& contender) {
  Arrivals arrivals;
  const auto writer = contender.alone(0), watcher = contender.alone(1);
  std::vector<std::string> keys{key_of(0)};
  for (int i = 1; i < job.n; ++i) keys.push_back("other/" + std::to_string(i));
  watcher->watch(keys, [&] { arrivals.add(); });
  sleep_for(std::min(1.5, job.seconds));  // whatever goes on after a watch has begun
  std::vector<double> times;
  const auto begin = SteadyClock::now();
  do {
    const int before = arrivals.count();
    const auto start = SteadyClock::now();
    writer->put();
    times.push_back(std::chrono::duration<double>(arrivals.wait(before + 1) - start).count());
    sleep_for(0.001);
  } while (seconds_since(begin) < job.seconds);
  say_times(std::move(times));
}

/// Until each of n watches has had its first event: so every one of them is confirmed.
void watches(const Job& job, const Contender& contender) {
  Arrivals arrivals;
  const auto seat = contender.alone(0);
  std::vector<std::string> keys;
  for (int i = 0; i < job.n; ++i) keys.push_back("many/" + std::to_string(i));
  const double before = status_number("VmRSS");
  const auto start = SteadyClock::now();
  seat->watch(keys, [&] { arrivals.add(); });
  put_all(job, keys);
  const auto end = arrivals.wait(job.n);
  say("seconds", std::chrono::duration<double>(end - start).count());
  say("mb", (status_number("VmRSS") - before) / 1024);
  say("threads", status_number("Threads"));
}

/// Client CPU while n leases are kept alive; the TTL is three times as long as it is measured, so
/// that each is renewed once.
void leases(const Job& job, const Contender& contender) {
  constexpr int kThreads = 16;
  std::vector<std::unique_ptr<Seat>> seats;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) seats.push_back(contender.sharing(t));
  const int ttl = std::max(3, static_cast<int>(3 * job.seconds));
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = t; i < job.n; i += kThreads) seats[static_cast<std::size_t>(t)]->grant(ttl);
    });
  }
  for (auto& thread : threads) thread.join();
  const double cpu = cpu_seconds();
  const auto start = SteadyClock::now();
  sleep_for(job.seconds);
  say("cpu", 1e3 * (cpu_seconds() - cpu) / seconds_since(start));
  say("threads", status_number("Threads"));
}

using Function = void (*)(const Job&, const Contender&);
const std::map<std::string, Function> kWorks{
    {"get", get},         {"put", put},           {"lock", lock},
    {"connect", connect}, {"handover", handover}, {"waiter", waiter},
    {"event", event},     {"watches", watches},   {"leases", leases}};
const std::map<std::string, Contender (*)(const Job&)> kContenders{
    {"ours", ours}, {"raw", raw}, {"bare", bare}, {"service", lock_service}};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  if (argc < 6) return std::puts("bench_worker CONTENDER WORK URL SECONDS N [CA]"), 2;
  bench::Job job{argv[1], argv[2], argv[3], std::stod(argv[4]), std::stoi(argv[5]), ""};
  if (argc > 6) job.ca = argv[6];
  try {
    const auto contender = bench::kContenders.at(job.contender)(job);
    bench::kWorks.at(job.work)(job, contender);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s %s: %s\n", argv[1], argv[2], error.what());
    _exit(1);
  }
  return 0;
}
