// What must be true of every history. Each check says what is not, in words; nothing = all is well.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "history.hpp"

namespace proof {

using Violations = std::vector<std::string>;

inline std::string told(const Entry& entry) {
  return "process " + std::to_string(entry.process) + ": " + entry.kind + " " + entry.in.dump() +
         (entry.code.empty() ? "" : ", " + entry.code) +
         (entry.out.is_null() ? "" : ", " + entry.out.dump()) + " from " +
         std::to_string(entry.begin) + " to " +
         (entry.end == kNever ? "its death" : std::to_string(entry.end));
}

/// What tells one registration from another in its record; "" in any other value.
inline std::string number_of(const std::string& value) {
  const Json json = Json::parse(value, nullptr, false);
  if (!json.is_object() || !json.contains("metadata")) return "";
  return json["metadata"].value("n", "");
}

// -- writes -------------------------------------------------------------------------------------

/// Every value is written by one call: a success is in the store once, at the revision that it
/// names; what was not applied never; what may be, once at most.
inline Violations writes_are_as_told(const History& history) {
  std::map<std::pair<std::string, std::string>, std::vector<std::int64_t>> applied;
  for (const Change& change : history.changes) {
    if (change.put) applied[{change.key, change.value}].push_back(change.revision);
  }
  Violations found;
  for (const Entry& entry : history.entries) {
    if (!entry.in.contains("writes")) continue;
    for (const auto& [key, value] : entry.in["writes"].items()) {
      const auto& at = applied[{key, value.get<std::string>()}];
      const std::size_t most = entry.is == Is::NotApplied ? 0 : 1, least = entry.done() ? 1 : 0;
      const bool elsewhere = entry.done() && at.size() == 1 && at[0] != entry.out["revision"];
      if (at.size() <= most && at.size() >= least && !elsewhere) continue;
      found.push_back(told(entry) + ": in the store " + std::to_string(at.size()) + " times" +
                      (elsewhere ? ", at revision " + std::to_string(at[0]) : ""));
    }
  }
  return found;
}

/// What a call has removed was removed at the revision that it names, and by no other call; and of
/// these keys nothing was removed but by a call that has, or may have.
inline Violations removals_are_as_told(const History& history) {
  std::set<std::pair<std::string, std::int64_t>> removals;
  for (const Change& change : history.changes) {
    if (!change.put) removals.emplace(change.key, change.revision);
  }
  Violations found;
  std::map<std::string, int> maybe;  // by key
  for (const Entry& entry : history.entries) {
    if (entry.kind != "remove" && entry.kind != "delete") continue;
    maybe[entry.in["key"]] += entry.is == Is::MaybeApplied;
    if (!entry.done() || entry.out.value("deleted", 1) == 0) continue;
    if (removals.erase({entry.in["key"], entry.out["revision"]}) == 1) continue;
    found.push_back(told(entry) + ": not at this revision, or by another call, too");
  }
  for (const auto& [key, revision] : removals) {
    const auto calls = maybe.find(key);
    if (calls == maybe.end() || calls->second-- > 0) continue;
    found.push_back(key + " was removed at revision " + std::to_string(revision) +
                    ", and nobody may have done it");
  }
  return found;
}

// -- services -----------------------------------------------------------------------------------

/// Each registration has a number of its own. A success is in the store at the revision that it
/// names, and again only where the record had gone and came back; what was not applied is never
/// there; what may be, once at most. After an unregister() the record is not there.
inline Violations registrations_are_as_told(const History& history, const std::string& prefix) {
  std::map<std::string, std::vector<const Change*>> changes;    // by key
  std::map<std::string, std::vector<std::int64_t>> registered;  // by number: revisions
  for (const Change& change : history.changes) {
    if (!begins_with(change.key, prefix)) continue;
    changes[change.key].push_back(&change);
    if (change.put) registered[number_of(change.value)].push_back(change.revision);
  }
  const auto exists = [&](const std::string& key, std::int64_t revision) {
    bool there = false;
    for (const Change* change : changes[key]) {
      if (change->revision <= revision) there = change->put;
    }
    return there;
  };
  Violations found;
  for (const Entry& entry : history.entries) {
    if (entry.kind == "unregister" && entry.done()) {
      if (!exists(prefix + entry.in["id"].get<std::string>(), entry.out["revision"])) continue;
      found.push_back(told(entry) + ": it is there at this revision");
    }
    if (entry.kind != "register") continue;
    const auto& at = registered[entry.in["n"]];
    const bool named =
        !entry.done() || std::find(at.begin(), at.end(), entry.out["revision"]) != at.end();
    const std::size_t most = entry.is == Is::NotApplied ? 0 : entry.done() ? at.size() : 1;
    if (named && at.size() <= most) continue;
    found.push_back(told(entry) + ": in the store " + std::to_string(at.size()) + " times");
  }
  return found;
}

// -- queues -------------------------------------------------------------------------------------

/// All that is in a queue at some revision, by its keys.
using Queue = std::map<std::string, std::int64_t>;  // key -> create revision

inline std::string queue_of(const std::string& key) { return key.substr(0, key.rfind('/') + 1); }

inline std::size_t rank_in(const Queue& queue, std::int64_t token) {
  return static_cast<std::size_t>(
      std::count_if(queue.begin(), queue.end(), [&](const auto& k) { return k.second < token; }));
}

/// What holders write under guard they write while they own: their key is there with their token,
/// and nobody is before them (of permits: not so many). So no two holders' writes interleave.
inline Violations guarded_writes_are_owners(const History& history, std::size_t permits) {
  std::map<std::string, Queue> queues;
  Violations found;
  for (const Change& change : history.changes) {
    if (begins_with(change.key, "/soak/guarded")) {
      const Json by = Json::parse(change.value);
      const std::string key = by["key"];
      const std::int64_t token = by["token"];
      const Queue& queue = queues[queue_of(key)];
      const auto there = queue.find(key);
      const std::size_t most = by["mode"] == "permit"   ? permits
                               : by["mode"] == "shared" ? queue.size()
                                                        : 1;
      const bool owns = there != queue.end() && there->second == token;
      if (owns && rank_in(queue, token) < most) continue;
      found.push_back("at revision " + std::to_string(change.revision) + " was written " +
                      change.value + ": " + (owns ? "others were before it" : "it owned nothing"));
    } else if (change.put) {
      queues[queue_of(change.key)][change.key] = change.created;
    } else {
      queues[queue_of(change.key)].erase(change.key);
    }
  }
  return found;
}

/// The time in which somebody certainly held a place in a queue.
struct Holding {
  std::string queue{}, mode{};
  std::int64_t token{0};
  std::int64_t from{0}, to{0};
};

/// From the end of its acquire to the begin of the last call by which it was still ours: of a
/// release or a guarded write that was done, or of held() where nobody deletes keys.
inline std::vector<Holding> holdings_of(const History& history) {
  std::map<std::pair<std::string, std::int64_t>, Holding> all;
  for (const Entry& entry : history.entries) {
    if (!entry.done()) continue;
    if (entry.kind == "acquire") {
      const std::int64_t token = entry.out["token"];
      all[{entry.in["queue"], token}] = {entry.in["queue"], entry.in["mode"], token, entry.end,
                                         entry.end};
    }
    const bool proves = entry.kind == "release" || entry.kind == "guarded" ||
                        (entry.kind == "held" && entry.out["held"] == true &&
                         !begins_with(entry.in["queue"], kRobbed));
    if (!proves) continue;
    const auto at = all.find({entry.in["queue"], entry.in["token"]});
    if (at != all.end()) at->second.to = std::max(at->second.to, entry.begin);
  }
  std::vector<Holding> result;
  for (auto& [id, holding] : all) result.push_back(std::move(holding));
  return result;
}

inline bool may_be_together(const Holding& a, const Holding& b) {
  return a.mode == b.mode && (a.mode == "shared" || a.mode == "permit");
}

/// Those who still held when it was acquired. It may have been lost before the answer came, and
/// others who came later hold then; but those who came before it cannot any more.
inline std::vector<Holding> beside(const Holding& holding, const std::vector<Holding>& others) {
  std::vector<Holding> result;
  std::copy_if(others.begin(), others.end(), std::back_inserter(result), [&](const Holding& other) {
    return other.to > holding.from && (holding.to > holding.from || other.token < holding.token);
  });
  return result;
}

/// At no time are there two holders, but shared ones, or more than there are permits.
inline Violations holders_are_alone(const History& history, std::size_t permits) {
  auto holdings = holdings_of(history);
  std::sort(holdings.begin(), holdings.end(),
            [](const Holding& a, const Holding& b) { return a.from < b.from; });
  std::map<std::string, std::vector<Holding>> inside;
  Violations found;
  for (const Holding& holding : holdings) {
    auto& others = inside[holding.queue];
    const auto over = [&](const Holding& other) { return other.to <= holding.from; };
    others.erase(std::remove_if(others.begin(), others.end(), over), others.end());
    const auto neighbours = beside(holding, others);
    for (const Holding& other : neighbours) {
      if (may_be_together(holding, other)) continue;
      found.push_back(holding.queue + ": " + std::to_string(other.token) + " was held until " +
                      std::to_string(other.to) + " at least, and " + std::to_string(holding.token) +
                      " from " + std::to_string(holding.from));
    }
    others.push_back(holding);
    if (holding.mode == "permit" && neighbours.size() >= permits) {
      found.push_back(holding.queue + ": one more than the permits at " +
                      std::to_string(holding.from));
    }
  }
  return found;
}

/// Who acquires later has the greater token.
inline Violations tokens_grow(const History& history) {
  std::map<std::string, std::map<std::int64_t, std::int64_t>> queues;  // end of acquire -> highest
  auto acquires = history.entries;
  acquires.erase(std::remove_if(acquires.begin(), acquires.end(),
                                [](const Entry& e) {
                                  return e.kind != "acquire" || !e.done() ||
                                         e.in["mode"] == "shared" || e.in["mode"] == "permit";
                                }),
                 acquires.end());
  std::sort(acquires.begin(), acquires.end(),
            [](const Entry& a, const Entry& b) { return a.end < b.end; });
  Violations found;
  for (const Entry& entry : acquires) {
    auto& ends = queues[entry.in["queue"]];
    const std::int64_t token = entry.out["token"];
    const auto later = ends.lower_bound(entry.begin);
    if (later != ends.begin() && std::prev(later)->second >= token) {
      found.push_back(told(entry) + ": token " + std::to_string(std::prev(later)->second) +
                      " was given before");
    }
    const auto highest = ends.empty() ? 0 : ends.rbegin()->second;
    ends[entry.end] = std::max(highest, token);
  }
  return found;
}

/// Whose key somebody else has deleted cannot release it.
inline Violations robbed_is_told(const History& history, const std::set<std::int64_t>& robbed) {
  Violations found;
  for (const Entry& entry : history.entries) {
    if (entry.kind != "release" || !entry.done()) continue;
    if (robbed.count(entry.in["token"].get<std::int64_t>()) == 0) continue;
    found.push_back(told(entry) + ": its key had been deleted by somebody else");
  }
  return found;
}

// -- watches and views --------------------------------------------------------------------------

inline std::vector<Change> changes_under(const History& history, const std::string& prefix) {
  std::vector<Change> result;
  for (const Change& change : history.changes) {
    if (begins_with(change.key, prefix)) result.push_back(change);
  }
  return result;
}

/// What each watch has delivered is what the store went through, from its first revision on to the
/// last event: all of it, once, in order.
inline Violations watches_are_complete(const History& history) {
  using Changes = std::vector<Change>;
  std::map<std::string, Changes> changes;  // by prefix
  struct Watched {
    Changes::const_iterator next{}, end{};
    bool wrong{false};
  };
  std::map<std::pair<int, int>, Watched> watches;
  Violations found;
  for (const Entry& entry : history.entries) {
    if (entry.kind != "watch" && entry.kind != "event") continue;
    Watched& watch = watches[{entry.process, entry.in["id"]}];
    if (entry.kind == "watch") {
      const auto added = changes.emplace(entry.in["prefix"], Changes());
      Changes& all = added.first->second;
      if (added.second) all = changes_under(history, entry.in["prefix"]);
      const auto before = [](const Change& c, std::int64_t from) { return c.revision < from; };
      const std::int64_t from = entry.in["from"];
      watch = {std::lower_bound(all.begin(), all.end(), from, before), all.end()};
      continue;
    }
    const Change got{entry.in["revision"], entry.in["type"] == "PUT", entry.in["key"],
                     entry.in["value"]};
    const bool more = watch.next != watch.end;
    const auto expected = more ? watch.next++->revision : 0;
    if ((more && got == *std::prev(watch.next)) || std::exchange(watch.wrong, true)) continue;
    found.push_back(told(entry) + ": the store has revision " + std::to_string(expected));
  }
  return found;
}

/// By the last part of its key, what is under a prefix. Of a service: its number.
inline Json as_seen(const std::map<std::string, std::string>& state, const std::string& prefix) {
  Json seen = Json::object();
  for (const auto& [key, value] : state) {
    const auto number = number_of(value);
    seen[key.substr(prefix.size())] = number.empty() ? value : number;
  }
  return seen;
}

/// What a view shows is what was in the store at the revision that it names.
inline Violations views_are_true(const History& history) {
  std::vector<const Entry*> views;
  for (const Entry& entry : history.entries) {
    if (entry.kind == "view") views.push_back(&entry);
  }
  const auto revision = [](const Entry* e) { return e->in["revision"].get<std::int64_t>(); };
  std::sort(views.begin(), views.end(),
            [&](const Entry* a, const Entry* b) { return revision(a) < revision(b); });
  Violations found;
  std::map<std::string, std::map<std::string, std::string>> states;  // by prefix
  for (const Entry* view : views) states[view->in["prefix"]];
  auto change = history.changes.begin();
  for (const Entry* view : views) {
    for (; change != history.changes.end() && change->revision <= revision(view); ++change) {
      for (auto& [prefix, state] : states) {
        if (!begins_with(change->key, prefix)) continue;
        if (change->put) state[change->key] = change->value;
        if (!change->put) state.erase(change->key);
      }
    }
    const std::string prefix = view->in["prefix"];
    const Json seen = as_seen(states[prefix], prefix);
    if (seen == view->in["state"]) continue;
    found.push_back(told(*view) + ": the store was " + Json::diff(seen, view->in["state"]).dump());
  }
  return found;
}

// -- the end ------------------------------------------------------------------------------------

/// Every process that was not killed has come to rest, and has nothing left.
inline Violations everything_ends(const History& history, const std::set<int>& killed) {
  Violations found;
  std::set<int> begun, ended;
  for (const Entry& entry : history.entries) {
    begun.insert(entry.process);
    if (entry.kind == "ended") {
      ended.insert(entry.process);
      if (entry.in["threads"] != 0 || entry.in["descriptors"] != 0) found.push_back(told(entry));
    }
    if (entry.kind == "reached" && entry.in["yes"] != true) found.push_back(told(entry));
  }
  for (const int process : begun) {
    if (ended.count(process) > 0 || killed.count(process) > 0) continue;
    found.push_back("process " + std::to_string(process) + " has not come to its end");
  }
  return found;
}

}  // namespace proof
