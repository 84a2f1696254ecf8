// What the hard tests of leases, locks, elections and registrations have in common: a second pair
// of eyes on the same etcd, harm from outside, and transports that misbehave in chosen places.
#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "live.hpp"
#include "transports.hpp"

namespace support {

inline std::string base64(const std::string& bytes) {
  static const char* const kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t group = 0;
    for (std::size_t k = 0; k < 3; ++k) {
      const auto byte = i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0U;
      group = group << 8U | byte;
    }
    for (std::size_t k = 0; k < 4; ++k) {
      text += i + k > bytes.size() ? '=' : kDigits[group >> (18 - 6 * k) & 63U];
    }
  }
  return text;
}

/// etcd's gateway by its raw paths, beside the client under test.
class Gateway {
 public:
  explicit Gateway(std::string url) : url_(std::move(url)) {}

  /// The answer; null if there was none with status 200.
  nlohmann::json post(
      const std::string& path, const nlohmann::json& body,
      const coordination::Context& ctx = coordination::Context::with_timeout(lenient(5s))) const {
    coordination::HttpRequest request;
    request.endpoint = url_;
    request.path = path;
    request.body = body.dump();
    const auto answer = transport_->perform(request, nullptr, ctx);
    if (!answer || answer->status != 200) return nullptr;
    return nlohmann::json::parse(answer->body, nullptr, false);
  }

  std::vector<std::int64_t> leases() const {
    const auto answer = post("/v3/lease/leases", nlohmann::json::object());
    if (answer.is_null()) throw std::runtime_error("etcd does not list its leases");
    std::vector<std::int64_t> ids;
    for (const auto& lease : answer.value("leases", nlohmann::json::array())) {
      ids.push_back(std::stoll(lease.at("ID").get<std::string>()));
    }
    return ids;
  }
  std::int64_t grant(int seconds) const {
    const auto answer = post("/v3/lease/grant", {{"TTL", seconds}});
    return answer.is_null() ? 0 : std::stoll(answer.at("ID").get<std::string>());
  }
  bool revoke(std::int64_t lease) const {
    return !post("/v3/lease/revoke", {{"ID", std::to_string(lease)}}).is_null();
  }
  bool has_lease(std::int64_t lease) const {
    const auto all = leases();
    return std::find(all.begin(), all.end(), lease) != all.end();
  }

 private:
  std::string url_;
  std::shared_ptr<coordination::Transport> transport_{coordination::make_default_transport()};
};

/// What is in etcd, seen by somebody else than the Coordinators under test.
class Onlooker {
 public:
  explicit Onlooker(const EtcdServer& server)
      : gateway(server.url()), coordinator(connect(plain_options(server))) {}

  /// The keys under a prefix, the oldest first.
  std::vector<coordination::KeyValue> keys(const std::string& prefix) {
    coordination::RangeRequest range{prefix};
    range.range_end = coordination::prefix_range_end(prefix);
    range.sort_order = coordination::SortOrder::Ascend;
    range.sort_target = coordination::SortTarget::Create;
    return client().range(range).value().kvs;
  }
  std::size_t count(const std::string& prefix) { return keys(prefix).size(); }
  bool wait_count(const std::string& prefix, std::size_t n, milliseconds limit = 5s) {
    return wait_until([&] { return count(prefix) == n; }, lenient(limit));
  }
  bool wait_leases(std::size_t n, milliseconds limit = 5s) {
    return wait_until([&] { return gateway.leases().size() == n; }, lenient(limit));
  }
  /// True if the key is there with this create revision.
  bool has(const std::string& key, std::int64_t token) {
    const auto kv = client().get(key);
    return kv && kv->create_revision == token;
  }
  coordination::Client& client() { return coordinator.client(); }

  Gateway gateway;
  coordination::Coordinator coordinator;

 private:
  /// Without a prefix; unlike options_for() to be called in any thread.
  static coordination::CoordinatorOptions plain_options(const EtcdServer& server) {
    coordination::CoordinatorOptions options;
    options.endpoints = {server.url()};
    return options;
  }
};

/// The etcd of the tests that count all its leases: none of them leaves any.
inline EtcdServer& lease_etcd() {
  static EtcdServer server;
  return server;
}

/// The lease in the last segment of a lock's key.
inline std::int64_t lease_of_key(const std::string& key) {
  return std::stoll(key.substr(key.rfind('/') + 1), nullptr, 16);
}

