// Calls of many threads that share requests, on a real etcd.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <thread>

#include "support/live.hpp"

using namespace coordination;
using namespace support;

namespace {

template <class Fn>
void in_threads(int n, const Fn& work) {
  std::vector<std::thread> threads;
  for (int t = 0; t < n; ++t) threads.emplace_back([&work, t] { work(t); });
  for (auto& thread : threads) thread.join();
}

}  // namespace

TEST_CASE("sharing: many threads put, get and remove; a watch sees each put once, in order") {
  constexpr int kThreads = 32;
  const int rounds = scaled(50);
  std::atomic<int> batches{0};
  auto options = options_for(shared_etcd());
  options.on_request = [&](const RequestEvent& event) { batches += event.path == "/v3/kv/txn"; };
  auto coordinator = connect(options);
  auto& client = coordinator.client();
  const auto dir = unique_prefix() + "/";
  std::mutex mutex;
  std::map<std::string, std::vector<std::string>> seen;
  std::size_t events = 0;
  WatchRequest everything{dir, prefix_range_end(dir)};
  everything.no_delete = true;
  const auto watch = client.watch(everything, [&](const WatchEvent& event) {
    std::lock_guard<std::mutex> hold(mutex);
    seen[event.kv.key].push_back(event.kv.value);
    ++events;
  });
  REQUIRE_MESSAGE(watch, why(watch));
  in_threads(kThreads, [&](int t) {
    const auto key = dir + std::to_string(t);
    for (int i = 0; i < rounds; ++i) {
      const auto put = client.put(key, std::to_string(i)).value();
      const auto kv = client.get(key).value();
      CHECK(kv.value == std::to_string(i));
      CHECK(kv.mod_revision == put.revision);
      CHECK(kv.version == i % 10 + 1);
      if (i % 10 < 9) continue;
      CHECK(client.remove(key).value().deleted == 1);
      CHECK(client.remove(key).value().deleted == 0);
      const auto none = client.get(key);
      CHECK((!none && none.error().code == ErrorCode::NotFound));
    }
  });
  const auto all = static_cast<std::size_t>(kThreads * rounds);
  const auto has_all = [&] {
    std::lock_guard<std::mutex> hold(mutex);
    return events >= all;
  };
  CHECK(wait_until(has_all, lenient(20s)));
  std::vector<std::string> expected;
  for (int i = 0; i < rounds; ++i) expected.push_back(std::to_string(i));
  std::lock_guard<std::mutex> hold(mutex);
  CHECK(seen.size() == kThreads);
  for (auto& entry : seen) CHECK_MESSAGE(entry.second == expected, entry.first);
  CHECK(wait_until([&] { return batches > 0; }, lenient(20s)));
}

TEST_CASE("sharing: who has no right to a key is refused alone") {
  const EtcdServer server;
  {
    auto admin = connect(server);
    const auto call = [&](const char* path, const nlohmann::json& body) {
      admin.client().call(path, body).value();
    };
    call("/v3/auth/user/add", {{"name", "root"}, {"password", "pw"}});
    call("/v3/auth/user/grant", {{"user", "root"}, {"role", "root"}});
    call("/v3/auth/role/add", {{"name", "mine"}});
    call("/v3/auth/role/grant",
         {{"name", "mine"},
          {"perm", {{"permType", "READWRITE"}, {"key", "bWluZS8="}, {"range_end", "bWluZTA="}}}});
    call("/v3/auth/user/add", {{"name", "user"}, {"password", "pw"}});
    call("/v3/auth/user/grant", {{"user", "user"}, {"role", "mine"}});
    call("/v3/auth/enable", nlohmann::json::object());
  }
  auto options = options_for(server);
  options.username = "user";
  options.password = "pw";
  std::atomic<int> batches{0};
  options.on_request = [&](const RequestEvent& event) { batches += event.path == "/v3/kv/txn"; };
  auto coordinator = connect(options);
  auto& client = coordinator.client();
  in_threads(24, [&](int t) {
    const bool allowed = t != 5;
    const auto key = (allowed ? "mine/" : "theirs/") + std::to_string(t);
    for (int i = 0; i < 40; ++i) {
      const auto put = client.put(key, std::to_string(i));
      CHECK_MESSAGE(put.has_value() == allowed, why(put));
      if (!put) CHECK(put.error().code == ErrorCode::PermissionDenied);
      if (!put) CHECK(put.error().outcome == Outcome::NotApplied);
      if (put) CHECK(client.get(key).value().version == i + 1);
    }
  });
  CHECK(coordinator.close());  // what was sent has been told by then
  CHECK(batches > 0);
}
