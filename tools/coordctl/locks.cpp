// lock, elect, once, leader, who.
#include <unistd.h>

#include <chrono>
#include <ctime>

#include "command.hpp"
#include "commands.hpp"

namespace coordctl {

namespace {

Context limited(milliseconds timeout) {
  return timeout.count() > 0 ? Context::with_timeout(timeout) : Context();
}

/// The last segment of its key.
std::string lease_of(const HeldKey& held) { return held.key().substr(held.key().rfind('/') + 1); }

Environment environment_of(const HeldKey& held, const std::string& name) {
  return {{"COORDINATION_LOCK_NAME", name},
          {"COORDINATION_LOCK_KEY", held.key()},
          {"COORDINATION_LOCK_LEASE", lease_of(held)},
          {"COORDINATION_LOCK_TOKEN", std::to_string(held.fencing_token())}};
}

/// A command that must not go on once `held` is lost.
class HeldRun {
 public:
  HeldRun(Inbox& inbox, Command& command, milliseconds grace)
      : inbox_(inbox), command_(command), grace_(grace) {}

  /// The command's exit status, or kLost.
  int run() {
    while (!finished()) {
      const auto event = inbox_.wait(next_look());
      if (!event) continue;
      if (event->kind == Event::Kind::Lost) lose(event->text);
      if (event->kind == Event::Kind::Signal && event->signal != SIGCHLD) {
        command_.signal(event->signal);
      }
    }
    return kill_at_ ? int{kLost} : *command_.reap();
  }

 private:
  bool finished() {
    const bool ended = command_.reap().has_value();
    if (!kill_at_) return ended;
    const auto now = steady_clock::now();
    if (now >= *kill_at_) command_.signal(SIGKILL);
    // What is dead and has no parent that asks for it may stay in the group for ever.
    return ended && (!command_.group_lives() || now >= *kill_at_ + milliseconds(1000));
  }

  /// The end of a process that is no child of ours makes no event.
  std::optional<steady_clock::time_point> next_look() const {
    if (!kill_at_) return std::nullopt;
    return steady_clock::now() + milliseconds(20);
  }

  void lose(const std::string& why) {
    say(why + "; the command gets SIGTERM, and SIGKILL after " + to_text(grace_));
    command_.signal(SIGTERM);
    kill_at_ = steady_clock::now() + grace_;
  }