inline std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// Counts how often a loss is told.
struct LossCount {
  std::shared_ptr<std::atomic<int>> count{std::make_shared<std::atomic<int>>(0)};
  std::function<void(const coordination::Error&)> handler() const {
    return [count = count](const coordination::Error& error) {
      if (error.code == coordination::ErrorCode::Lost) ++*count;
    };
  }
  int told() const { return *count; }
  bool wait(int n, milliseconds limit = 5s) const {
    return wait_until([&] { return told() >= n; }, lenient(limit));
  }
};

/// A seed that is printed, so that a failure can be repeated: COORDINATION_TEST_SEED=n.
inline unsigned test_seed() {
  const char* given = std::getenv("COORDINATION_TEST_SEED");
  const unsigned seed = given != nullptr ? static_cast<unsigned>(std::stoul(given))
                                         : std::random_device{}() % 1000000;
  return seed;
}

/// Keeps chosen requests back. The caller hears that the connection has broken; etcd gets the
/// request when the test says so: as from a socket buffer of a process that was frozen.
class LateTransport : public coordination::Transport {
 public:
  /// The next `n` requests to `path` are kept back.
  void keep_back(const std::string& path, int n = 1) {
    std::lock_guard<std::mutex> hold(mutex_);
    path_ = path;
    left_ = n;
  }
  int kept() {
    std::lock_guard<std::mutex> hold(mutex_);
    return static_cast<int>(late_.size());
  }
  /// Sends what was kept back; how many of them etcd has taken.
  int deliver() {
    std::deque<coordination::HttpRequest> late;
    {
      std::lock_guard<std::mutex> hold(mutex_);
      late.swap(late_);
    }
    int taken = 0;
    for (const auto& request : late) {
      const auto answer =
          inner_->perform(request, nullptr, coordination::Context::with_timeout(lenient(5s)));
      if (answer && answer->status == 200) ++taken;
    }
    return taken;
  }

  coordination::Result<coordination::HttpResponse> perform(
      const coordination::HttpRequest& request, const coordination::ChunkSink& sink,
      const coordination::Context& ctx) override {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      if (left_ > 0 && request.path == path_) {
        --left_;
        late_.push_back(request);
        return coordination::Error{coordination::ErrorCode::Connection, "kept back by the test", "",
                                   coordination::Outcome::MaybeApplied, 0};
      }
    }
    return inner_->perform(request, sink, ctx);
  }

 private:
  std::shared_ptr<coordination::Transport> inner_{coordination::make_default_transport()};
  std::mutex mutex_;
  std::string path_;
  int left_{0};
  std::deque<coordination::HttpRequest> late_;
};

/// Waits for the answer to each request, whatever time it was given: of a call that has timed out
/// nothing is still on its way.
class PatientTransport : public coordination::Transport {
 public:
  coordination::Result<coordination::HttpResponse> perform(
      const coordination::HttpRequest& request, const coordination::ChunkSink& sink,
      const coordination::Context& ctx) override {
    const bool ends_by_itself = request.path != "/v3/watch";
    return inner_->perform(request, sink, ends_by_itself ? coordination::Context() : ctx);
  }

 private:
  std::shared_ptr<coordination::Transport> inner_{coordination::make_default_transport()};
};

/// Loses the answers to requests number `first` to `first + n - 1`, counted from arm(). Streams
/// that do not end by themselves are not counted.
class NthTransport : public FaultTransport {
 public:
  NthTransport() {
    decide_by([this](const coordination::HttpRequest& request) {
      if (request.path == "/v3/watch") return Fault::None;
      const int now = ++counter_;
      return now >= first_ && now < first_ + n_ ? Fault::LoseAnswer : Fault::None;
    });
  }
  void arm(int first, int n = 1) {
    first_ = first;
    n_ = n;
    counter_ = 0;
  }
  void disarm() { n_ = 0; }
  int counted() const { return counter_; }

 private:
  std::atomic<int> counter_{0}, first_{0}, n_{0};
};

/// One call of acquire, from its beginning to the end of what it has got.
struct Wish {
  coordination::Context ctx;
  bool shared{false};
  std::future<coordination::Result<coordination::Lock>> future;
  std::optional<coordination::Result<coordination::Lock>> result;
  LossCount loss;
  std::string key;
  std::int64_t token{0};

