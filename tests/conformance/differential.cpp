// The same random requests to MemoryEtcd and to a real etcd: every answer and every event must be
// the same, with revisions counted from where the sequence began.
//
// COORDINATION_SEED=n repeats one sequence, COORDINATION_OPERATIONS=n makes each longer or shorter.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <random>

#include "subject.hpp"

using namespace conformance;

namespace {

constexpr int kSeeds = 25;
constexpr int kOperations = 400;  // of each seed

std::uint64_t setting(const char* name, std::uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::strtoull(value, nullptr, 10) : otherwise;
}

bool is_revision(const std::string& field) {
  return field.size() >= 8 && field.compare(field.size() - 8, 8, "revision") == 0;
}

/// Adds `offset` to every revision in a request or an answer; 0 and less have a meaning of their
/// own.
void shift_revisions(Json& json, std::int64_t offset) {
  if (!json.is_structured()) return;
  for (auto it = json.begin(); it != json.end(); ++it) {
    if (json.is_object() && is_revision(it.key()) && it->is_string()) {
      const std::int64_t revision = std::stoll(it->get<std::string>());
      if (revision > 0) *it = std::to_string(revision + offset);
    } else {
      shift_revisions(*it, offset);
    }
  }
}

/// From every key without a value: it may have been read with keys_only.
void erase_leases(Json& json) {
  if (!json.is_structured()) return;
  if (json.contains("create_revision") && !json.contains("value")) json.erase("lease");
  for (Json& inner : json) erase_leases(inner);
}

/// What must be the same: no ids of the cluster, no seconds that have passed, no order that etcd
/// leaves open.
Json comparable(Json answer, std::int64_t offset) {
  shift_revisions(answer, -offset);
  if (answer.contains("header")) {
    const Json revision = answer["header"].value("revision", Json());
    answer["header"] = {{"revision", revision}};
  }
  if (answer.contains("grantedTTL")) answer.erase("TTL");
  if (answer.contains("keys")) std::sort(answer["keys"].begin(), answer["keys"].end());
  return answer;
}

/// Draws requests. Revisions in them count from the beginning of the sequence.
class Generator {
 public:
  Generator(std::uint64_t seed, std::string prefix, std::int64_t first_lease)
      : random_(seed), prefix_(std::move(prefix)), first_lease_(first_lease) {}

  std::uint64_t below(std::uint64_t limit) { return random_() % limit; }
  bool chance(int percent) { return below(100) < static_cast<std::uint64_t>(percent); }

  static constexpr int kKeys = 8;
  std::string key(int index) const { return prefix_ + static_cast<char>('a' + index); }
  std::string key() { return key(static_cast<int>(below(kKeys))); }
  std::string value() {
    std::string bytes;
    for (auto n = below(4); n > 0; --n) bytes += static_cast<char>(below(3) * 127);
    return bytes;
  }
  /// Of five, one of which is never granted.
  std::string lease() { return std::to_string(first_lease_ + static_cast<std::int64_t>(below(5))); }
  std::string never_granted() const { return std::to_string(first_lease_ + 4); }
  /// Around those that there are.
  std::string revision(std::int64_t now) {
    return std::to_string(now + 1 - static_cast<std::int64_t>(below(14)));
  }

