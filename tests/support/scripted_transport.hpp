// A Transport that answers from a script, and remembers what it was asked.
//
//   auto etcd = std::make_shared<ScriptedTransport>();
//   etcd->next("/v3/kv/put", refused());            // once
//   etcd->always("/v3/kv/put", ok("{...}"));        // whenever there is no `next`
//   ...
//   CHECK(etcd->count("/v3/kv/put") == 2);
#pragma once

#include <doctest/doctest.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "coordination.hpp"
#include "hook.hpp"
#include "wait.hpp"

namespace support {

using Answer = std::function<coordination::Result<coordination::HttpResponse>(
    const coordination::HttpRequest&, const coordination::ChunkSink&,
    const coordination::Context&)>;

/// For doctest's messages: what went wrong, or "ok".
template <class T>
std::string text_of(const coordination::Result<T>& result) {
  return result ? "ok" : to_string(result.error());
}

/// Blocks as a call to a server that does not answer: until `ctx` is done; or, where `deaf`, until
/// it is cancelled, whatever its deadline says.
inline coordination::Error blocked(const coordination::Context& ctx, coordination::Outcome outcome,
                                   bool deaf = false) {
  std::mutex mutex;
  std::condition_variable changed;
  const auto hook = ctx.on_cancel([&] {
    std::lock_guard<std::mutex> hold(mutex);
    changed.notify_all();
  });
  std::unique_lock<std::mutex> lock(mutex);
  while (deaf ? !ctx.cancelled() : !ctx.done()) {
    auto until = std::chrono::steady_clock::now() + std::chrono::hours(1);
    if (!deaf) until = std::min(ctx.deadline().value_or(until), until);
    changed.wait_until(lock, until);
  }
  const auto code =
      ctx.cancelled() ? coordination::ErrorCode::Cancelled : coordination::ErrorCode::Timeout;
  return {code, "the script did not answer", "", outcome, 0};
}

// Answers.

inline Answer answer(int status, std::string body) {
  return [=](const auto&, const auto&, const auto&) {
    return coordination::HttpResponse{status, body};
  };
}
inline Answer ok(std::string body) { return answer(200, std::move(body)); }
/// `{"header":{"revision":"<revision>"},<rest>}`.
inline std::string reply(std::int64_t revision, const std::string& rest = "") {
  return "{\"header\":{\"revision\":\"" + std::to_string(revision) + "\"}" +
         (rest.empty() ? "" : "," + rest) + "}";
}
/// An error as etcd 3.5 says it.
inline Answer etcd_error(int status, int code, const std::string& message) {
  return answer(status, "{\"code\":" + std::to_string(code) + ", \"message\":\"" + message + "\"}");
}
/// The same in the words of 3.4.
inline Answer etcd34_error(int status, int code, const std::string& message) {
  return answer(status, "{\"error\":\"" + message + "\",\"message\":\"" + message +
                            "\",\"code\":" + std::to_string(code) + "}");
}
inline Answer fails(coordination::ErrorCode code, coordination::Outcome outcome) {
  return [=](const auto&, const auto&, const auto&) {
    return coordination::Error{code, "the script says no", "", outcome, 0};
  };
}
/// The connection was refused: nothing was sent.
inline Answer refused() {
  return fails(coordination::ErrorCode::Connection, coordination::Outcome::NotApplied);
}
/// The connection broke after the request was sent.
inline Answer lost() {
  return fails(coordination::ErrorCode::Connection, coordination::Outcome::MaybeApplied);
}
/// No answer until the Context is done.
inline Answer silence() {
  return [](const auto&, const auto&, const coordination::Context& ctx) {
    return blocked(ctx, coordination::Outcome::MaybeApplied);
  };
}
/// An answer that takes its time.
inline Answer after(std::chrono::milliseconds time, Answer then) {
  return [=](const auto& request, const auto& sink, const coordination::Context& ctx) {
    std::this_thread::sleep_for(time);
    return then(request, sink, ctx);
  };
}
/// No answer until the Context is cancelled, whatever its deadline says.
inline Answer deaf_to_deadlines() {
  return [](const auto&, const auto&, const coordination::Context& ctx) {
    return blocked(ctx, coordination::Outcome::MaybeApplied, true);
  };
}

class ScriptedTransport : public coordination::Transport {
 public:
  struct Seen {
    coordination::HttpRequest request;
    bool streamed;
    std::chrono::steady_clock::time_point when;
  };