  bool ready() {
    if (result) return true;
    if (future.wait_for(0s) != std::future_status::ready) return false;
    set(future.get());
    return true;
  }
  bool wait_ready() {
    return wait_until([this] { return ready(); }, lenient(10s));
  }
  void set(coordination::Result<coordination::Lock> got) {
    result.emplace(std::move(got));
    if (*result) (*result)->on_lost(loss.handler());
  }
  bool failed_with(coordination::ErrorCode code) const {
    return !*result && result->error().code == code;
  }
};

/// A lock or semaphore, some clients who want it, and a model of their queue. Every step does
/// something to one of them and then compares: the keys in etcd with the model, and who has got
/// the lock with who should have it.
class QueueModel {
 public:
  struct Rule {
    bool shared{false};  // some want the lock shared
    int permits{0};      // > 0: it is a semaphore
  };

  /// The last of the clients is for calls that time out: one with a PatientTransport, as the key
  /// that a request makes afterwards would be taken for another's.
  QueueModel(Rule rule, std::vector<coordination::Coordinator>& clients, Onlooker& onlooker,
             const std::string& prefix, std::string name, unsigned seed)
      : rule_(rule), clients_(clients), onlooker_(onlooker), name_(std::move(name)),
        path_(prefix + (rule.permits > 0 ? "/semaphores/" : "/locks/") + name_ + "/"),
        random_(seed) {}

  /// What went wrong; "" = nothing.
  std::string run(int steps) {
    for (int i = 0; i < steps && error_.empty(); ++i) step();
    while (!queue_.empty() && error_.empty()) unlock();
    if (error_.empty() && onlooker_.count(path_) != 0) fail("a key is left at the end");
    for (auto& wish : queue_) wish->ctx.cancel();
    return error_.empty() ? "" : error_ + "; steps:" + trace_;
  }

 private:
  using WishPtr = std::shared_ptr<Wish>;
  using ErrorCode = coordination::ErrorCode;
  static constexpr milliseconds kTtl = 20s;

