// Section 10: registration and discovery, on an etcd in memory whose time the tests move.
#include <doctest/doctest.h>

#include <algorithm>
#include <future>

#include "coordination.hpp"
#include "support/memory_cluster.hpp"

using namespace coordination;
using namespace support;
using nlohmann::json;

namespace {

struct Setup : Cluster {
  Notes notes;  // outlives the coordinators, whose handlers write to it
  Coordinator c{connect("one")}, d{connect("two")};

  RegisterOptions noted(HealPolicy heal = HealPolicy::Restore) {
    RegisterOptions options;
    options.heal = heal;
    options.on_event = [this](RegistrationEvent event, const ServiceInfo& service) {
      notes.add(to_string(event) + (" " + service.id));
    };
    return options;
  }
  std::vector<std::string> ids(const std::string& name = "web") {
    std::vector<std::string> result;
    for (const auto& service : d.registry().discover(name).value()) result.push_back(service.id);
    return result;
  }
  bool come_to(const std::vector<std::string>& expected) {
    return eventually([&] { return ids() == expected; });
  }
  std::int64_t lease_of(const std::string& key) { return d.client().get(key).value().lease; }
};

ServiceInfo web(const std::string& id, int port = 80, milliseconds ttl = 9s) {
  return {id, "web", "10.0.0.1", port, {{"zone", "eu"}}, ttl};
}

std::string next(Watch<ServiceEvent>& watch) {
  const auto event = watch.next(Context::with_timeout(lenient(2s)));
  if (!event) return text_of(event);
  return to_string(event->type) + (" " + event->service.id) + ":" +
         std::to_string(event->service.port);
}

}  // namespace

TEST_CASE("registry: the record as other languages read it") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 8080, 30s)));
  CHECK(s.etcd->keys() == std::vector<std::string>{"/services/web/w1"});
  const auto kv = s.d.client().get("/services/web/w1").value();
  CHECK(json::parse(kv.value) ==
        json::parse(R"({"id":"w1","name":"web","address":"10.0.0.1","port":8080,
                    "metadata":{"zone":"eu"},"ttl":30000000000})"));
  CHECK(s.etcd->leases() == std::vector<std::int64_t>{kv.lease});
  const auto found = s.d.registry().discover("web").value();
  REQUIRE(found.size() == 1);
  CHECK(found[0] == web("w1", 8080, 30s));
}

TEST_CASE("registry: a text that JSON cannot hold is refused, and not changed") {
  Setup s;
  const std::string odd = "\xff\xfe";
  auto bad = web("1");
  SUBCASE("in the metadata") { bad.metadata["name"] = odd; }
  SUBCASE("in its keys") { bad.metadata[odd] = "value"; }
  SUBCASE("in the address") { bad.address = odd; }
  SUBCASE("in the id") { bad.id = odd; }
  const auto before = s.tap->count();
  check_code(s.c.registry().register_service(bad), ErrorCode::Validation);
  CHECK(s.tap->count() == before);
  auto good = web("1");
  good.metadata["name"] = "gr\xc3\xbc\xc3\x9f";
  CHECK(s.c.registry().register_service(good));
  CHECK(s.d.registry().discover("web").value().at(0) == good);
}

TEST_CASE("registry: discovered by id, one service at a time") {
  Setup s;
  for (const char* id : {"c", "a", "b"}) CHECK(s.c.registry().register_service(web(id)));
  auto other = web("x");
  other.name = "web2";
  CHECK(s.c.registry().register_service(other));
  CHECK(s.ids() == std::vector<std::string>{"a", "b", "c"});
  CHECK(s.ids("web2") == std::vector<std::string>{"x"});
  CHECK(s.ids("none").empty());
}

TEST_CASE("registry: a record that cannot be read is skipped and logged") {
  Setup s;
  Notes log;
  auto options = s.options("three");
  options.logger = log.logger();
  auto c = connect_to(options);
  CHECK(s.c.registry().register_service(web("w1")));
  s.d.client().put("/services/web/bad", "{not json").value();
  s.d.client().put("/services/web/port", R"({"id":"p","name":"web","port":99999})").value();
  s.d.client()
      .put("/services/web/w3", R"({"id":"w3","name":"web","address":"h","port":3,)"
                               R"("metadata":null,"ttl":5000000000})")
      .value();
  const auto found = c.registry().discover("web").value();
  REQUIRE(found.size() == 2);
  CHECK(found[0].id == "w1");
  CHECK(found[1].id == "w3");
  CHECK(found[1].ttl == 5s);
  CHECK(eventually([&] { return log.contain("/services/web/port"); }));
  CHECK(log.contain("/services/web/bad"));
}

