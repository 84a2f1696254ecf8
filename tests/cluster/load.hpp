// What a program does all day, done by one Coordinator while its cluster suffers, and what became
// of it: how long nothing went, what was lost, and whether it was told the truth.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/etcd_cluster.hpp"
#include "support/live.hpp"
#include "support/watch_support.hpp"

namespace cluster {

using namespace coordination;
using namespace support;
using Time = std::chrono::steady_clock::time_point;

inline double seconds_between(Time from, Time to) {
  return std::chrono::duration<double>(to - from).count();
}

/// The longest time without a success.
class Gap {
 public:
  void begin() {
    std::lock_guard<std::mutex> hold(mutex_);
    last_ = std::chrono::steady_clock::now();
    longest_ = 0;
    count_ = 0;
  }
  void hit() {
    std::lock_guard<std::mutex> hold(mutex_);
    const auto now = std::chrono::steady_clock::now();
    longest_ = std::max(longest_, seconds_between(last_, now));
    last_ = now;
    ++count_;
  }
  int count() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return count_;
  }
  /// The one that is still open counts, too.
  double longest() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return std::max(longest_, seconds_between(last_, std::chrono::steady_clock::now()));
  }

 private:
  mutable std::mutex mutex_;
  Time last_{std::chrono::steady_clock::now()};
  double longest_{0};
  int count_{0};
};

/// Calls that are late: past their deadline by more than a tenth of a second.
class Deadlines {
 public:
  template <class Call>
  auto keep(milliseconds limit, const char* what, Call call) {
    const Stopwatch watch;
    auto result = call(Context::with_timeout(limit));
    const auto over = watch.elapsed() - limit;
    if (over > 100ms) note(what, over);
    return result;
  }
  int overrun() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return count_;
  }
  double worst() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return worst_;
  }
  std::string worst_of() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return what_;
  }

 private:
  void note(const char* what, milliseconds over) {
    std::lock_guard<std::mutex> hold(mutex_);
    ++count_;
    const double late = static_cast<double>(over.count()) / 1000;
    if (late <= worst_) return;
    worst_ = late;
    what_ = what;
  }

  mutable std::mutex mutex_;
  int count_{0};
  double worst_{0};
  std::string what_;
};

/// What writes have been told about themselves. Every value is written once at most.
class Claims {
 public:
  enum class Claim { Done, NotApplied, MaybeApplied };

  template <class T>
  bool add(const std::string& value, const Result<T>& result) {
    const bool maybe = !result && result.error().outcome == Outcome::MaybeApplied;
    std::lock_guard<std::mutex> hold(mutex_);
    claims_[value] = result ? Claim::Done : maybe ? Claim::MaybeApplied : Claim::NotApplied;
    return static_cast<bool>(result);
  }
  std::map<std::string, Claim> all() const {
    std::lock_guard<std::mutex> hold(mutex_);
    return claims_;
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, Claim> claims_;
};

/// Threads that repeat something until they are told to stop.
class Loops {
 public:
  ~Loops() { stop(); }
  void add(milliseconds pause, std::function<void()> step) {
    threads_.emplace_back([this, pause, step = std::move(step)] {
      do {
        step();
      } while (rest_until(std::chrono::steady_clock::now() + pause));
    });
  }
  /// False: it is time to stop.
  bool rest_until(Time time) {
    std::unique_lock<std::mutex> lock(mutex_);
    return !wake_.wait_until(lock, time, [this] { return stopping_; });
  }
  void stop() {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_{false};
  std::vector<std::thread> threads_;
};

/// Writes and leases without the library, by raw requests to members that are well.
class Control {
 public:
  static constexpr int kLeases = 20;

  Control(EtcdCluster& etcd, std::string prefix) : etcd_(etcd), prefix_(std::move(prefix)) {
    for (int i = 0; i < kLeases; ++i) {
      const auto reply = somebody().call("/v3/lease/grant", {{"TTL", "10"}});
      leases_.insert(gateway::number(reply.json, "ID"));
    }
    writing_.add(20ms, [this] { write(); });
    renewing_.add(2s, [this] { renew(); });
  }
  void stop_writing() { writing_.stop(); }
  /// Gives the leases back; says how many had been lost.
  int end() {
    renewing_.stop();
    renew();
    for (const auto id : leases_) somebody().revoke(id);
    return kLeases - static_cast<int>(leases_.size());
  }

  Gap& gap() { return gap_; }
  /// When etcd has answered the write of this revision.
  std::optional<Time> written_at(std::int64_t revision) const {
    std::lock_guard<std::mutex> hold(mutex_);
    const auto found = written_.find(revision);
    if (found == written_.end()) return std::nullopt;
    return found->second;
  }

