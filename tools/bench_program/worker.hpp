// What the contenders of tools/bench have in common.
#pragma once

#include <unistd.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace bench {

/// Where etcd is, and for how long and how many a work is to be done.
struct Job {
  std::string contender, work;
  std::string url;  // "http://127.0.0.1:port"
  double seconds{1};
  int n{1};
  std::string ca;  // a file, where the URL is https
};

/// One user of etcd, with one key. What a contender cannot do, it throws.
class Seat {
 public:
  virtual ~Seat() = default;
  virtual void get() { throw std::runtime_error("no get"); }
  virtual void put() { throw std::runtime_error("no put"); }
  /// One lock for all seats.
  virtual void lock() { throw std::runtime_error("no lock"); }
  virtual void unlock() { throw std::runtime_error("no lock"); }
  /// `arrived` is called with each event of these keys, while the seat lives.
  virtual void watch(const std::vector<std::string>&, std::function<void()>) {
    throw std::runtime_error("no watch");
  }
  /// Kept alive while the seat lives.
  virtual void grant(int /*seconds*/) { throw std::runtime_error("no lease"); }
};

inline std::string key_of(int seat) { return "bench/" + std::to_string(seat); }
inline const std::string kValue(32, 'v');
/// Another one in each process: one that ends may leave its own behind.
inline const std::string kLock = "bench-lock-" + std::to_string(getpid());
constexpr int kTtl = 60;  // of a lock, in seconds

/// Makes seats of one contender: those that share what its users would share, or one alone.
using MakeSeat = std::function<std::unique_ptr<Seat>(int number)>;
struct Contender {
  MakeSeat sharing, alone;
};
Contender ours(const Job& job);
Contender raw(const Job& job);
Contender bare(const Job& job);
Contender lock_service(const Job& job);

/// Puts all of them, in few requests, without the help of a contender.
void put_all(const Job& job, const std::vector<std::string>& keys);

}  // namespace bench