  Json put(std::int64_t) {
    Json put = {{"key", b64(key())}};
    if (!chance(10)) put["value"] = b64(value());
    if (chance(25)) put["lease"] = lease();
    if (chance(30)) put["prev_kv"] = true;
    if (chance(8)) put["ignore_value"] = true;
    if (chance(8)) put["ignore_lease"] = true;
    return put;
  }
  void add_range(Json& json) {
    json["key"] = b64(key());
    if (chance(30)) json["range_end"] = b64(key());
    if (!chance(40)) return;
    json["key"] = b64(prefix_);
    json["range_end"] = b64(coordination::prefix_range_end(prefix_));
  }
  Json range(std::int64_t now) {
    Json range;
    add_range(range);
    if (chance(20)) range["revision"] = revision(now);
    if (chance(25)) range["limit"] = std::to_string(below(6));
    if (chance(40))
      range["sort_target"] =
          std::vector<const char*>{"KEY", "VERSION", "CREATE", "MOD", "VALUE"}[below(5)];
    if (chance(40))
      range["sort_order"] = std::vector<const char*>{"NONE", "ASCEND", "DESCEND"}[below(3)];
    for (const char* flag : {"keys_only", "count_only", "serializable"}) {
      if (chance(10)) range[flag] = true;
    }
    for (const char* filter :
         {"min_mod_revision", "max_mod_revision", "min_create_revision", "max_create_revision"}) {
      if (chance(8)) range[filter] = revision(now);
    }
    return range;
  }
  Json remove(std::int64_t) {
    Json remove;
    add_range(remove);
    if (chance(40)) remove["prev_kv"] = true;
    return remove;
  }
  Json compare(std::int64_t now) {
    Json compare;
    add_range(compare);
    if (chance(70)) compare.erase("range_end");
    compare["result"] = std::vector<const char*>{"EQUAL", "GREATER", "LESS", "NOT_EQUAL"}[below(4)];
    switch (below(5)) {
      case 0: compare["target"] = "VERSION", compare["version"] = std::to_string(below(4)); break;
      case 1:
        compare["target"] = "CREATE";
        compare["create_revision"] = chance(50) ? "0" : revision(now);
        break;
      case 2: compare["target"] = "MOD", compare["mod_revision"] = revision(now); break;
      case 3: compare["target"] = "VALUE", compare["value"] = b64(value()); break;
      default: compare["target"] = "LEASE", compare["lease"] = chance(50) ? "0" : lease(); break;
    }
    return compare;
  }
  Json op(std::int64_t now, int depth) {
    const auto kind = below(depth > 0 ? 20 : 18);
    if (kind < 7) return {{"request_put", put(now)}};
    if (kind < 13) return {{"request_range", range(now)}};
    if (kind < 17) return {{"request_delete_range", remove(now)}};
    if (kind == 17) return chance(10) ? Json::object() : Json{{"request_put", put(now)}};
    return {{"request_txn", txn(now, depth - 1)}};
  }
  Json txn(std::int64_t now, int depth = 2) {
    Json txn = Json::object();
    for (auto n = below(3); n > 0; --n) txn["compare"].push_back(compare(now));
    for (const char* branch : {"success", "failure"}) {
      for (auto n = below(4); n > 0; --n) txn[branch].push_back(op(now, depth));
    }
    return txn;
  }
  Json watch(std::int64_t start) {
    Json watch;
    add_range(watch);
    watch["start_revision"] = std::to_string(start);
    if (chance(40)) watch["prev_kv"] = true;
    if (chance(15)) watch["filters"] = {"NOPUT"};
    if (chance(15)) watch["filters"] = {"NODELETE"};
    return watch;
  }

 private:
  std::mt19937_64 random_;
  std::string prefix_;
  std::int64_t first_lease_;
};

struct Totals {
  std::size_t requests{0}, refused{0}, watches{0}, events{0};

  Totals& operator+=(const Totals& other) {
    requests += other.requests;
    refused += other.refused;
    watches += other.watches;
    events += other.events;
    return *this;
  }
};

/// One sequence of requests to a MemoryEtcd and a real etcd.
class Comparison {
 public:
  Comparison(Subject& real, std::uint64_t seed)
      : subject_(real), memory_(std::make_shared<coordination::MemoryEtcd>(), "http://memory"),
        real_(real.gateway()), prefix_("d" + std::to_string(seed) + real.prefix()),
        lease_(1000000 + 10 * static_cast<std::int64_t>(seed)), generate_(seed, prefix_, lease_) {}

  const Totals& totals() const { return totals_; }

  /// Empty if all was the same, else what was not.
  std::string run(int operations) {
    begin();
    for (int i = 0; i < operations && difference_.empty(); ++i) step();
    if (difference_.empty()) end();
    return difference_;
  }

 private:
  struct WatchPair {
    std::string text;
    std::unique_ptr<WatchCall> memory, real;
  };

  std::int64_t now() const { return memory_.revision(); }

  void begin() {
    const auto mine = memory_.put(prefix_ + "begin", ""), theirs = real_.put(prefix_ + "begin", "");
    offset_ = theirs.revision() - mine.revision();
    compacted_ = mine.revision();
    same("/v3/kv/compaction", {{"revision", std::to_string(compacted_)}});
  }

