// What one worker process of the soak does: everything that the library offers, in many threads,
// each call written into a journal. In it are, by kind:
//   get set cas remove                       one key of ConfigCenter, made anew every ten seconds
//   write                                    any other write; like set it has in.writes
//   acquire held guarded release             of a queue: locks, permits, offices
//   register unregister                      of a service
//   watch event missed view reached ended    notes
#pragma once

#include <dirent.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "history.hpp"
#include "support/wait.hpp"

namespace proof {

using namespace coordination;
using namespace std::chrono_literals;

inline constexpr const char* kPrefix = "/soak";
inline constexpr int kPermits = 2;

struct WorkerOptions {
  int process{0};
  std::uint64_t seed{0};
  std::string journal;
  bool sits{false};
  std::vector<std::string> endpoints;
};

/// The lock that the sitter holds for as long as it can, and the others for moments.
inline constexpr const char* kSeat = "seat";
inline constexpr int kSeatTtl = 6;  // seconds

inline std::string holder_of(int process) { return "worker-" + std::to_string(process); }

inline int open_descriptors() {
  DIR* folder = opendir("/proc/self/fd");
  int count = 0;
  while (folder != nullptr && readdir(folder) != nullptr) ++count;
  if (folder != nullptr) closedir(folder);
  return count;
}

/// One thread's dice.
class Dice {
 public:
  explicit Dice(std::uint64_t seed) : random_(seed) {}
  int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(random_); }
  bool one_in(int n) { return below(n) == 0; }
  milliseconds between(int least, int most) { return milliseconds(least + below(most - least)); }

 private:
  std::mt19937_64 random_;
};

