// A MemoryEtcd whose time stands still, several Coordinators on it, and a look at what is there.
#pragma once

#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "coordination.hpp"
#include "hook.hpp"
#include "scripted_transport.hpp"
#include "wait.hpp"

namespace support {

/// Counts requests by path, and lets a test do something before or after one, or in its place.
class Tap : public coordination::Transport {
 public:
  using Action = std::function<void(const coordination::HttpRequest&)>;
  using Judge = std::function<bool(const coordination::HttpRequest&)>;

  explicit Tap(std::shared_ptr<coordination::Transport> inner) : inner_(std::move(inner)) {}

  coordination::Result<coordination::HttpResponse> perform(
      const coordination::HttpRequest& request, const coordination::ChunkSink& sink,
      const coordination::Context& ctx) override {
    const auto [before, after] = note(request);
    if (before) before(request);
    if (loses(request)) {
      return coordination::Error{coordination::ErrorCode::Connection, "lost by the test", "",
                                 coordination::Outcome::MaybeApplied, 0};
    }
    auto response = inner_->perform(request, sink, ctx);
    if (after) after(request);
    {
      std::lock_guard<std::mutex> hold(mutex_);
      ++finished_[request.path];
    }
    return response;
  }

  /// These are called in any thread; see hang_in. Null: no more.
  template <class F>
  auto before(F action) {
    return hang_in<Action>(std::move(action), [this](Action made) { set(before_, made); });
  }
  template <class F>
  auto after(F action) {
    return hang_in<Action>(std::move(action), [this](Action made) { set(after_, made); });
  }
  /// Requests that `judge` names are lost on their way, and their sender cannot know.
  template <class F>
  auto lose_if(F judge) {
    return hang_in<Judge>(std::move(judge), [this](Judge made) { set(lost_, made); });
  }
  /// The next `n` to this path are.
  void lose(int n, const std::string& path) {
    lose_if(Judge([n, path](const coordination::HttpRequest& request) mutable {
      return request.path == path && n > 0 && n-- > 0;
    }));
  }
  int count(const std::string& path) const { return look(started_, path); }
  int finished(const std::string& path) const { return look(finished_, path); }
  int count() const {
    std::lock_guard<std::mutex> hold(mutex_);
    int sum = 0;
    for (const auto& [path, count] : started_) sum += count;
    return sum;
  }
  /// Of all paths but those of watches, which begin when they can, and of reads, by which a slow
  /// machine is asked whether it is there.
  int count_calls() const {
    std::lock_guard<std::mutex> hold(mutex_);
    int sum = 0;
    for (const auto& [path, count] : started_) {
      if (path != "/v3/watch" && path != "/v3/kv/range") sum += count;
    }
    return sum;
  }
  void reset() {
    std::lock_guard<std::mutex> hold(mutex_);
    started_.clear();
    finished_.clear();
  }

 private:
  using Counts = std::map<std::string, int>;

  template <class Function>
  void set(Function& place, const Function& made) {
    std::lock_guard<std::mutex> hold(mutex_);
    place = made;
  }
  std::pair<Action, Action> note(const coordination::HttpRequest& request) {
    std::lock_guard<std::mutex> hold(mutex_);
    ++started_[request.path];
    return {before_, after_};
  }
  bool loses(const coordination::HttpRequest& request) {
    std::lock_guard<std::mutex> hold(mutex_);
    return lost_ && lost_(request);
  }
  int look(const Counts& counts, const std::string& path) const {
    std::lock_guard<std::mutex> hold(mutex_);
    const auto found = counts.find(path);
    return found == counts.end() ? 0 : found->second;
  }

  const std::shared_ptr<coordination::Transport> inner_;
  mutable std::mutex mutex_;
  Counts started_, finished_;
  Action before_, after_;
  Judge lost_;
};

/// What handlers say, from any thread.
class Notes {
 public:
  void add(const std::string& text) {
    std::lock_guard<std::mutex> hold(mutex_);
    lines_.push_back(text);
  }
  std::vector<std::string> lines() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return lines_;
  }
  std::size_t size() const { return lines().size(); }
  bool contain(const std::string& text) const {
    for (const auto& line : lines()) {
      if (line.find(text) != std::string::npos) return true;
    }
    return false;
  }
  std::function<void(const coordination::Error&)> on_lost() {
    return [this](const coordination::Error& error) { add(to_string(error.code)); };
  }
  coordination::Logger logger() {
    return [this](coordination::LogLevel level, std::string_view message,
                  const coordination::LogFields& fields) {
      std::string line = to_string(level) + (" " + std::string(message));
      for (const auto& [name, value] : fields) line += " " + name + "=" + value;
      add(line);
    };
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> lines_;
};

class Cluster {
 public:
  const std::shared_ptr<coordination::MemoryEtcd> etcd{coordination::MemoryEtcd::manual_clock()};
  const std::shared_ptr<Tap> tap{std::make_shared<Tap>(etcd)};

  /// `name` is the endpoint that MemoryEtcd::partition() knows it by.
  coordination::CoordinatorOptions options(const std::string& name = "one") const {
    coordination::CoordinatorOptions options = options_with(tap);
    options.endpoints = {name + ":1"};
    options.clock = etcd->clock();
    if (std::getenv("COORDINATION_TEST_LOG") != nullptr) {
      options.logger = coordination::stderr_logger(coordination::LogLevel::Debug);
    }
    return options;
  }
  coordination::Coordinator connect(const std::string& name = "one") const {
    return connect_to(options(name));
  }
  void cut_off(const std::string& name) const { etcd->partition(name + ":1"); }

  /// Asks etcd past every tap and fault that counts requests of the library's.
  nlohmann::json ask(const std::string& path, const nlohmann::json& body) const {
    coordination::HttpRequest request;
    request.endpoint = "http://observer:1";
    request.path = path;
    request.body = body.dump();
    const auto response = etcd->perform(request, nullptr, {});
    REQUIRE_MESSAGE(response, text_of(response));
    REQUIRE_MESSAGE(response->status == 200, response->body);
    return nlohmann::json::parse(response->body);
  }
};

/// It has failed, and so.
template <class T>
void check_code(const coordination::Result<T>& result, coordination::ErrorCode code) {
  CHECK_FALSE(result);
  if (result) return;
  INFO(text_of(result));
  CHECK(std::string(to_string(result.error().code)) == to_string(code));
}

inline bool eventually(const std::function<bool()>& condition) {
  return wait_until(condition, lenient(5s));
}

/// A thread that is joined when it is no longer needed.
class Joined {
 public:
  explicit Joined(std::function<void()> run) : thread_(std::move(run)) {}
  Joined(Joined&&) noexcept = default;
  Joined& operator=(Joined&&) = delete;
  ~Joined() { join(); }
  void join() {
    if (thread_.joinable()) thread_.join();
  }

 private:
  std::thread thread_;
};

}  // namespace support