TEST_CASE("registry: it stays for as long as it is wanted, whatever becomes of the Context") {
  Setup s;
  const auto ctx = Context::with_timeout(1s);
  CHECK(s.c.registry().register_service(web("w1"), s.noted(), ctx));
  ctx.cancel();
  for (int i = 0; i < 9; ++i) {
    const int before = s.tap->finished("/v3/lease/keepalive");
    s.etcd->advance(3001ms);
    CHECK(eventually([&] { return s.tap->finished("/v3/lease/keepalive") > before; }));
  }
  CHECK(s.ids() == std::vector<std::string>{"w1"});
  CHECK(s.c.registry().unregister("w1"));
  CHECK(s.ids().empty());
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1"});
}

TEST_CASE("registry: unregister") {
  Setup s;
  check_code(s.c.registry().unregister("w1"), ErrorCode::NotFound);
  auto other = web("w1");
  other.name = "api";
  CHECK(s.c.registry().register_service(web("w1")));
  CHECK(s.c.registry().register_service(web("w2")));
  CHECK(s.c.registry().register_service(other));
  check_code(s.d.registry().unregister("w1"), ErrorCode::NotFound);  // it is not d's
  CHECK(s.c.registry().unregister("w1"));
  CHECK(s.etcd->keys() == std::vector<std::string>{"/services/web/w2"});
  check_code(s.c.registry().unregister("w1"), ErrorCode::NotFound);
  CHECK(s.c.registry().register_service(web("w1")));
  CHECK(s.ids() == std::vector<std::string>{"w1", "w2"});
}

TEST_CASE("registry: a dead process's record goes with its TTL") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1")));
  s.cut_off("one");
  s.etcd->advance(8999ms);
  CHECK(s.ids() == std::vector<std::string>{"w1"});
  s.etcd->advance(1ms);
  CHECK(s.ids().empty());
}

TEST_CASE("registry: registered again, the record is replaced in one step") {
  Setup s;
  auto watch = s.d.registry().watch("web").value();
  CHECK(s.c.registry().register_service(web("w1", 1), s.noted()));
  CHECK(s.c.registry().register_service(web("w1", 2), s.noted()));
  CHECK(s.c.registry().register_service(web("w1", 3, 20s), s.noted()));
  CHECK(next(watch) == "PUT w1:1");
  CHECK(next(watch) == "PUT w1:2");
  CHECK(next(watch) == "PUT w1:3");
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
  CHECK(s.d.registry().discover("web").value().at(0) == web("w1", 3, 20s));
  s.etcd->advance(9s);
  CHECK(s.ids() == std::vector<std::string>{"w1"});
  s.cut_off("one");
  s.etcd->advance(10s);  // more than it had at first
  CHECK(s.ids() == std::vector<std::string>{"w1"});
  s.etcd->heal();
  CHECK(eventually([&] { return s.notes.size() == 3; }));  // unregister drops what was not told
  CHECK(s.c.registry().unregister("w1"));
  CHECK(next(watch) == "DELETE w1:3");
  CHECK(s.notes.lines() == std::vector<std::string>(3, "REGISTERED w1"));
}

TEST_CASE("registry: a registration that failed leaves nothing behind") {
  Setup s;
  bool made = false;
  SUBCASE("refused") { s.cut_off("one"); }
  SUBCASE("made, but every answer was lost") { made = true; }
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (made && request.path == "/v3/kv/txn") s.etcd->drop_replies(1);
  });
  const auto failed = s.c.registry().register_service(web("w1"), Context::with_timeout(60ms));
  CHECK_FALSE(failed);
  s.tap->before(nullptr);
  s.etcd->heal();
  s.etcd->drop_replies(0);
  CHECK(eventually([&] { return s.etcd->keys().empty() && s.etcd->leases().empty(); }));
  check_code(s.c.registry().unregister("w1"), ErrorCode::NotFound);
  CHECK(s.c.registry().register_service(web("w1")));
}

// Healing.

TEST_CASE("registry: it comes back after the loss of its lease") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  const auto lease = s.lease_of("/services/web/w1");
  s.etcd->expire_lease(lease);
  s.etcd->advance(3001ms);  // the next renewal finds out
  CHECK(s.come_to({"w1"}));
  CHECK(eventually([&] { return s.notes.size() == 3; }));
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "LOST w1", "REGISTERED w1"});
  CHECK(s.lease_of("/services/web/w1") != lease);
  CHECK(s.etcd->leases().size() == 1);
}