/// A name that changes every ten seconds, at once in all processes: so that what a checker has to
/// look at together is short.
inline std::string of_now(const std::string& name, int seconds = 10) {
  return name + std::to_string(now_ns() / 1'000'000'000 / seconds);
}

class Worker {
 public:
  explicit Worker(const WorkerOptions& options) : options_(options), journal_(options.journal) {}

  /// Until `stopped` returns. False: something did not come to its end.
  void run(const std::function<void()>& stopped) {
    const int threads = support::thread_count(), descriptors = open_descriptors();
    {
      auto coordinator = connect();
      coordinator_ = &coordinator;
      std::vector<std::thread> all;
      for (const auto& [name, step] : steps()) {
        const auto seed = options_.seed * 1000003 + std::hash<std::string>()(name);
        all.emplace_back([this, step = step, seed] { loop(step, seed); });
      }
      stopped();
      stopping_ = true;
      for (auto& thread : all) thread.join();
      come_to_rest();
      views_.reset();
      coordinator.close().value();
    }
    journal_.note("ended", {{"threads", support::thread_count() - threads},
                            {"descriptors", open_descriptors() - descriptors}});
  }

 private:
  using Step = std::function<void(Dice&)>;

  Coordinator connect() {
    CoordinatorOptions options;
    options.endpoints = options_.endpoints;
    options.username = "root";
    options.password = "root-password";
    options.key_prefix = kPrefix;
    options.holder = holder_of(options_.process);
    if (std::getenv("COORDINATION_TEST_LOG") != nullptr) options.logger = stderr_logger();
    for (;;) {  // the cluster may be down just now
      auto made = Coordinator::connect(options);
      if (made) return std::move(*made);
      std::this_thread::sleep_for(200ms);
    }
  }
  std::vector<std::pair<std::string, Step>> steps() {
    const auto queue = [this](const char* name, const char* mode, int ttl) {
      return [=](Dice& dice) { hold_once({name, mode, std::chrono::seconds(ttl)}, dice); };
    };
    const std::pair<std::string, Step> seat{kSeat, queue(kSeat, "exclusive", kSeatTtl)};
    if (options_.sits) return {seat, {"watch", [this](Dice&) { watch("/"); }}};
    return {seat,
            {"register-1", [this](Dice& dice) { use_register(dice); }},
            {"register-2", [this](Dice& dice) { use_register(dice); }},
            {"raw", [this](Dice& dice) { use_client(dice); }},
            {"watch", [this](Dice&) { watch("/raw/"); }},
            {"lock", queue("lock", "exclusive", 3)},
            {"robbed", queue("robbed", "exclusive", 4)},
            {"robbed-2", queue("robbed", "exclusive", 4)},
            {"shared", queue("both", "shared", 3)},
            {"exclusive", queue("both", "exclusive", 3)},
            {"permit", queue("permits", "permit", 3)},
            {"permit-2", queue("permits", "permit", 3)},
            {"office", queue("office", "office", 3)},
            {"services", [this](Dice& dice) { use_registry(dice); }},
            {"views", [this](Dice& dice) { look_at_views(dice); }}};
  }
  void loop(const Step& step, std::uint64_t seed) {
    Dice dice(seed);
    while (!stopping_) {
      step(dice);
      std::this_thread::sleep_for(dice.between(5, 45));
    }
  }

  /// Different for every call, and no JSON.
  std::string unique() {
    return "v" + std::to_string(options_.process) + "." + std::to_string(++count_);
  }
  static Context brief() { return Context::with_timeout(4s); }
  static Json at(std::int64_t revision) { return {{"revision", revision}}; }
  Result<std::int64_t> write(const std::string& kind, const Json& in,
                             const std::function<Result<std::int64_t>()>& function) {
    return journal_.call<std::int64_t>(kind, in, function, at);
  }

  // Registers.

  void use_register(Dice& dice) {
    const std::string key = of_now("r") + "-" + std::to_string(dice.below(3));
    const std::string full = std::string(kPrefix) + "/config/" + key;
    const auto value = unique();
    const Json in{{"key", full}, {"writes", {{full, value}}}};
    auto& config = coordinator_->config();
    const int what = dice.below(10);
    if (what < 3) return read(key, full).reset();
    if (what < 5) {
      static_cast<void>(write("set", in, [&] { return config.set(key, value, brief()); }));
    } else if (what < 9) {
      compare_and_set(key, full, value);
    } else {
      static_cast<void>(
          write("remove", {{"key", full}}, [&] { return config.remove(key, brief()); }));
    }
  }
  /// Empty if nobody knows; an entry of revision 0 if there is none.
  std::optional<ConfigEntry> read(const std::string& key, const std::string& full) {
    auto entry = journal_.call<ConfigEntry>(
        "get", {{"key", full}}, [&] { return coordinator_->config().get_entry(key, brief()); },
        [](const ConfigEntry& e) {
          return Json{{"value", e.value}, {"revision", e.revision}};
        });
    if (entry) return *entry;
    if (entry.error().code == ErrorCode::NotFound) return ConfigEntry{};
    return std::nullopt;
  }
  void compare_and_set(const std::string& key, const std::string& full, const std::string& value) {
    const auto before = read(key, full);
    if (!before) return;
    const Json in{{"key", full}, {"writes", {{full, value}}}, {"expect", before->value}};
    static_cast<void>(write("cas", in, [&] {
      return coordinator_->config().compare_and_set(key, before->revision, value, brief());
    }));
  }

  // The client, and a watch of what it writes.

  std::string raw(int i) const { return std::string(kPrefix) + "/raw/" + std::to_string(i); }
  void use_client(Dice& dice) {
    const auto key = raw(dice.below(4)), value = unique();
    auto& client = coordinator_->client();
    if (dice.one_in(8)) {
      static_cast<void>(journal_.call<RemoveResponse>(
          "delete", {{"key", key}}, [&] { return client.remove(key, brief()); },
          [](const RemoveResponse& done) {
            return Json{{"revision", done.revision}, {"deleted", done.deleted}};
          }));
    } else if (dice.one_in(2)) {
      const Json in{{"writes", {{key, value}}}};
      static_cast<void>(write("write", in, [&] { return put(key, value); }));
    } else {  // two keys at one revision
      const auto other = raw(4);
      const Json in{{"writes", {{key, value}, {other, value}}}};
      static_cast<void>(write("write", in, [&]() -> Result<std::int64_t> {
        auto txn = Txn().then(Op::put(key, value)).then(Op::put(other, value));
        auto done = client.commit(txn, brief());
        if (!done) return done.error();
        return done->revision;
      }));
    }
  }
  Result<std::int64_t> put(const std::string& key, const std::string& value) {
    auto done = coordinator_->client().put(key, value, brief());
    if (!done) return done.error();
    return done->revision;
  }
  /// One watch from its begin until it is stopped, or until etcd has discarded what it needs.
  void watch(const char* folder) {
    auto& client = coordinator_->client();
    RangeRequest range{std::string(kPrefix) + folder};
    range.range_end = prefix_range_end(range.key);
    range.limit = 1;
    const auto now = client.range(range, brief());
    if (!now) return;
    WatchRequest request{range.key, range.range_end, now->revision + 1};
    auto made = client.watch(request);
    if (!made) return;
    const int id = ++watches_;
    journal_.note("watch", {{"id", id}, {"prefix", range.key}, {"from", now->revision + 1}});
    std::int64_t last = 0;
    while (!stopping_) {
      if (!take(*made, id, &last)) return;
    }
    const auto written = write_at_last(raw(0));  // whatever happened, this is still to come
    const auto limit = std::chrono::steady_clock::now() + kPatience;
    while (last < written && std::chrono::steady_clock::now() < limit) {
      if (!take(*made, id, &last)) return;
    }
    reached("a watch", last >= written);
  }
  /// False: the watch has ended.
  bool take(Watch<WatchEvent>& watch, int id, std::int64_t* last) {
    const auto event = watch.next(Context::with_timeout(500ms));
    if (event) {
      *last = event->revision;
      note_event(id, *event);
      return true;
    }
    if (event.error().code == ErrorCode::Timeout) return true;
    journal_.note("missed", {{"id", id}, {"code", to_string(event.error().code)}});
    return false;
  }
  /// The revision of a write that is repeated until it is done.
  std::int64_t write_at_last(const std::string& key) {
    std::int64_t revision = 0;
    reached("a write", support::wait_until(
                           [&] {
                             const auto value = unique();
                             const auto done = write("write", {{"writes", {{key, value}}}},
                                                     [&] { return put(key, value); });
                             revision = done.value_or(0);
                             return revision > 0;
                           },
                           kPatience));
    return revision;
  }
  void note_event(int id, const WatchEvent& event) {
    journal_.note("event", {{"id", id},
                            {"revision", event.revision},
                            {"type", to_string(event.type)},
                            {"key", event.kv.key},
                            {"value", event.kv.value}});
  }

  // Queues.

  struct Queue {
    std::string name, mode;
    milliseconds ttl;

    /// Somebody always waits for it, and has it for a moment only.
    bool is_seat() const { return name == kSeat; }
  };

  void hold_once(const Queue& queue, Dice& dice) {
    if (queue.mode == "office") {
      const auto patience = Context::with_timeout(dice.between(50, 5000));
      const auto name = of_now(queue.name, 30);
      hold<Leadership>(queue, name, dice, [&] {
        return coordinator_->election().campaign(name, unique(), queue.ttl, patience);
      });
    } else {
      const auto name = of_now(queue.name, queue.is_seat() ? 120 : 30);
      hold<Lock>(queue, name, dice, [&] { return acquire(queue, name, dice); });
    }
  }
  Result<Lock> acquire(const Queue& queue, const std::string& name, Dice& dice) {
    auto& locks = coordinator_->lock();
    const auto ctx = Context::with_timeout(queue.is_seat() ? 20s : dice.between(50, 5000));
    const bool tries = !queue.is_seat() && dice.one_in(4);
    if (queue.mode == "permit") {
      auto semaphore = locks.semaphore(name, kPermits);
      return tries ? semaphore.try_acquire(queue.ttl, ctx) : semaphore.acquire(queue.ttl, ctx);
    }
    if (queue.mode == "shared") {
      return tries ? locks.try_acquire_shared(name, queue.ttl, ctx)
                   : locks.acquire_shared(name, queue.ttl, ctx);
    }
    return tries ? locks.try_acquire(name, queue.ttl, ctx) : locks.acquire(name, queue.ttl, ctx);
  }
  static std::string folder(const Queue& queue) {
    return queue.mode == "permit"   ? "/semaphores/"
           : queue.mode == "office" ? "/elections/"
                                    : "/locks/";
  }
  template <class Held>
  void hold(const Queue& queue, const std::string& name, Dice& dice,
            const std::function<Result<Held>()>& acquire_it) {
    Json in{{"queue", kPrefix + folder(queue) + name + "/"}, {"mode", queue.mode}};
    auto held = journal_.call<Held>("acquire", in, acquire_it, [](const Held& h) {
      return Json{{"key", h.key()}, {"token", h.fencing_token()}};
    });
    if (!held) return;
    in["token"] = held->fencing_token();
    in["key"] = held->key();
    work(queue, *held, in, dice);
    static_cast<void>(journal_.call<bool>(
        "release", in, [&] { return give_back(*held, dice.one_in(20)); }, nothing));
  }
  static Json nothing(const bool&) { return nullptr; }
  static Result<bool> done_or(const Result<void>& result) {
    if (!result) return result.error();
    return true;
  }
  /// Sometimes with so little time that it is given up while under way.
  static Result<bool> give_back(Lock& lock, bool hasty) {
    return done_or(lock.unlock(hasty ? Context::with_timeout(2ms) : brief()));
  }
  static Result<bool> give_back(Leadership& office, bool hasty) {
    return done_or(office.resign(hasty ? Context::with_timeout(2ms) : brief()));
  }
  void work(const Queue& queue, HeldKey& held, const Json& in, Dice& dice) {
    const auto time = queue.is_seat() ? 0ms : dice.one_in(12) ? 1500ms : dice.between(0, 60);
    const auto end = std::chrono::steady_clock::now() + time;
    bool ours = true;
    do {
      ours = is_held(held, in);
      if (ours && !options_.sits) write_guarded(held, in);
      std::this_thread::sleep_for(dice.between(10, 60));
    } while (ours && !stopping_ && (options_.sits || std::chrono::steady_clock::now() < end));
  }
  bool is_held(HeldKey& held, const Json& in) {
    const auto is = journal_.call<bool>(
        "held", in, [&]() -> Result<bool> { return held.held(); },
        [](const bool& yes) {
          return Json{{"held", yes}};
        });
    return *is;
  }
  /// Its value tells who has written it.
  void write_guarded(HeldKey& held, const Json& in) {
    const std::string key = kPrefix + ("/guarded" + in["queue"].get<std::string>());
    const Json tag{
        {"mode", in["mode"]}, {"key", in["key"]}, {"token", in["token"]}, {"n", unique()}};
    const auto value = tag.dump();
    Json call = in;
    call["writes"] = {{key, value}};
    static_cast<void>(write("guarded", call, [&]() -> Result<std::int64_t> {
      auto done = held.put(key, value, brief());
      if (!done) return done.error();
      return done->revision;
    }));
  }

  // Services, and views of them and of the configuration.

  void use_registry(Dice& dice) {
    const std::string id =
        "s" + std::to_string(options_.process) + "-" + std::to_string(dice.below(3));
    auto& registry = coordinator_->registry();
    if (dice.one_in(4)) {
      static_cast<void>(
          write("unregister", {{"id", id}}, [&] { return registry.unregister(id, brief()); }));
    } else {
      ServiceInfo service{id, "svc", "127.0.0.1", 80, {{"n", unique()}}, 4s};
      static_cast<void>(write("register", {{"id", id}, {"n", service.metadata["n"]}},
                              [&] { return registry.register_service(service, brief()); }));
    }
    std::this_thread::sleep_for(dice.between(50, 200));
  }

  struct Views {
    ServiceView services;
    ConfigView config;
  };
  bool have_views() {
    if (views_) return true;
    auto services = coordinator_->registry().view("svc", brief());
    auto config = coordinator_->config().view("", brief());
    if (services && config) views_.emplace(Views{std::move(*services), std::move(*config)});
    return views_.has_value();
  }
  void look_at_views(Dice& dice) {
    if (!have_views()) return;
    note_services();
    note_config();
    std::this_thread::sleep_for(dice.between(100, 400));
  }
  /// What was seen counts if nothing changed meanwhile.
  void note_view(const LiveView& view, const std::string& prefix,
                 const std::function<Json()>& look) {
    const auto revision = view.revision();
    const Json state = look();
    if (view.revision() != revision) return;
    journal_.note("view", {{"prefix", prefix}, {"revision", revision}, {"state", state}});
  }
  void note_services() {
    note_view(views_->services, std::string(kPrefix) + "/services/svc/", [this] {
      Json state = Json::object();
      for (const auto& service : views_->services.instances()) {
        state[service.id] = service.metadata.at("n");
      }
      return state;
    });
  }
  void note_config() {
    note_view(views_->config, std::string(kPrefix) + "/config/", [this] {
      Json state = Json::object();
      for (const auto& key : views_->config.keys()) {
        const auto value = views_->config.get(key);
        if (value) state[key] = *value;
      }
      return state;
    });
  }

  // The end: what is promised to come, comes.

  void come_to_rest() {
    const auto key = std::string(kPrefix) + "/config/rest-" + std::to_string(options_.process);
    const auto written = write_at_last(key);
    if (written == 0 || !have_views()) return;
    const auto limit = Context::with_timeout(kPatience);
    reached("a view", static_cast<bool>(views_->config.wait_for(written, limit)));
    note_config();
    note_services();
  }
  void reached(const char* what, bool yes) {
    journal_.note("reached", {{"what", what}, {"yes", yes}});
  }

  const WorkerOptions options_;
  Journal journal_;
  Coordinator* coordinator_{nullptr};
  std::optional<Views> views_;
  std::atomic<int> count_{0}, watches_{0};
  std::atomic<bool> stopping_{false};
};

/// Until SIGTERM.
inline int run_worker(const WorkerOptions& options) {
  sigset_t end;
  sigemptyset(&end);
  sigaddset(&end, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &end, nullptr);
  Worker(options).run([&] {
    int number = 0;
    sigwait(&end, &number);
  });
  return 0;
}

}  // namespace proof