 private:
  gateway::Gateway somebody() const {
    const auto well = etcd_.well();
    return etcd_.gateway(well.empty() ? 0 : well[0]);
  }
  void write() {
    ++count_;
    const std::string value = "control-" + std::to_string(count_);
    const std::string key = prefix_ + (count_ % 2 == 0 ? "/config/control" : "/raw/control");
    const gateway::Json body{{"key", gateway::b64(key)}, {"value", gateway::b64(value)}};
    const auto reply = somebody().post("/v3/kv/put", body.dump(), Context::with_timeout(500ms));
    if (reply.status != 200) return;
    gap_.hit();
    std::lock_guard<std::mutex> hold(mutex_);
    written_[reply.revision()] = std::chrono::steady_clock::now();
  }
  void renew() {
    std::string body;
    for (const auto id : leases_) body += gateway::Json{{"ID", std::to_string(id)}}.dump() + "\n";
    auto request = somebody().request("/v3/lease/keepalive", body);
    request.headers.emplace_back("Connection", "close");
    const auto reply = somebody().transport().perform(request, nullptr, Context::with_timeout(2s));
    std::istringstream lines(reply ? reply->body : "");
    for (std::string line; std::getline(lines, line);) {
      const auto json = gateway::Json::parse(line, nullptr, false);
      if (!json.is_object() || !json.contains("result")) continue;
      const auto& result = json["result"];
      if (gateway::number(result, "TTL") <= 0) leases_.erase(gateway::number(result, "ID"));
    }
  }

  EtcdCluster& etcd_;
  const std::string prefix_;
  int count_{0};
  std::set<std::int64_t> leases_;
  Gap gap_;
  mutable std::mutex mutex_;
  std::map<std::int64_t, Time> written_;
  Loops writing_, renewing_;
};

/// What a watch has delivered, and how late.
class Watcher {
 public:
  /// `next` is called again and again.
  template <class Event>
  Watcher(Loops& loops, Result<Watch<Event>> watch)
      : watch_(std::make_shared<Watch<Event>>(std::move(watch).value())) {
    loops.add(0ms, [this] {
      auto event = static_cast<Watch<Event>*>(watch_.get())->next(Context::with_timeout(200ms));
      if (event) return arrived(change_of(*event));
      if (event.error().code == ErrorCode::Timeout) return;
      failure_ = to_string(event.error());
      std::this_thread::sleep_for(50ms);
    });
  }
  bool has_reached(std::int64_t revision) const { return revision_ >= revision; }
  std::vector<std::pair<Change, Time>> arrivals() const { return arrivals_.all(); }
  std::string failure() const { return failure_; }  // after the loops have stopped

 private:
  void arrived(Change change) {
    revision_ = change.revision;
    arrivals_.add({std::move(change), std::chrono::steady_clock::now()});
  }

  std::shared_ptr<void> watch_;
  std::atomic<std::int64_t> revision_{0};
  Journal<std::pair<Change, Time>> arrivals_;
  std::string failure_;
};

/// Of one round of one scenario.
struct Outcomes {
  double read{0}, read_1s{0};                   // longest gaps, in seconds
  double write{0}, write_2s{0}, new_writes{0};  // the last one: of writes begun every 0.15 s
  double newcomers{0};                          // of programs that connect and read
  double control{0};                            // of writes without the library
  double watch{0}, idle_watch{0};               // how long after its write an event came
  int locks{0}, locks_kept{0}, control_lost{0}, lies_of_locks{0}, registrations{0};
  int overrun{0};
  double worst_overrun{0};
  std::string worst_call;
  int events{0}, lost{0}, repeated{0}, reordered{0};
  int writes{0}, maybe{0}, lies{0};
  int keys_left{0}, leases_left{0};
  std::vector<std::string> notes;
};

/// One Coordinator with all endpoints at work, one that only watches, and the control.
class Load {
 public:
  Load(EtcdCluster& etcd, std::vector<std::string> endpoints)
      : etcd_(etcd), options_(options_with(std::move(endpoints))), control_(etcd, prefix()) {
    start_revision_ = etcd_.gateway(etcd_.well().at(0)).revision();
    leases_before_ = leases() - Control::kLeases;
    busy_.emplace(connect(options_));
    idle_.emplace(connect(options_));
    hold_things();
    watch_things();
    watched_from_ = etcd_.gateway(etcd_.well().at(0)).revision();
    read_and_write();
  }