  void step() {
    const auto kind = generate_.below(100);
    if (kind < 28) return same("/v3/kv/put", generate_.put(now()));
    if (kind < 45) return same("/v3/kv/range", generate_.range(now()));
    if (kind < 55) return same("/v3/kv/deleterange", generate_.remove(now()));
    if (kind < 80) return same("/v3/kv/txn", generate_.txn(now()));
    if (kind < 92) return lease_step(kind);
    if (kind < 95) return compact();
    watch();
  }

  void lease_step(std::uint64_t kind) {
    const std::string id = generate_.lease();
    if (kind < 85 && id != generate_.never_granted()) {
      return same("/v3/lease/grant", {{"ID", id}, {"TTL", std::to_string(5000)}});
    }
    if (kind < 88) return same("/v3/lease/revoke", {{"ID", id}});
    if (kind < 90) return same("/v3/lease/timetolive", {{"ID", id}, {"keys", true}});
    same_lines({{"ID", id}}, {{"ID", generate_.never_granted()}});
  }

  // etcd reads the prev_kv of an event when it sends it: not before all have been sent may their
  // history go. Of two watches that it takes together the one of the sync key may be sent first:
  // behind its next event nothing is left.
  void compact() {
    catch_up();
    catch_up();
    const auto span = static_cast<std::uint64_t>(now() - compacted_) + 4;
    const auto target = compacted_ - 1 + static_cast<std::int64_t>(generate_.below(span));
    same("/v3/kv/compaction", {{"revision", std::to_string(target)}});
    if (target > compacted_ && target <= now()) compacted_ = target;
  }

  // Beside the watch there is another, of a past write of the sync key. etcd takes watches that
  // have to catch up together: when that one has its event, the first is up to date as well.
  void watch() {
    same("/v3/kv/put", {{"key", b64(prefix_ + "sync")}});
    const bool from_now = generate_.chance(30);
    auto start = from_now ? 0 : std::max<std::int64_t>(1, std::stoll(generate_.revision(now())));
    if (start == compacted_ && subject_.has(Quirk::CompactionEatsDelete)) ++start;
    Json create = generate_.watch(start);
    create["watch_id"] = "1";
    Json sync = {{"key", b64(prefix_ + "sync")},
                 {"watch_id", "2"},
                 {"start_revision", std::to_string(now())}};
    WatchPair pair;
    pair.text = create.dump();
    pair.memory = std::make_unique<WatchCall>(
        memory_, Jsons{{{"create_request", create}}, {{"create_request", sync}}});
    shift_revisions(create, offset_);
    shift_revisions(sync, offset_);
    pair.real = std::make_unique<WatchCall>(
        real_, Jsons{{{"create_request", create}}, {{"create_request", sync}}});
    for (const auto* call : {&pair.memory, &pair.real}) {
      if (!(*call)->wait_lines(2)) difference_ = "no answer to a watch: " + pair.text;
    }
    watches_.push_back(std::move(pair));
    ++totals_.watches;
  }

  /// Waits until all watches have been sent all that there is.
  void catch_up() {
    if (watches_.empty()) return;
    same("/v3/kv/put", {{"key", b64(prefix_ + "sync")}});
    const auto revision = now();
    for (const WatchPair& pair : watches_) {
      wait_for(*pair.memory, revision);
      wait_for(*pair.real, revision + offset_);
    }
  }

  void wait_for(const WatchCall& call, std::int64_t revision) {
    const bool seen = call.lines().wait(
        [&](const auto& lines) {
          return std::any_of(lines.rbegin(), lines.rend(), [&](const Json& line) {
            const Json& result = line["result"];
            return number(result, "watch_id") == 2 && result.contains("events") &&
                   number(result["events"].back()["kv"], "mod_revision") == revision;
          });
        },
        support::lenient(20s));
    if (!seen && difference_.empty()) difference_ = "an event of the sync key is missing";
  }

  void end() {
    catch_up();
    for (const WatchPair& pair : watches_) compare_watch(pair);
    for (int i = 0; i < 5; ++i) same("/v3/lease/revoke", {{"ID", std::to_string(lease_ + i)}});
  }

  void compare_watch(const WatchPair& pair) {
    const Json mine = summary(*pair.memory, 0), theirs = summary(*pair.real, offset_);
    totals_.events += mine.size();
    if (mine == theirs || !difference_.empty()) return;
    difference_ =
        "watch " + pair.text + "\nMemoryEtcd: " + mine.dump() + "\nreal etcd:  " + theirs.dump();
  }