TEST_CASE("registry: it comes back after somebody has deleted it") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  CHECK(eventually([&] { return s.tap->count("/v3/watch") > 0; }));
  s.d.client().remove("/services/web/w1").value();
  CHECK(eventually([&] { return s.notes.size() == 3; }));
  CHECK(s.ids() == std::vector<std::string>{"w1"});
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "LOST w1", "REGISTERED w1"});
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
}

TEST_CASE("registry: what comes back is what it was updated to") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  CHECK(s.c.registry().update("w1", {{"state", "up"}}));
  CHECK(eventually([&] { return s.tap->count("/v3/watch") > 0; }));
  s.d.client().remove("/services/web/w1").value();
  CHECK(eventually([&] { return s.notes.size() == 3; }));
  const auto found = s.d.registry().discover("web").value();
  REQUIRE(found.size() == 1);
  CHECK(found[0].metadata == std::map<std::string, std::string>{{"state", "up"}});
}

TEST_CASE("registry: it follows its record also after a compaction") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  CHECK(eventually([&] { return s.tap->count("/v3/watch") > 0; }));
  s.cut_off("one");
  s.d.config().set("x", 1).value();
  s.d.config().set("x", 2).value();
  s.etcd->compact();
  const int before = s.tap->finished("/v3/kv/txn");
  s.etcd->heal();
  CHECK(eventually([&] { return s.tap->finished("/v3/kv/txn") > before; }));  // it has looked
  s.d.client().remove("/services/web/w1").value();
  CHECK(eventually([&] { return s.notes.size() == 3; }));
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "LOST w1", "REGISTERED w1"});
}

TEST_CASE("registry: what was unregistered is not watched any more") {
  Notes watched;
  Setup s;
  CHECK(s.c.registry().register_service(web("w1")));
  CHECK(s.c.registry().register_service(web("w2")));
  CHECK(eventually([&] { return s.tap->count("/v3/watch") > 0; }));
  CHECK(s.c.registry().unregister("w1"));
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path == "/v3/watch") watched.add(request.body);
  });
  // Again and again: the stream that carries it may just be on its way.
  CHECK(eventually([&] {
    s.etcd->cut_streams();
    return watched.contain("L3NlcnZpY2VzL3dlYi93Mg==");  // w2
  }));
  CHECK_FALSE(watched.contain("L3NlcnZpY2VzL3dlYi93MQ=="));  // w1
}

TEST_CASE("registry: it comes back after an etcd that has lost its data") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  CHECK(s.c.registry().register_service(web("w2"), s.noted()));
  CHECK(eventually([&] { return s.tap->count("/v3/watch") > 0; }));
  s.etcd->restart_empty();
  s.etcd->advance(3001ms);  // the next renewal finds out, if the end of the stream has not
  CHECK(s.come_to({"w1", "w2"}));
}

TEST_CASE("registry: its own record, of an attempt that had no answer, is no stranger's") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  // Healing puts the record, does not hear of it, and cannot revoke its lease.
  s.etcd->drop_replies(3, "/v3/kv/txn");
  s.etcd->fail_next(1000, "/v3/lease/revoke");
  s.etcd->expire_lease(s.lease_of("/services/web/w1"));
  s.etcd->advance(3001ms);
  CHECK(eventually([&] { return s.notes.size() == 3; }));
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "LOST w1", "REGISTERED w1"});
  s.etcd->fail_next(0, "/v3/lease/revoke");
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
  CHECK(s.ids() == std::vector<std::string>{"w1"});
}

TEST_CASE("registry: registered again over a stranger's record that nobody has told of yet") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1), s.noted()));
  CHECK(s.d.registry().register_service(web("w1", 2)));
  CHECK(s.c.registry().register_service(web("w1", 3), s.noted()));
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));  // the stranger gives way
  s.etcd->advance(3001ms);
  std::this_thread::sleep_for(50ms);
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 3)});
  auto told = s.notes.lines();
  told.erase(std::remove(told.begin(), told.end(), "REPLACED w1"), told.end());  // if it was heard
  CHECK(told == std::vector<std::string>{"REGISTERED w1", "REGISTERED w1"});
}

