// What the soak's workers have done and been told, and what etcd's store went through meanwhile.
#pragma once

#include <cstdint>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "coordination.hpp"

namespace proof {

using Json = nlohmann::json;

/// How long what must come at last may take: a busy machine is no violation.
inline constexpr auto kPatience = std::chrono::minutes(3);

/// CLOCK_MONOTONIC in nanoseconds: one clock for all processes of a machine.
inline std::int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

inline constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

/// What a call has said of itself.
enum class Is { Done, NotApplied, MaybeApplied };

/// One call. A call that never returned (its process was killed) may have been applied.
struct Entry {
  int process{0};
  std::string kind{};  // "set", "acquire", ...; see workers.hpp
  Json in{}, out{};
  std::int64_t begin{0}, end{kNever};
  Is is{Is::MaybeApplied};
  std::string code{};  // of an error

  bool done() const { return is == Is::Done; }
};

/// One change of one key of the store.
struct Change {
  std::int64_t revision{0};
  bool put{true};
  std::string key{}, value{};
  std::int64_t created{0};
};

inline bool operator==(const Change& a, const Change& b) {
  return a.revision == b.revision && a.put == b.put && a.key == b.key && a.value == b.value;
}

struct History {
  std::vector<Entry> entries;  // in the order in which they began
  std::vector<Change> changes;
};

inline bool begins_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

/// Of these locks the soak deletes keys, and revokes leases: held() is local, and may be told of it
/// later.
inline constexpr const char* kRobbed = "/soak/locks/robbed";

/// A file that a process appends its calls to, so that they outlive it: a line at the begin of
/// each, and one at its end. Threads: any.
class Journal {
 public:
  explicit Journal(const std::string& path) : file_(path, std::ios::app) {}

  /// `out` makes the entry's `out` of a value.
  template <class T>
  coordination::Result<T> call(const std::string& kind, const Json& in,
                               const std::function<coordination::Result<T>()>& function,
                               const std::function<Json(const T&)>& out) {
    const auto id = begin(kind, in);
    auto result = function();
    if (result) {
      end(id, "done", {{"out", out(*result)}});
    } else {
      const auto& error = result.error();
      const bool maybe = error.outcome == coordination::Outcome::MaybeApplied;
      end(id, maybe ? "maybe" : "not", {{"code", to_string(error.code)}, {"why", error.cause}});
    }
    return result;
  }
  /// Something that takes no time.
  void note(const std::string& kind, const Json& in) { end(begin(kind, in), "done", {}); }

 private:
  std::int64_t begin(const std::string& kind, const Json& in) {
    std::lock_guard<std::mutex> hold(mutex_);
    write({{"n", ++count_}, {"begin", now_ns()}, {"kind", kind}, {"in", in}});
    return count_;
  }
  void end(std::int64_t id, const char* is, Json line) {
    line["n"] = id;
    line["is"] = is;
    line["end"] = now_ns();
    std::lock_guard<std::mutex> hold(mutex_);
    write(line);
  }
  void write(const Json& line) {
    file_ << line.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
  }

  std::mutex mutex_;
  std::ofstream file_;
  std::int64_t count_{0};
};

inline Is is_of(const std::string& name) {
  return name == "done" ? Is::Done : name == "not" ? Is::NotApplied : Is::MaybeApplied;
}

/// The entries of one process. A line that its death has cut off is none.
inline std::vector<Entry> read_journal(const std::string& path, int process) {
  std::vector<Entry> entries;
  std::ifstream file(path);
  for (std::string text; std::getline(file, text);) {
    Json line = Json::parse(text, nullptr, false);
    if (line.is_discarded()) continue;
    const auto n = line["n"].get<std::size_t>();
    if (line.contains("begin")) {
      entries.resize(n);
      entries[n - 1].process = process;
      entries[n - 1].kind = line["kind"];
      entries[n - 1].in = line["in"];
      entries[n - 1].begin = line["begin"];
      continue;
    }
    Entry& entry = entries.at(n - 1);
    entry.end = line["end"];
    entry.is = is_of(line["is"]);
    entry.out = line.value("out", Json());
    entry.code = line.value("code", "");
  }
  return entries;
}

}  // namespace proof