  /// What the first watch of a stream has been told, in order.
  static Json summary(const WatchCall& call, std::int64_t offset) {
    Json summary = Json::array();
    for (const Json& result : call.results()) {
      if (number(result, "watch_id") == 2) continue;
      for (const char* field : {"created", "canceled", "compact_revision", "cancel_reason"}) {
        if (result.contains(field)) summary.push_back({{field, result[field]}});
      }
      for (const Json& event : result.value("events", Json::array())) summary.push_back(event);
    }
    shift_revisions(summary, -offset);
    return summary;
  }

  void same(const char* path, const Json& request) {
    ++totals_.requests;
    Json shifted = request;
    shift_revisions(shifted, offset_);
    const Reply mine = memory_.call(path, request), theirs = real_.call(path, shifted);
    if (mine.status != 200) ++totals_.refused;
    bool same = is_same_status(path, mine, theirs);
    if (same && mine.status == 200) {
      Json one = comparable(mine.json, 0), two = comparable(theirs.json, offset_);
      if (subject_.has(Quirk::KeysOnlyHasNoLease)) erase_leases(one), erase_leases(two);
      same = one == two;
    }
    if (same || !difference_.empty()) return;
    difference_ = "request " + std::to_string(totals_.requests) + ": " + path + " " +
                  request.dump() + "\nMemoryEtcd: " + mine.body + "\nreal etcd (" +
                  std::to_string(offset_) + " further): " + theirs.body;
  }

  bool is_same_status(const std::string& path, const Reply& mine, const Reply& theirs) const {
    const bool two_ways = path == "/v3/kv/txn" && subject_.has(Quirk::TxnRefusedByFirst);
    if (two_ways && mine.status != 200) return theirs.status == 400 || theirs.status == 404;
    const bool same_status =
        mine.status == theirs.status ||
        (theirs.status == 412 && mine.code() == 9 && subject_.has(Quirk::PreconditionIs412));
    return same_status && mine.code() == theirs.code() && mine.message() == theirs.message();
  }

  void same_lines(const Json& one, const Json& two) {
    ++totals_.requests;
    const std::string body = one.dump() + two.dump() + one.dump();
    const auto mine = memory_.stream("/v3/lease/keepalive", body);
    const auto theirs = real_.stream("/v3/lease/keepalive", body);
    bool same = mine.size() == theirs.size();
    for (std::size_t i = 0; same && i < mine.size(); ++i) {
      same = comparable(mine[i]["result"], 0) == comparable(theirs[i]["result"], offset_);
    }
    if (!same) difference_ = "keepalive: " + Json(mine).dump() + "\n" + Json(theirs).dump();
  }

  Subject& subject_;
  Gateway memory_, real_;
  std::string prefix_;
  std::int64_t lease_;
  Generator generate_;
  std::int64_t offset_{0};
  std::int64_t compacted_{0};
  Totals totals_;
  std::vector<WatchPair> watches_;
  std::string difference_;
};

}  // namespace

CONFORMANCE("random requests are answered as MemoryEtcd answers them") {
  if (etcd.is_memory()) return;  // it is compared with each of the others
  const std::uint64_t only = setting("COORDINATION_SEED", 0);
  const auto operations = static_cast<int>(setting("COORDINATION_OPERATIONS", kOperations));
  const std::uint64_t base = only ? only : std::random_device{}() % 1000000 * 1000 + 1;
  const int seeds = only ? 1 : support::scaled(kSeeds);
  std::printf("%s: %d x %d random requests, seeds from %llu\n", etcd.name().c_str(), seeds,
              operations, static_cast<unsigned long long>(base));
  Totals totals;
  for (int i = 0; i < seeds; ++i) {
    const std::uint64_t seed = base + static_cast<std::uint64_t>(i);
    Comparison comparison(etcd, seed);
    const std::string difference = comparison.run(operations);
    INFO("repeat with COORDINATION_SEED=", seed);
    REQUIRE(difference == "");
    totals += comparison.totals();
  }
  std::printf("%s: %zu requests, %zu of them refused; %zu watches with %zu events; all the same\n",
              etcd.name().c_str(), totals.requests, totals.refused, totals.watches, totals.events);
  // A sequence that refuses or tells nothing would show nothing.
  CHECK(totals.refused * 20 > totals.requests);
  CHECK(totals.refused * 2 < totals.requests);
  CHECK(totals.events > totals.watches);
}
