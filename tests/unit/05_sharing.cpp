// Section 5: calls of many threads that share requests, and have the results that they would have
// had alone.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr int kOnTheWay = 8;  // of a kind: those that come then gather
constexpr const char* kRange = "/v3/kv/range";
constexpr const char* kPut = "/v3/kv/put";
constexpr const char* kRemove = "/v3/kv/deleterange";
constexpr const char* kTxn = "/v3/kv/txn";

using Call = std::function<void(Client&)>;

void run_all(std::vector<std::function<void()>> tasks) {
  std::vector<Joined> threads;
  for (auto& task : tasks) threads.emplace_back(std::move(task));
}

/// Requests of one kind are held back at a door until it is opened.
class Door {
 public:
  void pass(const HttpRequest& request) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (request.path != closed_for_) return;
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return request.path != closed_for_; });
    --waiting_;
  }
  void close(std::string path) {
    std::lock_guard<std::mutex> hold(mutex_);
    closed_for_ = std::move(path);
    changed_.notify_all();
  }
  void open() { close(""); }
  void wait_for(int n) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, lenient(5s), [&] { return waiting_ >= n; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string closed_for_;
  int waiting_{0};
};

struct Sharing {
  std::shared_ptr<MemoryEtcd> etcd{std::make_shared<MemoryEtcd>()};
  std::shared_ptr<Tap> tap{std::make_shared<Tap>(etcd)};
  Door door{};
  Hook hook{tap->before([this](const HttpRequest& request) { door.pass(request); })};
  CoordinatorOptions options{options_with(tap)};
  std::optional<Coordinator> coordinator{};

  Sharing() { options.timeout = lenient(20s); }
  Client& client() {
    if (!coordinator) coordinator = connect_to(options);
    return coordinator->client();
  }

  /// So many `first` are held on their way that the calls of other threads gather; `meanwhile` is
  /// done before they may go on, and requests of `held_then` are held after that. A thread that
  /// begins late may go by itself: see sooner_or_later.
  void gather(
      const char* path, const Call& first, const std::vector<Call>& others,
      const std::function<void()>& meanwhile = [] {}, const char* held_then = "") {
    auto& etcd_client = client();
    tap->reset();
    door.close(path);
    std::vector<Joined> threads;
    for (int i = 0; i < kOnTheWay; ++i) threads.emplace_back([&] { first(etcd_client); });
    door.wait_for(kOnTheWay);
    std::atomic<std::size_t> begun{0};
    for (auto& other : others) {
      threads.emplace_back([&] {
        ++begun;
        other(etcd_client);
      });
    }
    while (begun < others.size()) std::this_thread::yield();
    std::this_thread::sleep_for(20ms);
    meanwhile();
    door.close(held_then);
  }
};

const Call put_first = [](Client& client) { client.put("first", "").value(); };

/// A scenario that needs threads to be in time, which a busy machine may not grant at once.
template <class Scenario>
bool sooner_or_later(Scenario scenario) {
  for (int round = 0; round < 30; ++round) {
    if (scenario(std::to_string(round))) return true;
  }
  return false;
}

}  // namespace

TEST_CASE("sharing: puts that come while others are on their way go as one request") {
  Sharing sharing;
  auto& client = sharing.client();
  const bool shared = sooner_or_later([&](const std::string& round) {
    std::array<std::optional<PutResponse>, 6> done;
    std::vector<Call> puts;
    for (std::size_t i = 0; i < done.size(); ++i) {
      puts.emplace_back([&done, i, round](Client& with) {
        done[i] = with.put(round + "/" + std::to_string(i), "value " + std::to_string(i)).value();
      });
    }
    sharing.gather(kPut, put_first, puts);
    const bool one = sharing.tap->count(kTxn) == 1 && sharing.tap->count(kPut) == kOnTheWay;
    std::set<std::int64_t> revisions;
    for (std::size_t i = 0; i < done.size(); ++i) {
      const auto kv = client.get(round + "/" + std::to_string(i)).value();
      CHECK(kv.value == "value " + std::to_string(i));
      CHECK(kv.version == 1);
      REQUIRE(done[i]);
      CHECK(kv.mod_revision == done[i]->revision);
      CHECK_FALSE(done[i]->prev_kv);
      revisions.insert(done[i]->revision);
    }
    if (one) CHECK(revisions.size() == 1);
    return one;
  });
  CHECK(shared);
}