TEST_CASE("registry: a registration that fails does not end another of the same") {
  std::atomic<bool> first_is_in{false}, second_comes{false};
  Setup s;
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path != "/v3/lease/grant" || first_is_in.exchange(true)) return;
    CHECK(eventually([&] { return second_comes.load(); }));
    std::this_thread::sleep_for(20ms);  // it waits for its turn
  });
  s.etcd->drop_replies(3, "/v3/lease/grant");
  Joined first(
      [&] { check_code(s.c.registry().register_service(web("w1", 1)), ErrorCode::Connection); });
  CHECK(eventually([&] { return first_is_in.load(); }));
  second_comes = true;
  CHECK(s.c.registry().register_service(web("w1", 2)));
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 2)});
}

TEST_CASE("registry: replaced twice without an answer it is still there, and then gone at once") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1, 9s), s.noted()));
  auto watch = s.d.registry().watch("web").value();
  s.etcd->drop_replies(3, "/v3/kv/txn");
  check_code(s.c.registry().register_service(web("w1", 2, 20s), s.noted()), ErrorCode::Connection);
  s.tap->lose(3, "/v3/kv/txn");
  check_code(s.c.registry().register_service(web("w1", 3, 30s), s.noted()), ErrorCode::Connection);
  for (int i = 0; i < 4; ++i) {
    const int before = s.tap->finished("/v3/lease/keepalive");
    s.etcd->advance(3001ms);
    CHECK(eventually([&] { return s.tap->finished("/v3/lease/keepalive") > before; }));
  }
  CHECK(s.ids() == std::vector<std::string>{"w1"});
  CHECK(s.c.registry().register_service(web("w1", 4, 9s), s.noted()));
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
  CHECK(s.c.registry().unregister("w1"));
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
  auto event = next(watch);
  CHECK(event == "PUT w1:2");
  while (event == "PUT w1:2") event = next(watch);  // it was sent as often as its answer was lost
  CHECK(event == "PUT w1:4");
  CHECK(next(watch) == "DELETE w1:4");
}

TEST_CASE("registry: unregistered while it was being replaced, with less time: gone all the same") {
  std::promise<void> go;
  std::atomic<bool> waits{false};
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1)));
  const auto hook = s.tap->before([&](const HttpRequest& request) {
    if (request.path != "/v3/kv/txn" || waits.exchange(true)) return;
    go.get_future().wait();
  });
  Joined replacing([&] { static_cast<void>(s.c.registry().register_service(web("w1", 2))); });
  CHECK(eventually([&] { return waits.load(); }));
  check_code(s.c.registry().unregister("w1", Context::with_timeout(10ms)), ErrorCode::Timeout);
  go.set_value();
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
  CHECK(s.ids().empty());
}

TEST_CASE("registry: a put that may arrive late does not undo a later one") {
  HttpRequest late;
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1)));
  const auto hook = s.tap->lose_if([&](const HttpRequest& request) {
    if (request.path != "/v3/kv/txn") return false;
    late = request;
    return true;
  });
  check_code(s.c.registry().register_service(web("w1", 2)), ErrorCode::Connection);
  s.tap->lose_if(nullptr);
  CHECK(s.c.registry().register_service(web("w1", 3)));
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
  static_cast<void>(s.etcd->perform(late, nullptr, {}));
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 3)});
}

TEST_CASE("registry: update leaves alone what somebody else has replaced") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1), s.noted()));
  CHECK(s.d.registry().register_service(web("w1", 2)));
  CHECK(eventually([&] { return s.notes.size() == 2; }));  // REPLACED
  check_code(s.c.registry().update("w1", {{"x", "y"}}), ErrorCode::NotFound);
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 2)});
  CHECK(s.c.registry().register_service(web("w1", 3), s.noted()));
  CHECK(s.c.registry().update("w1", {{"x", "y"}}));
}

TEST_CASE("registry: update replaces the metadata in one step") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1), s.noted()));
  CHECK(s.c.registry().register_service(web("w2", 2)));
  auto watch = s.d.registry().watch("web").value();
  const auto lease = s.lease_of("/services/web/w1");
  CHECK(s.c.registry().update("w1", {{"zone", "us"}, {"weight", "3"}}));
  auto expected = web("w1", 1);
  expected.metadata = {{"zone", "us"}, {"weight", "3"}};
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{expected, web("w2", 2)});
  CHECK(s.lease_of("/services/web/w1") == lease);
  CHECK(s.c.registry().update("w1", {}));
  CHECK(s.c.registry().unregister("w1"));
  CHECK(next(watch) == "PUT w1:1");
  CHECK(next(watch) == "PUT w1:1");
  CHECK(next(watch) == "DELETE w1:1");
  check_code(s.c.registry().update("w1", {}), ErrorCode::NotFound);
  check_code(s.d.registry().update("w2", {}), ErrorCode::NotFound);  // another has registered it
  check_code(s.c.registry().update("w2", {{"x", "\xff"}}), ErrorCode::Validation);
  check_code(s.c.registry().update("a/b", {}), ErrorCode::Validation);
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w2", 2)});
}

