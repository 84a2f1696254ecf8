// Many watches on a few streams.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <thread>

#include "support/live.hpp"
#include "support/watch_support.hpp"

using namespace coordination;
using namespace support;

namespace {

struct Metered {
  std::shared_ptr<WatchMeter> meter{std::make_shared<WatchMeter>()};
  std::string dir;
  std::optional<Coordinator> coordinator;

  explicit Metered(const EtcdServer& etcd) {
    auto options = options_for(etcd);
    options.transport = meter;
    dir = options.key_prefix + "/";
    coordinator.emplace(connect(std::move(options)));
  }
  Client& client() { return coordinator->client(); }
};

/// "name" = value for all of them, in as few transactions as etcd allows.
void put_all(Client& client, const std::vector<std::string>& keys, const std::string& value) {
  constexpr std::size_t kMostOps = 128;
  for (std::size_t begin = 0; begin < keys.size(); begin += kMostOps) {
    Txn txn;
    for (std::size_t i = begin; i < std::min(keys.size(), begin + kMostOps); ++i) {
      txn.then(Op::put(keys[i], value));
    }
    client.commit(txn).value();
  }
}

/// Runs `work` until it is stopped.
class Background {
 public:
  template <class Work>
  explicit Background(Work work)
      : thread_([this, work = std::move(work)]() mutable {
          while (!stopping_) work();
        }) {}
  ~Background() { stop(); }
  void stop() {
    stopping_ = true;
    if (thread_.joinable()) thread_.join();
  }

 private:
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace

namespace {

/// The writes of one key, as they were acknowledged.
struct Written {
  std::mutex mutex;
  std::vector<std::int64_t> revisions;