TEST_CASE("sharing: reads, also of one key, and of keys that are not there") {
  Sharing sharing;
  auto& client = sharing.client();
  client.put("a", "1").value();
  client.put("b", "2").value();
  const Call get_first = [](Client& with) { with.get("a").value(); };
  const bool shared = sooner_or_later([&](const std::string&) {
    const auto reads = [](std::string key, std::string value) {
      return [=](Client& with) { CHECK(with.get(key).value().value == value); };
    };
    const Call missing = [](Client& with) {
      const auto none = with.get("none");
      check_code(none, ErrorCode::NotFound);
      CHECK(none.error().message.find("none") != std::string::npos);
    };
    sharing.gather(kRange, get_first, {reads("a", "1"), reads("a", "1"), reads("b", "2"), missing});
    return sharing.tap->count(kTxn) == 1 && sharing.tap->count(kRange) == kOnTheWay;
  });
  CHECK(shared);
}

TEST_CASE("sharing: each removal is told what it has removed") {
  Sharing sharing;
  auto& client = sharing.client();
  const Call remove_first = [](Client& with) { with.remove("first").value(); };
  const bool shared = sooner_or_later([&](const std::string&) {
    client.put("a", "").value();
    const auto removes = [](std::string key, std::int64_t deleted) {
      return [=](Client& with) { CHECK(with.remove(key).value().deleted == deleted); };
    };
    sharing.gather(kRemove, remove_first, {removes("a", 1), removes("b", 0), removes("c", 0)});
    check_code(client.get("a"), ErrorCode::NotFound);
    return sharing.tap->count(kTxn) == 1 && sharing.tap->count(kRemove) == kOnTheWay;
  });
  CHECK(shared);
}

TEST_CASE("sharing: the configuration centre's calls share, too") {
  Sharing sharing;
  sharing.client();
  auto& config = sharing.coordinator->config();
  const bool shared = sooner_or_later([&](const std::string& round) {
    std::vector<Call> sets;
    for (int i = 0; i < 4; ++i) {
      sets.emplace_back([&config, i, round](Client&) {
        const auto key = "k" + std::to_string(i);
        const auto revision = config.set(key, round).value();
        const auto entry = config.get_entry(key).value();
        CHECK(entry.value == nlohmann::json(round));
        CHECK(entry.revision == revision);
      });
    }
    sharing.gather(kPut, put_first, sets);
    return sharing.tap->count(kTxn) > 0 && sharing.tap->count(kPut) < kOnTheWay + 4;
  });
  CHECK(shared);
}

TEST_CASE("sharing: a lone caller sends what it always did, and nobody shares who does not want") {
  Sharing sharing;
  SUBCASE("alone") {
    auto& client = sharing.client();
    sharing.tap->reset();
    for (int i = 0; i < 20; ++i) {
      client.put("a", std::to_string(i)).value();
      client.get("a").value();
      client.remove("a").value();
    }
    CHECK(sharing.tap->count(kPut) == 20);
    CHECK(sharing.tap->count(kRange) == 20);
    CHECK(sharing.tap->count(kRemove) == 20);
  }
  SUBCASE("turned off") {
    sharing.options.share_requests = false;
    std::vector<Call> puts(6, [](Client& client) { client.put("a", "").value(); });
    sharing.gather(kPut, put_first, puts);
    CHECK(sharing.tap->count(kPut) == kOnTheWay + 6);
  }
  SUBCASE("what has a lease, or is large, or a user's own Txn") {
    auto& client = sharing.client();
    const auto lease = client.grant(60s).value();
    PutRequest leased{"leased", "1", lease.id()};
    sharing.gather(kPut, put_first,
                   {[&](Client& with) { with.put(leased).value(); },
                    [](Client& with) { with.put("large", std::string(40000, 'x')).value(); }});
    CHECK(sharing.tap->count(kPut) == kOnTheWay + 2);
    CHECK(client.get("leased").value().lease == lease.id());
    CHECK(client.get("large").value().value.size() == 40000);
  }
  CHECK(sharing.tap->count(kTxn) == 0);
}

TEST_CASE("sharing: many puts of one key are each applied") {
  Sharing sharing;
  sharing.etcd->delay(1ms);
  auto& client = sharing.client();
  std::vector<std::function<void()>> tasks;
  for (int t = 0; t < 20; ++t) {
    tasks.emplace_back([&] {
      for (int i = 0; i < 10; ++i) client.put("one", "x").value();
    });
  }
  run_all(std::move(tasks));
  CHECK(client.get("one").value().version == 200);
}

