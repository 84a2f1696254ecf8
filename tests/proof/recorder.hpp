// Every change of a store, read from etcd's own watch by raw requests: nothing of the library but
// bytes over HTTP.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "history.hpp"
#include "support/etcd_cluster.hpp"

namespace proof {

using namespace std::chrono_literals;

/// Follows the cluster from the first revision on, from one member to the next.
class Recorder {
 public:
  explicit Recorder(support::EtcdCluster& etcd) : etcd_(etcd), thread_([this] { follow(); }) {}
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;
  ~Recorder() {
    stopping_ = true;
    {
      std::lock_guard<std::mutex> hold(mutex_);
      attempt_.cancel();
    }
    thread_.join();
  }

  /// All changes up to this one are known.
  std::int64_t revision() const { return revision_; }
  bool wait_for(std::int64_t revision) {
    return support::wait_until([&] { return revision_ >= revision; }, kPatience);
  }
  std::vector<Change> changes() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return changes_;
  }
  /// The keys under a prefix.
  std::map<std::string, Change> state(const std::string& prefix) const {
    std::map<std::string, Change> state;
    for (const Change& change : changes()) {
      if (!begins_with(change.key, prefix)) continue;
      if (change.put) state[change.key] = change;
      if (!change.put) state.erase(change.key);
    }
    return state;
  }

 private:
  void follow() {
    for (std::size_t i = 0; !stopping_; ++i) {
      const auto well = etcd_.well();
      if (!well.empty()) read_from(well[i % well.size()]);
      if (!stopping_) std::this_thread::sleep_for(20ms);
    }
  }
  void read_from(std::size_t member) {
    const auto gateway = etcd_.gateway(member);
    const Json all{{"range_end", gateway::b64(std::string(1, '\0'))},
                   {"start_revision", std::to_string(revision_ + 1)}};
    const auto order = gateway::create_request(0, std::string(1, '\0'), all);
    auto request = gateway.request("/v3/watch", order.dump() + "\n");
    request.headers.emplace_back("Connection", "close");
    request.idle_timeout = 3s;  // somebody always writes
    std::string rest;
    const auto sink = [&](std::string_view piece) {
      rest += piece;
      for (std::size_t end; (end = rest.find('\n')) != std::string::npos; rest.erase(0, end + 1)) {
        if (!take(Json::parse(rest.substr(0, end), nullptr, false))) return false;
      }
      return !stopping_;
    };
    static_cast<void>(gateway.transport().perform(request, sink, new_attempt()));
  }
  coordination::Context new_attempt() {
    std::lock_guard<std::mutex> hold(mutex_);
    attempt_ = coordination::Context();
    if (stopping_) attempt_.cancel();
    return attempt_;
  }
  bool take(const Json& line) {
    if (!line.is_object() || !line.contains("result")) return false;
    const Json& result = line["result"];
    if (result.value("canceled", false)) return false;
    std::lock_guard<std::mutex> hold(mutex_);
    for (const Json& event : result.value("events", Json::array())) {
      changes_.push_back(change_of(event));
    }
    if (!changes_.empty()) revision_ = changes_.back().revision;
    return true;
  }
  static Change change_of(const Json& event) {
    const Json& kv = event["kv"];
    Change change;
    change.revision = gateway::number(kv, "mod_revision");
    change.created = gateway::number(kv, "create_revision");
    change.put = event.value("type", "PUT") == "PUT";
    change.key = gateway::unb64(kv["key"]);
    change.value = gateway::unb64(kv.value("value", ""));
    return change;
  }

  support::EtcdCluster& etcd_;
  mutable std::mutex mutex_;
  coordination::Context attempt_;
  std::vector<Change> changes_;
  std::atomic<std::int64_t> revision_{0};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace proof