  /// The id of the member in use; 0 if none answers.
  std::uint64_t member_in_use() {
    auto status = busy_->client().status(Context::with_timeout(2s));
    return status ? status->member_id : 0;
  }
  /// Waits until everything has gone well a few times, and measures from then on.
  bool warm_up(milliseconds limit = 20s) {
    begin();
    const bool warm = moves_on(limit);
    begin();
    return warm;
  }
  /// Waits until everything has gone well again.
  bool moves_on(milliseconds limit = 20s) {
    std::map<Gap*, int> before;
    for (Gap* gap : gaps()) before[gap] = gap->count();
    const auto again = [&] {
      for (const auto& [gap, count] : before) {
        if (gap->count() < count + 3) return false;
      }
      return true;
    };
    return wait_until(again, lenient(limit));
  }

  /// Stops, looks at what is there, and closes. The cluster must be well.
  Outcomes end() {
    Outcomes out;
    measure(out);
    control_.stop_writing();
    writers_.stop();
    look_at_watches(out);
    look_at_leases(out);
    loops_.stop();
    compare_with_history(out);
    close(out);
    return out;
  }

  const std::string& prefix() const { return options_.key_prefix; }

 private:
  static constexpr int kLocks = 6;
  static constexpr int kRegistrations = 3;

  static CoordinatorOptions options_with(std::vector<std::string> endpoints) {
    CoordinatorOptions options;
    options.endpoints = std::move(endpoints);
    options.key_prefix = unique_prefix();
    if (std::getenv("COORDINATION_TEST_LOG") != nullptr) {
      options.logger = stderr_logger(LogLevel::Debug);
    }
    return options;
  }

  void hold_things() {
    for (int i = 0; i < kLocks; ++i) {
      locks_.push_back(busy_->lock().acquire("lock" + std::to_string(i), 10s).value());
    }
    leadership_.emplace(busy_->election().campaign("office", "us", 10s).value());
    for (int i = 0; i < kRegistrations; ++i) {
      busy_->registry()
          .register_service({"id" + std::to_string(i), "svc", "127.0.0.1", 80 + i, {}, 10s})
          .value();
    }
  }
  void watch_things() {
    const std::string raw = prefix() + "/raw/";
    WatchRequest request;
    request.key = raw;
    request.range_end = prefix_range_end(raw);
    watchers_.emplace_back(loops_, busy_->config().watch_prefix(""));
    watchers_.emplace_back(loops_, busy_->client().watch(request));
    watchers_.emplace_back(loops_, idle_->client().watch(request));
  }
  void read_and_write() {
    busy_->client().put(prefix() + "/read", "this").value();
    read_every(read_, 5s, "get within 5 s");
    read_every(read_1s_, 1s, "get within 1 s");
    write_every(20ms, write_, 5s, "/config/w5", "set within 5 s");
    write_every(20ms, write_2s_, 2s, "/raw/w2", "put within 2 s");
    constexpr int kWriters = 30;  // so many that one is free at every tick, though others hang
    for (int i = 0; i < kWriters; ++i) {
      writers_.add(0ms, [this] { write_at_next_tick(); });
    }
    writers_.add(50ms, [this] { wait_for_a_lock(); });
    writers_.add(250ms, [this] { come_new(); });
  }
  void read_every(Gap& gap, milliseconds limit, const char* what) {
    writers_.add(20ms, [this, &gap, limit, what] {
      const auto key = prefix() + "/read";
      const auto got = deadlines_.keep(
          limit, what, [&](const Context& ctx) { return busy_->client().get(key, ctx); });
      if (got) gap.hit();
    });
  }
  void write_every(milliseconds pause, Gap& gap, milliseconds limit, const std::string& key,
                   const char* what) {
    writers_.add(pause, [this, &gap, limit, key, what] { write(gap, limit, key, what); });
  }
  void write(Gap& gap, milliseconds limit, const std::string& key, const char* what) {
    const std::string value = key.substr(key.rfind('/') + 1) + "-" + std::to_string(++values_);
    const std::string config = "/config/";
    const bool is_config = key.compare(0, config.size(), config) == 0;
    const auto done = deadlines_.keep(limit, what, [&](const Context& ctx) -> Result<void> {
      if (is_config) {
        auto set = busy_->config().set(key.substr(config.size()), value, ctx);
        return set ? Result<void>() : Result<void>(set.error());
      }
      auto put = busy_->client().put(prefix() + key, value, ctx);
      return put ? Result<void>() : Result<void>(put.error());
    });
    if (claims_.add(value, done)) gap.hit();
  }
  /// A write begins every 0.15 s, whatever has become of those before it.
  void write_at_next_tick() {
    Time mine;
    {
      std::lock_guard<std::mutex> hold(tick_mutex_);
      mine = std::max(tick_ + 150ms, std::chrono::steady_clock::now());
      tick_ = mine;
    }
    if (writers_.rest_until(mine)) write(new_writes_, 5s, "/raw/new", "put within 5 s");
  }
  /// A program that begins now, and reads.
  void come_new() {
    auto newcomer = deadlines_.keep(5s, "connect within 5 s", [&](const Context& ctx) {
      return Coordinator::connect(options_, ctx);
    });
    if (!newcomer) return;
    const auto got = deadlines_.keep(5s, "a first get within 5 s", [&](const Context& ctx) {
      return newcomer->client().get(prefix() + "/read", ctx);
    });
    if (got) newcomers_.hit();
  }
  void wait_for_a_lock() {
    auto lock = deadlines_.keep(2s, "acquire within 2 s", [&](const Context& ctx) {
      return busy_->lock().acquire("lock0", 10s, ctx);
    });
    static_cast<void>(lock);  // if it was lost by its holder, it is given back at once
  }

