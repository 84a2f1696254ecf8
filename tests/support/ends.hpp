// Processes that end, fork, or close a Coordinator that is in use: run as children of a test.
#pragma once

#include <sys/wait.h>

#include <chrono>
#include <cstdlib>
#include <future>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "child.hpp"
#include "coordination.hpp"
#include "wait.hpp"

namespace support::ends {

using namespace coordination;

/// Kept at namespace scope and never closed. They are destroyed after all that main() has made.
struct Kept {
  std::shared_ptr<MemoryEtcd> etcd;
  std::optional<Coordinator> coordinator;
  std::optional<Lock> lock;
  std::optional<ServiceView> view;
  std::optional<Watch<ConfigEvent>> watch;
  std::optional<Subscription> subscription;

  ~Kept() {
    if (etcd) say("keys left: " + std::to_string(etcd->keys().size()));
  }
};
inline Kept kept;

/// "memory", or the URL of an etcd and perhaps the file of its CA.
inline CoordinatorOptions options_of(const Args& args) {
  CoordinatorOptions options;
  options.timeout = 30s;  // what they begin with must work, also on a busy machine
  options.endpoints = {"a:1"};
  if (args.at(1) == "memory") {
    kept.etcd = std::make_shared<MemoryEtcd>();
    options.transport = kept.etcd;
    return options;
  }
  options.endpoints = {args.at(1)};
  if (args.size() > 2) options.tls.ca_file = args.at(2);
  return options;
}

inline void keep_all(Coordinator& c) {
  kept.lock = c.lock().acquire("kept", 60s).value();
  c.registry().register_service({"id", "web", "host", 1}).value();
  kept.view = c.registry().view("web").value();
  kept.watch = c.config().watch("k").value();
  kept.subscription = c.config().watch("k", [](const ConfigEvent&) {}).value();
  c.config().set("k", 1).value();
  c.config().remove("k").value();
}

/// How it ends: returns from main(), calls exit() there, beside a handler that does not return, or
/// in one.
inline int end(const std::string& how, Coordinator& c) {
  if (how == "exit") std::exit(7);
  if (how == "exit in a handler") {
    kept.lock->on_lost([](const Error&) { std::exit(7); });
    c.client().remove(kept.lock->key()).value();
    std::this_thread::sleep_for(60s);
  }
  if (how == "beside a handler") {
    std::promise<void> begun;
    static Subscription* const kSubscription =
        new Subscription(c.config()
                             .watch("k",
                                    [&begun](const ConfigEvent&) {
                                      begun.set_value();
                                      for (;;) std::this_thread::sleep_for(60s);
                                    })
                             .value());
    static_cast<void>(kSubscription);
    c.config().set("k", 2).value();
    begun.get_future().wait();
    c.config().remove("k").value();
    std::exit(7);
  }
  return 7;
}

/// HOW WHERE...
inline int exit_main(const Args& args) {
  kept.coordinator = Coordinator::connect(options_of(args)).value();
  keep_all(*kept.coordinator);
  return end(args.at(0), *kept.coordinator);
}
inline int exit_default_main(const Args& args) {
  set_default_options(options_of(args)).value();
  const auto coordinator = default_coordinator().value();
  keep_all(*coordinator);
  return end(args.at(0), *coordinator);
}
inline const bool exit_known = child_main("exit", exit_main);
inline const bool exit_default_known = child_main("exit with the default", exit_default_main);

/// True if the call says that it has nothing to do with this process.
template <class T>
bool refused(const Result<T>& result) {
  return !result && result.error().code == ErrorCode::Cancelled &&
         to_string(result.error()).find("made in another process") != std::string::npos;
}

/// In a child of fork(): a number for each thing that is not as it should be.
inline int wrong_in_child(Coordinator& c, DistributedLock& locks) {
  auto& k = kept;
  if (k.lock->held()) return 10;
  if (!refused(k.lock->unlock())) return 11;
  if (!refused(k.lock->put("x", "y"))) return 12;
  if (!refused(locks.acquire("b", 9s))) return 13;
  if (!refused(c.client().get("x"))) return 14;
  if (!refused(c.config().get("x"))) return 15;
  if (!refused(k.watch->next())) return 16;
  if (!refused(k.view->wait_for(1))) return 17;
  if (!refused(c.registry().unregister("id"))) return 18;
  k.subscription->cancel();
  k.view.reset();
  if (!c.close()) return 19;
  auto own = Coordinator::in_memory();
  if (!own.lock().acquire("kept", 9s)) return 20;
  return 0;
}

/// ROUNDS WHERE...: the children end by themselves, and destroy what they have got.
inline int fork_main(const Args& args) {
  kept.coordinator = Coordinator::connect(options_of(args)).value();
  auto& c = *kept.coordinator;
  auto& locks = c.lock();
  keep_all(c);
  for (int i = 0; i < std::stoi(args.at(0)); ++i) {
    const pid_t child = fork();
    if (child == 0) {
      kept.etcd.reset();
      return wrong_in_child(c, locks);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status)) return 128 + WTERMSIG(status);
    if (WEXITSTATUS(status) != 0) return WEXITSTATUS(status);
  }
  if (!kept.lock->held() || !kept.lock->put("x", "y")) return 30;
  if (c.registry().discover("web").value().size() != 1) return 31;
  c.client().remove("x").value();
  return 7;
}
inline const bool fork_known = child_main("fork", fork_main);

