// Transports that count, and that fail on demand, around a real one.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "../../coordination.hpp"

namespace support {

/// Counts the requests by path.
class CountingTransport : public coordination::Transport {
 public:
  explicit CountingTransport(
      std::shared_ptr<coordination::Transport> inner = coordination::make_default_transport())
      : inner_(std::move(inner)) {}

  coordination::Result<coordination::HttpResponse> perform(
      const coordination::HttpRequest& request, const coordination::ChunkSink& sink,
      const coordination::Context& ctx) override {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      ++counts_[request.path];
    }
    return inner_->perform(request, sink, ctx);
  }

  int requests() const {
    std::lock_guard<std::mutex> hold(mutex_);
    int sum = 0;
    for (const auto& [path, count] : counts_) sum += count;
    return sum;
  }
  /// All but those to this path, counted at one moment.
  int requests_but(const std::string& path) const {
    std::lock_guard<std::mutex> hold(mutex_);
    int sum = 0;
    for (const auto& [one, count] : counts_) sum += one == path ? 0 : count;
    return sum;
  }
  int requests(const std::string& path) const {
    std::lock_guard<std::mutex> hold(mutex_);
    const auto found = counts_.find(path);
    return found == counts_.end() ? 0 : found->second;
  }
  void reset() {
    std::lock_guard<std::mutex> hold(mutex_);
    counts_.clear();
  }

 private:
  std::shared_ptr<coordination::Transport> inner_;
  mutable std::mutex mutex_;
  std::map<std::string, int> counts_;
};

/// Loses requests or answers.
class FaultTransport : public coordination::Transport {
 public:
  enum class Fault { None, RefuseBefore, LoseAnswer };
  using Decide = std::function<Fault(const coordination::HttpRequest&)>;

  explicit FaultTransport(
      std::shared_ptr<coordination::Transport> inner = coordination::make_default_transport())
      : inner_(std::move(inner)) {}

  /// The next `n` requests to `path` never leave.
  void refuse_next(const std::string& path, int n = 1) { plan(path, Fault::RefuseBefore, n); }
  /// The next `n` requests to `path` are carried out, and their answers are lost.
  void lose_answers(const std::string& path, int n = 1) { plan(path, Fault::LoseAnswer, n); }
  /// Asked for every request, before the plans above.
  void decide_by(Decide decide) {
    std::lock_guard<std::mutex> hold(mutex_);
    decide_ = std::move(decide);
  }
  /// How many faults there have been.
  int faults() const { return faults_; }

  coordination::Result<coordination::HttpResponse> perform(
      const coordination::HttpRequest& request, const coordination::ChunkSink& sink,
      const coordination::Context& ctx) override {
    using coordination::Error;
    using coordination::ErrorCode;
    using coordination::Outcome;
    const Fault fault = next_fault(request);
    if (fault == Fault::None) return inner_->perform(request, sink, ctx);
    ++faults_;
    if (fault == Fault::RefuseBefore) {
      return Error{ErrorCode::Connection, "refused by the test", "", Outcome::NotApplied, 0};
    }
    auto answer = inner_->perform(request, nullptr, ctx);
    if (!answer) return answer;
    return Error{ErrorCode::Connection, "answer lost by the test", "", Outcome::MaybeApplied, 0};
  }

 private:
  void plan(const std::string& path, Fault fault, int n) {
    std::lock_guard<std::mutex> hold(mutex_);
    plans_[path] = {fault, n};
  }
  Fault next_fault(const coordination::HttpRequest& request) {
    std::lock_guard<std::mutex> hold(mutex_);
    if (decide_) {
      const Fault fault = decide_(request);
      if (fault != Fault::None) return fault;
    }
    const auto plan = plans_.find(request.path);
    if (plan == plans_.end() || plan->second.second == 0) return Fault::None;
    --plan->second.second;
    return plan->second.first;
  }

  std::shared_ptr<coordination::Transport> inner_;
  std::mutex mutex_;
  Decide decide_;
  std::map<std::string, std::pair<Fault, int>> plans_;
  std::atomic<int> faults_{0};
};

}  // namespace support
