// Signals and other events, for a main thread that waits for all of them in one place.
#pragma once

#include <condition_variable>
#include <csignal>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "common.hpp"

namespace coordctl {

struct Event {
  enum class Kind { Signal, Ready, Lost };
  Kind kind;
  int signal{0};
  std::string text{};  // of Lost: why
};

/// What has happened, in the order in which it did.
class Inbox {
 public:
  void push(Event event);
  /// Empty once `deadline` has passed; without one it waits for as long as it takes.
  std::optional<Event> wait(std::optional<steady_clock::time_point> deadline = std::nullopt);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Event> events_;
};

/// While it lives, signals that would end coordctl, and those that it can forward, become events.
/// What was ignored when coordctl was started stays so. To be made before any thread is.
class Signals {
 public:
  explicit Signals(Inbox& inbox);
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;
  ~Signals();

  /// The mask that coordctl was started with, for its children.
  const sigset_t& mask_before() const { return before_; }
  /// True if its default action ends a process: then it ends what coordctl waits for.
  static bool ends(int signal) { return signal != SIGCHLD && signal != SIGWINCH; }

 private:
  void run(Inbox& inbox);

  sigset_t before_;
  sigset_t waited_;
  std::thread thread_;
};

/// For a program that a signal ends while it waits.
inline Failure ended_by(int signal) {
  return {kSignal + signal, std::string("ended by ") + strsignal(signal)};
}

/// Calls `call(ctx)` in a thread of its own and waits for it. A signal that ends programs cancels
/// `ctx`, and then coordctl. `notice`, if there is one, is called while it takes long: after two
/// seconds, then less and less often.
template <class Call>
auto await(Inbox& inbox, Context ctx, Call call, const std::function<void()>& notice = {}) {
  using Answer = decltype(call(ctx));
  std::optional<Answer> answer;
  std::thread thread([&] {
    answer.emplace(call(ctx));
    inbox.push({Event::Kind::Ready});
  });
  int signal = 0;
  milliseconds pause(2000);
  for (auto next = steady_clock::now() + pause;;) {
    const auto event = inbox.wait(next);
    if (event && event->kind == Event::Kind::Ready) break;
    if (event && event->kind == Event::Kind::Signal && Signals::ends(event->signal)) {
      signal = event->signal;
      ctx.cancel();
    }
    if (event) continue;
    if (notice && signal == 0) notice();
    pause = std::min(pause * 2, milliseconds(60000));
    next = steady_clock::now() + pause;
  }
  thread.join();
  if (signal != 0) throw ended_by(signal);
  return std::move(*answer);
}

}  // namespace coordctl