template <class T>
bool is_over(const Result<T>& result) {
  return !result && result.error().code == ErrorCode::Cancelled;
}

inline void use_until_closed(DistributedLock locks, ConfigCenter config, ServiceRegistry registry) {
  for (bool closed = false; !closed;) {
    auto lock = locks.try_acquire("used", 9s);
    closed = is_over(lock) || is_over(config.compare_and_set("used", 9, 1)) ||
             is_over(registry.discover("web"));
  }
}

/// The ways to close it: by one, by two at once, by its end, in a handler while another one does.
inline void close_once(std::optional<Coordinator>& c, int way) {
  if (way == 1) {
    auto other = std::async(std::launch::async, [&] { return c->close(); });
    c->close().value();
    other.get().value();
  } else if (way == 2) {
    c.reset();
  } else if (way == 3) {
    kept.lock->on_lost([&](const Error&) { static_cast<void>(c->close()); });
    static_cast<void>(c->client().remove(kept.lock->key()));
    static_cast<void>(c->close());
  } else {
    c->close().value();
  }
}

/// ROUNDS WHERE...: others use it while it closes, and handles outlive it.
inline int close_main(const Args& args) {
  auto options = options_of(args);
  for (int i = 0; i < std::stoi(args.at(0)); ++i) {
    options.key_prefix = "/round" + std::to_string(i);  // nobody waits for what one has left
    kept.coordinator = Coordinator::connect(options).value();
    auto locks = kept.coordinator->lock();
    auto config = kept.coordinator->config();
    auto registry = kept.coordinator->registry();
    keep_all(*kept.coordinator);
    std::vector<std::future<void>> users;
    for (int u = 0; u < 3; ++u) {
      auto use = [&] { use_until_closed(locks, config, registry); };
      users.push_back(std::async(std::launch::async, use));
    }
    users.push_back(std::async(std::launch::async, [] {
      while (kept.watch->next()) {
      }
    }));
    std::this_thread::sleep_for(milliseconds(i % 7));  // in the middle of something else each time
    close_once(kept.coordinator, i % 4);
    if (!is_over(locks.acquire("used", 9s)) || !is_over(config.get("used"))) return 40;
    if (!is_over(registry.view("web")) || !is_over(config.watch("used"))) return 41;
    for (auto& user : users) user.get();
    if (kept.lock->held() || kept.lock->unlock()) return 42;
    if (i % 2 == 0) kept.coordinator.reset();
    kept.subscription.reset();
    kept.watch.reset();
    kept.view.reset();
    kept.lock.reset();
    kept.coordinator.reset();
  }
  return 7;
}
inline const bool close_known = child_main("close", close_main);

/// The exit status of such a process, and what it has printed. A child of fork() has not the stacks
/// of its parent's threads: to the sanitizers, what only those know of is lost, and threads of its
/// own are none.
inline RunResult run_child(const std::string& name, const Args& args) {
  ProcessOptions options;
  options.merge_stderr = true;
  if (name == "fork") {
    options.env = {"LSAN_OPTIONS=detect_leaks=0", "TSAN_OPTIONS=die_after_fork=0"};
  }
  auto child = start_child(name, args, options);
  RunResult result;
  result.out = child.read_all(lenient(60s));
  result.exit_code = child.wait(10s).value_or(-1);
  return result;
}

}  // namespace support::ends