  std::vector<Gap*> gaps() {
    return {&read_, &read_1s_, &write_, &write_2s_, &new_writes_, &newcomers_};
  }
  void begin() {
    begin_ = std::chrono::steady_clock::now();
    for (Gap* gap : gaps()) gap->begin();
    control_.gap().begin();
  }
  void measure(Outcomes& out) {
    out.read = read_.longest();
    out.read_1s = read_1s_.longest();
    out.write = write_.longest();
    out.write_2s = write_2s_.longest();
    out.new_writes = new_writes_.longest();
    out.newcomers = newcomers_.longest();
    out.control = control_.gap().longest();
    out.overrun = deadlines_.overrun();
    out.worst_overrun = deadlines_.worst();
    out.worst_call = deadlines_.worst_of();
  }

  /// All events that were delivered, or will not be any more.
  void look_at_watches(Outcomes& out) {
    const gateway::Gateway well = etcd_.gateway(etcd_.well().at(0));
    const auto raw = well.put(prefix() + "/raw/end", "end").revision();
    const auto config = well.put(prefix() + "/config/end", "end").revision();
    const std::int64_t last[] = {config, raw, raw};
    const char* const names[] = {"config watch", "raw watch", "idle watch"};
    const Stopwatch since;
    for (std::size_t i = 0; i < watchers_.size(); ++i) {
      const auto reached = [&] { return watchers_[i].has_reached(last[i]); };
      if (!wait_until(reached, 30s)) out.notes.push_back(std::string(names[i]) + " is behind");
      double& late = i == 2 ? out.idle_watch : out.watch;
      late = std::max(late, since.seconds());
    }
  }
  void look_at_leases(Outcomes& out) {
    const gateway::Gateway well = etcd_.gateway(etcd_.well().at(0));
    const auto owned = [&](const std::string& key, std::int64_t token) {
      const auto kvs = well.get(key).json.value("kvs", gateway::Json::array());
      return !kvs.empty() && gateway::number(kvs[0], "create_revision") == token;
    };
    const auto judge = [&](const auto& held) {
      const auto truthful = [&] { return held.held() == owned(held.key(), held.fencing_token()); };
      ++out.locks;
      if (held.held()) ++out.locks_kept;
      if (!wait_until(truthful, 5s)) ++out.lies_of_locks;
    };
    for (const auto& lock : locks_) judge(lock);
    judge(*leadership_);
    const auto registered = [&] {
      out.registrations = static_cast<int>(keys_below(well, "/services/svc/"));
      return out.registrations == kRegistrations;
    };
    wait_until(registered, 15s);
    out.control_lost = control_.end();
  }
  std::int64_t keys_below(const gateway::Gateway& well, const std::string& part) const {
    const std::string key = prefix() + part;
    const auto reply = well.range({{"key", gateway::b64(key)},
                                   {"range_end", gateway::b64(prefix_range_end(key))},
                                   {"count_only", true}});
    return gateway::number(reply.json, "count");
  }

