// Shared and exclusive locks, and semaphores: who may be beside whom, and who comes next.
#include <doctest/doctest.h>

#include "support/lock_support.hpp"

using namespace coordination;
using namespace support;

namespace {

constexpr milliseconds kTtl = 20s;

// Clients of one etcd, and what they wait for, by number.
struct Queue {
  Onlooker onlooker{lease_etcd()};
  CoordinatorOptions options{options_for(lease_etcd())};
  std::vector<Coordinator> clients;
  std::string path;
  std::vector<std::unique_ptr<Wish>> wishes;

  explicit Queue(const std::string& service) : path(options.key_prefix + service) {
    REQUIRE(onlooker.wait_leases(0, 30s));
    for (int i = 0; i < 3; ++i) clients.push_back(connect(options));
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;
  ~Queue() {
    for (auto& wish : wishes) wish->ctx.cancel();
    wishes.clear();
    for (auto& client : clients) static_cast<void>(client.close());
    CHECK(onlooker.count(path) == 0);
    CHECK(onlooker.wait_leases(0, 1s));
  }

  // Begins a call and waits until its key is in the queue.
  int join(const std::function<Result<Lock>(DistributedLock&, const Context&)>& call) {
    const auto places = onlooker.count(path);
    wishes.push_back(std::make_unique<Wish>());
    auto& wish = *wishes.back();
    auto& lock = clients[wishes.size() % clients.size()].lock();
    wish.future =
        std::async(std::launch::async, [&wish, &lock, call] { return call(lock, wish.ctx); });
    REQUIRE(onlooker.wait_count(path, places + 1));
    const auto last = onlooker.keys(path).back();
    wish.key = last.key;
    wish.token = last.create_revision;
    return static_cast<int>(wishes.size()) - 1;
  }
  int exclusive() {
    return join([](auto& lock, auto& ctx) { return lock.acquire("k", kTtl, ctx); });
  }
  int shared() {
    return join([](auto& lock, auto& ctx) { return lock.acquire_shared("k", kTtl, ctx); });
  }
  int permit(int permits) {
    return join([permits](auto& lock, auto& ctx) {
      return lock.semaphore("k", permits).acquire(kTtl, ctx);
    });
  }
  Wish& operator[](int i) { return *wishes[static_cast<std::size_t>(i)]; }
  bool has(int i) { return (*this)[i].wait_ready() && (*this)[i].result->has_value(); }
  // Whether those, and only those, of the others who are still waiting have got it.
  bool waits(int i) { return !(*this)[i].ready(); }
  void unlock(int i) { REQUIRE((**(*this)[i].result).unlock()); }
};

}  // namespace

TEST_CASE("shared: beside other shared holders, never beside an exclusive one, in FIFO order") {
  Queue queue("/locks/k/");
  const int x1 = queue.exclusive();
  REQUIRE(queue.has(x1));
  const int s1 = queue.shared(), s2 = queue.shared();
  const int x2 = queue.exclusive();
  const int s3 = queue.shared(), s4 = queue.shared();
  CHECK((queue.waits(s1) && queue.waits(s2) && queue.waits(x2) && queue.waits(s3)));
  queue.unlock(x1);
  REQUIRE(queue.has(s1));
  REQUIRE(queue.has(s2));
  // The waiting exclusive one is not overtaken by shared ones that came later.
  CHECK((queue.waits(x2) && queue.waits(s3) && queue.waits(s4)));
  queue.unlock(s2);
  CHECK(queue.waits(x2));
  queue.unlock(s1);
  REQUIRE(queue.has(x2));
  CHECK((queue.waits(s3) && queue.waits(s4)));
  queue.unlock(x2);
  REQUIRE(queue.has(s3));
  REQUIRE(queue.has(s4));
  const auto token = [&](int i) { return (**queue[i].result).fencing_token(); };
  CHECK((token(x1) < token(s1) && token(s1) < token(s2) && token(s2) < token(x2) &&
         token(x2) < token(s3) && token(s3) < token(s4)));
  queue.unlock(s3);
  queue.unlock(s4);
}

TEST_CASE("shared: a waiting exclusive one that gives up lets the shared ones behind it in") {
  Queue queue("/locks/k/");
  const int s1 = queue.shared();
  REQUIRE(queue.has(s1));
  const int x = queue.exclusive();
  const int s2 = queue.shared();
  CHECK(queue.waits(s2));
  queue[x].ctx.cancel();
  REQUIRE(queue.has(s2));
  CHECK(queue[x].wait_ready());
  CHECK(queue[x].failed_with(ErrorCode::Cancelled));
  CHECK((**queue[s1].result).held());
}

TEST_CASE("shared: tries") {
  Queue queue("/locks/k/");
  auto& lock = queue.clients[0].lock();
  auto& other = queue.clients[1].lock();
  {
    auto s1 = lock.try_acquire_shared("k", kTtl).value();
    auto s2 = other.try_acquire_shared("k", kTtl).value();
    CHECK((s1.held() && s2.held()));
    const auto x = other.try_acquire("k", kTtl);
    REQUIRE_FALSE(x);
    CHECK(x.error().code == ErrorCode::Conflict);
    CHECK(queue.onlooker.count(queue.path) == 2);
  }
  {
    auto x = lock.try_acquire("k", kTtl).value();
    const auto s = other.try_acquire_shared("k", kTtl);
    REQUIRE_FALSE(s);
    CHECK(s.error().code == ErrorCode::Conflict);
    CHECK(queue.onlooker.count(queue.path) == 1);
  }
  // A try that was refused is gone when it returns: the next is not refused because of it.
  for (int i = 0; i < scaled(50); ++i) {
    auto x = lock.acquire("k", kTtl).value();
    REQUIRE_FALSE(other.try_acquire_shared("k", kTtl));
    REQUIRE(x.unlock());
    auto second = lock.try_acquire("k", kTtl);
    REQUIRE_MESSAGE(second, why(second));
  }
  const int s = queue.shared();
  REQUIRE(queue.has(s));
  const int x = queue.exclusive();
  CHECK(queue.waits(x));
  const auto overtaking = lock.try_acquire_shared("k", kTtl);  // somebody waits already
  REQUIRE_FALSE(overtaking);
  CHECK(overtaking.error().code == ErrorCode::Conflict);
  queue.unlock(s);
  REQUIRE(queue.has(x));
}

TEST_CASE("shared: loss of one holder leaves the others alone") {
  Queue queue("/locks/k/");
  const int s1 = queue.shared(), s2 = queue.shared();
  REQUIRE(queue.has(s1));
  REQUIRE(queue.has(s2));
  const int x = queue.exclusive();
  auto& first = **queue[s1].result;
  REQUIRE(first.put(queue.options.key_prefix + "/x", "1"));
  SUBCASE("its lease is revoked") {
    REQUIRE(queue.onlooker.gateway.revoke(lease_of_key(first.key())));
  }
  SUBCASE("its key is deleted") { queue.onlooker.client().remove(first.key()).value(); }
  CHECK(queue[s1].loss.wait(1));
  CHECK_FALSE(first.held());
  CHECK(first.put(queue.options.key_prefix + "/x", "2").error().code == ErrorCode::Lost);
  CHECK((**queue[s2].result).held());
  CHECK(queue.waits(x));
  CHECK(queue[s2].loss.told() == 0);
  queue.unlock(s2);
  REQUIRE(queue.has(x));
  CHECK(queue[s1].loss.told() == 1);
  CHECK(first.unlock().error().code == ErrorCode::Lost);
}

TEST_CASE("semaphore: never more than its permits, first come, first served") {
  Queue queue("/semaphores/k/");
  const int a = queue.permit(2), b = queue.permit(2);
  REQUIRE(queue.has(a));
  REQUIRE(queue.has(b));
  const int c = queue.permit(2), d = queue.permit(2), e = queue.permit(2);
  CHECK((queue.waits(c) && queue.waits(d) && queue.waits(e)));
  queue.unlock(b);
  REQUIRE(queue.has(c));
  CHECK((queue.waits(d) && queue.waits(e)));
  queue[d].ctx.cancel();
  CHECK(queue[d].wait_ready());
  CHECK(queue.waits(e));
  queue.unlock(a);
  REQUIRE(queue.has(e));
  // A permit that is lost is given to the next.
  const int f = queue.permit(2);
  CHECK(queue.waits(f));
  REQUIRE(queue.onlooker.gateway.revoke(lease_of_key(queue[c].key)));
  REQUIRE(queue.has(f));
  CHECK(queue[c].loss.wait(1));
  CHECK_FALSE((**queue[c].result).held());
}

TEST_CASE("semaphore: tries and wrong arguments") {
  Queue queue("/semaphores/k/");
  auto& lock = queue.clients[0].lock();
  auto one = lock.semaphore("k", 1);
  auto same = queue.clients[1].lock().semaphore("k", 1);
  for (int i = 0; i < scaled(50); ++i) {
    auto held = one.acquire(kTtl).value();
    const auto refused = same.try_acquire(kTtl);
    REQUIRE_FALSE(refused);
    REQUIRE(refused.error().code == ErrorCode::Conflict);
    REQUIRE(queue.onlooker.count(queue.path) == 1);
    REQUIRE(held.unlock());
    auto next = one.try_acquire(kTtl);
    REQUIRE_MESSAGE(next, why(next));
  }
  const auto timeout = [&] {
    auto held = one.acquire(kTtl).value();
    return same.acquire(kTtl, Context::with_timeout(30ms));
  }();
  REQUIRE_FALSE(timeout);
  CHECK(timeout.error().code == ErrorCode::Timeout);
  CHECK(queue.onlooker.wait_count(queue.path, 0, 1s));
  for (const int permits : {0, -1}) {
    CHECK(lock.semaphore("k", permits).acquire(kTtl).error().code == ErrorCode::Validation);
    CHECK(lock.semaphore("k", permits).try_acquire(kTtl).error().code == ErrorCode::Validation);
  }
  CHECK(lock.semaphore("", 1).acquire(kTtl).error().code == ErrorCode::Validation);
  CHECK(lock.semaphore("a//b", 1).acquire(kTtl).error().code == ErrorCode::Validation);
  CHECK(lock.semaphore("k", 1).acquire(0s).error().code == ErrorCode::Validation);
}

TEST_CASE("semaphore: twelve threads, three permits, counted inside") {
  Queue queue("/semaphores/k/");
  std::atomic<int> inside{0}, most{0}, passes{0}, errors{0};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 12; ++t) {
    threads.emplace_back([&, t] {
      auto semaphore = queue.clients[t % 3].lock().semaphore("k", 3);
      for (int i = 0; i < scaled(20); ++i) {
        auto permit = semaphore.acquire(kTtl);
        if (!permit) {
          ++errors;
          continue;
        }
        const int now = ++inside;
        int before = most;
        while (now > before && !most.compare_exchange_weak(before, now)) {
        }
        std::this_thread::sleep_for(1ms);
        --inside;
        ++passes;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(errors.load() == 0);
  CHECK(passes.load() == 12 * scaled(20));
  CHECK(most.load() == 3);  // all permits are used, and no more
}

TEST_CASE("shared, semaphore: random interleavings agree with a model [slow]") {
  const unsigned seed = test_seed();
  MESSAGE("COORDINATION_TEST_SEED=" << seed);
  QueueModel::Rule rule;
  SUBCASE("shared and exclusive") { rule.shared = true; }
  SUBCASE("one permit") { rule.permits = 1; }
  SUBCASE("three permits") { rule.permits = 3; }
  CHECK(run_queue_models(rule, scaled(40), 12, seed) == "");
  Onlooker onlooker(lease_etcd());
  CHECK(onlooker.wait_leases(0, 1s));
}