  Inbox& inbox_;
  Command& command_;
  milliseconds grace_;
  std::optional<steady_clock::time_point> kill_at_;  // once it is lost
};

int run_held(Inbox& inbox, const Signals& signals, HeldKey& held, const LockArguments& arguments) {
  held.on_lost([&inbox](const Error& error) {
    inbox.push({Event::Kind::Lost, 0, to_string(error)});
  });
  CommandOptions options;
  options.environment = environment_of(held, arguments.name);
  options.grace = arguments.grace;
  Command command(arguments.command, signals, options);
  return HeldRun(inbox, command, arguments.grace).run();
}

/// What giving back says of the time until then.
int after_release(int status, const Result<void>& released) {
  if (released || status == kLost) return status;
  const bool lost = released.error().code == ErrorCode::Lost;
  say(to_string(released.error()) + (lost ? ", while the command ran" : "; it runs out by itself"));
  return lost ? int{kLost} : status;
}

/// Timeout of a wait is no failure of etcd's.
template <class T>
T got(Result<T> result) {
  if (result) return std::move(*result);
  const Error& error = result.error();
  const bool waited = error.code == ErrorCode::Timeout;
  throw Failure{waited ? int{kHeld} : exit_of(error.code), to_string(error)};
}

std::string holder_text(const Result<LockHolder>& holder) {
  if (!holder) return "";
  const auto value = printable(holder->value);
  return ", held by " + (value.empty() ? holder->key : value) + " (token " +
         std::to_string(holder->token) + ")";
}

/// Says who is waited for.
template <class Ask>
std::function<void()> notice(const std::string& name, Ask ask) {
  const auto begin = steady_clock::now();
  return [=] {
    const auto waited =
        std::chrono::duration_cast<std::chrono::seconds>(steady_clock::now() - begin);
    const auto holder = ask(Context::with_timeout(milliseconds(1000)));
    say("waiting for " + name + ", " + to_text(waited) + " so far" + holder_text(holder));
  };
}

Coordinator connect_or_end(Inbox& inbox, const Settings& settings) {
  return await(inbox, Context(),
               [&](Context ctx) {
                 return Coordinator::connect(with_logger(settings), std::move(ctx));
               })
      .value();
}

Result<Lock> acquire(DistributedLock& locks, const LockArguments& a, const Context& ctx) {
  if (a.permits > 0) {
    auto semaphore = locks.semaphore(a.name, a.permits);
    return a.only_try ? semaphore.try_acquire(a.ttl, ctx) : semaphore.acquire(a.ttl, ctx);
  }
  if (a.shared) {
    return a.only_try ? locks.try_acquire_shared(a.name, a.ttl, ctx)
                      : locks.acquire_shared(a.name, a.ttl, ctx);
  }
  return a.only_try ? locks.try_acquire(a.name, a.ttl, ctx) : locks.acquire(a.name, a.ttl, ctx);
}

Lock acquire_or_end(Inbox& inbox, Coordinator& c, const LockArguments& arguments) {
  const auto ask = [&](Context ctx) -> Result<LockHolder> {
    if (arguments.permits > 0) return Error{};  // there is more than one
    return c.lock().holder(arguments.name, std::move(ctx));
  };
  return got(await(
      inbox, limited(arguments.timeout),
      [&](const Context& ctx) { return acquire(c.lock(), arguments, ctx); },
      notice(arguments.name, ask)));
}

}  // namespace

int lock(const Settings& settings, const LockArguments& arguments) {
  Inbox inbox;
  Signals signals(inbox);
  auto c = connect_or_end(inbox, settings);
  auto held = acquire_or_end(inbox, c, arguments);
  const int status = run_held(inbox, signals, held, arguments);
  return after_release(status, held.unlock());
}

namespace {

/// As the library names the holders of locks.
std::string host_and_process() {
  char host[256] = "?";
  gethostname(host, sizeof(host) - 1);
  return std::string(host) + ":" + std::to_string(getpid());
}

}  // namespace

int elect(const Settings& settings, const LockArguments& arguments) {
  Inbox inbox;
  Signals signals(inbox);
  auto c = connect_or_end(inbox, settings);
  const auto value = arguments.value.empty() ? host_and_process() : arguments.value;
  const auto ask = [&](Context ctx) { return c.election().leader(arguments.name, std::move(ctx)); };
  auto held = got(await(
      inbox, limited(arguments.timeout),
      [&](const Context& ctx) {
        return c.election().campaign(arguments.name, value, arguments.ttl, ctx);
      },
      notice(arguments.name, ask)));
  const int status = run_held(inbox, signals, held, arguments);
  return after_release(status, held.resign());
}

namespace {

std::string now_text() {
  char text[32];
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

/// Written only while the lock is ours, and gone after `keep`.
void record_done(Coordinator& c, Lock& held, const std::string& key,
                 const OnceArguments& arguments) {
  auto lease = c.client().grant(arguments.keep).value();
  const Json record = {{"done", now_text()}, {"by", c.client().get(held.key()).value().value}};
  Txn txn;
  txn.then(Op::put(key, record.dump(), lease.id()));
  held.commit(std::move(txn)).value();
  lease.detach();
}

bool was_done(Coordinator& c, const std::string& key) {
  const auto record = c.client().get(key);
  if (!record && record.error().code == ErrorCode::NotFound) return false;
  say("was done already: " + printable(record.value().value));
  return true;
}

}  // namespace

int once(const Settings& settings, const OnceArguments& arguments) {
  Inbox inbox;
  Signals signals(inbox);
  auto c = connect_or_end(inbox, settings);
  auto only = arguments.lock;
  only.name = "once/" + only.name;
  const auto key = settings.options.key_prefix + "/" + only.name + "/" + arguments.slot;
  if (was_done(c, key)) return kDone;
  auto held = acquire_or_end(inbox, c, only);
  if (was_done(c, key)) return kDone;
  const int status = run_held(inbox, signals, held, only);
  if (status == kDone) record_done(c, held, key, arguments);
  return after_release(status, held.unlock());
}

namespace {

void show_leader(const Settings& settings, const LeaderInfo& info) {
  if (settings.json) {
    print(Json{{"leader", info.exists() ? Json(info.value) : Json()},
               {"key", info.key},
               {"token", info.token},
               {"revision", info.revision}});
  } else {
    std::printf("%s\n", info.exists() ? printable(info.value).c_str() : "");
    std::fflush(stdout);
  }
}

}  // namespace

int leader(const Settings& settings, const std::string& name, bool watch) {
  auto c = connect(settings);
  if (!watch) {
    show_leader(settings, c.election().leader(name).value());
    return kDone;
  }
  auto observed = c.election().observe(name).value();
  while (true) show_leader(settings, observed.next().value());
}

namespace {

struct Waiter {
  KeyValue kv;
  std::int64_t seconds_left;
};

/// The holder and those who wait, in their order.
std::vector<Waiter> queue_of(Coordinator& c, const std::string& folder) {
  RangeRequest request{folder};
  request.range_end = prefix_range_end(folder);
  request.sort_order = SortOrder::Ascend;
  request.sort_target = SortTarget::Create;
  std::vector<Waiter> queue;
  for (auto& kv : c.client().range(request).value().kvs) {
    if (kv.key.find('/', folder.size()) != std::string::npos) continue;  // of a/b, not of a
    const auto left =
        c.client().call("/v3/lease/timetolive", {{"ID", std::to_string(kv.lease)}}, Effect::Reads);
    const auto text = left ? left->value("TTL", "0") : "0";
    queue.push_back({std::move(kv), std::strtoll(text.c_str(), nullptr, 10)});
  }
  return queue;
}

}  // namespace

int who(const Settings& settings, const std::string& kind, const std::string& name) {
  auto c = connect(settings);
  const auto queue = queue_of(c, settings.options.key_prefix + "/" + kind + "/" + name + "/");
  Table table({"#", "WHO", "TOKEN", "TTL LEFT", "KEY"});
  auto json = Json::array();
  for (std::size_t i = 0; i < queue.size(); ++i) {
    const auto& [kv, left] = queue[i];
    const auto value = kv.value.empty() ? std::string("-") : printable(kv.value);
    table.add({std::to_string(i + 1), value, std::to_string(kv.create_revision),
               std::to_string(left) + "s", kv.key});
    json.push_back(
        {{"who", kv.value}, {"token", kv.create_revision}, {"ttl_left", left}, {"key", kv.key}});
  }
  if (settings.json) {
    print(json);
  } else if (!queue.empty()) {
    table.print();
  } else {
    say("nobody holds " + name + ", and nobody waits for it");
  }
  return queue.empty() ? int{kNotFound} : int{kDone};
}

}  // namespace coordctl