TEST_CASE("registry: it comes back after a partition") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  s.cut_off("one");
  s.etcd->advance(9s);
  CHECK(s.ids().empty());
  CHECK(eventually([&] { return s.notes.size() == 2; }));
  s.etcd->heal();
  CHECK(s.come_to({"w1"}));
  CHECK(eventually([&] { return s.notes.size() == 3; }));
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "LOST w1", "REGISTERED w1"});
}

TEST_CASE("registry: NotifyOnly stays away, until it is registered again") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted(HealPolicy::NotifyOnly)));
  s.etcd->expire_lease(s.lease_of("/services/web/w1"));
  s.etcd->advance(3001ms);
  CHECK(eventually([&] { return s.notes.size() == 2; }));
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "LOST w1"});
  std::this_thread::sleep_for(20ms);
  CHECK(s.ids().empty());
  CHECK(s.c.registry().register_service(web("w1", 81), s.noted()));
  CHECK(s.ids() == std::vector<std::string>{"w1"});
}

TEST_CASE("registry: of two with one name and id the later one stays, and there is no fight") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1), s.noted()));
  CHECK(eventually([&] { return s.tap->count("/v3/watch") > 0; }));
  CHECK(s.d.registry().register_service(web("w1", 2)));
  CHECK(eventually([&] { return s.notes.size() == 2; }));
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "REPLACED w1"});
  s.etcd->advance(3001ms);
  const auto found = s.d.registry().discover("web").value();
  REQUIRE(found.size() == 1);
  CHECK(found[0].port == 2);
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
  static_cast<void>(s.c.registry().unregister("w1"));
  CHECK(s.ids() == std::vector<std::string>{"w1"});
}

TEST_CASE("registry: one that was replaced while it was cut off gives way") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1), s.noted()));
  s.cut_off("one");
  s.etcd->advance(9s);
  CHECK(s.d.registry().register_service(web("w1", 2)));
  CHECK(eventually([&] { return s.notes.size() == 2; }));
  s.etcd->heal();
  CHECK(eventually([&] { return s.notes.size() == 3; }));
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "LOST w1", "REPLACED w1"});
  CHECK(s.d.registry().discover("web").value().at(0).port == 2);
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
}

TEST_CASE("registry: close takes all away, and nothing comes back") {
  Setup s;
  for (int i = 0; i < 50; ++i) {
    CHECK(s.c.registry().register_service(web("w" + std::to_string(i)), s.noted()));
  }
  CHECK(s.ids().size() == 50);
  s.c.close().value();
  CHECK(s.ids().empty());
  CHECK(s.etcd->leases().empty());
  const auto told = s.notes.size();
  s.etcd->advance(30s);
  CHECK(s.ids().empty());
  CHECK(s.notes.size() == told);
}

TEST_CASE("registry: a handler may register and unregister") {
  std::atomic<bool> done{false};
  Setup s;
  RegisterOptions options;
  options.on_event = [&](RegistrationEvent event, const ServiceInfo&) {
    if (event != RegistrationEvent::Lost) return;
    CHECK(s.c.registry().unregister("w1"));
    CHECK(s.c.registry().register_service(web("w2")));
    done = true;
  };
  CHECK(s.c.registry().register_service(web("w1"), options));
  s.etcd->expire_lease(s.lease_of("/services/web/w1"));
  s.etcd->advance(3001ms);
  CHECK(eventually([&] { return done.load(); }));
  CHECK(s.come_to({"w2"}));
}

// Watching.