TEST_CASE("sharing: what was refused together is done by each alone") {
  Sharing sharing;
  sharing.options.username = "user";
  sharing.options.password = "password";
  sharing.etcd->enable_auth("root");
  sharing.etcd->add_user("user", "password", "mine/");
  const Call first = [](Client& client) { client.put("mine/first", "").value(); };
  const bool refused = sooner_or_later([&](const std::string& round) {
    std::vector<Call> puts;
    for (int i = 0; i < 4; ++i) {
      puts.emplace_back(
          [=](Client& client) { client.put("mine/" + round + std::to_string(i), "").value(); });
    }
    puts.emplace_back([](Client& client) {
      const auto put = client.put("theirs", "");
      check_code(put, ErrorCode::PermissionDenied);
      CHECK(put.error().outcome == Outcome::NotApplied);
    });
    sharing.gather(kPut, first, puts);
    CHECK(sharing.client().get("mine/" + round + "0").value().version == 1);
    return sharing.tap->count(kTxn) == 1 && sharing.tap->count(kPut) == kOnTheWay + 5;
  });
  CHECK(refused);
}

TEST_CASE("sharing: whatever has certainly done nothing is taken apart") {
  const std::vector<Answer> answers{
      etcd_error(400, 3, "etcdserver: request is too large"),
      etcd_error(400, 3, "etcdserver: too many operations in txn request"),
      etcd_error(400, 3, "etcdserver: duplicate key given in txn request"),
      etcd_error(404, 5, "etcdserver: requested lease not found"),
      etcd_error(503, 14, "etcdserver: no leader"),
      refused()};
  for (const auto& answer : answers) {
    auto etcd = std::make_shared<ScriptedTransport>();
    etcd->always(kPut, after(2ms, ok(reply(2))));
    etcd->always(kTxn, answer);
    auto coordinator = connect_to(options_with(etcd));
    const bool tried = eventually([&] {
      std::vector<std::function<void()>> tasks;
      for (int t = 0; t < 20; ++t) {
        tasks.emplace_back([&, t] {
          for (int i = 0; i < 4; ++i) {
            const auto put = coordinator.client().put("k" + std::to_string(t), "");
            CHECK_MESSAGE(put, text_of(put));
          }
        });
      }
      run_all(std::move(tasks));
      return etcd->count(kTxn) > 0;
    });
    CHECK(tried);
  }
}

TEST_CASE("sharing: an unknown outcome is unknown to all, and nothing is sent twice") {
  for (const bool applied : {false, true}) {
    CAPTURE(applied);
    Sharing sharing;
    auto& client = sharing.client();
    const bool lost = sooner_or_later([&](const std::string& round) {
      std::mutex mutex;
      std::map<std::string, Outcome> failed;
      std::vector<Call> puts;
      for (int i = 0; i < 5; ++i) {
        puts.emplace_back([&, key = round + "/" + std::to_string(i)](Client& with) {
          const auto put = with.put(key, "");
          if (put) return;
          CHECK(to_string(put.error()).find("the put of " + key) != std::string::npos);
          std::lock_guard<std::mutex> hold(mutex);
          failed[key] = put.error().outcome;
        });
      }
      sharing.gather(kPut, put_first, puts, [&] {
        if (applied) return sharing.etcd->drop_replies(1, kTxn);
        sharing.tap->lose(1, kTxn);
      });
      for (auto& [key, outcome] : failed) {
        CHECK(outcome == Outcome::MaybeApplied);
        const auto kv = client.get(key);
        CHECK(kv.has_value() == applied);
        if (kv) CHECK(kv->version == 1);
      }
      return failed.size() == puts.size() && sharing.tap->count(kTxn) == 1;
    });
    CHECK(lost);
  }
}

TEST_CASE("sharing: each caller has its own Context") {
  Sharing sharing;
  auto& client = sharing.client();
  SUBCASE("who gives up before it is sent has written nothing") {
    const bool shared = sooner_or_later([&](const std::string& round) {
      Context cancelled;
      std::atomic<bool> unsent{false};
      const Call gives_up = [&, round](Client& with) {
        const auto put = with.put(round + "/cancelled", "", cancelled);
        if (!put) CHECK(put.error().code == ErrorCode::Cancelled);
        unsent = !put && put.error().outcome == Outcome::NotApplied;
      };
      const Call a = [=](Client& with) { with.put(round + "/a", "").value(); };
      const Call b = [=](Client& with) { with.put(round + "/b", "").value(); };
      sharing.gather(kPut, put_first, {gives_up, a, b}, [&] {
        cancelled.cancel();
        static_cast<void>(wait_until([&] { return unsent.load(); }, lenient(500ms)));
      });
      if (unsent) check_code(client.get(round + "/cancelled"), ErrorCode::NotFound);
      CHECK(client.get(round + "/a").value().version == 1);
      return unsent && sharing.tap->count(kTxn) == 1 && sharing.tap->count(kPut) == kOnTheWay;
    });
    CHECK(shared);
  }
  SUBCASE("who gives up later does not know, and the others go on") {
    const bool shared = sooner_or_later([&](const std::string& round) {
      Context cancelled;
      std::atomic<bool> gone{false}, unknown{false};
      std::vector<Call> puts{[&, round](Client& with) {
                               const auto put = with.put(round + "/cancelled", "", cancelled);
                               unknown = !put && put.error().outcome == Outcome::MaybeApplied;
                               if (!put) CHECK(put.error().code == ErrorCode::Cancelled);
                               gone = true;
                             },
                             [=](Client& with) { with.put(round + "/a", "").value(); }};
      const auto cancel = [&] {
        sharing.door.wait_for(1);
        cancelled.cancel();
        CHECK(wait_until([&] { return gone.load(); }, lenient(10s)));
        sharing.door.open();
      };
      std::optional<Joined> canceller;
      sharing.gather(
          kPut, put_first, puts, [&] { canceller.emplace(cancel); }, kTxn);
      canceller.reset();
      CHECK(client.get(round + "/a").value().version == 1);
      return unknown.load();
    });
    CHECK(shared);
  }
}