  std::vector<std::int64_t> after(std::int64_t revision) {
    std::lock_guard<std::mutex> hold(mutex);
    const auto first = std::upper_bound(revisions.begin(), revisions.end(), revision);
    return {first, revisions.end()};
  }
};

struct Listener {
  std::size_t key{0};
  std::int64_t known{0};     // all after this revision must come
  std::int64_t returned{0};  // what came before this one may have been too early
  Journal<std::int64_t> seen;
  Subscription subscription;
};

/// Exactly what was written after the listener's start, whichever it was in the time of the call.
bool complete(const Listener& listener, Written& written) {
  const auto seen = listener.seen.all();
  if (seen.empty()) return written.after(listener.returned).empty();
  return seen.front() > listener.known && seen == written.after(seen.front() - 1) &&
         written.after(listener.returned).size() <= seen.size();
}

}  // namespace

TEST_CASE("watch: two thousand added one by one under 200 writes a second [slow]") {
  const int count = scaled(2000);
  constexpr std::size_t kKeys = 40;
  const EtcdServer etcd;
  Metered m(etcd);
  auto writer = connect(etcd);
  std::vector<Written> written(kKeys);
  std::atomic<std::int64_t> last_revision{
      writer.client().put(m.dir + "start", "").value().revision};
  const auto key = [&](std::size_t i) { return m.dir + "k" + std::to_string(i); };

  std::size_t writes = 0;
  auto next_write = std::chrono::steady_clock::now();
  Background writing([&] {
    next_write += 5ms;
    std::this_thread::sleep_until(next_write);
    const std::size_t i = writes++ % kKeys;
    std::lock_guard<std::mutex> hold(written[i].mutex);
    const auto revision = writer.client().put(key(i), std::to_string(writes)).value().revision;
    written[i].revisions.push_back(revision);
    last_revision = revision;
  });

  std::vector<std::unique_ptr<Listener>> listeners;
  const Stopwatch watch;
  for (int i = 0; i < count; ++i) {
    auto listener = std::make_unique<Listener>();
    listener->key = static_cast<std::size_t>(i) % kKeys;
    WatchRequest request;
    request.key = key(listener->key);
    listener->known = last_revision;
    if (i % 2 == 0) request.start_revision = listener->known + 1;  // else from now on
    auto made = m.client().watch(
        request, [seen = &listener->seen](const WatchEvent& event) { seen->add(event.revision); });
    REQUIRE_MESSAGE(made, why(made));
    {
      std::lock_guard<std::mutex> no_write(written[listener->key].mutex);
      listener->returned = i % 2 == 0 ? listener->known : last_revision.load();
    }
    listener->subscription = std::move(*made);
    listeners.push_back(std::move(listener));
    std::this_thread::sleep_for(2ms);
  }
  MESSAGE(count, " watches added in ", watch.seconds(), " s, ", m.meter->creates(),
          " create requests on ", m.meter->streams(), " streams, at most ",
          m.meter->most_streams_at_once(), " at once");
  CHECK(wait_until([&] { return m.meter->confirmed() == count; }, lenient(5s)));
  std::this_thread::sleep_for(500ms);  // the writes go on after the last merge
  writing.stop();

  const auto behind = [&] {
    return std::count_if(listeners.begin(), listeners.end(), [&](const auto& listener) {
      return !complete(*listener, written[listener->key]);
    });
  };
  wait_until([&] { return behind() == 0; }, lenient(5s));
  CHECK(behind() == 0);
  std::size_t events = 0;
  for (const auto& listener : listeners) events += listener->seen.size();
  MESSAGE(writes, " writes, ", events, " events");
  CHECK(events > static_cast<std::size_t>(count));
  CHECK(m.meter->creates() <= count * 2 * (std::log2(count) + 2));
  CHECK(m.meter->most_streams_at_once() <= 5);
}

TEST_CASE("watch: adding one re-creates few others, on few streams [slow]") {
  const int count = 80;
  Metered m(shared_etcd());
  std::vector<Watch<WatchEvent>> watches;
  for (int i = 0; i < count; ++i) {
    watches.push_back(m.client().watch(m.dir + std::to_string(i)).value());
    REQUIRE(wait_until([&] { return m.meter->confirmed() == i + 1; }, lenient(5s)));
  }
  MESSAGE(count, " watches, each confirmed before the next: ", m.meter->creates(),
          " create requests, ", m.meter->most_streams_at_once(), " streams at most");
  CHECK(m.meter->creates() <= count * 2 * (std::log2(count) + 2));
  CHECK(m.meter->most_streams_at_once() <= 5);
  // And all of them are still there.
  std::vector<std::string> keys;
  for (int i = 0; i < count; ++i) keys.push_back(m.dir + std::to_string(i));
  put_all(m.client(), keys, "x");
  for (int i = 0; i < count; ++i) {
    const auto event =
        watches[static_cast<std::size_t>(i)].next(Context::with_timeout(lenient(20s)));
    REQUIRE_MESSAGE(event, why(event));
    CHECK(event->kv.key == keys[static_cast<std::size_t>(i)]);
  }
}

TEST_CASE("watch: those that start together go into few POSTs") {
  Metered m(shared_etcd());
  std::vector<Watch<WatchEvent>> watches;
  for (int i = 0; i < 300; ++i) {
    WatchRequest request;
    request.key = m.dir + std::to_string(i);
    request.start_revision = 1'000'000;
    watches.push_back(m.client().watch(request).value());
  }
  CHECK(wait_until([&] { return m.meter->confirmed() == 300; }, lenient(5s)));
  CHECK(m.meter->streams() <= 10);
}

TEST_CASE("watch: ten thousand on distinct keys, each event exactly once [slow]") {
  const int count = scaled(10000);
  const int own_threads = sanitized() ? 1 : 0;  // ThreadSanitizer's
  constexpr int kConnections = 32;              // ten thousand watches shall not have one each
  const EtcdServer etcd;
  Metered m(etcd);
  std::vector<std::string> keys;
  for (int i = 0; i < count; ++i) keys.push_back(m.dir + std::to_string(i));
  std::vector<std::atomic<int>> rounds(keys.size());  // of events, for each watch
  std::atomic<int> wrong{0}, arrived{0};
  std::vector<Subscription> subscriptions(keys.size());

  int most_threads = 0, most_connections = 0;
  std::atomic<int> refused{0};
  const auto subscribe = [&](std::size_t i) {
    WatchRequest request;
    request.key = keys[i];
    auto made = m.client().watch(request, [&, i](const WatchEvent& event) {
      const std::string expected = "round " + std::to_string(++rounds[i]);
      if (event.kv.key != keys[i] || event.kv.value != expected) ++wrong;
      ++arrived;
    });
    if (!made) return static_cast<void>(++refused);
    subscriptions[i] = std::move(*made);
  };
  const long before = rss_kb();
  const Stopwatch watch;
  std::thread even([&] {
    for (std::size_t i = 0; i < keys.size(); i += 2) subscribe(i);
  });
  for (std::size_t i = 1; i < keys.size(); i += 2) {
    subscribe(i);
    if (i % 500 != 1) continue;
    most_threads = std::max(most_threads, thread_count() - 1);  // the other that asks
    most_connections = std::max(most_connections, connection_count(etcd.port()));
  }
  even.join();
  CHECK(refused == 0);
  const double called = watch.seconds();
  CHECK(most_threads <= 20 + own_threads);
  // One for each request that is under way, and so many that wait for the next.
  CHECK(most_connections <= kConnections + most_threads);
  CHECK(wait_until([&] { return m.meter->confirmed() == count; }, lenient(20s)));
  const double created = watch.seconds();
  const long late = watch.over(10s);
  CHECK(thread_count() <= 20 + own_threads);
  CHECK(connection_count(etcd.port()) <= kConnections);
  const long grown = rss_kb() - before;
  MESSAGE(count, " watches: ", called, " s to ask, ", created, " s until etcd has them all, ",
          grown / 1024, " MiB resident, ", m.meter->creates(), " create requests, ",
          m.meter->most_streams_at_once(), " streams at most");
  if (!sanitized()) {
    CHECK(late == 0);
    CHECK(grown <= 30 * 1024);
  }
  CHECK(m.meter->most_streams_at_once() <= 5);

  for (int round = 1; round <= 2; ++round) {
    const Stopwatch delivery;
    put_all(m.client(), keys, "round " + std::to_string(round));
    CHECK(wait_until([&] { return arrived >= round * count; }, lenient(10s)));
    MESSAGE("round ", round, ": ", delivery.seconds(), " s");
    CHECK(thread_count() <= 20 + own_threads);
    CHECK(connection_count(etcd.port()) <= kConnections);
  }
  // A second round can only be complete and right if nothing of the first came twice.
  CHECK(arrived == 2 * count);
  CHECK(wrong == 0);
  for (const auto& round : rounds) REQUIRE(round == 2);
  const Stopwatch end;
  m.coordinator->close().value();
  CHECK(end.over(lenient(1s)) == 0);
}