TEST_CASE("registry: events, in order, with the whole record also at the end") {
  Setup s;
  auto watch = s.d.registry().watch("web").value();
  const auto revision = s.etcd->revision();
  CHECK(s.c.registry().register_service(web("w1", 1)));
  CHECK(s.c.registry().register_service(web("w2", 2)));
  CHECK(s.c.registry().unregister("w1"));
  const auto first = watch.next(Context::with_timeout(lenient(2s)));
  REQUIRE_MESSAGE(first, text_of(first));
  CHECK(first->type == EventType::Put);
  CHECK(first->service == web("w1", 1));
  CHECK(first->revision == revision + 1);
  CHECK(first->timestamp > std::chrono::system_clock::now() - 1min);
  CHECK(next(watch) == "PUT w2:2");
  const auto last = watch.next(Context::with_timeout(lenient(2s)));
  REQUIRE_MESSAGE(last, text_of(last));
  CHECK(last->type == EventType::Delete);
  CHECK(last->service == web("w1", 1));
  CHECK(last->revision == revision + 3);
  check_code(watch.next(Context::with_timeout(5ms)), ErrorCode::Timeout);
}

TEST_CASE("registry: what was there before, the oldest first") {
  Setup s;
  for (const char* id : {"c", "a", "b"}) CHECK(s.c.registry().register_service(web(id)));
  WatchOptions options;
  options.include_existing = true;
  auto watch = s.d.registry().watch("web", options).value();
  CHECK(s.c.registry().unregister("c"));
  CHECK(next(watch) == "PUT c:80");
  CHECK(next(watch) == "PUT a:80");
  CHECK(next(watch) == "PUT b:80");
  CHECK(next(watch) == "DELETE c:80");
}

TEST_CASE("registry: a handler, until its subscription ends") {
  Setup s;
  Notes events;
  auto subscription = s.d.registry().watch("web", [&](const ServiceEvent& event) {
    events.add(to_string(event.type) + (" " + event.service.id));
  });
  REQUIRE_MESSAGE(subscription, text_of(subscription));
  CHECK(s.c.registry().register_service(web("w1")));
  CHECK(s.c.registry().unregister("w1"));
  CHECK(eventually([&] { return events.size() == 2; }));
  CHECK(events.lines() == std::vector<std::string>{"PUT w1", "DELETE w1"});
  subscription->cancel();
  CHECK(s.c.registry().register_service(web("w2")));
  std::this_thread::sleep_for(10ms);
  CHECK(events.size() == 2);
}

TEST_CASE("registry: events of records that cannot be read") {
  Setup s;
  auto watch = s.d.registry().watch("web").value();
  s.c.client().put("/services/web/bad", "{").value();
  s.c.client().remove("/services/web/bad").value();
  CHECK(s.c.registry().register_service(web("w1")));
  CHECK(next(watch) == "PUT w1:80");  // what was never readable cannot go
  s.c.client().put("/services/web/w1", "{").value();
  CHECK(next(watch) == "DELETE w1:80");
  CHECK(s.ids().empty());
  s.c.client().put("/services/web/w1", "[").value();
  CHECK(s.c.registry().register_service(web("w2")));
  CHECK(next(watch) == "PUT w2:80");
}

// What is another's.

TEST_CASE("registry: a rolling restart under one id ends with exactly the living instance") {
  for (int round = 0; round < scaled(100); ++round) {
    Setup s;
    CHECK(s.c.registry().register_service(web("w1", 1)));
    {
      // The old one says that it goes, and goes, while the new one comes.
      Joined old([&] {
        static_cast<void>(s.c.registry().update("w1", {{"state", "draining"}}));
        static_cast<void>(s.c.registry().unregister("w1"));
      });
      CHECK(s.d.registry().register_service(web("w1", 2)));
    }
    s.c.close().value();
    CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 2)});
  }
}

TEST_CASE("registry: update and unregister do not touch what is another's, told of it or not") {
  Setup s;
  s.tap->lose_if([](const HttpRequest& request) { return request.path == "/v3/watch"; });
  CHECK(s.c.registry().register_service(web("w1", 1)));
  CHECK(s.d.registry().register_service(web("w1", 2)));
  SUBCASE("update") { check_code(s.c.registry().update("w1", {{"x", "y"}}), ErrorCode::NotFound); }
  SUBCASE("unregister") { CHECK(s.c.registry().unregister("w1")); }
  s.tap->lose_if(nullptr);
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 2)});
  s.c.close().value();
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 2)});
}

TEST_CASE("registry: one that was replaced comes back when the other has gone") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1), s.noted()));
  CHECK(s.d.registry().register_service(web("w1", 2)));
  CHECK(eventually([&] { return s.notes.size() == 2; }));
  CHECK(s.d.registry().unregister("w1"));
  CHECK(eventually([&] { return s.notes.size() == 3; }));
  CHECK(s.notes.lines() ==
        std::vector<std::string>{"REGISTERED w1", "REPLACED w1", "REGISTERED w1"});
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 1)});
  CHECK(eventually([&] { return s.etcd->leases().size() == 1; }));
}