  std::size_t pick(std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_);
  }
  void fail(const std::string& what) {
    if (!error_.empty()) return;
    error_ = what;
    for (const auto& kv : keys()) error_ += " [" + kv.key.substr(path_.size()) + "]";
  }
  bool expect(bool good, const std::string& what) {
    if (!good) fail(what);
    return good;
  }
  std::vector<coordination::KeyValue> keys() { return onlooker_.keys(path_); }

  // The rule.

  bool would_hold(bool shared, std::size_t place) const {
    if (rule_.permits > 0) return place < static_cast<std::size_t>(rule_.permits);
    const auto end = queue_.begin() + static_cast<std::ptrdiff_t>(place);
    const auto is_shared = [](const WishPtr& wish) { return wish->shared; };
    return shared ? std::all_of(queue_.begin(), end, is_shared) : place == 0;
  }
  bool holds(std::size_t i) const { return would_hold(queue_[i]->shared, i); }
  /// The places of those who hold, or of those who wait.
  std::vector<std::size_t> places(bool holding) const {
    std::vector<std::size_t> result;
    for (std::size_t i = 0; i < queue_.size(); ++i) {
      if (holds(i) == holding) result.push_back(i);
    }
    return result;
  }
  std::size_t pick_from(const std::vector<std::size_t>& some) { return some[pick(some.size())]; }
  WishPtr take(std::size_t i) {
    const auto wish = queue_[i];
    queue_.erase(queue_.begin() + static_cast<std::ptrdiff_t>(i));
    return wish;
  }

  // The steps.

  void step() {
    const bool waiters = !places(false).empty();
    switch (pick(12)) {
      case 0:
      case 1:
      case 2: return join();
      case 3: return queue_.empty() ? join() : unlock();
      case 4: return time_out();
      case 5: return waiters ? cancel() : join();
      case 6: return waiters ? harm_waiter() : join();
      case 7: return queue_.empty() ? join() : harm_holder();
      case 8: return waiters ? race_with_cancel() : join();
      case 9: return waiters ? race_with_harm() : join();
      default: return try_it();
    }
  }

  WishPtr new_wish(coordination::Context ctx) {
    auto wish = std::make_shared<Wish>();
    wish->ctx = std::move(ctx);
    wish->shared = rule_.shared && pick(3) != 0;
    return wish;
  }
  coordination::Result<coordination::Lock> call(std::size_t client, const Wish& wish,
                                                bool only_try) {
    auto& lock = clients_[client].lock();
    if (rule_.permits > 0) {
      auto semaphore = lock.semaphore(name_, rule_.permits);
      return only_try ? semaphore.try_acquire(kTtl, wish.ctx) : semaphore.acquire(kTtl, wish.ctx);
    }
    if (wish.shared) {
      return only_try ? lock.try_acquire_shared(name_, kTtl, wish.ctx)
                      : lock.acquire_shared(name_, kTtl, wish.ctx);
    }
    return only_try ? lock.try_acquire(name_, kTtl, wish.ctx) : lock.acquire(name_, kTtl, wish.ctx);
  }
  std::size_t any_client() { return pick(clients_.size() - 1); }
  void start(const WishPtr& wish, std::size_t client) {
    wish->future =
        std::async(std::launch::async, [this, client, wish] { return call(client, *wish, false); });
  }

  /// Waits until one key more than the model's is there, and takes it for the wish's.
  bool find_place(const WishPtr& wish) {
    const bool there = wait_until([&] { return keys().size() == queue_.size() + 1; }, lenient(10s));
    if (!expect(there, "no new place in the queue")) return false;
    const auto last = keys().back();
    wish->key = last.key;
    wish->token = last.create_revision;
    queue_.push_back(wish);
    return true;
  }

  void join() {
    if (queue_.size() >= 6) return unlock();
    const auto wish = new_wish({});
    trace_ += wish->shared ? " join-shared" : " join";
    start(wish, any_client());
    if (find_place(wish)) check();
  }
  void try_it() {
    const auto wish = new_wish({});
    trace_ += wish->shared ? " try-shared" : " try";
    const bool should_get_it = would_hold(wish->shared, queue_.size());
    wish->set(call(any_client(), *wish, true));
    if (should_get_it) {
      if (!expect(wish->result->has_value(), "a try: " + why(*wish->result))) return;
      if (!find_place(wish)) return;
    } else {
      expect(wish->failed_with(ErrorCode::Conflict), "no Conflict: " + why(*wish->result));
      expect(keys().size() == queue_.size(), "a try has left its key");
    }
    check();
  }
  void time_out() {
    const auto wish = new_wish(coordination::Context::with_timeout(milliseconds(5 + pick(40))));
    if (would_hold(wish->shared, queue_.size())) return join();
    trace_ += " time-out";
    start(wish, clients_.size() - 1);
    if (!expect(wish->wait_ready(), "acquire outlives its deadline")) return;
    expect(wish->failed_with(ErrorCode::Timeout), "no Timeout: " + why(*wish->result));
    check();
  }
  void cancel() {
    const auto wish = take(pick_from(places(false)));
    trace_ += " cancel";
    wish->ctx.cancel();
    if (!expect(wish->wait_ready(), "acquire outlives its Context")) return;
    expect(wish->failed_with(ErrorCode::Cancelled), "not Cancelled: " + why(*wish->result));
    check();
  }
  void harm(const WishPtr& wish) {
    const bool revoke = pick(2) == 0;
    trace_ += revoke ? "(revoke)" : "(delete)";
    if (revoke) {
      onlooker_.gateway.revoke(lease_of_key(wish->key));
    } else {
      onlooker_.client().remove(wish->key).value();
    }
  }
  void harm_waiter() {
    const auto wish = take(pick_from(places(false)));
    trace_ += " harm-waiter";
    harm(wish);
    if (find_place(wish)) check();  // at the end of the queue
  }
  void harm_holder() {
    const auto wish = take(pick_from(places(true)));
    trace_ += " harm-holder";
    harm(wish);
    if (expect_loss(wish)) check();
  }
  bool expect_loss(const WishPtr& wish) {
    auto& lock = **wish->result;
    const bool lost = wait_until([&] { return !lock.held(); }, lenient(10s));
    if (!expect(lost, "held() of a lock that is gone")) return false;
    if (!expect(wish->loss.wait(1), "on_lost was not told")) return false;
    const auto unlocked = lock.unlock();
    const bool said = !unlocked && unlocked.error().code == ErrorCode::Lost;
    return expect(said, "unlock of a lost lock: " + why(unlocked)) &&
           expect(wish->loss.told() == 1, "on_lost was told twice");
  }
  void unlock() {
    const auto wish = take(pick_from(places(true)));
    trace_ += " unlock";
    const auto unlocked = (*wish->result)->unlock();
    expect(unlocked.has_value(), "unlock: " + why(unlocked));
    check();
  }

  /// Unlocks in another thread, and lets `meanwhile` happen at the same time.
  void unlock_while(const std::function<void()>& meanwhile) {
    const auto holder = take(pick_from(places(true)));
    auto unlocked = std::async(std::launch::async, [&] { return (*holder->result)->unlock(); });
    std::this_thread::sleep_for(std::chrono::microseconds(pick(1500)));
    meanwhile();
    expect(unlocked.get().has_value(), "unlock in a race");
  }
  void race_with_cancel() {
    trace_ += " unlock|cancel";
    const auto next = queue_[places(false).front()];
    unlock_while([&] { next->ctx.cancel(); });
    if (!expect(next->wait_ready(), "acquire outlives its Context in a race")) return;
    if (!*next->result) queue_.erase(std::find(queue_.begin(), queue_.end(), next));
    check();
  }
  void race_with_harm() {
    trace_ += " unlock|harm";
    const auto next = queue_[places(false).front()];
    unlock_while([&] { harm(next); });
    queue_.erase(std::find(queue_.begin(), queue_.end(), next));
    const auto has_new_place = [&] { return keys().size() == queue_.size() + 1; };
    wait_until([&] { return next->ready() || has_new_place(); }, lenient(10s));
    const bool in_time =
        next->ready() && *next->result && (*next->result)->fencing_token() == next->token;
    if (in_time) {
      if (expect_loss(next)) check();
    } else if (find_place(next)) {
      check();
    }
  }

  /// The keys in etcd are those of the model, in its order; those who should hold do, no others.
  void check() {
    if (!error_.empty()) return;
    const auto as_model = [&] {
      const auto now = keys();
      return std::equal(now.begin(), now.end(), queue_.begin(), queue_.end(),
                        [](const coordination::KeyValue& kv, const WishPtr& wish) {
                          return kv.key == wish->key && kv.create_revision == wish->token;
                        });
    };
    if (!expect(wait_until(as_model, lenient(5s)), "etcd's queue is not the model's")) return;
    for (std::size_t i = 0; i < queue_.size() && error_.empty(); ++i) {
      const auto number = " (number " + std::to_string(i) + ")";
      if (holds(i)) {
        check_holder(*queue_[i], number);
      } else {
        expect(!queue_[i]->ready(), "one who must wait has returned" + number);
      }
    }
  }
  void check_holder(Wish& wish, const std::string& number) {
    if (!expect(wish.wait_ready(), "one who should have it waits" + number)) return;
    if (!expect(wish.result->has_value(), "acquire: " + why(*wish.result) + number)) return;
    auto& lock = **wish.result;
    expect(lock.key() == wish.key && lock.fencing_token() == wish.token, "another key" + number);
    expect(lock.held(), "the holder does not hold" + number);
  }

  const Rule rule_;
  std::vector<coordination::Coordinator>& clients_;
  Onlooker& onlooker_;
  const std::string name_, path_;
  std::mt19937 random_;
  std::deque<WishPtr> queue_;
  std::string error_, trace_;
};