  void compare_with_history(Outcomes& out) {
    const auto history = read_history();
    const auto part = [&](const std::string& of) {
      std::vector<Change> changes;
      for (const auto& change : history) {
        if (change.key.compare(0, of.size(), of) == 0) changes.push_back(change);
      }
      return changes;
    };
    const auto raw = part(prefix() + "/raw/");
    compare(out, as_config(part(prefix() + "/config/")), watchers_[0], out.watch);
    compare(out, raw, watchers_[1], out.watch);
    compare(out, raw, watchers_[2], out.idle_watch);
    judge_claims(out, history);
  }
  /// Every change since the beginning, as a member tells it.
  std::vector<Change> read_history() {
    const gateway::Gateway well = etcd_.gateway(etcd_.well().at(0));
    const std::string all = prefix() + "/";
    const auto end = well.put(all + "history", "end").revision();
    gateway::WatchCall call(
        well, {gateway::create_request(1, all,
                                       {{"range_end", gateway::b64(prefix_range_end(all))},
                                        {"start_revision", std::to_string(start_revision_ + 1)}})});
    const auto complete = [end](const std::vector<gateway::Json>& lines) {
      if (lines.empty() || !lines.back().contains("result")) return false;
      const auto events = lines.back()["result"].value("events", gateway::Json::array());
      return !events.empty() && change_in(events.back()).revision >= end;
    };
    if (!call.lines().wait(complete, 20s)) throw std::runtime_error("no history can be had");
    std::vector<Change> changes;
    for (const auto& event : call.events(1, 1)) changes.push_back(change_in(event));
    return changes;
  }
  static Change change_in(const gateway::Json& event) {
    const bool put = event.value("type", "PUT") != "DELETE";
    const auto& kv = event["kv"];
    return {put, gateway::unb64(kv.value("key", "")), gateway::unb64(kv.value("value", "")),
            gateway::number(kv, "mod_revision")};
  }
  /// As ConfigCenter tells it.
  std::vector<Change> as_config(std::vector<Change> changes) const {
    for (auto& change : changes) {
      change.key.erase(0, (prefix() + "/config/").size());
      if (change.put) change.value = nlohmann::json(change.value).dump();
    }
    return changes;
  }
  void compare(Outcomes& out, const std::vector<Change>& history, const Watcher& watcher,
               double& late) const {
    std::map<std::int64_t, Change> missing;
    for (const auto& change : history) missing[change.revision] = change;
    std::int64_t last = 0;
    for (const auto& [change, at] : watcher.arrivals()) {
      if (change.revision < last) ++out.reordered;
      last = std::max(last, change.revision);
      const auto found = missing.find(change.revision);
      if (found == missing.end() || found->second != change) {
        ++out.repeated;  // or never written
        continue;
      }
      missing.erase(found);
      ++out.events;
      const auto written = control_.written_at(change.revision);
      if (written && *written > begin_) late = std::max(late, seconds_between(*written, at));
    }
    for (const auto& entry : missing) out.lost += entry.first > watched_from_;
    if (!watcher.failure().empty()) out.notes.push_back("a watch said " + watcher.failure());
  }
  void judge_claims(Outcomes& out, const std::vector<Change>& history) const {
    std::map<std::string, int> times;
    for (const auto& change : history) ++times[change.value];
    for (const auto& [value, claim] : claims_.all()) {
      const int seen = times[value];
      const bool right = claim == Claims::Claim::Done         ? seen == 1
                         : claim == Claims::Claim::NotApplied ? seen == 0
                                                              : seen <= 1;
      ++out.writes;
      out.maybe += claim == Claims::Claim::MaybeApplied;
      if (right) continue;
      if (++out.lies > 3) continue;
      out.notes.push_back(value + " is there " + std::to_string(seen) + " times");
    }
  }
  /// Nothing that hangs on a lease is left.
  void close(Outcomes& out) {
    busy_->close().value();
    idle_->close().value();
    const gateway::Gateway well = etcd_.gateway(etcd_.well().at(0));
    const auto none = [&] {
      out.keys_left =
          static_cast<int>(keys_below(well, "/locks/") + keys_below(well, "/elections/") +
                           keys_below(well, "/services/"));
      return out.keys_left == 0;
    };
    wait_until(none, 3s);
    out.leases_left = std::max(0, leases() - leases_before_);
  }
  int leases() const {
    const auto reply = etcd_.ask(etcd_.well().at(0), "/v3/lease/leases", gateway::Json::object());
    return static_cast<int>(reply.json.value("leases", gateway::Json::array()).size());
  }

  EtcdCluster& etcd_;
  const CoordinatorOptions options_;
  Control control_;
  std::int64_t start_revision_{0}, watched_from_{0};
  int leases_before_{0};  // of others, some of which may be about to run out
  Time begin_{};
  std::optional<Coordinator> busy_, idle_;
  std::vector<Lock> locks_;
  std::optional<Leadership> leadership_;

  Gap read_, read_1s_, write_, write_2s_, new_writes_, newcomers_;
  Deadlines deadlines_;
  Claims claims_;
  std::atomic<int> values_{0};
  std::mutex tick_mutex_;
  Time tick_{};
  std::deque<Watcher> watchers_;
  Loops loops_, writers_;  // the last: they end before what they use
};

}  // namespace cluster