TEST_CASE("registry: update tells no event, but that what was lost is there again") {
  Setup s;
  RegisterOptions options;
  options.on_event = [&](RegistrationEvent event, const ServiceInfo&) {
    s.notes.add(to_string(event));
    static_cast<void>(s.c.registry().update("w1", {{"state", "up"}}));
  };
  CHECK(s.c.registry().register_service(web("w1"), options));
  CHECK(eventually([&] { return s.d.registry().discover("web")->at(0).metadata.count("state"); }));
  CHECK(s.c.registry().update("w1", {{"state", "down"}}));
  s.d.client().remove("/services/web/w1").value();
  CHECK(s.c.registry().update("w1", {{"state", "again"}}));
  CHECK(s.ids() == std::vector<std::string>{"w1"});
  const auto told = s.notes.lines();
  CHECK(told.front() == "REGISTERED");
  CHECK(std::count(told.begin(), told.end(), "REGISTERED") <= 2);
  CHECK(std::count(told.begin(), told.end(), "REPLACED") == 0);
}

TEST_CASE("registry: what is lost, and is to come back, may be updated meanwhile") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  s.etcd->fail_next(1000, "/v3/lease/grant");
  s.etcd->expire_lease(s.lease_of("/services/web/w1"));
  CHECK(eventually([&] { return s.notes.contain("LOST w1"); }));
  s.etcd->fail_next(0, "/v3/lease/grant");
  CHECK(s.c.registry().update("w1", {{"x", "y"}}));
  CHECK(s.d.registry().discover("web")->at(0).metadata.at("x") == "y");
}

TEST_CASE("registry: what could not be put back at once is put back later") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  s.tap->lose(6, "/v3/kv/txn");  // two looks, of three attempts each
  s.d.client().remove("/services/web/w1").value();
  CHECK(s.come_to({"w1"}));
}

TEST_CASE("registry: registered again under a lease that has died unheard") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1)));
  s.tap->lose_if([](const HttpRequest& request) { return request.path == "/v3/watch"; });
  s.etcd->cut_streams();
  CHECK(eventually([&] { return s.tap->finished("/v3/lease/keepalive") > 0; }));
  s.etcd->expire_lease(s.lease_of("/services/web/w1"));
  CHECK(s.c.registry().register_service(web("w1", 2)));
  CHECK(s.ids() == std::vector<std::string>{"w1"});
}

TEST_CASE("registry: unregistered after a change that nobody has heard of") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1", 1)));
  s.etcd->drop_replies(3, "/v3/kv/txn");
  check_code(s.c.registry().register_service(web("w1", 2)), ErrorCode::Connection);
  s.etcd->fail_next(1000, "/v3/lease/revoke");  // which would take it away, too
  CHECK(s.c.registry().unregister("w1"));
  CHECK(s.ids().empty());
}

TEST_CASE("registry: what is to stay away when it is lost is not brought back by update") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted(HealPolicy::NotifyOnly)));
  s.d.client().remove("/services/web/w1").value();
  check_code(s.c.registry().update("w1", {{"x", "y"}}), ErrorCode::NotFound);
  CHECK(eventually([&] { return s.notes.size() == 2; }));
  check_code(s.c.registry().update("w1", {{"x", "y"}}), ErrorCode::NotFound);
  CHECK(s.ids().empty());
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "LOST w1"});
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
}

TEST_CASE("registry: of several with one id, those that are still its own are updated") {
  Setup s;
  for (const char* name : {"api", "web"}) {
    CHECK(s.c.registry().register_service({"w1", name, "10.0.0.1", 80}, s.noted()));
  }
  std::string taken, own;
  SUBCASE("the first was replaced") { taken = "api", own = "web"; }
  SUBCASE("the second was replaced") { taken = "web", own = "api"; }
  CHECK(s.d.registry().register_service({"w1", taken, "10.0.0.2", 80}));
  CHECK(eventually([&] { return s.notes.contain("REPLACED"); }));
  const auto updated = s.c.registry().update("w1", {{"state", "up"}});
  REQUIRE_MESSAGE(updated, text_of(updated));
  CHECK(s.d.registry().discover(own)->at(0).metadata.at("state") == "up");
  CHECK(s.d.registry().discover(taken)->at(0).metadata.empty());
}

