// The library, by its public interface alone.
#include <coordination.hpp>

#include <optional>

#include "worker.hpp"

namespace bench {
namespace {

using namespace coordination;

std::shared_ptr<Coordinator> connect(const Job& job) {
  CoordinatorOptions options;
  options.endpoints = {job.url};
  options.tls.ca_file = job.ca;
  options.timeout = milliseconds(30'000);
  return std::make_shared<Coordinator>(Coordinator::connect(std::move(options)).value());
}

class Ours : public Seat {
 public:
  Ours(std::shared_ptr<Coordinator> coordinator, int number)
      : coordinator_(std::move(coordinator)), key_(key_of(number)) {}
  ~Ours() override {
    const bool many = watches_.size() + leases_.size() > 1;
    if (many) static_cast<void>(coordinator_->close());  // not one after the other
  }
  void get() override { coordinator_->client().get(key_).value(); }
  void put() override { coordinator_->client().put(key_, kValue).value(); }
  void lock() override {
    lock_.emplace(coordinator_->lock().acquire(kLock, std::chrono::seconds(kTtl)).value());
  }
  void unlock() override {
    lock_->unlock().value();
    lock_.reset();
  }
  void watch(const std::vector<std::string>& keys, std::function<void()> arrived) override {
    for (const auto& key : keys) {
      const auto handler = [arrived](const WatchEvent&) { arrived(); };
      watches_.push_back(coordinator_->client().watch(WatchRequest{key}, handler).value());
    }
  }
  void grant(int seconds) override {
    leases_.push_back(coordinator_->client().grant(std::chrono::seconds(seconds)).value());
  }

 private:
  const std::shared_ptr<Coordinator> coordinator_;
  const std::string key_;
  std::optional<Lock> lock_;
  std::vector<Subscription> watches_;
  std::vector<Lease> leases_;
};

}  // namespace

Contender ours(const Job& job) {
  const auto shared = std::make_shared<std::shared_ptr<Coordinator>>();
  return {[job, shared](int number) {
            if (!*shared) *shared = connect(job);
            return std::make_unique<Ours>(*shared, number);
          },
          [job](int number) { return std::make_unique<Ours>(connect(job), number); }};
}

}  // namespace bench