TEST_CASE("sharing: close() ends all that wait, and they have written nothing") {
  const bool ended = sooner_or_later([](const std::string&) {
    Sharing sharing;
    std::atomic<int> unsent{0};
    std::atomic<int> number{0};
    const std::vector<Call> puts(4, [&](Client& with) {
      const auto put = with.put("k" + std::to_string(++number), "");
      if (put || put.error().outcome != Outcome::NotApplied) return;
      CHECK(put.error().code == ErrorCode::Cancelled);
      ++unsent;
    });
    const Call first = [](Client& with) { static_cast<void>(with.put("first", "")); };
    std::optional<Joined> closer;
    sharing.gather(kPut, first, puts, [&] {
      closer.emplace([&] { CHECK(sharing.coordinator->close()); });
      static_cast<void>(wait_until([&] { return unsent == 4; }, lenient(500ms)));
    });
    closer.reset();
    return unsent == 4;
  });
  CHECK(ended);
}

namespace {

/// What one thread knows of a key of its own: puts may have happened that nobody has told it of.
struct Known {
  std::set<std::string> values{""};  // one of these; "" = there is none
  std::int64_t least{0}, most{0};    // its version

  void put(const Result<PutResponse>& done, const std::string& value) {
    if (done) {
      values = {value};
      ++least;
    }
    if (!done && done.error().outcome == Outcome::NotApplied) return;
    values.insert(value);
    ++most;
  }
  void read(const Result<KeyValue>& found) const {
    if (!found && found.error().code != ErrorCode::NotFound) return;
    INFO((found ? found->value : "nothing"));
    CHECK(values.count(found ? found->value : "") == 1);
    const auto version = found ? found->version : 0;
    CHECK(version >= least);
    CHECK(version <= most);
  }
};

void spoil(MemoryEtcd& etcd, unsigned kind) {
  if (kind == 0) etcd.drop_replies(1);
  if (kind == 1) etcd.fail_next(1);
  if (kind == 2) etcd.no_leader(1);
  if (kind == 3) etcd.drop_replies(1, kTxn);
}

}  // namespace

// After a batch has failed a Coordinator does not share for a while: so there are many of them.
TEST_CASE("sharing: under faults nothing is lost, and nothing done twice, as without sharing") {
  constexpr unsigned kThreads = 24;
  for (const bool shares : {true, false}) {
    CAPTURE(shares);
    Sharing sharing;
    sharing.options.share_requests = shares;
    sharing.etcd->delay(1ms);
    std::array<std::array<Known, 3>, kThreads> known;
    int batches = 0;
    std::atomic<int> failures{0};
    for (unsigned round = 0; round < static_cast<unsigned>(scaled(40)); ++round) {
      sharing.coordinator.reset();
      auto& client = sharing.client();
      sharing.tap->reset();
      const auto work = [&](unsigned t) {
        std::mt19937 random(round * kThreads + t);
        for (int i = 0; i < 12; ++i) {
          const auto k = random() % 3;
          const auto key = std::to_string(t) + "/" + std::to_string(k);
          const auto value = std::to_string(round) + "." + std::to_string(i);
          if (random() % 72 == 0) spoil(*sharing.etcd, static_cast<unsigned>(random() % 4));
          if (random() % 2 == 0) {
            const auto done = client.put(key, value);
            if (!done) ++failures;
            known[t][k].put(done, value);
          } else {
            known[t][k].read(client.get(key));
          }
        }
      };
      std::vector<std::function<void()>> tasks;
      for (unsigned t = 0; t < kThreads; ++t) tasks.emplace_back([&, t] { work(t); });
      run_all(std::move(tasks));
      batches += sharing.tap->count(kTxn);
    }
    CHECK(failures > 0);
    CHECK((batches > 0) == shares);
  }
}