  /// An etcd without keys, whose every read is answered.
  ScriptedTransport() { always_["/v3/kv/range"] = ok(reply(1)); }

  /// An answer that is no Answer yet is called in any thread; see hang_in.
  template <class F>
  auto next(const std::string& path, F answer, int times = 1) {
    return hang_in<Answer>(std::move(answer), [&](const Answer& made) {
      std::lock_guard<std::mutex> hold(mutex_);
      for (int i = 0; i < times; ++i) next_[path].push_back(made);
    });
  }
  template <class F>
  auto always(const std::string& path, F answer) {
    return hang_in<Answer>(std::move(answer), [&](const Answer& made) {
      std::lock_guard<std::mutex> hold(mutex_);
      always_[path] = made;
    });
  }
  /// What every request to this endpoint gets, whatever the script says; null = the script.
  template <class F>
  auto endpoint(const std::string& url, F answer) {
    return hang_in<Answer>(std::move(answer), [&](const Answer& made) {
      std::lock_guard<std::mutex> hold(mutex_);
      endpoints_[url] = made;
    });
  }
  /// Forgets what was seen, and what was to come next.
  void clear() {
    std::lock_guard<std::mutex> hold(mutex_);
    seen_.clear();
    next_.clear();
  }

  std::vector<Seen> seen(const std::string& path = "") const {
    std::lock_guard<std::mutex> hold(mutex_);
    std::vector<Seen> result;
    for (const auto& one : seen_) {
      if (path.empty() || one.request.path == path) result.push_back(one);
    }
    return result;
  }
  int count(const std::string& path = "") const { return static_cast<int>(seen(path).size()); }
  std::vector<std::string> endpoints() const {
    std::vector<std::string> result;
    for (const auto& one : seen()) result.push_back(one.request.endpoint);
    return result;
  }

  coordination::Result<coordination::HttpResponse> perform(
      const coordination::HttpRequest& request, const coordination::ChunkSink& sink,
      const coordination::Context& ctx) override {
    const auto chosen = choose(request, static_cast<bool>(sink));
    auto response = chosen(request, sink, ctx);
    if (response && sink && response->status / 100 == 2) {
      if (!response->body.empty()) sink(response->body);
      response->body.clear();
    }
    return response;
  }

 private:
  Answer choose(const coordination::HttpRequest& request, bool streamed) {
    std::lock_guard<std::mutex> hold(mutex_);
    seen_.push_back({request, streamed, std::chrono::steady_clock::now()});
    const auto endpoint = endpoints_.find(request.endpoint);
    if (endpoint != endpoints_.end() && endpoint->second) return endpoint->second;
    auto& queue = next_[request.path];
    if (!queue.empty()) {
      auto first = std::move(queue.front());
      queue.pop_front();
      return first;
    }
    const auto found = always_.find(request.path);
    return found == always_.end() ? answer(404, "404 page not found\n") : found->second;
  }

  mutable std::mutex mutex_;
  std::vector<Seen> seen_;
  std::map<std::string, std::deque<Answer>> next_;
  std::map<std::string, Answer> always_, endpoints_;
};

/// The value of a header, or "".
inline std::string header(const coordination::HttpRequest& request, const std::string& name) {
  for (const auto& [key, value] : request.headers) {
    if (key == name) return value;
  }
  return "";
}

/// Options for this transport: one endpoint, quick retries.
inline coordination::CoordinatorOptions options_with(
    const std::shared_ptr<coordination::Transport>& transport) {
  coordination::CoordinatorOptions options;
  options.endpoints = {"one:2379"};
  options.transport = transport;
  options.retry_config.initial_delay = milliseconds(1);
  options.retry_config.max_delay = milliseconds(2);
  return options;
}

/// Throws, so that the test case ends.
inline coordination::Coordinator connect_to(coordination::CoordinatorOptions options) {
  return coordination::Coordinator::connect(std::move(options)).value();
}

}  // namespace support