TEST_CASE("registry: an update that fails leaves the record as it is") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  s.cut_off("one");
  check_code(s.c.registry().update("w1", {{"x", "y"}}), ErrorCode::Connection);
  s.etcd->heal();
  s.etcd->advance(3001ms);
  CHECK(eventually([&] { return s.tap->finished("/v3/lease/keepalive") > 0; }));
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1")});
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1"});
}

TEST_CASE("registry: it comes back though every answer takes longer than a second") {
  Setup s;
  CHECK(s.c.registry().register_service(web("w1"), s.noted()));
  s.etcd->expire_lease(s.lease_of("/services/web/w1"));
  s.tap->before([](const HttpRequest& request) {
    if (request.path != "/v3/watch") std::this_thread::sleep_for(1100ms);
  });
  s.etcd->advance(3001ms);
  CHECK(wait_until([&] { return s.notes.size() == 3; }, lenient(12s)));
  s.tap->before(nullptr);
  CHECK(s.notes.lines() == std::vector<std::string>{"REGISTERED w1", "LOST w1", "REGISTERED w1"});
}

TEST_CASE("registry: revisions of what was written, and a view that waits for them") {
  Setup s;
  const auto view = s.d.registry().view("web").value();
  const auto made = s.c.registry().register_service(web("w1")).value();
  CHECK(view.wait_for(made));
  CHECK(view.instances() == std::vector<ServiceInfo>{web("w1")});
  const auto updated = s.c.registry().update("w1", {}).value();
  CHECK(updated > made);
  CHECK(view.wait_for(updated));
  CHECK(view.instances().at(0).metadata.empty());
  const auto gone = s.c.registry().unregister("w1").value();
  CHECK(gone > updated);
  CHECK(view.wait_for(gone));
  CHECK(view.instances().empty());
  const Result<void> as_before = s.c.registry().register_service(web("w1"));
  CHECK(as_before);
}

TEST_CASE("registry: a registration that ends with its handle") {
  Setup s;
  {
    auto one = s.c.registry().register_scoped(web("w1"), s.noted());
    REQUIRE_MESSAGE(one, text_of(one));
    auto moved = std::move(*one);
    CHECK(s.ids() == std::vector<std::string>{"w1"});
    CHECK(moved.update({{"a", "b"}}));
    CHECK(s.d.registry().discover("web")->at(0).metadata.at("a") == "b");
    check_code(one->update({}), ErrorCode::Cancelled);  // NOLINT: moved from
    check_code(one->unregister(), ErrorCode::Cancelled);
    auto two = s.c.registry().register_scoped(web("w2")).value();
    two = std::move(moved);
    CHECK(s.ids() == std::vector<std::string>{"w1"});
  }
  CHECK(s.ids().empty());
  CHECK(eventually([&] { return s.etcd->leases().empty(); }));
  auto last = s.c.registry().register_scoped(web("w3")).value();
  CHECK(last.unregister());
  check_code(last.unregister(), ErrorCode::NotFound);
  check_code(last.update({}), ErrorCode::NotFound);
  check_code(s.c.registry().unregister("w3"), ErrorCode::NotFound);
  check_code(s.c.registry().register_scoped(web("")), ErrorCode::Validation);
}

TEST_CASE("registry: a handle's record is replaced, and not taken over, by register_service") {
  Setup s;
  auto handle = s.c.registry().register_scoped(web("w1", 1)).value();
  CHECK(s.c.registry().register_service(web("w1", 2)));
  check_code(handle.update({{"x", "y"}}), ErrorCode::NotFound);
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 2)});
}

TEST_CASE("registry: a handle ends what it has registered, and not what another one has since") {
  Setup s;
  auto handle = s.c.registry().register_scoped(web("w1", 1)).value();
  handle = s.c.registry().register_scoped(web("w1", 2)).value();
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 2)});
  std::optional<Registration> other = s.c.registry().register_scoped(web("w1", 3)).value();
  check_code(handle.update({{"x", "y"}}), ErrorCode::NotFound);
  other.reset();  // the one that it has replaced comes back
  CHECK(eventually([&] { return s.ids() == std::vector<std::string>{"w1"}; }));
  CHECK(s.d.registry().discover("web").value() == std::vector<ServiceInfo>{web("w1", 2)});
  CHECK(s.c.registry().unregister("w1"));
  CHECK(s.ids().empty());
  check_code(handle.unregister(), ErrorCode::NotFound);
}