/// Runs `scenarios` models, several at a time, against lease_etcd(); returns the first errors.
inline std::string run_queue_models(QueueModel::Rule rule, int scenarios, int steps,
                                    unsigned seed) {
  constexpr int kWorkers = 6;
  const auto work = [&](int worker, coordination::CoordinatorOptions options) -> std::string {
    Onlooker onlooker(lease_etcd());
    std::vector<coordination::Coordinator> clients;
    for (int i = 0; i < 3; ++i) clients.push_back(connect(options));
    options.transport = std::make_shared<PatientTransport>();
    clients.push_back(connect(options));
    for (int i = worker; i < scenarios; i += kWorkers) {
      QueueModel model(rule, clients, onlooker, options.key_prefix, "s" + std::to_string(i),
                       seed + static_cast<unsigned>(i));
      const auto error = model.run(steps);
      if (!error.empty()) return "scenario " + std::to_string(i) + ": " + error + "\n";
    }
    for (auto& client : clients) {
      if (!client.close()) return "close fails";
    }
    return "";
  };
  std::vector<std::future<std::string>> workers;
  for (int w = 0; w < kWorkers; ++w) {
    workers.push_back(std::async(std::launch::async, work, w, options_for(lease_etcd())));
  }
  std::string errors;
  for (auto& worker : workers) errors += worker.get();
  return errors;
}

}  // namespace support
